//! Fetching a unit from the source and putting it into memory.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::source::{Filled, Source, SourceError};
use crate::userfault::{PAGE_BYTES, Protection, Region};

/// Chunks that are kept while single pages of them are put.
const CACHED_CHUNKS_MAX: usize = 32;

/// The source, tried again where that helps, with the chunks of single pages kept for a while.
pub(crate) struct Fetcher {
    source: Arc<dyn Source>,
    unit_bytes: usize,
    attempts: u32,
    pause: Duration,
    cache: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

/// A source that failed for good.
pub(crate) struct FetchError {
    pub(crate) attempts: u32,
    pub(crate) source: SourceError,
}

impl Fetcher {
    pub(crate) fn new(
        source: Arc<dyn Source>,
        unit_bytes: usize,
        attempts: u32,
        pause: Duration,
    ) -> Self {
        Self {
            source,
            unit_bytes,
            attempts: attempts.max(1),
            pause,
            cache: Mutex::default(),
        }
    }

    /// Bytes of memory that `unit` is.
    pub(crate) fn range(&self, unit: usize) -> Range<u64> {
        let start = unit as u64 * self.unit_bytes as u64;
        start..(start + self.unit_bytes as u64).min(self.source.bytes())
    }

    /// The content of `unit`; `None` if it is zero.
    pub(crate) fn fetch(&self, unit: usize) -> Result<Option<Vec<u8>>, FetchError> {
        let wanted = self.range(unit);
        let chunk_bytes = self.source.chunk_bytes() as u64;
        if self.unit_bytes as u64 == chunk_bytes {
            return self.chunk(wanted);
        }
        let start = wanted.start - wanted.start % chunk_bytes;
        let chunk = match self.cached(start) {
            Some(chunk) => chunk,
            None => {
                let range = start..(start + chunk_bytes).min(self.source.bytes());
                let chunk: Arc<[u8]> = self.chunk(range)?.unwrap_or_default().into();
                self.keep(start, &chunk);
                chunk
            }
        };
        // An empty chunk is a zero one.
        let within = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
        Ok(chunk
            .get(within(wanted.start)..within(wanted.end))
            .map(<[u8]>::to_vec))
    }

    fn cached(&self, start: u64) -> Option<Arc<[u8]>> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let found = cache.iter().find(|(at, _)| *at == start)?;
        Some(Arc::clone(&found.1))
    }

    fn keep(&self, start: u64, chunk: &Arc<[u8]>) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() == CACHED_CHUNKS_MAX {
            cache.pop_front();
        }
        cache.push_back((start, Arc::clone(chunk)));
    }

    fn chunk(&self, range: Range<u64>) -> Result<Option<Vec<u8>>, FetchError> {
        let length = usize::try_from(range.end - range.start).expect("a chunk is in memory");
        let mut buffer = vec![0; length];
        let mut attempts = 1;
        loop {
            match self.source.read(range.start, &mut buffer) {
                Ok(Filled::Data) => return Ok(Some(buffer)),
                Ok(Filled::Zero) => return Ok(None),
                Err(SourceError::Transient(_)) if attempts < self.attempts => {
                    thread::sleep(self.pause * attempts);
                    attempts += 1;
                }
                Err(source) => return Err(FetchError { attempts, source }),
            }
        }
    }
}

/// Puts a unit's content; pages of it that are zero cost no memory.
pub(crate) fn install(
    region: &Region,
    range: Range<u64>,
    content: Option<&[u8]>,
    protection: Protection,
) -> io::Result<()> {
    let Some(content) = content else {
        // The kernel's zero page cannot be watched.
        if protection == Protection::Watched {
            let zeros = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
            return region.put(range.start, &vec![0; zeros], protection);
        }
        return region.put_zeros(range.start, range.end - range.start);
    };
    if protection == Protection::Watched {
        return region.put(range.start, content, protection);
    }
    let pages: Vec<&[u8]> = content.chunks(PAGE_BYTES).collect();
    let is_zero = |page: &&[u8]| page.iter().all(|byte| *byte == 0);
    let mut at = range.start;
    for run in pages.chunk_by(|one, other| is_zero(one) == is_zero(other)) {
        let first = usize::try_from(at - range.start).map_err(io::Error::other)?;
        let length: usize = run.iter().map(|page| page.len()).sum();
        if run.first().is_some_and(is_zero) {
            region.put_zeros(at, length as u64)?;
        } else {
            region.put(at, &content[first..first + length], protection)?;
        }
        at += length as u64;
    }
    Ok(())
}
