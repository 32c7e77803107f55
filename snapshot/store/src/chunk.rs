//! One chunk: its identity, and how it is kept.

use thiserror::Error;

/// Length of a chunk of memory, bytes; the last of a memory may be shorter. Sixteen pages: enough for compression to find
/// something, little enough that a fault does not wait for much that it did not ask for.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Longest blob of a chunk: what does not get shorter is kept as it is.
pub(crate) const BLOB_BYTES_MAX: u64 = (CHUNK_BYTES + 1) as u64;

const AS_IS: u8 = 0;
const ZSTD: u8 = 1;
/// zstd's own default: three times the speed of a disk, and close to what higher levels reach on memory.
const LEVEL: i32 = 3;

/// Identity of a chunk: blake3 of its content, not of how it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// Of these bytes.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }
}

/// Why a blob is not the chunk that was asked for. All mean that the store is damaged.
#[derive(Debug, Error)]
pub enum ChunkError {
    /// No bytes, or of a way of keeping that is not known.
    #[error("chunk is kept in an unknown way")]
    Kind,
    /// The compressed bytes.
    #[error("chunk could not be decompressed")]
    Decompress(#[source] std::io::Error),
    /// Of another length than it is asked for in.
    #[error("chunk has {found} bytes instead of {expected}")]
    Length {
        /// By the manifest.
        expected: usize,
        /// By the blob.
        found: usize,
    },
    /// Other bytes than were stored.
    #[error("chunk does not match its digest")]
    Digest,
}

/// How `content` is kept: one byte that says how, then the bytes.
pub(crate) fn encode(content: &[u8]) -> std::io::Result<Vec<u8>> {
    let compressed = zstd::bulk::compress(content, LEVEL)?;
    let (kind, bytes) = if compressed.len() < content.len() {
        (ZSTD, &compressed[..])
    } else {
        (AS_IS, content)
    };
    Ok([&[kind][..], bytes].concat())
}

/// Fills `buffer`, whose length is the chunk's, and checks it. No more memory is taken than the buffer has, whatever the blob says.
pub(crate) fn decode(blob: &[u8], id: ChunkId, buffer: &mut [u8]) -> Result<(), ChunkError> {
    let (kind, bytes) = blob.split_first().ok_or(ChunkError::Kind)?;
    let expected = buffer.len();
    let found = match *kind {
        AS_IS => {
            if bytes.len() == expected {
                buffer.copy_from_slice(bytes);
            }
            bytes.len()
        }
        ZSTD => zstd::bulk::decompress_to_buffer(bytes, buffer).map_err(ChunkError::Decompress)?,
        _ => return Err(ChunkError::Kind),
    };
    if found != expected {
        return Err(ChunkError::Length { expected, found });
    }
    if ChunkId::of(buffer) != id {
        return Err(ChunkError::Digest);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_content_survives_and_any_flip_or_cut_is_found(
            content in prop::collection::vec(0u8..4, 1..3000), noise in any::<bool>(), at in any::<prop::sample::Index>(), bit in 0u8..8
        ) {
            let content: Vec<u8> = if noise { blake3::hash(&content).as_bytes().to_vec() } else { content };
            let (blob, id) = (encode(&content).unwrap(), ChunkId::of(&content));
            let mut buffer = vec![0; content.len()];
            decode(&blob, id, &mut buffer).unwrap();
            prop_assert_eq!(&buffer, &content);
            let mut flipped = blob.clone();
            flipped[at.index(blob.len())] ^= 1 << bit;
            // A flip that decompresses to the same content is none.
            if decode(&flipped, id, &mut buffer).is_ok() {
                prop_assert_eq!(&buffer, &content);
            }
            prop_assert!(decode(&blob[..at.index(blob.len())], id, &mut buffer).is_err());
            prop_assert!(decode(&blob, id, &mut vec![0; content.len() + 1]).is_err());
            prop_assert!(decode(&blob, id, &mut vec![0; content.len() - 1]).is_err());
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(blob in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&blob, ChunkId([7; 32]), &mut [0; 4096]).is_err());
        }
    }
}
