//! The working set of a guest: fetched before it runs and beside it, and told of it afterwards.
//!
//! Where KVM can map pages ahead of a guest ([`crate::prefault`]), what was copied and the first of what will be read are mapped before
//! it runs: one takes a tenth of what an exit for it takes (lab, nested paging: 11 of 120 us).
//!
//! Fetching changes no byte of memory: pages that will be read are mapped from the page cache, pages that will be written are
//! copied ahead, the first of them before the guest runs. So it needs no agreement with the guest, with a pause or with a save; it only must not outlast the VM.
//!
//! What was touched is read from `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst). A page that is there and is not
//! the file's own was written. A page that is the file's was read, or lies beside one that was: the kernel maps up to 16 pages
//! around a fault if they are in the page cache, where fetching them costs nothing.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use rustix::mm::{Advice, madvise};
use thaw_snapshot::{Access, Snapshot, Touch, TouchedRun, VerifyError};
use thaw_vmm_control::{WORKING_SET_RUNS_MAX, WorkingSet, WorkingSetRun};

use crate::belongings;
use crate::confine::{self, Role};
use crate::memory::{GuestMemory, PAGE_BYTES};
use crate::prefault;

/// Pages fetched by one call: the process's memory map is not held for longer than this takes.
const FETCH_PAGES: u64 = 64;
/// Pages copied before the guest runs, 1 MiB: a request waits for them.
const COPY_PAGES: u64 = 256;
/// Pages that will be read and are mapped before the guest runs, 2 MiB: a request waits for them, and a set may name all of memory.
const MAP_PAGES: u64 = 512;
/// A page is in memory or in swap: bits 63 and 62 of its pagemap entry.
const THERE: u64 = 0b11 << 62;
/// It is a page of a file: bit 61.
const OF_FILE: u64 = 1 << 61;
/// Entries read at once.
const BATCH: u64 = 4096;

/// Pages, and how they are fetched.
type Piece = (Range<u64>, Access);

/// The working set in pieces of at most [`FETCH_PAGES`], each kind in the order of first touches: what is copied before the guest
/// runs, up to [`COPY_PAGES`] that it will write, and the rest. A page that is mapped for reading first would have to be mapped
/// twice, so writes come first there too.
fn pieces(set: &thaw_snapshot::WorkingSet) -> (Vec<Piece>, Vec<Piece>) {
    let (mut now, mut later) = (Vec::new(), Vec::new());
    let mut left = COPY_PAGES;
    for access in [Access::Write, Access::Read] {
        for run in set.runs().iter().filter(|run| run.access == access) {
            let end = run.pages.start + run.pages.count;
            let mut at = run.pages.start;
            while at < end {
                let is_now = access == Access::Write && left > 0;
                let most = if is_now { left } else { FETCH_PAGES };
                let next = end.min(at + FETCH_PAGES.min(most));
                if is_now {
                    left -= next - at;
                    now.push((at..next, access));
                } else {
                    later.push((at..next, access));
                }
                at = next;
            }
        }
    }
    (now, later)
}

/// Copies ahead the first pages that the guest will write: copying one costs a third of what its first touch costs, and both at
/// the same time hinder each other. The rest of the set is the result, for [`Prefetcher::start`].
///
/// # Errors
/// The snapshot's section is unreadable or damaged.
pub fn copy_ahead(snapshot: &Snapshot, memory: &GuestMemory) -> Result<Rest, VerifyError> {
    let Some(set) = snapshot.working_set()? else {
        return Ok(Rest::default());
    };
    let (now, later) = pieces(&set);
    for piece in &now {
        fetch(memory.host_address(), memory.bytes(), piece);
    }
    let copied = now.into_iter().map(|(pages, _)| pages).collect();
    Ok(Rest { copied, later })
}

/// What of a working set is still to be done.
#[derive(Debug, Default)]
pub struct Rest {
    /// Copied, and not mapped for the guest.
    copied: Vec<Range<u64>>,
    /// Not fetched.
    later: Vec<Piece>,
}

