//! Difference snapshots: which snapshot lies below, and which pages are stored.
//!
//! A run that is stored is a mapping at restore, so their number is bounded: near runs are joined, and the pages between them,
//! which equal the base's, are stored too.

use std::io;
use std::os::unix::fs::FileExt as _;

use crate::layout::PAGE_BYTES;
use crate::sparse::{CHUNK_BYTES, RunCollector};
use crate::{Digest, PageRun, PageSource, SparseSection};

/// Bytes of the base section: content digest, memory length.
pub(crate) const BASE_BYTES: usize = 40;
/// Most runs that a difference may have when it is read; a process has 65530 mappings by default (`vm.max_map_count`).
pub const DIFFERENCE_RUNS_MAX: usize = 4096;
/// How many runs a difference is written with unless its writer asks for another number: few, as each costs a restore one
/// system call, and past this number the pages that more runs would save are few.
pub const DIFFERENCE_RUNS_DEFAULT: usize = 128;

/// Names the snapshot whose memory lies below a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseRef {
    /// Its [`crate::Snapshot::content_digest`]: it stays the same when the base is given a working set.
    pub digest: Digest,
    /// Length of its memory, bytes; the difference's own has the same.
    pub memory_bytes: u64,
}

impl BaseRef {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [&self.digest.0[..], &self.memory_bytes.to_le_bytes()].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (digest, length) = bytes.split_first_chunk::<32>()?;
        Some(Self {
            digest: Digest(*digest),
            memory_bytes: u64::from_le_bytes(length.try_into().ok()?),
        })
    }
}

/// Joins runs until at most `runs_max` (at least one) are left, closing those gaps that cost the fewest pages; of equal gaps
/// the first. `runs` are sorted and disjoint, and so is what is returned. Each gap is closed or not by itself, so that taking
/// the smallest is no heuristic: nothing else costs less.
pub fn close_gaps(runs: &[PageRun], runs_max: usize) -> Vec<PageRun> {
    let surplus = runs.len().saturating_sub(runs_max.max(1));
    let gap = |pair: &[PageRun; 2]| pair[1].start - (pair[0].start + pair[0].count);
    let mut gaps: Vec<(u64, usize)> = runs.array_windows().map(gap).zip(1..).collect();
    gaps.sort_unstable();
    let mut is_closed = vec![false; runs.len()];
    for (_, second) in &gaps[..surplus.min(gaps.len())] {
        is_closed[*second] = true;
    }
    let mut joined: Vec<PageRun> = Vec::with_capacity(runs.len() - surplus);
    for (run, is_closed) in runs.iter().zip(is_closed) {
        match joined.last_mut() {
            Some(last) if is_closed => last.count = run.start + run.count - last.start,
            _ => joined.push(*run),
        }
    }
    joined
}

