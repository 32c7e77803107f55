//! The devices of one machine: disks, the socket, entropy, the network and the serial console.
//!
//! Owns everything that a guest can reach by a register or a queue. Knows nothing of KVM: the machine gives
//! it exits and eventfds. Start at [`Devices`]. Each virtio device is a register model (`registers`), a shell
//! (`slot`) and a backend (`block`, `vsock`, `rng`, `net`); its frozen form is in [`state`].
//!
//! **Invariants:** no byte from a guest or a saved state panics; one turn of one device is bounded; nothing
//! is in flight when a slot's lock is free; vCPU threads never do a device's I/O.

mod block;
mod config;
mod fault;
mod interrupt;
mod net;
mod registers;
mod rng;
mod serial;
mod slot;
pub mod state;
mod thread;
mod virtqueue;
mod vsock;

#[cfg(test)]
pub(crate) mod tests;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemoryMmap;
use block::Block;
use fault::Faults;
use net::Net;
use rng::Rng;
use serial::Console;
use slot::{Backend, Slot};
use state::DevicesStateV1;
use thread::{Control, Watch};
use vsock::Vsock;

pub use block::DiskReadError;
pub use config::{
    DISKS_MAX, DeviceBuildError, DeviceRestoreError, DevicesConfig, DiskAccess, DiskConfig,
    DiskFiles, NetworkDevice, SlotError,
};
pub use fault::{DeviceFault, DeviceName, GuestFault};
pub use registers::RegistersError;
pub use serial::{CONSOLE_BYTES_MAX, SerialError};
pub use thread::{DevicePauseError, DeviceStartError, DeviceThread};
pub use vsock::{AGENT_PORT, HOST_CID, VsockError};

/// Guest physical address of the first virtio-mmio window.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Length of one window.
pub const MMIO_WINDOW_BYTES: u64 = 0x1000;
/// GSI of the first window; window n has this plus n.
pub const MMIO_GSI_BASE: u32 = 5;
/// Windows that fit: GSIs 5 to 20.
pub const MMIO_WINDOWS_MAX: usize = 16;
/// GSI of the serial console.
pub const SERIAL_GSI: u32 = 4;
/// First port of the serial console (8 ports).
pub const SERIAL_PORT: u16 = serial::PORT;
/// Most heap that a guest can make the devices of one machine hold: the socket's buffers and the console, which double when they
/// grow, and 64 KiB for what is small. What it writes to copy-on-write disks comes on top, at most as much as they are long.
pub const HEAP_BYTES_MAX: usize = 2 * (vsock::BUFFERED_BYTES_MAX + CONSOLE_BYTES_MAX) + 64 * 1024;

/// One virtio-mmio window, for ACPI, irqfd and ioeventfd.
#[derive(Debug)]
pub struct MmioWindow {
    /// Guest physical address.
    pub base: u64,
    /// Bytes.
    pub length: u64,
    /// Global system interrupt, edge-triggered.
    pub gsi: u32,
    /// Written when the device interrupts; for KVM's irqfd.
    pub interrupt: EventFd,
    /// Queue index and its eventfd; for KVM's ioeventfd at `notify_address()`, 4 bytes, datamatch = index.
    pub notify: Vec<(u32, EventFd)>,
}

impl MmioWindow {
    /// Guest physical address of QueueNotify.
    pub fn notify_address(&self) -> u64 {
        self.base + registers::NOTIFY_OFFSET
    }
}

/// What the socket device shares with the outside.
#[derive(Debug, Default)]
struct AgentClock {
    /// CLOCK_MONOTONIC in nanoseconds; 0 while no byte has passed.
    first_byte_ns: AtomicU64,
}

/// All devices of one machine, shared by the vCPU threads and the device thread.
#[derive(Debug)]
pub struct Devices {
    slots: Vec<Slot>,
    disk_count: usize,
    console: Mutex<Console>,
    faults: Arc<Faults>,
    clock: Arc<AgentClock>,
    control: Control,
    watch: Watch,
}

/// How devices begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Running,
    Paused,
}

