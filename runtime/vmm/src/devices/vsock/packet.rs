//! The vsock packet header (virtio 1.2, 5.10.6).

/// Bytes of `struct virtio_vsock_hdr`.
pub(in crate::devices) const HEADER_BYTES: usize = 44;
/// Payload of one packet: what Linux sends at most (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
pub(in crate::devices) const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub(in crate::devices) const TYPE_STREAM: u16 = 1;
/// VIRTIO_VSOCK_TYPE_SEQPACKET.
pub(in crate::devices) const TYPE_SEQPACKET: u16 = 2;

/// VIRTIO_VSOCK_OP_REQUEST.
pub(in crate::devices) const OP_REQUEST: u16 = 1;
/// VIRTIO_VSOCK_OP_RESPONSE.
pub(in crate::devices) const OP_RESPONSE: u16 = 2;
/// VIRTIO_VSOCK_OP_RST.
pub(in crate::devices) const OP_RST: u16 = 3;
/// VIRTIO_VSOCK_OP_SHUTDOWN.
pub(in crate::devices) const OP_SHUTDOWN: u16 = 4;
/// VIRTIO_VSOCK_OP_RW.
pub(in crate::devices) const OP_RW: u16 = 5;
/// VIRTIO_VSOCK_OP_CREDIT_UPDATE.
pub(in crate::devices) const OP_CREDIT_UPDATE: u16 = 6;
/// VIRTIO_VSOCK_OP_CREDIT_REQUEST.
pub(in crate::devices) const OP_CREDIT_REQUEST: u16 = 7;

/// VIRTIO_VSOCK_SHUTDOWN_RCV: the sender will receive no more.
pub(in crate::devices) const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_SEND: the sender will send no more.
pub(in crate::devices) const SHUTDOWN_SEND: u32 = 2;

/// A header, copied out of the guest or about to be copied in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::devices) struct Header {
    pub(in crate::devices) src_cid: u64,
    pub(in crate::devices) dst_cid: u64,
    pub(in crate::devices) src_port: u32,
    pub(in crate::devices) dst_port: u32,
    pub(in crate::devices) length: u32,
    pub(in crate::devices) kind: u16,
    pub(in crate::devices) op: u16,
    pub(in crate::devices) flags: u32,
    pub(in crate::devices) buf_alloc: u32,
    pub(in crate::devices) fwd_cnt: u32,
}

impl Header {
    pub(in crate::devices) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(in crate::devices) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (field, after) = rest
        .split_first_chunk()
        .expect("the fields add up to the header");
    *rest = after;
    *field
}
