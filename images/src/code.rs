//! A function's code and its layers: from the callers' zips to one read-only image, whose folders the guest sees at /var/task and /opt.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use crate::digest;
use crate::erofs::{self, ErofsError};
use crate::fault::{Fault, FileError};
use crate::staging::{Staging, StagingError, install, make_dir};
use crate::unzip::{self, Limits, Plan, UnzipError};

/// Lambda's limit on a function's code and layers, unpacked, and ours on its files and folders.
const LIMITS: Limits = Limits {
    bytes_max: 262_144_000,
    entries_max: 100_000,
};

/// Length of every code image, bytes: the rest is a hole. The guest has read its disk's length when a base runtime is frozen, before
/// it is known which function's code it will hold.
pub const CODE_DISK_BYTES: u64 = 512 << 20;
const _: () = assert!(CODE_DISK_BYTES > LIMITS.bytes_max + (128 << 20));

/// Folders of the image, and where the guest sees them (the agent's `boot/mounts.rs`).
const TASK: (&str, &str) = ("task", "/var/task");
const OPT: (&str, &str) = ("opt", "/opt");

/// A function's code on disk, as the guest's block device has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeImage {
    /// A read-only erofs image.
    pub path: PathBuf,
    /// SHA-256 of the image without the hole behind it, hexadecimal.
    pub digest: String,
    /// SHA-256 of the zip, base64: the Lambda API's `CodeSha256`.
    pub code_sha256: String,
    /// Length of the zip in bytes: the Lambda API's `CodeSize`.
    pub code_size: u64,
    /// Bytes of all files, unpacked, those of layers included.
    pub unzipped_size: u64,
}

/// A zip could not be made into an image.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// The zip is unfit, or could not be unpacked here. The text is meant for the caller.
    #[error(transparent)]
    Unzip(#[from] UnzipError),
    /// The file system could not be packed.
    #[error("packing a function's code")]
    Erofs(#[from] ErofsError),
    /// A file operation failed.
    #[error("storing a function's code")]
    File(#[from] FileError),
    /// No scratch folder.
    #[error("storing a function's code")]
    Staging(#[from] StagingError),
}

impl CodeError {
    /// Whose fault it is: the caller's if the zip is unfit.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::Unzip(error) => error.fault(),
            Self::Erofs(_) | Self::File(_) | Self::Staging(_) => Fault::Host,
        }
    }
}

/// Makes the image `out` of `zip` and its layers, a later one over the ones before, by way of scratch space.
pub(crate) fn build(
    zip: &[u8],
    layers: &[Vec<u8>],
    out: &Path,
    staging: &Staging,
) -> Result<CodeImage, CodeError> {
    let tree = staging.path().join("code");
    let mut unzipped_size = unzip::plan(zip, LIMITS, TASK.1)?.extract(&tree.join(TASK.0))?;
    // There without layers too: the guest mounts both.
    make_dir(&tree.join(OPT.0))?;
    let mut merged: Option<Plan<'_>> = None;
    for layer in layers {
        let plan = unzip::plan(layer, LIMITS, OPT.1)?;
        merged = Some(match merged {
            None => plan,
            Some(lower) => lower.overlay(plan)?,
        });
    }
    if let Some(merged) = merged {
        unzipped_size += merged.extract(&tree.join(OPT.0))?;
    }
    let limit = LIMITS.bytes_max;
    if unzipped_size > limit {
        return Err(UnzipError::TooLarge { limit }.into());
    }
    let zip_digest = Sha256::digest(zip);
    let mut seed = Sha256::new_with_prefix(zip_digest);
    for layer in layers {
        seed.update(Sha256::digest(layer));
    }
    let image = staging.path().join("code.erofs");
    erofs::pack(&tree, &image, &erofs::uuid_of(&seed.finalize()))?;
    let digest = digest::file(&image)?;
    install_across(&image, out)?;
    Ok(CodeImage {
        path: out.to_owned(),
        digest,
        code_sha256: STANDARD.encode(zip_digest),
        code_size: u64::try_from(zip.len()).unwrap_or(u64::MAX),
        unzipped_size,
    })
}

/// Gives an image its full length and renames it; where `out` is on another file system, copies beside it first.
fn install_across(image: &Path, out: &Path) -> Result<(), FileError> {
    let packed = fs::metadata(image).map_err(FileError::on("examining", image))?;
    set_length(image, CODE_DISK_BYTES)?;
    match install(image, out) {
        Err(FileError::Other { source, .. })
            if source.kind() == std::io::ErrorKind::CrossesDevices =>
        {
            let mut name = out.as_os_str().to_owned();
            name.push(".partial");
            let partial = PathBuf::from(name);
            // A copy might write out the hole.
            set_length(image, packed.len())?;
            fs::copy(image, &partial).map_err(FileError::on("writing", &partial))?;
            set_length(&partial, CODE_DISK_BYTES)?;
            install(&partial, out)
        }
        other => other,
    }
}

fn set_length(image: &Path, bytes: u64) -> Result<(), FileError> {
    let file = fs::OpenOptions::new().write(true).open(image);
    file.and_then(|file| file.set_len(bytes))
        .map_err(FileError::on("lengthening", image))
}
