//! The virtio-mmio register file (virtio 1.2, 4.2.2) as a pure model: register accesses in, effects out.
//!
//! **Invariant:** `status` is one of the sets that 3.1.1's order of initialization can produce, and a
//! queue's size and addresses never change once it is ready or the driver is running.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as mmio;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Offset of the device-specific configuration space in a window.
pub(super) const CONFIG_OFFSET: u64 = mmio::VIRTIO_MMIO_CONFIG as u64;
/// Offset of QueueNotify in a window; the machine puts an ioeventfd here.
pub(super) const NOTIFY_OFFSET: u64 = mmio::VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// "virt", little-endian (4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// The modern interface (4.2.2).
const VERSION: u32 = 2;
/// "THAW", little-endian.
const VENDOR: u32 = 0x5741_4854;

/// VIRTIO_F_VERSION_1, without which no driver is accepted.
pub(super) const FEATURE_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// VIRTIO_F_EVENT_IDX, offered by every device.
pub(super) const FEATURE_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_F_INDIRECT_DESC, offered by every device.
pub(super) const FEATURE_INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// The stages of 3.1.1, each a superset of the one before.
const STAGES: [u32; 5] = [
    0,
    ACKNOWLEDGE,
    ACKNOWLEDGE | DRIVER,
    ACKNOWLEDGE | DRIVER | FEATURES_OK,
    ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
];

/// What a device is, as far as its registers tell.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    /// Virtio device type (section 5).
    pub(super) device_id: u32,
    /// Features on offer, FEATURE_VERSION_1 included.
    pub(super) features: u64,
    /// Largest size of every queue, powers of two.
    pub(super) queue_size_max: &'static [u16],
}

/// What the shell must do after a register write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing outside the registers changed.
    None,
    /// The driver declared this queue ready: check it against guest memory.
    QueueReady(usize),
    /// DRIVER_OK: build the queues and begin to serve.
    Activate,
    /// The driver wrote status 0: drop everything.
    Reset,
    /// Buffers were made available in this queue.
    Notify(usize),
    /// These interrupt bits were handled.
    Acknowledge(u32),
}

