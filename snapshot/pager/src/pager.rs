//! The threads that serve a range of memory.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use thaw_snapshot::{Access, PageRun, Touch};
use thiserror::Error;

use crate::fetch::{FetchError, Fetcher, install};
use crate::schedule::{Job, Reason, Schedule};
use crate::source::{Source, SourceError};
use crate::userfault::{Fault, FaultKind, PAGE_BYTES, Protection, Region, Userfault};

/// Most threads that fetch.
pub const WORKERS_MAX: usize = 16;
/// Most touches that are recorded: 4 GiB of pages touched once.
const TOUCHES_MAX: usize = 1 << 20;

/// How to serve.
#[derive(Clone, Copy, Debug)]
pub struct PagerConfig {
    /// Threads that fetch, at most [`WORKERS_MAX`].
    pub workers: NonZeroUsize,
    /// Longest that a touch waits before the source is given up.
    pub fault_limit: Duration,
    /// How often a chunk is tried when the failure is transient; 0 is taken as 1.
    pub attempts: u32,
    /// Between two tries; multiplied by the number of tries so far.
    pub pause: Duration,
    /// What each thread does first: giving up rights that it does not need, for instance.
    pub on_thread: fn(),
}

impl Default for PagerConfig {
    fn default() -> Self {
        Self {
            workers: const { NonZeroUsize::new(4).expect("not zero") },
            fault_limit: Duration::from_secs(10),
            attempts: 3,
            pause: Duration::from_millis(20),
            on_thread: || {},
        }
    }
}

/// What for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Bring in these pages first, in this order, and all others when they are touched; whole chunks at a time.
    Serve {
        /// A working set, for instance.
        first: Vec<PageRun>,
    },
    /// Bring in single pages when they are touched, and record the order and the first write of each.
    Record,
}

