//! The pager on this machine's own userfaultfd: threads touch memory, sources are slow, damaged or gone.
//!
//! Without the right to a userfaultfd these tests fail, and say what is missing.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::num::NonZeroUsize;
use std::process::{Command, Stdio};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use thaw_snapshot::{Access, PageRun, Touch, WorkingSet};
use thaw_snapshot_pager::{
    Failure, Filled, Mode, Pager, PagerConfig, Source, SourceError, StartError, Stats, Userfault,
};

const PAGE: usize = 4096;
const CHUNK: usize = 4 * PAGE;
/// Far more than any wait that ends well.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a page holds: its number in its first bytes, then one byte repeated; every third page is zero.
fn content(page: usize) -> Vec<u8> {
    if page.is_multiple_of(3) {
        return vec![0; PAGE];
    }
    let mut bytes = vec![u8::try_from(page % 251).unwrap(); PAGE];
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    bytes
}

type Trouble = Box<dyn Fn(usize, usize) -> Result<(), SourceError> + Send + Sync>;

/// Memory of known pages that notes what was read, and can fail or hang at a chunk.
struct Known {
    pages: usize,
    reads: Mutex<Vec<usize>>,
    /// Called with the chunk and how often it was read before.
    trouble: Trouble,
}

impl Known {
    fn new(pages: usize) -> Arc<Self> {
        Self::with(pages, Box::new(|_, _| Ok(())))
    }

    fn with(pages: usize, trouble: Trouble) -> Arc<Self> {
        Arc::new(Self {
            pages,
            reads: Mutex::default(),
            trouble,
        })
    }

    fn reads(&self) -> Vec<usize> {
        self.reads.lock().unwrap().clone()
    }
}

impl Source for Known {
    fn bytes(&self) -> u64 {
        (self.pages * PAGE) as u64
    }

    fn chunk_bytes(&self) -> usize {
        CHUNK
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Filled, SourceError> {
        let first = usize::try_from(offset).unwrap() / PAGE;
        let chunk = first * PAGE / CHUNK;
        let before = {
            let mut reads = self.reads.lock().unwrap();
            reads.push(chunk);
            reads.iter().filter(|read| **read == chunk).count() - 1
        };
        (self.trouble)(chunk, before)?;
        for (page, part) in (first..).zip(buffer.chunks_mut(PAGE)) {
            part.copy_from_slice(&content(page));
        }
        match buffer.iter().all(|byte| *byte == 0) {
            true => Ok(Filled::Zero),
            false => Ok(Filled::Data),
        }
    }
}

/// Private anonymous memory, unmapped never: tests are short, and a pager may be served late.
#[derive(Clone, Copy)]
struct Memory {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: it is mapped for the life of the process; access is by volatile reads and writes of single bytes or by copies.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(pages: usize) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                pages * PAGE,
                protection,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        Self {
            start: NonNull::new(start.unwrap().cast()).unwrap(),
            pages,
        }
    }

