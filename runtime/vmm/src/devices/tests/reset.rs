//! Taking on a saved state in place: whatever was done to the devices, nothing of it is left.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{
    COW, EVENT_IDX, GUEST_CID, Guest, Part, QUEUE_SIZE, RNG, Ring, VERSION_1, VSOCK, config,
    memory, pattern,
};
use super::restore::busy_guest;
use crate::devices::state::DevicesStateV1;
use crate::devices::{
    DeviceRestoreError, Devices, DiskAccess, DiskFiles, NetworkDevice, SERIAL_PORT,
};

/// What a guest or its host does.
#[derive(Debug, Clone)]
enum Use {
    Write {
        sector: u8,
        byte: u8,
    },
    Read {
        sector: u8,
    },
    Random,
    Packet {
        op: u8,
        port: u8,
        length: u16,
    },
    FromHost {
        length: u16,
    },
    Serial {
        register: u8,
        byte: u8,
    },
    Register {
        window: u8,
        register: u8,
        value: u32,
    },
    SetUp {
        window: u8,
    },
    Serve,
}

fn any_use() -> impl Strategy<Value = Use> {
    prop_oneof![
        4 => (0..60u8, 1..255u8).prop_map(|(sector, byte)| Use::Write { sector, byte }),
        2 => (0..60u8).prop_map(|sector| Use::Read { sector }),
        2 => Just(Use::Random),
        6 => (1..8u8, 0..3u8, 0..900u16)
            .prop_map(|(op, port, length)| Use::Packet { op, port, length }),
        3 => (0..900u16).prop_map(|length| Use::FromHost { length }),
        2 => (0..8u8, any::<u8>()).prop_map(|(register, byte)| Use::Serial { register, byte }),
        1 => (0..4u8, 0..70u8, any::<u32>())
            .prop_map(|(window, register, value)| Use::Register { window, register, value }),
        1 => (0..4u8).prop_map(|window| Use::SetUp { window }),
        4 => Just(Use::Serve),
    ]
}

/// The used guest and its rings by window and queue.
struct User {
    guest: Guest,
    rings: Vec<Ring>,
}

impl User {
    fn ring(&mut self, window: usize, index: u32) -> Option<(&Guest, &mut Ring)> {
        let guest = &self.guest;
        let ring =
            (self.rings.iter_mut()).find(|ring| (ring.window, ring.index) == (window, index))?;
        while ring.take_used(&guest.memory).is_some() {}
        ring.has_room().then_some((guest, ring))
    }

    fn submit(&mut self, window: usize, index: u32, parts: &[Part<'_>]) {
        if let Some((guest, ring)) = self.ring(window, index) {
            ring.submit(guest, parts);
        }
    }

    fn apply(&mut self, step: &Use) {
        match *step {
            Use::Write { sector, byte } => {
                let mut header = [0; 16];
                (header[0], header[8]) = (1, sector);
                let data = [byte; 1024];
                self.submit(COW, 0, &[Part::Out(&header), Part::Out(&data), Part::In(1)]);
            }
            Use::Read { sector } => {
                let mut header = [0; 16];
                header[8] = sector;
                self.submit(COW, 0, &[Part::Out(&header), Part::In(1024), Part::In(1)]);
            }
            Use::Random => self.submit(RNG, 0, &[Part::In(64)]),
            Use::Packet { op, port, length } => {
                let length = if op == 5 { length } else { 0 };
                let mut packet = vec![0; 44];
                packet[0] = 3;
                packet[8] = 2;
                packet[16..18].copy_from_slice(&(5000 + u16::from(port)).to_le_bytes());
                packet[20..22].copy_from_slice(&1024u16.to_le_bytes());
                packet[24..26].copy_from_slice(&length.to_le_bytes());
                (packet[28], packet[30], packet[37]) = (1, op, 0x10);
                packet.resize(44 + usize::from(length), 0xa5);
                self.submit(VSOCK, 1, &[Part::Out(&packet)]);
                self.submit(VSOCK, 0, &[Part::In(2048)]);
            }
            Use::FromHost { length } => {
                match self.guest.host.write(&vec![0x5a; usize::from(length)]) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    result => drop(result.unwrap()),
                }
            }
            Use::Serial { register, byte } => {
                let port = SERIAL_PORT + u16::from(register);
                self.guest.devices.pio_write(port, &[byte]);
            }
            Use::Register {
                window,
                register,
                value,
            } => (self.guest).write(window.into(), u64::from(register) * 4, value),
            Use::SetUp { window } => {
                let (window, queues) =
                    [(COW, 1), (1, 1), (VSOCK, 3), (RNG, 1)][usize::from(window)];
                self.rings.retain(|ring| ring.window != window);
                // As a driver would that is loaded again; its rings begin empty.
                for ring in 0..u64::from(queues) {
                    let base = 0x1_0000 + (window as u64 * 4 + ring) * 0x2000;
                    let zeros = [0; 0x2000];
                    (self.guest.memory.write_slice(&zeros, GuestAddress(base))).unwrap();
                }
                let rings = self.guest.bring_up(window, VERSION_1 | EVENT_IDX, queues);
                assert_eq!(rings[0].size, QUEUE_SIZE);
                self.rings.extend(rings);
            }
            Use::Serve => drop(self.guest.devices.serve_all()),
        }
    }
}

