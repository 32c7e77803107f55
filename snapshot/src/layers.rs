//! Which parts of which files make up a guest's memory: the base's first, then what differs from it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use thiserror::Error;

use crate::difference::{DIFFERENCE_RUNS_MAX, union};
use crate::layout::SectionKind;
use crate::reader::{Snapshot, VerifyError};
use crate::{BaseRef, Digest, PageRun, SparseSection};

/// Why a snapshot cannot be the base of another.
#[derive(Debug, Error)]
pub enum BaseError {
    /// The other stands by itself.
    #[error("snapshot is complete and has no base")]
    NotADifference,
    /// Another snapshot than the one that was named.
    #[error(
        "snapshot differs from base {expected}, but was given {found}: build the function's snapshot again"
    )]
    Digest {
        /// Named.
        expected: Digest,
        /// Given.
        found: Digest,
    },
    /// The lengths of the memories contradict each other.
    #[error("snapshot has {own} bytes of memory and its base has {base}")]
    Length {
        /// The difference's.
        own: u64,
        /// The base's.
        base: u64,
    },
    /// One difference on another is not made.
    #[error("base is itself a difference: only one base below a snapshot is supported")]
    Chain,
    /// Which base it is cannot be read.
    #[error("base of the snapshot could not be read")]
    Read(#[source] VerifyError),
}

/// A part of guest memory and where it is stored. To be mapped in the order in which they are given, later over earlier.
#[derive(Clone, Copy, Debug)]
pub struct MemoryLayer<'a> {
    /// The snapshot's file, or its base's.
    pub file: &'a File,
    /// In the file, bytes; a multiple of [`crate::PAGE_BYTES`]; `file_offset + bytes` is within the file.
    pub file_offset: u64,
    /// In guest memory, bytes from its start; a multiple of [`crate::PAGE_BYTES`].
    pub memory_offset: u64,
    /// Length, a multiple of [`crate::PAGE_BYTES`].
    pub bytes: u64,
}

impl Snapshot {
    /// Which snapshot this one is a difference to; `None` if it stands by itself.
    ///
    /// # Errors
    /// Unreadable or damaged.
    pub fn base(&self) -> Result<Option<BaseRef>, VerifyError> {
        let kind = SectionKind::Base;
        if !self.has(kind) {
            return Ok(None);
        }
        BaseRef::decode(&self.section(kind)?)
            .map(Some)
            .ok_or_else(|| VerifyError::Decode(kind, "it has another length".into()))
    }

    /// Gives a difference its base, whose header and table were checked when it was opened; [`Snapshot::verify`] checks the
    /// rest of both.
    ///
    /// # Errors
    /// See [`BaseError`]. Nothing is attached then.
    pub fn attach_base(&mut self, base: Snapshot) -> Result<(), BaseError> {
        let named = self
            .base()
            .map_err(BaseError::Read)?
            .ok_or(BaseError::NotADifference)?;
        let found = base.content_digest();
        if found != named.digest {
            return Err(BaseError::Digest {
                expected: named.digest,
                found,
            });
        }
        if base.base().map_err(BaseError::Read)?.is_some() {
            return Err(BaseError::Chain);
        }
        let own = self.memory_bytes().map_err(BaseError::Read)?;
        let below = base.memory_bytes().map_err(BaseError::Read)?;
        if own != below || named.memory_bytes != below {
            return Err(BaseError::Length { own, base: below });
        }
        self.set_attached(base);
        Ok(())
    }

    /// Length of guest memory, bytes.
    ///
    /// # Errors
    /// The snapshot has none.
    pub fn memory_bytes(&self) -> Result<u64, VerifyError> {
        self.section_bytes(SectionKind::Memory)
    }