    fn at(self, offset: usize) -> *mut u8 {
        assert!(offset < self.pages * PAGE);
        // SAFETY: within the mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }

    fn read(self, offset: usize) -> u8 {
        // SAFETY: mapped, readable; where a pager has taken it away the test expects the signal.
        unsafe { self.at(offset).read_volatile() }
    }

    fn write(self, offset: usize, byte: u8) {
        // SAFETY: as `read`.
        unsafe { self.at(offset).write_volatile(byte) }
    }

    fn page(self, page: usize) -> Vec<u8> {
        (page * PAGE..(page + 1) * PAGE)
            .map(|offset| self.read(offset))
            .collect()
    }

    fn serve(
        self,
        source: Arc<dyn Source>,
        mode: Mode,
        config: PagerConfig,
    ) -> (Pager, mpsc::Receiver<Failure>) {
        let (tell, told) = mpsc::channel();
        let userfault = Userfault::open().unwrap_or_else(|error| panic!("{error}"));
        let bytes = (self.pages * PAGE) as u64;
        // SAFETY: the mapping is never unmapped, and no test reads it after its pager is gone but to see that it cannot.
        let pager = unsafe {
            Pager::start(
                userfault,
                self.start,
                bytes,
                source,
                mode,
                config,
                move |failure| {
                    tell.send(failure).unwrap();
                },
            )
        };
        (pager.unwrap(), told)
    }
}

fn serve() -> Mode {
    Mode::Serve { first: Vec::new() }
}

fn patient() -> PagerConfig {
    PagerConfig {
        fault_limit: PATIENCE,
        pause: Duration::from_millis(1),
        ..PagerConfig::default()
    }
}

/// A page is there a moment before it is counted.
fn counts(pager: &Pager, count: impl Fn(Stats) -> u64, expected: u64) {
    let began = Instant::now();
    while count(pager.stats()) < expected && began.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(count(pager.stats()), expected);
}

fn run(start: u64, count: u64) -> PageRun {
    PageRun { start, count }
}

#[test]
fn every_page_is_what_the_source_holds_whoever_touches_it_when() {
    let pages = 403; // the last chunk is short
    let (memory, source) = (Memory::new(pages), Known::new(pages));
    let (pager, _told) = memory.serve(source.clone(), serve(), patient());
    thread::scope(|scope| {
        for seed in 0..6 {
            scope.spawn(move || {
                for step in 0..pages {
                    let page = (step * (2 * seed + 1) + 67 * seed) % pages;
                    assert!(memory.page(page) == content(page), "page {page}");
                }
            });
        }
    });
    let mut reads = source.reads();
    reads.sort_unstable();
    let all: Vec<_> = (0..pages.div_ceil(4)).collect();
    assert_eq!(reads, all, "each chunk is fetched once");
    counts(&pager, |stats| stats.fault_bytes, (pages * PAGE) as u64);
}

#[test]
fn zero_pages_cost_no_memory() {
    let pages = 512;
    let memory = Memory::new(pages);
    struct Zeros;
    impl Source for Zeros {
        fn bytes(&self) -> u64 {
            512 * 4096
        }
        fn chunk_bytes(&self) -> usize {
            CHUNK
        }
        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Filled, SourceError> {
            // Half of them say so, half of them are just full of zeros.
            buffer.fill(0);
            match offset / CHUNK as u64 % 2 {
                0 => Ok(Filled::Zero),
                _ => Ok(Filled::Data),
            }
        }
    }
    let (pager, _told) = memory.serve(Arc::new(Zeros), serve(), patient());
    assert!((0..pages).all(|page| memory.read(page * PAGE) == 0));
    assert_eq!(private_kib(memory), 0);
    counts(&pager, |stats| stats.zero_bytes, (pages * PAGE / 2) as u64);
    memory.write(5 * PAGE, 1);
    assert_eq!(memory.read(5 * PAGE), 1);
    assert_eq!(private_kib(memory), 4);
}

/// Anonymous memory of the mapping that starts with `memory`, KiB.
fn private_kib(memory: Memory) -> u64 {
    let start = memory.start.as_ptr().addr();
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = text.lines().skip_while(|line| {
        let range = line.split(' ').next().unwrap();
        let Some((from, to)) = range.split_once('-') else {
            return true;
        };
        let number = |text| usize::from_str_radix(text, 16);
        !(number(from).is_ok_and(|from| from <= start) && number(to).is_ok_and(|to| to > start))
    });
    let line = lines.find(|line| line.starts_with("Anonymous:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn the_working_set_comes_first_in_its_order_and_without_a_touch() {
    let pages = 400;
    let (memory, source) = (Memory::new(pages), Known::new(pages));
    let first = vec![
        run(200, 9),
        run(4, 1),
        run(201, 1),
        run(390, 100),
        run(1 << 60, 1),
    ];
    let config = PagerConfig {
        workers: NonZeroUsize::new(2).unwrap(), // one of them prefetches
        ..patient()
    };
    let (pager, _told) = memory.serve(source.clone(), Mode::Serve { first }, config);
    assert!(pager.wait_prefetched(PATIENCE));
    assert_eq!(source.reads(), [50, 51, 52, 1, 97, 98, 99]);
    let stats = pager.stats();
    assert_eq!(
        (stats.faults, stats.prefetched_bytes),
        (0, 7 * CHUNK as u64)
    );
    assert!((200..212).all(|page| memory.page(page) == content(page)));
    assert_eq!(pager.stats().faults, 0, "they were there");
    assert!(memory.page(100) == content(100));
    assert_eq!(pager.stats().faults, 1);
}

#[test]
fn pages_that_were_given_back_are_served_again() {
    let (memory, source) = (Memory::new(64), Known::new(64));
    let (_pager, _told) = memory.serve(source, serve(), patient());
    for round in 0..3 {
        for page in 0..64 {
            assert!(
                memory.page(page) == content(page),
                "page {page}, round {round}"
            );
            memory.write(page * PAGE, 0xff);
        }
        // SAFETY: the pager's contract allows it.
        unsafe {
            rustix::mm::madvise(
                memory.start.as_ptr().cast(),
                64 * PAGE,
                Advice::LinuxDontNeed,
            )
            .unwrap();
        }
    }
}

#[test]
fn a_recording_has_pages_in_the_order_of_their_first_touch_and_knows_writes() {
    let pages = 64;
    let (memory, source) = (Memory::new(pages), Known::new(pages));
    let (pager, _told) = memory.serve(source.clone(), Mode::Record, patient());
    memory.read(10 * PAGE);
    memory.write(9 * PAGE + 5, 7);
    memory.read(11 * PAGE);
    memory.read(30 * PAGE);
    memory.read(10 * PAGE + 100);
    memory.write(11 * PAGE, 1);
    memory.write(31 * PAGE, 1);
    memory.write(31 * PAGE, 2);
    let touch = |page, access| Touch { page, access };
    use Access::{Read, Write};
    let expected = [
        touch(10, Read),
        touch(9, Write),
        touch(11, Read),
        touch(30, Read),
        touch(11, Write),
        touch(31, Write),
    ];
    assert_eq!(pager.touches(), expected);
    let set = WorkingSet::from_touches(&pager.touches(), (pages * PAGE) as u64);
    assert_eq!(
        (set.pages(), set.written_pages(), set.runs().len()),
        (5, 3, 5)
    );
    // Single pages were put, chunks were read once.
    assert_eq!(source.reads(), [2, 7]);
    assert_eq!(memory.read(9 * PAGE + 5), 7);
    assert_eq!(memory.page(10), content(10));
}

#[test]
fn a_transient_failure_is_tried_again() {
    let trouble: Trouble = Box::new(|_, before| match before {
        0 | 1 => Err(SourceError::Transient("the line is busy".into())),
        _ => Ok(()),
    });
    let (memory, source) = (Memory::new(8), Known::with(8, trouble));
    let (_pager, told) = memory.serve(source.clone(), serve(), patient());
    assert!(memory.page(1) == content(1));
    assert_eq!(source.reads(), [0, 0, 0]);
    assert!(told.try_recv().is_err());
}

#[test]
fn a_failed_prefetch_costs_nothing_until_the_page_is_touched() {
    let trouble: Trouble = Box::new(|chunk, before| match (chunk, before) {
        (1, 0) => Err(SourceError::Permanent("gone for now".into())),
        _ => Ok(()),
    });
    let (memory, source) = (Memory::new(64), Known::with(64, trouble));
    let first = vec![run(0, 12)];
    let (pager, told) = memory.serve(source, Mode::Serve { first }, patient());
    assert!(pager.wait_prefetched(PATIENCE));
    assert_eq!(pager.stats().prefetch_failures, 1);
    assert!(memory.page(5) == content(5));
    assert!(told.try_recv().is_err());
}

#[test]
fn a_prefetch_that_hangs_holds_no_fault_up() {
    let release = Arc::new(AtomicBool::new(false));
    let hold = Arc::clone(&release);
    let trouble: Trouble = Box::new(move |chunk, _| {
        while chunk >= 8 && !hold.load(Ordering::Relaxed) {
            thread::park_timeout(Duration::from_millis(1));
        }
        Ok(())
    });
    let (memory, source) = (Memory::new(64), Known::with(64, trouble));
    let first = vec![run(32, 32)];
    let (pager, _told) = memory.serve(source, Mode::Serve { first }, patient());
    for page in 0..32 {
        assert!(memory.page(page) == content(page));
    }
    assert!(!pager.wait_prefetched(Duration::from_millis(1)));
    release.store(true, Ordering::Relaxed);
    assert!(pager.wait_prefetched(PATIENCE));
}

#[test]
fn lengths_that_do_not_go_together_are_refused() {
    let memory = Memory::new(8);
    let start = |bytes, workers: usize| {
        let config = PagerConfig {
            workers: NonZeroUsize::new(workers).unwrap(),
            ..patient()
        };
        let userfault = Userfault::open().unwrap();
        // SAFETY: as in `Memory::serve`.
        let pager = unsafe {
            Pager::start(
                userfault,
                memory.start,
                bytes,
                Known::new(8),
                serve(),
                config,
                drop,
            )
        };
        pager.map(drop)
    };
    assert!(matches!(
        start(7 * 4096, 1),
        Err(StartError::Lengths { .. })
    ));
    assert!(matches!(start(8 * 4096, 17), Err(StartError::Workers(17))));
}

/// Set in a child process: which scene it plays.
const SCENE: &str = "THAW_PAGER_TEST_SCENE";
const CHILD_TEST: &str = "child_process_of_other_tests";

/// Runs `scene` in a process of its own; returns its exit code (`None`: by a signal) and what it said. It is killed when it
/// hangs, and then this fails.
fn play(scene: &str) -> (Option<i32>, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", CHILD_TEST, "--nocapture"])
        .env(SCENE, scene)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{scene}: the process hangs");
        }
        thread::park_timeout(Duration::from_millis(5));
    };
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.unwrap(), &mut said).unwrap();
    (status.code(), said)
}

