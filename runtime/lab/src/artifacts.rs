//! The lab's files: `kernel/<package>_<version>/` with `vmlinux`, `modules/<release>/` and `initrd-<digest of the init and its modules>`; `kernel/current`
//! names the folder in use.

mod cpio;
mod debian;
mod modules;

use crate::{kernel, kernel::KernelError, tools::MissingTool};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

/// The static init that build.rs compiled.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/thaw-lab-init"));

/// How long files of another build of Thaw are kept: two may take turns on one machine.
pub const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why the lab could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A program is missing.
    #[error(transparent)]
    Missing(#[from] MissingTool),
    /// A program failed.
    #[error("{program} ended with {status}: {stderr}")]
    Tool {
        /// The program with its main argument.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        stderr: String,
    },
    /// A file or folder.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was being done.
        act: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel image is unusable.
    #[error("cannot use {}", path.display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: KernelError,
    },
    /// The kernel package lacks what the lab needs.
    #[error("kernel package has no {0}")]
    Lacks(String),
    /// apt knows no kernel.
    #[error("apt knows no package {0}; on Debian: sudo apt-get update")]
    NoPackage(&'static str),
}

/// The lab has not been built here yet.
#[derive(Debug, thiserror::Error)]
#[error("the lab has not been built in {}", .0.display())]
pub struct NotBuilt(PathBuf);

/// Paths of a built lab.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// Folder of this kernel; saved states go here as well.
    pub folder: PathBuf,
    /// ELF kernel.
    pub kernel: PathBuf,
    /// Initramfs with init and modules.
    pub initrd: PathBuf,
    /// Folder for /lib/modules.
    pub modules: PathBuf,
}

impl Artifacts {
    fn at(folder: PathBuf) -> Self {
        let mut digest = Sha256::new();
        digest.update(INIT);
        // A lab that lacks a module that is wanted now is another one.
        digest.update(modules::WANTED.join(" "));
        let digest = digest.finalize();
        let digest: String = digest
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self {
            kernel: folder.join("vmlinux"),
            initrd: folder.join(format!("initrd-{digest}")),
            modules: folder.join("modules"),
            folder,
        }
    }
}

/// What [`build`] left in `cache`.
pub fn current(cache: &Path) -> Result<Artifacts, NotBuilt> {
    let name = fs::read_to_string(cache.join("kernel/current"))
        .map_err(|_| NotBuilt(cache.to_path_buf()))?;
    let found = Artifacts::at(cache.join("kernel").join(name.trim()));
    if found.kernel.is_file() && found.initrd.is_file() {
        Ok(found)
    } else {
        Err(NotBuilt(cache.to_path_buf()))
    }
}

/// See [`crate::Lab::build`].
pub fn build(cache: &Path, progress: &mut dyn FnMut(&str)) -> Result<(), BuildError> {
    let folder = cache.join("kernel");
    fs::create_dir_all(&folder).map_err(io_error("make", &folder))?;
    let lock = folder.join("lock");
    let file = File::create(&lock).map_err(io_error("make", &lock))?;
    file.lock().map_err(io_error("lock", &lock))?; // freed when `file` is closed
    sweep(&folder, &[".new", ".tmp"], Duration::ZERO);
    let mark = folder.join("current");
    let built = current(cache).ok();
    if built.is_some() && !debian::lists_are_newer_than(&mark) {
        return Ok(());
    }
    let name = match debian::candidate() {
        Ok(package) => fetch(&folder, &package, progress)?,
        // Without apt's lists an older kernel still does.
        Err(error) => match fs::read_to_string(&mark) {
            Ok(name) if folder.join(name.trim()).join("vmlinux").is_file() => {
                name.trim().to_owned()
            }
            _ => return Err(error),
        },
    };
    let artifacts = Artifacts::at(folder.join(&name));
    if !artifacts.initrd.is_file() {
        sweep(&artifacts.folder, &[".tmp"], Duration::ZERO);
        sweep(&artifacts.folder, &["initrd-"], KEPT_FOR);
        progress("making the lab's initramfs");
        write_atomically(&artifacts.initrd, &initrd(&artifacts.modules)?)?;
    }
    write_atomically(&mark, name.as_bytes())
}

/// Makes the kernel's folder unless it is there; returns its name.
fn fetch(
    folder: &Path,
    package: &debian::Package,
    progress: &mut dyn FnMut(&str),
) -> Result<String, BuildError> {
    let name = format!("{}_{}", package.name, package.version.replace(':', "%3a"));
    let target = folder.join(&name);
    if target.is_dir() {
        return Ok(name);
    }
    let staging = tempfile::Builder::new()
        .prefix(".new")
        .tempdir_in(folder)
        .map_err(io_error("make a folder in", folder))?;
    progress(&format!("fetching {} {}", package.name, package.version));
    let unpacked = debian::download(package, staging.path())?;
    progress("taking the kernel out of its image");
    let image = debian::kernel_image(&unpacked)?;
    let bytes = fs::read(&image).map_err(io_error("read", &image))?;
    let kernel = kernel::extract(&bytes).map_err(|source| BuildError::Kernel {
        path: image,
        source,
    })?;
    let finished = staging.path().join("finished");
    fs::create_dir(&finished).map_err(io_error("make", &finished))?;
    write_atomically(&finished.join("vmlinux"), &kernel)?;
    let modules = unpacked.join("lib/modules");
    fs::rename(&modules, finished.join("modules")).map_err(io_error("move", &modules))?;
    fs::rename(&finished, &target).map_err(io_error("name", &target))?;
    Ok(name)
}

/// Removes files and folders in `folder` with such a name and at least that age: what a killed process left, or an older build of Thaw
/// made. What cannot be removed stays, it costs space alone.
pub fn sweep(folder: &Path, prefixes: &[&str], age: Duration) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_meant = prefixes
            .iter()
            .any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()));
        let changed = entry.metadata().and_then(|found| found.modified());
        let is_old = changed.is_ok_and(|time| time.elapsed().is_ok_and(|elapsed| elapsed >= age));
        if is_meant && is_old {
            let path = entry.path();
            let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
        }
    }
}

fn initrd(modules: &Path) -> Result<Vec<u8>, BuildError> {
    let mut archive = cpio::Archive::default();
    for folder in ["dev", "modules", "proc", "sys"] {
        archive.folder(folder);
    }
    archive.file("init", 0o755, INIT);
    let mut order = String::new();
    for (name, content) in modules::in_order(modules)? {
        archive.file(&format!("modules/{name}"), 0o644, &content);
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file =
        tempfile::NamedTempFile::new_in(folder).map_err(io_error("make a file in", folder))?;
    io::Write::write_all(&mut file, bytes).map_err(io_error("write", path))?;
    file.as_file().sync_all().map_err(io_error("sync", path))?;
    file.persist(path)
        .map(drop)
        .map_err(|error| io_error("name", path)(error.error))
}

fn io_error(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Io {
        act,
        path: path.to_path_buf(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeping_removes_what_is_named_and_old_alone() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at(".new1")).unwrap();
        fs::write(at(".new1").join("part"), "x").unwrap();
        for name in [".tmp2", "initrd-3", "vmlinux"] {
            fs::write(at(name), "x").unwrap();
        }
        sweep(folder.path(), &[".new", ".tmp"], Duration::ZERO);
        sweep(folder.path(), &["initrd-"], KEPT_FOR);
        assert_eq!(
            debian::entries(folder.path()).unwrap(),
            [at("initrd-3"), at("vmlinux")]
        );
    }
}
