//! Guests whose memory comes out of a store as they touch it, and stores that are slow, damaged or hang.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::{NamedTempFile, TempDir};
use thaw_snapshot::{Touch, TouchedRun, WorkingSet, set_working_set};
use thaw_snapshot_store::{LocalFolder, Store};
use thaw_vmm_control::{
    Exit, ExitReason, Fault, Paging, Prefetch, Reply, Request, RestoreRequest, WorkingSetRun,
};

use crate::difference::{differing, is_wall_clock, open};
use crate::monitor::Monitor;
use crate::rewind::{Frozen, frozen, rewind};

/// How much longer than before a chunk takes from a slow store.
const SLOWNESS: Duration = Duration::from_millis(50);

/// The frozen guest of one vCPU in a store.
struct Stored {
    folder: TempDir,
    stub: File,
}

fn push(snapshot: &File) -> Stored {
    // In the host's own memory, where named pipes work, whatever the tests' folder is.
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    let stub = tempfile::tempfile().unwrap();
    let store = Store::new(Arc::new(LocalFolder::new(folder.path())));
    let began = Instant::now();
    let pushed = store.push(&open(snapshot), stub.try_clone().unwrap());
    println!("pushed in {:?}: {:?}", began.elapsed(), pushed.unwrap());
    Stored { folder, stub }
}

fn whole() -> &'static Stored {
    static STORED: OnceLock<Stored> = OnceLock::new();
    STORED.get_or_init(|| push(&frozen(1).snapshot))
}

impl Stored {
    /// The same in a folder of its own, which may be spoilt.
    fn copy(&self) -> Self {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        for path in files(self.folder.path()) {
            let to = folder
                .path()
                .join(path.strip_prefix(self.folder.path()).unwrap());
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(path, to).unwrap();
        }
        let stub = self.stub.try_clone().unwrap();
        Self { folder, stub }
    }

    fn chunks(&self) -> Vec<PathBuf> {
        files(&self.folder.path().join("chunks"))
    }

    /// Restored and paused.
    fn restore(&self, Frozen { disks, shared, .. }: &Frozen, prefetch: Prefetch) -> Monitor {
        let mut monitor = Monitor::start();
        let request = Request::Restore(RestoreRequest {
            disks: disks.clone(),
            paging: Paging::Store,
            prefetch,
            ..Default::default()
        });
        let folder = File::open(self.folder.path()).unwrap();
        monitor.done(&request, &[&self.stub, &folder, shared]);
        monitor
    }
}

/// All files below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

fn memory_is(frozen: &Frozen, monitor: &mut Monitor) {
    let mut runs = differing(&open(&frozen.snapshot), &open(&monitor.save()));
    runs.retain(|run| !is_wall_clock(&frozen.snapshot, run));
    assert_eq!(runs, [], "memory");
}

fn answers(monitor: &mut Monitor) {
    monitor.done(&Request::Resume, &[]);
    assert_eq!(monitor.command("sum"), "0", "memory differs");
    assert_eq!(monitor.command("count 1"), "2");
    assert_eq!(monitor.command("get before"), "frozen");
    assert_eq!(monitor.command("read /dev/vda 8192 4"), "rrrr");
    assert_eq!(monitor.command("put during life"), "put");
}

#[test]
fn a_guest_lazily_served_from_a_store_is_the_frozen_one() {
    let frozen = frozen(1);
    let mut monitor = whole().restore(frozen, Prefetch::Off);
    let began = Instant::now();
    answers(&mut monitor);
    println!("five answers in {:?}", began.elapsed());
    // Rewound it is pristine: what it wrote comes anew out of the store.
    println!("{:?}", rewind(&mut monitor));
    memory_is(frozen, &mut monitor);
    answers(&mut monitor);
    monitor.quit();
    // Never run, all of it is as it was mapped.
    let mut unused = whole().restore(frozen, Prefetch::Off);
    memory_is(frozen, &mut unused);
    unused.quit();
}

/// Whether every process has the right to userfaultfd for faults of the kernel, as in a lab.
const EVERYBODYS: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// A setting of the host's kernel that is put back.
struct Sysctl {
    path: &'static str,
    before: String,
}

impl Sysctl {
    fn set(path: &'static str, value: &str) -> Self {
        let before = fs::read_to_string(path).unwrap();
        if before.trim() != value {
            fs::write(path, value).unwrap();
        }
        Self { path, before }
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        fs::write(self.path, &self.before).unwrap();
    }
}

