//! Shells, made ahead, and what claiming one costs.

use std::fs::File;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use thaw_snapshot::{TouchedRun, WorkingSet, set_working_set};
use thaw_vmm_control::{
    Disk, DiskShape, Fault, Prefetch, PrepareRequest, Reply, Request, RestoreRequest, SaveForm,
    Status, Timings, WorkingSetRun,
};

use crate::monitor::Monitor;
use crate::rewind::{Frozen, frozen};

/// Claims whose parts are measured.
const CLAIMS: usize = 30;

fn shape(vcpu_count: u8, disks: &[Disk]) -> PrepareRequest {
    let shape = |disk: &Disk| DiskShape {
        access: disk.access,
    };
    PrepareRequest {
        vcpu_count,
        memory_mib: 256,
        disks: disks.iter().map(shape).collect(),
        has_network: false,
    }
}

/// A shell, not claimed.
fn shell(shape: &PrepareRequest) -> Monitor {
    let mut monitor = Monitor::start();
    monitor.done(&Request::Prepare(shape.clone()), &[]);
    monitor
}

/// Claims and runs a shell with one message.
fn claim(shell: &mut Monitor, disks: &[Disk], files: &[&File]) {
    let request = Request::Restore(RestoreRequest {
        disks: disks.to_vec(),
        resume: true,
        ..Default::default()
    });
    shell.done(&request, files);
}

/// A moment of a claim.
type Moment = fn(&Timings) -> Option<u64>;

/// The parts of a claim, from moment to moment.
const PARTS: [(&str, Moment); 10] = [
    ("snapshot read", |t| t.decoded_ns),
    ("memory mapped", |t| t.memory_mapped_ns),
    ("vcpus set", |t| t.vcpus_set_ns),
    ("chips set", |t| t.chips_set_ns),
    ("devices set", |t| t.state_set_ns),
    ("to resume", |t| t.resume_ns),
    ("queue primed", |t| t.primed_ns),
    ("time set", |t| t.time_set_ns),
    ("first instruction", |t| t.first_instruction_ns),
    ("agent's first byte", |t| t.first_agent_byte_ns),
];

fn microseconds(from: Option<u64>, to: Option<u64>) -> u64 {
    let (Some(from), Some(to)) = (from, to) else {
        panic!("a moment is missing");
    };
    to.checked_sub(from).expect("moments come in order") / 1000
}

fn print_quantiles(name: &str, mut values: Vec<u64>) {
    values.sort_unstable();
    let at = |percent: usize| values[(values.len() - 1) * percent / 100];
    println!(
        "{name:>24}: min {:>7} p50 {:>7} p90 {:>7} p99 {:>7} us",
        values[0],
        at(50),
        at(90),
        at(99)
    );
}

fn print_parts(all: &[Timings]) {
    let each = |part: &dyn Fn(&Timings) -> u64| all.iter().map(part).collect::<Vec<_>>();
    print_quantiles(
        "shell, made ahead",
        each(&|t| microseconds(t.prepared_from_ns, t.prepared_ns)),
    );
    let mut before: Moment = |t| t.claimed_ns;
    for (name, moment) in PARTS {
        print_quantiles(name, each(&|t| microseconds(before(t), moment(t))));
        before = moment;
    }
    print_quantiles(
        "CLAIM TO FIRST INSTR.",
        each(&|t| microseconds(t.claimed_ns, t.first_instruction_ns)),
    );
    print_quantiles(
        "CLAIM TO FIRST BYTE",
        each(&|t| microseconds(t.claimed_ns, t.first_agent_byte_ns)),
    );
}

/// A command whose work is worth fetching ahead for.
const COMMANDS: [&str; 2] = ["sum", "get before"];

/// Claims a new shell with the first command in its channel.
fn claimed(snapshot: &File, frozen: &Frozen, prefetch: Prefetch) -> (Monitor, Duration) {
    let mut shell = shell(&shape(1, &frozen.disks));
    shell.tell(COMMANDS[0]);
    let asked = Instant::now();
    let request = Request::Restore(RestoreRequest {
        disks: frozen.disks.clone(),
        resume: true,
        prefetch,
        ..Default::default()
    });
    shell.done(&request, &[snapshot, &frozen.shared]);
    assert_eq!(shell.hear(), "0");
    assert_eq!(shell.command(COMMANDS[1]), "frozen");
    (shell, asked.elapsed())
}

