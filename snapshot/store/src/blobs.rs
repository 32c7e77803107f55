//! Where bytes are kept under a name that is their digest.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use thaw_snapshot::PendingFile;
use thiserror::Error;

/// Name of a blob: its folder and the digest it goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlobName {
    /// A chunk of memory.
    Chunk([u8; 32]),
    /// A list of chunks.
    Manifest([u8; 32]),
}

impl std::fmt::Display for BlobName {
    /// `chunks/ab/abcd…`: folders of few enough files.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (folder, digest) = match self {
            Self::Chunk(digest) => ("chunks", digest),
            Self::Manifest(digest) => ("manifests", digest),
        };
        write!(f, "{folder}/{:02x}/", digest[0])?;
        digest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why a blob could not be read or kept.
#[derive(Debug, Error)]
pub enum BlobError {
    /// Nothing is kept under this name.
    #[error("{0} is not in the store")]
    Missing(BlobName),
    /// More bytes than any of its kind has.
    #[error("{name} has more than {bytes_max} bytes")]
    TooLong {
        /// Which.
        name: BlobName,
        /// The limit.
        bytes_max: u64,
    },
    /// The store itself.
    #[error("{name} could not be {act}")]
    Io {
        /// Which.
        name: BlobName,
        /// What was tried.
        act: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Keeps blobs. A remote store implements these three calls; each blocks, and may be called by several threads at once.
pub trait Blobs: Send + Sync {
    /// The bytes under `name`, at most `bytes_max`.
    ///
    /// # Errors
    /// See [`BlobError`].
    fn get(&self, name: BlobName, bytes_max: u64) -> Result<Vec<u8>, BlobError>;

    /// Keeps `bytes` under `name` in place of what may be there: whoever gets it has the old bytes or these. They may be lost when
    /// the machine dies before [`Blobs::flush`].
    ///
    /// # Errors
    /// See [`BlobError`].
    fn put(&self, name: BlobName, bytes: &[u8]) -> Result<(), BlobError>;

    /// Returns when all that was put before is durable.
    ///
    /// # Errors
    /// The store's own; then nothing is known of what was put.
    fn flush(&self) -> io::Result<()>;
}

/// Blobs as files below a folder of this machine.
#[derive(Clone, Debug)]
pub struct LocalFolder {
    root: PathBuf,
}

impl LocalFolder {
    /// Keeps blobs below `root`, which is made when the first is put.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    fn path(&self, name: BlobName) -> PathBuf {
        self.root.join(name.to_string())
    }
}

/// Reads what was opened for `name`, at most `bytes_max` bytes.
fn read_blob(
    name: BlobName,
    opened: io::Result<fs::File>,
    bytes_max: u64,
) -> Result<Vec<u8>, BlobError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => BlobError::Missing(name),
        _ => BlobError::Io {
            name,
            act: "read",
            source,
        },
    };
    let mut bytes = Vec::new();
    // One more than allowed tells that there are more.
    let mut limited = opened.map_err(failed)?.take(bytes_max.saturating_add(1));
    limited.read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > bytes_max {
        return Err(BlobError::TooLong { name, bytes_max });
    }
    Ok(bytes)
}

impl Blobs for LocalFolder {
    fn get(&self, name: BlobName, bytes_max: u64) -> Result<Vec<u8>, BlobError> {
        read_blob(name, fs::File::open(self.path(name)), bytes_max)
    }

    fn put(&self, name: BlobName, bytes: &[u8]) -> Result<(), BlobError> {
        let failed = |source| BlobError::Io {
            name,
            act: "stored",
            source,
        };
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(failed)?;
        let pending = PendingFile::create(&path).map_err(failed)?;
        pending.file().write_all(bytes).map_err(failed)?;
        pending.commit_without_sync().map_err(failed)
    }

    fn flush(&self) -> io::Result<()> {
        match fs::File::open(&self.root) {
            Ok(folder) => Ok(rustix::fs::syncfs(folder)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()), // nothing was put yet
            Err(error) => Err(error),
        }
    }
}

/// The same folder behind a descriptor, for a process that can name no files: blobs are read and never stored.
#[derive(Debug)]
pub struct OpenFolder {
    folder: OwnedFd,
}

impl OpenFolder {
    /// Reads blobs below `folder`, an open [`LocalFolder`].
    pub fn new(folder: OwnedFd) -> Self {
        Self { folder }
    }
}

impl Blobs for OpenFolder {
    fn get(&self, name: BlobName, bytes_max: u64) -> Result<Vec<u8>, BlobError> {
        // A blob is never a link, so that none leads out of the folder.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let opened = openat(&self.folder, name.to_string(), flags, Mode::empty());
        read_blob(
            name,
            opened.map(fs::File::from).map_err(Into::into),
            bytes_max,
        )
    }

    fn put(&self, name: BlobName, _bytes: &[u8]) -> Result<(), BlobError> {
        Err(BlobError::Io {
            name,
            act: "stored",
            source: io::ErrorKind::ReadOnlyFilesystem.into(),
        })
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
