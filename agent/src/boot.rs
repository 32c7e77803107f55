//! From the kernel's first program to a root file system in which a function can run.
//!
//! Expects from the initramfs `/init` (this program) and `/modules` with its lists ([`modules`]); from the machine the disks
//! that [`disks`] names. Afterwards the initramfs is gone and `/` is the runtime's image under a writable overlay.

pub mod disks;
pub mod modules;
pub mod mounts;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::network;
use crate::sys::interface;

/// Which step of the boot failed, on what.
#[derive(Debug, Error)]
#[error("{act} {object}", object = object.display())]
pub struct BootError {
    /// What was tried.
    pub act: &'static str,
    /// On which file.
    pub object: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Gives a result its step and object.
pub(crate) fn step<T, E: Into<io::Error>>(
    act: &'static str,
    object: impl AsRef<Path>,
    result: Result<T, E>,
) -> Result<T, BootError> {
    result.map_err(|error| BootError {
        act,
        object: object.as_ref().to_owned(),
        source: error.into(),
    })
}

/// Boots the guest. Only PID 1 of an initramfs may call it: it removes every file of the root file system it starts in.
///
/// # Errors
/// The first step that failed; the guest is useless then.
pub fn boot() -> Result<(), BootError> {
    mounts::early()?;
    step(
        "protecting from the out-of-memory killer",
        "/proc/self/oom_score_adj",
        fs::write("/proc/self/oom_score_adj", "-1000"),
    )?;
    end_thrashing_early();
    let modules = Path::new(modules::FOLDER);
    modules::load_all(modules, modules::ORDER)?;
    if network::has_device(Path::new(network::DEVICES))? {
        modules::load_all(modules, modules::NETWORK_ORDER)?;
    }
    let disks = disks::find(Path::new("/dev"))?;
    mounts::root(&disks, Path::new(mounts::NEW_ROOT))?;
    mounts::switch_root(Path::new(mounts::NEW_ROOT))?;
    step("bringing up", "lo", interface::up("lo"))
}

/// A guest out of memory would drop and read its program pages again for a long time before the kernel kills anything: the
/// multi-generational LRU kills as soon as the working set of the last second does not fit
/// (Documentation/admin-guide/mm/multigen_lru.rst). Kernels without it are left as they are.
fn end_thrashing_early() {
    const MIN_TTL_MS: &str = "1000";
    let folder = Path::new("/sys/kernel/mm/lru_gen");
    if fs::write(folder.join("enabled"), "y").is_ok() {
        let _ = fs::write(folder.join("min_ttl_ms"), MIN_TTL_MS); // an older kernel's file may be missing
    }
}
