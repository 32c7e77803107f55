//! Lengths of frames, and the one buffer that each passes through.

use thaw_agent_protocol::network::{MTU, VNET_HEADER_BYTES};

/// Bytes of `struct virtio_net_hdr_v1` (5.1.6), which precedes each frame on both sides.
pub(super) const HEADER_BYTES: usize = VNET_HEADER_BYTES;
/// Destination, source and type.
const ETHERNET_HEADER_BYTES: usize = 14;
/// Shortest frame: the kernel's tap refuses shorter ones, too.
pub(super) const FRAME_BYTES_MIN: usize = ETHERNET_HEADER_BYTES;
/// Longest frame.
pub(super) const FRAME_BYTES_MAX: usize = ETHERNET_HEADER_BYTES + MTU as usize;
/// Header and longest frame.
pub(super) const PACKET_BYTES_MAX: usize = HEADER_BYTES + FRAME_BYTES_MAX;
/// Place of `num_buffers` in the header: always 1, as buffers are never merged; every other field is zero.
const NUM_BUFFERS: usize = 10;

/// What a chain of the transmit queue holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// A frame of so many bytes.
    Frame(usize),
    /// A frame too short or too long for the network.
    Drop,
    /// Not even a header.
    NoHeader,
}

/// What `length` bytes of a chain are.
pub(super) fn outgoing(length: usize) -> Outgoing {
    match length.checked_sub(HEADER_BYTES) {
        None => Outgoing::NoHeader,
        Some(frame) if (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame) => {
            Outgoing::Frame(frame)
        }
        Some(_) => Outgoing::Drop,
    }
}

/// Header and frame on their way. One byte longer than the longest, so that a longer one is seen to be so.
#[derive(Debug)]
pub(super) struct Packet {
    bytes: Box<[u8; PACKET_BYTES_MAX + 1]>,
    /// Most bytes that were touched since it was wiped.
    used: usize,
}

impl Packet {
    pub(super) fn new() -> Self {
        Self {
            bytes: Box::new([0; PACKET_BYTES_MAX + 1]),
            used: 0,
        }
    }

    /// Room for a header, which is zero (no checksum to complete, no segments), and a frame from the guest.
    pub(super) fn outgoing_room(&mut self, frame_length: usize) -> &mut [u8] {
        let length = HEADER_BYTES + frame_length;
        self.used = self.used.max(length);
        self.bytes[..HEADER_BYTES].fill(0);
        &mut self.bytes[..length]
    }

    /// Room for whatever comes from the tap.
    pub(super) fn incoming_room(&mut self) -> &mut [u8] {
        &mut self.bytes[..]
    }

    /// What came from the tap, `length` bytes, under a header of ours; `None` if it is not fit for the guest.
    pub(super) fn incoming(&mut self, length: usize) -> Option<&[u8]> {
        self.used = self.used.max(length);
        let Outgoing::Frame(_) = outgoing(length) else {
            return None;
        };
        self.bytes[..HEADER_BYTES].fill(0);
        self.bytes[NUM_BUFFERS] = 1;
        Some(&self.bytes[..length])
    }

    /// Forgets every frame.
    pub(super) fn wipe(&mut self) {
        self.bytes[..std::mem::take(&mut self.used)].fill(0);
    }

    #[cfg(test)]
    pub(super) fn is_wiped(&self) -> bool {
        self.bytes.iter().all(|&byte| byte == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lengths_of_ethernet_pass() {
        for length in 0..4096 {
            let expected = match length {
                0..12 => Outgoing::NoHeader,
                26..=1526 => Outgoing::Frame(length - 12),
                _ => Outgoing::Drop,
            };
            assert_eq!(outgoing(length), expected, "{length}");
        }
    }

    #[test]
    fn the_header_is_ours_both_ways_and_wiping_leaves_nothing() {
        let mut packet = Packet::new();
        packet.incoming_room().fill(0xff);
        let shown = packet.incoming(PACKET_BYTES_MAX).unwrap();
        assert_eq!(shown[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert!(packet.incoming(PACKET_BYTES_MAX + 1).is_none());
        assert_eq!(packet.outgoing_room(20)[..12], [0; 12]);
        packet.wipe();
        assert!(packet.is_wiped());
    }
}
