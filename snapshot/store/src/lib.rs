//! Guest memory in content-addressed chunks: what two snapshots have in common is kept once.
//!
//! Owns: chunks, manifests, and where they are kept ([`Blobs`]; a local folder today). Must not know: page faults, guests, HTTP.
//! Start at [`Store`]; a whole snapshot goes there by [`Store::push`], which leaves a *stub*: all of the snapshot but its memory.
//!
//! Chunks have a fixed length: memory is made of pages that stay where they are, and a page is to be found by its address without
//! reading what precedes it. Boundaries chosen by content would find no more that is equal, and cost both.
//!
//! Always holds: what is given was compared with its digest after it was decompressed; a length from a blob is compared with a named
//! limit before memory is taken for it; no more than one chunk for each caller is in memory.
#![forbid(unsafe_code)]

mod blobs;
mod chunk;
mod manifest;
mod store;
mod stub;

pub use blobs::{BlobError, BlobName, Blobs, LocalFolder, OpenFolder};
pub use chunk::{CHUNK_BYTES, ChunkError, ChunkId};
pub use manifest::{Manifest, ManifestError, ManifestId};
pub use store::{PutError, PutSummary, Store, StoreError, StoredMemory};
pub use stub::{PushError, PushSummary, StubError, memory_of};
