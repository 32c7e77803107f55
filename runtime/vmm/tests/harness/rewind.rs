//! Used machines back to their snapshot, in place.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use thaw_snapshot::{PageRun, SectionKind, Snapshot, SparseSection};
use thaw_vmm::state::{self, MachineStateV1};
use thaw_vmm_control::{Disk, Fault, Reply, Request, Rewound};

use crate::freeze::{all_cpus_tick, clocks, prepared};
use crate::guest::{disk_of, ext4};
use crate::monitor::Monitor;

const PAGE: u64 = 4096;
/// PPR in the LAPIC's registers (Intel SDM volume 3, table 11-1).
const PROCESSOR_PRIORITY: Range<usize> = 0xa0..0xa4;
/// `MSR_KVM_WALL_CLOCK_NEW` (Documentation/virt/kvm/x86/msr.rst): the guest-physical address of 12 bytes of wall clock.
const WALL_CLOCK: u32 = 0x4b56_4d00;
/// Version, seconds, nanoseconds.
const WALL_CLOCK_BYTES: u64 = 12;

/// A guest that was frozen once for all tests of its shape.
pub struct Frozen {
    /// The snapshot.
    pub snapshot: File,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// The file of the one that is shared.
    pub shared: File,
    /// Monotonic clock, wall clock and TSC just before.
    clocks: [u64; 3],
    /// How long it ran after that.
    awake: Duration,
}

/// Of one or two vCPUs.
pub fn frozen(vcpu_count: u8) -> &'static Frozen {
    static ONE: OnceLock<Frozen> = OnceLock::new();
    static TWO: OnceLock<Frozen> = OnceLock::new();
    let place = if vcpu_count == 1 { &ONE } else { &TWO };
    place.get_or_init(|| {
        let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
        let (mut monitor, disks) = prepared(vcpu_count, &shared, &overlay);
        all_cpus_tick(&mut monitor, vcpu_count.into());
        let asked = Instant::now();
        let clocks = clocks(&mut monitor);
        monitor.done(&Request::Pause, &[]);
        let awake = asked.elapsed();
        let snapshot = monitor.save();
        monitor.quit();
        Frozen {
            snapshot,
            disks,
            shared,
            clocks,
            awake,
        }
    })
}

impl Frozen {
    fn restore(&self) -> Monitor {
        Monitor::restore(&self.snapshot, &self.disks, &[&self.shared])
    }
}

fn ask_to_rewind(monitor: &mut Monitor, tap: Option<&File>) -> (Reply, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(monitor.agent.read_timeout().unwrap())
        .unwrap();
    let theirs = File::from(OwnedFd::from(theirs));
    let files: Vec<&File> = [&theirs].into_iter().chain(tap).collect();
    (monitor.ask(&Request::Rewind, &files), ours)
}

/// Puts it back, onto a new agent channel.
pub fn rewind(monitor: &mut Monitor) -> Rewound {
    rewind_onto(monitor, None)
}

/// The same, onto a new tap as well, if there is one.
pub fn rewind_onto(monitor: &mut Monitor, tap: Option<&File>) -> Rewound {
    match ask_to_rewind(monitor, tap) {
        (Reply::Rewound(rewound), agent) => {
            monitor.agent = agent;
            rewound
        }
        (other, _) => panic!("{other:?}"),
    }
}

fn open(file: &File) -> Snapshot {
    Snapshot::from_file(file.try_clone().unwrap(), "test").unwrap()
}

/// Memory and the stored disk of a snapshot.
fn sections(file: &File) -> [SparseSection; 2] {
    let snapshot = open(file);
    [snapshot.memory().unwrap(), snapshot.disk(1).unwrap()]
}

fn stored(file: &File, section: &SparseSection, run: &PageRun) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(run.count * PAGE).unwrap()];
    file.read_exact_at(&mut bytes, section.offset + run.start * PAGE)
        .unwrap();
    bytes
}

/// Whether any of memory and disk holds `needle`, pages that neighbour each other read as one.
fn holds(file: &File, needle: &str) -> bool {
    let needle = needle.as_bytes();
    sections(file).iter().any(|section| {
        section.runs.iter().any(|run| {
            let bytes = stored(file, section, run);
            bytes.windows(needle.len()).any(|window| window == needle)
        })
    })
}

