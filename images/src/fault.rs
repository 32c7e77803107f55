//! Whose fault an error is, and the one error for a file operation that failed.

use std::io;
use std::path::{Path, PathBuf};

/// Who has to act for an operation to succeed. Picks the HTTP status and the log level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The caller sent something that cannot be used (a broken zip): 4xx.
    Caller,
    /// This machine lacks something (a tool, the network, disk space): 5xx.
    Host,
}

/// A file operation that failed: which act, on which path.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system that holds `path` has no room left.
    #[error("no space left on the file system of {}", path.display())]
    Full {
        /// What was being written.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// Any other failure.
    #[error("{act} {}", path.display())]
    Other {
        /// What was tried, as in "reading".
        act: &'static str,
        /// On which path.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
}

impl FileError {
    /// Makes the closure that `map_err` wants.
    pub(crate) fn on(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { path, source }
            }
            _ => Self::Other { act, path, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_full_disk_is_named_with_the_path() {
        let path = Path::new("/dev/full");
        let mut file = File::options().write(true).open(path).unwrap();
        let error = file
            .write_all(b"x")
            .map_err(FileError::on("writing", path))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "no space left on the file system of /dev/full"
        );
    }
}
