//! The agent channel: handshake, flow control, loss of either end, and snapshots in the middle of traffic.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;

use super::driver::{EVENT_IDX, GUEST_CID, Guest, Part, Ring, VERSION_1, VSOCK};
use crate::devices::DeviceFault;
use crate::devices::state::{ChannelStateV1, DeviceStateV1};
use crate::devices::vsock::Channel;
use crate::devices::vsock::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, TYPE_STREAM,
};

const PORT: u32 = 5000;
const RX_BYTES: usize = 4096;

/// The guest's socket layer, as far as one stream needs it.
struct Peer {
    guest: Guest,
    rx: Ring,
    tx: Ring,
    buf_alloc: u32,
    received: u32,
    announced: u32,
    sent: u32,
    host_buf_alloc: u32,
    host_fwd_cnt: u32,
    /// Packets without data.
    inbox: Vec<Header>,
    data: Vec<u8>,
}

impl Peer {
    fn new(buf_alloc: u32) -> Self {
        let guest = Guest::new(&[&[0; 512], &[0; 512]]);
        guest.host.set_nonblocking(true).unwrap();
        let mut rings = guest.bring_up(VSOCK, VERSION_1 | EVENT_IDX, 3);
        let (tx, rx) = (rings.remove(1), rings.remove(0));
        let (inbox, data) = (Vec::new(), Vec::new());
        let (received, announced, sent, host_buf_alloc, host_fwd_cnt) = (0, 0, 0, 0, 0);
        Self {
            guest,
            rx,
            tx,
            buf_alloc,
            received,
            announced,
            sent,
            host_buf_alloc,
            host_fwd_cnt,
            inbox,
            data,
        }
    }

    fn connected(buf_alloc: u32) -> Self {
        let mut peer = Self::new(buf_alloc);
        peer.send(PORT, OP_REQUEST, &[]);
        peer.pump();
        assert_eq!(peer.inbox.remove(0).op, OP_RESPONSE);
        peer
    }

    fn header(&self, port: u32, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: 2,
            src_port: port,
            dst_port: 1024,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.received,
            ..Header::default()
        }
    }

    fn send(&mut self, port: u32, op: u16, payload: &[u8]) {
        let header = self.header(port, op);
        self.announced = self.received;
        self.send_raw(header, payload);
    }

    fn send_raw(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            length: payload.len() as u32,
            ..header
        };
        // Linux sends header and payload in one buffer or in two; both are tried.
        let mut bytes = header.encode().to_vec();
        if payload.len().is_multiple_of(2) {
            bytes.extend_from_slice(payload);
            self.tx.submit(&self.guest, &[Part::Out(&bytes)]);
        } else {
            self.tx
                .submit(&self.guest, &[Part::Out(&bytes), Part::Out(payload)]);
        }
    }

    fn credit(&self) -> u32 {
        self.host_buf_alloc - self.sent.wrapping_sub(self.host_fwd_cnt)
    }

    /// Sends what credit and ring allow; bytes taken.
    fn send_data(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.credit() as usize).min(2000);
        if count == 0 || !self.tx.has_room() {
            return 0;
        }
        self.send(PORT, OP_RW, &bytes[..count]);
        self.sent = self.sent.wrapping_add(count as u32);
        count
    }

    fn offer_rx(&mut self) {
        while self.rx.has_room() {
            self.rx.submit(&self.guest, &[Part::In(RX_BYTES)]);
        }
    }

    fn collect(&mut self) {
        while self.tx.take_used(&self.guest.memory).is_some() {}
        while let Some((head, length)) = self.rx.take_used(&self.guest.memory) {
            let bytes = self.rx.part(&self.guest.memory, head, 0, length as usize);
            let header = Header::decode(bytes.first_chunk().unwrap());
            assert_eq!(bytes.len(), HEADER_BYTES + header.length as usize);
            assert_eq!((header.src_cid, header.dst_cid), (2, GUEST_CID));
            if header.op != OP_RST {
                self.host_buf_alloc = header.buf_alloc;
                self.host_fwd_cnt = header.fwd_cnt;
            }
            match header.op {
                OP_RW => {
                    self.received = self.received.wrapping_add(header.length);
                    let unannounced = self.received.wrapping_sub(self.announced);
                    assert!(unannounced <= self.buf_alloc, "the host overran our buffer");
                    self.data.extend_from_slice(&bytes[HEADER_BYTES..]);
                }
                OP_CREDIT_REQUEST | OP_CREDIT_UPDATE => {}
                _ => self.inbox.push(header),
            }
        }
    }

    /// One round of the guest and of the device.
    fn pump(&mut self) {
        self.offer_rx();
        self.guest.run();
        self.collect();
        if self.received != self.announced && self.tx.has_room() {
            self.send(PORT, OP_CREDIT_UPDATE, &[]);
        }
        self.guest.run();
        self.collect();
    }

    fn channel_state(&self) -> ChannelStateV1 {
        match self.guest.devices.slots[VSOCK].save().device {
            DeviceStateV1::Vsock(state) => state,
            other => panic!("window {VSOCK} holds {other:?}"),
        }
    }

    fn faults(&self) -> Receiver<DeviceFault> {
        let (sender, receiver) = channel();
        self.guest.devices.faults.connect(sender);
        receiver
    }

    /// Freezes the machine and goes on in another; the old host socket is handed back.
    fn thaw(&mut self) -> UnixStream {
        let thawed = self.guest.clone_by_snapshot(&[&[0; 512], &[0; 512]]);
        thawed.host.set_nonblocking(true).unwrap();
        std::mem::replace(&mut self.guest, thawed).host
    }
}

