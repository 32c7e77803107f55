//! Guests on real taps: each in a network namespace of its own, with the same addresses inside.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use thaw_agent_protocol::network::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, NETMASK, VNET_HEADER_BYTES,
};
use thaw_vmm_control::{Fault, PrepareRequest, Reply, Request, RestoreRequest};

use crate::monitor::Monitor;
use crate::rewind::rewind_onto;

/// Ports of the host and of the guest (tests/guest/network.rs).
const HOST_PORT: u16 = 7000;
const GUEST_PORT: u16 = 7001;
/// Longest wait for the guest: an emulated host is slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// One end of a network: a tap, and sockets at the gateway's address. The namespace lives as long as they do.
pub struct Slot {
    /// The monitor's end.
    pub tap: File,
    datagrams: UdpSocket,
    streams: TcpListener,
}

fn check(result: libc::c_int) {
    assert!(result >= 0, "{}", io::Error::last_os_error());
}

fn named(name: &[u8]) -> libc::ifreq {
    // SAFETY: plain integers and a union of them, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    request
}

fn internet(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: plain integers, for which all zeroes is a value.
    let mut generic: libc::sockaddr = unsafe { std::mem::zeroed() };
    generic.sa_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap();
    for (to, from) in generic.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    generic
}

fn configure(socket: &UdpSocket, call: libc::c_ulong, request: &libc::ifreq) {
    let request: *const libc::ifreq = request;
    // SAFETY: all of these calls read a live ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), call, request) });
}

/// A tap as the monitor wants it, in this thread's network namespace.
fn tap() -> File {
    let device = File::options().read(true).write(true).open("/dev/net/tun");
    let device = device.expect("the kernel needs its module tun");
    let mut request = named(b"tap0");
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    let header = libc::c_int::try_from(VNET_HEADER_BYTES).unwrap();
    // SAFETY: TUNSETIFF reads and writes a live ifreq.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
    // SAFETY: TUNSETVNETHDRSZ reads a live int.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) });
    // SAFETY: TUNSETOFFLOAD takes a number.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETOFFLOAD, 0) });
    device
}

fn make_here() -> Slot {
    // SAFETY: no pointers; only this thread's namespace changes.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    let tap = tap();
    let any = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut request = named(b"tap0");
    request.ifr_ifru.ifru_hwaddr.sa_family = libc::ARPHRD_ETHER;
    // SAFETY: this member of the union was begun just above; every bit pattern of it is a value.
    let mac = unsafe { &mut request.ifr_ifru.ifru_hwaddr.sa_data };
    for (to, from) in mac.iter_mut().zip(GATEWAY_MAC) {
        *to = from as libc::c_char;
    }
    configure(&any, libc::SIOCSIFHWADDR, &request);
    request.ifr_ifru.ifru_addr = internet(GATEWAY_ADDRESS);
    configure(&any, libc::SIOCSIFADDR, &request);
    request.ifr_ifru.ifru_netmask = internet(NETMASK);
    configure(&any, libc::SIOCSIFNETMASK, &request);
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
    configure(&any, libc::SIOCSIFFLAGS, &request);
    let datagrams = UdpSocket::bind((GATEWAY_ADDRESS, HOST_PORT)).unwrap();
    datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
    let streams = TcpListener::bind((GATEWAY_ADDRESS, HOST_PORT)).unwrap();
    Slot {
        tap,
        datagrams,
        streams,
    }
}

impl Slot {
    /// A network of its own.
    pub fn new() -> Self {
        // A thread's namespace cannot be left again: the thread is given up with it.
        thread::spawn(make_here).join().unwrap()
    }

    /// Takes the datagrams that have come, and sends each of two lengths to whoever listens on the tap, asking nobody for an address.
    pub fn chat(&self) -> u64 {
        self.datagrams.set_nonblocking(true).unwrap();
        let mut heard = 0;
        while self.datagrams.recv_from(&mut [0; 2048]).is_ok() {
            heard += 1;
        }
        self.datagrams.set_broadcast(true).unwrap();
        for length in [1, 1400] {
            // A full queue takes none.
            let _ = self
                .datagrams
                .send_to(&vec![7; length], (Ipv4Addr::BROADCAST, GUEST_PORT));
        }
        heard
    }

    /// The guest's next datagram and where it came from.
    fn heard(&self) -> (String, SocketAddr) {
        let mut bytes = [0; 2048];
        let (length, from) = self.datagrams.recv_from(&mut bytes).unwrap();
        assert_eq!(from.ip(), GUEST_ADDRESS);
        (String::from_utf8(bytes[..length].to_vec()).unwrap(), from)
    }

