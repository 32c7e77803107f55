//! The network device (virtio 1.2, 5.1): Ethernet frames between two queues and a tap, without any offload.
//!
//! [`frame`] knows lengths and the header; [`tap`] is the host's end; this file moves frames between it and the queues. The header
//! that the guest writes is never looked at or passed on: both ways it is ours. **Invariant:** no frame is kept between two turns,
//! so nothing of it is in a snapshot, and a flood from either side fills the tap's own queue or the guest's, never the monitor.

mod frame;
mod tap;

use std::os::fd::{OwnedFd, RawFd};

use serde::{Deserialize, Serialize};
use thaw_agent_protocol::network::{GUEST_MAC, MTU};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU};

use super::config::DeviceBuildError;
use super::fault::GuestFault;
use super::registers::{FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Identity};
use super::slot::Turn;
use super::virtqueue::{Chain, VirtQueue};
use crate::memory::GuestMemoryMmap;
use frame::{HEADER_BYTES, Outgoing, PACKET_BYTES_MAX, Packet};
use tap::{Received, Tap};

/// Registers of the device: receive and transmit queue. The link is always up, or how a guest is frozen and how it goes on would
/// differ: without a tap, what it sends is lost, as on a cable that ends nowhere.
pub(super) const IDENTITY: Identity = Identity {
    device_id: VIRTIO_ID_NET,
    features: FEATURE_VERSION_1
        | FEATURE_EVENT_IDX
        | FEATURE_INDIRECT
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_MTU,
    queue_size_max: &[128, 128],
};
const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;
/// Frames moved in each direction before other devices get their turn.
const FRAMES_PER_TURN: usize = 64;

/// The device: its tap and the frame that is being moved.
#[derive(Debug)]
pub(super) struct Net {
    /// `None`: what is sent is dropped, and nothing is received.
    tap: Option<Tap>,
    packet: Packet,
}

impl Net {
    /// A device without a tap.
    pub(super) fn new() -> Self {
        Self {
            tap: None,
            packet: Packet::new(),
        }
    }

    /// Takes a tap, instead of any it had.
    pub(super) fn plug(&mut self, tap: OwnedFd) -> Result<(), DeviceBuildError> {
        self.tap = Some(Tap::new(tap).map_err(DeviceBuildError::Tap)?);
        Ok(())
    }

    pub(super) fn tap_fd(&self) -> Option<RawFd> {
        self.tap.as_ref().map(Tap::raw_fd)
    }

    /// Whether `state` is a possible one of this device.
    pub(super) fn check_state(&self, state: &NetStateV1) -> bool {
        *state == self.save()
    }

    /// Nothing of the tap and of the frames that went through it stays.
    pub(super) fn reset_to(&mut self) {
        let Self { tap, packet } = self;
        *tap = None;
        packet.wipe();
    }

    /// The driver reset the device; the tap stays.
    pub(super) fn reset(&mut self) {}

    /// Whether no byte of any frame is left.
    #[cfg(test)]
    pub(super) fn is_wiped(&self) -> bool {
        self.tap.is_none() && self.packet.is_wiped()
    }

    /// 5.1.4: `mac`, `status`, `max_virtqueue_pairs`, `mtu`; those of features that are not offered read as zero.
    pub(super) fn config_space(&self) -> Vec<u8> {
        let mut space = GUEST_MAC.to_vec();
        space.extend([0; 4]);
        space.extend(MTU.to_le_bytes());
        space
    }

    /// Moves frames in both directions, within limits.
    pub(super) fn serve(
        &mut self,
        queues: &mut [Option<VirtQueue>],
        memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        let mut turn = Turn::Idle;
        if let Some(queue) = &mut queues[TRANSMIT_QUEUE]
            && self.transmit(queue, memory)? == Turn::Again
        {
            turn = Turn::Again;
        }
        if let Some(queue) = &mut queues[RECEIVE_QUEUE]
            && self.receive(queue, memory)? == Turn::Again
        {
            turn = Turn::Again;
        }
        Ok(turn)
    }

    /// Guest to tap.
    fn transmit(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        for _ in 0..FRAMES_PER_TURN {
            let Some(chain) = queue.pop(memory)? else {
                return Ok(if queue.rearm(memory)? {
                    Turn::Again
                } else {
                    Turn::Idle
                });
            };
            self.send(queue, memory, &chain)?;
            queue.complete(memory, &chain, 0)?;
        }
        Ok(Turn::Again)
    }

    /// One frame out of the guest: copied once, its header left behind.
    fn send(
        &mut self,
        queue: &VirtQueue,
        memory: &GuestMemoryMmap,
        chain: &Chain,
    ) -> Result<(), GuestFault> {
        let length = match frame::outgoing(chain.readable.length()) {
            Outgoing::Frame(length) => length,
            Outgoing::Drop => return Ok(()),
            Outgoing::NoHeader => return Err(queue.too_small()),
        };
        let Some(tap) = &self.tap else {
            return Ok(());
        };
        let packet = self.packet.outgoing_room(length);
        chain
            .readable
            .read(memory, HEADER_BYTES, &mut packet[HEADER_BYTES..])
            .map_err(|_| queue.buffer_fault())?;
        tap.send(packet);
        Ok(())
    }

    /// Tap to guest, while the guest has buffers: what it has no room for stays in the tap's queue, which the kernel bounds.
    fn receive(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        let Some(tap) = &self.tap else {
            return Ok(Turn::Idle);
        };
        for _ in 0..FRAMES_PER_TURN {
            if queue.is_empty(memory)? && !queue.rearm(memory)? {
                return Ok(Turn::Idle);
            }
            let length = match tap.receive(self.packet.incoming_room()) {
                Received::Packet(length) => length,
                Received::Nothing => return Ok(Turn::Idle),
            };
            let Some(packet) = self.packet.incoming(length) else {
                continue;
            };
            // Gone only if the guest has taken it back, which no driver may: the frame is lost.
            let Some(chain) = queue.pop(memory)? else {
                continue;
            };
            // 5.1.6.3.1: buffers hold the longest frame, as they cannot be merged.
            if chain.writable.length() < PACKET_BYTES_MAX {
                return Err(queue.too_small());
            }
            chain
                .writable
                .write(memory, 0, packet)
                .map_err(|_| queue.buffer_fault())?;
            let written = packet.len();
            queue.complete(memory, &chain, written)?;
        }
        Ok(Turn::Again)
    }

    pub(super) fn save(&self) -> NetStateV1 {
        // The tap belongs to this process, and frames are not kept between turns.
        let Self { tap: _, packet: _ } = self;
        NetStateV1 {
            mac: GUEST_MAC,
            mtu: MTU,
        }
    }
}

/// The network device on disk: what its driver has read and will not read again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStateV1 {
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// Longest IP packet, bytes.
    pub mtu: u16,
}
