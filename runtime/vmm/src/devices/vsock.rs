//! The socket device (virtio 1.2, 5.10), cut down to one stream: the guest's agent to the host.
//!
//! [`channel`] is the pure state machine; this file moves packets between it, the queues and the host's
//! Unix socket. **Invariant:** the connection survives a snapshot, buffered bytes included: a restored machine
//! goes on with a fresh host socket and no round trip, and its driver never hears of a transport reset.

mod channel;
pub(super) mod packet;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::AgentClock;
use super::config::DeviceBuildError;
use super::fault::{DeviceFault, Faults, GuestFault};
use super::registers::{FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Identity};
use super::slot::Turn;
use super::virtqueue::{Chain, VirtQueue};
use crate::memory::GuestMemoryMmap;
use channel::{Happening, TO_GUEST_BYTES_MAX, TO_HOST_BYTES_MAX};
use packet::{HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};

pub(super) use channel::Channel;
pub use channel::{ChannelStateV1, ConnectionStateV1, ReplyStateV1, VsockError};

/// The host's socket address (5.10.4).
pub const HOST_CID: u64 = 2;
/// The host port that the guest's agent connects to.
pub const AGENT_PORT: u32 = 1024;

/// Registers of the device: receive, transmit and event queue. The event queue is never used: its one event
/// says that all connections are gone, and ours never are.
pub(super) const IDENTITY: Identity = Identity {
    device_id: VIRTIO_ID_VSOCK,
    features: FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT,
    queue_size_max: &[128, 128, 16],
};
/// Bytes that the device may hold: those for the host of a connection and of one before it, those for the guest, and a packet.
pub(super) const BUFFERED_BYTES_MAX: usize =
    2 * TO_HOST_BYTES_MAX as usize + TO_GUEST_BYTES_MAX + PAYLOAD_BYTES_MAX;
const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;
/// Packets moved in one direction before the other is looked at.
const PACKETS_PER_ROUND: usize = 64;
/// Rounds before other devices get their turn.
const ROUNDS_PER_TURN: usize = 8;

/// Host bytes that are read at once. Every idle clone pays for this buffer; a long message takes a few reads more.
const INBOUND_BYTES: usize = 16 * 1024;

/// The device: the channel, the host's socket and a scratch packet.
#[derive(Debug)]
pub(super) struct Vsock {
    channel: Channel,
    /// `None` once the host has closed its end.
    stream: Option<UnixStream>,
    /// The host closed its end; bytes may still be unread.
    hangup: bool,
    /// Payload of the packet that is being moved.
    scratch: Vec<u8>,
    /// Longest payload since the last reset to a state.
    scratch_used: usize,
    /// Where host bytes land; kept, so that an empty socket costs no memory clearing.
    inbound: Box<[u8]>,
    /// Most bytes that landed at once since the last reset to a state.
    inbound_used: usize,
    faults: Arc<Faults>,
    clock: Arc<AgentClock>,
}

impl Vsock {
    /// A device without a host socket and a connection.
    pub(super) fn new(guest_cid: u64, faults: Arc<Faults>, clock: Arc<AgentClock>) -> Self {
        Self {
            channel: Channel::new(guest_cid),
            stream: None,
            hangup: false,
            scratch: Vec::new(),
            scratch_used: 0,
            inbound: vec![0; INBOUND_BYTES].into_boxed_slice(),
            inbound_used: 0,
            faults,
            clock,
        }
    }

    /// Whether `state` is a possible one of this device.
    pub(super) fn plan(&self, state: &ChannelStateV1) -> Result<Channel, VsockError> {
        Channel::try_from((self.channel.guest_cid(), state.clone()))
    }

    /// Goes on with `channel` alone: nothing of the host socket, the connection and the bytes on their way stays.
    pub(super) fn reset_to(&mut self, channel: Channel) {
        let Self {
            channel: old,
            stream,
            hangup,
            scratch,
            scratch_used,
            inbound,
            inbound_used,
            faults: _,
            clock,
        } = self;
        *old = channel;
        *stream = None;
        *hangup = false;
        // Both are read only as far as they were written before, but a rewound machine's bytes have no business here.
        scratch.clear();
        scratch.resize(std::mem::take(scratch_used), 0);
        scratch.clear();
        inbound[..std::mem::take(inbound_used)].fill(0);
        clock.first_byte_ns.store(0, Ordering::Release);
    }

    /// Whether no byte of any packet is left.
    #[cfg(test)]
    pub(super) fn is_wiped(&self) -> bool {
        self.scratch.is_empty() && self.inbound.iter().all(|&byte| byte == 0)
    }

    /// Takes the host's socket, instead of any it had.
    pub(super) fn set_stream(&mut self, stream: UnixStream) -> Result<(), DeviceBuildError> {
        stream
            .set_nonblocking(true)
            .map_err(DeviceBuildError::AgentStream)?;
        self.stream = Some(stream);
        Ok(())
    }

    /// 5.10.4: `guest_cid`.
    pub(super) fn config_space(&self) -> Vec<u8> {
        self.channel.guest_cid().to_le_bytes().to_vec()
    }

