//! Putting memory into the store and reading it chunk by chunk.

use std::io;
use std::sync::Arc;

use thaw_snapshot::{MemoryReader, PAGE_BYTES, Snapshot, VerifyError};
use thiserror::Error;

use crate::blobs::{BlobError, BlobName, Blobs};
use crate::chunk::{self, BLOB_BYTES_MAX, CHUNK_BYTES, ChunkError, ChunkId};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest, ManifestError, ManifestId};

/// Why memory could not be stored. Chunks that were stored before stay: they are found when it is tried again.
#[derive(Debug, Error)]
pub enum PutError {
    /// The snapshot.
    #[error("snapshot's memory could not be read")]
    Snapshot(#[source] VerifyError),
    /// Its pages.
    #[error("snapshot's memory at {offset:#x} could not be read")]
    Memory {
        /// Where, bytes.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A chunk.
    #[error("memory at {offset:#x} could not be compressed")]
    Compress {
        /// Where, bytes.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store.
    #[error("memory could not be stored")]
    Blob(#[source] BlobError),
    /// The store, at the end.
    #[error("stored memory could not be made durable")]
    Flush(#[source] io::Error),
    /// A memory that no manifest can hold.
    #[error("memory does not fit a manifest")]
    Manifest(#[source] ManifestError),
}

/// Why memory could not be read from the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Where it is kept; [`BlobError::Io`] may pass.
    #[error("stored memory could not be fetched")]
    Blob(#[source] BlobError),
    /// The list of chunks.
    #[error("stored memory has a bad manifest")]
    Manifest(#[source] ManifestError),
    /// A chunk.
    #[error("stored memory at {offset:#x} is damaged: store the snapshot again")]
    Chunk {
        /// Where in memory, bytes.
        offset: u64,
        /// How.
        #[source]
        source: ChunkError,
    },
    /// Asked for what is no chunk.
    #[error("stored memory has no chunk of {bytes} bytes at {offset:#x}")]
    Outside {
        /// Where, bytes.
        offset: u64,
        /// Length of the buffer.
        bytes: usize,
    },
}

impl StoreError {
    /// Whether it may work when it is tried again.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Blob(BlobError::Io { .. }))
    }
}

/// What storing a memory came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutSummary {
    /// Under which it is found again.
    pub id: ManifestId,
    /// Chunks of the memory.
    pub chunks: u64,
    /// Of these, chunks of zeros, which are not kept.
    pub zero_chunks: u64,
    /// Of these, chunks that were not in the store before, or were damaged there.
    pub new_chunks: u64,
    /// What these take, bytes, compressed.
    pub new_bytes: u64,
}

/// Memory of many snapshots.
#[derive(Clone)]
pub struct Store {
    blobs: Arc<dyn Blobs>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Keeps memory in `blobs`.
    pub fn new(blobs: Arc<dyn Blobs>) -> Self {
        Self { blobs }
    }

    /// Stores the memory of `snapshot`, its base included, which should have been verified. The manifest comes last, when
    /// all its chunks are durable. Holds one chunk in memory, and the manifest.
    ///
    /// # Errors
    /// See [`PutError`].
    pub fn put_memory(&self, snapshot: &Snapshot) -> Result<PutSummary, PutError> {
        let reader = snapshot.memory_reader().map_err(PutError::Snapshot)?;
        let runs = snapshot.memory_runs().map_err(PutError::Snapshot)?;
        let bytes = reader.bytes();
        let mut summary = PutSummary {
            id: ManifestId([0; 32]),
            chunks: bytes.div_ceil(CHUNK_BYTES as u64),
            zero_chunks: 0,
            new_chunks: 0,
            new_bytes: 0,
        };
        let mut chunks = Vec::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut runs = runs.iter().peekable();
        for offset in (0..bytes).step_by(CHUNK_BYTES) {
            let length = usize::try_from(bytes - offset)
                .unwrap_or(CHUNK_BYTES)
                .min(CHUNK_BYTES);
            while runs.next_if(|run| run.bytes().end <= offset).is_some() {}
            let is_hole = runs
                .peek()
                .is_none_or(|run| run.bytes().start >= offset + length as u64);
            let content = &mut buffer[..length];
            if is_hole {
                chunks.push(None);
                continue;
            }
            chunks.push(self.put_chunk(&reader, offset, content, &mut summary)?);
        }
        summary.zero_chunks = chunks.iter().filter(|chunk| chunk.is_none()).count() as u64;
        let manifest = Manifest::new(bytes, chunks).map_err(PutError::Manifest)?;
        let (encoded, id) = manifest.encode();
        summary.id = id;
        self.blobs.flush().map_err(PutError::Flush)?;
        self.blobs
            .put(BlobName::Manifest(id.0), &encoded)
            .map_err(PutError::Blob)?;
        self.blobs.flush().map_err(PutError::Flush)?;
        Ok(summary)
    }

    fn put_chunk(
        &self,
        reader: &MemoryReader,
        offset: u64,
        content: &mut [u8],
        summary: &mut PutSummary,
    ) -> Result<Option<ChunkId>, PutError> {
        reader
            .read_at(offset, content)
            .map_err(|source| PutError::Memory { offset, source })?;
        if content.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let id = ChunkId::of(content);
        let name = BlobName::Chunk(id.0);
        if !self.is_whole(id, content.len()).map_err(PutError::Blob)? {
            let blob =
                chunk::encode(content).map_err(|source| PutError::Compress { offset, source })?;
            self.blobs.put(name, &blob).map_err(PutError::Blob)?;
            summary.new_chunks += 1;
            summary.new_bytes += blob.len() as u64;
        }
        Ok(Some(id))
    }

    /// Whether the chunk is there, and is what it should be: one that was damaged is stored again.
    fn is_whole(&self, id: ChunkId, length: usize) -> Result<bool, BlobError> {
        match self.blobs.get(BlobName::Chunk(id.0), BLOB_BYTES_MAX) {
            Ok(blob) => Ok(chunk::decode(&blob, id, &mut vec![0; length]).is_ok()),
            Err(BlobError::Missing(_) | BlobError::TooLong { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Memory that was stored, to be read.
    ///
    /// # Errors
    /// It is not there, or its manifest is damaged.
    pub fn memory(&self, id: ManifestId) -> Result<StoredMemory, StoreError> {
        let bytes = self
            .blobs
            .get(BlobName::Manifest(id.0), MANIFEST_BYTES_MAX)
            .map_err(StoreError::Blob)?;
        let manifest = Manifest::decode(&bytes, id).map_err(StoreError::Manifest)?;
        Ok(StoredMemory {
            blobs: Arc::clone(&self.blobs),
            manifest,
        })
    }
}

/// One memory in the store.
#[derive(Clone)]
pub struct StoredMemory {
    blobs: Arc<dyn Blobs>,
    manifest: Manifest,
}

impl std::fmt::Debug for StoredMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredMemory")
            .field("bytes", &self.manifest.memory_bytes())
            .finish_non_exhaustive()
    }
}

impl StoredMemory {
    /// Length of the memory, bytes.
    pub fn bytes(&self) -> u64 {
        self.manifest.memory_bytes()
    }

    /// Fills `buffer` with the chunk at `offset`, a multiple of [`CHUNK_BYTES`], fetched, decompressed and verified; its length is the
    /// chunk's. Returns `false` if all of it is zero: the buffer was not written then.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn read_chunk(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, StoreError> {
        let outside = || StoreError::Outside {
            offset,
            bytes: buffer.len(),
        };
        let length = self.bytes().saturating_sub(offset).min(CHUNK_BYTES as u64);
        if !offset.is_multiple_of(CHUNK_BYTES as u64) || buffer.len() as u64 != length {
            return Err(outside());
        }
        let index = usize::try_from(offset / CHUNK_BYTES as u64).map_err(|_| outside())?;
        let chunk = self.manifest.chunks().get(index).ok_or_else(outside)?;
        let Some(id) = *chunk else {
            return Ok(false);
        };
        let blob = self
            .blobs
            .get(BlobName::Chunk(id.0), BLOB_BYTES_MAX)
            .map_err(StoreError::Blob)?;
        chunk::decode(&blob, id, buffer).map_err(|source| StoreError::Chunk { offset, source })?;
        Ok(true)
    }
}

const _: () = assert!((CHUNK_BYTES as u64).is_multiple_of(PAGE_BYTES));