impl Rest {
    /// Maps for the guest what was copied and the first [`MAP_PAGES`] that it will read, if KVM does that; what was read so need not
    /// be fetched. `fd` is a vCPU that does not run and has its state.
    pub fn map_ahead(&mut self, fd: &VcpuFd, memory: &GuestMemory) {
        let (reads, runs) = self.to_map();
        let wanted: u64 = runs.iter().map(|run| run.end - run.start).sum();
        if wanted > 0 && prefault::map_ahead(fd, memory, &runs) == wanted {
            let mut left = reads;
            self.later.retain(|(_, access)| {
                let is_mapped = *access == Access::Read && left > 0;
                left -= usize::from(is_mapped);
                !is_mapped
            });
        }
    }

    /// How many pieces that are read are to be mapped, and these and the copied pages, neighbours together.
    fn to_map(&self) -> (usize, Vec<Range<u64>>) {
        let mut room = MAP_PAGES;
        let pieces = self.later.iter().filter(|piece| piece.1 == Access::Read);
        let reads: Vec<_> = pieces
            .map_while(|(pages, _)| {
                room = room.checked_sub(pages.end - pages.start)?;
                Some(pages.clone())
            })
            .collect();
        let count = reads.len();
        let mut runs = [self.copied.clone(), reads].concat();
        runs.sort_unstable_by_key(|run| run.start);
        runs.dedup_by(|next, run| {
            let is_next = run.end == next.start;
            if is_next {
                run.end = next.end;
            }
            is_next
        });
        (count, runs)
    }
}

/// Fetches beside a running guest. Dropping it ends that soon, without waiting.
#[derive(Debug)]
pub struct Prefetcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Prefetcher {
    /// Starts to fetch the rest of a working set into a private mapping of a snapshot's memory; `None` if there is none.
    ///
    /// # Errors
    /// No thread.
    pub fn start(rest: Rest, memory: &GuestMemory) -> io::Result<Option<Self>> {
        let pieces = rest.later;
        if pieces.is_empty() {
            return Ok(None);
        }
        let (first, bytes) = (memory.host_address(), memory.bytes());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let body = move || {
            confine::thread(Role::Fetching);
            let pieces = pieces.into_iter();
            pieces
                .take_while(|_| !stopped.load(Ordering::Relaxed))
                .for_each(|piece| fetch(first, bytes, &piece));
        };
        let thread = std::thread::Builder::new()
            .name("prefetch".into())
            .spawn(body)?;
        Ok(Some(Self {
            stop,
            thread: Some(thread),
        }))
    }

    /// Stops, and waits until nothing is fetched any more: at most one call of [`FETCH_PAGES`] pages.
    pub fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has said so on the log; the guest does not depend on it.
            let _ = thread.join();
        }
    }
}

/// Fetches one piece of the guest memory that is at `first` in this process.
fn fetch(first: u64, memory_bytes: u64, (pages, access): &Piece) {
    let (start, end) = (pages.start * PAGE_BYTES, pages.end * PAGE_BYTES);
    assert!(end <= memory_bytes, "runs lie within memory");
    let (Ok(address), Ok(bytes)) = (usize::try_from(first + start), usize::try_from(end - start))
    else {
        return;
    };
    let advice = match access {
        Access::Read => Advice::LinuxPopulateRead,
        Access::Write => Advice::LinuxPopulateWrite,
    };
    // A page that cannot be fetched now is fetched when the guest touches it, and fails there if it must.
    // SAFETY: the range lies within guest memory, which is never unmapped; neither advice changes its content.
    let _ = unsafe { madvise(std::ptr::without_provenance_mut(address), bytes, advice) };
}

/// Remembers in which order pages were seen touched: those of an earlier look come first, and of one look in ascending order.
#[derive(Debug, Default)]
pub struct Recorder {
    /// Bit n of word m: page 64 m + n was seen.
    seen: Vec<u64>,
    order: Vec<Range<u64>>,
}

