//! The folders of all artifacts, and the operations that make sure one is there.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::apt::{Apt, PackageError};
use crate::code::{self, CodeError, CodeImage};
use crate::fault::FileError;
use crate::initramfs::{self, Initramfs, InitramfsError};
use crate::kernel::{self, Kernel, KernelError};
use crate::orders::Orders;
use crate::overlay::{self, OVERLAY_MIB_MAX, OVERLAY_MIB_MIN, OverlayError};
use crate::progress::Progress;
use crate::runtime::{self, ImageError, RuntimeImage, RuntimeName};
use crate::staging::{Staging, StagingError, lock_file, make_dir, remove_tree};

/// All that guests boot from, below one state folder.
///
/// Every operation is idempotent and may run in several processes at once: a file lock lets one
/// build at a time. When the artifact is there already, an operation takes milliseconds and uses
/// neither network nor programs.
#[derive(Clone, Debug)]
pub struct ImageStore {
    root: PathBuf,
    cache: PathBuf,
    is_ordering: bool,
    /// Scratch space: a folder's name.
    scratch: &'static str,
    /// The initramfs that was made last, and of what.
    initramfs: Arc<Mutex<Option<(InitramfsParts, Initramfs)>>>,
}

/// The kernel's digest and the agent's path.
type InitramfsParts = (String, PathBuf);

impl ImageStore {
    /// A store in `root` (`THAW_HOME`), which is made on the first build.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        // The package tools take relative paths as relative to folders of their own.
        let root = absolute(root.into());
        Self {
            cache: root.join("cache"),
            is_ordering: false,
            scratch: "staging",
            initramfs: Arc::default(),
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

    /// The same store for a process that cannot build runtimes' images: it orders them, and waits until another process,
    /// with a store in the same folder, has [served](Self::serve_orders) the order.
    #[must_use]
    pub fn ordering(self) -> Self {
        Self {
            is_ordering: true,
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
    /// Keyed by content: another agent or kernel gives another file (`initramfs/`). A store reads the agent once: each deploy would otherwise
    /// hold all of it in memory, and one that is replaced under a running gateway may speak another protocol than that.
    ///
    /// # Errors
    /// When `agent` is no static x86-64 ELF program, or a file cannot be read or written.
    pub fn initramfs(&self, kernel: &Kernel, agent: &Path) -> Result<Initramfs, InitramfsError> {
        let parts = (kernel.digest.clone(), agent.to_owned());
        let mut last = self
            .initramfs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((of, made)) = &*last
            && *of == parts
            && made.path.is_file()
        {
            return Ok(made.clone());
        }
        let folder = self.root.join("initramfs");
        let made = initramfs::ensure(&folder, kernel, agent, || self.staging())?;
        *last = Some((parts, made.clone()));
        Ok(made)
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
        if self.is_ordering {
            // An image of another recipe: replaced from outside, this side of the lab's border would go on seeing it.
            if folder.exists() {
                remove_tree(&folder).map_err(FileError::on("removing", &folder))?;
            }
            let look = || runtime::open(&folder, name);
            let placed = self.orders().place(name, look, progress)?;
            return placed.map_err(|reason| ImageError::Ordered { name, reason });
        }
        let (apt, staging) = (self.apt()?, self.staging()?);
        runtime::build(&folder, name, apt, &staging, progress)
    }

    /// Builds the images that others have ordered so far; whoever ordered one that fails is told the reason. Returns at once
    /// when there is no order.
    ///
    /// # Errors
    /// When an order cannot be read or answered.
    pub fn serve_orders(&self, progress: &mut dyn Progress) -> Result<(), FileError> {
        // Who ordered does not see the locks that are held here, and would sweep a folder of the same scratch space.
        let maker = Self {
            scratch: "staging-of-orders",
            ..self.clone()
        };
        let make = |name, progress: &mut dyn Progress| {
            maker
                .runtime(name, progress)
                .map(|_image| ())
                .map_err(|error| chain(&error))
        };
        self.orders().serve(make, progress)
    }

    fn orders(&self) -> Orders {
        Orders::new(self.root.join("images").join("orders"))
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

    /// Removes what builds that were cut off have left in scratch space.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn sweep(&self) -> Result<(), StagingError> {
        // Each new scratch folder takes away those that nobody holds.
        self.staging().map(drop)
    }

    pub(crate) fn staging(&self) -> Result<Staging, StagingError> {
        Staging::new(&self.root.join(self.scratch))
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

/// An error with its causes: it goes to another process as text.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Without a current folder a relative path leads nowhere; the first use of it will say so.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// An x86-64 ELF header that asks for nothing, and something after it.
    fn agent(what: &str) -> Vec<u8> {
        let mut header = vec![0; 64];
        header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        (header[16], header[18], header[20]) = (2, 62, 1);
        header.extend(what.bytes());
        header
    }

    #[test]
    fn an_agent_that_is_replaced_is_for_the_next_store() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("agent");
        fs::write(&path, agent("old")).unwrap();
        let kernel = Kernel {
            release: "0".to_owned(),
            bzimage: PathBuf::new(),
            vmlinux: PathBuf::new(),
            modules: Vec::new(),
            network_modules: Vec::new(),
            digest: String::new(),
        };
        let store = ImageStore::new(home.path());
        let old = store.initramfs(&kernel, &path).unwrap();
        fs::write(&path, agent("new")).unwrap();
        assert_eq!(store.clone().initramfs(&kernel, &path).unwrap(), old);
        let next = ImageStore::new(home.path());
        let new = next.initramfs(&kernel, &path).unwrap();
        assert_ne!(new, old);
        assert!(
            fs::read(&new.path)
                .unwrap()
                .windows(3)
                .any(|it| it == b"new")
        );
        // One whose file is gone is made again.
        fs::remove_file(&new.path).unwrap();
        assert_eq!(next.initramfs(&kernel, &path).unwrap(), new);
        assert!(new.path.is_file());
    }
}
