//! The working set: which pages a guest touches first, so that they can be brought in before it asks.
//!
//! It is a hint: a restore without it is slower and otherwise the same. That is why its section is optional and stands outside
//! of [`crate::Snapshot::content_digest`].

use std::collections::HashMap;

use thiserror::Error;

use crate::PageRun;
use crate::layout::PAGE_BYTES;

/// Most runs of a working set: 1 MiB in the file.
pub const WORKING_SET_RUNS_MAX: usize = 1 << 16;
/// Bytes of one encoded run.
pub(crate) const TOUCHED_BYTES: usize = 16;
const WRITTEN: u32 = 1;

/// How a page was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Only read: it can stay shared with other clones.
    Read,
    /// Written, perhaps read before: a copy of its own is needed anyway.
    Write,
}

/// Consecutive pages of guest memory that were touched one after another, all in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TouchedRun {
    /// Which pages of the guest's memory.
    pub pages: PageRun,
    /// How.
    pub access: Access,
}

/// One page as it was first touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Page number in guest memory.
    pub page: u64,
    /// How.
    pub access: Access,
}

/// Why something is no working set.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WorkingSetError {
    /// Not a whole number of runs.
    #[error("working set of {0} bytes is no multiple of {TOUCHED_BYTES}")]
    Length(usize),
    /// More runs than one may have.
    #[error("working set has {0} runs, at most {WORKING_SET_RUNS_MAX} are allowed")]
    Count(usize),
    /// Empty, outside of memory, or of an unknown access.
    #[error(
        "working set run {index} ({start}+{count}, access {access}) is empty, of an unknown access or outside of {pages} pages of memory"
    )]
    Run {
        /// Which.
        index: usize,
        /// Its first page.
        start: u64,
        /// Its length.
        count: u64,
        /// Its access as encoded.
        access: u32,
        /// Pages of memory.
        pages: u64,
    },
    /// A page stands in two runs.
    #[error("working set names page {0} twice")]
    Twice(u64),
}

/// Page runs in the order in which a guest first touched them: disjoint, within memory, at most [`WORKING_SET_RUNS_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<TouchedRun>,
}

impl TouchedRun {
    /// `count` pages from page `start`, written or only read. Checked by [`WorkingSet::new`].
    pub fn new(start: u64, count: u64, is_written: bool) -> Self {
        let access = match is_written {
            true => Access::Write,
            false => Access::Read,
        };
        Self {
            pages: PageRun { start, count },
            access,
        }
    }
}

impl WorkingSet {
    /// Checks `runs` against a memory of `memory_bytes`.
    ///
    /// # Errors
    /// See [`WorkingSetError`].
    pub fn new(runs: Vec<TouchedRun>, memory_bytes: u64) -> Result<Self, WorkingSetError> {
        if runs.len() > WORKING_SET_RUNS_MAX {
            return Err(WorkingSetError::Count(runs.len()));
        }
        let pages = memory_bytes / PAGE_BYTES;
        for (index, run) in runs.iter().enumerate() {
            let PageRun { start, count } = run.pages;
            let fits = start.checked_add(count).is_some_and(|end| end <= pages);
            if count == 0 || count > u64::from(u32::MAX) || !fits {
                return Err(WorkingSetError::Run {
                    index,
                    start,
                    count,
                    access: number(run.access),
                    pages,
                });
            }
        }
        let mut sorted: Vec<PageRun> = runs.iter().map(|run| run.pages).collect();
        sorted.sort_unstable_by_key(|run| run.start);
        if let Some([_, second]) = sorted
            .array_windows()
            .find(|[first, second]| first.start + first.count > second.start)
        {
            return Err(WorkingSetError::Twice(second.start));
        }
        Ok(Self { runs })
    }

    /// Makes runs of single touches: a page's place is that of its first touch, and it counts as written if any touch wrote.
    /// Touches outside of memory are left out, and so are runs past [`WORKING_SET_RUNS_MAX`]: the latest, which matter least.
    pub fn from_touches(touches: &[Touch], memory_bytes: u64) -> Self {
        let pages = memory_bytes / PAGE_BYTES;
        let mut written: HashMap<u64, bool> = HashMap::new();
        for touch in touches.iter().filter(|touch| touch.page < pages) {
            *written.entry(touch.page).or_default() |= touch.access == Access::Write;
        }
        let mut runs: Vec<TouchedRun> = Vec::new();
        for touch in touches {
            let Some(is_written) = written.remove(&touch.page) else {
                continue;
            };
            let access = if is_written {
                Access::Write
            } else {
                Access::Read
            };
            let is_full = runs.len() == WORKING_SET_RUNS_MAX;
            match runs.last_mut() {
                Some(last)
                    if last.access == access
                        && last.pages.start + last.pages.count == touch.page =>
                {
                    last.pages.count += 1;
                }
                _ if is_full => break,
                _ => runs.push(TouchedRun {
                    pages: PageRun {
                        start: touch.page,
                        count: 1,
                    },
                    access,
                }),
            }
        }
        Self { runs }
    }

    /// The runs, first touched first.
    pub fn runs(&self) -> &[TouchedRun] {
        &self.runs
    }

