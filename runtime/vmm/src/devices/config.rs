//! What devices a machine has, and why it may not have them.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;

use super::fault::{DeviceName, GuestFault};
use super::registers::RegistersError;
use super::serial::SerialError;
use super::vsock::VsockError;
use super::{MMIO_WINDOWS_MAX, block};

/// Disks that fit beside vsock, rng and network.
pub const DISKS_MAX: usize = MMIO_WINDOWS_MAX - 3;

/// What a guest may do with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskAccess {
    /// Writes fail.
    ReadOnly,
    /// Writes go to an anonymous delta in memory that dies with the process.
    CopyOnWrite,
}

/// One disk: a window of a file.
#[derive(Debug)]
pub struct DiskConfig {
    /// The base; only ever read, by offset, so that its descriptor may be shared.
    pub file: File,
    /// What the guest may do.
    pub access: DiskAccess,
    /// Serial number that GET_ID tells, at most 20 bytes.
    pub id: String,
    /// First byte of the window.
    pub offset: u64,
    /// Bytes in the window, a multiple of 512.
    pub length: u64,
}

/// Where the disks of devices that take on a saved state come from.
#[derive(Debug)]
pub enum DiskFiles {
    /// The bases that they have already.
    Kept,
    /// These, as many as there are disks and of the same access.
    Replaced(Vec<DiskConfig>),
}

/// Whether a machine has a network device. One without has not even its registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkDevice {
    /// None.
    #[default]
    Absent,
    /// One, after all other devices. It has no tap until [`Devices::plug`](super::Devices::plug).
    Present,
}

/// The devices of one machine.
#[derive(Debug)]
pub struct DevicesConfig {
    /// Disks in window order, at most [`DISKS_MAX`].
    pub disks: Vec<DiskConfig>,
    /// The guest's socket address, at least 3.
    pub guest_cid: u64,
    /// Host end of the agent channel.
    pub agent_stream: UnixStream,
    /// Whether there is a network.
    pub network: NetworkDevice,
}

impl DevicesConfig {
    pub(super) fn check(&self) -> Result<(), DeviceBuildError> {
        check_shape(self.disks.len(), self.guest_cid)?;
        check_disks(&self.disks)
    }
}

/// Whether a machine can have so many disks and this socket address.
pub(super) fn check_shape(disk_count: usize, guest_cid: u64) -> Result<(), DeviceBuildError> {
    if disk_count > DISKS_MAX {
        return Err(DeviceBuildError::TooManyDisks(disk_count));
    }
    // 5.10.4: 0 to 2 and the upper 32 bits are reserved.
    if guest_cid < 3 || guest_cid >= u64::from(u32::MAX) {
        return Err(DeviceBuildError::GuestCid(guest_cid));
    }
    Ok(())
}

/// Whether each disk can exist.
pub(super) fn check_disks(disks: &[DiskConfig]) -> Result<(), DeviceBuildError> {
    disks
        .iter()
        .enumerate()
        .try_for_each(|(index, disk)| block::check(index, disk))
}

/// Devices could not be built.
#[derive(Debug, thiserror::Error)]
pub enum DeviceBuildError {
    /// More disks than windows.
    #[error("{0} disks are more than {DISKS_MAX}")]
    TooManyDisks(usize),
    /// Reserved socket address.
    #[error("guest cid {0} is reserved")]
    GuestCid(u64),
    /// The window is empty, unaligned, or beyond the file.
    #[error("disk {disk}: window of {length} bytes at {offset} does not fit its file")]
    DiskWindow {
        /// Index of the disk.
        disk: usize,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Serial number longer than 20 bytes.
    #[error("disk {disk}: id is longer than 20 bytes")]
    DiskId {
        /// Index of the disk.
        disk: usize,
    },
    /// The base file's size cannot be read.
    #[error("disk {disk}: base file cannot be examined")]
    DiskFile {
        /// Index of the disk.
        disk: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The anonymous file for writes cannot be made.
    #[error("disk {disk}: delta cannot be made")]
    Delta {
        /// Index of the disk.
        disk: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The agent stream cannot be made non-blocking.
    #[error("agent stream cannot be made non-blocking")]
    AgentStream(#[source] io::Error),
    /// A tap for a machine without a network device.
    #[error("a tap was given, but there is no network device")]
    NoNetwork,
    /// The tap cannot be made non-blocking.
    #[error("tap cannot be made non-blocking")]
    Tap(#[source] io::Error),
    /// An eventfd cannot be made.
    #[error("eventfd cannot be made")]
    EventFd(#[source] io::Error),
    /// The host refused to watch a descriptor.
    #[error("descriptors cannot be watched")]
    Watch(#[source] io::Error),
}

/// Saved devices could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceRestoreError {
    /// The configuration itself is not possible.
    #[error("devices cannot be built")]
    Build(#[from] DeviceBuildError),
    /// The devices have reported what ends their machine; nothing brings it back.
    #[error("devices have failed before")]
    Ended,
    /// State, configuration and devices do not agree about their number.
    #[error("state or configuration has {found} virtio devices instead of {expected}")]
    SlotCount {
        /// Devices in the state, or configured.
        found: usize,
        /// Devices there are.
        expected: usize,
    },
    /// The state has another device in this window.
    #[error("virtio window {slot} holds another kind of device")]
    SlotKind {
        /// Index of the window.
        slot: usize,
    },
    /// The disk's length, access or id differs.
    #[error("disk {disk} differs from the one saved")]
    Disk {
        /// Index of the disk.
        disk: usize,
    },
    /// The network device's address or MTU are not what this monitor gives every guest.
    #[error("network device differs from the one saved")]
    Network,
    /// A transport that could not have been saved.
    #[error("state of {device} is not possible")]
    Slot {
        /// The device.
        device: DeviceName,
        /// What is wrong.
        #[source]
        reason: SlotError,
    },
    /// A socket device that could not have been saved.
    #[error("state of vsock is not possible")]
    Vsock(#[from] VsockError),
    /// A serial port that could not have been saved.
    #[error("state of the serial port is not possible")]
    Serial(#[from] SerialError),
}

/// What is wrong with one saved transport.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The registers contradict each other.
    #[error("registers are inconsistent")]
    Registers(#[source] RegistersError),
    /// Unknown bits.
    #[error("interrupt status {0:#x} has unknown bits")]
    InterruptStatus(u32),
    /// Another number of queues.
    #[error("{0} saved queues")]
    QueueCount(usize),
    /// A queue runs that the registers do not run, or the reverse.
    #[error("queue {queue} and the registers disagree")]
    QueueInUse {
        /// Index of the queue.
        queue: usize,
    },
    /// A queue does not fit guest memory.
    #[error("queue cannot be used")]
    Queue(#[source] GuestFault),
}
