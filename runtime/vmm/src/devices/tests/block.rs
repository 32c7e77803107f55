//! Disks: requests, copy-on-write against a model, refusals.

use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{
    COW, Guest, INDIRECT, NEXT, Part, READ_ONLY, Ring, VERSION_1, WRITE, config, memory, pattern,
};
use crate::devices::Devices;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// Status and data of a request that reads.
fn request_in(
    guest: &Guest,
    ring: &mut Ring,
    kind: u32,
    sector: u64,
    length: usize,
) -> (u8, Vec<u8>) {
    let head = ring.submit(
        guest,
        &[
            Part::Out(&header(kind, sector)),
            Part::In(length),
            Part::In(1),
        ],
    );
    guest.run();
    assert_eq!(
        ring.take_used(&guest.memory)
            .expect("the request is answered")
            .0,
        head
    );
    (
        ring.part(&guest.memory, head, 2, 1)[0],
        ring.part(&guest.memory, head, 1, length),
    )
}

/// Status of a request that writes `data`, in two buffers.
fn request_out(guest: &Guest, ring: &mut Ring, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let header = header(kind, sector);
    let (first, second) = data.split_at(data.len() / 3);
    let parts = [
        Part::Out(&header),
        Part::Out(first),
        Part::Out(second),
        Part::In(1),
    ];
    let head = ring.submit(guest, &parts);
    guest.run();
    let used = ring.take_used(&guest.memory);
    assert_eq!(used.expect("the request is answered").0, head);
    ring.part(&guest.memory, head, 3, 1)[0]
}

#[test]
fn configuration_tells_capacity_and_limits() {
    let guest = Guest::with_two_disks();
    assert_eq!(guest.read(COW, 0x100), 64);
    assert_eq!(guest.read(COW, 0x114), 512);
    let mut wide = [0; 8];
    guest
        .devices
        .mmio_read(guest.address(COW, 0x100), &mut wide);
    assert_eq!(u64::from_le_bytes(wide), 64);
    assert_eq!(guest.read(COW, 0x1fc), 0);
}

#[test]
fn read_only_disk_reads_and_refuses_writes() {
    let guest = Guest::with_two_disks();
    let mut ring = guest.bring_up(READ_ONLY, VERSION_1 | 1 << 5, 1).remove(0);
    let content = pattern(64);
    assert_eq!(
        request_in(&guest, &mut ring, IN, 3, 1024),
        (0, content[1536..2560].to_vec())
    );
    assert_eq!(request_out(&guest, &mut ring, OUT, 3, &[1; 512]), 1);
    assert_eq!(
        request_in(&guest, &mut ring, IN, 3, 512).1,
        content[1536..2048]
    );
}

#[test]
fn identity_flush_and_unknown_requests_are_answered() {
    let guest = Guest::with_two_disks();
    let mut ring = guest.bring_up(COW, VERSION_1, 1).remove(0);
    let (status, id) = request_in(&guest, &mut ring, GET_ID, 0, 20);
    assert_eq!((status, &id[..12]), (0, &b"thaw-disk-0\0"[..]));
    assert_eq!(request_in(&guest, &mut ring, GET_ID, 0, 19).0, 1);
    assert_eq!(request_out(&guest, &mut ring, FLUSH, 0, &[0; 8]), 0);
    assert_eq!(request_out(&guest, &mut ring, 11, 0, &[0; 16]), 2);
    assert_eq!(request_out(&guest, &mut ring, 0xffff_ffff, 0, &[0; 16]), 2);
}

#[test]
fn requests_beyond_the_disk_or_of_broken_sectors_fail() {
    let guest = Guest::with_two_disks();
    let mut ring = guest.bring_up(COW, VERSION_1, 1).remove(0);
    for (sector, length) in [
        (64, 512),
        (63, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 511),
    ] {
        assert_eq!(
            request_in(&guest, &mut ring, IN, sector, length).0,
            1,
            "{sector} {length}"
        );
        assert_eq!(
            request_out(&guest, &mut ring, OUT, sector, &vec![0; length]),
            1
        );
    }
    assert!(guest.devices.disk_written_runs(COW).is_empty());
}