/// Why a pager could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// Lengths that do not go together.
    #[error(
        "memory of {memory} bytes cannot be served from a source of {source_bytes} bytes in chunks of {chunk}: whole pages and equal lengths are needed"
    )]
    Lengths {
        /// Of the memory.
        memory: u64,
        /// Of the source.
        source_bytes: u64,
        /// Of a chunk.
        chunk: usize,
    },
    /// More threads than are allowed.
    #[error("{0} workers are more than {WORKERS_MAX}")]
    Workers(usize),
    /// The kernel refused the memory.
    #[error("memory could not be registered with userfaultfd")]
    Register(#[source] io::Error),
    /// No descriptor or thread left.
    #[error("pager's threads could not be started")]
    Threads(#[source] io::Error),
}

/// Why memory cannot be served any more.
#[derive(Debug, Error)]
pub enum Failure {
    /// The source gave up.
    #[error("memory at {offset:#x} could not be fetched in {attempts} attempts")]
    Source {
        /// In memory, bytes.
        offset: u64,
        /// How often it was tried.
        attempts: u32,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// The source did not answer.
    #[error("memory at {offset:#x} was not fetched within {limit:?}")]
    Slow {
        /// In memory, bytes.
        offset: u64,
        /// The limit.
        limit: Duration,
    },
    /// The kernel did not take it.
    #[error("memory at {offset:#x} was fetched but could not be put in place")]
    Install {
        /// In memory, bytes.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Faults cannot be heard of.
    #[error("page faults could not be read")]
    Events(#[source] io::Error),
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Touches of pages that were not there.
    pub faults: u64,
    /// Bytes brought in because somebody waited.
    pub fault_bytes: u64,
    /// Bytes brought in ahead.
    pub prefetched_bytes: u64,
    /// Of both, bytes of units that were zero as a whole.
    pub zero_bytes: u64,
    /// Prefetches that failed; a touch tries again.
    pub prefetch_failures: u64,
}

type OnFailure = Box<dyn FnOnce(Failure) + Send>;

/// Serves a range of memory until it is dropped; then the range is gone: whoever touches it gets SIGSEGV or EFAULT, never zeros.
/// So end the VM first. Dropping does not wait for a source that hangs.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
}

struct Shared {
    region: Region,
    fetcher: Fetcher,
    config: PagerConfig,
    is_recording: bool,
    unit_bytes: u64,
    /// Wakes the thread that reads faults.
    stop: OwnedFd,
    state: Mutex<State>,
    /// There is something to fetch, or the end has come.
    work: Condvar,
    /// The last prefetch has ended.
    prefetched: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}

struct State {
    schedule: Schedule,
    has_ended: bool,
    on_failure: Option<OnFailure>,
    touches: Vec<Touch>,
    /// While recording: how a unit that is on its way was touched first.
    awaited: HashMap<usize, Access>,
    stats: Stats,
}

impl Pager {
    /// Begins to serve `bytes` bytes at `memory` from `source`. `on_failure` is called at most once, on one of the pager's threads, when
    /// memory cannot be served any more; threads that wait for it go on waiting until the process ends or the pager is dropped,
    /// so the callback has to bring about one of the two.
    ///
    /// # Errors
    /// See [`StartError`]. Once registration was tried, the range must not be used any more.
    ///
    /// # Safety
    /// `memory..memory + bytes` is a private anonymous mapping, page aligned, that nobody else unmaps or replaces until the pager is
    /// dropped; nobody relies on its being readable after that. It may be given back in parts (`MADV_DONTNEED`): such
    /// pages are served again.
    pub unsafe fn start(
        userfault: Userfault,
        memory: NonNull<u8>,
        bytes: u64,
        source: Arc<dyn Source>,
        mode: Mode,
        config: PagerConfig,
        on_failure: impl FnOnce(Failure) + Send + 'static,
    ) -> Result<Self, StartError> {
        let (source_bytes, chunk) = (source.bytes(), source.chunk_bytes());
        let page = PAGE_BYTES as u64;
        if bytes != source_bytes
            || !bytes.is_multiple_of(page)
            || chunk == 0
            || !chunk.is_multiple_of(PAGE_BYTES)
        {
            return Err(StartError::Lengths {
                memory: bytes,
                source_bytes,
                chunk,
            });
        }
        let workers = config.workers.get();
        if workers > WORKERS_MAX {
            return Err(StartError::Workers(workers));
        }
        let is_recording = mode == Mode::Record;
        let unit = if is_recording { PAGE_BYTES } else { chunk };
        let units = usize::try_from(bytes.div_ceil(unit as u64)).expect("it is mapped");
        let first = match mode {
            Mode::Serve { first } => units_of(&first, unit as u64, units),
            Mode::Record => Vec::new(),
        };
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| StartError::Threads(error.into()))?;
        // SAFETY: the caller's promise is that of the type.
        let region = unsafe { Region::register(userfault, memory.as_ptr(), bytes) }
            .map_err(StartError::Register)?;
        let state = State {
            schedule: Schedule::new(units, first, workers),
            has_ended: false,
            on_failure: Some(Box::new(on_failure)),
            touches: Vec::new(),
            awaited: HashMap::new(),
            stats: Stats::default(),
        };
        let pager = Self {
            shared: Arc::new(Shared {
                region,
                fetcher: Fetcher::new(source, unit, config.attempts, config.pause),
                config,
                is_recording,
                unit_bytes: unit as u64,
                stop,
                state: Mutex::new(state),
                work: Condvar::new(),
                prefetched: Condvar::new(),
            }),
        };
        pager.spawn("pager-faults".into(), Shared::read_faults)?;
        for worker in 0..workers {
            pager.spawn(format!("pager-{worker}"), Shared::work)?;
        }
        Ok(pager)
    }

    fn spawn(&self, name: String, run: fn(&Shared)) -> Result<(), StartError> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name(name);
        let thread = thread.spawn(move || {
            (shared.config.on_thread)();
            run(&shared);
        });
        thread.map(drop).map_err(StartError::Threads)
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        self.shared.lock().stats
    }

    /// Touches so far, in their order, if [`Mode::Record`] was asked for. A page that was read first and written later appears twice,
    /// on kernels that can tell (userfaultfd write protection, 5.7). See [`thaw_snapshot::WorkingSet::from_touches`].
    pub fn touches(&self) -> Vec<Touch> {
        self.shared.lock().touches.clone()
    }

    /// Waits until what was to come first is there, or has failed. Returns whether that was within `limit`.
    pub fn wait_prefetched(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.shared.lock();
        while !state.schedule.is_prefetched() && !state.has_ended {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            let waited = self.shared.prefetched.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.schedule.is_prefetched()
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.has_ended = true;
        state.on_failure = None;
        drop(state);
        self.shared.wake_all();
        self.shared.region.revoke();
    }
}

/// Units that hold `runs`, each once, in their order.
fn units_of(runs: &[PageRun], unit_bytes: u64, units: usize) -> Vec<usize> {
    let mut is_named = vec![false; units];
    let mut named = Vec::new();
    for run in runs {
        let bytes = run.start.saturating_mul(PAGE_BYTES as u64)
            ..run
                .start
                .saturating_add(run.count)
                .saturating_mul(PAGE_BYTES as u64);
        for unit in bytes.start / unit_bytes..bytes.end.div_ceil(unit_bytes) {
            let Some(unit) = usize::try_from(unit).ok().filter(|unit| *unit < units) else {
                break;
            };
            if !std::mem::replace(&mut is_named[unit], true) {
                named.push(unit);
            }
        }
    }
    named
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No step of a critical section panics but by an invariant; the deadline of a fault ends what hangs then.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_all(&self) {
        self.work.notify_all();
        self.prefetched.notify_all();
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes()); // it is full only if it was written before
    }

    /// Memory cannot be served any more: tells the owner, once.
    fn fail(&self, failure: Failure) {
        let mut state = self.lock();
        state.has_ended = true;
        let on_failure = state.on_failure.take();
        drop(state);
        self.wake_all();
        if let Some(on_failure) = on_failure {
            on_failure(failure);
        }
    }

    /// Reads faults and watches how long they wait.
    fn read_faults(&self) {
        loop {
            let state = self.lock();
            if state.has_ended {
                return;
            }
            let oldest = state.schedule.longest_waited_for();
            drop(state);
            let limit = self.config.fault_limit;
            let left = oldest.map(|(_, since)| limit.saturating_sub(since.elapsed()));
            if let (Some((unit, _)), Some(Duration::ZERO)) = (oldest, left) {
                let offset = self.fetcher.range(unit).start;
                return self.fail(Failure::Slow { offset, limit });
            }
            // A little late rather than in a loop until the last millisecond has passed.
            let left = left.map(|left| left + Duration::from_millis(1));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [
                PollFd::from_borrowed_fd(self.region.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return self.fail(Failure::Events(error.into())),
            }
            match self.region.faults() {
                Ok(faults) => {
                    for fault in faults {
                        self.take(fault);
                    }
                }
                Err(error) => return self.fail(Failure::Events(error)),
            }
        }
    }

    fn take(&self, fault: Fault) {
        let access = match fault.kind {
            FaultKind::MissingRead => Access::Read,
            FaultKind::MissingWrite | FaultKind::Protected => Access::Write,
        };
        let unit = usize::try_from(fault.offset / self.unit_bytes).expect("it is mapped");
        let mut state = self.lock();
        if self.is_recording && state.touches.len() < TOUCHES_MAX {
            let page = fault.offset / PAGE_BYTES as u64;
            state.touches.push(Touch { page, access });
        }
        if fault.kind == FaultKind::Protected {
            drop(state);
            if let Err(source) = self.region.unwatch(fault.offset) {
                let offset = fault.offset;
                self.fail(Failure::Install { offset, source });
            }
            return;
        }
        state.stats.faults += 1;
        // Heard of only after another's touch had brought the page in: who waited was woken then.
        if state.schedule.is_present(unit) && self.region.is_resident(fault.offset) {
            return;
        }
        if self.is_recording {
            state.awaited.entry(unit).or_insert(access);
        }
        state.schedule.fault(unit, Instant::now());
        drop(state);
        self.work.notify_one();
    }

    fn work(&self) {
        let mut state = self.lock();
        while !state.has_ended {
            let Some(job) = state.schedule.next() else {
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let protection = match state.awaited.remove(&job.unit) {
                Some(Access::Read) => Protection::Watched,
                _ => Protection::Writable,
            };
            drop(state);
            let result = self.serve(job, protection);
            state = self.lock();
            match result {
                Ok(is_zero) => self.count(&mut state, job, is_zero),
                Err(_) if job.reason == Reason::Prefetch => {
                    state.stats.prefetch_failures += 1;
                    state.schedule.done(job, false);
                }
                Err(failure) => {
                    drop(state);
                    return self.fail(failure);
                }
            }
            // It may have made room for a prefetch, or become a fault.
            self.work.notify_one();
            if state.schedule.is_prefetched() {
                self.prefetched.notify_all();
            }
        }
    }

    fn count(&self, state: &mut State, job: Job, is_zero: bool) {
        let range = self.fetcher.range(job.unit);
        let bytes = range.end - range.start;
        match job.reason {
            Reason::Fault => state.stats.fault_bytes += bytes,
            Reason::Prefetch => state.stats.prefetched_bytes += bytes,
        }
        if is_zero {
            state.stats.zero_bytes += bytes;
        }
        state.awaited.remove(&job.unit);
        if state.schedule.done(job, true) {
            // Somebody may wait for a page that was there and was given back meanwhile: it looks again.
            let _ = self.region.wake(range.start, bytes);
        }
    }

    /// Brings a unit in. Returns whether it is zero.
    fn serve(&self, job: Job, protection: Protection) -> Result<bool, Failure> {
        let range = self.fetcher.range(job.unit);
        let offset = range.start;
        let content = self.fetcher.fetch(job.unit);
        let content = content.map_err(|FetchError { attempts, source }| Failure::Source {
            offset,
            attempts,
            source,
        })?;
        install(&self.region, range, content.as_deref(), protection)
            .map_err(|source| Failure::Install { offset, source })?;
        Ok(content.is_none())
    }
}
