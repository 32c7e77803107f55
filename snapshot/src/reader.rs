//! Reading a snapshot, which is a hostile file until each digest was checked.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use thiserror::Error;

use crate::layout::{
    self, Entry, HEADER_PAGE_BYTES, Header, HeaderError, PAGE_BYTES, SectionKind, TAG_BYTES,
    TAG_OFFSET,
};
use crate::sparse::{self, PageRun, RunsError, first_stray_byte, read_range};
use crate::{BaseRef, CpuRecord, Digest, Metadata, WorkingSet};

/// Why a file cannot be opened as a snapshot.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The file itself.
    #[error("cannot read snapshot {name}")]
    Read {
        /// Which file.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Not a snapshot, or a damaged one.
    #[error("{name} is not a usable snapshot")]
    Header {
        /// Which file.
        name: String,
        /// What is wrong.
        #[source]
        source: HeaderError,
    },
}

/// Why a section cannot be used. All mean that the file is damaged: build the snapshot again by deploying its function.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// The file cannot be read.
    #[error("cannot read snapshot section {0}")]
    Read(SectionKind, #[source] io::Error),
    /// The bytes are not those that were written.
    #[error(
        "snapshot section {0} does not match its digest: the file is damaged, deploy the function again"
    )]
    Digest(SectionKind),
    /// Something stands where there should be nothing.
    #[error(
        "snapshot has a stray byte at offset {0}, where there should be zeros: the file is damaged, deploy the function again"
    )]
    Stray(u64),
    /// The file between the sections cannot be read.
    #[error("cannot read the snapshot between its sections")]
    Gaps(#[source] io::Error),
    /// Not there.
    #[error("snapshot has no section {0}")]
    Missing(SectionKind),
    /// The run list contradicts its section.
    #[error("snapshot section {0} has a bad list of page runs")]
    Runs(SectionKind, #[source] RunsError),
    /// A difference without what it differs from.
    #[error(
        "snapshot is a difference to base {}, which was not given: if its file is gone, deploy the function again", .0.digest
    )]
    BaseMissing(BaseRef),
    /// A section of the base.
    #[error("base of the snapshot cannot be used")]
    Base(#[source] Box<VerifyError>),
    /// Only layers can say where the memory of a difference lies.
    #[error("snapshot is a difference: its memory lies in more than one file")]
    Layered,
    /// The digest is right, the content is not what the kind demands.
    #[error("snapshot section {0} cannot be decoded: {1}")]
    Decode(SectionKind, String),
}

/// Where a sparse section lies, and which of its pages are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseSection {
    /// In the file, bytes; a multiple of [`crate::PAGE_BYTES`].
    pub offset: u64,
    /// Bytes, a multiple of [`crate::PAGE_BYTES`].
    pub length: u64,
    /// Sorted, disjoint, within the section; all other pages are zero.
    pub runs: Vec<PageRun>,
}

impl SparseSection {
    /// Bytes that are not holes.
    pub fn stored_bytes(&self) -> u64 {
        self.runs
            .iter()
            .map(|run| run.bytes().end - run.bytes().start)
            .sum()
    }
}

/// An open snapshot whose header was checked.
#[derive(Debug)]
pub struct Snapshot {
    file: File,
    name: String,
    header: Header,
    base: Option<Box<Snapshot>>,
}

