//! What can go wrong while devices run, told to the machine's owner.

use std::fmt;
use std::sync::Mutex;
use std::sync::mpsc::Sender;

/// Faults that one guest may cause before the rest are dropped: a guest can reset and break a device
/// for ever, and the channel must stay bounded.
const FAULTS_MAX: u32 = 64;

/// Which device a fault or an error speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceName {
    /// Disk by its place in the configuration, from 0.
    Disk(usize),
    /// The socket device.
    Vsock,
    /// The entropy device.
    Rng,
    /// The network device.
    Network,
}

impl fmt::Display for DeviceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(index) => write!(formatter, "disk {index}"),
            Self::Vsock => formatter.write_str("vsock"),
            Self::Rng => formatter.write_str("rng"),
            Self::Network => formatter.write_str("network"),
        }
    }
}

/// How a guest's driver broke the virtio protocol. The device is dead until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum GuestFault {
    /// A queue was declared ready with a ring outside memory, misaligned or at address 0.
    #[error("queue {queue} lies outside guest memory or is misaligned")]
    QueueAddress {
        /// Index of the queue.
        queue: usize,
    },
    /// The available or used ring cannot be used.
    #[error("the rings of queue {queue} are inconsistent")]
    Ring {
        /// Index of the queue.
        queue: usize,
        /// What the ring code found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A descriptor chain loops, is cut short, is too long or mixes directions.
    #[error("queue {queue} holds a malformed descriptor chain")]
    Chain {
        /// Index of the queue.
        queue: usize,
    },
    /// A descriptor points outside guest memory.
    #[error("queue {queue} holds a buffer outside guest memory")]
    Buffer {
        /// Index of the queue.
        queue: usize,
    },
    /// A chain is too small for the device's header or status.
    #[error("queue {queue} holds a chain without room for the header")]
    TooSmall {
        /// Index of the queue.
        queue: usize,
    },
    /// A vsock packet's length does not fit its chain or the maximum.
    #[error("vsock packet of {length} bytes does not fit its chain")]
    PacketLength {
        /// Payload length in the header.
        length: u32,
    },
}

/// An event that the owner of the machine must hear of.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// The guest broke a device; the device waits for a reset.
    #[error("guest broke {device}")]
    Guest {
        /// The broken device.
        device: DeviceName,
        /// What the guest did.
        #[source]
        cause: GuestFault,
    },
    /// The host end of the agent stream was closed or failed; the guest's connection was reset.
    #[error("agent stream closed by the host")]
    AgentStreamClosed,
    /// The guest closed or reset the agent channel.
    #[error("agent channel closed by the guest")]
    AgentDisconnected,
    /// The device thread cannot go on; the machine must be destroyed.
    #[error("device thread failed")]
    Thread(#[source] std::io::Error),
}

/// Where faults go: nowhere until the device thread starts.
#[derive(Debug, Default)]
pub(super) struct Faults {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sender: Option<Sender<DeviceFault>>,
    early: Vec<DeviceFault>,
    count: u32,
    /// One of them ended the machine.
    has_ended: bool,
}

impl Faults {
    /// Sends what was held back, and everything from now on, to `sender`.
    pub(super) fn connect(&self, sender: Sender<DeviceFault>) {
        let mut inner = super::lock(&self.inner);
        for fault in inner.early.drain(..) {
            // A receiver that is gone does not want to know.
            let _ = sender.send(fault);
        }
        inner.sender = Some(sender);
    }

    /// Whether a fault was reported that ends the machine: its owner may hear of it late.
    pub(super) fn has_ended(&self) -> bool {
        super::lock(&self.inner).has_ended
    }

    /// A machine that begins anew may make as many faults as any.
    pub(super) fn forget(&self) {
        let mut inner = super::lock(&self.inner);
        inner.early.clear();
        inner.count = 0;
    }

    pub(super) fn report(&self, fault: DeviceFault) {
        let mut inner = super::lock(&self.inner);
        inner.has_ended |= !matches!(fault, DeviceFault::AgentDisconnected);
        // The host's own faults come once each, and must be heard however much the guest makes.
        let by_host = matches!(
            fault,
            DeviceFault::AgentStreamClosed | DeviceFault::Thread(_)
        );
        if !by_host {
            if inner.count >= FAULTS_MAX {
                return;
            }
            inner.count += 1;
        }
        match &inner.sender {
            Some(sender) => {
                let _ = sender.send(fault);
            }
            None => inner.early.push(fault),
        }
    }
}
