//! SHA-256, as lower-case hexadecimal.

use std::fs::File;
use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::fault::FileError;

/// Digest of bytes in memory.
pub(crate) fn bytes(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

/// Digest of a file's content.
pub(crate) fn file(path: &Path) -> Result<String, FileError> {
    let mut file = File::open(path).map_err(FileError::on("opening", path))?;
    let mut hasher = Sha256::new();
    io::copy(&mut file, &mut hasher).map_err(FileError::on("reading", path))?;
    Ok(hex(&hasher.finalize()))
}

fn hex(data: &[u8]) -> String {
    data.iter().map(|byte| format!("{byte:02x}")).collect()
}