impl Snapshot {
    /// Opens the file at `path` and checks its header and table; sections are not read yet.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|source| OpenError::Read {
            name: name.clone(),
            source,
        })?;
        Self::from_file(file, &name)
    }

    /// The same for an open file; `name` is for messages.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn from_file(file: File, name: &str) -> Result<Self, OpenError> {
        let read = |source| OpenError::Read {
            name: name.to_owned(),
            source,
        };
        let file_bytes = file.metadata().map_err(read)?.len();
        let mut page = vec![0; HEADER_PAGE_BYTES];
        let present = usize::try_from(file_bytes)
            .unwrap_or(HEADER_PAGE_BYTES)
            .min(HEADER_PAGE_BYTES);
        file.read_exact_at(&mut page[..present], 0).map_err(read)?;
        let header = layout::decode(&page, file_bytes).map_err(|source| OpenError::Header {
            name: name.to_owned(),
            source,
        })?;
        Ok(Self {
            file,
            name: name.to_owned(),
            header,
            base: None,
        })
    }

    /// The file, for mapping its memory.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What it was opened as, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identity of the snapshot.
    pub fn digest(&self) -> Digest {
        self.header.digest
    }

    /// Digest of what a restore depends on: unlike [`Snapshot::digest`] it stays the same when the working set changes, and is
    /// what a difference names its base by.
    pub fn content_digest(&self) -> Digest {
        layout::content_digest(&self.header.entries)
    }

    /// Length of the file, holes included, bytes.
    pub fn file_bytes(&self) -> u64 {
        self.header.file_bytes
    }

    /// Every section with its logical length in bytes, in the order of the file.
    pub fn sections(&self) -> impl Iterator<Item = (SectionKind, u64)> {
        self.header
            .entries
            .iter()
            .map(|entry| (entry.kind, entry.length))
    }

    /// Checks every byte of the file and of its base: each section against its digest, and that there is nothing between them.
    ///
    /// # Errors
    /// The first thing that is wrong; [`VerifyError::BaseMissing`] for a difference without its base.
    pub fn verify(&self) -> Result<(), VerifyError> {
        self.verify_own()?;
        match self.attached()? {
            Some(base) => base
                .verify_own()
                .map_err(|error| VerifyError::Base(Box::new(error))),
            None => Ok(()),
        }
    }

    /// The same for this file alone: enough where the base was verified before.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn verify_own(&self) -> Result<(), VerifyError> {
        let mut covered = vec![0..self.header_end(), TAG_OFFSET..PAGE_BYTES];
        for entry in &self.header.entries {
            if entry.kind.runs_kind().is_some() {
                covered.extend(self.verify_sparse(entry)?);
            } else {
                let digest = self.hash(entry, std::iter::once(entry.offset..entry.end()), &[])?;
                if digest != entry.digest {
                    return Err(VerifyError::Digest(entry.kind));
                }
                covered.push(entry.offset..entry.end());
            }
        }
        match first_stray_byte(&self.file, &covered, self.header.file_bytes)
            .map_err(VerifyError::Gaps)?
        {
            Some(offset) => Err(VerifyError::Stray(offset)),
            None => Ok(()),
        }
    }

    /// A section's bytes, after its digest was checked. Not for sparse sections.
    ///
    /// # Errors
    /// Missing, unreadable or damaged.
    pub fn section(&self, kind: SectionKind) -> Result<Vec<u8>, VerifyError> {
        let entry = self.entry(kind)?;
        if kind.runs_kind().is_some() {
            return Err(VerifyError::Decode(
                kind,
                "it is sparse and not read as a whole".into(),
            ));
        }
        let length = usize::try_from(entry.length)
            .map_err(|error| VerifyError::Decode(kind, error.to_string()))?;
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, entry.offset)
            .map_err(|error| VerifyError::Read(kind, error))?;
        if *blake3::hash(&bytes).as_bytes() != entry.digest {
            return Err(VerifyError::Digest(kind));
        }
        Ok(bytes)
    }

    /// Where guest memory lies, of a snapshot that stands by itself. Its run list is checked, its pages are not: that is
    /// [`Snapshot::verify`]'s work, once, before the first clone.
    ///
    /// # Errors
    /// Missing, unreadable or damaged; [`VerifyError::Layered`] for a difference: see [`Snapshot::memory_layers`].
    pub fn memory(&self) -> Result<SparseSection, VerifyError> {
        if self.has(SectionKind::Base) {
            return Err(VerifyError::Layered);
        }
        self.own_memory()
    }

    /// What this file holds of guest memory: all pages that are not zero, or those that differ from the base's.
    ///
    /// # Errors
    /// Missing, unreadable or damaged.
    pub fn own_memory(&self) -> Result<SparseSection, VerifyError> {
        self.sparse(SectionKind::Memory)
    }

    /// Which pages a guest touches first, if that was recorded.
    ///
    /// # Errors
    /// Unreadable or damaged.
    pub fn working_set(&self) -> Result<Option<WorkingSet>, VerifyError> {
        let kind = SectionKind::WorkingSet;
        if !self.has(kind) {
            return Ok(None);
        }
        WorkingSet::decode(&self.section(kind)?, self.memory_bytes()?)
            .map(Some)
            .map_err(|error| VerifyError::Decode(kind, error.to_string()))
    }

    /// Where the `index`-th disk lies; as [`Snapshot::memory`].
    ///
    /// # Errors
    /// Missing, unreadable or damaged.
    pub fn disk(&self, index: u8) -> Result<SparseSection, VerifyError> {
        self.sparse(SectionKind::Disk(index))
    }

    /// What this is a snapshot of.
    ///
    /// # Errors
    /// Missing, unreadable or damaged.
    pub fn metadata(&self) -> Result<Metadata, VerifyError> {
        let kind = SectionKind::Metadata;
        serde_json::from_slice(&self.section(kind)?)
            .map_err(|error| VerifyError::Decode(kind, error.to_string()))
    }

    /// The CPU features it was taken with.
    ///
    /// # Errors
    /// Missing, unreadable or damaged.
    pub fn cpu(&self) -> Result<CpuRecord, VerifyError> {
        let kind = SectionKind::Cpu;
        CpuRecord::decode(&self.section(kind)?).map_err(|why| VerifyError::Decode(kind, why))
    }

    /// Where the `index`-th disk lies, bytes in the file, without the list of its pages, which a restore does not need.
    ///
    /// # Errors
    /// Missing.
    pub fn disk_range(&self, index: u8) -> Result<Range<u64>, VerifyError> {
        let entry = self.entry(SectionKind::Disk(index))?;
        Ok(entry.offset..entry.end())
    }

    pub(crate) fn has(&self, kind: SectionKind) -> bool {
        self.entry(kind).is_ok()
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.header.entries
    }

    pub(crate) fn section_bytes(&self, kind: SectionKind) -> Result<u64, VerifyError> {
        Ok(self.entry(kind)?.length)
    }

    pub(crate) fn set_attached(&mut self, base: Snapshot) {
        self.base = Some(Box::new(base));
    }

    pub(crate) fn tag(&self) -> Option<[u8; TAG_BYTES]> {
        self.header.tag
    }

    /// The base that was given, if one was.
    pub(crate) fn attached_base(&self) -> Option<&Snapshot> {
        self.base.as_deref()
    }

    /// The base; `None` if there is none to have, an error if it was not attached.
    pub(crate) fn attached(&self) -> Result<Option<&Snapshot>, VerifyError> {
        match (self.base()?, self.base.as_deref()) {
            (None, _) => Ok(None),
            (Some(_), Some(base)) => Ok(Some(base)),
            (Some(named), None) => Err(VerifyError::BaseMissing(named)),
        }
    }

    fn header_end(&self) -> u64 {
        layout::header_end(self.header.entries.len())
    }

    pub(crate) fn entry(&self, kind: SectionKind) -> Result<&Entry, VerifyError> {
        self.header
            .entries
            .iter()
            .find(|entry| entry.kind == kind)
            .ok_or(VerifyError::Missing(kind))
    }

    pub(crate) fn sparse(&self, kind: SectionKind) -> Result<SparseSection, VerifyError> {
        let entry = *self.entry(kind)?;
        let runs_kind = kind.runs_kind().ok_or(VerifyError::Missing(kind))?;
        let runs = sparse::decode(&self.section(runs_kind)?, entry.length)
            .map_err(|error| VerifyError::Runs(kind, error))?;
        Ok(SparseSection {
            offset: entry.offset,
            length: entry.length,
            runs,
        })
    }

    fn verify_sparse(&self, entry: &Entry) -> Result<Vec<Range<u64>>, VerifyError> {
        let section = self.sparse(entry.kind)?;
        let in_file =
            |run: &PageRun| section.offset + run.bytes().start..section.offset + run.bytes().end;
        let ranges: Vec<_> = section.runs.iter().map(in_file).collect();
        let digest = self.hash(
            entry,
            ranges.iter().cloned(),
            &sparse::encode(&section.runs),
        )?;
        if digest != entry.digest {
            return Err(VerifyError::Digest(entry.kind));
        }
        Ok(ranges)
    }

    fn hash(
        &self,
        entry: &Entry,
        ranges: impl IntoIterator<Item = Range<u64>>,
        tail: &[u8],
    ) -> Result<[u8; 32], VerifyError> {
        let mut hasher = blake3::Hasher::new();
        for range in ranges {
            read_range(&self.file, range, |_, bytes| {
                hasher.update(bytes);
                Ok::<_, io::Error>(())
            })
            .map_err(|error| VerifyError::Read(entry.kind, error))?;
        }
        Ok(*hasher.update(tail).finalize().as_bytes())
    }
}