    pub(super) fn stream_fd(&self) -> Option<RawFd> {
        self.stream.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Epoll saw the host's end close.
    pub(super) fn note_hangup(&mut self) {
        self.hangup = true;
    }

    pub(super) fn reset(&mut self) {
        let happening = self.channel.reset();
        self.tell(happening);
    }

    fn tell(&self, happening: Option<Happening>) {
        match happening {
            None | Some(Happening::Opened) => {}
            Some(Happening::Closed) => self.faults.report(DeviceFault::AgentDisconnected),
        }
    }

    /// Moves packets and bytes in both directions until nothing moves, within limits.
    pub(super) fn serve(
        &mut self,
        queues: &mut [Option<VirtQueue>],
        memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        for _ in 0..ROUNDS_PER_TURN {
            let mut moved = match &mut queues[TRANSMIT_QUEUE] {
                Some(queue) => self.transmit(queue, memory)?,
                None => false,
            };
            moved |= self.flush_to_host();
            moved |= self.read_from_host();
            if let Some(queue) = &mut queues[RECEIVE_QUEUE] {
                moved |= self.fill_receive_queue(queue, memory)?;
            }
            if !moved {
                return Ok(Turn::Idle);
            }
        }
        Ok(Turn::Again)
    }

    /// Guest to channel.
    fn transmit(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, GuestFault> {
        for done in 0..PACKETS_PER_ROUND {
            if !self.channel.can_receive() {
                return Ok(done > 0);
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(queue.rearm(memory)? || done > 0);
            };
            let header = self.read_packet(queue, memory, &chain)?;
            let host_open = self.stream.is_some();
            let happening = self.channel.receive(&header, &self.scratch, host_open);
            self.tell(happening);
            queue.complete(memory, &chain, 0)?;
        }
        Ok(true)
    }

    /// Copies a packet out of the guest, its payload into `scratch`: once, then checked.
    fn read_packet(
        &mut self,
        queue: &VirtQueue,
        memory: &GuestMemoryMmap,
        chain: &Chain,
    ) -> Result<Header, GuestFault> {
        let buffers = &chain.readable;
        let room = buffers
            .length()
            .checked_sub(HEADER_BYTES)
            .ok_or_else(|| queue.too_small())?;
        let mut bytes = [0; HEADER_BYTES];
        buffers
            .read(memory, 0, &mut bytes)
            .map_err(|_| queue.buffer_fault())?;
        let header = Header::decode(&bytes);
        let length = header.length as usize;
        if length > room.min(PAYLOAD_BYTES_MAX) {
            return Err(GuestFault::PacketLength {
                length: header.length,
            });
        }
        self.scratch.resize(length, 0);
        self.scratch_used = self.scratch_used.max(length);
        buffers
            .read(memory, HEADER_BYTES, &mut self.scratch)
            .map_err(|_| queue.buffer_fault())?;
        Ok(header)
    }

    /// Channel to host socket, until it is full.
    fn flush_to_host(&mut self) -> bool {
        let mut moved = false;
        while let Some(stream) = &mut self.stream {
            let bytes = self.channel.host_bytes();
            if bytes.is_empty() {
                break;
            }
            // Before the write: whoever reads the byte may ask for its time at once.
            stamp_first_byte(&self.clock.first_byte_ns);
            match stream.write(bytes) {
                Ok(count) if count > 0 => {
                    self.channel.host_took(count);
                    moved = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.lose_host();
                    moved = true;
                }
            }
        }
        moved
    }

    /// Host socket to channel, while the channel has room and someone in the guest listens.
    fn read_from_host(&mut self) -> bool {
        if self.hangup && self.channel.is_deaf() {
            return self.lose_host();
        }
        let mut moved = false;
        while let Some(stream) = &mut self.stream {
            let room = self.channel.room_for_guest().min(INBOUND_BYTES);
            if room == 0 {
                break;
            }
            match stream.read(&mut self.inbound[..room]) {
                Ok(count) if count > 0 => {
                    self.inbound_used = self.inbound_used.max(count);
                    self.channel.push_for_guest(&self.inbound[..count]);
                    moved = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => moved |= self.lose_host(),
            }
        }
        moved
    }

    /// The host's end is gone; true if that is news.
    fn lose_host(&mut self) -> bool {
        if self.stream.take().is_none() {
            return false;
        }
        self.channel.close_by_host();
        self.faults.report(DeviceFault::AgentStreamClosed);
        true
    }

    /// Channel to guest.
    fn fill_receive_queue(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, GuestFault> {
        for done in 0..PACKETS_PER_ROUND {
            if !self.channel.has_packet() {
                return Ok(done > 0);
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(queue.rearm(memory)? || done > 0);
            };
            // A buffer that holds a header alone could never carry data, and we would spin.
            let room = chain.writable.length().saturating_sub(HEADER_BYTES);
            if room == 0 {
                return Err(queue.too_small());
            }
            let header = self
                .channel
                .next_packet(room, &mut self.scratch)
                .expect("a packet is ready");
            self.scratch_used = self.scratch_used.max(self.scratch.len());
            let fault = |_| queue.buffer_fault();
            chain
                .writable
                .write(memory, 0, &header.encode())
                .map_err(fault)?;
            chain
                .writable
                .write(memory, HEADER_BYTES, &self.scratch)
                .map_err(fault)?;
            queue.complete(memory, &chain, HEADER_BYTES + self.scratch.len())?;
        }
        Ok(true)
    }

    pub(super) fn save(&self) -> ChannelStateV1 {
        // The socket, its hang-up and the clock belong to this process; the buffers are empty between packets.
        let Self {
            channel,
            stream: _,
            hangup: _,
            scratch: _,
            scratch_used: _,
            inbound: _,
            inbound_used: _,
            faults: _,
            clock: _,
        } = self;
        channel.save()
    }
}

fn stamp_first_byte(first_byte_ns: &AtomicU64) {
    if first_byte_ns.load(Ordering::Relaxed) == 0 {
        let now = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        let now_ns = seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        first_byte_ns.store(now_ns, Ordering::Release);
    }
}
