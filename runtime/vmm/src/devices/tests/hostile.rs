//! A guest that means harm: random registers, rings and descriptors. Nothing may panic, hang or grow.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{EVENT_IDX, Guest, INDIRECT, MEMORY_BYTES, Ring, VERSION_1};

const REGISTERS: [u64; 24] = [
    0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x70, 0x70, 0x80, 0x84, 0x90, 0x94,
    0xa0, 0xa4, 0xac, 0xc0, 0xfc, 0x100, 0x108, 0x3c,
];

fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(3),
        Just(11),
        Just(15),
        0u32..256,
        (0u32..64).prop_map(|page| page << 12),
        any::<u32>(),
    ]
}

/// An address near something: rings, the end of memory, the end of the world, or anywhere.
fn address() -> impl Strategy<Value = u64> {
    let end = MEMORY_BYTES as u64;
    prop_oneof![
        0x8_0000u64..0x9_0000,
        0x1_0000u64..0x3_0000,
        end - 600..end + 600,
        u64::MAX - 600..=u64::MAX,
        any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        0u32..64,
        Just(44),
        Just(512),
        Just(4096),
        0u32..100_000,
        any::<u32>()
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn random_register_accesses_are_harmless(
        accesses in prop::collection::vec(
            (0usize..5, prop::sample::select(&REGISTERS[..]), value(), any::<bool>()), 1..200),
    ) {
        let guest = Guest::with_two_disks();
        for (window, register, value, serve) in accesses {
            guest.write(window, register, value);
            guest.read(window, register);
            if serve {
                guest.devices.serve_all();
            }
        }
        guest.devices.pause().unwrap();
        let state = guest.devices.save();
        let disk = super::driver::pattern(64);
        // What any guest can do to a device is a state that can be restored.
        let thawed = guest.thaw(&[&disk, &disk], state.clone());
        prop_assert_eq!(thawed.devices.save(), state);
    }

    #[test]
    fn random_accesses_of_any_width_and_place_are_harmless(
        accesses in prop::collection::vec((0u64..0x6000, 0usize..9, any::<u64>()), 1..100),
    ) {
        let guest = Guest::with_two_disks();
        for (offset, width, value) in accesses {
            let mut data = value.to_le_bytes();
            let data = if width == 0 { &mut data[..0] } else { &mut data[..width.min(8)] };
            guest.devices.mmio_write(0xd000_0000 + offset, data);
            guest.devices.mmio_read(0xd000_0000 + offset, data);
            guest.devices.mmio_read(offset.wrapping_sub(0x3000), data);
            let port = 0x3f0 + (offset % 0x20) as u16;
            guest.devices.pio_write(port, data);
            guest.devices.pio_read(port, data);
        }
    }

    #[test]
    fn random_rings_are_harmless(
        window in 0usize..4,
        features in prop::sample::select(
            &[VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | INDIRECT | EVENT_IDX][..]),
        tables in prop::collection::vec(
            prop::collection::vec((address(), length(), 0u16..8, 0u16..70), 1..12), 3),
        heads in prop::collection::vec((0usize..3, 0u16..66), 1..40),
        available in prop::option::of(any::<u16>()),
        noise in prop::collection::vec(any::<u8>(), 64),
    ) {
        let guest = Guest::with_two_disks();
        for at in 0..64u64 {
            guest.memory.write_slice(&noise, GuestAddress(0x8_0000 + at * 1024)).unwrap();
        }
        let queues = if window == 2 { 3 } else { 1 };
        let mut rings: Vec<Ring> = guest.bring_up(window, features, queues);
        for (ring, table) in rings.iter().zip(&tables) {
            for (index, descriptor) in (0..).zip(table) {
                ring.set_descriptor(&guest.memory, index, *descriptor);
            }
        }
        for (queue, head) in heads {
            let queue = queue % rings.len();
            rings[queue].publish(&guest.memory, head);
            guest.write(window, 0x50, queue as u32);
            guest.devices.serve_all();
        }
        if let Some(index) = available {
            guest.memory.write_obj(index, GuestAddress(rings[0].available + 2)).unwrap();
            guest.write(window, 0x50, 0);
            guest.devices.serve_all();
        }
        guest.devices.pause().unwrap();
        guest.devices.save();
    }
}
