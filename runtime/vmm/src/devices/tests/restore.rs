//! Saved state: what is restored equals what was saved, and no bytes make a device that could not exist.

use super::driver::{COW, EVENT_IDX, Guest, Part, RNG, Ring, VERSION_1, VSOCK, config, pattern};
use crate::devices::state::DevicesStateV1;
use crate::devices::{DeviceRestoreError, Devices, SERIAL_PORT};

/// A machine with every device running and some bytes on the way.
pub fn busy_guest(content: &[u8]) -> (Guest, Vec<Ring>) {
    let guest = Guest::new(&[content, content]);
    let mut rings = Vec::new();
    for (window, queues) in [(COW, 1), (VSOCK, 3), (RNG, 1)] {
        rings.extend(guest.bring_up(window, VERSION_1 | EVENT_IDX, queues));
    }
    let mut request = vec![0; 44];
    request[0] = 3;
    request[8] = 2;
    request[16..18].copy_from_slice(&5000u16.to_le_bytes());
    request[20..22].copy_from_slice(&1024u16.to_le_bytes());
    request[28] = 1;
    request[30] = 1;
    request[37] = 0x10;
    let transmit = rings
        .iter_mut()
        .find(|ring| (ring.window, ring.index) == (VSOCK, 1))
        .unwrap();
    transmit.submit(&guest, &[Part::Out(&request)]);
    guest.devices.pio_write(SERIAL_PORT + 1, &[2]);
    guest.run();
    (guest, rings)
}

#[test]
fn restored_state_equals_the_saved() {
    let content = pattern(64);
    let (guest, _) = busy_guest(&content);
    guest.devices.pause().unwrap();
    let state = guest.devices.save();
    let thawed = guest.thaw(&[&content, &content], state.clone());
    assert_eq!(thawed.devices.save(), state);
    let interrupt = thawed.devices.serial_interrupt().unwrap();
    assert!(interrupt.read().is_err());
    thawed.devices.resume();
    assert!(interrupt.read().is_ok(), "its interrupt is pending");
}

#[test]
fn request_made_before_the_freeze_is_served_after_the_thaw() {
    let content = pattern(64);
    let (guest, mut rings) = busy_guest(&content);
    guest.devices.pause().unwrap();
    let state = guest.devices.save();
    // Offered after the last turn of the old machine; its notification dies with the old eventfd.
    let ring = rings.last_mut().unwrap();
    let head = ring.submit(&guest, &[Part::In(16)]);
    let thawed = guest.thaw(&[&content, &content], state);
    assert_eq!(ring.take_used(&thawed.memory), None);
    let (sender, _receiver) = std::sync::mpsc::channel();
    let thread = thawed.devices.start(sender).unwrap();
    thawed.devices.resume();
    super::thread::wait_for_interrupt(&thawed, RNG);
    assert_eq!(ring.take_used(&thawed.memory), Some((head, 16)));
    thread.stop().unwrap();
}

#[test]
fn unacknowledged_interrupt_is_signalled_again() {
    let content = pattern(64);
    let (guest, mut rings) = busy_guest(&content);
    let ring = rings.last_mut().unwrap();
    ring.want_interrupt(&guest.memory);
    ring.submit(&guest, &[Part::In(16)]);
    guest.run();
    let thawed = guest.clone_by_snapshot(&[&content, &content]);
    let interrupt = thawed.devices.mmio_windows().unwrap().remove(RNG).interrupt;
    assert!(interrupt.read().is_err());
    thawed.devices.resume();
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!(thawed.read(RNG, 0x60), 1);
}

#[test]
fn state_of_another_configuration_is_refused() {
    let content = pattern(64);
    let (guest, _) = busy_guest(&content);
    guest.devices.pause().unwrap();
    let state = guest.devices.save();
    let restore = |disks: &[&[u8]]| {
        let (_host, agent) = std::os::unix::net::UnixStream::pair().unwrap();
        Devices::restore(config(disks, agent), guest.memory.clone(), &state)
    };
    assert!(matches!(
        restore(&[&content]),
        Err(DeviceRestoreError::SlotCount { .. })
    ));
    let shorter = &content[512..];
    assert!(matches!(
        restore(&[&content, shorter]),
        Err(DeviceRestoreError::Disk { disk: 1 })
    ));
    let three: [&[u8]; 3] = [&content, &content, &content];
    let mut wrong = state.clone();
    wrong.slots.insert(0, state.slots[3].clone());
    let (_host, agent) = std::os::unix::net::UnixStream::pair().unwrap();
    let refused = Devices::restore(config(&three, agent), guest.memory.clone(), &wrong);
    assert!(matches!(
        refused,
        Err(DeviceRestoreError::SlotKind { slot: 0 })
    ));
}

#[test]
fn impossible_states_are_refused() {
    let content = pattern(64);
    let (guest, _) = busy_guest(&content);
    guest.devices.pause().unwrap();
    let good = guest.devices.save();
    type Change = fn(&mut DevicesStateV1);
    let changes: [(&str, Change); 14] = [
        ("status", |s| s.slots[RNG].registers.status = 4),
        ("features", |s| s.slots[RNG].registers.driver_features = 1),
        ("queue size", |s| s.slots[RNG].registers.queues[0].size = 3),
        ("queue count", |s| s.slots[RNG].registers.queues.clear()),
        ("ring address", |s| {
            s.slots[RNG].registers.queues[0].used = 1 << 40
        }),
        ("ring alignment", |s| {
            s.slots[RNG].registers.queues[0].descriptors |= 1
        }),
        ("ring at zero", |s| {
            s.slots[RNG].registers.queues[0].available = 0
        }),
        ("cursor missing", |s| s.slots[RNG].queues[0] = None),
        ("cursor of an idle queue", |s| {
            s.slots[RNG].registers.queues[0].ready = false
        }),
        ("interrupt", |s| s.slots[RNG].interrupt_status = 4),
        ("fifo", |s| s.serial.in_buffer = vec![0; 10_000]),
        ("cid", |s| channel(s).guest_cid = 9),
        ("stale", |s| channel(s).stale = 9),
        ("backlog", |s| channel(s).to_guest = vec![0; 300_000]),
    ];
    for (name, change) in changes {
        let mut state = good.clone();
        change(&mut state);
        let (_host, agent) = std::os::unix::net::UnixStream::pair().unwrap();
        let config = config(&[&content, &content], agent);
        assert!(
            Devices::restore(config, guest.memory.clone(), &state).is_err(),
            "{name}"
        );
    }
}

fn channel(state: &mut DevicesStateV1) -> &mut crate::devices::state::ChannelStateV1 {
    match &mut state.slots[VSOCK].device {
        crate::devices::state::DeviceStateV1::Vsock(channel) => channel,
        other => panic!("window {VSOCK} holds {other:?}"),
    }
}
