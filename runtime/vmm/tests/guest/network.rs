//! The guest's side of the network tests: one interface, one peer.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use crate::{check, pattern};

const INTERFACE: &[u8] = b"eth0";
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
/// Where the host listens, both ways.
const PEER_PORT: u16 = 7000;
/// Where the guest hears what nobody asked for.
const OWN_PORT: u16 = 7001;
/// Longest wait for the peer, in an emulated host.
const PATIENCE: Duration = Duration::from_secs(60);

/// The interface that was set up, with sockets that live on in clones.
pub struct Station {
    peer: SocketAddrV4,
    asks: UdpSocket,
    listens: UdpSocket,
}

fn request() -> libc::ifreq {
    // SAFETY: plain integers and a union of them, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(INTERFACE) {
        *to = *from as libc::c_char;
    }
    request
}

fn internet(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: plain integers, for which all zeroes is a value.
    let mut generic: libc::sockaddr = unsafe { std::mem::zeroed() };
    generic.sa_family = libc::AF_INET as u16;
    for (to, from) in generic.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    generic
}

fn configure(socket: &UdpSocket, call: libc::c_ulong, request: &libc::ifreq) {
    let request: *const libc::ifreq = request;
    // SAFETY: all of these calls read a live ifreq.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), call, request) };
    check("interface", result.into());
}

impl Station {
    /// Sets the interface up: `address` is ours, `peer` the host's.
    pub fn new(address: &str, peer: &str) -> Self {
        let any = UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut interface = request();
        interface.ifr_ifru.ifru_addr = internet(address.parse().unwrap());
        configure(&any, libc::SIOCSIFADDR, &interface);
        interface.ifr_ifru.ifru_netmask = internet(NETMASK);
        configure(&any, libc::SIOCSIFNETMASK, &interface);
        interface.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        configure(&any, libc::SIOCSIFFLAGS, &interface);
        let bind = |port| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        Self {
            peer: SocketAddrV4::new(peer.parse().unwrap(), PEER_PORT),
            asks: bind(0),
            listens: bind(OWN_PORT),
        }
    }

    /// The interface's Ethernet address and MTU.
    pub fn describe(&self) -> String {
        let read = |name: &str| {
            let text = fs::read_to_string(format!("/sys/class/net/eth0/{name}")).unwrap();
            text.trim().to_owned()
        };
        format!("{} {}", read("address"), read("mtu"))
    }

    /// Sends `text` and returns the answer.
    pub fn exchange_datagram(&self, text: &str) -> io::Result<String> {
        self.asks.send_to(text.as_bytes(), self.peer)?;
        receive(&self.asks)
    }

    /// Sends `count` bytes of the pattern on a new stream and counts what comes back right.
    pub fn exchange_stream(&self, count: u64) -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.peer.into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut half = stream.try_clone()?;
        let writer = thread::spawn(move || {
            let bytes: Vec<u8> = (0..count).map(pattern).collect();
            half.write_all(&bytes)?;
            half.shutdown(Shutdown::Write)
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back)?;
        writer.join().unwrap()?;
        let right = |(at, byte): &(u64, u8)| *byte == pattern(*at);
        Ok((0..).zip(back).filter(right).count().to_string())
    }

    /// What was said to us, up to the datagram `last`.
    pub fn heard(&self, last: &str) -> io::Result<String> {
        let mut heard = Vec::new();
        while heard.last().is_none_or(|text| text != last) {
            heard.push(receive(&self.listens)?);
        }
        Ok(heard.join(" "))
    }
}

fn receive(socket: &UdpSocket) -> io::Result<String> {
    let mut bytes = [0; 2048];
    let length = socket.recv(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}
