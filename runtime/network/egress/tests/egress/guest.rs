//! A guest: a TCP/IP stack in user space (smoltcp) on the descriptor of a tap, as a virtio-net device would be.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Instant as Clock;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, RecordType};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};
use thaw_network::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, PREFIX_BITS, VNET_HEADER_BYTES,
};

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::world::LIMIT;

const FRAME_BYTES_MAX: usize = 1514;

struct Tap {
    tap: OwnedFd,
    /// All frames that ever came from the tap.
    seen: Vec<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a OwnedFd);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut bytes = vec![0; VNET_HEADER_BYTES + length];
        let result = fill(&mut bytes[VNET_HEADER_BYTES..]);
        // A full queue drops the frame, as a wire would.
        let _ = rustix::io::write(self.0, &bytes);
        result
    }
}

impl Device for Tap {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let mut bytes = vec![0; VNET_HEADER_BYTES + FRAME_BYTES_MAX];
        let length = rustix::io::read(&self.tap, &mut bytes).ok()?;
        let frame = bytes[VNET_HEADER_BYTES..length].to_vec();
        self.seen.push(frame.clone());
        Some((Received(frame), Sending(&self.tap)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&self.tap))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}

/// How a connection ended, or that it has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Open,
    Closed,
    Reset,
}

pub struct Guest {
    device: Tap,
    interface: Interface,
    sockets: SocketSet<'static>,
    port: u16,
}