/// All pages that stand in `one` or `other`, both sorted and disjoint.
pub(crate) fn union(one: &[PageRun], other: &[PageRun]) -> Vec<PageRun> {
    let mut all = [one, other].concat();
    all.sort_unstable_by_key(|run| run.start);
    let mut merged: Vec<PageRun> = Vec::with_capacity(all.len());
    for run in all {
        match merged.last_mut() {
            Some(last) if run.start <= last.start + last.count => {
                last.count = last.count.max(run.start + run.count - last.start);
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// Why two memories could not be compared.
pub(crate) enum CompareError {
    Source(io::Error),
    Base(io::Error),
}

/// The pages of `source` that differ from the base's memory, which is `section` of `file`.
pub(crate) fn changed_runs(
    source: &mut dyn PageSource,
    file: &std::fs::File,
    section: &SparseSection,
) -> Result<Vec<PageRun>, CompareError> {
    let (mut runs, mut at) = (RunCollector::default(), 0);
    let (mut ours, mut theirs) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut stored = section.runs.iter().peekable();
    while at < section.length {
        while stored.next_if(|run| run.bytes().end <= at).is_some() {}
        let in_base = stored.peek().map(|run| run.bytes().start.max(at));
        let in_source = source.next_data(at).map_err(CompareError::Source)?;
        // Where neither has anything, both are zero.
        let Some(data) = [in_base, in_source].into_iter().flatten().min() else {
            break;
        };
        at = at.max(data - data % PAGE_BYTES);
        if at >= section.length {
            break;
        }
        let chunk = usize::try_from(section.length - at)
            .unwrap_or(CHUNK_BYTES)
            .min(CHUNK_BYTES);
        let (ours, theirs) = (&mut ours[..chunk], &mut theirs[..chunk]);
        source.read_at(at, ours).map_err(CompareError::Source)?;
        file.read_exact_at(theirs, section.offset + at)
            .map_err(CompareError::Base)?;
        let pages = ours.as_chunks::<4096>().0.iter();
        for (page, (one, other)) in (at / PAGE_BYTES..).zip(pages.zip(theirs.as_chunks::<4096>().0))
        {
            if one != other {
                runs.push(page);
            }
        }
        at += chunk as u64;
    }
    Ok(runs.into_runs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(start: u64, count: u64) -> PageRun {
        PageRun { start, count }
    }

    fn pages(runs: &[PageRun]) -> u64 {
        runs.iter().map(|run| run.count).sum()
    }

    #[test]
    fn the_smallest_gaps_are_closed_first() {
        let runs = [run(0, 1), run(3, 1), run(5, 1), run(100, 1), run(102, 1)];
        assert_eq!(close_gaps(&runs, 5), runs);
        assert_eq!(close_gaps(&runs, 3), [run(0, 1), run(3, 3), run(100, 3)]);
        assert_eq!(close_gaps(&runs, 2), [run(0, 6), run(100, 3)]);
        assert_eq!(close_gaps(&runs, 1), [run(0, 103)]);
        assert_eq!(close_gaps(&runs, 0), [run(0, 103)]);
        assert_eq!(close_gaps(&[], 4), []);
    }

    /// Sorted, disjoint runs out of gap and length pairs.
    fn runs_of(steps: &[(u64, u64)]) -> Vec<PageRun> {
        let mut at = 0;
        let mut runs = Vec::new();
        for (gap, count) in steps {
            runs.push(run(at + gap, *count));
            at += gap + count;
        }
        runs
    }

    /// The least number of pages any choice of gaps leaves, by trying all.
    fn least(runs: &[PageRun], runs_max: usize) -> u64 {
        let gaps = runs.len().saturating_sub(1);
        let choices = (0u32..1 << gaps).filter(|choice| {
            runs.is_empty() || runs.len() - choice.count_ones() as usize <= runs_max
        });
        choices
            .map(|choice| {
                let closed = runs
                    .array_windows::<2>()
                    .enumerate()
                    .filter(|(i, _)| choice & (1 << i) != 0);
                pages(runs)
                    + closed
                        .map(|(_, [a, b])| b.start - a.start - a.count)
                        .sum::<u64>()
            })
            .min()
            .unwrap()
    }

    proptest! {
        #[test]
        fn closing_gaps_keeps_every_page_within_the_limit_at_least_cost(
            steps in prop::collection::vec((1u64..9, 1u64..5), 0..10), runs_max in 1usize..12
        ) {
            let runs = runs_of(&steps);
            let joined = close_gaps(&runs, runs_max);
            prop_assert!(joined.len() <= runs_max.max(1));
            let apart = joined.array_windows().all(|[a, b]| a.start + a.count < b.start);
            prop_assert!(apart);
            let within = |one: &PageRun, all: &PageRun| all.start <= one.start && one.start + one.count <= all.start + all.count;
            let kept = runs.iter().all(|one| joined.iter().any(|all| within(one, all)));
            prop_assert!(kept);
            prop_assert_eq!(pages(&joined), least(&runs, runs_max));
        }

        #[test]
        fn a_union_holds_the_pages_of_both(
            one in prop::collection::vec((0u64..4, 1u64..4), 0..8), other in prop::collection::vec((0u64..4, 1u64..4), 0..8)
        ) {
            let (one, other) = (runs_of(&one), runs_of(&other));
            let merged = union(&one, &other);
            let holds = |runs: &[PageRun], page| runs.iter().any(|run| run.start <= page && page < run.start + run.count);
            for page in 0..100 {
                prop_assert_eq!(holds(&merged, page), holds(&one, page) || holds(&other, page));
            }
            let apart = merged.array_windows().all(|[a, b]| a.start + a.count < b.start);
            prop_assert!(apart);
        }

        #[test]
        fn any_bytes_are_a_base_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            match BaseRef::decode(&bytes) {
                Some(base) => prop_assert_eq!(base.encode(), bytes),
                None => prop_assert!(bytes.len() != BASE_BYTES),
            }
        }
    }
}