/// Takes a lock that a panicking thread may have left: the state behind it is checked on every use anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Devices {
    /// Builds fresh devices, running. `memory` must be the guest's whole RAM.
    ///
    /// # Errors
    /// The configuration is out of limits or the host refused a descriptor.
    pub fn new(
        config: DevicesConfig,
        memory: GuestMemoryMmap,
    ) -> Result<Arc<Self>, DeviceBuildError> {
        config.check()?;
        let DevicesConfig {
            disks,
            guest_cid,
            agent_stream,
            network,
        } = config;
        let disks = disks
            .into_iter()
            .enumerate()
            .map(|(index, disk)| Block::new(index, disk))
            .collect::<Result<_, _>>()?;
        let devices = Self::build((disks, network), guest_cid, memory, Start::Running)?;
        devices.set_stream(agent_stream)?;
        Ok(Arc::new(devices))
    }

    /// Builds devices for a guest that is not known yet, **paused**, with one disk for each of `disks`, and a network
    /// device without a tap if there is to be one. Their eventfds are final: windows and interrupts may be told to KVM and the thread started ([`Devices::start`])
    /// before [`Devices::reset_to`] gives them a guest. `memory` must be the guest's whole RAM, filled or not.
    ///
    /// # Errors
    /// The shape is out of limits or the host refused a descriptor.
    pub fn prepare(
        (disks, network): (&[DiskAccess], NetworkDevice),
        guest_cid: u64,
        memory: GuestMemoryMmap,
    ) -> Result<Arc<Self>, DeviceBuildError> {
        config::check_shape(disks.len(), guest_cid)?;
        let disks = disks
            .iter()
            .enumerate()
            .map(|(index, &access)| Block::prepare(index, access))
            .collect::<Result<_, _>>()?;
        Ok(Arc::new(Self::build(
            (disks, network),
            guest_cid,
            memory,
            Start::Paused,
        )?))
    }

    /// Builds the devices that `state` describes, **paused**: [`Devices::prepare`] and [`Devices::reset_to`] in one.
    /// Call [`Devices::start`], [`Devices::prime`] and [`Devices::resume`] in this order before the vCPUs run.
    ///
    /// # Errors
    /// The state does not fit the configuration, or no device could have produced it.
    pub fn restore(
        config: DevicesConfig,
        memory: GuestMemoryMmap,
        state: &DevicesStateV1,
    ) -> Result<Arc<Self>, DeviceRestoreError> {
        let DevicesConfig {
            disks,
            guest_cid,
            agent_stream,
            network,
        } = config;
        let shape: Vec<DiskAccess> = disks.iter().map(|disk| disk.access).collect();
        let devices = Self::prepare((&shape, network), guest_cid, memory)?;
        devices.reset_to(state, DiskFiles::Replaced(disks), agent_stream)?;
        Ok(devices)
    }

    fn build(
        (disks, network): (Vec<Block>, NetworkDevice),
        guest_cid: u64,
        memory: GuestMemoryMmap,
        start: Start,
    ) -> Result<Self, DeviceBuildError> {
        let disk_count = disks.len();
        let faults = Arc::new(Faults::default());
        let clock = Arc::new(AgentClock::default());
        let mut backends = Vec::with_capacity(disk_count + 3);
        for (index, disk) in disks.into_iter().enumerate() {
            backends.push((DeviceName::Disk(index), Backend::Block(Box::new(disk))));
        }
        let vsock = Vsock::new(guest_cid, faults.clone(), clock.clone());
        backends.push((DeviceName::Vsock, Backend::Vsock(Box::new(vsock))));
        backends.push((DeviceName::Rng, Backend::Rng(Rng::new(Instant::now()))));
        if network == NetworkDevice::Present {
            backends.push((DeviceName::Network, Backend::Net(Box::new(Net::new()))));
        }
        let slots: Vec<Slot> = backends
            .into_iter()
            .map(|(name, backend)| Slot::new(name, backend, memory.clone(), faults.clone()))
            .collect::<Result<_, _>>()
            .map_err(DeviceBuildError::EventFd)?;
        let console = Mutex::new(Console::new().map_err(DeviceBuildError::EventFd)?);
        let control = Control::new(start == Start::Paused).map_err(DeviceBuildError::EventFd)?;
        let watch = Watch::new(&control, &slots).map_err(DeviceBuildError::Watch)?;
        Ok(Self {
            slots,
            disk_count,
            console,
            faults,
            clock,
            control,
            watch,
        })
    }

    /// Takes on a saved state in place; eventfds, windows and threads stay. Afterwards the devices are as
    /// [`Devices::restore`] would have built them: nothing is left of what a guest or the host has done to them, not
    /// a byte in a disk's delta, a buffer, the console, a notification or an interrupt that was signalled and not
    /// taken. Paused only, with every vCPU stopped; call [`Devices::prime`] and [`Devices::resume`] next.
    ///
    /// `disks` must be of the access that the devices were built with. The old agent stream and the old tap are closed; a
    /// new tap comes with [`Devices::plug`].
    ///
    /// # Errors
    /// The state does not fit the devices or no device could have produced it: nothing has changed then. The devices
    /// have reported what ends the machine, or the host failed: they are of no use then.
    pub fn reset_to(
        &self,
        state: &DevicesStateV1,
        disks: DiskFiles,
        agent_stream: UnixStream,
    ) -> Result<(), DeviceRestoreError> {
        let Self {
            slots,
            disk_count,
            console,
            faults,
            clock,
            control,
            watch: _,
        } = self;
        assert!(control.is_paused(), "devices are reset while paused");
        if faults.has_ended() {
            return Err(DeviceRestoreError::Ended);
        }
        let DevicesStateV1 {
            serial,
            slots: saved,
        } = state;
        let expected = slots.len();
        let same_count = |found| match found {
            found if found == expected => Ok(()),
            found => Err(DeviceRestoreError::SlotCount { found, expected }),
        };
        same_count(saved.len())?;
        let mut disks = match disks {
            DiskFiles::Kept => Vec::new(),
            DiskFiles::Replaced(disks) => {
                same_count(disks.len() + expected - disk_count)?;
                config::check_disks(&disks)?;
                disks
            }
        }
        .into_iter();
        let plans = (slots.iter().zip(saved).enumerate())
            .map(|(index, (slot, state))| slot.plan(index, state, disks.next()))
            .collect::<Result<Vec<_>, _>>()?;
        let mut console = lock(console);
        let successor = console.successor(serial)?;

        self.drop_stream()?;
        self.drop_tap()?;
        for (slot, plan) in slots.iter().zip(plans) {
            slot.reset_to(plan)?;
        }
        *console = successor;
        console.drain();
        faults.forget();
        clock.first_byte_ns.store(0, Ordering::Release);
        Ok(self.set_stream(agent_stream)?)
    }

    fn with_vsock<T>(&self, look: impl FnOnce(&mut Vsock) -> T) -> T {
        self.slots[self.disk_count].with_backend(|backend| match backend {
            Backend::Vsock(vsock) => look(vsock),
            other => unreachable!("the window after the disks holds {other:?}"),
        })
    }

    /// Gives the socket device its host socket.
    fn set_stream(&self, stream: UnixStream) -> Result<(), DeviceBuildError> {
        let fd = stream.as_raw_fd();
        self.with_vsock(|vsock| vsock.set_stream(stream))?;
        self.watch.add_stream(fd).map_err(DeviceBuildError::Watch)
    }

    /// Stops to watch the host socket, which closes with the next state.
    fn drop_stream(&self) -> Result<(), DeviceBuildError> {
        match self.with_vsock(|vsock| vsock.stream_fd()) {
            Some(fd) => self.watch.remove(fd).map_err(DeviceBuildError::Watch),
            None => Ok(()),
        }
    }

    /// The window of the network device, which comes last.
    fn network_window(&self) -> Option<usize> {
        let window = self.disk_count + 2;
        (window < self.slots.len()).then_some(window)
    }

    fn with_net<T>(&self, look: impl FnOnce(&mut Net) -> T) -> Option<T> {
        let slot = &self.slots[self.network_window()?];
        slot.with_backend(|backend| match backend {
            Backend::Net(net) => Some(look(net)),
            other => unreachable!("the window after the entropy device's holds {other:?}"),
        })
    }

    /// Connects the network device to a tap, instead of any it had: IFF_TAP, IFF_NO_PI and IFF_VNET_HDR with a header of 12 bytes
    /// (TUNSETVNETHDRSZ), no offloads (TUNSETOFFLOAD 0). It is made non-blocking.
    ///
    /// # Errors
    /// There is no network device, or the host cannot watch the descriptor.
    pub fn plug(&self, tap: OwnedFd) -> Result<(), DeviceBuildError> {
        self.drop_tap()?;
        let fd = tap.as_raw_fd();
        let plugged = self.with_net(|net| net.plug(tap));
        plugged.ok_or(DeviceBuildError::NoNetwork)??;
        self.watch.add_tap(fd).map_err(DeviceBuildError::Watch)
    }

    /// Stops to watch the tap, which closes with the next state.
    fn drop_tap(&self) -> Result<(), DeviceBuildError> {
        match self.with_net(|net| net.tap_fd()).flatten() {
            Some(fd) => self.watch.remove(fd).map_err(DeviceBuildError::Watch),
            None => Ok(()),
        }
    }

    /// The windows in order: disks, vsock, rng, network.
    ///
    /// # Errors
    /// An eventfd could not be duplicated.
    pub fn mmio_windows(&self) -> Result<Vec<MmioWindow>, DeviceBuildError> {
        let mut windows = Vec::with_capacity(self.slots.len());
        let mut base = MMIO_BASE;
        for (gsi, slot) in (MMIO_GSI_BASE..).zip(&self.slots) {
            let mut notify = Vec::with_capacity(slot.notify().len());
            for (queue, event) in (0..).zip(slot.notify()) {
                notify.push((queue, event.try_clone().map_err(DeviceBuildError::EventFd)?));
            }
            let interrupt = slot
                .interrupt()
                .event()
                .try_clone()
                .map_err(DeviceBuildError::EventFd)?;
            windows.push(MmioWindow {
                base,
                length: MMIO_WINDOW_BYTES,
                gsi,
                interrupt,
                notify,
            });
            base += MMIO_WINDOW_BYTES;
        }
        Ok(windows)
    }

    /// The serial console's interrupt, for an irqfd on [`SERIAL_GSI`].
    ///
    /// # Errors
    /// The eventfd could not be duplicated.
    pub fn serial_interrupt(&self) -> Result<EventFd, DeviceBuildError> {
        lock(&self.console)
            .event()
            .try_clone()
            .map_err(DeviceBuildError::EventFd)
    }

    fn window(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(offset / MMIO_WINDOW_BYTES).ok()?;
        Some((self.slots.get(index)?, offset % MMIO_WINDOW_BYTES))
    }

    /// A vCPU's MMIO read exit; addresses that are nobody's read as all ones, as on a PC's bus.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((slot, offset)) => slot.mmio_read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A vCPU's MMIO write exit; addresses that are nobody's are ignored.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.window(address) {
            slot.mmio_write(offset, data);
        }
    }

    /// A vCPU's port read exit; false if the port is not ours.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        let Some(offset) = serial_offset(port) else {
            return false;
        };
        lock(&self.console).read(offset, data);
        true
    }

    /// A vCPU's port write exit; false if the port is not ours.
    pub fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        let Some(offset) = serial_offset(port) else {
            return false;
        };
        lock(&self.console).write(offset, data);
        true
    }

    /// The last [`CONSOLE_BYTES_MAX`] bytes that the guest wrote to the serial console.
    pub fn console_tail(&self) -> Vec<u8> {
        lock(&self.console).tail()
    }

    /// Starts the one thread that serves queues and the agent stream. Faults, also earlier ones, go to `faults`.
    ///
    /// # Errors
    /// It runs already, or the host refused epoll or a thread.
    pub fn start(
        self: &Arc<Self>,
        faults: Sender<DeviceFault>,
    ) -> Result<DeviceThread, DeviceStartError> {
        self.faults.connect(faults);
        thread::start(self)
    }

    /// Stops serving: the device thread finishes its turn, serves what is queued, and parks. Call it with every
    /// vCPU stopped; what is still queued is served on [`Devices::resume`], here or in a restored machine.
    ///
    /// # Errors
    /// The device thread did not park within 10 s, or it has died.
    pub fn pause(&self) -> Result<(), DevicePauseError> {
        self.control.pause()?;
        self.serve_all();
        Ok(())
    }

    /// Quiesced and paused only: moves what the host has already written to the agent stream into the guest's
    /// receive queue, so that it lies there when the vCPUs first run.
    pub fn prime(&self) {
        self.slots[self.disk_count].serve();
    }

    /// Serves again. Repeats every interrupt that the guest has not acknowledged and looks at every queue, so
    /// that neither an interrupt nor a notification is lost with the machine that was saved. Call it after the
    /// interrupt chip's state is set and the irqfds are registered, before the vCPUs run.
    pub fn resume(&self) {
        for slot in &self.slots {
            slot.interrupt().resend();
            slot.kick_all();
        }
        lock(&self.console).resend();
        self.clock.first_byte_ns.store(0, Ordering::Release);
        self.control.resume();
    }

    /// Stops serving, as [`Devices::pause`] does, but leaves what is queued: for devices whose state is given up.
    ///
    /// # Errors
    /// As [`Devices::pause`].
    pub fn park(&self) -> Result<(), DevicePauseError> {
        self.control.pause()
    }

    /// The state of all devices. Quiesced and paused only.
    pub fn save(&self) -> DevicesStateV1 {
        let Self {
            slots,
            disk_count: _,
            console,
            faults: _,
            clock: _,
            control,
            watch: _,
        } = self;
        assert!(control.is_paused(), "devices are saved while paused");
        DevicesStateV1 {
            serial: lock(console).save(),
            slots: slots.iter().map(Slot::save).collect(),
        }
    }

    /// CLOCK_MONOTONIC in nanoseconds when the first byte from the guest since [`Devices::resume`], or since
    /// the start, was handed to the agent stream; `None` if none was yet.
    pub fn first_agent_byte_ns(&self) -> Option<u64> {
        Some(self.clock.first_byte_ns.load(Ordering::Acquire)).filter(|&ns| ns != 0)
    }

    /// Number of disks.
    pub fn disk_count(&self) -> usize {
        self.disk_count
    }

    fn with_disk<T>(&self, disk: usize, look: impl FnOnce(&mut Block) -> T) -> Option<T> {
        let slot = self.slots[..self.disk_count].get(disk)?;
        slot.with_backend(|backend| match backend {
            Backend::Block(block) => Some(look(block)),
            Backend::Vsock(_) | Backend::Rng(_) | Backend::Net(_) => None,
        })
    }

    /// Length of a disk in bytes and how the guest may use it; `None` if there is no such disk.
    pub fn disk(&self, disk: usize) -> Option<(u64, DiskAccess)> {
        self.with_disk(disk, |block| (block.length(), block.access()))
    }

    /// Bytes of all copy-on-write disks that the guest has written since they were built or reset, in whole blocks of
    /// 4 KiB. Quiesced only.
    pub fn disk_written_bytes(&self) -> u64 {
        let written = |disk| self.with_disk(disk, |block| block.written_bytes());
        (0..self.disk_count).filter_map(written).sum()
    }

    /// Byte ranges of a copy-on-write disk that the guest has written since it was built or rewound,
    /// ascending, 4 KiB aligned except at the disk's end. Quiesced only.
    pub fn disk_written_runs(&self, disk: usize) -> Vec<std::ops::Range<u64>> {
        self.with_disk(disk, |block| block.written_runs())
            .unwrap_or_default()
    }

    /// Reads merged content (base plus delta) of a disk. Quiesced only.
    ///
    /// # Errors
    /// No such disk, a range beyond its end, or the host's file failed.
    pub fn disk_read_at(
        &self,
        disk: usize,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), DiskReadError> {
        self.with_disk(disk, |block| block.read_at(offset, into))
            .unwrap_or(Err(DiskReadError::NoDisk { disk }))
    }

    /// One bounded turn for every device; when the next one is due.
    fn serve_all(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut due = None;
        for slot in &self.slots {
            due = thread::earliest(due, slot.serve(), now);
        }
        due
    }
}

fn serial_offset(port: u16) -> Option<u16> {
    port.checked_sub(serial::PORT)
        .filter(|&offset| offset < serial::PORT_COUNT)
}