/// Nothing that was signalled is still there, and everything else is as the state says.
fn assert_pristine(devices: &Devices, state: &DevicesStateV1, content: &[u8]) {
    for window in devices.mmio_windows().unwrap() {
        assert!(window.interrupt.read().is_err(), "interrupt {}", window.gsi);
        for (queue, event) in window.notify {
            assert!(
                event.read().is_err(),
                "notification {queue} of {}",
                window.gsi
            );
        }
    }
    assert!(devices.serial_interrupt().unwrap().read().is_err());
    assert_eq!(devices.save(), *state);
    assert_eq!(devices.console_tail(), b"");
    assert_eq!(devices.first_agent_byte_ns(), None);
    assert_eq!(devices.disk_written_runs(COW), []);
    let mut bytes = vec![0; content.len()];
    devices.disk_read_at(COW, 0, &mut bytes).unwrap();
    assert_eq!(bytes, content);
    assert!(devices.with_vsock(|vsock| vsock.is_wiped()));
}

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn whatever_was_done_a_reset_leaves_the_saved_state_alone(
        uses in prop::collection::vec(any_use(), 0..60),
    ) {
        let content = pattern(64);
        let (guest, rings) = busy_guest(&content);
        guest.devices.pause().unwrap();
        let state = guest.devices.save();
        guest.devices.resume();
        guest.host.set_nonblocking(true).unwrap();
        let mut user = User { guest, rings };
        uses.iter().for_each(|step| user.apply(step));
        let guest = &user.guest;
        guest.devices.pause().unwrap();
        let broken = guest.devices.faults.has_ended();
        let (host, agent) = pair();
        match guest.devices.reset_to(&state, DiskFiles::Kept, agent) {
            Ok(()) => {
                prop_assert!(!broken);
                assert_pristine(&guest.devices, &state, &content);
                host.set_nonblocking(true).unwrap();
                let kind = (&host).read(&mut [0]).unwrap_err().kind();
                prop_assert_eq!(kind, ErrorKind::WouldBlock);
            }
            Err(DeviceRestoreError::Ended) => prop_assert!(broken),
            Err(error) => panic!("{error:?}"),
        }
    }
}

#[test]
fn devices_made_ahead_take_on_a_state_and_keep_their_eventfds() {
    let content = pattern(64);
    let (frozen, mut rings) = busy_guest(&content);
    frozen.devices.pause().unwrap();
    let state = frozen.devices.save();
    let memory = memory();
    let shape = [DiskAccess::CopyOnWrite, DiskAccess::ReadOnly];
    let devices =
        Devices::prepare((&shape, NetworkDevice::Absent), GUEST_CID, memory.clone()).unwrap();
    let windows = devices.mmio_windows().unwrap();
    let (sender, _faults) = std::sync::mpsc::channel();
    let thread = devices.start(sender).unwrap();

    let mut bytes = vec![0; super::driver::MEMORY_BYTES];
    (frozen.memory.read_slice(&mut bytes, GuestAddress(0))).unwrap();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    let (host, agent) = pair();
    let disks = config(&[&content, &content], pair().0).disks;
    (devices.reset_to(&state, DiskFiles::Replaced(disks), agent)).unwrap();
    assert_pristine(&devices, &state, &content);
    let guest = Guest {
        devices: Arc::clone(&devices),
        memory,
        host,
    };
    devices.prime();
    devices.resume();
    let ring = rings.last_mut().unwrap();
    ring.want_interrupt(&guest.memory);
    // Through the descriptor that KVM was given before anything was known of the guest.
    let head = ring.offer(&guest, &[Part::In(16)]);
    windows[RNG].notify[0].1.write(1).unwrap();
    super::thread::wait_for_interrupt(&guest, RNG);
    assert_eq!(ring.take_used(&guest.memory), Some((head, 16)));
    thread.stop().unwrap();
}

