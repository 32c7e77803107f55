//! Guest memory that the monitor brings in itself, when it is touched: out of a chunk store, or page by page for recording.
//!
//! The pager lives in the process whose memory it serves, in threads of its own: closing a userfaultfd turns all that is still
//! missing into zeros, so that a server in another process could, by dying, change a guest that lives on. Here both end together. A
//! guest's faults are the kernel's own (KVM_RUN), as are the devices' system calls: a userfaultfd for user mode alone would not do.
//!
//! # When memory cannot be served any more
//! Any thread may be the one that waits for the page. So the pager's own thread sees to the end: it tells the control loop, which
//! reports it like any other end of a machine; then the range is taken away, and whoever waits or comes gets an error of the
//! system call, or SIGSEGV, which ends the process after its last word. If the control loop does not hear, it waits for memory
//! itself, as it touches queues and sets clocks: then the thread reports the end in its place, and ends the process.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thaw_snapshot::{Access, MemoryReader, PageRun, Snapshot, Touch, VerifyError};
use thaw_snapshot_pager::{
    Failure, Mode, OpenStoreError, Pager, PagerConfig, SnapshotSource, Source, StartError,
    UserfaultError, stored_memory,
};
use thaw_vmm_control::{Exit, ExitReason, Paging, Prefetch};
use thiserror::Error;
use vm_memory::Bytes as _;

use crate::belongings;
use crate::confine::{self, Role};
use crate::end::{EndSender, MachineEnd};
use crate::fault::{Blame, Fault, chain};
use crate::memory::{GuestMemory, MemoryError, PAGE_BYTES};

/// How long the control loop has to report that memory is lost, before that is done for it.
const TELL_LIMIT: Duration = Duration::from_secs(2);

