//! One virtio-mmio window: registers, queues, the device behind them and its eventfds.
//!
//! The vCPU threads only touch registers; buffers are served by the device thread, which takes the same lock.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::block::Block;
use super::fault::{DeviceFault, DeviceName, Faults, GuestFault};
use super::interrupt::{Interrupt, STATUS_MASK};
use super::lock;
use super::net::{self, Net};
use super::registers::{CONFIG_OFFSET, Effect, Identity, Registers};
use super::rng::{self, Rng};
use super::state::{DeviceStateV1, RngStateV1, SlotStateV1};
use super::virtqueue::{VirtQueue, VirtQueueStateV1};
use super::vsock::{self, Channel, Vsock};
use super::{DeviceBuildError, DeviceRestoreError, DiskConfig, SlotError};
use crate::memory::GuestMemoryMmap;

/// When a device wants to be served again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// At the next event.
    Idle,
    /// As soon as the others had their turn.
    Again,
    /// At this time at the latest.
    At(Instant),
}

/// The device behind the registers.
#[derive(Debug)]
pub(super) enum Backend {
    Block(Box<Block>),
    Vsock(Box<Vsock>),
    Rng(Rng),
    Net(Box<Net>),
}

impl Backend {
    fn identity(&self) -> Identity {
        match self {
            Self::Block(block) => block.identity(),
            Self::Vsock(_) => vsock::IDENTITY,
            Self::Rng(_) => rng::IDENTITY,
            Self::Net(_) => net::IDENTITY,
        }
    }

    /// Copies out configuration space; what lies beyond it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let space = match self {
            Self::Block(block) => block.config_space(),
            Self::Vsock(vsock) => vsock.config_space(),
            Self::Rng(_) => Vec::new(),
            Self::Net(net) => net.config_space(),
        };
        let Some(rest) = usize::try_from(offset)
            .ok()
            .and_then(|offset| space.get(offset..))
        else {
            return;
        };
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }

    fn serve(
        &mut self,
        queues: &mut [Option<VirtQueue>],
        memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        match self {
            Self::Block(block) => block.serve(queues, memory),
            Self::Vsock(vsock) => vsock.serve(queues, memory),
            Self::Rng(rng) => rng.serve(queues, memory, Instant::now()),
            Self::Net(net) => net.serve(queues, memory),
        }
    }

    fn reset(&mut self) {
        match self {
            Self::Block(block) => block.reset(),
            Self::Vsock(vsock) => vsock.reset(),
            Self::Rng(rng) => rng.reset(),
            Self::Net(net) => net.reset(),
        }
    }

    fn save(&self) -> DeviceStateV1 {
        match self {
            Self::Block(block) => DeviceStateV1::Block(block.save()),
            Self::Vsock(vsock) => DeviceStateV1::Vsock(vsock.save()),
            Self::Rng(rng) => DeviceStateV1::Rng(rng.save()),
            Self::Net(net) => DeviceStateV1::Net(net.save()),
        }
    }
}

#[derive(Debug)]
pub(super) struct SlotCore {
    registers: Registers,
    queues: Vec<Option<VirtQueue>>,
    pub(super) backend: Backend,
}

impl SlotCore {
    fn no_queues(registers: &Registers) -> Vec<Option<VirtQueue>> {
        registers.queues().iter().map(|_| None).collect()
    }
}

/// A device in its window.
#[derive(Debug)]
pub(super) struct Slot {
    name: DeviceName,
    interrupt: Interrupt,
    notify: Vec<EventFd>,
    memory: GuestMemoryMmap,
    faults: Arc<Faults>,
    core: Mutex<SlotCore>,
}