fn read_available(stream: &mut UnixStream, into: &mut Vec<u8>) {
    let mut buffer = [0; 8192];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => into.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}

fn write_available(stream: &mut UnixStream, bytes: &[u8]) -> usize {
    match stream.write(bytes) {
        Ok(count) => count,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    }
}

fn noise(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    })
    .take(length)
    .collect()
}

#[test]
fn header_has_the_layout_of_the_specification() {
    let mut expected = Vec::new();
    expected.extend(3u64.to_le_bytes());
    expected.extend(2u64.to_le_bytes());
    expected.extend([5u8, 0, 0, 0, 0, 4, 0, 0, 7, 0, 0, 0, 1, 0, 5, 0]);
    expected.extend([3u8, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0]);
    let header = Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: 5,
        dst_port: 1024,
        length: 7,
        kind: 1,
        op: 5,
        flags: 3,
        buf_alloc: 8,
        fwd_cnt: 9,
    };
    assert_eq!(header.encode()[..], expected);
    assert_eq!(Header::decode(&header.encode()), header);
}

#[test]
fn agent_connects_and_bytes_pass_both_ways() {
    let mut peer = Peer::new(65536);
    assert_eq!(peer.guest.read(VSOCK, 0x100), 3, "guest_cid");
    peer.guest.host.write_all(b"early").unwrap();
    peer.pump();
    assert!(peer.data.is_empty(), "nobody listens yet");
    peer.send(PORT, OP_REQUEST, &[]);
    peer.pump();
    let response = peer.inbox.remove(0);
    assert_eq!(
        (response.op, response.src_port, response.dst_port),
        (OP_RESPONSE, 1024, PORT)
    );
    assert_eq!(response.buf_alloc, 256 * 1024);
    assert_eq!(peer.data, b"early");
    assert_eq!(peer.guest.devices.first_agent_byte_ns(), None);
    assert_eq!(peer.send_data(b"hello"), 5);
    peer.pump();
    let mut heard = Vec::new();
    read_available(&mut peer.guest.host, &mut heard);
    assert_eq!(heard, b"hello");
    assert!(peer.guest.devices.first_agent_byte_ns().is_some());
    peer.guest.devices.pause().unwrap();
    peer.guest.devices.resume();
    assert_eq!(peer.guest.devices.first_agent_byte_ns(), None);
}

