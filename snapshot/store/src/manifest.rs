//! Which chunks a memory is made of.

use thiserror::Error;

use crate::chunk::{CHUNK_BYTES, ChunkId};

/// Longest memory, bytes: 64 GiB, whose manifest has 32 MiB.
const MEMORY_BYTES_MAX: u64 = 64 << 30;
/// Longest manifest, bytes.
pub(crate) const MANIFEST_BYTES_MAX: u64 =
    HEADER_BYTES as u64 + MEMORY_BYTES_MAX / CHUNK_BYTES as u64 * ID_BYTES as u64;

const MAGIC: [u8; 8] = *b"THAWMANI";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;
const ID_BYTES: usize = 32;
const PAGE_BYTES: u64 = thaw_snapshot::PAGE_BYTES;
/// Stands for a chunk of zeros, which is not kept.
const ZERO: [u8; ID_BYTES] = [0; ID_BYTES];

/// Identity of a manifest: blake3 of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ManifestId(pub [u8; 32]);

impl std::fmt::Display for ManifestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why bytes are no manifest.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ManifestError {
    /// Other bytes than were stored.
    #[error("manifest does not match its digest: the store is damaged")]
    Digest,
    /// Something else.
    #[error("manifest does not start as one")]
    Magic,
    /// Another version's.
    #[error(
        "manifest has version {0}, this thaw reads version {VERSION}: store the snapshot again"
    )]
    Version(u32),
    /// Chunks of another length than this version cuts.
    #[error("manifest has chunks of {0} bytes, this thaw reads chunks of {CHUNK_BYTES}")]
    ChunkBytes(u32),
    /// A length that no memory has.
    #[error(
        "manifest is of a memory of {0} bytes, which is no whole number of pages or more than {MEMORY_BYTES_MAX}"
    )]
    Memory(u64),
    /// The list is not as long as the memory demands.
    #[error("manifest has {found} bytes and should have {expected}")]
    Length {
        /// By the memory's length.
        expected: u64,
        /// Its own.
        found: usize,
    },
}

/// The chunks of one memory, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    memory_bytes: u64,
    /// `None`: zero.
    chunks: Vec<Option<ChunkId>>,
}

impl Manifest {
    /// A list of chunks for a memory of `memory_bytes`.
    ///
    /// # Errors
    /// [`ManifestError::Memory`] and [`ManifestError::Length`].
    pub fn new(memory_bytes: u64, chunks: Vec<Option<ChunkId>>) -> Result<Self, ManifestError> {
        if !memory_bytes.is_multiple_of(PAGE_BYTES) || memory_bytes > MEMORY_BYTES_MAX {
            return Err(ManifestError::Memory(memory_bytes));
        }
        if chunks.len() as u64 != memory_bytes.div_ceil(CHUNK_BYTES as u64) {
            return Err(ManifestError::Length {
                expected: length(memory_bytes),
                found: HEADER_BYTES + chunks.len() * ID_BYTES,
            });
        }
        Ok(Self {
            memory_bytes,
            chunks,
        })
    }

    /// Length of the memory, bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Its chunks of [`CHUNK_BYTES`] in their order; `None` for one that is zero.
    pub fn chunks(&self) -> &[Option<ChunkId>] {
        &self.chunks
    }

    /// How it is kept, little-endian: `THAWMANI`, version (u32), chunk length (u32), memory length (u64), then the digest of each
    /// chunk, 32 bytes, zero for a chunk of zeros. Its identity is the blake3 of all of it.
    pub(crate) fn encode(&self) -> (Vec<u8>, ManifestId) {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.chunks.len() * ID_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&CHUNK_LENGTH.to_le_bytes());
        bytes.extend_from_slice(&self.memory_bytes.to_le_bytes());
        for chunk in &self.chunks {
            bytes.extend_from_slice(&chunk.map_or(ZERO, |id| id.0));
        }
        let id = ManifestId(*blake3::hash(&bytes).as_bytes());
        (bytes, id)
    }

    /// Checks the digest before anything else.
    pub(crate) fn decode(bytes: &[u8], id: ManifestId) -> Result<Self, ManifestError> {
        if *blake3::hash(bytes).as_bytes() != id.0 {
            return Err(ManifestError::Digest);
        }
        Self::parse(bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let (header, list) = bytes
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or(ManifestError::Magic)?;
        let [a, b, c, d, e, f, g, h, rest @ ..] = *header;
        if [a, b, c, d, e, f, g, h] != MAGIC {
            return Err(ManifestError::Magic);
        }
        let [a, b, c, d, e, f, g, h, memory @ ..] = rest;
        let version = u32::from_le_bytes([a, b, c, d]);
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        let chunk_bytes = u32::from_le_bytes([e, f, g, h]);
        if chunk_bytes != CHUNK_LENGTH {
            return Err(ManifestError::ChunkBytes(chunk_bytes));
        }
        let memory_bytes = u64::from_le_bytes(memory);
        let (ids, rest) = list.as_chunks::<ID_BYTES>();
        if !rest.is_empty() {
            return Err(ManifestError::Length {
                expected: length(memory_bytes),
                found: bytes.len(),
            });
        }
        let id = |id: &[u8; ID_BYTES]| (*id != ZERO).then_some(ChunkId(*id));
        Self::new(memory_bytes, ids.iter().map(id).collect())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "64 KiB")]
const CHUNK_LENGTH: u32 = CHUNK_BYTES as u32;

fn length(memory_bytes: u64) -> u64 {
    HEADER_BYTES as u64
        + memory_bytes
            .div_ceil(CHUNK_BYTES as u64)
            .saturating_mul(ID_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_contradicts_itself_is_refused() {
        let good = Manifest::new(
            CHUNK_BYTES as u64 + PAGE_BYTES,
            vec![None, Some(ChunkId([1; 32]))],
        )
        .unwrap();
        let (bytes, id) = good.encode();
        assert_eq!(Manifest::decode(&bytes, id).unwrap(), good);
        assert_eq!(
            Manifest::decode(&bytes, ManifestId([0; 32])),
            Err(ManifestError::Digest)
        );
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            Manifest::parse(&bytes).unwrap_err()
        };
        assert_eq!(with(0, b'X'), ManifestError::Magic);
        assert_eq!(with(8, 9), ManifestError::Version(9));
        assert_eq!(with(12, 1), ManifestError::ChunkBytes(CHUNK_LENGTH + 1));
        assert!(matches!(with(16, 1), ManifestError::Memory(_)));
        assert!(matches!(with(23, 0xff), ManifestError::Memory(_)));
        assert!(matches!(with(18, 9), ManifestError::Length { .. }));
        for cut in 0..bytes.len() {
            assert!(Manifest::parse(&bytes[..cut]).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_manifest_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..200), is_near in any::<bool>(), memory in 0u64..40) {
            if is_near && bytes.len() >= HEADER_BYTES {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
                bytes[12..16].copy_from_slice(&CHUNK_LENGTH.to_le_bytes());
                bytes[16..24].copy_from_slice(&(memory * PAGE_BYTES).to_le_bytes());
                let whole = bytes.len() - (bytes.len() - HEADER_BYTES) % ID_BYTES;
                bytes.truncate(whole);
            }
            if let Ok(manifest) = Manifest::parse(&bytes) {
                prop_assert_eq!(manifest.encode().0, bytes);
            }
        }
    }
}
