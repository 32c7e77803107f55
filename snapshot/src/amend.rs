//! Giving a finished snapshot a working set.
//!
//! The snapshot is copied to a temporary name, the section and a new header are written there, and the copy takes the name:
//! a reader has the old file or the new one, whole, at any time, and one that is open stays what it was. Where the file
//! system shares blocks between files (`FICLONE`: btrfs, xfs) the copy costs nothing; elsewhere the pages that are stored are
//! copied inside the kernel, once. Writing into the file itself would save that, but a crash, or a reader at the wrong
//! moment, could then meet a header of two halves.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::io::Errno;
use thiserror::Error;

use crate::layout::{Entry, PAGE_BYTES, SectionKind};
use crate::sparse::read_range;
use crate::writer::Writer;
use crate::{
    AuthenticityError, Key, OpenError, PendingFile, Snapshot, Summary, TagError, VerifyError,
    WorkingSet, WriteError, tag,
};

/// Why a snapshot could not be given a working set; it is as it was.
#[derive(Debug, Error)]
pub enum AmendError {
    /// It cannot be opened.
    #[error("snapshot to be amended could not be opened")]
    Open(#[source] OpenError),
    /// It is not one of the key's holder, who does not vouch for what another has made.
    #[error("snapshot to be amended is not trusted")]
    Untrusted(#[source] AuthenticityError),
    /// The amended one could not be vouched for.
    #[error("amended snapshot could not be tagged")]
    Tag(#[source] TagError),
    /// It is damaged.
    #[error("snapshot to be amended could not be read")]
    Read(#[source] VerifyError),
    /// It has a section whose meaning is not known here.
    #[error("snapshot holds section {0} of a later version: amend it with the thaw that wrote it")]
    Unknown(SectionKind),
    /// It cannot be copied; the folder is full, most often.
    #[error("snapshot could not be copied")]
    Copy(#[source] io::Error),
    /// The section or the header cannot be written.
    #[error("amended snapshot could not be written")]
    Write(#[source] WriteError),
    /// It could not be given its name.
    #[error("amended snapshot could not be given its name")]
    Commit(#[source] io::Error),
}

/// Writes `working_set` into the snapshot at `path`, in place of one that it may have. The file's identity
/// ([`Snapshot::digest`]) changes, its [`Snapshot::content_digest`] does not. With a key, the snapshot must be authentic, and is
/// afterwards, too; without, it has no tag any more.
///
/// # Errors
/// See [`AmendError`].
pub fn set_working_set(
    path: &Path,
    working_set: &WorkingSet,
    key: Option<&Key>,
) -> Result<Summary, AmendError> {
    let snapshot = Snapshot::open(path).map_err(AmendError::Open)?;
    if let Some(key) = key {
        snapshot.authenticate(key).map_err(AmendError::Untrusted)?;
    }
    let unknown = |entry: &&Entry| matches!(entry.kind, SectionKind::Unknown(_));
    if let Some(entry) = snapshot.entries().iter().find(unknown) {
        return Err(AmendError::Unknown(entry.kind));
    }
    let (old, kept): (Vec<Entry>, Vec<Entry>) = snapshot
        .entries()
        .iter()
        .partition(|entry| entry.kind == SectionKind::WorkingSet);
    let pending = PendingFile::create(path).map_err(AmendError::Copy)?;
    let mut stored_bytes = 0;
    let mut ranges = Vec::new();
    for entry in &kept {
        for range in stored_ranges(&snapshot, entry).map_err(AmendError::Read)? {
            stored_bytes += (range.end - range.start).next_multiple_of(PAGE_BYTES);
            ranges.push(range);
        }
    }
    copy(snapshot.file(), pending.file(), &ranges, &old).map_err(AmendError::Copy)?;
    let file = pending.file().try_clone().map_err(AmendError::Copy)?;
    let mut writer = Writer::resume(file, kept);
    writer.working_set(working_set).map_err(AmendError::Write)?;
    let mut summary = writer.finish().map_err(AmendError::Write)?;
    summary.stored_bytes += stored_bytes;
    if let Some(key) = key {
        tag(pending.file(), key).map_err(AmendError::Tag)?;
    }
    pending.commit().map_err(AmendError::Commit)?;
    Ok(summary)
}

/// Where a section's bytes lie in the file, holes left out.
fn stored_ranges(snapshot: &Snapshot, entry: &Entry) -> Result<Vec<Range<u64>>, VerifyError> {
    if entry.kind.runs_kind().is_none() {
        return Ok(std::iter::once(entry.offset..entry.end()).collect());
    }
    let section = snapshot.sparse(entry.kind)?;
    let in_file = |bytes: Range<u64>| section.offset + bytes.start..section.offset + bytes.end;
    Ok(section
        .runs
        .iter()
        .map(|run| in_file(run.bytes()))
        .collect())
}

/// Copies `ranges` by sharing blocks or else by their bytes; of `old` nothing is left.
fn copy(from: &File, to: &File, ranges: &[Range<u64>], old: &[Entry]) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        for entry in old {
            let bytes = vec![0; usize::try_from(entry.length).map_err(io::Error::other)?];
            to.write_all_at(&bytes, entry.offset)?;
        }
        return Ok(());
    }
    ranges
        .iter()
        .try_for_each(|range| copy_range(from, to, range.clone()))
}

fn copy_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let (mut read, mut written) = (range.start, range.start);
    while read < range.end {
        let left = usize::try_from(range.end - read).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // A file system without it: through this process.
            Err(Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP | Errno::XDEV) => {
                return read_range(from, read..range.end, |at, bytes| {
                    to.write_all_at(bytes, at)
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
