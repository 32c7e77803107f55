//! The network device: frames both ways, hostile chains, floods, resets and snapshots. A pair of datagram sockets stands for the
//! tap: one read or write is one packet there, too.

use std::io::ErrorKind;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{
    COW, EVENT_IDX, Guest, INDIRECT, MEMORY_BYTES, NET, Part, RNG, Ring, VERSION_1, VSOCK, WRITE,
    config, memory, pattern, postcard_bytes,
};
use super::thread::wait_for_interrupt;
use crate::devices::state::{DeviceStateV1, DevicesStateV1, NetStateV1, RngStateV1};
use crate::devices::{
    DeviceBuildError, DeviceFault, DeviceRestoreError, Devices, DiskAccess, DiskFiles, GuestFault,
    NetworkDevice,
};

/// What the driver gives for one frame: header, Ethernet header with a VLAN tag, MTU.
const BUFFER: usize = 12 + 18 + 1500;
/// VIRTIO_NET_F_MTU and VIRTIO_NET_F_MAC.
const FEATURES: u64 = VERSION_1 | EVENT_IDX | 1 << 3 | 1 << 5;

fn new_guest() -> Guest {
    let content = pattern(64);
    let memory = memory();
    let (host, agent) = UnixStream::pair().unwrap();
    let mut config = config(&[&content, &content], agent);
    config.network = NetworkDevice::Present;
    let devices = Devices::new(config, memory.clone()).unwrap();
    Guest {
        devices,
        memory,
        host,
    }
}

/// A machine of the state and the memory of `frozen`.
fn thaw(frozen: &Guest, state: &DevicesStateV1) -> Result<Guest, DeviceRestoreError> {
    let content = pattern(64);
    let memory = memory();
    let mut bytes = vec![0; MEMORY_BYTES];
    (frozen.memory.read_slice(&mut bytes, GuestAddress(0))).unwrap();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    let (host, agent) = UnixStream::pair().unwrap();
    let mut config = config(&[&content, &content], agent);
    config.network = NetworkDevice::Present;
    let devices = Devices::restore(config, memory.clone(), state)?;
    Ok(Guest {
        devices,
        memory,
        host,
    })
}

/// Connects a new tap; the host's side of it.
fn plug(guest: &Guest) -> UnixDatagram {
    let (host, tap) = UnixDatagram::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    guest.devices.plug(tap.into()).unwrap();
    host
}