/// The working set of touches that were recorded in their order.
pub fn in_order(touches: &[Touch], memory_bytes: u64) -> WorkingSet {
    let set = thaw_snapshot::WorkingSet::from_touches(touches, memory_bytes);
    let run = |run: &TouchedRun| WorkingSetRun {
        start: run.pages.start,
        count: run.pages.count,
        written: run.access == Access::Write,
    };
    let runs = set.runs().iter().take(WORKING_SET_RUNS_MAX).map(run);
    WorkingSet {
        runs: runs.collect(),
    }
}

/// How a page was used, as pagemap tells.
fn access(entry: u64) -> Option<Access> {
    match (entry & THERE != 0, entry & OF_FILE != 0) {
        (false, _) => None,
        (true, true) => Some(Access::Read),
        (true, false) => Some(Access::Write),
    }
}

impl Recorder {
    /// Looks at the memory of a restored machine and tells all that was touched until now.
    ///
    /// # Errors
    /// This process may not read its own pagemap.
    pub fn look(&mut self, memory: &GuestMemory) -> io::Result<WorkingSet> {
        let pagemap = belongings::pagemap()?;
        let (first, pages) = (
            memory.host_address() / PAGE_BYTES,
            memory.bytes() / PAGE_BYTES,
        );
        let mut now = Vec::new();
        let mut bytes = vec![0; 8 * 4096];
        let mut at = 0;
        while at < pages {
            let count = (pages - at).min(BATCH);
            let batch = &mut bytes[..usize::try_from(8 * count).map_err(io::Error::other)?];
            pagemap.read_exact_at(batch, 8 * (first + at))?;
            let (words, _) = batch.as_chunks::<8>();
            now.extend(words.iter().map(|word| access(u64::from_le_bytes(*word))));
            at += count;
        }
        Ok(self.note(&now))
    }

    /// Takes the accesses of all pages and tells the set so far.
    fn note(&mut self, now: &[Option<Access>]) -> WorkingSet {
        self.seen.resize(now.len().div_ceil(64), 0);
        for (page, index) in (0u64..).zip(0..now.len()) {
            let (word, bit) = (index / 64, 1 << (index % 64));
            if now[index].is_none() || self.seen[word] & bit != 0 {
                continue;
            }
            self.seen[word] |= bit;
            match self.order.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => self.order.push(page..page + 1),
            }
        }
        let mut runs: Vec<WorkingSetRun> = Vec::new();
        for page in self.order.iter().cloned().flatten() {
            let here = usize::try_from(page).ok().and_then(|index| now[index]);
            let written = here == Some(Access::Write);
            let is_full = runs.len() == WORKING_SET_RUNS_MAX;
            match runs.last_mut() {
                Some(run) if run.start + run.count == page && run.written == written => {
                    run.count += 1;
                }
                _ if is_full => break,
                _ => runs.push(WorkingSetRun {
                    start: page,
                    count: 1,
                    written,
                }),
            }
        }
        WorkingSet { runs }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use thaw_snapshot::PageRun;
    use vm_memory::{Bytes, GuestAddress};

    const R: Option<Access> = Some(Access::Read);
    const W: Option<Access> = Some(Access::Write);

    fn run(start: u64, count: u64, written: bool) -> WorkingSetRun {
        WorkingSetRun {
            start,
            count,
            written,
        }
    }

    #[test]
    fn so_many_pages_are_copied_first_and_the_rest_is_fetched_writes_before_reads() {
        let run = |start, count, access| TouchedRun {
            pages: PageRun { start, count },
            access,
        };
        let runs = vec![
            run(500, 100, Access::Read),
            run(10, 1, Access::Write),
            run(1000, 300, Access::Write),
            run(20, 2, Access::Write),
        ];
        let set = thaw_snapshot::WorkingSet::new(runs, 64 << 20).unwrap();
        let (now, later) = pieces(&set);
        let pages = |pieces: &[Piece]| -> Vec<u64> {
            pieces.iter().flat_map(|(pages, _)| pages.clone()).collect()
        };
        assert_eq!(now[0].0, 10..11);
        assert!(now.iter().all(|(_, access)| *access == Access::Write));
        let first: Vec<u64> = [10].into_iter().chain(1000..1255).collect();
        assert_eq!(pages(&now), first);
        let rest: Vec<u64> = (1255..1300).chain(20..22).chain(500..600).collect();
        assert_eq!(pages(&later), rest);
        let longest = now
            .iter()
            .chain(&later)
            .map(|(pages, _)| pages.end - pages.start);
        assert!(longest.max() <= Some(FETCH_PAGES));
    }