#[test]
fn indirect_chain_is_served() {
    let guest = Guest::with_two_disks();
    let mut ring = guest.bring_up(COW, VERSION_1 | INDIRECT, 1).remove(0);
    let (table, buffer) = (0x8_0000, 0x8_1000);
    guest
        .memory
        .write_slice(&header(IN, 1), GuestAddress(buffer))
        .unwrap();
    let mut indirect = ring.clone();
    indirect.descriptors = table;
    indirect.set_descriptor(&guest.memory, 0, (buffer, 16, NEXT, 1));
    indirect.set_descriptor(&guest.memory, 1, (buffer + 512, 512, WRITE | NEXT, 2));
    indirect.set_descriptor(&guest.memory, 2, (buffer + 2048, 1, WRITE, 0));
    ring.set_descriptor(&guest.memory, 0, (table, 48, 4, 0));
    ring.publish(&guest.memory, 0);
    guest.write(COW, 0x50, 0);
    guest.run();
    assert_eq!(ring.take_used(&guest.memory), Some((0, 513)));
    let mut data = [0; 512];
    guest
        .memory
        .read_slice(&mut data, GuestAddress(buffer + 512))
        .unwrap();
    assert_eq!(data[..], pattern(64)[512..1024]);
}

#[test]
fn base_never_changes_and_merged_content_is_told() {
    let content = pattern(64);
    let guest = Guest::new(&[&content]);
    let mut ring = guest.bring_up(COW, VERSION_1, 1).remove(0);
    assert_eq!(request_out(&guest, &mut ring, OUT, 9, &[0x5a; 512]), 0);
    assert_eq!(guest.devices.disk_written_runs(COW), vec![4096..8192]);
    let mut merged = vec![0; content.len()];
    guest.devices.disk_read_at(COW, 0, &mut merged).unwrap();
    let mut expected = content.clone();
    expected[9 * 512..10 * 512].fill(0x5a);
    assert!(merged == expected);
    assert!(guest.devices.disk_read_at(COW, 1, &mut merged).is_err());
    assert!(guest.devices.disk_read_at(7, 0, &mut merged).is_err());
    // The next machine on the merged content sees the same disk.
    let thawed = guest.clone_by_snapshot(&[&merged]);
    thawed.devices.resume();
    assert_eq!(
        request_in(&thawed, &mut ring, IN, 9, 512),
        (0, vec![0x5a; 512])
    );
    assert!(thawed.devices.disk_written_runs(COW).is_empty());
}

#[test]
fn failing_base_file_is_an_error_of_the_request_alone() {
    let memory = memory();
    let (host, agent) = UnixStream::pair().unwrap();
    let content = pattern(64);
    let config = config(&[&content], agent);
    let base = config.disks[0].file.try_clone().unwrap();
    let devices = Devices::new(config, memory.clone()).unwrap();
    let guest = Guest {
        devices,
        memory,
        host,
    };
    let mut ring = guest.bring_up(COW, VERSION_1, 1).remove(0);
    base.set_len(1536 + 4096).unwrap();
    assert_eq!(request_in(&guest, &mut ring, IN, 8, 512).0, 1);
    assert_eq!(
        request_out(&guest, &mut ring, OUT, 9, &[1; 512]),
        1,
        "its block cannot be copied"
    );
    assert_eq!(
        request_out(&guest, &mut ring, OUT, 16, &[1; 4096]),
        0,
        "a whole block needs no base"
    );
    assert_eq!(
        request_in(&guest, &mut ring, IN, 16, 512),
        (0, vec![1; 512])
    );
    assert!(!guest.needs_reset(COW));
}

