//! The rounds: every side once in each, in an order that turns from round to round, so that whatever else this machine does
//! falls on all sides alike.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::time::{ClockId, clock_gettime};
use thaw_snapshot::Snapshot;
use thaw_vmm_control::{Prefetch, Timings};

use crate::firecracker::Firecracker;
use crate::floor::{Chip, Floor};
use crate::memory::{self, Memory};
use crate::ours::{Monitor, Ours, Vmm};
use crate::stats::Series;

/// A side that failed so often is left out of the rounds that remain.
const FAILURES_MAX: usize = 3;
/// How long clones idle before their memory is looked at: what a guest does right after its restore is over by then.
const SETTLE: Duration = Duration::from_secs(1);
/// Clones that each worker makes when clones a second are counted.
const CLONES_PER_WORKER: usize = 12;

/// What to measure, and with what.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Guest kernel, ELF vmlinux.
    pub kernel: PathBuf,
    /// Initramfs with `thaw-bench-guest` as init.
    pub initramfs: PathBuf,
    /// Thaw's monitor.
    pub vmm: PathBuf,
    /// Firecracker's program, if it is to be beside.
    pub firecracker: Option<PathBuf>,
    /// Scratch folder: snapshots and memory files.
    pub work: PathBuf,
    /// Samples of each side.
    pub rounds: u32,
    /// Clones alive at once when memory is looked at.
    pub clones: usize,
    /// Memory of a guest, MiB.
    pub memory_mib: u32,
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Latencies by side.
    pub series: Series,
    /// Means over the clones, by what they had done.
    pub memory: BTreeMap<String, Memory>,
    /// Made, answered and ended a second, by side.
    pub clones_per_second: BTreeMap<String, f64>,
    /// What went wrong, by side.
    pub failures: BTreeMap<String, Vec<String>>,
    /// What the reader must know of the sides.
    pub notes: BTreeMap<String, String>,
}

impl Findings {
    fn failed(&mut self, side: &str, error: &anyhow::Error) {
        eprintln!("thaw-bench: {side}: {error:#}");
        let failures = self.failures.entry(side.to_owned()).or_default();
        failures.push(format!("{error:#}"));
    }

    fn hopeless(&self, side: &str) -> bool {
        self.failures
            .get(side)
            .is_some_and(|failures| failures.len() >= FAILURES_MAX)
    }
}

/// What takes its turn in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    FloorNew(Chip),
    FloorReady(Chip),
    Cold,
    ColdUnjailed,
    Claim,
    ClaimUnjailed,
    ClaimBare,
    FirecrackerSpawn,
    FirecrackerReady,
}

impl Side {
    const ALL: [Self; 11] = [
        Self::FloorNew(Chip::Kernel),
        Self::FloorReady(Chip::Kernel),
        Self::Cold,
        Self::ColdUnjailed,
        Self::FloorNew(Chip::Split),
        Self::FloorReady(Chip::Split),
        Self::Claim,
        Self::ClaimUnjailed,
        Self::ClaimBare,
        Self::FirecrackerSpawn,
        Self::FirecrackerReady,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::FloorNew(Chip::Kernel) => "floor_new",
            Self::FloorNew(Chip::Split) => "floor_new_split",
            Self::FloorReady(Chip::Kernel) => "floor_ready",
            Self::FloorReady(Chip::Split) => "floor_ready_split",
            Self::Cold => "cold",
            Self::ColdUnjailed => "cold_unjailed",
            Self::Claim => "claim",
            Self::ClaimUnjailed => "claim_unjailed",
            Self::ClaimBare => "claim_bare",
            Self::FirecrackerSpawn => "firecracker_spawn",
            Self::FirecrackerReady => "firecracker_ready",
        }
    }
}

struct Sides {
    floor: Floor,
    ours: Ours,
    unjailed: Ours,
    firecracker: Option<Firecracker>,
}

/// Does all of it. `keep` hears what was found so far after each part: an emulated host can die in the middle, and what was
/// measured by then is worth as much.
///
/// # Errors
/// What the sides need cannot be made, or `keep` fails. A side that fails in a round is in [`Findings::failures`].
pub fn run(
    plan: &Plan,
    keep: &mut dyn FnMut(&Findings) -> anyhow::Result<()>,
) -> anyhow::Result<Findings> {
    let mut findings = Findings::default();
    let sides = prepare(plan, &mut findings)?;
    // One round before the first that counts: caches are warm for all or for none.
    let mut warm_up = Findings::default();
    for round in 0..=plan.rounds {
        let into = match round {
            0 => &mut warm_up,
            _ => &mut findings,
        };
        let turn = usize::try_from(round)? % Side::ALL.len();
        for side in Side::ALL.iter().cycle().skip(turn).take(Side::ALL.len()) {
            sides.measure(*side, into);
        }
        eprint!("\rthaw-bench: round {round} of {}", plan.rounds);
    }
    eprintln!();
    keep(&findings)?;
    sides.count_clones(&mut findings);
    keep(&findings)?;
    sides.look_at_memory(plan.clones, &mut findings);
    Ok(findings)
}

