//! The empty file system that takes a sandbox's writes: the upper layer of its root.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::fault::FileError;
use crate::staging::{Staging, StagingError, install};
use crate::tool::{MKFS_EXT4, ToolError};

/// The smallest overlay: below it ext4 has no room for its own tables. MiB.
pub const OVERLAY_MIB_MIN: u32 = 16;
/// The largest: Lambda's limit on ephemeral storage. MiB.
pub const OVERLAY_MIB_MAX: u32 = 10_240;

/// "thawoverlay" in hexadecimal.
const UUID: &str = "74686177-6f76-6572-6c61-790000000000";

/// The overlay template could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A size that no sandbox can have.
    #[error("an overlay of {mib} MiB: it must have {OVERLAY_MIB_MIN} to {OVERLAY_MIB_MAX}")]
    Size {
        /// What was asked for.
        mib: u32,
    },
    /// The program failed.
    #[error("formatting an overlay")]
    Tool(#[from] ToolError),
    /// A file operation failed.
    #[error("making an overlay")]
    File(#[from] FileError),
    /// No scratch folder.
    #[error("making an overlay")]
    Staging(#[from] StagingError),
}

/// Formats a sparse file of `mib` and puts it at `path`.
pub(crate) fn build(path: &Path, mib: u32, staging: &Staging) -> Result<(), OverlayError> {
    let scratch = staging.path().join("overlay.ext4");
    File::create_new(&scratch)
        .and_then(|file| file.set_len(u64::from(mib) << 20))
        .map_err(FileError::on("making", &scratch))?;
    MKFS_EXT4
        .run(|command| {
            // Times on disk are those of this variable, so that every template is the same.
            command.env("E2FSPROGS_FAKE_TIME", "315619200");
            command.args(["-q", "-F", "-L", "thaw-overlay", "-m", "0", "-b", "4096", "-U", UUID]);
            // A sandbox's disk is thrown away, never recovered: no journal, no checksums. It
            // never grows: no room for growing.
            command.args(["-O", "^has_journal,^metadata_csum,^resize_inode,^64bit,^huge_file"]);
            // A sparse file reads as zeros: nothing is left for the guest to initialise later.
            let extended = format!(
                "lazy_itable_init=0,assume_storage_prezeroed=1,nodiscard,root_owner=0:0,hash_seed={UUID}"
            );
            command.args(["-E", &extended]).arg(&scratch);
        })
        .map_err(|error| match error.stderr().contains("No space left on device") {
            true => FileError::on("formatting", &scratch)(io::ErrorKind::StorageFull.into()).into(),
            false => OverlayError::Tool(error),
        })?;
    install(&scratch, path)?;
    Ok(())
}
