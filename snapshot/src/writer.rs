//! Writing a snapshot: sections one after another, the header last, so that an unfinished file has none.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use thiserror::Error;

use crate::difference::{CompareError, DIFFERENCE_RUNS_MAX, changed_runs, close_gaps};
use crate::layout::{self, Entry, PAGE_BYTES, SECTION_COUNT_MAX, SectionKind};
use crate::sparse::{self, CHUNK_BYTES, PageRun, RunCollector, ZERO_PAGE, is_zero};
use crate::{BaseRef, CpuRecord, Digest, Metadata, Snapshot, WorkingSet, WorkingSetError};

/// Where a sparse section's content comes from: guest memory, a disk.
pub trait PageSource {
    /// Fills `buffer` from `offset`; both are multiples of [`PAGE_BYTES`].
    ///
    /// # Errors
    /// The source cannot be read; the snapshot is not written then.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// The first offset at or after `offset` that may hold something else than zeros; `None` if nothing does.
    ///
    /// # Errors
    /// The source cannot tell; the snapshot is not written then.
    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>>;
}

/// Why a snapshot could not be written. The file is of no use then.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The file system failed; full, most often.
    #[error("cannot write snapshot section {0}")]
    Section(SectionKind, #[source] io::Error),
    /// The source of a sparse section failed.
    #[error("cannot read what snapshot section {0} is made of")]
    Source(SectionKind, #[source] io::Error),
    /// Header or sync failed.
    #[error("cannot finish the snapshot file")]
    Finish(#[source] io::Error),
    /// Something that the format cannot hold.
    #[error("snapshot section {0} does not fit the format: {1}")]
    Unfit(SectionKind, &'static str),
    /// The base of a difference cannot be read, or is a difference itself.
    #[error("cannot read the base of the snapshot")]
    Base(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A working set of another memory.
    #[error("working set does not fit the snapshot's memory")]
    WorkingSet(#[source] WorkingSetError),
    /// Metadata or CPU record cannot be encoded.
    #[error("cannot encode snapshot section {0}: {1}")]
    Encode(SectionKind, String),
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Length of the file, holes included, bytes.
    pub file_bytes: u64,
    /// Bytes that are not holes.
    pub stored_bytes: u64,
    /// Identity of the snapshot.
    pub digest: Digest,
}

/// Writes one snapshot into one empty file.
#[derive(Debug)]
pub struct Writer {
    file: File,
    entries: Vec<Entry>,
    next_offset: u64,
    stored_bytes: u64,
}

impl Writer {
    /// Begins a snapshot in `file`, which must be empty and writable. Nothing is written yet.
    pub fn new(file: File) -> Self {
        Self {
            file,
            entries: Vec::new(),
            next_offset: PAGE_BYTES,
            stored_bytes: PAGE_BYTES,
        }
    }

    /// Writes the metadata section.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn metadata(&mut self, metadata: &Metadata) -> Result<(), WriteError> {
        let kind = SectionKind::Metadata;
        let json = serde_json::to_vec(metadata)
            .map_err(|error| WriteError::Encode(kind, error.to_string()))?;
        self.section(kind, &json)
    }

    /// Writes the CPU section.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn cpu(&mut self, cpu: &CpuRecord) -> Result<(), WriteError> {
        let kind = SectionKind::Cpu;
        let bytes = postcard::to_stdvec(cpu)
            .map_err(|error| WriteError::Encode(kind, error.to_string()))?;
        self.section(kind, &bytes)
    }

    /// Writes the working set section; memory must have been written before.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn working_set(&mut self, working_set: &WorkingSet) -> Result<(), WriteError> {
        let kind = SectionKind::WorkingSet;
        let memory = self
            .entries
            .iter()
            .find(|entry| entry.kind == SectionKind::Memory);
        let memory = memory.ok_or(WriteError::Unfit(kind, "there is no memory before it"))?;
        WorkingSet::new(working_set.runs().to_vec(), memory.length)
            .map_err(WriteError::WorkingSet)?;
        self.section(kind, &working_set.encode())
    }

    /// Writes a section from memory.
    ///
    /// # Errors
    /// The file system failed, the section is too long for its kind, or there is one of its kind already.
    pub fn section(&mut self, kind: SectionKind, bytes: &[u8]) -> Result<(), WriteError> {
        if kind.runs_kind().is_some() {
            return Err(WriteError::Unfit(kind, "it is written page by page"));
        }
        let length = bytes.len() as u64;
        let offset = self.admit(kind, length)?;
        self.file
            .write_all_at(bytes, offset)
            .map_err(|error| WriteError::Section(kind, error))?;
        self.stored_bytes += length.next_multiple_of(PAGE_BYTES);
        self.push(Entry {
            kind,
            offset,
            length,
            digest: *blake3::hash(bytes).as_bytes(),
        });
        Ok(())
    }

    /// Writes `length` bytes (whole pages) of `source` as a sparse section, and its run list after it. Zero pages become holes.
    ///
    /// # Errors
    /// The file system or the source failed, or the section does not fit the format.
    pub fn sparse_section(
        &mut self,
        kind: SectionKind,
        length: u64,
        source: &mut dyn PageSource,
    ) -> Result<(), WriteError> {
        let Some(runs_kind) = kind.runs_kind() else {
            return Err(WriteError::Unfit(kind, "it is not sparse"));
        };
        if !length.is_multiple_of(PAGE_BYTES) {
            return Err(WriteError::Unfit(kind, "it is no whole number of pages"));
        }
        let base = self.admit(kind, length)?;
        let (mut hasher, mut runs) = (blake3::Hasher::new(), RunCollector::default());
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut at = 0;
        while at < length {
            let data = source
                .next_data(at)
                .map_err(|error| WriteError::Source(kind, error))?;
            let Some(data) = data.filter(|data| *data < length) else {
                break;
            };
            at = (data - data % PAGE_BYTES).max(at);
            let chunk = usize::try_from(length - at)
                .unwrap_or(CHUNK_BYTES)
                .min(CHUNK_BYTES);
            let chunk = &mut buffer[..chunk];
            source
                .read_at(at, chunk)
                .map_err(|error| WriteError::Source(kind, error))?;
            self.write_pages(base, at, chunk, &mut hasher, &mut runs)
                .map_err(|error| WriteError::Section(kind, error))?;
            at += chunk.len() as u64;
        }
        self.end_sparse(kind, runs_kind, length, hasher, &runs.into_runs())
    }

    /// Writes guest memory as a difference to `base`, which must stand by itself and have as much memory as `source`: the pages
    /// that differ, those that became zero included, joined to at most `runs_max` runs (1 to [`DIFFERENCE_RUNS_MAX`]; see
    /// [`close_gaps`]). `source` is read twice and must not change meanwhile. Returns how many pages differ; more are
    /// stored if gaps were closed.
    ///
    /// # Errors
    /// File system, source or base failed, or the section does not fit the format.
    pub fn memory_difference(
        &mut self,
        source: &mut dyn PageSource,
        base: &Snapshot,
        runs_max: usize,
    ) -> Result<u64, WriteError> {
        let kind = SectionKind::Memory;
        if !(1..=DIFFERENCE_RUNS_MAX).contains(&runs_max) {
            return Err(WriteError::Unfit(
                kind,
                "its number of runs is out of range",
            ));
        }
        let below = base
            .memory()
            .map_err(|error| WriteError::Base(error.into()))?;
        let length = below.length;
        let changed = changed_runs(source, base.file(), &below).map_err(|error| match error {
            CompareError::Source(error) => WriteError::Source(kind, error),
            CompareError::Base(error) => WriteError::Base(error.into()),
        })?;
        let reference = BaseRef {
            digest: base.content_digest(),
            memory_bytes: length,
        };
        self.section(SectionKind::Base, &reference.encode())?;
        let offset = self.admit(kind, length)?;
        let runs = close_gaps(&changed, runs_max);
        let hasher = self.copy_runs(offset, source, &runs)?;
        self.end_sparse(kind, SectionKind::MemoryRuns, length, hasher, &runs)?;
        Ok(changed.iter().map(|run| run.count).sum())
    }

    /// Writes these pages of `source`, zero or not, into the memory section at `offset`.
    fn copy_runs(
        &mut self,
        offset: u64,
        source: &mut dyn PageSource,
        runs: &[PageRun],
    ) -> Result<blake3::Hasher, WriteError> {
        let kind = SectionKind::Memory;
        let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; CHUNK_BYTES]);
        for run in runs {
            let bytes = run.bytes();
            for at in bytes.clone().step_by(CHUNK_BYTES) {
                let chunk = usize::try_from(bytes.end - at)
                    .unwrap_or(CHUNK_BYTES)
                    .min(CHUNK_BYTES);
                let chunk = &mut buffer[..chunk];
                source
                    .read_at(at, chunk)
                    .map_err(|error| WriteError::Source(kind, error))?;
                hasher.update(chunk);
                self.file
                    .write_all_at(chunk, offset + at)
                    .map_err(|error| WriteError::Section(kind, error))?;
            }
            self.stored_bytes += bytes.end - bytes.start;
        }
        Ok(hasher)
    }

    /// Enters a sparse section whose pages were written and hashed, and writes its run list.
    fn end_sparse(
        &mut self,
        kind: SectionKind,
        runs_kind: SectionKind,
        length: u64,
        mut hasher: blake3::Hasher,
        runs: &[PageRun],
    ) -> Result<(), WriteError> {
        let encoded = sparse::encode(runs);
        hasher.update(&encoded);
        self.push(Entry {
            kind,
            offset: self.next_offset,
            length,
            digest: *hasher.finalize().as_bytes(),
        });
        self.section(runs_kind, &encoded)
    }

    /// Writes those pages of `chunk` that are not zero, in as few calls as possible.
    fn write_pages(
        &mut self,
        base: u64,
        at: u64,
        chunk: &[u8],
        hasher: &mut blake3::Hasher,
        runs: &mut RunCollector,
    ) -> io::Result<()> {
        let page_bytes = ZERO_PAGE.len();
        let mut run_start = None;
        for (index, page) in chunk.chunks(page_bytes).chain([&[][..]]).enumerate() {
            let start = index * page_bytes;
            if !is_zero(page) {
                runs.push(at / PAGE_BYTES + index as u64);
                run_start.get_or_insert(start);
            } else if let Some(first) = run_start.take() {
                let bytes = &chunk[first..start];
                hasher.update(bytes);
                self.file.write_all_at(bytes, base + at + first as u64)?;
                self.stored_bytes += bytes.len() as u64;
            }
        }
        Ok(())
    }

    /// Writes the header and makes the file durable. Giving it its name is the caller's part: [`crate::PendingFile`].
    ///
    /// # Errors
    /// The file system failed.
    pub fn finish(self) -> Result<Summary, WriteError> {
        let file_bytes = self.next_offset;
        let (page, digest) = layout::encode(&self.entries, file_bytes);
        self.file.set_len(file_bytes).map_err(WriteError::Finish)?;
        self.file
            .write_all_at(&page, 0)
            .map_err(WriteError::Finish)?;
        self.file.sync_all().map_err(WriteError::Finish)?;
        Ok(Summary {
            file_bytes,
            stored_bytes: self.stored_bytes,
            digest,
        })
    }

    /// Goes on behind what is there already: for [`crate::set_working_set`].
    pub(crate) fn resume(file: File, entries: Vec<Entry>) -> Self {
        let last = entries.last().map_or(PAGE_BYTES, Entry::end);
        Self {
            file,
            next_offset: last.next_multiple_of(PAGE_BYTES),
            entries,
            stored_bytes: PAGE_BYTES,
        }
    }

    fn admit(&self, kind: SectionKind, length: u64) -> Result<u64, WriteError> {
        if self.entries.len() >= SECTION_COUNT_MAX {
            return Err(WriteError::Unfit(kind, "there are too many sections"));
        }
        if length > kind.bytes_max()
            || self.next_offset.saturating_add(length) > layout::FILE_BYTES_MAX
        {
            return Err(WriteError::Unfit(kind, "it is too long"));
        }
        if self.entries.iter().any(|entry| entry.kind == kind) {
            return Err(WriteError::Unfit(kind, "there is one already"));
        }
        Ok(self.next_offset)
    }

    fn push(&mut self, entry: Entry) {
        self.next_offset = entry.end().next_multiple_of(PAGE_BYTES);
        self.entries.push(entry);
    }
}
