//! The interrupt line of one virtio-mmio device (virtio 1.2, 4.2.2: InterruptStatus, InterruptACK).
//!
//! Lock free: the guest's interrupt handler reads and acknowledges while the device thread holds the
//! device's lock for the length of a disk request.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Every bit that InterruptStatus can hold.
pub(super) const STATUS_MASK: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

/// Status bits plus the eventfd that KVM turns into an edge on the device's GSI.
#[derive(Debug)]
pub(super) struct Interrupt {
    status: AtomicU32,
    event: EventFd,
}

impl Interrupt {
    /// A line with nothing pending.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            status: AtomicU32::new(0),
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Forgets what was signalled; `status` is pending but not yet signalled: [`Interrupt::resend`] does that.
    /// Quiesced only.
    pub(super) fn reset_to(&self, status: u32) {
        self.status.store(status & STATUS_MASK, Ordering::SeqCst);
        // WouldBlock: nothing was signalled, or KVM took it at once.
        let _ = self.event.read();
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// A queue has new used buffers.
    pub(super) fn raise_queue(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration, or DEVICE_NEEDS_RESET, changed.
    pub(super) fn raise_config(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Signals again what is still unacknowledged: the edge may have been lost with the old machine.
    /// A spurious edge is harmless, the driver reads the status first.
    pub(super) fn resend(&self) {
        if self.status() != 0 {
            self.signal();
        }
    }

    fn raise(&self, bit: u32) {
        // The status must be visible before the edge, or the handler would find nothing to do.
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.signal();
    }

    fn signal(&self) {
        // Fails only when the counter is full, and then the edge is pending already.
        let _ = self.event.write(1);
    }
}
