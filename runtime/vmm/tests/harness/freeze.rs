//! Saving, restoring, cloning.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use thaw_snapshot::{CpuRecord, SectionKind, Snapshot, Writer};
use thaw_vmm_control::{Disk, Fault, Reply, Request, RestoreRequest};

use crate::guest::{disk_of, ext4};
use crate::monitor::{Monitor, copy_on_write, read_only, stored};

pub fn clocks(monitor: &mut Monitor) -> [u64; 3] {
    let answer = monitor.command("clocks");
    let numbers: Vec<u64> = answer
        .split(' ')
        .map(|word| word.parse().unwrap())
        .collect();
    numbers.try_into().unwrap()
}

fn ticks(monitor: &mut Monitor) -> Vec<u64> {
    monitor
        .command("ticks")
        .split(' ')
        .map(|word| word.parse().unwrap())
        .collect()
}

/// Timers fire on every CPU.
pub fn all_cpus_tick(monitor: &mut Monitor, vcpu_count: usize) {
    let before = ticks(monitor);
    assert_eq!(before.len(), vcpu_count);
    for _ in 0..1000 {
        let now = ticks(monitor);
        if now.iter().zip(&before).all(|(now, before)| now > before) {
            return;
        }
    }
    panic!(
        "ticks stand still: {before:?} {:?}: {}",
        ticks(monitor),
        monitor.status().console
    );
}

fn report(name: &str, monitor: &mut Monitor) {
    let timings = monitor.status().timings;
    let between = |from: Option<u64>, to: Option<u64>| {
        to.zip(from)
            .map_or(0, |(to, from)| to.saturating_sub(from) / 1000)
    };
    println!(
        "{name}: vm made {} us, memory mapped {} us, state set {} us | resume to first instruction {} us, to agent byte {} us",
        between(timings.claimed_ns, timings.vm_made_ns),
        between(timings.vm_made_ns, timings.memory_mapped_ns),
        between(timings.memory_mapped_ns, timings.state_set_ns),
        between(timings.resume_ns, timings.first_instruction_ns),
        between(timings.first_instruction_ns, timings.first_agent_byte_ns),
    );
}

/// A running guest with 1 MiB of known memory, a counter at 1 and a file system with one file.
pub fn prepared(vcpu_count: u8, shared: &File, overlay: &File) -> (Monitor, Vec<Disk>) {
    let disks = [
        (read_only("shared"), shared),
        (copy_on_write("overlay"), overlay),
    ];
    let mut monitor = Monitor::boot("vmlinux", vcpu_count, &disks);
    assert_eq!(monitor.command("fill 1"), (1 << 20).to_string());
    assert_eq!(monitor.command("count 1"), "1");
    assert_eq!(monitor.command("mount /dev/vdb"), "mounted");
    assert_eq!(monitor.command("put before frozen"), "put");
    (
        monitor,
        vec![read_only("shared"), stored(&copy_on_write("overlay"))],
    )
}

fn continues(vcpu_count: u8) {
    let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
    let (mut monitor, disks) = prepared(vcpu_count, &shared, &overlay);
    all_cpus_tick(&mut monitor, vcpu_count.into());
    let awake = Instant::now();
    let before = clocks(&mut monitor);
    monitor.done(&Request::Pause, &[]);
    let mut awake = awake.elapsed();
    let snapshot = monitor.save();
    monitor.quit();
    Snapshot::from_file(snapshot.try_clone().unwrap(), "test")
        .unwrap()
        .verify()
        .unwrap();

    // Real time passes; the guest's does not.
    thread::sleep(Duration::from_secs(3));
    let mut restored = Monitor::restore(&snapshot, &disks, &[&shared]);
    // The request lies in the channel before the guest runs.
    restored.tell("clocks");
    let resumed = Instant::now();
    restored.done(&Request::Resume, &[]);
    let answer = restored.hear();
    awake += resumed.elapsed();
    report(&format!("restore with {vcpu_count} vcpus"), &mut restored);
    let after: Vec<u64> = answer
        .split(' ')
        .map(|word| word.parse().unwrap())
        .collect();
    assert!(
        after[0] > before[0] && after[2] > before[2],
        "time went back: {before:?} {after:?}"
    );
    // Capturing the clocks takes a moment after the pause that the guest sees pass; the seconds it was frozen for do not.
    let passed = Duration::from_nanos(after[0] - before[0]);
    assert!(
        passed < awake + Duration::from_secs(1),
        "{passed:?} passed in a guest that was awake for {awake:?}"
    );
    assert_eq!(restored.command("sum"), "0", "memory differs");
    assert_eq!(restored.command("count 1"), "2");
    assert_eq!(restored.command("get before"), "frozen");
    assert_eq!(restored.command("put after thawed"), "put");
    assert_eq!(restored.command("get after"), "thawed");
    assert_eq!(restored.command("read /dev/vda 8192 4"), "rrrr");
    assert_eq!(restored.command("random"), "8");
    assert_eq!(restored.command("cpus"), vcpu_count.to_string());
    all_cpus_tick(&mut restored, vcpu_count.into());
    restored.quit();
}