#[test]
fn malformed_chains_break_the_device_until_reset() {
    let good = (0x8_0000, 16, NEXT, 1);
    let status = (0x8_1000, 1, WRITE, 0);
    let cases: [(&str, Vec<Descriptor>); 9] = [
        (
            "cut after the status",
            vec![good, (0x8_1000, 513, WRITE | NEXT, 999)],
        ),
        ("loop", vec![(0x8_0000, 16, NEXT, 0)]),
        ("next beyond the table", vec![(0x8_0000, 16, NEXT, 999)]),
        ("no status", vec![(0x8_0000, 16, 0, 0)]),
        ("short header", vec![(0x8_0000, 15, NEXT, 1), status]),
        ("outside memory", vec![(1 << 40, 16, NEXT, 1), status]),
        (
            "address overflow",
            vec![good, (u64::MAX - 3, 512, WRITE | NEXT, 2), status],
        ),
        (
            "readable after writable",
            vec![status.with_next(1), (0x8_0000, 16, 0, 0)],
        ),
        ("nested indirect", vec![(0, 0, 4, 0)]),
    ];
    for (name, descriptors) in cases {
        let guest = Guest::with_two_disks();
        let mut ring = guest.bring_up(COW, VERSION_1, 1).remove(0);
        for (index, descriptor) in (0..).zip(descriptors) {
            ring.set_descriptor(&guest.memory, index, descriptor);
        }
        ring.publish(&guest.memory, 0);
        guest.write(COW, 0x50, 0);
        guest.run();
        assert!(guest.needs_reset(COW), "{name}");
        assert_eq!(
            guest.read(COW, 0x60) & 2,
            2,
            "{name}: a configuration interrupt tells of it"
        );
        // The other disk is unharmed, and a reset repairs this one.
        let mut other = guest.bring_up(READ_ONLY, VERSION_1, 1).remove(0);
        assert_eq!(request_in(&guest, &mut other, IN, 0, 512).0, 0, "{name}");
        let mut ring = guest.bring_up(COW, VERSION_1, 1).remove(0);
        guest
            .memory
            .write_obj(0u32, GuestAddress(ring.used))
            .unwrap();
        assert_eq!(request_in_fresh(&guest, &mut ring), 0, "{name}");
    }
}

/// A request on a ring whose used index was cleared by hand.
fn request_in_fresh(guest: &Guest, ring: &mut Ring) -> u8 {
    guest
        .memory
        .write_obj(0u32, GuestAddress(ring.available))
        .unwrap();
    request_in(guest, ring, IN, 0, 512).0
}

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

trait WithNext {
    fn with_next(self, next: u16) -> Self;
}

impl WithNext for Descriptor {
    fn with_next(self, next: u16) -> Self {
        (self.0, self.1, self.2 | NEXT, next)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        sector: u64,
        sectors: usize,
        fill: u8,
    },
    Read {
        sector: u64,
        sectors: usize,
    },
}

fn step(disk_sectors: u64) -> impl Strategy<Value = Step> {
    let place = (0..disk_sectors, 1usize..8);
    prop_oneof![
        (place.clone(), any::<u8>()).prop_map(|((sector, sectors), fill)| Step::Write {
            sector,
            sectors,
            fill
        }),
        place.prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    // 61 sectors: the last copy-on-write block is cut short.
    #[test]
    fn copy_on_write_disk_behaves_as_an_array(steps in prop::collection::vec(step(61), 1..40)) {
        let mut model = pattern(61);
        let base = model.clone();
        let guest = Guest::new(&[&base]);
        let mut ring = guest.bring_up(COW, VERSION_1, 1).remove(0);
        for step in steps {
            match step {
                Step::Write { sector, sectors, fill } => {
                    let data: Vec<u8> =
                        (0..sectors * 512).map(|at| fill.wrapping_add(at as u8)).collect();
                    let range = sector as usize * 512..(sector as usize + sectors) * 512;
                    let fits = range.end <= model.len();
                    prop_assert_eq!(request_out(&guest, &mut ring, OUT, sector, &data), u8::from(!fits));
                    if fits {
                        model[range].copy_from_slice(&data);
                    }
                }
                Step::Read { sector, sectors } => {
                    let range = sector as usize * 512..(sector as usize + sectors) * 512;
                    let (status, data) = request_in(&guest, &mut ring, IN, sector, sectors * 512);
                    prop_assert_eq!(status, u8::from(range.end > model.len()));
                    if status == 0 {
                        prop_assert!(data == model[range]);
                    }
                }
            }
        }
        let mut merged = vec![0; model.len()];
        guest.devices.disk_read_at(COW, 0, &mut merged).unwrap();
        prop_assert!(merged == model);
        let runs = guest.devices.disk_written_runs(COW);
        for (at, (new, old)) in model.iter().zip(&base).enumerate() {
            let written = runs.iter().any(|run| run.contains(&(at as u64)));
            prop_assert!(written || new == old, "byte {} changed outside the runs", at);
        }
    }
}