#[test]
fn a_guest_lazily_served_without_the_right_to_userfaultfd_is_refused_and_told_what_helps() {
    let _nobodys = Sysctl::set(EVERYBODYS, "0");
    let (frozen, stored) = (frozen(1), whole());
    let request = |paging| {
        Request::Restore(RestoreRequest {
            disks: frozen.disks.clone(),
            paging,
            ..Default::default()
        })
    };
    let place = tempfile::tempdir_in("/tmp").unwrap();
    let mut monitor = Monitor::start_without_privileges(place.path());
    let folder = File::open(stored.folder.path()).unwrap();
    let files = [&stored.stub, &folder, &frozen.shared];
    let Reply::Failed(failure) = monitor.ask(&request(Paging::Store), &files) else {
        panic!("restored");
    };
    assert_eq!(failure.fault, Fault::Host);
    for part in [
        "userfaultfd for faults of the kernel is not permitted",
        "run as root",
        EVERYBODYS,
        "/dev/userfaultfd",
    ] {
        assert!(failure.message.contains(part), "{}", failure.message);
    }
    monitor.quit();
    // It is this right alone that such a monitor lacks.
    let mut mapped = Monitor::start_without_privileges(place.path());
    mapped.done(
        &request(Paging::Mapped),
        &[&frozen.snapshot, &frozen.shared],
    );
    answers(&mut mapped);
    mapped.quit();
}

/// Runs a guest whose memory does not come, to its end.
fn end_of(mut monitor: Monitor) -> Exit {
    let began = Instant::now();
    // The monitor itself may be the one that waits for memory: then it ends without an answer.
    monitor.send(&Request::Resume, &[]);
    let exit = monitor.exit_in_any_case();
    println!("ended after {:?}: {}", began.elapsed(), exit.detail);
    assert_eq!(exit.reason, ExitReason::HostFault);
    monitor.leave();
    exit
}

#[test]
fn a_guest_lazily_served_ends_with_the_chunk_that_failed() {
    let stored = whole().copy();
    let monitor = stored.restore(frozen(1), Prefetch::Off);
    for chunk in stored.chunks() {
        fs::write(chunk, b"\0not what was stored").unwrap();
    }
    let exit = end_of(monitor);
    for part in ["memory at 0x", "is damaged", "chunk"] {
        assert!(exit.detail.contains(part), "{}", exit.detail);
    }

    let stored = whole().copy();
    let monitor = stored.restore(frozen(1), Prefetch::Off);
    let chunks = stored.chunks();
    chunks
        .iter()
        .for_each(|chunk| fs::remove_file(chunk).unwrap());
    let exit = end_of(monitor);
    let named = chunks.iter().any(|chunk| {
        let name = chunk.file_name().unwrap().to_str().unwrap();
        exit.detail.contains(name)
    });
    assert!(named, "{}", exit.detail);
}

/// Puts a pipe in each chunk's place; what was there comes back with its path.
fn with_pipes(stored: &Stored) -> Vec<(PathBuf, Vec<u8>)> {
    let pipe = |path: PathBuf| {
        let content = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        (path, content)
    };
    stored.chunks().into_iter().map(pipe).collect()
}

/// Feeds whoever opens a pipe, after a while, until told to stop; returns how many were fed.
fn feed(pipes: Vec<(PathBuf, Vec<u8>)>, stop: &AtomicBool) -> usize {
    let mut fed = 0;
    while !stop.load(Ordering::Relaxed) {
        for (path, content) in &pipes {
            // Fails as long as nobody reads.
            let mut options = OpenOptions::new();
            let opened = options
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path);
            let Ok(mut pipe) = opened else { continue };
            thread::sleep(SLOWNESS);
            rustix::io::ioctl_fionbio(&pipe, false).unwrap();
            pipe.write_all(content).unwrap();
            fed += 1;
        }
    }
    fed
}

#[test]
fn a_guest_lazily_served_by_a_slow_store_only_takes_longer() {
    let stored = whole().copy();
    let stop = Arc::new(AtomicBool::new(false));
    let pipes = with_pipes(&stored);
    let feeder = thread::spawn({
        let stop = Arc::clone(&stop);
        move || feed(pipes, &stop)
    });
    let mut monitor = stored.restore(frozen(1), Prefetch::Off);
    let began = Instant::now();
    monitor.done(&Request::Resume, &[]);
    assert_eq!(monitor.command("ping slow"), "pong slow");
    assert_eq!(monitor.command("count 1"), "2");
    let took = began.elapsed();
    monitor.quit();
    stop.store(true, Ordering::Relaxed);
    let fed = feeder.join().unwrap();
    println!("two answers in {took:?}, {fed} chunks came slowly");
    assert!(fed > 2);
}

