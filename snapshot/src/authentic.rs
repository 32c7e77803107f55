//! Whether a snapshot was made here: a tag in its first page, of the header's digest under a key that one home alone has.
//!
//! Digests tell damage; whoever can write a file can make them right again. The header's digest stands for every byte of the file,
//! and for those of a base or a chunk store that it names, so that a tag of it is one of all that a restore depends on. The key
//! is not needed to restore: who checks the tag may hand the file to a process that must not have it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use thiserror::Error;

use crate::layout::{TAG_BYTES, TAG_OFFSET};
use crate::{Digest, OpenError, Snapshot};

/// What the secret is turned into a key for; fixed, as tags hang on it.
const CONTEXT: &str = "thaw snapshot authentication tag 1";

/// The key of a home's snapshots.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// Bytes of the secret that a key is derived from.
    pub const SECRET_BYTES: usize = 32;

    /// The key that belongs to a secret, which should be random.
    #[must_use]
    pub fn new(secret: &[u8; Self::SECRET_BYTES]) -> Self {
        Self(blake3::derive_key(CONTEXT, secret))
    }

    /// Another secret of the same home's, for what `context` names, and for that alone (BLAKE3's key derivation: a constant, globally unique text).
    #[must_use]
    pub fn derive(&self, context: &str) -> [u8; 32] {
        blake3::derive_key(context, &self.0)
    }

    fn tag(&self, digest: Digest) -> blake3::Hash {
        blake3::keyed_hash(&self.0, &digest.0)
    }
}

/// Why a snapshot is not taken for one of this home.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AuthenticityError {
    /// Nobody has vouched for it.
    #[error(
        "{name} has no authentication tag: deploy the function again or, if you know that nobody has changed it, `thaw snapshot trust {name}`"
    )]
    Untagged {
        /// The file.
        name: String,
    },
    /// Somebody else has, or it was changed since.
    #[error(
        "{name} has an authentication tag that was not made with this home's snapshot-key: it comes from another machine or home, or was \
         changed; deploy the function again or, if you know where it comes from, `thaw snapshot trust {name}`"
    )]
    Foreign {
        /// The file.
        name: String,
    },
}

/// Why a snapshot could not be given its tag.
#[derive(Debug, Error)]
pub enum TagError {
    /// It is none.
    #[error("snapshot to be tagged could not be opened")]
    Open(#[source] OpenError),
    /// The file system failed.
    #[error("tag could not be written")]
    Write(#[source] io::Error),
}

impl Snapshot {
    /// Whether the holder of `key` has vouched for this file and, if one is attached, its base. That its bytes are those vouched
    /// for is for [`Snapshot::verify`] to say.
    ///
    /// # Errors
    /// See [`AuthenticityError`].
    pub fn authenticate(&self, key: &Key) -> Result<(), AuthenticityError> {
        let name = || self.name().to_owned();
        let tag = self
            .tag()
            .ok_or_else(|| AuthenticityError::Untagged { name: name() })?;
        // In constant time: a guess must not learn how much of it was right.
        if key.tag(self.digest()) != blake3::Hash::from_bytes(tag) {
            return Err(AuthenticityError::Foreign { name: name() });
        }
        self.attached_base()
            .map_or(Ok(()), |base| base.authenticate(key))
    }
}

/// Vouches for the snapshot that was written into `file`, with its header as it is. Nothing is synced.
///
/// # Errors
/// See [`TagError`].
pub fn tag(file: &File, key: &Key) -> Result<(), TagError> {
    let copy = file.try_clone().map_err(TagError::Write)?;
    let snapshot = Snapshot::from_file(copy, "to be tagged").map_err(TagError::Open)?;
    let tag: [u8; TAG_BYTES] = key.tag(snapshot.digest()).into();
    file.write_all_at(&tag, TAG_OFFSET).map_err(TagError::Write)
}