    /// Where guest memory lies, in layers: exactly these are to be mapped, privately, in this order. One of the whole memory,
    /// and for a difference at most [`DIFFERENCE_RUNS_MAX`] more.
    ///
    /// # Errors
    /// Missing or damaged; [`VerifyError::BaseMissing`] if the base was not attached.
    pub fn memory_layers(&self) -> Result<Vec<MemoryLayer<'_>>, VerifyError> {
        let Some(base) = self.attached()? else {
            // Without the list of pages, which is long: a restore waits for this.
            let entry = self.entry(SectionKind::Memory)?;
            return Ok(vec![MemoryLayer {
                file: self.file(),
                file_offset: entry.offset,
                memory_offset: 0,
                bytes: entry.length,
            }]);
        };
        let section = self.own_memory()?;
        if section.runs.len() > DIFFERENCE_RUNS_MAX {
            return Err(VerifyError::Decode(
                SectionKind::Memory,
                format!("a difference of {} runs", section.runs.len()),
            ));
        }
        let below = base.own_memory()?;
        let first = MemoryLayer {
            file: base.file(),
            file_offset: below.offset,
            memory_offset: 0,
            bytes: below.length,
        };
        let changed = section.runs.iter().map(|run| MemoryLayer {
            file: self.file(),
            file_offset: section.offset + run.bytes().start,
            memory_offset: run.bytes().start,
            bytes: run.bytes().end - run.bytes().start,
        });
        Ok(std::iter::once(first).chain(changed).collect())
    }

    /// Pages of guest memory that may be something else than zero, those of the base included; sorted and disjoint.
    ///
    /// # Errors
    /// As [`Snapshot::memory_layers`].
    pub fn memory_runs(&self) -> Result<Vec<PageRun>, VerifyError> {
        let SparseSection { runs, .. } = self.own_memory()?;
        match self.attached()? {
            Some(base) => Ok(union(&base.own_memory()?.runs, &runs)),
            None => Ok(runs),
        }
    }

    /// Guest memory to be read, whichever files it lies in; it holds descriptors of its own.
    ///
    /// # Errors
    /// As [`Snapshot::memory_layers`], or the process has no descriptors left.
    pub fn memory_reader(&self) -> Result<MemoryReader, VerifyError> {
        let failed = |error| VerifyError::Read(SectionKind::Memory, error);
        let section = self.own_memory()?;
        let own = (self.file().try_clone().map_err(failed)?, section);
        let base = match self.attached()? {
            Some(base) => Some((
                base.file().try_clone().map_err(failed)?,
                base.own_memory()?.offset,
            )),
            None => None,
        };
        Ok(MemoryReader { own, base })
    }
}

/// Reads guest memory from a snapshot and its base. Its bytes are as good as the files: see [`Snapshot::verify`].
#[derive(Debug)]
pub struct MemoryReader {
    own: (File, SparseSection),
    /// The base's file and where its memory lies in it.
    base: Option<(File, u64)>,
}

impl MemoryReader {
    /// Length of guest memory, bytes.
    pub fn bytes(&self) -> u64 {
        self.own.1.length
    }

    /// Fills `buffer` with the memory at `offset`, bytes.
    ///
    /// # Errors
    /// A file cannot be read, or the range is not within memory (`InvalidInput`).
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (file, section) = &self.own;
        let end = offset
            .checked_add(buffer.len() as u64)
            .filter(|end| *end <= section.length)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let Some((base, base_offset)) = &self.base else {
            return file.read_exact_at(buffer, section.offset + offset);
        };
        base.read_exact_at(buffer, base_offset + offset)?;
        let first = section
            .runs
            .partition_point(|run| run.bytes().end <= offset);
        for run in &section.runs[first..] {
            let bytes = run.bytes().start.max(offset)..run.bytes().end.min(end);
            if bytes.is_empty() {
                break;
            }
            let place = |at: u64| usize::try_from(at - offset).map_err(io::Error::other);
            let part = &mut buffer[place(bytes.start)?..place(bytes.end)?];
            file.read_exact_at(part, section.offset + bytes.start)?;
        }
        Ok(())
    }
}
