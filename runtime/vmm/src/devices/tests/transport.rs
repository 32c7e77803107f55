//! Registers, negotiation, entropy and the serial port.

use vm_memory::{Bytes, GuestAddress};

use super::driver::{COW, EVENT_IDX, Guest, Part, QUEUE_SIZE, RNG, VERSION_1, VSOCK};
use crate::devices::{CONSOLE_BYTES_MAX, MMIO_BASE, SERIAL_PORT};

#[test]
fn windows_identify_their_devices() {
    let guest = Guest::with_two_disks();
    for (window, device) in [(COW, 2), (1, 2), (VSOCK, 19), (RNG, 4)] {
        assert_eq!(guest.read(window, 0x00), 0x7472_6976);
        assert_eq!(guest.read(window, 0x04), 2);
        assert_eq!(guest.read(window, 0x08), device);
        guest.write(window, 0x14, 1);
        assert_eq!(guest.read(window, 0x10) & 1, 1, "VERSION_1 is offered");
        guest.write(window, 0x14, 2);
        assert_eq!(guest.read(window, 0x10), 0);
    }
    assert_eq!(guest.read(4, 0x00), u32::MAX, "there is no fifth window");
    let windows = guest.devices.mmio_windows().unwrap();
    let places: Vec<_> = windows
        .iter()
        .map(|w| (w.base, w.length, w.gsi, w.notify.len()))
        .collect();
    let place = |n: u32, queues| (MMIO_BASE + u64::from(n) * 0x1000, 0x1000, 5 + n, queues);
    assert_eq!(places, [place(0, 1), place(1, 1), place(2, 3), place(3, 1)]);
}

#[test]
fn features_without_version_1_or_never_offered_are_refused() {
    let guest = Guest::with_two_disks();
    for features in [0, EVENT_IDX, VERSION_1 | 1 << 40, VERSION_1 | 1] {
        guest.negotiate(RNG, features);
        assert_eq!(guest.status(RNG), 3, "{features:#x}");
    }
    guest.negotiate(RNG, VERSION_1 | EVENT_IDX);
    assert_eq!(guest.status(RNG), 11);
}

#[test]
fn status_follows_the_order_of_initialization() {
    let guest = Guest::with_two_disks();
    for refused in [2, 4, 8, 15, 0x40, 0x10] {
        guest.write(RNG, 0x70, refused);
        assert_eq!(guest.status(RNG), 0, "{refused:#x}");
    }
    guest.negotiate(RNG, VERSION_1);
    for refused in [1, 3, 9, 0x4b] {
        guest.write(RNG, 0x70, refused);
        assert_eq!(
            guest.status(RNG),
            11,
            "{refused:#x}: bits are never cleared"
        );
    }
    guest.write(RNG, 0x70, 0x80 | 11);
    assert_eq!(guest.status(RNG), 0x8b);
    guest.write(RNG, 0x70, 15);
    assert_eq!(guest.status(RNG), 0x8b, "a failed device only resets");
    guest.write(RNG, 0x70, 0);
    assert_eq!(guest.status(RNG), 0);
}

#[test]
fn queue_registers_are_frozen_once_ready() {
    let guest = Guest::with_two_disks();
    let ring = guest.bring_up(RNG, VERSION_1, 1).remove(0);
    let before = guest.devices.slots[RNG].save();
    for register in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x20] {
        guest.write(RNG, register, 0x10);
    }
    assert_eq!(guest.devices.slots[RNG].save(), before);
    assert_eq!(before.registers.queues[0].descriptors, ring.descriptors);
    assert_eq!(before.registers.queues[0].size, QUEUE_SIZE);
    // Before DRIVER_OK, too, a queue that was checked stays what it was.
    guest.negotiate(RNG, VERSION_1);
    guest.set_up_queue(RNG, 0);
    let before = guest.devices.slots[RNG].save();
    for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        guest.write(RNG, register, 0x10);
    }
    assert_eq!(guest.devices.slots[RNG].save(), before);
}

/// Linux sets FAILED when a driver's probe fails, after DRIVER_OK, too.
#[test]
fn a_driver_that_gives_up_has_its_queues_stopped_and_can_be_frozen() {
    let guest = Guest::with_two_disks();
    let mut ring = guest.bring_up(RNG, VERSION_1, 1).remove(0);
    guest.write(RNG, 0x70, 0x80 | 15);
    ring.submit(&guest, &[Part::In(8)]);
    guest.run();
    assert_eq!(ring.take_used(&guest.memory), None);
    let content = super::driver::pattern(64);
    let thawed = guest.clone_by_snapshot(&[&content, &content]);
    assert_eq!(thawed.devices.save(), guest.devices.save());
    assert_eq!(thawed.status(RNG), 0x8f);
}