    #[test]
    fn what_was_copied_and_the_first_reads_are_mapped_neighbours_together_and_never_more_than_so_many()
     {
        let rest = Rest {
            copied: vec![10..12, 300..310],
            later: vec![
                (600..664, Access::Write),
                (310..320, Access::Read),
                (12..13, Access::Read),
                (0..10, Access::Read),
                (50..51, Access::Read),
            ],
        };
        assert_eq!(rest.to_map(), (4, vec![0..13, 50..51, 300..320]));

        let piece = |number: u64| (1024 + 128 * number, Access::Read);
        let many = Rest {
            copied: vec![0..100, 100..COPY_PAGES],
            later: (0..100)
                .map(piece)
                .map(|(start, access)| (start..start + FETCH_PAGES, access))
                .collect(),
        };
        let (count, runs) = many.to_map();
        assert_eq!(count, 8);
        let pages: u64 = runs.iter().map(|run| run.end - run.start).sum();
        assert_eq!(pages, COPY_PAGES + MAP_PAGES);
        assert_eq!(Rest::default().to_map(), (0, vec![]));
    }

    #[test]
    fn what_was_seen_earlier_comes_first_and_what_is_written_later_counts_as_written() {
        let mut recorder = Recorder::default();
        let first = recorder.note(&[None, None, R, R, None, W]);
        assert_eq!(first.runs, [run(2, 2, false), run(5, 1, true)]);
        let second = recorder.note(&[R, None, R, W, R, W]);
        assert_eq!(
            second.runs,
            [
                run(2, 1, false),
                run(3, 1, true),
                run(5, 1, true),
                run(0, 1, false),
                run(4, 1, false)
            ]
        );
    }

    #[test]
    fn a_set_has_at_most_so_many_runs() {
        let every_other: Vec<_> = (0..4 * WORKING_SET_RUNS_MAX)
            .map(|page| if page % 2 == 0 { R } else { None })
            .collect();
        let set = Recorder::default().note(&every_other);
        assert_eq!(set.runs.len(), WORKING_SET_RUNS_MAX);
    }

    #[test]
    fn pages_read_and_written_are_told_apart_and_fetching_changes_nothing() {
        let memory = GuestMemory::reserve(64 << 20).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 64 * 4096]).unwrap();
        file.set_len(64 << 20).unwrap();
        memory.map_private(&file, 0).unwrap();
        let view = memory.view();
        let written = |recorder: &mut Recorder| -> Vec<u64> {
            let set = recorder.look(&memory).unwrap();
            let runs = set.runs.iter().filter(|run| run.written);
            runs.flat_map(|run| run.start..run.start + run.count)
                .collect()
        };
        let mut recorder = Recorder::default();
        assert!(recorder.look(&memory).unwrap().runs.is_empty());
        view.write_obj(1u8, GuestAddress(40 * 4096)).unwrap();
        assert_eq!(view.read_obj::<u8>(GuestAddress(3 * 4096)).unwrap(), 7);
        assert_eq!(written(&mut recorder), [40]);
        let read = recorder.look(&memory).unwrap();
        assert!(read.runs.iter().any(|run| !run.written));

        fetch(
            memory.host_address(),
            memory.bytes(),
            &(50..52, Access::Write),
        );
        fetch(
            memory.host_address(),
            memory.bytes(),
            &(60..61, Access::Read),
        );
        assert_eq!(written(&mut recorder), [40, 50, 51]);
        let content: Vec<u8> = [40, 50, 51, 60]
            .iter()
            .map(|page| view.read_obj(GuestAddress(page * 4096)).unwrap())
            .collect();
        assert_eq!(content, [1, 7, 7, 7]);
    }
}