fn sent(host: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = [0; 4096];
    match host.recv(&mut bytes) {
        Ok(length) => Some(bytes[..length].to_vec()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

/// A frame of its own for each number.
fn frame(number: usize, length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|at| (at * 7 + number) as u8).collect();
    frame[..8].copy_from_slice(&(number as u64).to_le_bytes());
    frame
}

fn with_header(header: [u8; 12], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

/// A guest whose driver runs, its tap and its rings.
struct Station {
    guest: Guest,
    host: UnixDatagram,
    rx: Ring,
    tx: Ring,
}

impl Station {
    fn new() -> Self {
        let guest = new_guest();
        let host = plug(&guest);
        let mut rings = guest.bring_up(NET, FEATURES, 2);
        let (tx, rx) = (rings.remove(1), rings.remove(0));
        Self {
            guest,
            host,
            rx,
            tx,
        }
    }

    fn send(&mut self, parts: &[Part<'_>]) {
        self.tx.submit(&self.guest, parts);
        self.guest.run();
    }

    /// What the guest got in its next buffer.
    fn received(&mut self) -> Option<Vec<u8>> {
        let (head, length) = self.rx.take_used(&self.guest.memory)?;
        let memory = &self.guest.memory;
        Some(self.rx.part(memory, head, 0, length as usize))
    }

    fn broken_by(&self, faults: &std::sync::mpsc::Receiver<DeviceFault>) -> GuestFault {
        assert!(self.guest.needs_reset(NET));
        match faults.try_recv().unwrap() {
            DeviceFault::Guest { cause, .. } => cause,
            other => panic!("{other}"),
        }
    }
}

/// Where faults go without a thread.
fn faults(guest: &Guest) -> std::sync::mpsc::Receiver<DeviceFault> {
    let (sender, receiver) = channel();
    guest.devices.faults.connect(sender);
    receiver
}

#[test]
fn the_device_tells_its_address_and_mtu_and_offers_no_offload() {
    let guest = new_guest();
    assert_eq!(guest.read(NET, 0x08), 1, "device id");
    let mut space = [0xff; 14];
    (guest.devices).mmio_read(guest.address(NET, 0x100), &mut space);
    assert_eq!(
        space,
        [
            0x06, 0x54, 0x48, 0x41, 0x57, 0x02, 0, 0, 0, 0, 0xdc, 0x05, 0, 0
        ]
    );
    guest.write(NET, 0x14, 0);
    let low = u64::from(guest.read(NET, 0x10));
    guest.write(NET, 0x14, 1);
    let high = u64::from(guest.read(NET, 0x10));
    assert_eq!(low | high << 32, FEATURES | INDIRECT);
    guest.negotiate(NET, FEATURES | 1);
    assert_eq!(
        guest.status(NET),
        3,
        "checksum offload is not to be had, so the features are refused"
    );
}

#[test]
fn a_machine_without_a_network_has_no_window_and_takes_no_tap() {
    let guest = Guest::with_two_disks();
    assert_eq!(guest.devices.mmio_windows().unwrap().len(), NET);
    assert_eq!(guest.read(NET, 0), u32::MAX);
    let (_host, tap) = UnixDatagram::pair().unwrap();
    assert!(matches!(
        guest.devices.plug(tap.into()),
        Err(DeviceBuildError::NoNetwork)
    ));
    guest.devices.pause().unwrap();
    let state = guest.devices.save();
    assert_eq!(state.network(), NetworkDevice::Absent);
    // What older snapshots hold keeps its number.
    let rng = DeviceStateV1::Rng(RngStateV1 {});
    assert_eq!(postcard::to_stdvec(&rng).unwrap(), [2]);
}

#[test]
fn frames_go_both_ways_and_no_header_is_passed_on() {
    let mut station = Station::new();
    for length in [14, 60, 1514] {
        let frame = frame(length, length);
        // One buffer or several, the header's end anywhere.
        let packet = with_header([0xff; 12], &frame);
        for cut in [packet.len(), 5, 12, 20] {
            let (one, other) = packet.split_at(cut);
            station.send(&[Part::Out(one), Part::Out(other)]);
            let expected = with_header([0; 12], &frame);
            assert_eq!(sent(&station.host).unwrap(), expected, "{length} {cut}");
            assert!(station.tx.take_used(&station.guest.memory).is_some());
        }
        station.rx.submit(&station.guest, &[Part::In(BUFFER)]);
        let packet = with_header([0xee; 12], &frame);
        station.host.send(&packet).unwrap();
        station.guest.run();
        let expected = with_header([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], &frame);
        assert_eq!(station.received().unwrap(), expected, "{length}");
    }
    assert_eq!(sent(&station.host), None);
    assert_eq!(station.received(), None);
}

#[test]
fn frames_of_other_lengths_are_lost_and_nothing_else() {
    let mut station = Station::new();
    for length in [0, 13, 1515, 3000] {
        let header = [0; 12];
        let frame = vec![1; length];
        station.send(&[Part::Out(&header), Part::Out(&frame)]);
        let (_, written) = station.tx.take_used(&station.guest.memory).unwrap();
        assert_eq!(written, 0);
        assert_eq!(sent(&station.host), None, "{length}");
    }
    for _ in 0..2 {
        station.rx.submit(&station.guest, &[Part::In(BUFFER)]);
    }
    for length in [1, 12, 25, 1527, 1528, 4000] {
        station.host.send(&vec![1; length]).unwrap();
    }
    let good = with_header([0; 12], &frame(1, 100));
    station.host.send(&good).unwrap();
    station.guest.run();
    assert_eq!(station.received().unwrap()[12..], good[12..]);
    assert_eq!(station.received(), None, "the other buffer is free yet");
}

#[test]
fn without_a_tap_what_is_sent_is_lost() {
    let guest = new_guest();
    let faults = faults(&guest);
    let mut rings = guest.bring_up(NET, FEATURES, 2);
    rings[0].submit(&guest, &[Part::In(BUFFER)]);
    for number in 0..40 {
        let packet = with_header([0; 12], &frame(number, 100));
        rings[1].submit(&guest, &[Part::Out(&packet)]);
        guest.run();
        assert!(rings[1].take_used(&guest.memory).is_some());
    }
    assert_eq!(rings[0].take_used(&guest.memory), None);
    assert_eq!(guest.status(NET), 15);
    assert!(faults.try_recv().is_err());
}

#[test]
fn a_tap_that_is_gone_loses_frames_and_ends_nothing() {
    let mut station = Station::new();
    let faults = faults(&station.guest);
    station.rx.submit(&station.guest, &[Part::In(BUFFER)]);
    let (lonely, _) = UnixDatagram::pair().unwrap();
    drop(std::mem::replace(&mut station.host, lonely));
    for number in 0..20 {
        let packet = with_header([0; 12], &frame(number, 100));
        station.send(&[Part::Out(&packet)]);
        assert!(station.tx.take_used(&station.guest.memory).is_some());
    }
    assert_eq!(station.received(), None);
    assert_eq!(station.guest.status(NET), 15);
    assert!(faults.try_recv().is_err());
}

#[test]
fn malformed_chains_break_the_network_until_reset() {
    const FAR: u64 = MEMORY_BYTES as u64 - 100;
    type Hostile = (
        &'static str,
        usize,
        &'static [(u64, u32, u16, u16)],
        fn(&GuestFault) -> bool,
    );
    let cases: [Hostile; 6] = [
        ("no header", 1, &[(0x8_0000, 11, 0, 0)], |f| {
            matches!(f, GuestFault::TooSmall { queue: 1 })
        }),
        ("nothing to read", 1, &[(0x8_0000, 100, WRITE, 0)], |f| {
            matches!(f, GuestFault::TooSmall { queue: 1 })
        }),
        (
            "outside of memory",
            1,
            &[(0x8_0000, 12, 1, 1), (0x10_0000_0000, 60, 0, 0)],
            |f| matches!(f, GuestFault::Buffer { queue: 1 }),
        ),
        ("a circle", 1, &[(0x8_0000, 4, 1, 0)], |f| {
            matches!(f, GuestFault::Chain { queue: 1 })
        }),
        (
            "no room for the longest frame",
            0,
            &[(0x8_0000, 1525, WRITE, 0)],
            |f| matches!(f, GuestFault::TooSmall { queue: 0 }),
        ),
        (
            "room that ends outside of memory",
            0,
            &[(0x8_0000, 1500, WRITE | 1, 1), (FAR, 200, WRITE, 0)],
            |f| matches!(f, GuestFault::Buffer { queue: 0 }),
        ),
    ];
    for (name, queue, descriptors, expected) in cases {
        let mut station = Station::new();
        let faults = faults(&station.guest);
        let ring = if queue == 0 {
            &mut station.rx
        } else {
            &mut station.tx
        };
        for (index, descriptor) in (0..).zip(descriptors) {
            ring.set_descriptor(&station.guest.memory, index, *descriptor);
        }
        ring.publish(&station.guest.memory, 0);
        station.host.send(&[0; 72]).unwrap();
        station.guest.run();
        let fault = station.broken_by(&faults);
        assert!(expected(&fault), "{name}: {fault:?}");
        assert_eq!(sent(&station.host), None, "{name}");
        // Dead until reset, and as good as new afterwards, with the same tap.
        station.guest.write(NET, 0x50, 1);
        station.guest.run();
        for ring in [&station.rx, &station.tx] {
            (station.guest.memory)
                .write_slice(&[0; 0x2000], GuestAddress(ring.descriptors))
                .unwrap();
        }
        let mut rings = station.guest.bring_up(NET, FEATURES, 2);
        (station.tx, station.rx) = (rings.remove(1), rings.remove(0));
        let packet = with_header([0; 12], &frame(3, 60));
        station.send(&[Part::Out(&packet)]);
        assert_eq!(sent(&station.host).unwrap(), packet, "{name}");
    }
}

#[test]
fn a_flood_of_the_guest_is_served_in_bounded_turns() {
    let station = Station::new();
    let Station {
        guest,
        mut tx,
        host,
        ..
    } = station;
    let packet = with_header([0; 12], &frame(1, 14));
    let place = GuestAddress(0x8_0000);
    guest.memory.write_slice(&packet, place).unwrap();
    tx.set_descriptor(&guest.memory, 0, (place.0, packet.len() as u32, 0, 0));
    // The same chain as often as the ring has room.
    for _ in 0..tx.size {
        tx.publish(&guest.memory, 0);
    }
    assert!(
        guest.devices.serve_all().is_some(),
        "it gave its turn away without looking whether there is more"
    );
    let arrived = std::iter::from_fn(|| sent(&host)).count();
    assert_eq!(arrived, usize::from(tx.size));
    assert!(guest.devices.serve_all().is_none());
}

#[test]
fn a_flood_of_the_host_waits_in_the_tap_until_the_guest_has_room() {
    let mut station = Station::new();
    let (sender, _faults) = channel();
    let thread = station.guest.devices.start(sender).unwrap();
    let frames = 100;
    for number in 0..frames {
        let packet = with_header([0; 12], &frame(number, 200));
        station.host.send(&packet).unwrap();
    }
    for number in 0..frames {
        if number % 5 == 0 {
            for _ in 0..5 {
                station.rx.submit(&station.guest, &[Part::In(BUFFER)]);
            }
        }
        let packet = loop {
            station.rx.want_interrupt(&station.guest.memory);
            match station.received() {
                Some(packet) => break packet,
                None => wait_for_interrupt(&station.guest, NET),
            }
        };
        assert_eq!(packet[12..], frame(number, 200), "{number}");
    }
    thread.stop().unwrap();
}

#[test]
fn the_tap_and_the_driver_wake_the_thread() {
    let mut station = Station::new();
    station.host.set_nonblocking(false).unwrap();
    let patience = Some(Duration::from_secs(20));
    station.host.set_read_timeout(patience).unwrap();
    let (sender, faults) = channel();
    let thread = station.guest.devices.start(sender).unwrap();
    for number in 0..50 {
        if number % 7 == 3 {
            station.guest.devices.pause().unwrap();
            station.guest.devices.resume();
        }
        let packet = with_header([0; 12], &frame(number, 64));
        station.tx.submit(&station.guest, &[Part::Out(&packet)]);
        assert_eq!(sent(&station.host).unwrap(), packet);
        station.rx.submit(&station.guest, &[Part::In(BUFFER)]);
        station.rx.want_interrupt(&station.guest.memory);
        station.host.send(&packet).unwrap();
        let heard = loop {
            match station.received() {
                Some(packet) => break packet,
                None => wait_for_interrupt(&station.guest, NET),
            }
        };
        assert_eq!(heard[12..], packet[12..]);
        while station.tx.take_used(&station.guest.memory).is_none() {}
    }
    assert!(faults.try_recv().is_err());
    thread.stop().unwrap();
}

#[test]
fn a_frame_that_was_queued_at_the_freeze_leaves_by_the_clones_own_tap() {
    let mut station = Station::new();
    station.rx.submit(&station.guest, &[Part::In(BUFFER)]);
    station.guest.run();
    station.guest.devices.pause().unwrap();
    let state = station.guest.devices.save();
    assert_eq!(state.network(), NetworkDevice::Present);
    let bytes = postcard_bytes(&state);
    assert_eq!(
        postcard::from_bytes::<DevicesStateV1>(&bytes).unwrap(),
        state
    );
    let packet = with_header([0; 12], &frame(9, 80));
    station.tx.submit(&station.guest, &[Part::Out(&packet)]);
    let clones = [(), ()].map(|()| {
        let clone = thaw(&station.guest, &state).unwrap();
        assert_eq!(clone.devices.save(), state);
        let host = plug(&clone);
        clone.devices.resume();
        clone.run();
        assert_eq!(sent(&host).unwrap(), packet);
        (clone, host)
    });
    // Each goes on by itself, at the same address.
    for (number, (clone, host)) in clones.iter().enumerate() {
        host.send(&with_header([0; 12], &frame(number, 90)))
            .unwrap();
        clone.run();
    }
    for (number, (clone, host)) in clones.iter().enumerate() {
        let mut rx = station.rx.clone();
        let (head, length) = rx.take_used(&clone.memory).unwrap();
        let heard = rx.part(&clone.memory, head, 0, length as usize);
        assert_eq!(heard[12..], frame(number, 90));
        assert_eq!(sent(host), None);
    }
    assert_eq!(
        sent(&station.host),
        None,
        "nothing of it left by the old one"
    );
}

#[test]
fn a_reset_closes_the_tap_and_nothing_of_a_life_comes_through_the_next() {
    let mut station = Station::new();
    for _ in 0..4 {
        station.rx.submit(&station.guest, &[Part::In(BUFFER)]);
    }
    let (sender, faults) = channel();
    let thread = station.guest.devices.start(sender).unwrap();
    station.guest.devices.pause().unwrap();
    let state = station.guest.devices.save();
    let mut bytes = vec![0; MEMORY_BYTES];
    (station.guest.memory.read_slice(&mut bytes, GuestAddress(0))).unwrap();
    let (fresh_rx, fresh_tx) = (station.rx.clone(), station.tx.clone());
    for life in 0..10 {
        station.guest.devices.resume();
        let packet = with_header([0; 12], &frame(life, 500));
        station.host.send(&packet).unwrap();
        station.rx.want_interrupt(&station.guest.memory);
        let heard = loop {
            match station.received() {
                Some(packet) => break packet,
                None => wait_for_interrupt(&station.guest, NET),
            }
        };
        assert_eq!(heard[12..], packet[12..]);
        station.tx.submit(&station.guest, &[Part::Out(&packet)]);
        // Perhaps on its way to the guest, perhaps not, when it is parked.
        let old = with_header([0; 12], &[0xdd; 700]);
        station.host.send(&old).unwrap();
        station.guest.devices.park().unwrap();
        let (host, agent) = UnixStream::pair().unwrap();
        (station.guest.devices)
            .reset_to(&state, DiskFiles::Kept, agent)
            .unwrap();
        station.guest.host = host;
        assert_eq!(station.guest.devices.save(), state);
        assert!(
            station
                .guest
                .devices
                .with_net(|net| net.is_wiped())
                .unwrap()
        );
        assert!(station.host.send(&old).is_err(), "the old tap is closed");
        (station.guest.memory.write_slice(&bytes, GuestAddress(0))).unwrap();
        (station.rx, station.tx) = (fresh_rx.clone(), fresh_tx.clone());
        if life % 3 == 2 {
            // One life without a network.
            station.guest.devices.resume();
            station.guest.devices.park().unwrap();
            let (host, agent) = UnixStream::pair().unwrap();
            (station.guest.devices)
                .reset_to(&state, DiskFiles::Kept, agent)
                .unwrap();
            station.guest.host = host;
        }
        station.host = plug(&station.guest);
    }
    assert!(faults.try_recv().is_err());
    thread.stop().unwrap();
}

#[test]
fn a_second_tap_takes_the_place_of_the_first() {
    let mut station = Station::new();
    let first = std::mem::replace(&mut station.host, plug(&station.guest));
    assert!(first.send(&[0; 72]).is_err(), "it is closed");
    let packet = with_header([0; 12], &frame(5, 60));
    station.send(&[Part::Out(&packet)]);
    assert_eq!(sent(&station.host).unwrap(), packet);
}

#[test]
fn a_state_of_another_network_is_refused() {
    let station = Station::new();
    station.guest.devices.pause().unwrap();
    let state = station.guest.devices.save();
    for other in [
        NetStateV1 {
            mac: [2; 6],
            mtu: 1500,
        },
        NetStateV1 {
            mac: [0x06, 0x54, 0x48, 0x41, 0x57, 0x02],
            mtu: 9000,
        },
    ] {
        let mut wrong = state.clone();
        wrong.slots[NET].device = DeviceStateV1::Net(other);
        let refused = thaw(&station.guest, &wrong).map(drop).unwrap_err();
        assert!(matches!(refused, DeviceRestoreError::Network));
    }
    let mut wrong = state.clone();
    wrong.slots.swap(RNG, NET);
    assert!(matches!(
        thaw(&station.guest, &wrong).map(drop),
        Err(DeviceRestoreError::SlotKind { slot: RNG })
    ));
    // Neither with a device that is not there, nor without one that is.
    let (_host, agent) = UnixStream::pair().unwrap();
    let shape = [DiskAccess::CopyOnWrite, DiskAccess::ReadOnly];
    let absent = Devices::prepare((&shape, NetworkDevice::Absent), 3, memory()).unwrap();
    assert!(matches!(
        absent.reset_to(&state, DiskFiles::Kept, agent),
        Err(DeviceRestoreError::SlotCount { .. })
    ));
    wrong = state;
    wrong.slots.pop();
    assert!(matches!(
        thaw(&station.guest, &wrong).map(drop),
        Err(DeviceRestoreError::SlotCount { .. })
    ));
    assert_eq!((COW, VSOCK), (0, 2));
}

fn address() -> impl Strategy<Value = u64> {
    let end = MEMORY_BYTES as u64;
    prop_oneof![
        4 => 0x8_0000u64..0x9_0000,
        1 => 0x5_0000u64..0x6_0000,
        1 => end - 2000..end + 600,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..64, 1500u32..1540, Just(1526), any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn random_rings_of_the_network_are_harmless(
        features in prop::sample::select(&[VERSION_1, FEATURES, FEATURES | INDIRECT][..]),
        plugged in any::<bool>(),
        tables in prop::collection::vec(
            prop::collection::vec((address(), length(), 0u16..8, 0u16..70), 1..12), 2),
        heads in prop::collection::vec((0usize..2, 0u16..66, 0usize..2000), 1..40),
        available in prop::option::of((0usize..2, any::<u16>())),
    ) {
        let guest = new_guest();
        let host = plugged.then(|| plug(&guest));
        let mut rings = guest.bring_up(NET, features, 2);
        for (ring, table) in rings.iter().zip(&tables) {
            for (index, descriptor) in (0..).zip(table) {
                ring.set_descriptor(&guest.memory, index, *descriptor);
            }
        }
        for (queue, head, length) in heads {
            rings[queue].publish(&guest.memory, head);
            guest.write(NET, 0x50, queue as u32);
            if let Some(host) = &host {
                host.send(&vec![7; length]).unwrap();
            }
            guest.devices.serve_all();
            while let Some(packet) = host.as_ref().and_then(sent) {
                prop_assert!((26..=1526).contains(&packet.len()));
                prop_assert_eq!(&packet[..12], &[0; 12]);
            }
        }
        if let Some((queue, index)) = available {
            (guest.memory.write_obj(index, GuestAddress(rings[queue].available + 2))).unwrap();
            guest.write(NET, 0x50, queue as u32);
            guest.devices.serve_all();
        }
        guest.devices.pause().unwrap();
        let state = guest.devices.save();
        // What any guest can do to the device is a state that can be restored.
        let thawed = thaw(&guest, &state).unwrap();
        prop_assert_eq!(thawed.devices.save(), state);
    }
}