/// The frozen guest with the working set of the commands, as one clone of it told.
fn with_working_set(frozen: &Frozen) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let mut unused = Monitor::restore(&frozen.snapshot, &frozen.disks, &[&frozen.shared]);
    unused.save_into(file.as_file(), SaveForm::Whole);
    unused.quit();
    let (mut clone, _) = claimed(&frozen.snapshot, frozen, Prefetch::Off);
    let Reply::WorkingSet(told) = clone.ask(&Request::WorkingSet, &[]) else {
        panic!("no working set");
    };
    clone.quit();
    let written: u64 = told
        .runs
        .iter()
        .filter(|run| run.written)
        .map(|run| run.count)
        .sum();
    let all: u64 = told.runs.iter().map(|run| run.count).sum();
    println!(
        "working set: {all} pages, {written} written, {} runs",
        told.runs.len()
    );
    // The guest has read a mebibyte of its own and has written its stack at least.
    assert!(written > 0 && all > 256, "{all} pages, {written} written");
    let run = |run: &WorkingSetRun| TouchedRun::new(run.start, run.count, run.written);
    let set = WorkingSet::new(told.runs.iter().map(run).collect(), 256 << 20).unwrap();
    set_working_set(file.path(), &set, None).unwrap();
    file
}

/// One message runs a shell's guest, with the request in its queue. Thirty times, and what each part took: in turns without and
/// with the working set fetched beside the guest.
#[test]
fn a_claimed_shell_answers_what_lay_in_its_channel() {
    let frozen = frozen(1);
    let amended = with_working_set(frozen);
    let snapshot = File::open(amended.path()).unwrap();
    let mut rows = [
        (Prefetch::Off, Vec::new(), Vec::new()),
        (Prefetch::WorkingSet, Vec::new(), Vec::new()),
    ];
    for number in 0..CLAIMS {
        let (prefetch, timings, answers) = &mut rows[number % 2];
        let (mut clone, answered) = claimed(&snapshot, frozen, *prefetch);
        timings.push(clone.status().timings);
        answers.push(u64::try_from(answered.as_micros()).unwrap());
        if number < 2 {
            assert_eq!(clone.command("count 1"), "2");
            assert_eq!(clone.command("read /dev/vda 8192 4"), "rrrr");
            clone.quit();
        }
    }
    for (prefetch, timings, answers) in rows {
        println!("prefetch {prefetch:?}:");
        print_parts(&timings);
        print_quantiles("CLAIM TO TWO ANSWERS", answers);
    }
}

#[test]
fn a_shell_of_two_vcpus_is_claimed_paused_and_saved_again() {
    let Frozen {
        snapshot,
        disks,
        shared,
        ..
    } = frozen(2);
    let mut paused = shell(&shape(2, disks));
    let request = Request::Restore(RestoreRequest {
        disks: disks.clone(),
        ..Default::default()
    });
    paused.done(&request, &[snapshot, shared]);
    // It has not run: what is saved of it now is what it was restored from.
    let again = paused.save();
    paused.done(&Request::Resume, &[]);
    assert_eq!(paused.command("count 1"), "2");
    paused.quit();
    let mut clone = shell(&shape(2, disks));
    claim(&mut clone, disks, &[&again, shared]);
    assert_eq!(clone.command("count 1"), "2");
    assert_eq!(clone.command("get before"), "frozen");
    assert_eq!(clone.command("cpus"), "2");
    clone.quit();
}

#[test]
fn a_shell_of_another_shape_is_refused_and_one_nobody_claims_ends() {
    let Frozen {
        snapshot,
        disks,
        shared,
        ..
    } = frozen(1);
    let wrong = [
        shape(2, disks),
        PrepareRequest {
            memory_mib: 128,
            ..shape(1, disks)
        },
        shape(1, &disks[..1]),
    ];
    for shape in wrong {
        let mut shell = shell(&shape);
        let request = Request::Restore(RestoreRequest {
            disks: disks.clone(),
            ..Default::default()
        });
        let Reply::Failed(failure) = shell.ask(&request, &[snapshot, shared]) else {
            panic!("claimed {shape:?}");
        };
        assert_eq!(failure.fault, Fault::Caller, "{failure}");
        assert!(failure.message.contains("cannot hold"), "{failure}");
        shell.quit();
    }
    let mut unclaimed = shell(&shape(1, disks));
    let Status { console, timings } = unclaimed.status();
    assert!(console.is_empty() && timings.prepared_ns.is_some() && timings.claimed_ns.is_none());
    unclaimed.quit();
}
