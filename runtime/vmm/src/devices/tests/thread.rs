//! The device thread over real eventfds and a real socket.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::driver::{Guest, Part, RNG, VERSION_1, VSOCK};
use crate::devices::{DeviceFault, DeviceStartError};

/// Waits until `window` interrupts, as a vCPU halted in its idle loop would.
pub fn wait_for_interrupt(guest: &Guest, window: usize) {
    let interrupt = guest
        .devices
        .mmio_windows()
        .unwrap()
        .remove(window)
        .interrupt;
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, interrupt.as_raw_fd(), event)
        .unwrap();
    let mut events = [EpollEvent::default()];
    assert_eq!(
        epoll.wait(20_000, &mut events).unwrap(),
        1,
        "no interrupt within 20 s"
    );
    interrupt.read().unwrap();
}

#[test]
fn notifications_are_served_and_pausing_parks_them() {
    let guest = Guest::with_two_disks();
    let (sender, _faults) = channel();
    let thread = guest.devices.start(sender.clone()).unwrap();
    assert!(matches!(
        guest.devices.start(sender),
        Err(DeviceStartError::Started)
    ));
    let mut ring = guest.bring_up(RNG, VERSION_1, 1).remove(0);
    let head = ring.submit(&guest, &[Part::In(32)]);
    wait_for_interrupt(&guest, RNG);
    assert_eq!(ring.take_used(&guest.memory), Some((head, 32)));
    for _ in 0..50 {
        guest.devices.pause().unwrap();
        let head = ring.submit(&guest, &[Part::In(8)]);
        assert_eq!(ring.take_used(&guest.memory), None);
        guest.devices.save();
        guest.devices.resume();
        wait_for_interrupt(&guest, RNG);
        while ring.take_used(&guest.memory).is_none() {
            wait_for_interrupt(&guest, RNG);
        }
        assert!(head < ring.size);
    }
    thread.stop().unwrap();
    assert!(guest.devices.pause().is_err());
}

#[test]
fn agent_stream_wakes_the_thread() {
    let mut guest = Guest::with_two_disks();
    let (sender, faults) = channel();
    let thread = guest.devices.start(sender).unwrap();
    let mut rings = guest.bring_up(VSOCK, VERSION_1, 3);
    let mut transmit = rings.remove(1);
    let mut receive = rings.remove(0);
    for _ in 0..8 {
        receive.submit(&guest, &[Part::In(1024)]);
    }
    let mut packet = vec![0; 44];
    (packet[0], packet[8], packet[16], packet[21], packet[28]) = (3, 2, 7, 4, 1);
    (packet[30], packet[38]) = (1, 1);
    transmit.submit(&guest, &[Part::Out(&packet)]);
    let mut next = |guest: &Guest| loop {
        match receive.take_used(&guest.memory) {
            Some((head, length)) => {
                return receive.part(&guest.memory, head, 0, length as usize);
            }
            None => wait_for_interrupt(guest, VSOCK),
        }
    };
    assert_eq!(next(&guest)[30], 2, "response");
    guest.host.write_all(b"ping").unwrap();
    assert_eq!(next(&guest)[44..], *b"ping");
    (packet[24], packet[30]) = (4, 5);
    packet.extend(b"pong");
    transmit.submit(&guest, &[Part::Out(&packet)]);
    let mut heard = [0; 4];
    guest
        .host
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    guest.host.read_exact(&mut heard).unwrap();
    assert_eq!(heard, *b"pong");
    guest.host.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(next(&guest)[30], 3, "reset");
    let fault = faults.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(matches!(fault, DeviceFault::AgentStreamClosed));
    thread.stop().unwrap();
}

#[test]
fn closed_stream_is_told_although_nobody_connected() {
    let guest = Guest::with_two_disks();
    let (sender, faults) = channel();
    let thread = guest.devices.start(sender).unwrap();
    let _rings = guest.bring_up(VSOCK, VERSION_1, 3);
    guest.host.shutdown(std::net::Shutdown::Both).unwrap();
    let fault = faults.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(matches!(fault, DeviceFault::AgentStreamClosed));
    thread.stop().unwrap();
}

/// Two vCPUs that write whatever they like, while the machine is paused and resumed.
#[test]
fn hostile_vcpus_never_stop_the_machine_from_pausing() {
    let guest = Guest::with_two_disks();
    let (sender, faults) = channel();
    let thread = guest.devices.start(sender).unwrap();
    std::thread::scope(|scope| {
        for seed in [1u32, 2] {
            let guest = &guest;
            scope.spawn(move || {
                let mut state = seed;
                let mut next = |limit: u32| {
                    state ^= state << 13;
                    state ^= state >> 17;
                    state ^= state << 5;
                    state % limit
                };
                for _ in 0..20_000 {
                    let window = next(4) as usize;
                    match next(8) {
                        0 => guest.write(window, 0x70, [0, 1, 3, 11, 15][next(5) as usize]),
                        1 => guest.write(window, 0x20, next(4)),
                        2 => guest.write(window, 0x24, next(2)),
                        3 => guest.write(window, 0x30, next(3)),
                        4 => guest.write(window, 0x80 + 16 * u64::from(next(3)), next(64) << 12),
                        5 => guest.write(window, 0x44, 1),
                        6 => guest.write(window, 0x50, next(3)),
                        _ => drop(guest.read(window, u64::from(next(70)) * 4)),
                    }
                }
            });
        }
        for _ in 0..100 {
            guest.devices.pause().unwrap();
            guest.devices.resume();
        }
    });
    thread.stop().unwrap();
    assert!(faults.try_iter().count() <= 65, "faults are bounded");
}