/// Why the monitor cannot serve a machine's memory.
#[derive(Debug, Error)]
pub enum PagingError {
    /// Not asked for as it must be.
    #[error("memory from a store needs a stub and the store's folder, and no base")]
    Descriptors,
    /// The store.
    #[error("memory of the snapshot could not be found in the store")]
    Store(#[source] OpenStoreError),
    /// The snapshot's files.
    #[error("memory of the snapshot could not be read")]
    Snapshot(#[source] VerifyError),
    /// The working set.
    #[error("working set of the snapshot could not be read")]
    WorkingSet(#[source] VerifyError),
    /// This process may not have one.
    #[error("page faults of the guest cannot be served")]
    Userfault(#[source] UserfaultError),
    /// The range of memory.
    #[error("guest memory could not be emptied")]
    Memory(#[source] MemoryError),
    /// The pager.
    #[error("memory of the guest could not be served")]
    Start(#[source] StartError),
}

impl Blame for PagingError {
    fn fault(&self) -> Fault {
        match self {
            Self::Descriptors | Self::Store(OpenStoreError::Stub(_)) | Self::WorkingSet(_) => {
                Fault::Caller
            }
            _ => Fault::Host,
        }
    }
}

/// Memory that cannot be served any more: the machine's end.
#[derive(Debug)]
pub struct Lost {
    /// Why.
    pub failure: Failure,
    /// Dropped when the end was reported: memory is taken away then.
    pub told: Told,
}

/// Kept until an end was reported.
#[derive(Debug)]
pub struct Told(#[expect(dead_code, reason = "dropping it is the message")] Sender<()>);

/// A machine's memory, served by this process. It is until the process ends: dropping this changes nothing.
#[derive(Debug)]
pub struct Served {
    slot: Arc<Mutex<Slot>>,
    is_recorded: bool,
}

/// The pager, which its own failure takes away.
#[derive(Debug)]
enum Slot {
    Starting,
    Serving(Pager),
    Lost,
}

/// What serves memory, and in what way.
struct Plan {
    source: Arc<dyn Source>,
    mode: Mode,
}

fn plan(
    snapshot: &Snapshot,
    paging: Paging,
    store: Option<File>,
    prefetch: Prefetch,
) -> Result<Option<Plan>, PagingError> {
    let source: Arc<dyn Source> = match paging {
        Paging::Mapped => return Ok(None),
        Paging::Store => {
            let folder = store.ok_or(PagingError::Descriptors)?;
            let memory = stored_memory(snapshot, folder.into()).map_err(PagingError::Store)?;
            Arc::new(memory)
        }
        Paging::Recorded => {
            let source = SnapshotSource::new(snapshot).map_err(PagingError::Snapshot)?;
            let (source, mode) = (Arc::new(source), Mode::Record);
            return Ok(Some(Plan { source, mode }));
        }
    };
    let first = match prefetch {
        Prefetch::Off => None,
        Prefetch::WorkingSet => snapshot.working_set().map_err(PagingError::WorkingSet)?,
    };
    let runs = first.iter().flat_map(|set| set.runs());
    let first: Vec<PageRun> = runs.map(|run| run.pages).collect();
    let mode = Mode::Serve { first };
    Ok(Some(Plan { source, mode }))
}

/// Begins to serve `memory`, of which nothing is known yet, as `paging` says; `None` if it is to be mapped. `ends` hears of it when
/// that is not possible any more; `last_word` reports it if nobody takes it there in time, and the process ends.
///
/// # Errors
/// See [`PagingError`].
pub fn serve(
    memory: &GuestMemory,
    snapshot: &Snapshot,
    (paging, store): (Paging, Option<File>),
    prefetch: Prefetch,
    (ends, last_word): (EndSender, impl FnOnce(Exit) + Send + 'static),
) -> Result<Option<Served>, PagingError> {
    let Some(Plan { source, mode }) = plan(snapshot, paging, store, prefetch)? else {
        return Ok(None);
    };
    let userfault = belongings::userfault().map_err(PagingError::Userfault)?;
    // A page that a rehearsal left would be taken for the snapshot's.
    memory.empty().map_err(PagingError::Memory)?;
    let is_recorded = mode == Mode::Record;
    let slot = Arc::new(Mutex::new(Slot::Starting));
    let lost = Arc::clone(&slot);
    let on_failure = move |failure| end_with(&lost, failure, &ends, last_word);
    let start = NonNull::new(memory.host_pointer()).expect("a mapping is nowhere near null");
    let config = PagerConfig {
        on_thread: || confine::thread(Role::Fetching),
        ..PagerConfig::default()
    };
    // SAFETY: guest memory is one private anonymous mapping, just emptied, which is never unmapped (the invariant of
    // `GuestMemory`) and, as a machine is restored once, never mapped over again. Once the pager is dropped, which its failure
    // alone does, the machine has ended: what still touches memory may get SIGSEGV.
    let pager = unsafe {
        Pager::start(
            userfault,
            start,
            memory.bytes(),
            source,
            mode,
            config,
            on_failure,
        )
    }
    .map_err(PagingError::Start)?;
    let mut place = slot.lock().unwrap_or_else(PoisonError::into_inner);
    match *place {
        // It has failed already, and `pager` is dropped here.
        Slot::Lost => {}
        _ => *place = Slot::Serving(pager),
    }
    drop(place);
    Ok(Some(Served { slot, is_recorded }))
}

/// On a thread of the pager: the machine's end, whoever waits for memory now.
fn end_with(slot: &Mutex<Slot>, failure: Failure, ends: &EndSender, last_word: impl FnOnce(Exit)) {
    let (told, reported) = mpsc::channel();
    let detail = chain(&failure);
    ends.send(MachineEnd::Memory(Lost {
        failure,
        told: Told(told),
    }));
    // Dropped when it was reported.
    if reported.recv_timeout(TELL_LIMIT) == Err(RecvTimeoutError::Disconnected) {
        // Dropping the pager takes the memory away.
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Slot::Lost;
        return;
    }
    tracing::error!(error = detail, "memory of the guest is lost");
    last_word(Exit {
        reason: ExitReason::HostFault,
        detail,
        // The console's owner may be the one that waits.
        console: String::new(),
    });
    std::process::exit(1);
}

/// Makes reads of those touches that changed nothing: where KVM fetches a page beside the vCPU that waits for it, it asks for it as
/// if to write (`async_pf_execute`, virt/kvm/async_pf.c), whatever the guest does.
///
/// # Errors
/// The snapshot cannot be read, or a touch lies outside of memory.
pub fn tell_writes(
    touches: &mut [Touch],
    memory: &GuestMemory,
    original: &MemoryReader,
) -> io::Result<()> {
    let (mut old, mut new) = ([0; 4096], [0; 4096]);
    let writes = touches.iter_mut();
    for touch in writes.filter(|touch| touch.access == Access::Write) {
        let offset = touch.page * PAGE_BYTES;
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let (address, _) = memory.address_of(offset).ok_or_else(outside)?;
        original.read_at(offset, &mut old)?;
        let view = memory.view();
        (view.read_slice(&mut new, address)).map_err(io::Error::other)?;
        if old == new {
            touch.access = Access::Read;
        }
    }
    Ok(())
}

impl Served {
    /// What was touched so far, in its order, if that is recorded.
    ///
    /// # Errors
    /// It is not.
    pub fn touches(&self) -> io::Result<Vec<Touch>> {
        if !self.is_recorded {
            let why = "memory out of a store comes in chunks: which of their pages were touched is not known";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        match &*self.slot.lock().unwrap_or_else(PoisonError::into_inner) {
            Slot::Serving(pager) => Ok(pager.touches()),
            Slot::Starting | Slot::Lost => Ok(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::end::{self, EndReceiver};
    use std::fs;
    use std::path::Path;
    use std::process::Command;
    use std::thread;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use thaw_snapshot::{
        CpuRecord, Metadata, PageSource, SectionKind, TouchedRun, WorkingSet, Writer,
    };
    use thaw_snapshot_store::{LocalFolder, Store};
    use vm_memory::GuestAddress;

    const MEMORY: u64 = 64 << 20;
    const PAGE: u64 = 4096;
    const CHUNK_PAGES: u64 = 16;
    /// Set in a process of our own that is to die.
    const CHILD: &str = "THAW_TEST_MEMORY_IS_LOST";

    /// Page n starts with n; every fifth one, and all from the hundredth, are zero.
    struct Numbered;

    fn number(page: u64) -> u64 {
        if page.is_multiple_of(5) || page >= 100 {
            0
        } else {
            page
        }
    }

    impl PageSource for Numbered {
        fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            buffer.fill(0);
            for (page, part) in (offset / PAGE..).zip(buffer.chunks_mut(4096)) {
                part[..8].copy_from_slice(&number(page).to_le_bytes());
            }
            Ok(())
        }

        fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
            Ok((offset < 100 * PAGE).then_some(offset))
        }
    }

    struct Stored {
        folder: tempfile::TempDir,
        whole: Snapshot,
        stub: Snapshot,
    }

    impl Stored {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = tempfile::tempfile().unwrap();
            let mut writer = Writer::new(file.try_clone().unwrap());
            writer.metadata(&Metadata::default()).unwrap();
            writer.cpu(&CpuRecord::default()).unwrap();
            let memory = SectionKind::Memory;
            (writer.sparse_section(memory, MEMORY, &mut Numbered)).unwrap();
            let run = TouchedRun {
                pages: PageRun {
                    start: 33,
                    count: 2,
                },
                access: Access::Read,
            };
            let set = WorkingSet::new(vec![run], MEMORY).unwrap();
            writer.working_set(&set).unwrap();
            writer.finish().unwrap();
            let whole = Snapshot::from_file(file, "whole").unwrap();
            let stub = tempfile::tempfile().unwrap();
            let store = Store::new(Arc::new(LocalFolder::new(folder.path())));
            store.push(&whole, stub.try_clone().unwrap()).unwrap();
            Self {
                stub: Snapshot::from_file(stub, "stub").unwrap(),
                folder,
                whole,
            }
        }

        fn folder(&self) -> Option<File> {
            Some(File::open(self.folder.path()).unwrap())
        }

        fn damage(&self) {
            fn each(folder: &Path) {
                for entry in fs::read_dir(folder).unwrap() {
                    let path = entry.unwrap().path();
                    match path.is_dir() {
                        true => each(&path),
                        false => fs::write(path, b"\0not what was stored").unwrap(),
                    }
                }
            }
            each(&self.folder.path().join("chunks"));
        }
    }

    fn say(exit: Exit) {
        eprintln!("last word: {}", exit.detail);
    }

    fn page(memory: &GuestMemory, page: u64) -> u64 {
        memory.view().read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    fn serve_store(stored: &Stored, memory: &GuestMemory) -> (Served, EndReceiver) {
        let (sender, ends) = end::channel().unwrap();
        let how = (Paging::Store, stored.folder());
        let served = serve(
            memory,
            &stored.stub,
            how,
            Prefetch::WorkingSet,
            (sender, say),
        );
        (served.unwrap().unwrap(), ends)
    }

    #[test]
    fn memory_out_of_a_store_is_the_snapshots_and_comes_anew_when_it_was_given_back() {
        let stored = Stored::new();
        let memory = GuestMemory::reserve(MEMORY).unwrap();
        // What a rehearsal may leave.
        (memory.view().write_obj(9u64, GuestAddress(7 * PAGE))).unwrap();
        let (served, ends) = serve_store(&stored, &memory);
        let pages = [7, 5, 99, 100, 33, MEMORY / PAGE - 1];
        assert_eq!(pages.map(|at| page(&memory, at)), pages.map(number));
        for at in [7, 8, 9] {
            (memory.view().write_obj(1u64, GuestAddress(at * PAGE))).unwrap();
        }
        memory.give_back(7..9).unwrap();
        assert_eq!([7, 8, 9].map(|at| page(&memory, at)), [7, 8, 1]);
        assert!(served.touches().is_err());
        assert!(ends.take().is_none());
    }

    #[test]
    fn a_working_set_comes_before_it_is_touched() {
        let stored = Stored::new();
        let memory = GuestMemory::reserve(MEMORY).unwrap();
        let (served, _ends) = serve_store(&stored, &memory);
        let slot = served.slot.lock().unwrap();
        let Slot::Serving(pager) = &*slot else {
            panic!("not serving")
        };
        assert!(pager.wait_prefetched(Duration::from_secs(60)));
        let stats = pager.stats();
        assert_eq!(stats.prefetched_bytes, CHUNK_PAGES * PAGE);
        assert_eq!((page(&memory, 33), page(&memory, 34)), (33, 34));
        assert_eq!(pager.stats().faults, 0);
    }

    #[test]
    fn recorded_touches_come_in_their_order_and_memory_is_the_snapshots() {
        let stored = Stored::new();
        let memory = GuestMemory::reserve(MEMORY).unwrap();
        let (sender, _ends) = end::channel().unwrap();
        let how = (Paging::Recorded, None);
        let served = serve(&memory, &stored.whole, how, Prefetch::Off, (sender, say));
        let served = served.unwrap().unwrap();
        assert_eq!([71, 3, 4].map(|at| page(&memory, at)), [71, 3, 4]);
        (memory.view().write_obj(1u64, GuestAddress(2000 * PAGE))).unwrap();
        (memory.view().write_obj(1u64, GuestAddress(3 * PAGE))).unwrap();
        // Written, but with what was there: as good as read.
        (memory.view().write_obj(6u64, GuestAddress(6 * PAGE))).unwrap();
        let mut touches = served.touches().unwrap();
        let original = stored.whole.memory_reader().unwrap();
        tell_writes(&mut touches, &memory, &original).unwrap();
        let set = crate::prefetch::in_order(&touches, MEMORY);
        let runs: Vec<_> = (set.runs.iter())
            .map(|run| (run.start, run.count, run.written))
            .collect();
        let expected = [
            (71, 1, false),
            (3, 1, true),
            (4, 1, false),
            (2000, 1, true),
            (6, 1, false),
        ];
        assert_eq!(runs, expected);
    }

    #[test]
    fn what_cannot_be_served_is_refused_before_memory_is_touched() {
        let stored = Stored::new();
        let memory = GuestMemory::reserve(MEMORY).unwrap();
        let refused = |snapshot: &Snapshot, store: Option<File>| {
            let (sender, _ends) = end::channel().unwrap();
            let how = (Paging::Store, store);
            serve(&memory, snapshot, how, Prefetch::Off, (sender, say)).unwrap_err()
        };
        assert!(matches!(
            refused(&stored.stub, None),
            PagingError::Descriptors
        ));
        let error = refused(&stored.whole, stored.folder());
        assert_eq!(error.fault(), Fault::Caller);
        assert!(chain(&error).contains("thaw snapshot push"), "{error}");
        let other = tempfile::tempdir().unwrap();
        let error = refused(&stored.stub, Some(File::open(other.path()).unwrap()));
        assert!(chain(&error).contains("is not in the store"), "{error}");
    }

    /// What writing a page of guest memory into a file comes to: a touch by the kernel, as devices' and guests' are.
    fn touch_by_kernel(address: u64) -> Result<(), i32> {
        let file = tempfile::tempfile().unwrap();
        let from = std::ptr::with_exposed_provenance(usize::try_from(address).unwrap());
        // SAFETY: the kernel checks the address; a bad one is an error.
        let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&file), from, 4096) };
        match written {
            4096 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap()),
        }
    }

    fn wait_for_end(ends: &EndReceiver) -> MachineEnd {
        let mut fds = [PollFd::new(&ends.wake, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no end");
        ends.take().unwrap()
    }

    #[test]
    fn lost_memory_ends_the_machine_by_name_and_whoever_waits_gets_an_error() {
        let stored = Stored::new();
        let memory = GuestMemory::reserve(MEMORY).unwrap();
        memory.host_pointer().expose_provenance();
        let (_served, ends) = serve_store(&stored, &memory);
        stored.damage();
        let address = memory.host_address() + 70 * PAGE;
        let waits = thread::spawn(move || touch_by_kernel(address));
        let end = wait_for_end(&ends);
        let exit = end.exit(b"");
        assert_eq!(exit.reason, ExitReason::HostFault);
        let chunk = format!("{:#x}", 70 / CHUNK_PAGES * CHUNK_PAGES * PAGE);
        for part in [&chunk, "is damaged", "chunk"] {
            assert!(exit.detail.contains(part), "{}", exit.detail);
        }
        assert!(!waits.is_finished(), "it was not taken away yet");
        drop(end.into_told());
        assert_eq!(waits.join().unwrap(), Err(libc::EFAULT));
        assert_eq!(touch_by_kernel(address), Err(libc::EFAULT));
    }

    /// Memory is lost in this very process, and nobody reports it.
    fn lose(who_waits: &str) {
        tracing_subscriber::fmt().with_writer(io::stderr).init();
        let stored = Stored::new();
        let memory = GuestMemory::reserve(MEMORY).unwrap();
        memory.host_pointer().expose_provenance();
        let (_served, _ends) = serve_store(&stored, &memory);
        stored.damage();
        let address = memory.host_address() + 70 * PAGE;
        match who_waits {
            "this process" => {
                page(&memory, 70);
            }
            _ => {
                let _ = touch_by_kernel(address);
                loop {
                    thread::park();
                }
            }
        }
    }

    #[test]
    fn a_process_whose_lost_memory_nobody_reports_ends() {
        let name = "a_process_whose_lost_memory_nobody_reports_ends";
        if let Ok(who_waits) = std::env::var(CHILD) {
            lose(&who_waits);
            unreachable!("lost memory was read");
        }
        for who_waits in ["this process", "the kernel"] {
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &format!("paging::tests::{name}"), "--nocapture"])
                .env(CHILD, who_waits)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&child.stderr);
            assert_eq!(child.status.code(), Some(1), "{said}");
            assert!(said.contains("last word: memory at 0x40000"), "{said}");
        }
    }
}