#[test]
fn a_reset_changes_the_agent_stream_under_a_running_thread() {
    let content = pattern(64);
    let (mut guest, rings) = busy_guest(&content);
    let is_receive = |ring: &Ring| (ring.window, ring.index) == (VSOCK, 0);
    let mut receive = rings.into_iter().find(is_receive).unwrap();
    for _ in 0..8 {
        receive.submit(&guest, &[Part::In(512)]);
    }
    guest.run();
    while receive.take_used(&guest.memory).is_some() {}
    receive.want_interrupt(&guest.memory);
    let (sender, faults) = std::sync::mpsc::channel();
    let thread = guest.devices.start(sender).unwrap();
    guest.devices.pause().unwrap();
    let state = guest.devices.save();
    let mut bytes = vec![0; super::driver::MEMORY_BYTES];
    (guest.memory.read_slice(&mut bytes, GuestAddress(0))).unwrap();
    for round in 0..20u8 {
        let mut ring = receive.clone();
        guest.host.write_all(&[round; 3]).unwrap();
        if round % 2 == 0 {
            guest.devices.prime();
        }
        guest.devices.resume();
        let (head, length) = loop {
            match ring.take_used(&guest.memory) {
                Some(used) => break used,
                None => super::thread::wait_for_interrupt(&guest, VSOCK),
            }
        };
        let packet = ring.part(&guest.memory, head, 0, length as usize);
        assert_eq!(packet[44..], [round; 3]);

        // Unread bytes of this life, in the socket or already in the channel.
        guest.host.write_all(b"old").unwrap();
        guest.devices.park().unwrap();
        let (host, agent) = pair();
        let mut old = std::mem::replace(&mut guest.host, host);
        (guest.devices.reset_to(&state, DiskFiles::Kept, agent)).unwrap();
        assert_pristine(&guest.devices, &state, &content);
        assert_eq!(old.write(&[0]).unwrap_err().kind(), ErrorKind::BrokenPipe);
        guest.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    }
    assert!(faults.try_recv().is_err(), "a replaced stream is no fault");
    thread.stop().unwrap();
}

#[test]
fn a_state_that_does_not_fit_changes_nothing() {
    let content = pattern(64);
    let (guest, _) = busy_guest(&content);
    guest.devices.pause().unwrap();
    let state = guest.devices.save();
    let state_before = state.clone();
    let refused = |state: &DevicesStateV1, disks| {
        let error = guest.devices.reset_to(state, disks, pair().0).unwrap_err();
        assert_eq!(guest.devices.save(), state_before);
        error
    };
    let disks = |content: &[&[u8]]| DiskFiles::Replaced(config(content, pair().0).disks);
    let mut wrong = state.clone();
    wrong.slots[RNG].interrupt_status = 4;
    assert!(matches!(
        refused(&wrong, DiskFiles::Kept),
        DeviceRestoreError::Slot { .. }
    ));
    wrong = state.clone();
    wrong.slots.swap(VSOCK, RNG);
    assert!(matches!(
        refused(&wrong, DiskFiles::Kept),
        DeviceRestoreError::SlotKind { slot: VSOCK }
    ));
    wrong.slots.pop();
    assert!(matches!(
        refused(&wrong, DiskFiles::Kept),
        DeviceRestoreError::SlotCount { .. }
    ));
    assert!(matches!(
        refused(&state, disks(&[&content])),
        DeviceRestoreError::SlotCount { .. }
    ));
    let other = disks(&[&content[512..], &content]);
    assert!(matches!(
        refused(&state, other),
        DeviceRestoreError::Disk { disk: COW }
    ));
}
