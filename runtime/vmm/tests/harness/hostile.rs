//! Guests that mean harm (`tests/guest/poke.rs`), and what becomes of their monitors and neighbours: nothing.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use thaw_vmm::devices::HEAP_BYTES_MAX;
use thaw_vmm_control::{Disk, ExitReason, Reply, Request, RestoreRequest};

use crate::guest::{disk_of, ext4};
use crate::monitor::{Monitor, copy_on_write, read_only, stored};
use crate::net::Slot;

/// How long a guest pokes when nobody says how long.
const SECONDS: u64 = 10;
/// How long a guest may take to end when its time is over: an emulated host is slow.
const PATIENCE_SECONDS: u64 = 90;
/// Guest memory of the test's machines, KiB: a mapping at least half as long is no other.
const GUEST_KIB: u64 = 256 * 1024;
/// What a monitor may hold more after its guest has done its worst, KiB: what devices may hold, and as much for the allocator and
/// for pages of code and stacks that were not touched before.
const GROWTH_KIB_MAX: u64 = 2 * HEAP_BYTES_MAX as u64 / 1024;

/// A guest with one of each device, frozen.
struct Frozen {
    snapshot: File,
    disks: Vec<Disk>,
    shared: File,
}

impl Frozen {
    fn new() -> Self {
        let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
        let disks = [
            (read_only("shared"), &shared),
            (copy_on_write("overlay"), &overlay),
        ];
        let slot = Slot::new();
        let mut monitor = Monitor::boot_with("vmlinux", 1, &disks, Some(&slot.tap));
        let snapshot = monitor.freeze();
        monitor.quit();
        let disks = vec![read_only("shared"), stored(&copy_on_write("overlay"))];
        Self {
            snapshot,
            disks,
            shared,
        }
    }

    fn running(&self, slot: &Slot) -> Monitor {
        let mut monitor = Monitor::start();
        let request = Request::Restore(RestoreRequest {
            disks: self.disks.clone(),
            resume: true,
            has_tap: true,
            ..Default::default()
        });
        monitor.done(&request, &[&self.snapshot, &self.shared, &slot.tap]);
        assert_eq!(monitor.command("ping 0"), "pong 0");
        monitor
    }
}

/// What a monitor holds without its guest's memory, KiB, and how many descriptors it has.
fn held(monitor: &Monitor) -> (u64, usize) {
    let maps = fs::read_to_string(monitor.proc().join("smaps")).unwrap();
    let field = |line: &str, name: &str| -> Option<u64> {
        let text = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
        text.parse().ok()
    };
    let (mut kib, mut guest_kib, mut is_guest) = (0, 0, false);
    for line in maps.lines() {
        if let Some(size) = field(line, "Size:") {
            is_guest = size >= GUEST_KIB / 2;
            guest_kib += if is_guest { size } else { 0 };
        }
        if let Some(resident) = field(line, "Rss:").filter(|_| !is_guest) {
            kib += resident;
        }
    }
    assert_eq!(
        guest_kib, GUEST_KIB,
        "guest memory is told apart from the rest"
    );
    // What statm says is the same, guest memory included.
    let statm = fs::read_to_string(monitor.proc().join("statm")).unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(
        pages * 4 >= kib / 2,
        "{pages} pages in all, {kib} kib without the guest's"
    );
    (
        kib,
        fs::read_dir(monitor.proc().join("fd")).unwrap().count(),
    )
}

/// Takes what the guest's devices say to the host, and answers with anything.
fn chat(monitor: &mut Monitor, number: u64) -> u64 {
    monitor.agent.set_nonblocking(true).unwrap();
    let (mut chunk, mut heard) = ([0; 64 * 1024], 0);
    while let Ok(count @ 1..) = monitor.agent.read(&mut chunk) {
        heard += count as u64;
    }
    // A full socket takes less, and one that its guest has closed nothing.
    let _ = monitor.agent.write(&number.to_le_bytes().repeat(300));
    heard
}

/// Guests that break their devices, one after another.
struct Wild {
    present: Option<Monitor>,
    slot: Slot,
    seed: u64,
    ends: Vec<ExitReason>,
}

