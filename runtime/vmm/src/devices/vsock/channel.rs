//! The agent channel as a pure state machine: packets and host bytes in, packets and host bytes out.
//!
//! One connection exists at most: the guest's to (host, [`AGENT_PORT`]). Flow control is 5.10.6.3's.
//!
//! **Invariants:** the guest is told of room only for bytes that `to_host` can take; no data is sent beyond
//! the peer's credit; `stale` counts the bytes at the front of `to_host` that belong to closed connections.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::packet::{
    Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, PAYLOAD_BYTES_MAX, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_SEQPACKET, TYPE_STREAM,
};
use super::{AGENT_PORT, HOST_CID};

/// Bytes buffered from the guest for the host, a connection; this is what we grant as `buf_alloc`.
pub(in crate::devices) const TO_HOST_BYTES_MAX: u32 = 256 * 1024;
/// Bytes buffered from the host for the guest.
pub(in crate::devices) const TO_GUEST_BYTES_MAX: usize = 256 * 1024;
/// Answers waiting for receive buffers; with more, transmit buffers are left in their queue.
const REPLIES_MAX: usize = 64;
/// Room that is won before the guest is told unasked.
const CREDIT_UPDATE_BYTES: u32 = TO_HOST_BYTES_MAX / 4;

/// What a packet meant for the machine's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::devices) enum Happening {
    /// The guest opened the channel.
    Opened,
    /// The guest closed the channel, or broke it and was cut off.
    Closed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Connection {
    guest_port: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    /// Bytes handed to the host, modulo 2^32: our fwd_cnt.
    forwarded: u32,
    /// The fwd_cnt that the guest last heard.
    announced: u32,
    /// SHUTDOWN bits that the guest sent.
    shutdown: u32,
    /// A CREDIT_REQUEST is out.
    credit_requested: bool,
    /// The guest asked for a CREDIT_UPDATE.
    update_requested: bool,
}

impl Connection {
    fn new(guest_port: u32) -> Self {
        Self {
            guest_port,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            forwarded: 0,
            announced: 0,
            shutdown: 0,
            credit_requested: false,
            update_requested: false,
        }
    }

    /// Bytes that the guest can take now; 0 if its counters make no sense.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    fn update_due(&self) -> bool {
        self.update_requested || self.forwarded.wrapping_sub(self.announced) >= CREDIT_UPDATE_BYTES
    }
}

/// A packet that waits for a receive buffer and carries no data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyStateV1 {
    /// RESPONSE or RST.
    pub op: u16,
    /// Socket type of the packet that is answered.
    pub kind: u16,
    /// Source.
    pub host_port: u32,
    /// Destination.
    pub guest_port: u32,
}

/// What goes to the guest next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outgoing {
    Reply,
    CreditUpdate,
    Data,
    CreditRequest,
}

/// The agent channel and the buffers on both of its sides.
#[derive(Debug)]
pub(in crate::devices) struct Channel {
    guest_cid: u64,
    connection: Option<Connection>,
    replies: VecDeque<ReplyStateV1>,
    to_host: VecDeque<u8>,
    stale: usize,
    to_guest: VecDeque<u8>,
}