#[test]
fn no_secret_of_a_life_is_left_after_a_rewind() {
    let seed = "tHaW5eCr3t";
    let mut monitor = frozen(1).restore();
    monitor.done(&Request::Resume, &[]);
    let places = monitor.command(&format!("hide {seed}"));
    assert_eq!(places.split(' ').count(), 8, "{places}");
    monitor.done(&Request::Pause, &[]);
    let used = monitor.save();
    for place in places.split(' ') {
        assert!(
            holds(&used, &format!("{seed}-{place}")),
            "{place} was not hidden"
        );
    }
    let rewound = rewind(&mut monitor);
    assert!(
        rewound.pages > 8 && rewound.disk_bytes >= PAGE,
        "{rewound:?}"
    );
    let pristine = monitor.save();
    assert!(!holds(&pristine, seed));
    assert_eq!(monitor.status().console, "");
    monitor.done(&Request::Resume, &[]);
    assert_eq!(monitor.command("get before"), "frozen");
    assert_eq!(
        monitor.command("get secret").split(' ').next(),
        Some("error")
    );
    monitor.quit();
}

fn machine(file: &File) -> MachineStateV1 {
    state::decode(&open(file).section(SectionKind::Machine).unwrap()).unwrap()
}

/// One page of a saved memory or disk.
fn page((file, section): (&File, &SparseSection), number: u64) -> Vec<u8> {
    let is_stored = |run: &PageRun| (run.start..run.start + run.count).contains(&number);
    let mut bytes = vec![0; 4096];
    if section.runs.iter().any(is_stored) {
        (file.read_exact_at(&mut bytes, section.offset + number * PAGE)).unwrap();
    }
    bytes
}

/// Offsets of the bytes that differ between two saved memories or disks.
fn differing(one: (&File, &SparseSection), other: (&File, &SparseSection)) -> Vec<u64> {
    assert_eq!(one.1.length, other.1.length);
    let runs = one.1.runs.iter().chain(&other.1.runs);
    let mut pages: Vec<u64> = (runs.flat_map(|run| run.start..run.start + run.count)).collect();
    pages.sort_unstable();
    pages.dedup();
    let bytes = |number: u64| {
        let pairs = page(one, number).into_iter().zip(page(other, number));
        let places = (number * PAGE..).zip(pairs);
        places.filter_map(|(place, (one, other))| (one != other).then_some(place))
    };
    pages.into_iter().flat_map(bytes).collect()
}

/// Where KVM writes the wall clock: guest-physical.
pub fn wall_clock(snapshot: &File) -> u64 {
    let msrs = &machine(snapshot).vcpus[0].msrs;
    let register = msrs.iter().find(|msr| msr.index == WALL_CLOCK);
    register.unwrap().data
}

/// The state without the processor priority, which KVM computes from other registers, later than it gives them away.
fn without_priority(mut state: MachineStateV1) -> MachineStateV1 {
    for vcpu in &mut state.vcpus {
        vcpu.lapic[PROCESSOR_PRIORITY].fill(0);
    }
    state
}

/// A machine that has never run after its restore, and one that was rewound, saved: the same, but for the processor priority, and
/// the wall clock that KVM itself writes whenever the guest's register for it is set.
fn is_fresh(fresh: &File, rewound: &File) {
    let state = without_priority(machine(fresh));
    let theirs = without_priority(machine(rewound));
    assert_eq!(theirs.devices, state.devices);
    assert_eq!(theirs.chips, state.chips);
    assert_eq!(theirs.vcpus, state.vcpus);
    assert_eq!(theirs, state);
    let wall_clock = wall_clock(fresh);
    let [ours, theirs] = [fresh, rewound].map(sections);
    let disk = differing((fresh, &ours[1]), (rewound, &theirs[1]));
    assert!(disk.is_empty(), "disk: {disk:x?}");
    let mut memory = differing((fresh, &ours[0]), (rewound, &theirs[0]));
    memory.retain(|place| !(wall_clock..wall_clock + WALL_CLOCK_BYTES).contains(place));
    assert!(memory.is_empty(), "memory: {memory:x?}");
}

fn equals_a_fresh_restore(vcpu_count: u8) {
    let frozen = frozen(vcpu_count);
    let mut untouched = frozen.restore();
    let fresh = untouched.save();
    untouched.quit();
    let mut monitor = frozen.restore();
    for round in 0..3 {
        monitor.done(&Request::Resume, &[]);
        assert_eq!(monitor.command("count 1"), "2");
        assert_eq!(monitor.command("random"), "8");
        assert_eq!(monitor.command("put during life"), "put");
        assert_eq!(monitor.command("hide secret").split(' ').count(), 8);
        match round {
            0 => assert_eq!(monitor.command("churn"), "churning"),
            1 => assert_eq!(monitor.command("spin"), "spinning"),
            _ => monitor.tell("bytes 1000000"),
        }
        if round == 2 {
            monitor.done(&Request::Pause, &[]);
        }
        let rewound = rewind(&mut monitor);
        println!("round {round} with {vcpu_count} vcpus: {rewound:?}");
        is_fresh(&fresh, &monitor.save());
    }
    monitor.quit();
}

#[test]
fn a_rewound_machine_equals_a_restored_one_with_one_vcpu() {
    equals_a_fresh_restore(1);
}

#[test]
fn a_rewound_machine_equals_a_restored_one_with_two_vcpus() {
    equals_a_fresh_restore(2);
}

