//! Differences: a guest restored from a base, frozen again, and restored over it.

use std::fs::File;
use std::time::Instant;

use thaw_snapshot::{PAGE_BYTES, PageRun, Snapshot, close_gaps};
use thaw_vmm_control::{Fault, Reply, Request, RestoreRequest, SaveForm, SaveRequest};

use crate::freeze::{all_cpus_tick, prepared};
use crate::guest::{disk_of, ext4};
use crate::monitor::Monitor;
use crate::rewind::wall_clock;

/// An open snapshot.
pub fn open(file: &File) -> Snapshot {
    Snapshot::from_file(file.try_clone().unwrap(), "test").unwrap()
}

fn open_over(base: &File, file: &File) -> Snapshot {
    let mut snapshot = open(file);
    snapshot.attach_base(open(base)).unwrap();
    snapshot
}

/// Pages in which two memories differ.
pub fn differing(one: &Snapshot, other: &Snapshot) -> Vec<PageRun> {
    const CHUNK: usize = 1 << 20;
    let readers = [one, other].map(|snapshot| snapshot.memory_reader().unwrap());
    let mut buffers = [vec![0; CHUNK], vec![0; CHUNK]];
    let mut runs: Vec<PageRun> = Vec::new();
    for offset in (0..readers[0].bytes()).step_by(CHUNK) {
        for (reader, buffer) in readers.iter().zip(&mut buffers) {
            reader.read_at(offset, buffer).unwrap();
        }
        let pages = buffers[0].chunks(4096).zip(buffers[1].chunks(4096));
        for (page, (one, other)) in (offset / PAGE_BYTES..).zip(pages) {
            match runs.last_mut() {
                _ if one == other => {}
                Some(last) if last.start + last.count == page => last.count += 1,
                _ => runs.push(PageRun {
                    start: page,
                    count: 1,
                }),
            }
        }
    }
    runs
}

/// The one page that KVM itself writes whenever the guest's register for its wall clock is set, as by a restore.
pub fn is_wall_clock(snapshot: &File, run: &PageRun) -> bool {
    (run.start, run.count) == (wall_clock(snapshot) / PAGE_BYTES, 1)
}

fn pages(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}

#[test]
fn a_difference_restores_what_a_whole_snapshot_of_the_same_machine_does() {
    let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
    let (mut monitor, disks) = prepared(2, &shared, &overlay);
    let base = monitor.freeze();
    monitor.quit();

    let mut function = Monitor::restore(&base, &disks, &[&shared]);
    function.done(&Request::Resume, &[]);
    assert_eq!(function.command("count 10"), "11");
    assert_eq!(function.command("put second layer"), "put");
    function.done(&Request::Pause, &[]);
    let began = Instant::now();
    let difference = function.save_as(SaveForm::Difference);
    let took = began.elapsed();
    let began = Instant::now();
    let whole = function.save();
    let took_whole = began.elapsed();
    function.quit();

    let (layered, alone) = (open_over(&base, &difference), open(&whole));
    layered.verify().unwrap();
    let mut memory = differing(&layered, &alone);
    memory.retain(|run| !is_wall_clock(&base, run));
    assert_eq!(memory, [], "memory");
    let changed = differing(&open(&base), &alone);
    let (own, all) = (layered.own_memory().unwrap(), alone.own_memory().unwrap());
    println!(
        "whole {} KiB in {took_whole:?}; difference {} KiB in {took:?}: {} pages in {} runs differ",
        all.stored_bytes() >> 10,
        own.stored_bytes() >> 10,
        pages(&changed),
        changed.len()
    );
    for runs_max in [8, 16, 32, 64, 128, 256, 512, 1024] {
        let stored = pages(&close_gaps(&changed, runs_max)) * PAGE_BYTES;
        println!("{runs_max:>5} runs: {} KiB", stored >> 10);
    }
    assert!(own.stored_bytes() < all.stored_bytes() / 2);

    let mut clone = Monitor::restore_over(&base, &difference, &disks, &[&shared]);
    clone.done(&Request::Resume, &[]);
    assert_eq!(clone.command("count 0"), "11");
    assert_eq!(clone.command("get second"), "layer");
    assert_eq!(clone.command("get before"), "frozen");
    assert_eq!(clone.command("sum"), "0");
    all_cpus_tick(&mut clone, 2);
    let mut whole_clone = Monitor::restore(&whole, &disks, &[&shared]);
    for (name, monitor) in [("whole", &mut whole_clone), ("difference", &mut clone)] {
        let timings = monitor.status().timings;
        let read = timings.decoded_ns.unwrap() - timings.claimed_ns.unwrap();
        let mapped = timings.memory_mapped_ns.unwrap() - timings.decoded_ns.unwrap();
        println!(
            "{name}: read in {} us, then mapped in {} us",
            read / 1000,
            mapped / 1000
        );
    }
    whole_clone.quit();
    clone.quit();
}

#[test]
fn a_machine_that_was_booted_has_nothing_to_differ_from() {
    let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
    let (mut monitor, disks) = prepared(1, &shared, &overlay);
    monitor.done(&Request::Pause, &[]);
    let request = Request::Save(SaveRequest {
        metadata: serde_json::json!({}),
        form: SaveForm::Difference,
    });
    let file = tempfile::tempfile().unwrap();
    let Reply::Failed(failed) = monitor.ask(&request, &[&file]) else {
        panic!("saved as a difference to nothing");
    };
    assert_eq!(failed.fault, Fault::Caller);
    assert!(
        failed.message.contains("not restored"),
        "{}",
        failed.message
    );
    // It is as before, and another base than its own is refused.
    let base = monitor.save();
    monitor.quit();
    let mut restored = Monitor::restore(&base, &disks, &[&shared]);
    let difference = restored.save_as(SaveForm::Difference);
    let mut stored = open(&difference).own_memory().unwrap().runs;
    stored.retain(|run| !is_wall_clock(&base, run));
    assert_eq!(stored, [], "nothing ran");
    restored.done(&Request::Resume, &[]);
    assert_eq!(restored.command("count 1"), "2");
    let other = restored.freeze();
    restored.quit();
    let mut monitor = Monitor::start();
    let request = Request::Restore(RestoreRequest {
        disks,
        has_base: true,
        ..Default::default()
    });
    let Reply::Failed(failed) = monitor.ask(&request, &[&difference, &other, &shared]) else {
        panic!("restored over a base that is not its own");
    };
    assert_eq!(failed.fault, Fault::Caller);
    assert!(failed.message.contains("base"), "{}", failed.message);
    monitor.quit();
}