/// One queue's configuration, written by the driver before DRIVER_OK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl QueueRegisters {
    fn new(size_max: u16) -> Self {
        Self {
            size: size_max,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// The register file of one device.
#[derive(Debug)]
pub(super) struct Registers {
    identity: Identity,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(super) fn new(identity: Identity) -> Self {
        let queues = identity
            .queue_size_max
            .iter()
            .map(|&max| QueueRegisters::new(max))
            .collect();
        Self {
            identity,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
        }
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    pub(super) fn event_idx(&self) -> bool {
        self.driver_features & FEATURE_EVENT_IDX != 0
    }

    /// The driver runs and the device has not failed.
    pub(super) fn is_active(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    /// Marks the device broken; true if the driver must be told by an interrupt (2.1.2: only after DRIVER_OK).
    pub(super) fn fail(&mut self) -> bool {
        self.status |= NEEDS_RESET;
        self.status & DRIVER_OK != 0
    }

    /// Reads the 32-bit register at `offset`; what does not exist reads as zero.
    pub(super) fn read(&self, offset: u32, interrupt_status: u32) -> u32 {
        match offset {
            mmio::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            mmio::VIRTIO_MMIO_VERSION => VERSION,
            mmio::VIRTIO_MMIO_DEVICE_ID => self.identity.device_id,
            mmio::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            mmio::VIRTIO_MMIO_DEVICE_FEATURES => {
                half(self.identity.features, self.device_features_select)
            }
            mmio::VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected()
                .map_or(0, |index| u32::from(self.identity.queue_size_max[index])),
            mmio::VIRTIO_MMIO_QUEUE_READY => self
                .selected()
                .map_or(0, |index| u32::from(self.queues[index].ready)),
            mmio::VIRTIO_MMIO_INTERRUPT_STATUS => interrupt_status,
            mmio::VIRTIO_MMIO_STATUS => self.status,
            // No shared memory: the length of a region that does not exist reads as -1 (4.2.2).
            mmio::VIRTIO_MMIO_SHM_LEN_LOW
            | mmio::VIRTIO_MMIO_SHM_LEN_HIGH
            | mmio::VIRTIO_MMIO_SHM_BASE_LOW
            | mmio::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // ConfigGeneration included: the configuration never changes.
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset`; what is not writable now is ignored.
    pub(super) fn write(&mut self, offset: u32, value: u32) -> Effect {
        match offset {
            mmio::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            mmio::VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            mmio::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            mmio::VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify(value),
            mmio::VIRTIO_MMIO_INTERRUPT_ACK => return Effect::Acknowledge(value),
            mmio::VIRTIO_MMIO_STATUS => return self.write_status(value),
            _ => return self.write_queue(offset, value),
        }
        Effect::None
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_select)
            .ok()
            .filter(|&index| index < self.queues.len())
    }

    fn notify(&self, value: u32) -> Effect {
        match usize::try_from(value) {
            Ok(index) if self.is_active() && index < self.queues.len() => Effect::Notify(index),
            _ => Effect::None,
        }
    }

    /// 3.1.1 step 4: only between DRIVER and FEATURES_OK.
    fn write_driver_features(&mut self, value: u32) {
        if self.status != ACKNOWLEDGE | DRIVER {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn features_acceptable(&self) -> bool {
        features_acceptable(&self.identity, self.driver_features)
    }

    /// 2.1 and 3.1.1: bits are only ever added, in order; 0 resets; a failed device accepts nothing else.
    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            *self = Self::new(self.identity);
            return Effect::Reset;
        }
        if self.status & (FAILED | NEEDS_RESET) != 0 {
            self.status |= value & FAILED;
            return Effect::None;
        }
        let mut wanted = value;
        if wanted & FEATURES_OK != 0
            && self.status & FEATURES_OK == 0
            && !self.features_acceptable()
        {
            // 3.1.1 step 5: the driver reads back and finds its features refused.
            wanted &= !FEATURES_OK;
        }
        let stage = wanted & !FAILED;
        let adds_only = stage & self.status == self.status;
        let runs_negotiated = stage & DRIVER_OK == 0 || self.status & FEATURES_OK != 0;
        if !STAGES.contains(&stage) || !adds_only || !runs_negotiated {
            return Effect::None;
        }
        let started = stage & DRIVER_OK != 0 && self.status & DRIVER_OK == 0;
        self.status = wanted;
        if started && self.is_active() {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    /// 4.2.2: a queue is set up after FEATURES_OK and before DRIVER_OK, and frozen once ready.
    fn write_queue(&mut self, offset: u32, value: u32) -> Effect {
        let Some(index) = self.selected() else {
            return Effect::None;
        };
        if self.status != ACKNOWLEDGE | DRIVER | FEATURES_OK {
            return Effect::None;
        }
        let size_max = self.identity.queue_size_max[index];
        let queue = &mut self.queues[index];
        if offset == mmio::VIRTIO_MMIO_QUEUE_READY {
            let newly = value & 1 == 1 && !queue.ready;
            queue.ready = value & 1 == 1;
            return if newly {
                Effect::QueueReady(index)
            } else {
                Effect::None
            };
        }
        if queue.ready {
            return Effect::None;
        }
        match offset {
            mmio::VIRTIO_MMIO_QUEUE_NUM => {
                if let Some(size) = queue_size(value, size_max) {
                    queue.size = size;
                }
            }
            mmio::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            mmio::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            mmio::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            mmio::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            mmio::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
        Effect::None
    }
}

fn features_acceptable(identity: &Identity, features: u64) -> bool {
    features & !identity.features == 0 && features & FEATURE_VERSION_1 != 0
}

/// A queue size that 2.7 allows: a power of two within the device's maximum.
fn queue_size(value: u32, size_max: u16) -> Option<u16> {
    u16::try_from(value)
        .ok()
        .filter(|size| size.is_power_of_two() && *size <= size_max)
}

fn half(value: u64, select: u32) -> u32 {
    let part = match select {
        0 => value & 0xffff_ffff,
        1 => value >> 32,
        _ => 0,
    };
    u32::try_from(part).expect("32 bits were selected")
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

/// The register file on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistersStateV1 {
    /// Device status bits (2.1).
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// One entry a queue.
    pub queues: Vec<QueueRegistersStateV1>,
}

/// One queue's configuration on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegistersStateV1 {
    /// QueueNum.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// Descriptor table, guest physical.
    pub descriptors: u64,
    /// Available ring, guest physical.
    pub available: u64,
    /// Used ring, guest physical.
    pub used: u64,
}

/// A saved register file that no device could have produced.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RegistersError {
    /// The status bits do not follow 3.1.1.
    #[error("status {0:#x} cannot be reached")]
    Status(u32),
    /// The features were never on offer, or lack VERSION_1.
    #[error("features {0:#x} were never offered")]
    Features(u64),
    /// The device has another number of queues.
    #[error("{found} queues where the device has {expected}")]
    QueueCount {
        /// Queues in the state.
        found: usize,
        /// Queues of the device.
        expected: usize,
    },
    /// The queue's size is no power of two within the maximum.
    #[error("queue {queue} has size {size}")]
    QueueSize {
        /// Index of the queue.
        queue: usize,
        /// The size found.
        size: u16,
    },
}

impl Registers {
    pub(super) fn save(&self) -> RegistersStateV1 {
        let Self {
            identity: _,
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
        } = self;
        let queues = queues
            .iter()
            .map(
                |&QueueRegisters {
                     size,
                     ready,
                     descriptors,
                     available,
                     used,
                 }| {
                    QueueRegistersStateV1 {
                        size,
                        ready,
                        descriptors,
                        available,
                        used,
                    }
                },
            )
            .collect();
        RegistersStateV1 {
            status: *status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues,
        }
    }
}

impl TryFrom<(Identity, &RegistersStateV1)> for Registers {
    type Error = RegistersError;

    fn try_from((identity, state): (Identity, &RegistersStateV1)) -> Result<Self, RegistersError> {
        let stage = state.status & !(FAILED | NEEDS_RESET);
        if !STAGES.contains(&stage) {
            return Err(RegistersError::Status(state.status));
        }
        let negotiated = stage & FEATURES_OK != 0;
        if negotiated && !features_acceptable(&identity, state.driver_features) {
            return Err(RegistersError::Features(state.driver_features));
        }
        let expected = identity.queue_size_max.len();
        if state.queues.len() != expected {
            return Err(RegistersError::QueueCount {
                found: state.queues.len(),
                expected,
            });
        }
        let mut queues = Vec::with_capacity(expected);
        for (index, queue) in state.queues.iter().enumerate() {
            if queue_size(u32::from(queue.size), identity.queue_size_max[index]).is_none() {
                return Err(RegistersError::QueueSize {
                    queue: index,
                    size: queue.size,
                });
            }
            if queue.ready && !negotiated {
                return Err(RegistersError::Status(state.status));
            }
            let &QueueRegistersStateV1 {
                size,
                ready,
                descriptors,
                available,
                used,
            } = queue;
            queues.push(QueueRegisters {
                size,
                ready,
                descriptors,
                available,
                used,
            });
        }
        Ok(Self {
            identity,
            status: state.status,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            queues,
        })
    }
}
