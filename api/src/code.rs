//! Uploaded code: judged in memory, written so that it is there in full or not at all.

use std::fs::{self, File};
use std::io::{self, Cursor, Read as _, Write as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use thaw_runtime::Point;
use thiserror::Error;
use zip::ZipArchive;
use zip::result::ZipError;

use crate::record::Code;

/// Largest sum of all files in a zip, bytes.
pub const UNZIPPED_BYTES_MAX: u64 = 262_144_000;

/// Why a zip cannot be used.
#[derive(Debug, Error)]
pub enum CodeError {
    /// It is no zip, or a damaged one.
    #[error("the file is no usable zip")]
    Broken(#[source] ZipError),
    /// A file in it is damaged.
    #[error("a file in the zip is damaged")]
    Damaged(#[source] io::Error),
    /// It has no files.
    #[error("the zip is empty")]
    Empty,
    /// Its files are too large together.
    #[error("the files in the zip are larger than {UNZIPPED_BYTES_MAX} bytes")]
    TooLarge,
}

/// Why a zip is not on disk.
#[derive(Debug, Error)]
#[error("cannot write {}", path.display())]
pub struct WriteError {
    /// What was being written.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl WriteError {
    /// The file system has no room.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(
            self.source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }
}

/// Reads the whole zip: every file's checksum is compared, and what it claims about sizes is not believed.
///
/// # Errors
/// See [`CodeError`].
pub fn check(zip: &[u8]) -> Result<Code, CodeError> {
    let mut archive = ZipArchive::new(Cursor::new(zip)).map_err(CodeError::Broken)?;
    if archive.is_empty() {
        return Err(CodeError::Empty);
    }
    let mut left = UNZIPPED_BYTES_MAX;
    for index in 0..archive.len() {
        let file = archive.by_index(index).map_err(CodeError::Broken)?;
        if file.size() > left {
            return Err(CodeError::TooLarge);
        }
        // One byte more than allowed tells a file that is larger than it says.
        let read = io::copy(&mut file.take(left.saturating_add(1)), &mut io::sink())
            .map_err(CodeError::Damaged)?;
        left = left.checked_sub(read).ok_or(CodeError::TooLarge)?;
    }
    Ok(Code {
        bytes: u64::try_from(zip.len()).unwrap_or(u64::MAX),
        sha256: STANDARD.encode(Sha256::digest(zip)),
        unzipped_bytes: UNZIPPED_BYTES_MAX - left,
    })
}

/// Writes `name` into `folder`, which is made; both are synced, and so is the folder's parent.
///
/// # Errors
/// The path that could not be written; nothing is left of it.
pub fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
    let result = write_all(folder, name, bytes);
    if result.is_err() {
        // What cannot be removed now, the next start removes.
        let _ = fs::remove_dir_all(folder);
    }
    result
}

fn write_all(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
    let on = |path: &Path| {
        let path = path.to_owned();
        move |source| WriteError { path, source }
    };
    fs::create_dir_all(folder).map_err(on(folder))?;
    let temporary = folder.join(format!("{name}.tmp"));
    let path = folder.join(name);
    let mut file = File::create(&temporary).map_err(on(&path))?;
    file.write_all(bytes).map_err(on(&path))?;
    file.sync_all().map_err(on(&path))?;
    Point::CodeUnnamed.reached();
    fs::rename(&temporary, &path).map_err(on(&path))?;
    sync_folders(folder)
}

/// Gives a revision the code of another one.
///
/// # Errors
/// The path that could not be linked.
pub fn link(from: &Path, folder: &Path, name: &str) -> Result<(), WriteError> {
    let path = folder.join(name);
    let on = |source| WriteError {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(folder).map_err(on)?;
    fs::hard_link(from, &path).map_err(on)?;
    sync_folders(folder)
}

/// A new name is durable once its folder is synced; `folder` and the function's folder may be new too.
fn sync_folders(folder: &Path) -> Result<(), WriteError> {
    for path in folder.ancestors().take(3) {
        File::open(path)
            .and_then(|opened| opened.sync_all())
            .map_err(|source| WriteError {
                path: path.to_owned(),
                source,
            })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    #[test]
    fn a_zip_is_read_and_named_by_its_hash() {
        let zip = testing::zip(&[("app.py", b"x = 1\n")]);
        let code = check(&zip).unwrap();
        assert_eq!(code.bytes, u64::try_from(zip.len()).unwrap());
        assert_eq!(code.unzipped_bytes, 6);
        assert_eq!(STANDARD.decode(code.sha256).unwrap().len(), 32);
        assert!(matches!(check(&testing::zip(&[])), Err(CodeError::Empty)));
        assert!(matches!(check(b"PK"), Err(CodeError::Broken(_))));
    }

    #[test]
    fn a_damaged_file_within_is_found() {
        let mut zip = testing::zip(&[("app.py", &b"x = 1\n".repeat(100))]);
        // Behind the local header and the name lies the compressed data.
        zip[30 + 6 + 4] ^= 0xff;
        assert!(matches!(
            check(&zip),
            Err(CodeError::Damaged(_) | CodeError::Broken(_))
        ));
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let revision = folder.path().join("f").join("1");
        fs::create_dir_all(revision.join("code.zip").join("in-the-way")).unwrap();
        assert!(write(&revision, "code.zip", b"x").is_err());
        assert!(!revision.exists());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = check(&bytes);
        }

        #[test]
        fn no_flipped_bit_panics(at in 0usize..200, bit in 0u8..8) {
            let mut zip = testing::zip(&[("app.py", b"x = 1\n")]);
            let at = at % zip.len();
            zip[at] ^= 1 << bit;
            let _ = check(&zip);
        }
    }
}