impl Channel {
    pub(in crate::devices) fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            connection: None,
            replies: VecDeque::new(),
            to_host: VecDeque::new(),
            stale: 0,
            to_guest: VecDeque::new(),
        }
    }

    pub(in crate::devices) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Whether another packet's answers would still fit.
    pub(in crate::devices) fn can_receive(&self) -> bool {
        self.replies.len() < REPLIES_MAX
    }

    /// Takes one packet from the guest. `payload` has `header.length` bytes. `host_open` says whether there is
    /// still someone to connect to.
    pub(in crate::devices) fn receive(
        &mut self,
        header: &Header,
        payload: &[u8],
        host_open: bool,
    ) -> Option<Happening> {
        // 5.10.6.4.1: packets from or to an address that is not on this link are dropped.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return None;
        }
        if header.kind != TYPE_STREAM {
            if header.kind == TYPE_SEQPACKET {
                self.refuse(header);
            }
            return None;
        }
        if header.dst_port == AGENT_PORT && header.op == OP_REQUEST {
            return self.open(header, host_open);
        }
        let Some(connection) = self.connection.as_mut().filter(|connection| {
            header.dst_port == AGENT_PORT && header.src_port == connection.guest_port
        }) else {
            self.refuse(header);
            return None;
        };
        connection.peer_buf_alloc = header.buf_alloc;
        connection.peer_fwd_cnt = header.fwd_cnt;
        connection.credit_requested = false;
        match header.op {
            OP_RW => return self.take_data(header, payload),
            OP_CREDIT_UPDATE | OP_RESPONSE => {}
            OP_CREDIT_REQUEST => connection.update_requested = true,
            OP_SHUTDOWN => {
                connection.shutdown |= header.flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
                if connection.shutdown == SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
                    // 5.10.6.5: a clean disconnect is confirmed by a reset.
                    self.refuse(header);
                    return self.disconnect();
                }
            }
            OP_RST => return self.disconnect(),
            _ => {
                self.refuse(header);
                return self.disconnect();
            }
        }
        None
    }

    fn open(&mut self, header: &Header, host_open: bool) -> Option<Happening> {
        // Anyone in the guest may call; the first, the agent, keeps the channel as long as it lives. Bytes of closed
        // connections must not pile up behind a host that does not read.
        let full = self.to_host.len() > TO_HOST_BYTES_MAX as usize;
        if self.connection.is_some() || !host_open || full {
            self.refuse(header);
            return None;
        }
        let mut connection = Connection::new(header.src_port);
        connection.peer_buf_alloc = header.buf_alloc;
        connection.peer_fwd_cnt = header.fwd_cnt;
        self.connection = Some(connection);
        self.reply(OP_RESPONSE, header);
        Some(Happening::Opened)
    }

    fn take_data(&mut self, header: &Header, payload: &[u8]) -> Option<Happening> {
        let connection = self.connection.as_ref().expect("the caller found it");
        let waiting = self.to_host.len() - self.stale;
        let fits = waiting + payload.len() <= TO_HOST_BYTES_MAX as usize;
        if connection.shutdown & SHUTDOWN_SEND != 0 || !fits {
            self.refuse(header);
            return self.disconnect();
        }
        self.to_host.extend(payload);
        None
    }

    /// Answers with a reset, unless the packet is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != OP_RST {
            self.reply(OP_RST, header);
        }
    }

    fn reply(&mut self, op: u16, header: &Header) {
        assert!(
            self.replies.len() < REPLIES_MAX,
            "packets are taken only while answers fit"
        );
        self.replies.push_back(ReplyStateV1 {
            op,
            kind: header.kind,
            host_port: header.dst_port,
            guest_port: header.src_port,
        });
    }

    fn disconnect(&mut self) -> Option<Happening> {
        let happening = self.connection.is_some().then_some(Happening::Closed);
        self.drop_connection();
        happening
    }

    /// What the guest sent still goes to the host; what the host sent has lost its receiver.
    fn drop_connection(&mut self) {
        self.connection = None;
        self.to_guest.clear();
        self.stale = self.to_host.len();
    }

    /// The driver reset the device.
    pub(in crate::devices) fn reset(&mut self) -> Option<Happening> {
        self.replies.clear();
        self.disconnect()
    }

    /// The host's end is gone: the guest learns it by a reset.
    pub(in crate::devices) fn close_by_host(&mut self) {
        if let Some(Connection { guest_port, .. }) = self.connection {
            let (op, kind, host_port) = (OP_RST, TYPE_STREAM, AGENT_PORT);
            self.replies.push_back(ReplyStateV1 {
                op,
                kind,
                host_port,
                guest_port,
            });
        }
        self.drop_connection();
        self.to_host.clear();
        self.stale = 0;
    }

    /// Bytes from the guest that wait for the host.
    pub(in crate::devices) fn host_bytes(&self) -> &[u8] {
        let (first, second) = self.to_host.as_slices();
        if first.is_empty() { second } else { first }
    }

    /// The host took the first `count` of [`Channel::host_bytes`].
    pub(in crate::devices) fn host_took(&mut self, count: usize) {
        self.to_host.drain(..count);
        let old = count.min(self.stale);
        self.stale -= old;
        if let Some(connection) = &mut self.connection {
            let new = u32::try_from(count - old).expect("the buffer is smaller than 4 GiB");
            connection.forwarded = connection.forwarded.wrapping_add(new);
        }
    }

    /// Bytes that may be read from the host now.
    pub(in crate::devices) fn room_for_guest(&self) -> usize {
        match &self.connection {
            Some(connection) if connection.shutdown & SHUTDOWN_RECEIVE == 0 => {
                TO_GUEST_BYTES_MAX - self.to_guest.len()
            }
            _ => 0,
        }
    }

    /// Nobody in the guest will ever read what the host sends on this connection.
    pub(in crate::devices) fn is_deaf(&self) -> bool {
        self.connection
            .as_ref()
            .is_none_or(|c| c.shutdown & SHUTDOWN_RECEIVE != 0)
    }

    /// Takes bytes from the host, at most [`Channel::room_for_guest`].
    pub(in crate::devices) fn push_for_guest(&mut self, bytes: &[u8]) {
        assert!(
            bytes.len() <= self.room_for_guest(),
            "the caller asked for the room"
        );
        self.to_guest.extend(bytes);
    }

    fn outgoing(&self) -> Option<Outgoing> {
        if !self.replies.is_empty() {
            return Some(Outgoing::Reply);
        }
        let connection = self.connection.as_ref()?;
        if !self.to_guest.is_empty() && connection.shutdown & SHUTDOWN_RECEIVE == 0 {
            // Data carries our counters too, so it goes before a bare update.
            if connection.credit() > 0 {
                return Some(Outgoing::Data);
            }
            if !connection.credit_requested {
                return Some(Outgoing::CreditRequest);
            }
        }
        connection.update_due().then_some(Outgoing::CreditUpdate)
    }

    /// Whether a receive buffer could be used now.
    pub(in crate::devices) fn has_packet(&self) -> bool {
        self.outgoing().is_some()
    }

    /// The next packet for the guest, with at most `room` bytes of payload, which replace `payload`.
    pub(in crate::devices) fn next_packet(
        &mut self,
        room: usize,
        payload: &mut Vec<u8>,
    ) -> Option<Header> {
        payload.clear();
        let outgoing = self.outgoing()?;
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: AGENT_PORT,
            kind: TYPE_STREAM,
            ..Header::default()
        };
        if outgoing == Outgoing::Reply {
            let reply = self.replies.pop_front().expect("a reply is due");
            header.src_port = reply.host_port;
            header.dst_port = reply.guest_port;
            header.kind = reply.kind;
            header.op = reply.op;
            if reply.op == OP_RST {
                return Some(header);
            }
        }
        // A response whose connection was closed meanwhile: a reset follows it.
        let Some(connection) = &mut self.connection else {
            return Some(header);
        };
        header.dst_port = if outgoing == Outgoing::Reply {
            header.dst_port
        } else {
            connection.guest_port
        };
        header.buf_alloc = TO_HOST_BYTES_MAX;
        header.fwd_cnt = connection.forwarded;
        connection.announced = connection.forwarded;
        connection.update_requested = false;
        match outgoing {
            Outgoing::Reply => {}
            Outgoing::CreditUpdate => header.op = OP_CREDIT_UPDATE,
            Outgoing::CreditRequest => {
                header.op = OP_CREDIT_REQUEST;
                connection.credit_requested = true;
            }
            Outgoing::Data => {
                header.op = OP_RW;
                let credit = connection.credit() as usize;
                let count = self
                    .to_guest
                    .len()
                    .min(room)
                    .min(credit)
                    .min(PAYLOAD_BYTES_MAX);
                payload.extend(self.to_guest.drain(..count));
                header.length = u32::try_from(count).expect("a packet holds at most 64 KiB");
                connection.sent = connection.sent.wrapping_add(header.length);
            }
        }
        Some(header)
    }
}