#[test]
fn queue_outside_memory_is_refused() {
    for (register, value) in [
        (0x84, 1),
        (0x94, 1),
        (0xa4, 1),
        (0x80, 8),
        (0x90, 1),
        (0xa0, 2),
    ] {
        let guest = Guest::with_two_disks();
        guest.negotiate(RNG, VERSION_1);
        for (low, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
            guest.write(RNG, low, address);
        }
        guest.write(RNG, register, value);
        guest.write(RNG, 0x44, 1);
        assert!(guest.needs_reset(RNG), "{register:#x}");
        guest.write(RNG, 0x70, 15);
        assert_eq!(guest.status(RNG) & 4, 0, "a broken device does not start");
    }
}

#[test]
fn queue_sizes_that_are_no_power_of_two_are_ignored() {
    let guest = Guest::with_two_disks();
    guest.negotiate(RNG, VERSION_1);
    for size in [0, 3, 65, 128, 0x1_0040] {
        guest.write(RNG, 0x38, size);
        assert_eq!(
            guest.devices.slots[RNG].save().registers.queues[0].size,
            64,
            "{size}"
        );
    }
}

#[test]
fn narrow_and_unaligned_register_accesses_do_nothing() {
    let guest = Guest::with_two_disks();
    let mut byte = [0xaa];
    guest.devices.mmio_read(guest.address(RNG, 0), &mut byte);
    assert_eq!(byte, [0]);
    let mut word = [0xaa; 4];
    guest.devices.mmio_read(guest.address(RNG, 2), &mut word);
    assert_eq!(word, [0; 4]);
    guest.devices.mmio_write(guest.address(RNG, 0x70), &[1]);
    guest.devices.mmio_write(guest.address(RNG, 0x70), &[1; 8]);
    assert_eq!(guest.status(RNG), 0);
}

#[test]
fn entropy_is_given_and_interrupts_are_raised_and_acknowledged() {
    let guest = Guest::with_two_disks();
    let interrupt = guest.devices.mmio_windows().unwrap().remove(RNG).interrupt;
    let mut ring = guest.bring_up(RNG, VERSION_1, 1).remove(0);
    let head = ring.submit(&guest, &[Part::In(64), Part::In(64)]);
    guest.run();
    assert_eq!(ring.take_used(&guest.memory), Some((head, 128)));
    assert_ne!(ring.part(&guest.memory, head, 1, 64), vec![0; 64]);
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!(guest.read(RNG, 0x60), 1);
    guest.write(RNG, 0x64, 1);
    assert_eq!(guest.read(RNG, 0x60), 0);
    ring.submit(&guest, &[Part::In(64)]);
    guest.run();
    assert_eq!(guest.read(RNG, 0x60), 1);
    guest.write(RNG, 0x70, 0);
    assert_eq!(guest.read(RNG, 0x60), 0, "a reset forgets interrupts");
}

#[test]
fn entropy_is_rate_limited() {
    let guest = Guest::with_two_disks();
    let mut ring = guest.bring_up(RNG, VERSION_1, 1).remove(0);
    let mut bytes = 0u64;
    for _ in 0..200 {
        while ring.has_room() {
            ring.submit(&guest, &[Part::In(4096)]);
        }
        guest.devices.slots[RNG].serve();
        while let Some((_, length)) = ring.take_used(&guest.memory) {
            bytes += u64::from(length);
        }
    }
    assert!(bytes >= 252 * 1024, "{bytes}: the burst is allowed");
    assert!(
        bytes < 200 * 16 * 4096 / 2,
        "{bytes}: more than that is not"
    );
}

#[test]
fn event_index_suppresses_interrupts_that_nobody_wants() {
    let guest = Guest::with_two_disks();
    let interrupt = guest.devices.mmio_windows().unwrap().remove(RNG).interrupt;
    let mut ring = guest.bring_up(RNG, VERSION_1 | EVENT_IDX, 1).remove(0);
    ring.want_interrupt(&guest.memory);
    for expected in [true, false] {
        ring.submit(&guest, &[Part::In(8)]);
        guest.run();
        assert_eq!(interrupt.read().is_ok(), expected);
    }
    // avail_event follows: the driver is asked to notify the third buffer.
    let place = GuestAddress(ring.used + 4 + u64::from(QUEUE_SIZE) * 8);
    assert_eq!(guest.memory.read_obj::<u16>(place).unwrap(), 2);
}

#[test]
fn console_keeps_the_last_bytes() {
    let guest = Guest::with_two_disks();
    for byte in b"hello\n" {
        assert!(guest.devices.pio_write(SERIAL_PORT, &[*byte]));
    }
    assert_eq!(guest.devices.console_tail(), b"hello\n");
    for at in 0..CONSOLE_BYTES_MAX + 5 {
        guest.devices.pio_write(SERIAL_PORT, &[at as u8]);
    }
    let tail = guest.devices.console_tail();
    assert_eq!(tail.len(), CONSOLE_BYTES_MAX);
    assert_eq!(tail[0], 5);
    let mut status = [0];
    assert!(guest.devices.pio_read(SERIAL_PORT + 5, &mut status));
    assert_eq!(status[0] & 0x60, 0x60, "the transmitter is always empty");
    assert!(!guest.devices.pio_read(SERIAL_PORT + 8, &mut status));
    assert!(!guest.devices.pio_write(SERIAL_PORT - 1, &[0]));
}