impl Wild {
    /// Begins one, or looks at the one that there is: how it ends is its own fault, and its monitor is well.
    fn look(&mut self, frozen: &Frozen, is_over: bool) {
        self.slot.chat();
        let Some(mut monitor) = self.present.take() else {
            if !is_over {
                self.seed += 1;
                let mut monitor = frozen.running(&self.slot);
                monitor.tell(&format!("poke wild {PATIENCE_SECONDS} {}", self.seed));
                self.present = Some(monitor);
            }
            return;
        };
        chat(&mut monitor, self.seed);
        let Some(exit) = monitor.has_ended() else {
            if is_over {
                // In the middle of whatever it does.
                monitor.quit();
            } else {
                self.present = Some(monitor);
            }
            return;
        };
        assert_ne!(exit.reason, ExitReason::HostFault, "{}", exit.detail);
        let refused = monitor.ask(&Request::Resume, &[]);
        assert!(
            matches!(refused, Reply::Failed(_)),
            "an ended machine runs again"
        );
        self.ends.push(exit.reason);
        monitor.quit();
    }
}

#[test]
fn a_hostile_guest_harms_neither_its_monitor_nor_its_neighbours() {
    let seconds = std::env::var("THAW_POKE_SECONDS").map_or(SECONDS, |text| text.parse().unwrap());
    let seed = std::env::var("THAW_POKE_SEED").map_or(1, |text| text.parse().unwrap());
    let frozen = Frozen::new();
    let slots = [Slot::new(), Slot::new()];
    let [mut neighbour, mut hostile] = slots.each_ref().map(|slot| frozen.running(slot));
    let (kib_before, fds_before) = held(&hostile);
    hostile.tell(&format!("poke gentle {seconds} {seed}"));
    let until = Instant::now() + Duration::from_secs(seconds);
    let patience = until + Duration::from_secs(PATIENCE_SECONDS);
    let (mut rounds, mut heard, mut datagrams, mut kib_most) = (0, 0, 0, 0);
    let mut wild = Wild {
        present: None,
        slot: Slot::new(),
        seed,
        ends: Vec::new(),
    };
    let said = loop {
        rounds += 1;
        let answer = neighbour.command(&format!("ping {rounds}"));
        assert_eq!(answer, format!("pong {rounds}"));
        heard += chat(&mut hostile, rounds);
        datagrams += slots[1].chat();
        let (kib, fds) = held(&hostile);
        kib_most = kib_most.max(kib);
        assert!(
            kib <= kib_before + GROWTH_KIB_MAX,
            "grown from {kib_before} to {kib} kib"
        );
        assert_eq!(fds, fds_before, "descriptors");
        if let Some(exit) = hostile.has_ended() {
            panic!("{:?}: {}", exit.reason, exit.detail);
        }
        wild.look(&frozen, Instant::now() > until);
        let console = hostile.status().console;
        let said = console.rsplit_once("\npoked ").map(|(_, said)| said);
        if let Some(said) = said.filter(|said| said.contains('\n') && wild.present.is_none()) {
            break said.trim().to_owned();
        }
        assert!(
            Instant::now() < patience,
            "the guest does not end; {}; its console: {:?}",
            if wild.present.is_some() {
                "nor a wild one"
            } else {
                "all wild ones did"
            },
            console.chars().rev().take(300).collect::<String>()
        );
        std::thread::sleep(Duration::from_millis(50));
    };
    println!(
        "poked {said}; {heard} bytes and {datagrams} datagrams heard; monitor {kib_before} kib before, {kib_most} at most; \
         {fds_before} descriptors; neighbour answered {rounds} times; wild guests ended: {:?}",
        wild.ends
    );
    let answered = said.split_once("answered: ").unwrap().1;
    let devices: Vec<&str> = answered.split(' ').collect();
    assert_eq!(devices.len(), 5, "two disks, vsock, rng, network");
    for device in devices {
        let counts = device.split_once('=').unwrap().1.split('/');
        let idle: Vec<&str> = counts.filter(|count| *count == "0").collect();
        // The socket's event queue is never used.
        let idle_expected = usize::from(device.starts_with("19="));
        assert_eq!(idle.len(), idle_expected, "a ring was not served: {said}");
    }
    assert!(datagrams > 0, "no frame of its rings left the guest");
    assert!(
        wild.ends.contains(&ExitReason::GuestFault),
        "nothing broke: {:?}",
        wild.ends
    );
    // It obeys as any monitor does: its guest is stopped, saved as it is, and gone.
    let asked = Instant::now();
    hostile.done(&Request::Pause, &[]);
    let paused = asked.elapsed();
    hostile.save();
    println!(
        "paused in {paused:.1?}, saved {:.1?} later",
        asked.elapsed() - paused
    );
    hostile.quit();
    neighbour.quit();
}