impl Guest {
    pub fn new(tap: OwnedFd) -> Self {
        let mut device = Tap {
            tap,
            seen: Vec::new(),
        };
        let config = Config::new(EthernetAddress(GUEST_MAC).into());
        let mut interface = Interface::new(config, &mut device, Instant::now());
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(GUEST_ADDRESS.into(), PREFIX_BITS))
                .unwrap();
        });
        interface
            .routes_mut()
            .add_default_ipv4_route(GATEWAY_ADDRESS)
            .unwrap();
        Self {
            device,
            interface,
            sockets: SocketSet::new(Vec::new()),
            port: 40_000,
        }
    }

    /// Whether these bytes ever came to the guest.
    pub fn has_seen(&self, bytes: &[u8]) -> bool {
        let all = self.device.seen.concat();
        all.windows(bytes.len()).any(|part| part == bytes)
    }

    /// The kinds of frames that came (EtherTypes).
    pub fn kinds_seen(&self) -> BTreeSet<[u8; 2]> {
        let kind = |frame: &Vec<u8>| [frame[12], frame[13]];
        self.device.seen.iter().map(kind).collect()
    }

    /// Sends a query for a name from any address, past the stack.
    pub fn query_from(&mut self, mac: [u8; 6], address: Ipv4Addr, name: &str) {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        let query = query.to_vec().unwrap();
        let udp_length = u16::try_from(8 + query.len()).unwrap();
        let mut ip = [
            &[0x45, 0][..],
            &(20 + udp_length).to_be_bytes(),
            &[0, 0, 0, 0, 64, 17, 0, 0],
        ]
        .concat();
        ip.extend(address.octets());
        ip.extend(GATEWAY_ADDRESS.octets());
        let sum: u32 = ip
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
            .sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        // Without a checksum of its own (RFC 768).
        let udp = [9999_u16, 53, udp_length, 0].map(u16::to_be_bytes).concat();
        let header = vec![0; VNET_HEADER_BYTES];
        let frame = [&header, &GATEWAY_MAC[..], &mac, &[8, 0], &ip, &udp, &query].concat();
        assert_eq!(
            rustix::io::write(&self.device.tap, &frame).unwrap(),
            frame.len()
        );
    }

    /// Lets the stack work until `done`.
    pub fn until<T>(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut SocketSet<'static>) -> Option<T>,
    ) -> T {
        let began = Clock::now();
        loop {
            let now = Instant::now();
            self.interface
                .poll(now, &mut self.device, &mut self.sockets);
            if let Some(result) = done(&mut self.sockets) {
                // What that has queued goes out.
                self.interface
                    .poll(now, &mut self.device, &mut self.sockets);
                return result;
            }
            assert!(
                began.elapsed() < LIMIT,
                "the guest waits in vain for {what}"
            );
            let wait = Timespec {
                tv_sec: 0,
                tv_nsec: 20_000_000,
            };
            poll(
                &mut [PollFd::new(&self.device.tap.as_fd(), PollFlags::IN)],
                Some(&wait),
            )
            .unwrap();
        }
    }

    /// Begins a connection.
    pub fn begin(&mut self, to: Ipv4Addr, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 64 * 1024]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        self.port += 1;
        socket
            .connect(self.interface.context(), (to, port), self.port)
            .unwrap();
        self.sockets.add(socket)
    }

    /// Sends, and reads until it has `enough` or the connection ends.
    pub fn talk(&mut self, handle: SocketHandle, bytes: &[u8], enough: usize) -> (Vec<u8>, End) {
        let mut left: VecDeque<u8> = bytes.iter().copied().collect();
        let mut read = Vec::new();
        let end = self.until("a connection", |sockets| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            if socket.may_send() && !left.is_empty() {
                let sent = socket.send_slice(left.make_contiguous()).unwrap();
                left.drain(..sent);
            }
            while socket.can_recv() {
                socket
                    .recv(|part| {
                        read.extend_from_slice(part);
                        (part.len(), ())
                    })
                    .unwrap();
            }
            match socket.state() {
                tcp::State::Closed => Some(End::Reset),
                tcp::State::CloseWait | tcp::State::TimeWait => Some(End::Closed),
                tcp::State::Established if left.is_empty() && read.len() >= enough => {
                    Some(End::Open)
                }
                _ => None,
            }
        });
        (read, end)
    }

    /// Ends a connection hard.
    pub fn abort(&mut self, handle: SocketHandle) {
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).abort();
        self.until("nothing", |_| Some(()));
    }

    /// A connection, something sent, and what comes back.
    pub fn ask(&mut self, to: Ipv4Addr, port: u16, bytes: &[u8], enough: usize) -> (Vec<u8>, End) {
        let handle = self.begin(to, port);
        self.talk(handle, bytes, enough)
    }

    /// Whether a connection is reset before a byte has come.
    pub fn is_refused(&mut self, to: Ipv4Addr, port: u16) -> bool {
        self.ask(to, port, b"hello", 1) == (Vec::new(), End::Reset)
    }

    /// A GET over plain HTTP: status line and body, more or less.
    pub fn get(&mut self, to: Ipv4Addr, head: &str) -> String {
        let (bytes, _) = self.ask(to, 80, head.as_bytes(), usize::MAX);
        String::from_utf8(bytes).unwrap()
    }

    /// A GET over TLS by a client that trusts this authority (PEM) and speaks that protocol; what came, or why nothing did.
    pub fn get_tls(
        &mut self,
        (to, name): (Ipv4Addr, &'static str),
        head: &str,
        authority: &str,
        protocol: &str,
    ) -> Result<String, String> {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from_pem_slice(authority.as_bytes()).unwrap();
        roots.add(certificate).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.into()];
        let server = ServerName::try_from(name).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), server).unwrap();
        client.writer().write_all(head.as_bytes()).unwrap();
        let handle = self.begin(to, 443);
        let mut said = Vec::new();
        let ended = self.until("a TLS connection", |sockets| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            while socket.can_recv() {
                let taken = socket.recv(|part| (client.read_tls(&mut &*part).unwrap(), ()));
                taken.unwrap();
                let state = client.process_new_packets();
                // An alert for the server, too.
                let mut alert = Vec::new();
                if let Err(error) = state {
                    let _ = client.write_tls(&mut alert);
                    let _ = socket.send_slice(&alert);
                    return Some(Err(error.to_string()));
                }
                // All that is there, whether the server has ended or not.
                let _ = client.reader().read_to_end(&mut said);
            }
            while socket.may_send() && client.wants_write() {
                let mut bytes = Vec::new();
                client.write_tls(&mut bytes).unwrap();
                assert_eq!(socket.send_slice(&bytes), Ok(bytes.len()));
            }
            match socket.state() {
                tcp::State::Closed => Some(Err("reset".to_owned())),
                tcp::State::CloseWait | tcp::State::TimeWait => Some(Ok(())),
                _ => None,
            }
        });
        self.abort(handle);
        ended.map(|()| String::from_utf8(said).unwrap())
    }

    /// Addresses of a name, from the slot's resolver.
    pub fn resolve(&mut self, name: &str) -> Result<Vec<Ipv4Addr>, ResponseCode> {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        self.port += 1;
        socket.bind(self.port).unwrap();
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        socket
            .send_slice(&query.to_vec().unwrap(), (GATEWAY_ADDRESS, 53))
            .unwrap();
        let handle = self.sockets.add(socket);
        let answer = self.until("a name", |sockets| {
            let socket = sockets.get_mut::<udp::Socket<'_>>(handle);
            Some(socket.recv().ok()?.0.to_vec())
        });
        self.sockets.remove(handle);
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(answer.metadata.id, query.metadata.id);
        match answer.metadata.response_code {
            ResponseCode::NoError => Ok(answer
                .answers
                .iter()
                .filter_map(|record| match &record.data {
                    RData::A(A(address)) => Some(*address),
                    _ => None,
                })
                .collect()),
            code => Err(code),
        }
    }
}