fn prepare(plan: &Plan, findings: &mut Findings) -> anyhow::Result<Sides> {
    let ours = Ours {
        vmm: Vmm::new(plan.vmm.clone(), &plan.work)?,
        memory_mib: plan.memory_mib,
        snapshot: plan.work.join("ours.thaw"),
    };
    eprintln!("thaw-bench: freezing the guest under thaw-vmm");
    ours.freeze(&plan.kernel, &plan.initramfs)
        .context("cannot freeze the bench's guest")?;
    let floor = Floor::new(memory_of(&ours.snapshot, &plan.work.join("floor.memory"))?)
        .context("the floor cannot be measured")?;
    let mut firecracker = None;
    if let Some(program) = &plan.firecracker {
        let other = Firecracker {
            program: program.clone(),
            memory_mib: plan.memory_mib,
            folder: plan.work.join("fc"),
        };
        eprintln!("thaw-bench: freezing the guest under firecracker");
        let frozen = other.version().and_then(|version| {
            other
                .freeze(&plan.kernel, &plan.initramfs)
                .map(|()| version)
        });
        match frozen {
            Ok(version) => {
                findings.notes.insert("firecracker".into(), version);
                firecracker = Some(other);
            }
            Err(error) => findings.failed("firecracker_freeze", &error),
        }
    }
    let unjailed = Ours {
        vmm: ours.vmm.unjailed(),
        ..ours.clone()
    };
    Ok(Sides {
        floor,
        ours,
        unjailed,
        firecracker,
    })
}

/// The snapshot's guest memory as a file of its own, holes included: the floor maps what a claim maps.
fn memory_of(snapshot: &Path, to: &Path) -> anyhow::Result<File> {
    let opened = Snapshot::open(snapshot)?;
    let memory = opened.memory()?;
    let (mut from, mut file) = (
        opened.file().try_clone()?,
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(to)
            .with_context(|| format!("cannot make {}", to.display()))?,
    );
    file.set_len(memory.length)?;
    for run in &memory.runs {
        let bytes = run.bytes();
        from.seek(SeekFrom::Start(memory.offset + bytes.start))?;
        file.seek(SeekFrom::Start(bytes.start))?;
        io::copy(&mut (&from).take(bytes.end - bytes.start), &mut file)
            .with_context(|| format!("cannot write {}", to.display()))?;
    }
    file.sync_all()?;
    Ok(file)
}

/// Now, on the clock on which monitors tell their timings.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |part: i64| u64::try_from(part).unwrap_or(0);
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

/// A claim's parts, from when it was sent.
fn add_timings(series: &mut Series, side: &str, sent_ns: u64, timings: &Timings) {
    let mut add = |part: &str, from: Option<u64>, to: Option<u64>| {
        if let (Some(from), Some(to)) = (from, to) {
            let took = Duration::from_nanos(to.saturating_sub(from));
            series.add(&format!("{side}_{part}"), took);
        }
    };
    add(
        "first_instruction",
        Some(sent_ns),
        timings.first_instruction_ns,
    );
    let steps = [
        ("received", timings.claimed_ns),
        ("decoded", timings.decoded_ns),
        ("mapped", timings.memory_mapped_ns),
        ("vcpus_set", timings.vcpus_set_ns),
        ("state_set", timings.state_set_ns),
        ("primed", timings.primed_ns),
        ("time_set", timings.time_set_ns),
        ("entered", timings.first_instruction_ns),
    ];
    let mut from = Some(sent_ns);
    for (step, to) in steps {
        add(step, from, to);
        from = to;
    }
}

impl Sides {
    fn measure(&self, side: Side, findings: &mut Findings) {
        if findings.hopeless(side.name()) {
            return;
        }
        let series = &mut findings.series;
        let result = match side {
            Side::FloorNew(chip) => self
                .floor
                .new_vm(chip)
                .map(|took| series.add(side.name(), took)),
            Side::FloorReady(chip) => {
                let took = self.floor.ready_vm(chip);
                took.map(|took| series.add(side.name(), took))
            }
            Side::Cold => cold(&self.ours, side, series),
            Side::ColdUnjailed => cold(&self.unjailed, side, series),
            Side::Claim => {
                let claimed = self.claim_and_warm(series);
                match claimed.map(|monitor| self.rewind(monitor, findings)) {
                    Ok(()) => return,
                    Err(error) => Err(error),
                }
            }
            Side::ClaimUnjailed => claim_once(&self.unjailed, side, Prefetch::WorkingSet, series),
            Side::ClaimBare => claim_once(&self.ours, side, Prefetch::Off, series),
            Side::FirecrackerSpawn => self.firecracker_spawn(series),
            Side::FirecrackerReady => self.firecracker_ready(series),
        };
        if let Err(error) = result {
            findings.failed(side.name(), &error);
        }
    }