#[test]
fn a_guest_lazily_served_by_a_store_that_hangs_ends_in_time_and_can_be_killed() {
    let frozen = frozen(1);
    let stored = whole().copy();
    let (told, mut killed) = (
        stored.restore(frozen, Prefetch::Off),
        stored.restore(frozen, Prefetch::Off),
    );
    let _pipes = with_pipes(&stored);
    let exit = end_of(told);
    assert!(
        exit.detail.contains("was not fetched within"),
        "{}",
        exit.detail
    );
    killed.send(&Request::Resume, &[]);
    // It waits for memory; dropping it waits for its end.
    thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    drop(killed);
    println!("killed in {:?}", began.elapsed());
}

#[test]
fn a_snapshot_lazily_served_without_a_stub_or_mapped_with_one_is_refused() {
    let Frozen {
        snapshot,
        disks,
        shared,
        ..
    } = frozen(1);
    let folder = File::open(whole().folder.path()).unwrap();
    let refusal = |paging, has_base, files: &[&File]| {
        let mut monitor = Monitor::start();
        let request = Request::Restore(RestoreRequest {
            disks: disks.clone(),
            paging,
            has_base,
            ..Default::default()
        });
        let Reply::Failed(failure) = monitor.ask(&request, files) else {
            panic!("restored")
        };
        monitor.quit();
        failure
    };
    let failure = refusal(Paging::Store, false, &[snapshot, &folder, shared]);
    assert_eq!(failure.fault, Fault::Caller, "{failure}");
    let stub = &whole().stub;
    for has_base in [true, false] {
        let files = [stub, snapshot, shared];
        let files = if has_base {
            &files[..]
        } else {
            &[stub, shared]
        };
        let failure = refusal(Paging::Mapped, has_base, files);
        assert!(failure.message.contains("base"), "{failure}");
    }
}

/// First touches of a guest that runs these commands, in their order.
fn recorded(
    Frozen {
        snapshot,
        disks,
        shared,
        ..
    }: &Frozen,
) -> Vec<WorkingSetRun> {
    let mut monitor = Monitor::start();
    let request = Request::Restore(RestoreRequest {
        disks: disks.clone(),
        paging: Paging::Recorded,
        ..Default::default()
    });
    monitor.done(&request, &[snapshot, shared]);
    monitor.done(&Request::Resume, &[]);
    assert_eq!(monitor.command("ping recorded"), "pong recorded");
    let early = first_touches(&mut monitor);
    assert_eq!(monitor.command("sum"), "0");
    let all = first_touches(&mut monitor);
    monitor.quit();
    let pages = |runs: &[WorkingSetRun]| -> Vec<u64> {
        let pages = runs.iter().flat_map(|run| run.start..run.start + run.count);
        pages.collect()
    };
    let (early, late) = (pages(&early), pages(&all));
    println!("{} pages, then {}", early.len(), late.len());
    assert!(!early.is_empty() && late.len() > early.len() + 200);
    // What came first stays first.
    assert_eq!(late[..early.len()], early);
    all
}

fn first_touches(monitor: &mut Monitor) -> Vec<WorkingSetRun> {
    match monitor.ask(&Request::WorkingSet, &[]) {
        Reply::WorkingSet(set) => set.runs,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_lazily_recorded_tells_its_touches_and_is_served_by_them() {
    let frozen = frozen(1);
    let runs = recorded(frozen);
    let touch = |run: &WorkingSetRun| TouchedRun::new(run.start, run.count, run.written);
    let set = WorkingSet::new(runs.iter().map(touch).collect(), 256 << 20).unwrap();
    let touches = |run: &TouchedRun| {
        let access = run.access;
        let pages = run.pages.start..run.pages.start + run.pages.count;
        pages.map(move |page| Touch { page, access })
    };
    let again: Vec<Touch> = set.runs().iter().flat_map(touches).collect();
    assert_eq!(WorkingSet::from_touches(&again, 256 << 20), set);
    let file = NamedTempFile::new().unwrap();
    let mut copy = file.reopen().unwrap();
    // Other tests have the same file, and with it the place where it is read.
    (&frozen.snapshot).seek(SeekFrom::Start(0)).unwrap();
    std::io::copy(&mut &frozen.snapshot, &mut copy).unwrap();
    set_working_set(file.path(), &set, None).unwrap();
    let stored = push(&File::open(file.path()).unwrap());
    for prefetch in [Prefetch::Off, Prefetch::WorkingSet] {
        let mut monitor = stored.restore(frozen, prefetch);
        let began = Instant::now();
        monitor.done(&Request::Resume, &[]);
        assert_eq!(monitor.command("sum"), "0");
        println!("answered with {prefetch:?} in {:?}", began.elapsed());
        monitor.quit();
    }
}
