//! Kernel modules: the drivers that a stock kernel does not have built in.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::{BootError, step};

/// Folder of the initramfs with the modules and lists of them: one file name a line, in load order.
pub const FOLDER: &str = "/modules";

/// The list of what every guest loads.
pub const ORDER: &str = "order";

/// The list of what only a guest with a network device loads, after the other.
pub const NETWORK_ORDER: &str = "network-order";

/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h: the kernel unpacks the file itself.
const COMPRESSED_FILE: i32 = 4;

/// Loads every module that the file `list` names. A module that is loaded already is no failure. Without the file there
/// is nothing to load: the kernel has its drivers built in.
///
/// # Errors
/// A module that cannot be read or is refused by the kernel.
pub fn load_all(folder: &Path, list: &str) -> Result<(), BootError> {
    let order = folder.join(list);
    let names = match fs::read_to_string(&order) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => step("reading", &order, other)?,
    };
    for name in names.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = folder.join(name);
        step("loading module", &path, load(&path))?;
    }
    Ok(())
}

fn load(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let packed = path.extension().is_some_and(|extension| extension != "ko");
    let flags = if packed { COMPRESSED_FILE } else { 0 };
    match rustix::system::finit_module(&file, c"", flags) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_order_file_means_nothing_to_load() {
        let folder = tempfile::tempdir().unwrap();
        load_all(folder.path(), ORDER).unwrap();
    }

    #[test]
    fn a_missing_module_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("order"), "\nabsent.ko\n").unwrap();
        let error = load_all(folder.path(), ORDER).unwrap_err();
        assert!(error.to_string().starts_with("loading module /"));
        assert!(error.to_string().ends_with("/absent.ko"));
    }
}
