//! Shells, made ahead, and what claiming one costs.

use std::fs::File;

use thaw_vmm_control::{
    Disk, DiskShape, Fault, PrepareRequest, Reply, Request, RestoreRequest, Status, Timings,
};

use crate::guest::{disk_of, ext4};
use crate::monitor::{Monitor, copy_on_write, read_only, stored};

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

/// A frozen guest that has counted to 1 and holds a file on its disk.
fn frozen(vcpu_count: u8, shared: &File) -> (File, Vec<Disk>) {
    let disks = [
        (read_only("shared"), shared),
        (copy_on_write("overlay"), &ext4()),
    ];
    let mut monitor = Monitor::boot("vmlinux", vcpu_count, &disks);
    assert_eq!(monitor.command("count 1"), "1");
    assert_eq!(monitor.command("mount /dev/vdb"), "mounted");
    assert_eq!(monitor.command("put before frozen"), "put");
    let snapshot = monitor.freeze();
    monitor.quit();
    let disks = vec![read_only("shared"), stored(&copy_on_write("overlay"))];
    (snapshot, disks)
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

/// One message runs a shell's guest, with the request in its queue; thirty times, and what each part of it took.
#[test]
fn a_claimed_shell_answers_what_lay_in_its_channel() {
    let shared = disk_of(b'r', 1 << 20);
    let (snapshot, disks) = frozen(1, &shared);
    let shape = shape(1, &disks);
    let mut timings = Vec::with_capacity(CLAIMS);
    for number in 0..CLAIMS {
        let mut shell = shell(&shape);
        shell.tell(&format!("count {number}"));
        claim(&mut shell, &disks, &[&snapshot, &shared]);
        assert_eq!(shell.hear(), (1 + number).to_string());
        timings.push(shell.status().timings);
        if number == 0 {
            assert_eq!(shell.command("get before"), "frozen");
            assert_eq!(shell.command("read /dev/vda 8192 4"), "rrrr");
            shell.quit();
        }
    }
    print_parts(&timings);
}

#[test]
fn a_shell_of_four_vcpus_is_claimed_paused_and_saved_again() {
    let shared = disk_of(b'r', 1 << 20);
    let (snapshot, disks) = frozen(4, &shared);
    let mut paused = shell(&shape(4, &disks));
    let request = Request::Restore(RestoreRequest {
        disks: disks.clone(),
        ..Default::default()
    });
    paused.done(&request, &[&snapshot, &shared]);
    // It has not run: what is saved of it now is what it was restored from.
    let again = paused.save();
    paused.done(&Request::Resume, &[]);
    assert_eq!(paused.command("count 1"), "2");
    paused.quit();
    let mut clone = shell(&shape(4, &disks));
    claim(&mut clone, &disks, &[&again, &shared]);
    assert_eq!(clone.command("count 1"), "2");
    assert_eq!(clone.command("get before"), "frozen");
    assert_eq!(clone.command("cpus"), "4");
    clone.quit();
}

#[test]
fn a_shell_of_another_shape_is_refused_and_one_nobody_claims_ends() {
    let shared = disk_of(b'r', 1 << 20);
    let (snapshot, disks) = frozen(1, &shared);
    let wrong = [
        shape(2, &disks),
        PrepareRequest {
            memory_mib: 128,
            ..shape(1, &disks)
        },
        shape(1, &disks[..1]),
    ];
    for shape in wrong {
        let mut shell = shell(&shape);
        let request = Request::Restore(RestoreRequest {
            disks: disks.clone(),
            ..Default::default()
        });
        let Reply::Failed(failure) = shell.ask(&request, &[&snapshot, &shared]) else {
            panic!("claimed {shape:?}");
        };
        assert_eq!(failure.fault, Fault::Caller, "{failure}");
        assert!(failure.message.contains("cannot hold"), "{failure}");
        shell.quit();
    }
    let mut unclaimed = shell(&shape(1, &disks));
    let Status { console, timings } = unclaimed.status();
    assert!(console.is_empty() && timings.prepared_ns.is_some() && timings.claimed_ns.is_none());
    unclaimed.quit();
}