    /// Pages in all runs.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.pages.count).sum()
    }

    /// Pages that were written.
    pub fn written_pages(&self) -> u64 {
        let written = self.runs.iter().filter(|run| run.access == Access::Write);
        written.map(|run| run.pages.count).sum()
    }

    /// Bytes in all runs.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_BYTES
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.runs.len() * TOUCHED_BYTES);
        for run in &self.runs {
            let count = u32::try_from(run.pages.count).expect("checked when it was made");
            bytes.extend_from_slice(&run.pages.start.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&number(run.access).to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8], memory_bytes: u64) -> Result<Self, WorkingSetError> {
        let (entries, rest) = bytes.as_chunks::<TOUCHED_BYTES>();
        if !rest.is_empty() {
            return Err(WorkingSetError::Length(bytes.len()));
        }
        if entries.len() > WORKING_SET_RUNS_MAX {
            return Err(WorkingSetError::Count(entries.len()));
        }
        let mut runs = Vec::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let [a, b, c, d, e, f, g, h, i, j, k, l, access @ ..] = *entry;
            let start = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let count = u64::from(u32::from_le_bytes([i, j, k, l]));
            let access = match u32::from_le_bytes(access) {
                0 => Access::Read,
                WRITTEN => Access::Write,
                access => {
                    return Err(WorkingSetError::Run {
                        index,
                        start,
                        count,
                        access,
                        pages: memory_bytes / PAGE_BYTES,
                    });
                }
            };
            runs.push(TouchedRun {
                pages: PageRun { start, count },
                access,
            });
        }
        Self::new(runs, memory_bytes)
    }
}

fn number(access: Access) -> u32 {
    match access {
        Access::Read => 0,
        Access::Write => WRITTEN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEMORY: u64 = 64 * PAGE_BYTES;

    fn run(start: u64, count: u64, access: Access) -> TouchedRun {
        TouchedRun {
            pages: PageRun { start, count },
            access,
        }
    }

    fn touch(page: u64, access: Access) -> Touch {
        Touch { page, access }
    }

    #[test]
    fn touches_become_runs_in_the_order_of_the_first_touch() {
        use Access::{Read, Write};
        let touches = [
            touch(9, Read),
            touch(10, Read),
            touch(3, Read),
            touch(4, Write),
            touch(5, Write),
            touch(9, Read),
            touch(3, Write),
            touch(64, Read),
        ];
        let set = WorkingSet::from_touches(&touches, MEMORY);
        assert_eq!(set.runs(), [run(9, 2, Read), run(3, 3, Write)]);
        assert_eq!((set.pages(), set.written_pages()), (5, 3));
    }

    #[test]
    fn hostile_runs_are_refused() {
        use Access::Read;
        let refused = |runs: Vec<TouchedRun>| WorkingSet::new(runs, MEMORY).unwrap_err();
        assert!(matches!(
            refused(vec![run(0, 0, Read)]),
            WorkingSetError::Run { .. }
        ));
        assert!(matches!(
            refused(vec![run(63, 2, Read)]),
            WorkingSetError::Run { .. }
        ));
        assert!(matches!(
            refused(vec![run(u64::MAX, 2, Read)]),
            WorkingSetError::Run { .. }
        ));
        assert_eq!(
            refused(vec![run(5, 3, Read), run(1, 1, Read), run(7, 1, Read)]),
            WorkingSetError::Twice(7)
        );
        let many = vec![run(0, 1, Read); WORKING_SET_RUNS_MAX + 1];
        assert_eq!(refused(many.clone()), WorkingSetError::Count(many.len()));
        let encoded = WorkingSet { runs: many }.encode();
        assert!(matches!(
            WorkingSet::decode(&encoded, MEMORY),
            Err(WorkingSetError::Count(_))
        ));
    }

    #[test]
    fn an_unknown_access_is_refused() {
        let mut bytes = WorkingSet::new(vec![run(1, 1, Access::Read)], MEMORY)
            .unwrap()
            .encode();
        bytes[12] = 2;
        assert!(matches!(
            WorkingSet::decode(&bytes, MEMORY),
            Err(WorkingSetError::Run { access: 2, .. })
        ));
    }

    proptest! {
        #[test]
        fn any_touches_make_a_working_set_that_survives_the_round_trip(
            touches in prop::collection::vec((0u64..80, any::<bool>()), 0..200)
        ) {
            let touches: Vec<_> = touches
                .iter()
                .map(|(page, write)| touch(*page, if *write { Access::Write } else { Access::Read }))
                .collect();
            let set = WorkingSet::from_touches(&touches, MEMORY);
            prop_assert_eq!(&WorkingSet::decode(&set.encode(), MEMORY).unwrap(), &set);
            let mut distinct: Vec<_> = touches.iter().map(|touch| touch.page).filter(|page| *page < 64).collect();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(set.pages(), distinct.len() as u64);
        }

        #[test]
        fn any_bytes_are_a_valid_working_set_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..80), small in any::<bool>()) {
            // Small numbers, so that some pass.
            let bytes: Vec<u8> = if small { bytes.iter().enumerate().map(|(i, b)| if i % 8 == 0 { b % 4 } else { 0 }).collect() } else { bytes };
            if let Ok(set) = WorkingSet::decode(&bytes, MEMORY) {
                prop_assert_eq!(set.encode(), bytes);
                prop_assert!(set.pages() <= 64);
            }
        }
    }
}
