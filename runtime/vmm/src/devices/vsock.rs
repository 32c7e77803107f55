//! The socket device (virtio 1.2, 5.10).

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::GuestMemoryMmap;

use super::AgentClock;
use super::config::DeviceBuildError;
use super::fault::{Faults, GuestFault};
use super::registers::{FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Identity};
use super::slot::Turn;
use super::virtqueue::VirtQueue;

/// The host's socket address (5.10.4).
pub const HOST_CID: u64 = 2;
/// The host port that the guest's agent connects to.
pub const AGENT_PORT: u32 = 1024;

/// Registers of the device: receive, transmit and event queue.
pub(super) const IDENTITY: Identity = Identity {
    device_id: VIRTIO_ID_VSOCK,
    features: FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT,
    queue_size_max: &[128, 128, 16],
};

/// A saved socket device that could not have existed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VsockError {
    /// It belongs to another guest.
    #[error("guest cid differs")]
    GuestCid,
}

/// The socket device on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockStateV1 {}

#[derive(Debug)]
pub(super) struct Vsock {
    stream: UnixStream,
}
impl Vsock {
    pub(super) fn new(
        _cid: u64,
        stream: UnixStream,
        _faults: Arc<Faults>,
        _clock: Arc<AgentClock>,
    ) -> Result<Self, DeviceBuildError> {
        stream.set_nonblocking(true).map_err(DeviceBuildError::AgentStream)?;
        Ok(Self { stream })
    }
    pub(super) fn restore(
        cid: u64,
        stream: UnixStream,
        (faults, clock): (Arc<Faults>, Arc<AgentClock>),
        _state: VsockStateV1,
    ) -> Result<Self, super::DeviceRestoreError> {
        Ok(Self::new(cid, stream, faults, clock)?)
    }
    pub(super) fn config_space(&self) -> Vec<u8> {
        Vec::new()
    }
    pub(super) fn serve(
        &mut self,
        _queues: &mut [Option<VirtQueue>],
        _memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        Ok(Turn::Idle)
    }
    pub(super) fn reset(&mut self) {}
    pub(super) fn save(&self) -> VsockStateV1 {
        VsockStateV1 {}
    }
    pub(super) fn stream_fd(&self) -> Option<RawFd> {
        Some(self.stream.as_raw_fd())
    }
    pub(super) fn note_hangup(&mut self) {}
}
