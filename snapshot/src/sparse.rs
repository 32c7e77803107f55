//! Page runs: which pages of a sparse section are not zero, and the proof that the others are.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use thiserror::Error;

use crate::layout::PAGE_BYTES;

/// Bytes of one encoded run.
pub(crate) const RUN_BYTES: usize = 16;
/// How much is read at a time, bytes.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// Consecutive pages that are stored, relative to their section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First page.
    pub start: u64,
    /// How many, at least one.
    pub count: u64,
}

impl PageRun {
    /// The run's bytes, relative to its section.
    pub fn bytes(&self) -> Range<u64> {
        self.start * PAGE_BYTES..(self.start + self.count) * PAGE_BYTES
    }
}

/// Why a list of runs is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RunsError {
    /// Not a whole number of runs.
    #[error("page run list of {0} bytes is no multiple of {RUN_BYTES}")]
    Length(usize),
    /// Empty, overlapping, unordered or outside its section.
    #[error(
        "page run {index} ({start}+{count}) is empty, out of order or outside its section of {pages} pages"
    )]
    Run {
        /// Which.
        index: usize,
        /// Its first page.
        start: u64,
        /// Its length.
        count: u64,
        /// Pages in the section.
        pages: u64,
    },
}

pub(crate) fn encode(runs: &[PageRun]) -> Vec<u8> {
    runs.iter()
        .flat_map(|run| [run.start.to_le_bytes(), run.count.to_le_bytes()].concat())
        .collect()
}

pub(crate) fn decode(bytes: &[u8], section_bytes: u64) -> Result<Vec<PageRun>, RunsError> {
    let (pairs, rest) = bytes.as_chunks::<RUN_BYTES>();
    if !rest.is_empty() {
        return Err(RunsError::Length(bytes.len()));
    }
    let pages = section_bytes / PAGE_BYTES;
    let mut free_from = 0;
    let mut runs = Vec::with_capacity(pairs.len());
    for (index, pair) in pairs.iter().enumerate() {
        let [a, b, c, d, e, f, g, h, rest @ ..] = *pair;
        let (start, count) = (
            u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            u64::from_le_bytes(rest),
        );
        let end = start.checked_add(count);
        match end {
            Some(end) if count > 0 && start >= free_from && end <= pages => free_from = end,
            _ => {
                return Err(RunsError::Run {
                    index,
                    start,
                    count,
                    pages,
                });
            }
        }
        runs.push(PageRun { start, count });
    }
    Ok(runs)
}

/// Collects runs page by page.
#[derive(Debug, Default)]
pub(crate) struct RunCollector {
    runs: Vec<PageRun>,
}

impl RunCollector {
    pub(crate) fn push(&mut self, page: u64) {
        match self.runs.last_mut() {
            Some(last) if last.start + last.count == page => last.count += 1,
            _ => self.runs.push(PageRun {
                start: page,
                count: 1,
            }),
        }
    }

    pub(crate) fn into_runs(self) -> Vec<PageRun> {
        self.runs
    }
}

/// One page of nothing.
pub(crate) const ZERO_PAGE: [u8; 4096] = [0; 4096];
const _: () = assert!(ZERO_PAGE.len() as u64 == PAGE_BYTES);

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(ZERO_PAGE.len())
        .all(|chunk| chunk == &ZERO_PAGE[..chunk.len()])
}

/// Calls `each` with consecutive pieces of `range`.
pub(crate) fn read_range<E: From<io::Error>>(
    file: &File,
    range: Range<u64>,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(range.end - at)
            .unwrap_or(CHUNK_BYTES)
            .min(CHUNK_BYTES);
        file.read_exact_at(&mut buffer[..length], at)?;
        each(at, &buffer[..length])?;
        at += length as u64;
    }
    Ok(())
}

/// The offset of the first byte that is not zero outside `covered` (sorted, disjoint), if there is one. Holes are skipped
/// where the file system tells of them, and read where it does not.
pub(crate) fn first_stray_byte(
    file: &File,
    covered: &[Range<u64>],
    file_bytes: u64,
) -> io::Result<Option<u64>> {
    let mut at = 0;
    let end = file_bytes..file_bytes;
    for range in covered.iter().chain([&end]) {
        if let Some(stray) = first_nonzero(file, at..range.start)? {
            return Ok(Some(stray));
        }
        at = range.end;
    }
    Ok(None)
}

/// An offset found, carried out of `read_range` as its error.
enum Found {
    At(u64),
    Failed(io::Error),
}

impl From<io::Error> for Found {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn first_nonzero(file: &File, range: Range<u64>) -> io::Result<Option<u64>> {
    let mut at = range.start;
    while at < range.end {
        let data = next_data(file, at, range.end)?;
        if data.is_empty() {
            return Ok(None);
        }
        let found = read_range(file, data.clone(), |offset, bytes| {
            match bytes.iter().position(|byte| *byte != 0) {
                Some(index) if !is_zero(bytes) => Err(Found::At(offset + index as u64)),
                _ => Ok(()),
            }
        });
        match found {
            Ok(()) => at = data.end,
            Err(Found::At(offset)) => return Ok(Some(offset)),
            Err(Found::Failed(error)) => return Err(error),
        }
    }
    Ok(None)
}

/// The next stretch of `at..end` that is no hole; empty if all of it is one.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<Range<u64>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(end..end),
        Err(_) => return Ok(at..end), // no holes told here: read everything
    };
    if start >= end {
        return Ok(end..end);
    }
    let hole = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(start..hole.min(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_survive_the_round_trip() {
        let runs = [
            PageRun { start: 0, count: 2 },
            PageRun { start: 5, count: 1 },
        ];
        assert_eq!(decode(&encode(&runs), 6 * PAGE_BYTES).unwrap(), runs);
    }

    #[test]
    fn bad_runs_are_refused() {
        for runs in [
            vec![PageRun { start: 0, count: 0 }],
            vec![
                PageRun { start: 3, count: 1 },
                PageRun { start: 3, count: 1 },
            ],
            vec![PageRun { start: 0, count: 7 }],
            vec![PageRun {
                start: u64::MAX,
                count: 2,
            }],
        ] {
            assert!(decode(&encode(&runs), 6 * PAGE_BYTES).is_err(), "{runs:?}");
        }
        assert_eq!(decode(&[0; 15], PAGE_BYTES), Err(RunsError::Length(15)));
    }
}
