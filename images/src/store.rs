//! The folders of all artifacts, and the operations that make sure one is there.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::apt::{Apt, PackageError};
use crate::code::{self, CodeError, CodeImage};
use crate::fault::FileError;
use crate::initramfs::{self, Initramfs, InitramfsError};
use crate::kernel::{self, Kernel, KernelError};
use crate::overlay::{self, OVERLAY_MIB_MAX, OVERLAY_MIB_MIN, OverlayError};
use crate::progress::Progress;
use crate::runtime::{self, ImageError, RuntimeImage, RuntimeName};
use crate::staging::{Staging, StagingError, lock_file, make_dir};

/// All that guests boot from, below one state folder.
///
/// Every operation is idempotent and may run in several processes at once: a file lock lets one
/// build at a time. When the artifact is there already, an operation takes milliseconds and uses
/// neither network nor programs.
#[derive(Clone, Debug)]
pub struct ImageStore {
    root: PathBuf,
    cache: PathBuf,
}

impl ImageStore {
    /// A store in `root` (`THAW_HOME`), which is made on the first build.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        // The package tools take relative paths as relative to folders of their own.
        let root = absolute(root.into());
        Self {
            cache: root.join("cache"),
            root,
        }
    }

    /// The same store with its downloads in another folder, which several stores may share.
    #[must_use]
    pub fn with_cache(self, cache: impl Into<PathBuf>) -> Self {
        Self {
            cache: cache.into(),
            ..self
        }
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

    /// The root file system of a runtime (`images/<name>/`); builds it when there is none, or when
    /// Thaw's recipe for it has changed.
    ///
    /// # Errors
    /// When packages or wheels cannot be had, a program is missing, or the disk is full.
    pub fn runtime(
        &self,
        name: RuntimeName,
        progress: &mut dyn Progress,
    ) -> Result<RuntimeImage, ImageError> {
        let folder = self.root.join("images").join(name.as_str());
        if let Some(image) = runtime::open(&folder, name) {
            return Ok(image);
        }
        let _lock = self.lock()?;
        if let Some(image) = runtime::open(&folder, name) {
            return Ok(image);
        }
        let (apt, staging) = (self.apt()?, self.staging()?);
        runtime::build(&folder, name, &apt, &staging, progress)
    }

    /// A formatted, empty, sparse ext4 file system of `size_mib` (`overlay/`): the template that
    /// each sandbox gets a copy of for its writes.
    ///
    /// # Errors
    /// When the size is out of range, mkfs.ext4 is missing, or the disk is full.
    pub fn overlay(&self, size_mib: u32) -> Result<PathBuf, OverlayError> {
        if !(OVERLAY_MIB_MIN..=OVERLAY_MIB_MAX).contains(&size_mib) {
            return Err(OverlayError::Size { mib: size_mib });
        }
        let path = self.root.join("overlay").join(format!("{size_mib}.ext4"));
        if !path.is_file() {
            overlay::build(&path, size_mib, &self.staging()?)?;
        }
        Ok(path)
    }

    /// Makes a function's zip and its layers, in their order, into the read-only image `out`; what was there is replaced.
    ///
    /// Deterministic: equal zips give equal bytes. Files keep their permission bits, and everyone
    /// may read them; times and owners are dropped. A later layer's file, folder or link takes the
    /// place of an earlier one's.
    ///
    /// # Errors
    /// The caller's fault: a zip that is broken, empty, too large (262 144 000 bytes unpacked, layers included,
    /// 100 000 entries) or has an unfit entry (a name or link out of the folder, a device, a name
    /// twice, encryption). The host's: a program is missing, the disk is full.
    pub fn code_image(
        &self,
        zip: &[u8],
        layers: &[Vec<u8>],
        out: &Path,
    ) -> Result<CodeImage, CodeError> {
        code::build(zip, layers, &absolute(out.to_owned()), &self.staging()?)
    }

    pub(crate) fn staging(&self) -> Result<Staging, StagingError> {
        Staging::new(&self.root.join("staging"))
    }

    fn apt(&self) -> Result<Apt, PackageError> {
        Apt::new(&self.cache)
    }

    /// Serialises builds among threads and processes; released on drop and by any death.
    fn lock(&self) -> Result<File, FileError> {
        make_dir(&self.root)?;
        lock_file(&self.root.join("images.lock"))
    }
}

/// Without a current folder a relative path leads nowhere; the first use of it will say so.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}
