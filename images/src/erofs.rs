//! Packs a folder into a read-only erofs image, reproducibly.

use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::fault::FileError;
use crate::tool::{MKFS_EROFS, ToolError};

/// Every file's time, seconds since 1970: the second day of 1980, because zip files, which programs
/// in a guest may write, cannot hold a time before the first.
const TIME: &str = "315619200";

/// An image could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The program failed.
    #[error("packing with mkfs.erofs")]
    Tool(#[from] ToolError),
    /// The disk is full.
    #[error("writing an erofs image")]
    File(#[from] FileError),
}

/// Packs `tree` into the file `image`. Equal trees and `uuid` give equal bytes.
pub(crate) fn pack(tree: &Path, image: &Path, uuid: &str) -> Result<(), ErofsError> {
    MKFS_EROFS
        .run(|command| {
            // Uncompressed: a guest's first reads should cost the host's page cache and no more.
            command.args(["--quiet", "--all-root", "-x-1"]);
            command.arg(format!("-T{TIME}")).arg(format!("-U{uuid}"));
            command.arg(image).arg(tree);
        })
        .map(|_output| ())
        .map_err(
            |error| match error.stderr().contains("No space left on device") {
                true => FileError::on("writing", image)(io::ErrorKind::StorageFull.into()).into(),
                false => error.into(),
            },
        )
}

/// The packer's name and version: another version may lay the same files out otherwise.
pub(crate) fn packer() -> Result<String, ToolError> {
    MKFS_EROFS.version("-V")
}

/// A UUID (RFC 9562, version 8) made of the digest of `seed`.
pub(crate) fn uuid_of(seed: &[u8]) -> String {
    let mut bytes = [0_u8; 16];
    bytes.copy_from_slice(&Sha256::digest(seed)[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_uuid_has_its_version_and_variant() {
        let uuid = uuid_of(b"thaw");
        assert_eq!(uuid.len(), 36);
        assert_eq!(&uuid[14..15], "8");
        assert!("89ab".contains(&uuid[19..20]));
        assert_ne!(uuid, uuid_of(b"other"));
    }

    #[test]
    fn the_order_of_creation_does_not_enter_the_image() {
        let home = tempfile::tempdir().unwrap();
        let mut images = Vec::new();
        for (run, backwards) in [("a", false), ("b", true)] {
            let tree = home.path().join(run);
            fs::create_dir(&tree).unwrap();
            let mut names: Vec<_> = (0..200)
                .map(|n| format!("file-{}", n * 7919 % 200))
                .collect();
            if backwards {
                names.reverse();
            }
            for name in names {
                fs::write(tree.join(&name), name.repeat(300)).unwrap();
            }
            let image = home.path().join(format!("{run}.erofs"));
            pack(&tree, &image, &uuid_of(b"thaw")).unwrap();
            images.push(fs::read(&image).unwrap());
        }
        assert!(images[0] == images[1]);
    }
}
