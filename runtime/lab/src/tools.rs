//! The programs of this machine that the lab is made of.

use std::{
    env,
    path::{Path, PathBuf},
};

/// A program that is not installed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{program} is not installed; on Debian: sudo apt-get install {package}")]
pub struct MissingTool {
    /// What was looked for.
    pub program: &'static str,
    /// Debian package that has it.
    pub package: &'static str,
}

/// The program's path, from `PATH` or the usual folders.
pub fn find(program: &'static str, package: &'static str) -> Result<PathBuf, MissingTool> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or(MissingTool { program, package })
}

/// QEMU for this processor.
pub fn qemu() -> Result<PathBuf, MissingTool> {
    find("qemu-system-x86_64", "qemu-system-x86")
}

/// The virtiofs daemon: in QEMU's package up to version 7, a package of its own after.
pub fn virtiofsd() -> Result<PathBuf, MissingTool> {
    [
        "/usr/lib/qemu/virtiofsd",
        "/usr/libexec/virtiofsd",
        "/usr/lib/virtiofsd",
    ]
    .map(Path::new)
    .into_iter()
    .find(|candidate| candidate.is_file())
    .map(Path::to_path_buf)
    .map_or_else(
        || {
            find(
                "virtiofsd",
                "qemu-system-common (Debian 12) or virtiofsd (Debian 13)",
            )
        },
        Ok,
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn missing_program_is_named_with_its_package() {
        let error = super::find("no-such-program", "its-package").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no-such-program") && text.contains("apt-get install its-package"));
    }
}