fn lives_again(vcpu_count: u8) {
    let frozen = frozen(vcpu_count);
    let mut monitor = frozen.restore();
    for round in 0..20 {
        // The request lies in the new channel before the guest runs.
        monitor.tell("clocks");
        let resumed = Instant::now();
        monitor.done(&Request::Resume, &[]);
        let answer = monitor.hear();
        // Capturing the clocks takes a moment that the guest sees pass.
        let awake = frozen.awake + resumed.elapsed() + Duration::from_secs(1);
        let now: Vec<u64> = answer
            .split(' ')
            .map(|word| word.parse().unwrap())
            .collect();
        let passed = Duration::from_nanos(now[0] - frozen.clocks[0]);
        assert!(
            passed < awake,
            "{passed:?} passed in round {round}, awake for {awake:?}"
        );
        assert!(now[2] > frozen.clocks[2]);
        assert_eq!(monitor.command("count 1"), "2");
        assert_eq!(monitor.command("get before"), "frozen");
        assert_eq!(monitor.command("list"), "2", "lost+found and one file");
        assert_eq!(monitor.command("put during life"), "put");
        match round % 4 {
            0 => assert_eq!(monitor.command("spin"), "spinning"),
            1 => assert_eq!(monitor.command("churn"), "churning"),
            // Nobody reads it: the guest waits for credit.
            2 => monitor.tell("bytes 10000000"),
            _ => all_cpus_tick(&mut monitor, vcpu_count.into()),
        }
        rewind(&mut monitor);
    }
    monitor.done(&Request::Resume, &[]);
    assert_eq!(monitor.command("sum"), "0", "memory differs");
    all_cpus_tick(&mut monitor, vcpu_count.into());
    monitor.quit();
}

#[test]
fn a_rewound_guest_lives_twenty_times_with_one_vcpu() {
    lives_again(1);
}

#[test]
fn a_rewound_guest_lives_twenty_times_with_two_vcpus() {
    lives_again(2);
}

#[test]
fn a_guest_that_wrote_too_much_is_not_rewound() {
    let mut monitor = frozen(1).restore();
    monitor.done(&Request::Resume, &[]);
    assert_eq!(monitor.command("fill 40"), (40 << 20).to_string());
    let (Reply::Failed(failure), _) = ask_to_rewind(&mut monitor, None) else {
        panic!("rewound")
    };
    assert!(failure.message.contains("pages"), "{}", failure.message);
    assert_eq!(failure.fault, Fault::Guest);
    let refused = monitor.ask(&Request::Resume, &[]);
    assert!(matches!(refused, Reply::Failed(failure) if failure.fault == Fault::Host));
    monitor.quit();
}

#[test]
fn a_guest_that_ended_is_not_rewound() {
    let mut monitor = frozen(1).restore();
    monitor.done(&Request::Resume, &[]);
    monitor.tell("poweroff");
    monitor.exit();
    assert!(
        matches!(ask_to_rewind(&mut monitor, None).0, Reply::Failed(failure) if failure.fault == Fault::Guest)
    );
    monitor.quit();
}

/// What lies in the new channel is answered, thirty times, and what each part of the rewind before it took.
#[test]
fn a_rewound_guest_answers_what_lies_in_its_channel() {
    let mut monitor = frozen(1).restore();
    let (mut lives, mut rewinds, mut pages) = (Vec::new(), Vec::new(), Vec::new());
    for life in 0..30 {
        monitor.tell(&format!("count {life}"));
        monitor.done(&Request::Resume, &[]);
        assert_eq!(monitor.hear(), (1 + life).to_string());
        lives.push(monitor.status().timings);
        let asked = Instant::now();
        let rewound = rewind(&mut monitor);
        rewinds.push((monitor.status().timings, asked.elapsed()));
        pages.push(rewound.pages);
    }
    let us = |from: Option<u64>, to: Option<u64>| (to.unwrap() - from.unwrap()) / 1000;
    println!("\npages put back: {pages:?}");
    println!("us: stop, memory, vcpus, chips, devices; the whole request");
    for (t, whole) in &rewinds {
        println!(
            "{:>6} {:>6} {:>6} {:>6} {:>6}; {:>6}",
            us(t.claimed_ns, t.decoded_ns),
            us(t.decoded_ns, t.memory_mapped_ns),
            us(t.memory_mapped_ns, t.vcpus_set_ns),
            us(t.vcpus_set_ns, t.chips_set_ns),
            us(t.chips_set_ns, t.state_set_ns),
            whole.as_micros(),
        );
    }
    let answered = lives.iter().map(|t| us(t.resume_ns, t.first_agent_byte_ns));
    println!(
        "us from resume to answer: {:?}",
        answered.collect::<Vec<_>>()
    );
    monitor.quit();
}