/// Threads that touch memory which never comes, and an owner that ends the process when it is told.
fn end_on_failure(trouble: Trouble, config: PagerConfig) {
    let memory = Memory::new(64);
    let (_pager, told) = memory.serve(Known::with(64, trouble), serve(), config);
    for page in 0..8 {
        thread::spawn(move || {
            memory.read(page * 8 * PAGE);
            eprintln!("a thread saw a page that never came");
            std::process::exit(9);
        });
    }
    let failure = told.recv().unwrap();
    let causes = std::iter::successors(
        Some(&failure as &(dyn std::error::Error + 'static)),
        |error| error.source(),
    );
    for cause in causes {
        eprintln!("{cause}");
    }
    std::process::exit(3);
}

#[test]
fn child_process_of_other_tests() {
    let Ok(scene) = std::env::var(SCENE) else {
        return;
    };
    match scene.as_str() {
        "damaged" => end_on_failure(
            Box::new(|_, _| {
                Err(SourceError::Permanent(
                    "chunk does not match its digest".into(),
                ))
            }),
            patient(),
        ),
        "gone" => end_on_failure(
            Box::new(|_, _| Err(SourceError::Transient("no route to the store".into()))),
            patient(),
        ),
        "slow" => end_on_failure(
            Box::new(|_, _| {
                loop {
                    thread::park();
                }
            }),
            PagerConfig {
                fault_limit: Duration::from_millis(200),
                ..patient()
            },
        ),
        // The pager is dropped while threads wait, and others come later.
        "dropped" => {
            let memory = Memory::new(64);
            let trouble: Trouble = Box::new(|_, _| {
                loop {
                    thread::park();
                }
            });
            let (pager, _told) = memory.serve(Known::with(64, trouble), serve(), patient());
            let started = Arc::new(AtomicUsize::new(0));
            let counter = Arc::clone(&started);
            let waiter = thread::spawn(move || {
                counter.store(1, Ordering::Release);
                let byte = memory.read(0);
                eprintln!("a thread saw {byte} where nothing was served");
                std::process::exit(9);
            });
            while pager.stats().faults == 0 {
                thread::yield_now();
            }
            assert_eq!(started.load(Ordering::Acquire), 1);
            drop(pager);
            waiter.join().unwrap();
        }
        other => panic!("no scene {other}"),
    }
}

#[test]
fn a_source_that_fails_is_told_and_the_owner_ends_the_process() {
    let (code, said) = play("damaged");
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("in 1 attempts") && said.contains("does not match its digest"),
        "{said}"
    );
    let (code, said) = play("gone");
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("in 3 attempts") && said.contains("no route to the store"),
        "{said}"
    );
}