impl Slot {
    pub(super) fn new(
        name: DeviceName,
        backend: Backend,
        memory: GuestMemoryMmap,
        faults: Arc<Faults>,
    ) -> io::Result<Self> {
        let registers = Registers::new(backend.identity());
        let queues = SlotCore::no_queues(&registers);
        let notify = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            name,
            interrupt: Interrupt::new()?,
            notify,
            memory,
            faults,
            core: Mutex::new(SlotCore {
                registers,
                queues,
                backend,
            }),
        })
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    pub(super) fn notify(&self) -> &[EventFd] {
        &self.notify
    }

    /// Looks at the device behind the registers.
    pub(super) fn with_backend<T>(&self, look: impl FnOnce(&mut Backend) -> T) -> T {
        look(&mut lock(&self.core).backend)
    }

    /// 4.2.2.2: registers are 32 bits wide and aligned; other accesses to them read as zero.
    pub(super) fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG_OFFSET {
            lock(&self.core)
                .backend
                .read_config(offset - CONFIG_OFFSET, data);
            return;
        }
        data.fill(0);
        let (Ok(register), true) = (
            u32::try_from(offset),
            offset.is_multiple_of(4) && data.len() == 4,
        ) else {
            return;
        };
        let status = self.interrupt.status();
        let value = if register == VIRTIO_MMIO_INTERRUPT_STATUS {
            status
        } else {
            lock(&self.core).registers.read(register, status)
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    /// As [`Slot::mmio_read`]; configuration space has no writable field in any of our devices.
    pub(super) fn mmio_write(&self, offset: u64, data: &[u8]) {
        let (Ok(register), Ok(bytes), true) = (
            u32::try_from(offset),
            <[u8; 4]>::try_from(data),
            offset.is_multiple_of(4) && offset < CONFIG_OFFSET,
        ) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        if register == VIRTIO_MMIO_INTERRUPT_ACK {
            self.interrupt.acknowledge(value);
            return;
        }
        let mut core = lock(&self.core);
        let outcome = match core.registers.write(register, value) {
            Effect::None => Ok(()),
            Effect::Acknowledge(bits) => {
                self.interrupt.acknowledge(bits);
                Ok(())
            }
            Effect::QueueReady(index) => self.build_queue(&core.registers, index).map(|_| ()),
            Effect::Activate => self.activate(&mut core),
            Effect::Reset => {
                core.queues = SlotCore::no_queues(&core.registers);
                core.backend.reset();
                self.interrupt.acknowledge(STATUS_MASK);
                Ok(())
            }
            Effect::Notify(index) => {
                self.kick(index);
                Ok(())
            }
        };
        if let Err(cause) = outcome {
            self.fail(&mut core, cause);
        }
        // A driver that has given up (FAILED) runs no queue any more, either.
        if !core.registers.is_active() && core.queues.iter().any(Option::is_some) {
            core.queues = SlotCore::no_queues(&core.registers);
        }
    }

    fn build_queue(&self, registers: &Registers, index: usize) -> Result<VirtQueue, GuestFault> {
        VirtQueue::new(
            index,
            registers.queues()[index],
            registers.event_idx(),
            0,
            &self.memory,
        )
    }

    fn activate(&self, core: &mut SlotCore) -> Result<(), GuestFault> {
        for index in 0..core.queues.len() {
            if core.registers.queues()[index].ready {
                core.queues[index] = Some(self.build_queue(&core.registers, index)?);
                // 3.1.1: buffers may have been made available before DRIVER_OK.
                self.kick(index);
            }
        }
        Ok(())
    }

    /// 2.1.2: a broken device says so, stops, and waits for a reset.
    fn fail(&self, core: &mut SlotCore, cause: GuestFault) {
        core.queues = SlotCore::no_queues(&core.registers);
        core.backend.reset();
        if core.registers.fail() {
            self.interrupt.raise_config();
        }
        self.faults.report(DeviceFault::Guest {
            device: self.name,
            cause,
        });
    }

    fn kick(&self, queue: usize) {
        // Fails only when the counter is full, and then the notification is pending already.
        let _ = self.notify[queue].write(1);
    }

    /// Makes the device thread look at every queue.
    pub(super) fn kick_all(&self) {
        for queue in 0..self.notify.len() {
            self.kick(queue);
        }
    }

    /// Forgets one queue's notification; the caller serves the device next.
    pub(super) fn clear_notification(&self, queue: usize) {
        // WouldBlock: someone else cleared it.
        let _ = self.notify[queue].read();
    }

    /// Gives the device one bounded turn.
    pub(super) fn serve(&self) -> Turn {
        let mut guard = lock(&self.core);
        let core = &mut *guard;
        if !core.registers.is_active() {
            return Turn::Idle;
        }
        let outcome = core
            .backend
            .serve(&mut core.queues, &self.memory)
            .and_then(|turn| {
                let mut raise = false;
                for queue in core.queues.iter_mut().flatten() {
                    raise |= queue.take_interrupt(&self.memory)?;
                }
                if raise {
                    self.interrupt.raise_queue();
                }
                Ok(turn)
            });
        match outcome {
            Ok(turn) => turn,
            Err(cause) => {
                self.fail(core, cause);
                Turn::Idle
            }
        }
    }

    /// Quiesced only.
    pub(super) fn save(&self) -> SlotStateV1 {
        let Self {
            name: _,
            interrupt,
            notify: _,
            memory: _,
            faults: _,
            core,
        } = self;
        let core = lock(core);
        let SlotCore {
            registers,
            queues,
            backend,
        } = &*core;
        SlotStateV1 {
            registers: registers.save(),
            interrupt_status: interrupt.status(),
            queues: queues
                .iter()
                .map(|queue| queue.as_ref().map(VirtQueue::save))
                .collect(),
            device: backend.save(),
        }
    }

    /// Checks that this slot can take on `state`, with `disk` as its base if there is one, and changes nothing.
    pub(super) fn plan(
        &self,
        index: usize,
        state: &SlotStateV1,
        disk: Option<DiskConfig>,
    ) -> Result<Plan, DeviceRestoreError> {
        let SlotStateV1 {
            registers,
            interrupt_status,
            queues: saved,
            device,
        } = state;
        let core = lock(&self.core);
        let device = match (&core.backend, device) {
            (Backend::Block(block), DeviceStateV1::Block(state)) => {
                if !block.check_state(state, disk.as_ref()) {
                    return Err(DeviceRestoreError::Disk { disk: index });
                }
                PlannedDevice::Block(disk)
            }
            (Backend::Vsock(vsock), DeviceStateV1::Vsock(state)) => {
                PlannedDevice::Vsock(vsock.plan(state)?)
            }
            (Backend::Rng(_), DeviceStateV1::Rng(RngStateV1 {})) => PlannedDevice::Rng,
            (Backend::Net(net), DeviceStateV1::Net(state)) => {
                if !net.check_state(state) {
                    return Err(DeviceRestoreError::Network);
                }
                PlannedDevice::Net
            }
            _ => return Err(DeviceRestoreError::SlotKind { slot: index }),
        };
        let refuse = |reason| DeviceRestoreError::Slot {
            device: self.name,
            reason,
        };
        let identity = core.backend.identity();
        let registers = Registers::try_from((identity, registers))
            .map_err(|e| refuse(SlotError::Registers(e)))?;
        if interrupt_status & !STATUS_MASK != 0 {
            return Err(refuse(SlotError::InterruptStatus(*interrupt_status)));
        }
        if saved.len() != registers.queues().len() {
            return Err(refuse(SlotError::QueueCount(saved.len())));
        }
        let mut queues = SlotCore::no_queues(&registers);
        for (index, cursor) in saved.iter().enumerate() {
            let queue = registers.queues()[index];
            if cursor.is_some() != (registers.is_active() && queue.ready) {
                return Err(refuse(SlotError::QueueInUse { queue: index }));
            }
            if let Some(VirtQueueStateV1 { position }) = *cursor {
                let event_idx = registers.event_idx();
                let queue = VirtQueue::new(index, queue, event_idx, position, &self.memory)
                    .map_err(|e| refuse(SlotError::Queue(e)))?;
                queues[index] = Some(queue);
            }
        }
        Ok(Plan {
            registers,
            queues,
            interrupt_status: *interrupt_status,
            device,
        })
    }

    /// Carries out what [`Slot::plan`] agreed to. Nothing that a guest or the host has left in this slot stays:
    /// registers, queues, notifications, interrupts, and what is behind them. Quiesced only.
    pub(super) fn reset_to(&self, plan: Plan) -> Result<(), DeviceBuildError> {
        let Self {
            name,
            interrupt,
            notify,
            memory: _,
            faults: _,
            core,
        } = self;
        let mut core = lock(core);
        let SlotCore {
            registers,
            queues,
            backend,
        } = &mut *core;
        (*registers, *queues) = (plan.registers, plan.queues);
        match (backend, plan.device, name) {
            (Backend::Block(block), PlannedDevice::Block(config), &DeviceName::Disk(disk)) => block
                .reset_to(config)
                .map_err(|source| DeviceBuildError::Delta { disk, source })?,
            (Backend::Vsock(vsock), PlannedDevice::Vsock(channel), _) => vsock.reset_to(channel),
            (Backend::Rng(rng), PlannedDevice::Rng, _) => *rng = Rng::new(Instant::now()),
            (Backend::Net(net), PlannedDevice::Net, _) => net.reset_to(),
            (backend, ..) => unreachable!("planned for another device than {backend:?}"),
        }
        for queue in 0..notify.len() {
            self.clear_notification(queue);
        }
        interrupt.reset_to(plan.interrupt_status);
        Ok(())
    }
}

/// A state that was checked and fits its slot.
#[derive(Debug)]
pub(super) struct Plan {
    registers: Registers,
    queues: Vec<Option<VirtQueue>>,
    interrupt_status: u32,
    device: PlannedDevice,
}

/// The device's own part of a [`Plan`].
#[derive(Debug)]
enum PlannedDevice {
    /// With another base, if there is one.
    Block(Option<DiskConfig>),
    Vsock(Channel),
    Rng,
    Net,
}