    /// A shell made ahead is given the snapshot, with the question in the guest's receive queue; then a second question.
    fn claim_and_warm(&self, series: &mut Series) -> anyhow::Result<Monitor> {
        let snapshot = self.ours.open()?;
        let mut monitor = self.ours.shell()?;
        monitor.question()?;
        let (began, sent_ns) = (Instant::now(), monotonic_ns());
        monitor.send_claim(&snapshot, Prefetch::WorkingSet)?;
        monitor.hear()?;
        series.add("claim_answer", began.elapsed());
        monitor.finish()?;
        add_timings(series, "claim", sent_ns, &monitor.timings()?);
        let began = Instant::now();
        monitor.answer()?;
        series.add("warm_answer", began.elapsed());
        Ok(monitor)
    }

    /// The used VM is put back and answers again, twice: as pristine, and warm.
    fn rewind(&self, mut monitor: Monitor, findings: &mut Findings) {
        if findings.hopeless("rewind") {
            return;
        }
        let mut rewound = || -> anyhow::Result<[Duration; 3]> {
            let began = Instant::now();
            monitor.rewind()?;
            let put_back = began.elapsed();
            let resumed = Instant::now();
            monitor.send_resume()?;
            monitor.hear()?;
            let times = [put_back, resumed.elapsed(), began.elapsed()];
            monitor.finish()?;
            Ok(times)
        };
        match rewound() {
            Ok([put_back, answered, whole]) => {
                findings.series.add("rewind_put_back", put_back);
                findings.series.add("rewind_resume_answer", answered);
                findings.series.add("rewind_answer", whole);
            }
            Err(error) => findings.failed("rewind", &error),
        }
    }

    fn firecracker_spawn(&self, series: &mut Series) -> anyhow::Result<()> {
        let Some(firecracker) = &self.firecracker else {
            return Ok(());
        };
        let began = Instant::now();
        let mut process = firecracker.spawn("clone")?;
        series.add("firecracker_spawn_api", began.elapsed());
        firecracker.load(&mut process)?;
        series.add("firecracker_spawn_loaded", began.elapsed());
        let mut guest = process.connect_answered()?;
        series.add("firecracker_spawn_answer", began.elapsed());
        let began = Instant::now();
        guest.answer()?;
        series.add("firecracker_warm_answer", began.elapsed());
        let ended = Instant::now();
        drop(process);
        series.add("firecracker_teardown", ended.elapsed());
        Ok(())
    }

    fn firecracker_ready(&self, series: &mut Series) -> anyhow::Result<()> {
        let Some(firecracker) = &self.firecracker else {
            return Ok(());
        };
        let mut process = firecracker.spawn("clone")?;
        let began = Instant::now();
        firecracker.load(&mut process)?;
        series.add("firecracker_ready_loaded", began.elapsed());
        process.connect_answered()?;
        series.add("firecracker_ready_answer", began.elapsed());
        Ok(())
    }

    fn look_at_memory(&self, count: usize, findings: &mut Findings) {
        if let Err(error) = self.our_memory(count, findings) {
            findings.failed("memory_ours", &error);
        }
        if let Some(firecracker) = &self.firecracker
            && let Err(error) = firecracker_memory(firecracker, count, findings)
        {
            findings.failed("memory_firecracker", &error);
        }
    }

    fn our_memory(&self, count: usize, findings: &mut Findings) -> anyhow::Result<()> {
        let snapshot = self.ours.open()?;
        let mut clones = Vec::new();
        for _ in 0..count {
            clones.push(self.ours.shell()?);
        }
        let mean = |clones: &[Monitor]| -> anyhow::Result<Memory> {
            let all: anyhow::Result<Vec<_>> =
                clones.iter().map(|clone| Memory::of(clone.pid())).collect();
            Ok(Memory::mean(&all?))
        };
        let mut keep = |what: &str, memory| findings.memory.insert(what.to_owned(), memory);
        keep("ours_shell", mean(&clones)?);
        for clone in &mut clones {
            clone.claim(&snapshot)?;
        }
        thread::sleep(SETTLE);
        keep("ours_idle", mean(&clones)?);
        for clone in &mut clones {
            clone.answer()?;
        }
        thread::sleep(SETTLE);
        keep("ours_used", mean(&clones)?);
        let filtered = match clones.first() {
            Some(clone) => memory::filtered_threads(clone.pid())?,
            None => return Ok(()),
        };
        findings.note_filters("ours", filtered);
        for clone in &mut clones {
            clone.rewind()?;
        }
        findings
            .memory
            .insert("ours_rewound".to_owned(), mean(&clones)?);
        Ok(())
    }

