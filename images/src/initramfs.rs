//! The guest's first file system: the agent as `/init` and the kernel modules it loads.

pub(crate) mod cpio;

use std::fs;
use std::path::{Path, PathBuf};

use object::elf::{EM_X86_64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};

use crate::digest;
use crate::fault::FileError;
use crate::kernel::Kernel;
use crate::staging::{Staging, StagingError, install};
use cpio::{Archive, CpioError};

/// Folders that the agent mounts on.
const FOLDERS: [&str; 7] = [
    "dev", "lower", "modules", "newroot", "overlay", "proc", "sys",
];

/// A guest's first file system on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// An uncompressed cpio archive (newc).
    pub path: PathBuf,
    /// SHA-256 of the archive, hexadecimal.
    pub digest: String,
}

/// The initramfs could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The agent is no ELF program for this machine.
    #[error("the agent {} is no x86-64 ELF program", path.display())]
    NotElf {
        /// The file given as agent.
        path: PathBuf,
    },
    /// The agent wants a dynamic loader, and the initramfs has none.
    #[error(
        "the agent {} is dynamically linked: build it for the target x86_64-unknown-linux-musl, \
         or with RUSTFLAGS='-C target-feature=+crt-static'",
        path.display()
    )]
    Dynamic {
        /// The file given as agent.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("building the initramfs")]
    File(#[from] FileError),
    /// No scratch folder.
    #[error("building the initramfs")]
    Staging(#[from] StagingError),
    /// A file does not fit the archive format.
    #[error("packing the initramfs")]
    Cpio(#[from] CpioError),
}

/// The initramfs for `kernel` and `agent` in `folder`, written if it is not there.
pub(crate) fn ensure(
    folder: &Path,
    kernel: &Kernel,
    agent: &Path,
    staging: impl FnOnce() -> Result<Staging, StagingError>,
) -> Result<Initramfs, InitramfsError> {
    let archive = pack(kernel, agent)?;
    let digest = digest::bytes(&archive);
    let path = folder.join(format!("{digest}.cpio"));
    let length = u64::try_from(archive.len()).unwrap_or(u64::MAX);
    if !fs::metadata(&path).is_ok_and(|metadata| metadata.len() == length) {
        let staging = staging()?;
        let scratch = staging.path().join("initramfs.cpio");
        fs::write(&scratch, &archive).map_err(FileError::on("writing", &scratch))?;
        install(&scratch, &path)?;
    }
    Ok(Initramfs { path, digest })
}

fn pack(kernel: &Kernel, agent: &Path) -> Result<Vec<u8>, InitramfsError> {
    let program = fs::read(agent).map_err(FileError::on("reading the agent", agent))?;
    check_agent(agent, &program)?;
    let mut archive = Archive::new();
    for folder in FOLDERS {
        archive.folder(folder, 0o755)?;
    }
    // The kernel opens /dev/console for init before init can mount devtmpfs.
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.file("init", 0o755, &program)?;
    // The agent's `boot/modules.rs` reads these two lists.
    for (list, modules) in [
        ("order", &kernel.modules),
        ("network-order", &kernel.network_modules),
    ] {
        let mut order = String::new();
        for path in modules {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let module = fs::read(path).map_err(FileError::on("reading", path))?;
            archive.file(&format!("modules/{name}"), 0o644, &module)?;
            order.push_str(name);
            order.push('\n');
        }
        archive.file(&format!("modules/{list}"), 0o644, order.as_bytes())?;
    }
    Ok(archive.finish()?)
}

/// The agent runs before any root file system is there: it must not ask for a dynamic loader.
fn check_agent(path: &Path, program: &[u8]) -> Result<(), InitramfsError> {
    type Header = object::elf::FileHeader64<object::Endianness>;
    let headers = Header::parse(program).and_then(|header| {
        let endian = header.endian()?;
        Ok((
            header.e_machine(endian),
            endian,
            header.program_headers(endian, program)?,
        ))
    });
    match headers {
        Ok((EM_X86_64, endian, headers)) => {
            if headers
                .iter()
                .any(|header| header.p_type(endian) == PT_INTERP)
            {
                return Err(InitramfsError::Dynamic {
                    path: path.to_owned(),
                });
            }
            Ok(())
        }
        _ => Err(InitramfsError::NotElf {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(agent: &Path) -> String {
        let kernel = Kernel {
            release: "0".to_owned(),
            bzimage: PathBuf::new(),
            vmlinux: PathBuf::new(),
            modules: Vec::new(),
            network_modules: Vec::new(),
            digest: String::new(),
        };
        pack(&kernel, agent).unwrap_err().to_string()
    }

    #[test]
    fn a_dynamic_agent_is_refused_with_the_remedy() {
        // The test program itself is dynamically linked.
        let message = refusal(&std::env::current_exe().unwrap());
        assert!(message.contains("x86_64-unknown-linux-musl"), "{message}");
    }

    #[test]
    fn an_agent_that_is_no_program_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let script = home.path().join("agent");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        assert!(refusal(&script).ends_with("is no x86-64 ELF program"));
        fs::write(&script, "").unwrap();
        assert!(refusal(&script).ends_with("is no x86-64 ELF program"));
    }
}
