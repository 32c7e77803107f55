//! Which disk is which: `vda` is the runtime's image, the writable one is last, the function's code lies between.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{BootError, step};

/// How long a disk's device node may take to appear after its driver was loaded, in steps of a millisecond.
const APPEAR_MS_MAX: u32 = 5000;

/// A file system that the guest can mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// Read-only images (kernel documentation, filesystems/erofs).
    Erofs,
    /// Writable disks, and images that are no erofs (filesystems/ext4).
    Ext4,
}

impl FileSystem {
    /// Its name for mount(2).
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
        }
    }
}

/// A block device with the file system found on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Device node.
    pub path: PathBuf,
    /// What its superblock says.
    pub file_system: FileSystem,
}

/// The sandbox's disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disks {
    /// The runtime's root file system.
    pub root: Disk,
    /// The function's code; none while a base runtime is prepared.
    pub code: Option<Disk>,
    /// Where everything written goes.
    pub overlay: Disk,
}

/// Finds the disks among the device nodes of `dev`. Waits for the first; the others are there then, as their driver
/// makes them in one go.
///
/// # Errors
/// A disk that is missing, or carries no known file system.
pub fn find(dev: &Path) -> Result<Disks, BootError> {
    let first = dev.join("vda");
    for _ in 0..APPEAR_MS_MAX {
        if first.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let root = disk(first)?;
    let second = disk(dev.join("vdb"))?;
    let third = dev.join("vdc");
    // Without code the writable disk moves up: the kernel names disks in the order it finds them.
    let (code, overlay) = if third.exists() {
        (Some(second), disk(third)?)
    } else {
        (None, second)
    };
    if overlay.file_system != FileSystem::Ext4 {
        let refusal = io::Error::new(io::ErrorKind::InvalidData, "the disk is not writable");
        return step("using as overlay", &overlay.path, Err(refusal));
    }
    Ok(Disks {
        root,
        code,
        overlay,
    })
}

/// The disk of the function's code, whatever is on it by now.
///
/// # Errors
/// It is missing, or carries no known file system.
pub fn code(dev: &Path) -> Result<Disk, BootError> {
    disk(dev.join("vdb"))
}

fn disk(path: PathBuf) -> Result<Disk, BootError> {
    let file_system = step("examining disk", &path, superblock(&path))?;
    Ok(Disk { path, file_system })
}

/// Both keep their magic in the superblock at byte 1024: erofs_fs.h `magic`, ext4's `s_magic` 56 bytes in.
fn superblock(path: &Path) -> io::Result<FileSystem> {
    let mut block = [0u8; 64];
    File::open(path)?.read_exact_at(&mut block, 1024)?;
    if block[..4] == 0xE0F5_E1E2_u32.to_le_bytes() {
        Ok(FileSystem::Erofs)
    } else if block[56..58] == 0xEF53_u16.to_le_bytes() {
        Ok(FileSystem::Ext4)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "neither erofs nor ext4",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(folder: &Path, name: &str, file_system: FileSystem) {
        let mut bytes = vec![0u8; 2048];
        match file_system {
            FileSystem::Erofs => bytes[1024..1028].copy_from_slice(&[0xE2, 0xE1, 0xF5, 0xE0]),
            FileSystem::Ext4 => bytes[1080..1082].copy_from_slice(&[0x53, 0xEF]),
        }
        std::fs::write(folder.join(name), bytes).unwrap();
    }

    #[test]
    fn three_disks_are_root_code_and_overlay() {
        let dev = tempfile::tempdir().unwrap();
        fake(dev.path(), "vda", FileSystem::Erofs);
        fake(dev.path(), "vdb", FileSystem::Erofs);
        fake(dev.path(), "vdc", FileSystem::Ext4);
        let disks = find(dev.path()).unwrap();
        assert_eq!(disks.code.unwrap().path, dev.path().join("vdb"));
        assert_eq!(disks.overlay.path, dev.path().join("vdc"));
    }

    #[test]
    fn without_code_the_second_disk_is_the_overlay() {
        let dev = tempfile::tempdir().unwrap();
        fake(dev.path(), "vda", FileSystem::Erofs);
        fake(dev.path(), "vdb", FileSystem::Ext4);
        let disks = find(dev.path()).unwrap();
        assert_eq!(disks.code, None);
        assert_eq!(disks.overlay.path, dev.path().join("vdb"));
    }

    #[test]
    fn a_read_only_overlay_and_an_unformatted_disk_are_refused() {
        let dev = tempfile::tempdir().unwrap();
        fake(dev.path(), "vda", FileSystem::Erofs);
        fake(dev.path(), "vdb", FileSystem::Erofs);
        assert!(find(dev.path()).is_err());
        std::fs::write(dev.path().join("vdb"), vec![0u8; 4096]).unwrap();
        let error = find(dev.path()).unwrap_err();
        assert!(error.to_string().starts_with("examining disk "));
    }
}