#[test]
fn a_restored_guest_continues_with_one_vcpu() {
    continues(1);
}

#[test]
fn a_restored_guest_continues_with_two_vcpus() {
    continues(2);
}

#[test]
fn a_restored_guest_continues_with_four_vcpus() {
    continues(4);
}

#[test]
fn a_saved_machine_goes_on_where_it_was() {
    let mut monitor = Monitor::boot("vmlinux", 2, &[]);
    let _snapshot = monitor.freeze();
    monitor.done(&Request::Resume, &[]);
    assert_eq!(monitor.command("count 5"), "5");
    all_cpus_tick(&mut monitor, 2);
    monitor.quit();
}

#[test]
fn five_clones_at_once_go_their_own_ways() {
    let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
    let (mut monitor, disks) = prepared(2, &shared, &overlay);
    let snapshot = monitor.freeze();
    monitor.quit();
    let mut clones: Vec<Monitor> = (0..5)
        .map(|_| Monitor::restore(&snapshot, &disks, &[&shared]))
        .collect();
    for clone in &mut clones {
        clone.done(&Request::Resume, &[]);
    }
    for (number, clone) in clones.iter_mut().enumerate() {
        assert_eq!(
            clone.command(&format!("count {number}")),
            (1 + number).to_string()
        );
        assert_eq!(clone.command(&format!("put mine clone{number}")), "put");
    }
    for (number, clone) in clones.iter_mut().enumerate() {
        assert_eq!(clone.command("count 0"), (1 + number).to_string());
        assert_eq!(clone.command("get mine"), format!("clone{number}"));
        assert_eq!(clone.command("sum"), "0");
        report(&format!("clone {number}"), clone);
    }
    clones.into_iter().for_each(Monitor::quit);
}

#[test]
fn a_snapshot_of_a_restored_guest_is_as_good() {
    let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
    let (mut monitor, disks) = prepared(2, &shared, &overlay);
    let first = monitor.freeze();
    monitor.quit();
    let mut second_generation = Monitor::restore(&first, &disks, &[&shared]);
    // Saved before it ever ran: nothing of the first snapshot may be lost on the way.
    let untouched = second_generation.save();
    second_generation.done(&Request::Resume, &[]);
    assert_eq!(second_generation.command("count 10"), "11");
    assert_eq!(second_generation.command("put second generation"), "put");
    let second = second_generation.freeze();
    second_generation.quit();

    let mut third = Monitor::restore(&second, &disks, &[&shared]);
    third.done(&Request::Resume, &[]);
    assert_eq!(third.command("count 0"), "11");
    assert_eq!(third.command("get second"), "generation");
    assert_eq!(third.command("get before"), "frozen");
    assert_eq!(third.command("sum"), "0");
    all_cpus_tick(&mut third, 2);
    third.quit();

    let mut sibling = Monitor::restore(&untouched, &disks, &[&shared]);
    sibling.done(&Request::Resume, &[]);
    assert_eq!(sibling.command("count 0"), "1");
    assert_eq!(sibling.command("sum"), "0");
    sibling.quit();
}

/// Byte `index` of what the guest's `bytes` command sends.
fn pattern(index: u64) -> u8 {
    (index.wrapping_mul(2_654_435_761) >> 16).to_le_bytes()[0]
}

/// Waits until the monitor has taken all that was written to the channel.
fn until_taken(agent: &UnixStream) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut waiting: libc::c_int = 0;
        // SAFETY: TIOCOUTQ writes one int, which lives here.
        let result = unsafe { libc::ioctl(agent.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        if waiting == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{waiting} bytes are not taken");
        thread::yield_now();
    }
}

