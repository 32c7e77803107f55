//! What is behind a disk: a read-only window of a file and, for copy-on-write disks, a delta in memory.
//!
//! The delta is an anonymous file (memfd) plus a bitmap of 4 KiB blocks: making one costs nothing that grows
//! with the disk but the bitmap, and nothing is left behind when the process is killed.
//!
//! **Invariant:** a set bit means that the whole block's content is in the delta, at the disk's own offset.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::GuestMemoryError;

use super::guest_io;
use crate::devices::virtqueue::Buffers;
use crate::memory::{GuestMemoryMmap, GuestSlice};

/// Granularity of copy-on-write.
pub(super) const BLOCK_BYTES: u64 = 4096;

#[derive(Debug)]
struct Delta {
    file: File,
    /// Bit n: block n is in the delta.
    written: Vec<u64>,
}

impl Delta {
    fn new() -> io::Result<Self> {
        let file = File::from(memfd_create("thaw-disk-delta", MemfdFlags::CLOEXEC)?);
        Ok(Self {
            file,
            written: Vec::new(),
        })
    }

    /// Makes it empty, for a disk of `length` bytes. Every page of the old content is given back to the host, those
    /// included that a failed write has left without their bit.
    fn clear(&mut self, length: u64) -> io::Result<()> {
        let words = length.div_ceil(BLOCK_BYTES).div_ceil(64);
        let words = usize::try_from(words).map_err(io::Error::other)?;
        self.written.clear();
        self.written.resize(words, 0);
        ftruncate(&self.file, 0)?;
        ftruncate(&self.file, length)?;
        Ok(())
    }

    fn has(&self, block: u64) -> bool {
        let (word, bit) = place(block);
        self.written[word] & bit != 0
    }

    fn set(&mut self, block: u64) {
        let (word, bit) = place(block);
        self.written[word] |= bit;
    }
}

fn place(block: u64) -> (usize, u64) {
    let word = usize::try_from(block / 64).expect("the bitmap covers the disk");
    (word, 1 << (block % 64))
}

/// A disk's content.
#[derive(Debug)]
pub(super) struct Store {
    base: File,
    base_offset: u64,
    length: u64,
    delta: Option<Delta>,
}

/// One run of bytes with a single source.
struct Run<'a> {
    file: &'a File,
    file_offset: u64,
    range: Range<u64>,
}

impl Store {
    /// A window that nobody can write.
    pub(super) fn read_only(base: File, base_offset: u64, length: u64) -> Self {
        Self {
            base,
            base_offset,
            length,
            delta: None,
        }
    }

    /// A window whose writes go to a fresh delta.
    pub(super) fn copy_on_write(base: File, base_offset: u64, length: u64) -> io::Result<Self> {
        let mut delta = Delta::new()?;
        delta.clear(length)?;
        Ok(Self {
            base,
            base_offset,
            length,
            delta: Some(delta),
        })
    }

    /// An empty file, for a disk whose base is not known yet.
    pub(super) fn no_base() -> io::Result<File> {
        Ok(File::from(memfd_create(
            "thaw-no-disk",
            MemfdFlags::CLOEXEC,
        )?))
    }

    /// Replaces the base; [`Store::forget_writes`] must follow.
    pub(super) fn set_base(&mut self, base: File, base_offset: u64, length: u64) {
        (self.base, self.base_offset, self.length) = (base, base_offset, length);
    }

    /// Drops all that was ever written: the base's bytes are what is read from here on.
    pub(super) fn forget_writes(&mut self) -> io::Result<()> {
        match &mut self.delta {
            Some(delta) => delta.clear(self.length),
            None => Ok(()),
        }
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    fn in_delta(&self, block: u64) -> bool {
        self.delta.as_ref().is_some_and(|delta| delta.has(block))
    }

    /// The first run of `range`, which must not be empty.
    fn run(&self, range: Range<u64>) -> Run<'_> {
        let block = range.start / BLOCK_BYTES;
        let from_delta = self.in_delta(block);
        let mut next = block + 1;
        while next * BLOCK_BYTES < range.end && self.in_delta(next) == from_delta {
            next += 1;
        }
        let end = range.end.min(next * BLOCK_BYTES);
        let (file, file_offset) = match &self.delta {
            Some(delta) if from_delta => (&delta.file, range.start),
            _ => (&self.base, self.base_offset + range.start),
        };
        Run {
            file,
            file_offset,
            range: range.start..end,
        }
    }

    /// Calls `act` with each run of `range` in order. The range must lie within the disk.
    fn for_each_run(
        &self,
        range: Range<u64>,
        mut act: impl FnMut(&Run<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        assert!(range.end <= self.length, "the caller checked the range");
        let mut start = range.start;
        while start < range.end {
            let run = self.run(start..range.end);
            act(&run)?;
            start = run.range.end;
        }
        Ok(())
    }

    /// Reads merged content.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut rest = into;
        self.for_each_run(offset..offset + rest.len() as u64, |run| {
            let length =
                usize::try_from(run.range.end - run.range.start).map_err(io::Error::other)?;
            let (part, after) = std::mem::take(&mut rest).split_at_mut(length);
            run.file.read_exact_at(part, run.file_offset)?;
            rest = after;
            Ok(())
        })
    }