#[test]
fn a_source_that_hangs_is_told_within_the_limit_and_the_process_ends() {
    let (code, said) = play("slow");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("was not fetched within 200ms"), "{said}");
}

#[test]
fn memory_that_was_not_served_is_never_seen_as_zeros() {
    let (code, said) = play("dropped");
    assert_eq!(code, None, "a signal ends it: {said}");
    assert!(!said.contains("a thread saw"), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_order_of_touches_and_prefetches_gives_the_sources_bytes(
        pages in 1usize..60, first in prop::collection::vec((0u64..70, 0u64..9), 0..6),
        touches in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..60), workers in 1usize..4, is_recording in any::<bool>()
    ) {
        let memory = Memory::new(pages);
        let config = PagerConfig { workers: NonZeroUsize::new(workers).unwrap(), ..patient() };
        let first = first.into_iter().map(|(start, count)| run(start, count)).collect();
        let mode = if is_recording { Mode::Record } else { Mode::Serve { first } };
        let (pager, told) = memory.serve(Known::new(pages), mode, config);
        let mut expected: Vec<Vec<u8>> = (0..pages).map(content).collect();
        let mut touched = Vec::new();
        for (index, is_write) in touches {
            let page = index.index(pages);
            if !touched.contains(&(page as u64)) { touched.push(page as u64); }
            if is_write {
                memory.write(page * PAGE + 17, 0xa5);
                expected[page][17] = 0xa5;
            } else {
                prop_assert_eq!(memory.read(page * PAGE), expected[page][0]);
            }
        }
        if is_recording {
            let mut recorded: Vec<u64> = Vec::new();
            for touch in pager.touches() {
                if !recorded.contains(&touch.page) { recorded.push(touch.page); }
            }
            prop_assert_eq!(recorded, touched);
        }
        for (page, bytes) in expected.iter().enumerate() {
            prop_assert!(&memory.page(page) == bytes);
        }
        prop_assert!(told.try_recv().is_err());
    }
}