#[test]
fn a_stream_that_was_cut_by_a_save_goes_on_in_the_clone() {
    const TOTAL: usize = 4 << 20;
    let mut monitor = Monitor::boot("vmlinux", 2, &[]);
    monitor.tell(&format!("bytes {TOTAL}"));
    let mut received = vec![0; 300_000];
    monitor.agent.read_exact(&mut received).unwrap();
    // The other way too: a command and a part of what it asks for, while the guest is still busy with the first.
    let text = vec![b'e'; 100_000];
    monitor.tell(&format!("echo {}", text.len()));
    monitor.agent.write_all(&text[..60_000]).unwrap();
    until_taken(&monitor.agent);
    let snapshot = monitor.freeze();
    let mut agent = monitor.agent.try_clone().unwrap();
    monitor.quit();
    // What the first machine had handed over before it was saved.
    agent.read_to_end(&mut received).unwrap();
    assert!(received.len() < TOTAL, "nothing was left in flight");
    for own in *b"ab" {
        let mut restored = Monitor::restore(&snapshot, &[], &[]);
        restored.done(&Request::Resume, &[]);
        let mut rest = vec![0; TOTAL - received.len()];
        restored.agent.read_exact(&mut rest).unwrap();
        let stream = received.iter().chain(&rest).enumerate();
        let wrong = stream
            .clone()
            .find(|(index, byte)| **byte != pattern(*index as u64));
        assert_eq!(wrong, None);
        assert_eq!(restored.hear(), "");
        // What the guest had got before the freeze, then what this clone alone is told.
        let own = vec![own; 40_000];
        restored.agent.write_all(&own).unwrap();
        let mut echoed = vec![0; text.len()];
        restored.agent.read_exact(&mut echoed).unwrap();
        assert!(echoed[..60_000] == text[..60_000] && echoed[60_000..] == own[..]);
        assert_eq!(restored.hear(), "");
        assert_eq!(restored.command("ping own"), "pong own");
        restored.quit();
    }
}

/// A copy of a snapshot with another CPU record.
fn with_cpu(snapshot: &File, edit: impl FnOnce(&mut CpuRecord)) -> File {
    let old = Snapshot::from_file(snapshot.try_clone().unwrap(), "test").unwrap();
    let mut cpu = old.cpu().unwrap();
    edit(&mut cpu);
    let file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(file.try_clone().unwrap());
    writer.metadata(&old.metadata().unwrap()).unwrap();
    writer.cpu(&cpu).unwrap();
    writer
        .section(
            SectionKind::Machine,
            &old.section(SectionKind::Machine).unwrap(),
        )
        .unwrap();
    let memory = old.memory().unwrap();
    let mut source = Pages {
        file: snapshot,
        offset: memory.offset,
    };
    writer
        .sparse_section(SectionKind::Memory, memory.length, &mut source)
        .unwrap();
    writer.finish().unwrap();
    file
}

struct Pages<'a> {
    file: &'a File,
    offset: u64,
}

impl thaw_snapshot::PageSource for Pages<'_> {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(buffer, self.offset + offset)
    }

    fn next_data(&mut self, offset: u64) -> std::io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}

fn refusal(snapshot: &File, disks: &[Disk], files: &[&File]) -> (String, Fault) {
    let mut monitor = Monitor::start();
    let all: Vec<&File> = [snapshot]
        .into_iter()
        .chain(files.iter().copied())
        .collect();
    let request = Request::Restore(RestoreRequest {
        disks: disks.to_vec(),
        ..Default::default()
    });
    let Reply::Failed(failure) = monitor.ask(&request, &all) else {
        panic!("restored")
    };
    monitor.quit();
    (failure.message, failure.fault)
}

#[test]
fn a_snapshot_that_does_not_fit_host_or_request_is_refused() {
    let mut monitor = Monitor::boot("vmlinux", 1, &[]);
    let snapshot = monitor.freeze();
    monitor.quit();

    let other_cpu = with_cpu(&snapshot, |cpu| {
        // AVX-512 VP2INTERSECT: no processor that this runs on has it.
        cpu.leaves
            .iter_mut()
            .filter(|leaf| (leaf.function, leaf.index) == (7, 0))
            .for_each(|leaf| leaf.edx |= 1 << 8);
    });
    let (message, fault) = refusal(&other_cpu, &[], &[]);
    assert!(message.contains("lacks"), "{message}");
    assert_eq!(fault, Fault::Caller);

    let other_vendor = with_cpu(&snapshot, |cpu| cpu.vendor = "GenuineThaw".into());
    assert!(refusal(&other_vendor, &[], &[]).0.contains("GenuineThaw"));

    let extra_disk = disk_of(0, 4096);
    let (message, fault) = refusal(&snapshot, &[read_only("extra")], &[&extra_disk]);
    assert!(message.contains("disks"), "{message}");
    assert_eq!(fault, Fault::Caller);

    let no_snapshot = disk_of(7, 8192);
    assert_eq!(refusal(&no_snapshot, &[], &[]).1, Fault::Caller);

    let same = with_cpu(&snapshot, |_| {});
    let mut restored = Monitor::restore(&same, &[], &[]);
    restored.done(&Request::Resume, &[]);
    assert_eq!(restored.command("ping x"), "pong x");
    restored.quit();
}