#[test]
fn everything_but_the_agent_port_is_reset_or_dropped() {
    let mut peer = Peer::new(65536);
    let request = peer.header(PORT, OP_REQUEST);
    let refused = [
        Header {
            dst_port: 22,
            ..request
        },
        Header {
            op: OP_RW,
            ..request
        },
        Header { op: 77, ..request },
        Header { kind: 2, ..request },
    ];
    for header in refused {
        peer.send_raw(header, &[]);
        peer.pump();
        let reset = peer.inbox.remove(0);
        assert_eq!((reset.op, reset.kind), (OP_RST, header.kind));
        assert_eq!((reset.src_port, reset.dst_port), (header.dst_port, PORT));
    }
    let dropped = [
        Header {
            op: OP_RST,
            ..request
        },
        Header {
            src_cid: 4,
            ..request
        },
        Header {
            dst_cid: 1,
            ..request
        },
        Header { kind: 3, ..request },
    ];
    for header in dropped {
        peer.send_raw(header, b"xy");
        peer.pump();
        assert!(peer.inbox.is_empty(), "{header:?}");
    }
    assert!(!peer.guest.needs_reset(VSOCK));
}

#[test]
fn second_connect_is_refused_while_the_first_lives() {
    let mut peer = Peer::connected(65536);
    let faults = peer.faults();
    peer.send(PORT + 1, OP_REQUEST, &[]);
    peer.guest.run();
    peer.pump();
    let ops: Vec<_> = peer
        .inbox
        .iter()
        .map(|header| (header.op, header.dst_port))
        .collect();
    assert_eq!(ops, [(OP_RST, PORT + 1)]);
    assert!(faults.try_recv().is_err());
    peer.send_data(b"still here");
    peer.guest.run();
    let mut heard = Vec::new();
    read_available(&mut peer.guest.host, &mut heard);
    assert_eq!(heard, b"still here");
}

#[test]
fn guest_closes_cleanly_and_connects_again() {
    let mut peer = Peer::connected(65536);
    let faults = peer.faults();
    peer.send_data(b"bye");
    let shutdown = Header {
        flags: 3,
        ..peer.header(PORT, OP_SHUTDOWN)
    };
    peer.send_raw(shutdown, &[]);
    peer.pump();
    assert_eq!(peer.inbox.remove(0).op, OP_RST);
    assert!(matches!(
        faults.try_recv(),
        Ok(DeviceFault::AgentDisconnected)
    ));
    let mut heard = Vec::new();
    read_available(&mut peer.guest.host, &mut heard);
    assert_eq!(heard, b"bye");
    peer.send(PORT, OP_REQUEST, &[]);
    peer.pump();
    assert_eq!(peer.inbox.remove(0).op, OP_RESPONSE);
}

#[test]
fn closed_host_resets_the_guest_once() {
    let mut peer = Peer::connected(65536);
    let faults = peer.faults();
    let (other, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut peer.guest.host, other));
    peer.pump();
    assert_eq!(peer.inbox.remove(0).op, OP_RST);
    assert!(matches!(
        faults.try_recv(),
        Ok(DeviceFault::AgentStreamClosed)
    ));
    peer.send(PORT, OP_REQUEST, &[]);
    peer.pump();
    assert_eq!(peer.inbox.remove(0).op, OP_RST);
    assert!(faults.try_recv().is_err());
}

#[test]
fn guest_that_overruns_its_credit_is_cut_off() {
    let mut peer = Peer::connected(65536);
    let faults = peer.faults();
    let mut packets = 0;
    while peer.inbox.is_empty() {
        assert!(packets < 10_000, "the buffer has no limit");
        packets += 1;
        peer.send(PORT, OP_RW, &[0; 4000]);
        peer.pump();
    }
    assert_eq!(peer.inbox.remove(0).op, OP_RST);
    assert!(matches!(
        faults.try_recv(),
        Ok(DeviceFault::AgentDisconnected)
    ));
    // Reconnecting does not make the backlog grow without end either.
    for _ in 0..20 {
        peer.send(PORT, OP_REQUEST, &[]);
        for _ in 0..80 {
            peer.send(PORT, OP_RW, &[0; 4000]);
            peer.pump();
        }
    }
    assert!(peer.channel_state().to_host.len() <= 2 * 256 * 1024);
}