    /// Reads merged content into `buffers`, from `at` on.
    pub(super) fn read_to_guest(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        (buffers, at, length): (&Buffers, usize, usize),
    ) -> io::Result<()> {
        self.for_each_run(offset..offset + length as u64, |run| {
            let skip = usize::try_from(run.range.start - offset).map_err(io::Error::other)?;
            let length =
                usize::try_from(run.range.end - run.range.start).map_err(io::Error::other)?;
            let read = |slice: GuestSlice<'_>, distance| -> Result<(), Failure> {
                guest_io::read_exact_at(run.file, slice, run.file_offset + distance)?;
                Ok(())
            };
            buffers
                .for_each_slice(memory, at + skip, length, read)
                .map_err(|failure| failure.0)
        })
    }

    /// Writes `length` bytes of `buffers`, from `at` on, to the delta. Where the write covers a block only in
    /// part, the rest of the block is copied there first.
    ///
    /// # Errors
    /// The disk is read-only, the host is out of memory, or a file failed; blocks that were not in the delta
    /// then still read as before.
    pub(super) fn write_from_guest(
        &mut self,
        memory: &GuestMemoryMmap,
        offset: u64,
        (buffers, at, length): (&Buffers, usize, usize),
    ) -> io::Result<()> {
        let end = offset + length as u64;
        assert!(end <= self.length, "the caller checked the range");
        if length == 0 {
            return Ok(());
        }
        let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        let partial_start = !offset.is_multiple_of(BLOCK_BYTES);
        let partial_end = !end.is_multiple_of(BLOCK_BYTES) && end != self.length;
        if partial_start {
            self.copy_up(blocks.start)?;
        }
        if partial_end {
            self.copy_up(blocks.end - 1)?;
        }
        let delta = self
            .delta
            .as_mut()
            .ok_or(io::ErrorKind::ReadOnlyFilesystem)?;
        let write = |slice: GuestSlice<'_>, distance| -> Result<(), Failure> {
            guest_io::write_all_at(&delta.file, slice, offset + distance)?;
            Ok(())
        };
        buffers
            .for_each_slice(memory, at, length, write)
            .map_err(|failure| failure.0)?;
        blocks.for_each(|block| delta.set(block));
        Ok(())
    }

    /// Copies one block from the base to the delta, if it is not there.
    fn copy_up(&mut self, block: u64) -> io::Result<()> {
        let delta = self
            .delta
            .as_mut()
            .ok_or(io::ErrorKind::ReadOnlyFilesystem)?;
        if delta.has(block) {
            return Ok(());
        }
        let start = block * BLOCK_BYTES;
        let length =
            usize::try_from(BLOCK_BYTES.min(self.length - start)).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        self.base
            .read_exact_at(&mut bytes, self.base_offset + start)?;
        delta.file.write_all_at(&bytes, start)?;
        delta.set(block);
        Ok(())
    }

    /// Bytes that are in the delta, in whole blocks.
    pub(super) fn written_bytes(&self) -> u64 {
        let words = self.delta.iter().flat_map(|delta| &delta.written);
        words.map(|word| u64::from(word.count_ones())).sum::<u64>() * BLOCK_BYTES
    }

    /// Byte ranges that are in the delta, ascending.
    pub(super) fn written_runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in (0..self.length.div_ceil(BLOCK_BYTES)).filter(|&block| self.in_delta(block)) {
            let start = block * BLOCK_BYTES;
            let end = self.length.min(start + BLOCK_BYTES);
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        runs
    }
}

/// Either side's failure as the host's error.
struct Failure(io::Error);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self(error)
    }
}

impl From<GuestMemoryError> for Failure {
    fn from(error: GuestMemoryError) -> Self {
        Self(io::Error::other(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn forgotten_writes_leave_no_page_behind() {
        let base = Store::no_base().unwrap();
        base.set_len(1 << 20).unwrap();
        let mut store = Store::copy_on_write(base, 0, 1 << 20).unwrap();
        let delta = store.delta.as_mut().unwrap();
        delta.file.write_all_at(&[7; 9000], 5000).unwrap();
        // Block 0 was written to by a request that failed before it set its bit.
        (1..3).for_each(|block| delta.set(block));
        let mut bytes = vec![0; 1 << 20];
        store.read(0, &mut bytes).unwrap();
        assert_eq!((bytes[4096], bytes[5000], bytes[12287]), (0, 7, 7));
        assert_eq!(store.written_bytes(), 2 * BLOCK_BYTES);
        store.forget_writes().unwrap();
        assert_eq!(store.written_bytes(), 0);
        store.read(0, &mut bytes).unwrap();
        assert_eq!(
            (store.written_runs(), bytes),
            (Vec::new(), vec![0; 1 << 20])
        );
        let delta = store.delta.as_ref().unwrap();
        let metadata = delta.file.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (1 << 20, 0));
    }
}