/// The agent channel on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelStateV1 {
    /// The guest's address.
    pub guest_cid: u64,
    /// The open connection.
    pub connection: Option<ConnectionStateV1>,
    /// Packets that wait for a receive buffer.
    pub replies: Vec<ReplyStateV1>,
    /// Bytes from the guest that the host has not taken.
    pub to_host: Vec<u8>,
    /// How many of them belong to closed connections.
    pub stale: u32,
    /// Bytes from the host that the guest has not been sent.
    pub to_guest: Vec<u8>,
}

/// The open connection on disk; counters are modulo 2^32.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionStateV1 {
    /// The guest's port.
    pub guest_port: u32,
    /// The guest's `buf_alloc`.
    pub peer_buf_alloc: u32,
    /// The guest's `fwd_cnt`.
    pub peer_fwd_cnt: u32,
    /// Bytes sent to the guest.
    pub sent: u32,
    /// Bytes handed to the host.
    pub forwarded: u32,
    /// Our `fwd_cnt` as the guest last heard it.
    pub announced: u32,
    /// SHUTDOWN bits from the guest.
    pub shutdown: u32,
    /// A CREDIT_REQUEST is out.
    pub credit_requested: bool,
    /// A CREDIT_UPDATE was asked for.
    pub update_requested: bool,
}

