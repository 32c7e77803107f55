//! The frozen form of all devices. Untrusted when read back: only [`Devices::restore`](super::Devices::restore)
//! makes devices of it.

use serde::{Deserialize, Serialize};

pub use super::block::{BlockStateV1, DiskAccessStateV1};
pub use super::net::NetStateV1;
pub use super::registers::{QueueRegistersStateV1, RegistersStateV1};
pub use super::rng::RngStateV1;
pub use super::serial::SerialStateV1;
pub use super::virtqueue::VirtQueueStateV1;
pub use super::vsock::{ChannelStateV1, ConnectionStateV1, ReplyStateV1};

/// Every device of one machine. Encoded with postcard by the snapshot writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesStateV1 {
    /// The serial port.
    pub serial: SerialStateV1,
    /// The virtio devices in window order: disks, vsock, rng, network if there is one.
    pub slots: Vec<SlotStateV1>,
}

impl DevicesStateV1 {
    /// Whether there is a network device among them.
    pub fn network(&self) -> super::NetworkDevice {
        let is_net = |slot: &SlotStateV1| matches!(slot.device, DeviceStateV1::Net(_));
        if self.slots.iter().any(is_net) {
            super::NetworkDevice::Present
        } else {
            super::NetworkDevice::Absent
        }
    }
}

/// One virtio device with its transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStateV1 {
    /// The virtio-mmio registers.
    pub registers: RegistersStateV1,
    /// InterruptStatus, signalled again on resume.
    pub interrupt_status: u32,
    /// Running queues; `None` for those that are not in use.
    pub queues: Vec<Option<VirtQueueStateV1>>,
    /// The device behind the transport.
    pub device: DeviceStateV1,
}

/// The part of a slot that differs from device to device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceStateV1 {
    /// A disk.
    Block(BlockStateV1),
    /// The socket device.
    Vsock(ChannelStateV1),
    /// The entropy device.
    Rng(RngStateV1),
    /// The network device.
    Net(NetStateV1),
}