    fn count_clones(&self, findings: &mut Findings) {
        let ours = || {
            let snapshot = self.ours.open()?;
            let mut monitor = self.ours.shell()?;
            monitor.question()?;
            monitor.send_claim(&snapshot, Prefetch::WorkingSet)?;
            monitor.hear()
        };
        findings.count("ours", |_| ours());
        if let Some(firecracker) = &self.firecracker {
            findings.count("firecracker", |worker| {
                let mut process = firecracker.spawn(&format!("worker-{worker}"))?;
                firecracker.load(&mut process)?;
                process.connect_answered().map(drop)
            });
        }
    }
}

/// A process is started for the request: everything is on its path.
fn cold(ours: &Ours, side: Side, series: &mut Series) -> anyhow::Result<()> {
    let snapshot = ours.open()?;
    let (began, sent_ns) = (Instant::now(), monotonic_ns());
    let mut monitor = Monitor::spawn(&ours.vmm)?;
    monitor.question()?;
    monitor.send_claim(&snapshot, Prefetch::WorkingSet)?;
    monitor.hear()?;
    series.add(&format!("{}_answer", side.name()), began.elapsed());
    monitor.finish()?;
    let timings = monitor.timings()?;
    if let Some(first) = timings.first_instruction_ns {
        let took = Duration::from_nanos(first.saturating_sub(sent_ns));
        series.add(&format!("{}_first_instruction", side.name()), took);
    }
    let ended = Instant::now();
    drop(monitor);
    if side == Side::Cold {
        series.add("ours_teardown", ended.elapsed());
    }
    Ok(())
}

/// A claim, and its answer.
fn claim_once(
    ours: &Ours,
    side: Side,
    prefetch: Prefetch,
    series: &mut Series,
) -> anyhow::Result<()> {
    let snapshot = ours.open()?;
    let mut monitor = ours.shell()?;
    monitor.question()?;
    let began = Instant::now();
    monitor.send_claim(&snapshot, prefetch)?;
    monitor.hear()?;
    series.add(&format!("{}_answer", side.name()), began.elapsed());
    monitor.finish()
}

fn firecracker_memory(
    firecracker: &Firecracker,
    count: usize,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let mut clones = Vec::new();
    for number in 0..count {
        let mut process = firecracker.spawn(&format!("clone-{number}"))?;
        firecracker.load(&mut process)?;
        clones.push(process);
    }
    let pids: Vec<u32> = clones.iter().map(|clone| clone.pid()).collect();
    let mean = || -> anyhow::Result<Memory> {
        let all: anyhow::Result<Vec<_>> = pids.iter().map(|pid| Memory::of(*pid)).collect();
        Ok(Memory::mean(&all?))
    };
    thread::sleep(SETTLE);
    findings.memory.insert("firecracker_idle".into(), mean()?);
    let mut guests = Vec::new();
    for clone in &mut clones {
        guests.push(clone.connect_answered()?);
    }
    thread::sleep(SETTLE);
    findings.memory.insert("firecracker_used".into(), mean()?);
    if let Some(pid) = pids.first() {
        findings.note_filters("firecracker", memory::filtered_threads(*pid)?);
    }
    Ok(())
}

impl Findings {
    fn note_filters(&mut self, side: &str, (filtered, all): (usize, usize)) {
        self.notes.insert(
            format!("{side}_seccomp"),
            format!("{filtered} of {all} threads under a seccomp filter"),
        );
    }

    /// Makes clones on all processors at once, each from its process's start to its end.
    fn count(&mut self, side: &str, make: impl Fn(usize) -> anyhow::Result<()> + Sync) {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let (made, began) = (AtomicUsize::new(0), Instant::now());
        let work = |worker| {
            for _ in 0..CLONES_PER_WORKER {
                make(worker)?;
                made.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        };
        let results: Vec<anyhow::Result<()>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..workers)
                .map(|worker| scope.spawn(move || work(worker)))
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined
                .map(|result| result.unwrap_or_else(|_| Err(anyhow::anyhow!("a worker died"))))
                .collect()
        });
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            self.failed(&format!("clones_{side}"), error);
        }
        let count = Duration::from_secs(u64::try_from(made.into_inner()).unwrap_or(0));
        let rate = count.as_secs_f64() / began.elapsed().as_secs_f64();
        self.clones_per_second.insert(side.to_owned(), rate);
    }
}