/// A saved socket device that could not have existed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VsockError {
    /// It belongs to a guest with another address.
    #[error("guest cid {0} is another guest's")]
    GuestCid(u64),
    /// A buffer or queue is longer than it can be.
    #[error("a buffer is longer than its limit")]
    TooLong,
    /// Fields contradict each other.
    #[error("connection and buffers contradict each other")]
    Inconsistent,
}

impl Channel {
    pub(in crate::devices) fn save(&self) -> ChannelStateV1 {
        let Self {
            guest_cid,
            connection,
            replies,
            to_host,
            stale,
            to_guest,
        } = self;
        ChannelStateV1 {
            guest_cid: *guest_cid,
            connection: connection.as_ref().map(Connection::save),
            replies: replies.iter().copied().collect(),
            to_host: to_host.iter().copied().collect(),
            stale: u32::try_from(*stale).expect("the buffer is smaller than 4 GiB"),
            to_guest: to_guest.iter().copied().collect(),
        }
    }
}

impl Connection {
    fn save(&self) -> ConnectionStateV1 {
        let &Self {
            guest_port,
            peer_buf_alloc,
            peer_fwd_cnt,
            sent,
            forwarded,
            announced,
            shutdown,
            credit_requested,
            update_requested,
        } = self;
        ConnectionStateV1 {
            guest_port,
            peer_buf_alloc,
            peer_fwd_cnt,
            sent,
            forwarded,
            announced,
            shutdown,
            credit_requested,
            update_requested,
        }
    }
}

impl TryFrom<ConnectionStateV1> for Connection {
    type Error = VsockError;

    fn try_from(state: ConnectionStateV1) -> Result<Self, VsockError> {
        let ConnectionStateV1 {
            guest_port,
            peer_buf_alloc,
            peer_fwd_cnt,
            sent,
            forwarded,
            announced,
            shutdown,
            credit_requested,
            update_requested,
        } = state;
        // With both bits the connection would have been closed.
        if ![0, SHUTDOWN_RECEIVE, SHUTDOWN_SEND].contains(&shutdown) {
            return Err(VsockError::Inconsistent);
        }
        Ok(Self {
            guest_port,
            peer_buf_alloc,
            peer_fwd_cnt,
            sent,
            forwarded,
            announced,
            shutdown,
            credit_requested,
            update_requested,
        })
    }
}

impl TryFrom<(u64, ChannelStateV1)> for Channel {
    type Error = VsockError;

    fn try_from((cid, state): (u64, ChannelStateV1)) -> Result<Self, VsockError> {
        let ChannelStateV1 {
            guest_cid,
            connection,
            replies,
            to_host,
            stale,
            to_guest,
        } = state;
        if guest_cid != cid {
            return Err(VsockError::GuestCid(guest_cid));
        }
        let limit = TO_HOST_BYTES_MAX as usize;
        let stale = stale as usize;
        // One more than packets leave: the reset that tells of the host's end.
        let too_long = replies.len() > REPLIES_MAX + 1
            || to_host.len() > 2 * limit
            || to_guest.len() > TO_GUEST_BYTES_MAX;
        if too_long {
            return Err(VsockError::TooLong);
        }
        let waiting = to_host
            .len()
            .checked_sub(stale)
            .ok_or(VsockError::Inconsistent)?;
        let orphaned = connection.is_none() && (waiting > 0 || !to_guest.is_empty());
        let is_reply = |reply: &ReplyStateV1| {
            [OP_RST, OP_RESPONSE].contains(&reply.op)
                && [TYPE_STREAM, TYPE_SEQPACKET].contains(&reply.kind)
        };
        let unknown_reply = !replies.iter().all(is_reply);
        if waiting > limit || orphaned || unknown_reply {
            return Err(VsockError::Inconsistent);
        }
        Ok(Self {
            guest_cid,
            connection: connection.map(Connection::try_from).transpose()?,
            replies: replies.into(),
            to_host: to_host.into(),
            stale,
            to_guest: to_guest.into(),
        })
    }
}
