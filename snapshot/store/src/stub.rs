//! A snapshot whose memory is in the store: the *stub* is what remains of its file.
//!
//! A stub is a snapshot file like any other (metadata, CPU record, machine state, disks, working set) and a difference without pages
//! of its own, whose base is not a file but a memory in the store: it names that by the digest of its manifest. So each byte that
//! is restored hangs on the stub's own digest, and whoever would map a stub's memory is refused, as its base is no snapshot.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use thaw_snapshot::{
    PAGE_BYTES, PageSource, SectionKind, Snapshot, SparseSection, Summary, VerifyError, WriteError,
    Writer,
};
use thiserror::Error;

use crate::manifest::ManifestId;
use crate::store::{PutError, PutSummary, Store};

/// Why a snapshot could not be pushed. Chunks that were stored before stay.
#[derive(Debug, Error)]
pub enum PushError {
    /// Its memory.
    #[error("snapshot's memory could not be put into the store")]
    Memory(#[source] PutError),
    /// The rest of it.
    #[error("snapshot could not be read")]
    Read(#[source] VerifyError),
    /// The stub.
    #[error("stub of the snapshot could not be written")]
    Write(#[source] WriteError),
}

/// Why a snapshot has no memory in a store.
#[derive(Debug, Error)]
pub enum StubError {
    /// It cannot be read.
    #[error("stub could not be read")]
    Read(#[source] VerifyError),
    /// Its memory is in its file.
    #[error(
        "snapshot holds its memory itself: only a stub that `thaw snapshot push` made is served from a store"
    )]
    NoStub,
}

/// What pushing a snapshot came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushSummary {
    /// The store's part.
    pub memory: PutSummary,
    /// The stub's.
    pub stub: Summary,
}

/// The manifest of a stub's memory, by which [`Store::memory`] finds it.
///
/// # Errors
/// See [`StubError`].
pub fn memory_of(stub: &Snapshot) -> Result<ManifestId, StubError> {
    let base = stub
        .base()
        .map_err(StubError::Read)?
        .ok_or(StubError::NoStub)?;
    // A difference between two snapshots nearly always has pages; one without names a snapshot that is no manifest.
    if !stub.own_memory().map_err(StubError::Read)?.runs.is_empty() {
        return Err(StubError::NoStub);
    }
    Ok(ManifestId(base.digest.0))
}

impl Store {
    /// Puts the memory of `snapshot`, its base included, into the store, and writes the rest into `stub`, an empty file. The
    /// snapshot should have been verified.
    ///
    /// # Errors
    /// See [`PushError`]; the stub is of no use then.
    pub fn push(&self, snapshot: &Snapshot, stub: File) -> Result<PushSummary, PushError> {
        let memory = self.put_memory(snapshot).map_err(PushError::Memory)?;
        let (read, write) = (PushError::Read, PushError::Write);
        let mut writer = Writer::new(stub);
        for kind in [
            SectionKind::Metadata,
            SectionKind::Cpu,
            SectionKind::Machine,
        ] {
            match snapshot.section(kind) {
                Ok(bytes) => writer.section(kind, &bytes).map_err(write)?,
                Err(VerifyError::Missing(_)) => {}
                Err(error) => return Err(read(error)),
            }
        }
        let memory_bytes = snapshot.memory_bytes().map_err(read)?;
        let base = [&memory.id.0[..], &memory_bytes.to_le_bytes()].concat();
        writer.section(SectionKind::Base, &base).map_err(write)?;
        writer
            .sparse_section(SectionKind::Memory, memory_bytes, &mut Nothing)
            .map_err(write)?;
        let disks: Vec<SectionKind> = (snapshot.sections().map(|(kind, _)| kind))
            .filter(|kind| matches!(kind, SectionKind::Disk(_)))
            .collect();
        for kind in disks {
            let SectionKind::Disk(index) = kind else {
                continue;
            };
            let section = snapshot.disk(index).map_err(read)?;
            let mut content = Stored {
                file: snapshot.file(),
                section: &section,
            };
            writer
                .sparse_section(kind, section.length, &mut content)
                .map_err(write)?;
        }
        if let Some(set) = snapshot.working_set().map_err(read)? {
            writer.working_set(&set).map_err(write)?;
        }
        let stub = writer.finish().map_err(write)?;
        Ok(PushSummary { memory, stub })
    }
}

/// Pages that are not in the file.
struct Nothing;

impl PageSource for Nothing {
    fn read_at(&mut self, _offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn next_data(&mut self, _offset: u64) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

/// A sparse section of a snapshot that stands by itself.
struct Stored<'a> {
    file: &'a File,
    section: &'a SparseSection,
}

impl PageSource for Stored<'_> {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file
            .read_exact_at(buffer, self.section.offset + offset)
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        let page = offset / PAGE_BYTES;
        let runs = &self.section.runs;
        let next = runs.partition_point(|run| run.start + run.count <= page);
        Ok(runs
            .get(next)
            .map(|run| (run.start * PAGE_BYTES).max(offset)))
    }
}