    /// Sends back whatever comes on the next stream.
    fn echo_stream(&self) {
        let (mut stream, from) = self.streams.accept().unwrap();
        assert_eq!(from.ip(), GUEST_ADDRESS);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
}

/// A datagram there and back.
fn exchange(monitor: &mut Monitor, slot: &Slot, text: &str) {
    monitor.tell(&format!("datagram {text}"));
    let (heard, from) = slot.heard();
    assert_eq!(heard, text);
    let answer = format!("answer-to-{text}");
    slot.datagrams.send_to(answer.as_bytes(), from).unwrap();
    assert_eq!(monitor.hear(), answer);
}

/// So many bytes there and back.
fn stream(monitor: &mut Monitor, slot: &Slot, count: u64) {
    monitor.tell(&format!("stream {count}"));
    slot.echo_stream();
    assert_eq!(monitor.hear(), count.to_string());
}

fn mac(bytes: [u8; 6]) -> String {
    let pairs: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    pairs.join(":")
}

fn claim() -> Request {
    Request::Restore(RestoreRequest {
        resume: true,
        has_tap: true,
        ..Default::default()
    })
}

#[test]
fn clones_at_the_same_address_speak_with_their_own_taps_and_a_rewound_one_with_none_before() {
    let first = Slot::new();
    let mut monitor = Monitor::boot_with("vmlinux", 1, &[], Some(&first.tap));
    assert_eq!(monitor.command("devices"), "3", "vsock, rng, network");
    let set_up = format!("network {GUEST_ADDRESS} {GATEWAY_ADDRESS}");
    assert_eq!(monitor.command(&set_up), format!("{} 1500", mac(GUEST_MAC)));
    exchange(&mut monitor, &first, "before");
    stream(&mut monitor, &first, 1_000_000);
    let snapshot = monitor.freeze();
    monitor.quit();

    let slots = [Slot::new(), Slot::new()];
    let mut shell = Monitor::start();
    let prepare = Request::Prepare(PrepareRequest {
        vcpu_count: 1,
        memory_mib: 256,
        disks: Vec::new(),
        has_network: true,
    });
    shell.done(&prepare, &[]);
    let mut clones = [shell, Monitor::start()];
    for (clone, slot) in clones.iter_mut().zip(&slots) {
        clone.done(&claim(), &[&snapshot, &slot.tap]);
    }
    // Both wait for their answers at once, from the same address to the same address.
    for (number, clone) in clones.iter_mut().enumerate() {
        clone.tell(&format!("datagram clone{number}"));
    }
    let heard = slots.each_ref().map(Slot::heard);
    for (number, (text, from)) in heard.iter().enumerate().rev() {
        assert_eq!(*text, format!("clone{number}"));
        let answer = format!("slot{number}");
        let answered = slots[number].datagrams.send_to(answer.as_bytes(), from);
        answered.unwrap();
    }
    for (number, clone) in clones.iter_mut().enumerate() {
        assert_eq!(clone.hear(), format!("slot{number}"));
        stream(clone, &slots[number], 100_000 + number as u64);
    }

    // What the old tap still holds when the machine stops, and what is sent to it later, is for nobody.
    let [mut clone, other] = clones;
    let guest = (GUEST_ADDRESS, GUEST_PORT);
    for _ in 0..3 {
        slots[0].datagrams.send_to(b"seen", guest).unwrap();
    }
    assert_eq!(clone.command("heard seen"), "seen");
    clone.done(&Request::Pause, &[]);
    slots[0].datagrams.send_to(b"old", guest).unwrap();
    let fresh = Slot::new();
    rewind_onto(&mut clone, Some(&fresh.tap));
    clone.done(&Request::Resume, &[]);
    let _ = slots[0].datagrams.send_to(b"older", guest); // there may be no carrier any more
    exchange(&mut clone, &fresh, "rewound");
    fresh.datagrams.send_to(b"new", guest).unwrap();
    assert_eq!(clone.command("heard new"), "new");
    stream(&mut clone, &fresh, 50_000);
    clone.quit();
    other.quit();
}

#[test]
fn a_tap_fits_only_a_snapshot_with_a_network_and_a_shell_that_was_made_for_it() {
    let slot = Slot::new();
    let mut monitor = Monitor::boot("vmlinux", 1, &[]);
    assert_eq!(monitor.command("devices"), "2", "vsock, rng");
    let without = monitor.freeze();
    monitor.quit();
    let refused = |monitor: &mut Monitor, request: &Request, files: &[&File], why: &str| {
        let Reply::Failed(failure) = monitor.ask(request, files) else {
            panic!("not refused: {why}");
        };
        assert_eq!(failure.fault, Fault::Caller, "{failure}");
        assert!(failure.message.contains(why), "{failure}");
    };
    let mut clone = Monitor::start();
    refused(
        &mut clone,
        &claim(),
        &[&without, &slot.tap],
        "has no network device",
    );
    clone.quit();
    let mut clone = Monitor::start();
    refused(&mut clone, &claim(), &[&without, &without], "tap");
    clone.quit();
    let mut shell = Monitor::start();
    let prepare = Request::Prepare(PrepareRequest {
        vcpu_count: 1,
        memory_mib: 256,
        disks: Vec::new(),
        has_network: true,
    });
    shell.done(&prepare, &[]);
    let restore = Request::Restore(RestoreRequest::default());
    refused(&mut shell, &restore, &[&without], "cannot hold");
    shell.quit();
}
