//! Arithmetic on numbers that a guest chooses, tried with all of them, or with all that lie near an edge.

use vm_memory::{Bytes, GuestAddress};

use super::driver::{EVENT_IDX, GUEST_CID, Guest, RNG, VERSION_1, memory_of};
use crate::devices::registers::{Effect, Identity, QueueRegisters, Registers};
use crate::devices::state::{ChannelStateV1, ConnectionStateV1};
use crate::devices::virtqueue::VirtQueue;
use crate::devices::vsock::{Channel, packet::OP_RW};
use crate::memory::GuestMemoryMmap;

/// Every size that a queue of ours can have.
const SIZES: [u16; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const MEMORY_BYTES: u64 = 0x1_0000;
const WRITE: u16 = 2;

fn queue(memory: &GuestMemoryMmap, size: u16, position: u16, event_idx: bool) -> VirtQueue {
    let registers = QueueRegisters {
        size,
        ready: true,
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
    };
    VirtQueue::new(0, registers, event_idx, position, memory).unwrap()
}

fn describe(memory: &GuestMemoryMmap, index: u16, address: u64, length: u32) {
    let place = DESCRIPTORS + 16 * u64::from(index);
    memory.write_obj(address, GuestAddress(place)).unwrap();
    let rest = u64::from(length) | u64::from(WRITE) << 32;
    memory.write_obj(rest, GuestAddress(place + 8)).unwrap();
}

/// A ring in which entry n names descriptor n, each a buffer of n bytes.
fn ring_of(size: u16) -> GuestMemoryMmap {
    let memory = memory_of(MEMORY_BYTES as usize);
    for index in 0..size {
        describe(&memory, index, 0x8000, u32::from(index));
        let entry = AVAILABLE + 4 + 2 * u64::from(index);
        memory.write_obj(index, GuestAddress(entry)).unwrap();
    }
    memory
}

/// Takes one chain of a queue at `position` whose driver has come to `available`, and gives it back.
fn take_one(memory: &GuestMemoryMmap, size: u16, position: u16, available: u16) {
    memory
        .write_obj(available, GuestAddress(AVAILABLE + 2))
        .unwrap();
    let mut queue = queue(memory, size, position, false);
    let waiting = available.wrapping_sub(position);
    match queue.pop(memory) {
        Ok(None) => assert_eq!(waiting, 0),
        Ok(Some(chain)) => {
            assert!((1..=size).contains(&waiting), "{waiting} of {size} wait");
            let head = position % size;
            assert_eq!(chain.writable.length(), usize::from(head));
            queue.complete(memory, &chain, 7).unwrap();
            let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
            assert_eq!(used, position.wrapping_add(1));
            let slot = GuestAddress(USED + 4 + 8 * u64::from(head));
            let element: u64 = memory.read_obj(slot).unwrap();
            assert_eq!(element, u64::from(head) | 7 << 32);
        }
        Err(_) => assert!(waiting > size, "{waiting} of {size} wait, {position}"),
    }
}

#[test]
fn a_queue_takes_what_waits_and_no_more_at_every_index() {
    for size in SIZES {
        let memory = ring_of(size);
        for position in 0..=u16::MAX {
            for waiting in [0, 1, size, size + 1] {
                take_one(&memory, size, position, position.wrapping_add(waiting));
            }
        }
        for position in [0, 1, 0x7fff, 0xffff] {
            for available in 0..=u16::MAX {
                take_one(&memory, size, position, available);
            }
        }
    }
}

/// virtio 1.2, 2.7.7.2: an interrupt is wanted when the used index passes `used_event`.
#[test]
fn an_interrupt_is_sent_exactly_when_the_index_passes_the_event() {
    let size = 4;
    let memory = ring_of(size);
    for position in [0u16, 0x7ffe, 0xfffd] {
        for used_event in 0..=u16::MAX {
            for count in 1..=size {
                let available = position.wrapping_add(count);
                memory
                    .write_obj(available, GuestAddress(AVAILABLE + 2))
                    .unwrap();
                let event = GuestAddress(AVAILABLE + 4 + 2 * u64::from(size));
                memory.write_obj(used_event, event).unwrap();
                let mut queue = queue(&memory, size, position, true);
                let mut passed = false;
                for nth in 0..count {
                    let chain = queue.pop(&memory).unwrap().expect("another waits");
                    passed |= position.wrapping_add(nth) == used_event;
                    queue.complete(&memory, &chain, 0).unwrap();
                }
                assert_eq!(queue.take_interrupt(&memory).unwrap(), passed);
            }
        }
    }
}

#[test]
fn a_buffer_is_taken_exactly_if_it_lies_in_memory() {
    // Memory as a guest above 3 GiB has it: with a hole.
    let (hole, top) = (MEMORY_BYTES, 1 << 32);
    let ranges = [
        (GuestAddress(0), hole as usize),
        (GuestAddress(top), 0x4000),
    ];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let end = top + 0x4000;
    let near = |edge: u64| (0..=40).map(move |off| edge.wrapping_sub(20).wrapping_add(off));
    let edges = [hole, top, end, 0, 1 << 63];
    let lengths = (0..=40).chain([0x4000, 0x4001, 1 << 31, u32::MAX - 1, u32::MAX]);
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
    let mut taken = 0;
    for length in lengths {
        for address in edges.into_iter().flat_map(near) {
            describe(&memory, 0, address, length);
            let is_in = address
                .checked_add(u64::from(length))
                .is_some_and(|last| last <= hole || (address >= top && last <= end));
            let result = queue(&memory, 1, 0, false).pop(&memory);
            assert_eq!(
                result.is_ok(),
                is_in || length == 0,
                "{length} bytes at {address:#x}"
            );
            taken += u32::from(is_in);
        }
    }
    assert!(taken > 100, "{taken}");
}

#[test]
fn rings_are_accepted_exactly_if_they_lie_in_memory_and_are_aligned() {
    let memory = memory_of(MEMORY_BYTES as usize);
    for size in SIZES {
        let bytes = u64::from(size);
        let tables = [(16, 16 * bytes), (2, 6 + 2 * bytes), (4, 6 + 8 * bytes)];
        for (which, (alignment, length)) in tables.into_iter().enumerate() {
            let last = MEMORY_BYTES - length;
            let near =
                (last.saturating_sub(40)..=MEMORY_BYTES + 40).chain(u64::MAX - 300..=u64::MAX);
            for address in near.chain(0x5000..0x5040) {
                let mut places = [DESCRIPTORS, AVAILABLE, USED];
                places[which] = address;
                let [descriptors, available, used] = places;
                let registers = QueueRegisters {
                    size,
                    ready: true,
                    descriptors,
                    available,
                    used,
                };
                let is_good = address.is_multiple_of(alignment) && address <= last;
                let result = VirtQueue::new(0, registers, false, 0, &memory);
                assert_eq!(
                    result.is_ok(),
                    is_good,
                    "{size} entries, table {which} at {address:#x}"
                );
            }
        }
    }
}

#[test]
fn bytes_of_cut_buffers_are_read_as_one_run_from_any_place() {
    let memory = memory_of(MEMORY_BYTES as usize);
    memory
        .write_slice(&(0..64).collect::<Vec<u8>>(), GuestAddress(0x8000))
        .unwrap();
    let lengths = 0..4u32;
    for (a, b, c) in lengths
        .clone()
        .flat_map(|a| lengths.clone().map(move |b| (a, b)))
        .flat_map(|(a, b)| (0..4u32).map(move |c| (a, b, c)))
    {
        // Readable buffers, back to front in memory.
        let mut expected = Vec::new();
        for (index, (length, address)) in (0u16..).zip([(a, 0x8030u64), (b, 0x8020), (c, 0x8010)]) {
            let place = DESCRIPTORS + 16 * u64::from(index);
            memory.write_obj(address, GuestAddress(place)).unwrap();
            let next = u64::from(index < 2) << 32 | u64::from(index + 1) << 48;
            memory
                .write_obj(u64::from(length) | next, GuestAddress(place + 8))
                .unwrap();
            expected.extend((0..length as u8).map(|at| (address - 0x8000) as u8 + at));
        }
        memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        let chain = queue(&memory, 4, 0, false).pop(&memory).unwrap().unwrap();
        assert_eq!(chain.readable.length(), expected.len());
        for offset in 0..=expected.len() {
            for length in 0..=expected.len() - offset {
                let mut found = vec![0; length];
                chain.readable.read(&memory, offset, &mut found).unwrap();
                assert_eq!(found, expected[offset..offset + length]);
            }
        }
    }
}

const STAGES: [u32; 5] = [0, 1, 3, 11, 15];
const IDENTITY: Identity = Identity {
    device_id: 4,
    features: VERSION_1 | EVENT_IDX,
    queue_size_max: &[64],
};

/// virtio 1.2, 2.1 and 3.1.1: every value written in every status that there is.
#[test]
fn no_status_leads_where_the_order_of_initialization_does_not() {
    let mut statuses = std::collections::BTreeSet::new();
    for stage in STAGES {
        for extra in [0, 0x40, 0x80, 0xc0] {
            let mut state = Registers::new(IDENTITY).save();
            (state.status, state.driver_features) = (stage | extra, VERSION_1);
            for value in (0..=0x1ff).chain([1 << 31, u32::MAX]) {
                let mut registers = Registers::try_from((IDENTITY, &state)).unwrap();
                let effect = registers.write(0x70, value);
                let after = registers.save().status;
                statuses.insert(after);
                if value == 0 {
                    assert_eq!((after, effect), (0, Effect::Reset));
                    continue;
                }
                assert_eq!(
                    after & state.status,
                    state.status,
                    "{value:#x} cleared a bit"
                );
                assert!(
                    STAGES.contains(&(after & !0xc0)),
                    "{value:#x} led to {after:#x}"
                );
                let started = effect == Effect::Activate;
                let to_running = after == 15 && state.status != 15;
                assert_eq!(started, to_running, "{:#x} to {after:#x}", state.status);
                if extra != 0 {
                    assert_eq!(after | 0x80, state.status | 0x80, "only a reset mends it");
                }
            }
        }
    }
    // Saved: exactly those are restored that a device can come to.
    for status in 0..=0x1ff {
        let mut state = Registers::new(IDENTITY).save();
        (state.status, state.driver_features) = (status, VERSION_1);
        let is_restored = Registers::try_from((IDENTITY, &state)).is_ok();
        assert_eq!(
            is_restored,
            statuses.contains(&status),
            "status {status:#x}"
        );
    }
}

#[test]
fn a_queue_has_the_size_asked_for_exactly_if_it_is_a_power_of_two_within_the_maximum() {
    let guest = Guest::with_two_disks();
    guest.negotiate(RNG, VERSION_1);
    let mut size = 64;
    for value in (0..=0x2_0000).chain([1 << 31, u32::MAX]) {
        guest.write(RNG, 0x38, value);
        if value.is_power_of_two() && value <= 64 {
            size = value;
        }
        let found = guest.devices.slots[RNG].save().registers.queues[0].size;
        assert_eq!(u32::from(found), size, "{value}");
    }
}

/// virtio 1.2, 5.10.6.3: counters are modulo 2^32, and a peer may say anything.
#[test]
fn no_counters_let_more_be_sent_than_the_peer_has_room_for() {
    let edges = [
        0u32,
        1,
        99,
        100,
        101,
        1 << 16,
        1 << 18,
        1 << 31,
        u32::MAX - 99,
        u32::MAX,
    ];
    for sent in edges {
        for peer_fwd_cnt in edges {
            for peer_buf_alloc in edges {
                let connection = ConnectionStateV1 {
                    guest_port: 5,
                    peer_buf_alloc,
                    peer_fwd_cnt,
                    sent,
                    forwarded: 0,
                    announced: 0,
                    shutdown: 0,
                    credit_requested: false,
                    update_requested: false,
                };
                let state = ChannelStateV1 {
                    guest_cid: GUEST_CID,
                    connection: Some(connection),
                    replies: Vec::new(),
                    to_host: Vec::new(),
                    stale: 0,
                    to_guest: vec![7; 200],
                };
                let mut channel = Channel::try_from((GUEST_CID, state)).unwrap();
                let in_flight = u64::from(sent.wrapping_sub(peer_fwd_cnt));
                let room = u64::from(peer_buf_alloc).saturating_sub(in_flight);
                let header = channel.next_packet(4096, &mut Vec::new()).unwrap();
                assert_eq!(
                    header.op == OP_RW,
                    room > 0,
                    "data exactly if there is room"
                );
                assert_eq!(u64::from(header.length), room.min(200));
            }
        }
    }
}