#[test]
fn resets_wait_for_receive_buffers_within_a_limit() {
    let mut peer = Peer::new(65536);
    let stray = Header {
        dst_port: 22,
        ..peer.header(PORT, OP_REQUEST)
    };
    let mut sent = 0;
    for _ in 0..20 {
        while peer.tx.has_room() {
            peer.send_raw(stray, &[]);
            sent += 1;
        }
        peer.guest.run();
        while peer.tx.take_used(&peer.guest.memory).is_some() {}
    }
    assert!(peer.channel_state().replies.len() <= 64);
    while peer.inbox.len() < sent {
        let before = peer.inbox.len();
        peer.pump();
        assert!(peer.inbox.len() > before, "{before} of {sent} resets came");
    }
}

#[test]
fn a_host_that_leaves_while_all_answers_wait_makes_a_state_that_can_be_restored() {
    let mut channel = Channel::new(GUEST_CID);
    let peer = Peer::new(0);
    channel.receive(&peer.header(PORT, OP_REQUEST), &[], true);
    while channel.can_receive() {
        channel.receive(&peer.header(PORT + 1, OP_RW), &[], true);
    }
    channel.close_by_host();
    let state = channel.save();
    assert_eq!(state.replies.len(), 65);
    let restored = Channel::try_from((GUEST_CID, state.clone())).unwrap();
    assert_eq!(restored.save(), state);
}

#[test]
fn oversized_packet_breaks_the_device() {
    for length in [1, 4000, 65537, u32::MAX] {
        let mut peer = Peer::connected(65536);
        let header = Header {
            length,
            ..peer.header(PORT, OP_RW)
        };
        peer.tx.submit(&peer.guest, &[Part::Out(&header.encode())]);
        peer.guest.run();
        assert!(peer.guest.needs_reset(VSOCK), "{length}");
    }
}

#[test]
fn primed_bytes_lie_in_the_receive_queue_before_the_machine_runs() {
    let mut peer = Peer::connected(65536);
    peer.offer_rx();
    peer.rx.want_interrupt(&peer.guest.memory);
    peer.guest.write(VSOCK, 0x64, 1);
    drop(peer.thaw());
    let interrupt = peer
        .guest
        .devices
        .mmio_windows()
        .unwrap()
        .remove(VSOCK)
        .interrupt;
    peer.guest.host.write_all(b"invoke").unwrap();
    peer.guest.devices.prime();
    peer.collect();
    assert_eq!(peer.data, b"invoke");
    assert_eq!(peer.guest.read(VSOCK, 0x60), 1);
    // The edge that prime caused may have been lost with the interrupt chip's state.
    interrupt.read().unwrap();
    peer.guest.devices.resume();
    assert_eq!(interrupt.read().unwrap(), 1);
}

/// Both sides send a megabyte while the machine is frozen and thawed at `cuts`.
fn exchange(length: usize, buf_alloc: u32, cuts: &[usize]) {
    let (to_host, to_guest) = (noise(length, 7), noise(length, 11));
    let mut peer = Peer::connected(buf_alloc);
    let (mut guest_sent, mut host_sent) = (0, 0);
    let mut heard = Vec::new();
    for round in 0.. {
        assert!(round < 200_000, "the exchange stalled");
        if heard.len() == length && peer.data.len() == length {
            break;
        }
        guest_sent += peer.send_data(&to_host[guest_sent..]);
        let chunk = length.min(host_sent + 9000);
        host_sent += write_available(&mut peer.guest.host, &to_guest[host_sent..chunk]);
        if cuts.contains(&round) {
            let mut old = peer.thaw();
            read_available(&mut old, &mut heard);
            // What the device had not read is lost with the old socket; the host sends it again.
            let state = peer.channel_state();
            host_sent = state.connection.unwrap().sent as usize + state.to_guest.len();
            peer.guest.devices.resume();
        }
        peer.pump();
        // A host that is slower than the guest.
        if round % 3 == 0 {
            read_available(&mut peer.guest.host, &mut heard);
        }
    }
    assert!(heard == to_host, "guest to host differs");
    assert!(peer.data == to_guest, "host to guest differs");
}

#[test]
fn a_megabyte_passes_both_ways_with_little_credit() {
    exchange(1 << 20, 4096, &[]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_byte_is_lost_or_doubled_by_snapshots_in_the_middle(
        buf_alloc in 100u32..20_000,
        cuts in prop::collection::vec(0usize..60, 1..5),
    ) {
        exchange(200_000, buf_alloc, &cuts);
    }
}
