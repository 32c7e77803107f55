//! The folders of all artifacts, and the operations that make sure one is there.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::apt::{Apt, PackageError};
use crate::fault::FileError;
use crate::initramfs::{self, Initramfs, InitramfsError};
use crate::kernel::{self, Kernel, KernelError};
use crate::progress::Progress;
use crate::staging::{Staging, StagingError, lock_file, make_dir};

/// All that guests boot from, below one state folder.
///
/// Every operation is idempotent and may run in several processes at once: a file lock lets one
/// build at a time. When the artifact is there already, an operation takes milliseconds and uses
/// neither network nor programs.
#[derive(Clone, Debug)]
pub struct ImageStore {
    root: PathBuf,
}

impl ImageStore {
    /// A store in `root` (`THAW_HOME`), which is made on the first build.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder given to [`ImageStore::new`].
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The guest's kernel; downloads and unpacks it when there is none (`kernel/`).
    ///
    /// # Errors
    /// When the package cannot be had or is not as expected.
    pub fn kernel(&self, progress: &mut dyn Progress) -> Result<Kernel, KernelError> {
        let folder = self.root.join("kernel");
        if let Some(kernel) = kernel::open(&folder) {
            return Ok(kernel);
        }
        let _lock = self.lock()?;
        // Another process may have built it while this one waited.
        if let Some(kernel) = kernel::open(&folder) {
            return Ok(kernel);
        }
        let (apt, staging) = (self.apt()?, self.staging()?);
        kernel::build(&folder, &apt, &staging, progress)
    }

    /// The first file system of a guest: `agent` as `/init`, and the modules of `kernel`.
    ///
    /// Keyed by content: another agent or kernel gives another file (`initramfs/`).
    ///
    /// # Errors
    /// When `agent` is no static x86-64 ELF program, or a file cannot be read or written.
    pub fn initramfs(&self, kernel: &Kernel, agent: &Path) -> Result<Initramfs, InitramfsError> {
        initramfs::ensure(&self.root.join("initramfs"), kernel, agent, || {
            self.staging()
        })
    }

    pub(crate) fn staging(&self) -> Result<Staging, StagingError> {
        Staging::new(&self.root.join("staging"))
    }

    fn apt(&self) -> Result<Apt, PackageError> {
        Apt::new(&self.root.join("cache"))
    }

    /// Serialises builds among threads and processes; released on drop and by any death.
    fn lock(&self) -> Result<File, FileError> {
        make_dir(&self.root)?;
        lock_file(&self.root.join("images.lock"))
    }
}
