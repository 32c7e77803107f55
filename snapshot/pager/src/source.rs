//! Where memory comes from.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use thaw_snapshot::{MemoryReader, PageRun, Snapshot, VerifyError};
use thaw_snapshot_store::{
    CHUNK_BYTES, OpenFolder, Store, StoreError, StoredMemory, StubError, memory_of,
};
use thiserror::Error;

/// What a source found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The chunk is in the buffer.
    Data,
    /// All of the chunk is zero; the buffer was not written.
    Zero,
}

/// Why a chunk could not be read.
#[derive(Debug, Error)]
pub enum SourceError {
    /// It may work when it is tried again: a network, a busy disk.
    #[error("memory could not be fetched")]
    Transient(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It will not: missing or damaged.
    #[error("memory is missing or damaged where it is kept")]
    Permanent(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Memory to be served, in chunks. It is read by several threads at once.
pub trait Source: Send + Sync {
    /// Length of the memory, bytes: whole pages.
    fn bytes(&self) -> u64;

    /// How much is fetched at once, bytes: whole pages, the same for ever.
    fn chunk_bytes(&self) -> usize;

    /// Fills `buffer` with the chunk at `offset`, a multiple of [`Source::chunk_bytes`]; the last one may be shorter. What is given
    /// was verified: it is what was stored, or an error.
    ///
    /// # Errors
    /// See [`SourceError`]. It may block: a fault that waits for too long is a failure of the pager.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Filled, SourceError>;
}

/// A snapshot on this machine's disk as a source: for recording a working set. Its bytes are not verified chunk by chunk: that is
/// [`Snapshot::verify`]'s work, before.
#[derive(Debug)]
pub struct SnapshotSource {
    reader: MemoryReader,
    runs: Vec<PageRun>,
}

impl SnapshotSource {
    /// Bytes that are read at once.
    const CHUNK_BYTES: usize = 64 << 10;

    /// Takes the memory of `snapshot`, its base included.
    ///
    /// # Errors
    /// As [`Snapshot::memory_reader`].
    pub fn new(snapshot: &Snapshot) -> Result<Self, VerifyError> {
        Ok(Self {
            reader: snapshot.memory_reader()?,
            runs: snapshot.memory_runs()?,
        })
    }
}

impl Source for SnapshotSource {
    fn bytes(&self) -> u64 {
        self.reader.bytes()
    }

    fn chunk_bytes(&self) -> usize {
        Self::CHUNK_BYTES
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Filled, SourceError> {
        let next = self.runs.partition_point(|run| run.bytes().end <= offset);
        let end = offset.saturating_add(buffer.len() as u64);
        if self
            .runs
            .get(next)
            .is_none_or(|run| run.bytes().start >= end)
        {
            return Ok(Filled::Zero);
        }
        self.reader
            .read_at(offset, buffer)
            .map_err(|error| SourceError::Transient(error.into()))?;
        Ok(Filled::Data)
    }
}

/// Why the memory of a stub cannot be served.
#[derive(Debug, Error)]
pub enum OpenStoreError {
    /// It says of no memory where it is.
    #[error("snapshot has no memory in a store")]
    Stub(#[source] StubError),
    /// Its list of chunks.
    #[error("list of the snapshot's chunks could not be read from the store")]
    Manifest(#[source] StoreError),
}

/// The memory of `stub` as a source: chunks are fetched from the store in `folder` and verified as they are asked for.
///
/// # Errors
/// See [`OpenStoreError`].
pub fn stored_memory(stub: &Snapshot, folder: OwnedFd) -> Result<StoredMemory, OpenStoreError> {
    let id = memory_of(stub).map_err(OpenStoreError::Stub)?;
    let store = Store::new(Arc::new(OpenFolder::new(folder)));
    store.memory(id).map_err(OpenStoreError::Manifest)
}

impl Source for StoredMemory {
    fn bytes(&self) -> u64 {
        StoredMemory::bytes(self)
    }

    fn chunk_bytes(&self) -> usize {
        CHUNK_BYTES
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Filled, SourceError> {
        match self.read_chunk(offset, buffer) {
            Ok(true) => Ok(Filled::Data),
            Ok(false) => Ok(Filled::Zero),
            Err(error) if error.may_pass() => Err(SourceError::Transient(error.into())),
            Err(error) => Err(SourceError::Permanent(error.into())),
        }
    }
}
