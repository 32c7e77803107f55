//! One machine: its vCPUs, devices and clocks, run and stopped as a whole.
//!
//! Pause: every vCPU stops, then the devices; resume: devices first, so that what lay in the agent channel is in the guest's
//! queue, then time, then the vCPUs. A machine that was restored has its clocks set at the first resume and not before: its
//! time stands still however long it waits for a request.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::{IoEventAddress, VmFd};
use thaw_snapshot::Snapshot;
use thaw_vmm_control::{Exit, Timings, WorkingSet};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::acpi::VirtioWindow;
use crate::arch::x86_64::interrupts::{self, InterruptError};
use crate::arch::x86_64::vcpu_state::{self, HostVcpuLimits, VcpuStateError};
use crate::confine::{self, Role};
use crate::devices::{
    DeviceBuildError, DevicePauseError, DeviceStartError, DeviceThread, Devices, MmioWindow,
    SERIAL_GSI,
};
use crate::end::EndSender;
use crate::end::{self, EndReceiver};
use crate::fault::{Blame, Fault};
use crate::host::Bare;
use crate::memory::GuestMemory;
use crate::paging::{self, Served, Told};
use crate::prefetch::{Prefetcher, Recorder, Rest, in_order};
use crate::rewind::Pristine;
use crate::state::MachineStateV1;
use crate::vcpu::{Vcpu, VcpuContext, VcpuError, monotonic_ns};

/// The guest's vsock address.
pub const GUEST_CID: u64 = 3;

/// Why devices could not be put into a machine, or it could not be started.
#[derive(Debug, Error)]
pub enum AssembleError {
    /// Windows or interrupts of the devices.
    #[error("devices could not be described")]
    Describe(#[source] DeviceBuildError),
    /// A window beyond the 32-bit hole.
    #[error("device window at {0:#x} is outside the device hole")]
    Window(u64),
    /// KVM refused an interrupt.
    #[error("interrupt {gsi} could not be connected")]
    Interrupt {
        /// Which.
        gsi: u32,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused a notification.
    #[error("notification at {address:#x} for queue {queue} could not be connected")]
    Notification {
        /// Guest-physical address.
        address: u64,
        /// Queue.
        queue: u32,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// No eventfd.
    #[error("eventfd could not be made")]
    EventFd(#[source] io::Error),
    /// No device thread.
    #[error("device thread could not be started")]
    Devices(#[source] DeviceStartError),
    /// No thread for the devices' reports.
    #[error("thread for device faults could not be started")]
    FaultThread(#[source] io::Error),
    /// No vCPU thread.
    #[error("vcpus could not be started")]
    Vcpu(#[source] VcpuError),
}

/// Why a machine could not be paused or resumed.
#[derive(Debug, Error)]
pub enum SwitchError {
    /// A vCPU.
    #[error("vcpus could not be stopped")]
    Vcpu(#[source] VcpuError),
    /// The device thread.
    #[error("devices could not be stopped")]
    Devices(#[source] DevicePauseError),
    /// Time of a restored machine.
    #[error("time of vcpu {vcpu} could not be set")]
    Time {
        /// Which.
        vcpu: usize,
        /// Cause.
        #[source]
        source: VcpuStateError,
    },
    /// The machine's clock.
    #[error("clock could not be set")]
    Clock(#[source] InterruptError),
}

impl Blame for SwitchError {
    fn fault(&self) -> Fault {
        match self {
            Self::Vcpu(VcpuError::Ended { .. }) => Fault::Guest,
            _ => Fault::Host,
        }
    }
}

/// What a machine was restored from: all that is needed to put it back there.
#[derive(Debug)]
pub struct Origin {
    /// The machine as it was saved.
    pub state: MachineStateV1,
    /// Frequency of its TSC, kHz.
    pub tsc_khz: u32,
    /// The open snapshot, its base attached: guest memory is a private mapping of its layers.
    pub snapshot: Snapshot,
    /// What a rewind copies from; made by the first.
    pub pristine: Option<Pristine>,
}

/// How a machine's clocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clocks {
    /// They go with the host's.
    Set,
    /// They stand where the origin's stood: the next resume sets them.
    Frozen,
}

/// Where a disk's content lies, for saving it.
#[derive(Debug)]
pub struct DiskBase {
    /// The file.
    pub file: std::fs::File,
    /// Where in it.
    pub offset: u64,
}

/// One virtual machine with its guest.
#[derive(Debug)]
pub struct Machine {
    pub(crate) vm: VmFd,
    pub(crate) memory: GuestMemory,
    pub(crate) limits: HostVcpuLimits,
    pub(crate) devices: Arc<Devices>,
    pub(crate) disk_bases: Vec<DiskBase>,
    pub(crate) vcpus: Vec<Vcpu>,
    /// `None` in a shell and in a machine that was booted.
    pub(crate) origin: Option<Origin>,
    pub(crate) clocks: Clocks,
    pub(crate) timings: Timings,
    /// What the first resume after a claim fetches beside the guest.
    pub(crate) to_fetch: Rest,
    /// `None` if the kernel maps its memory.
    pub(crate) served: Option<Served>,
    prefetcher: Option<Prefetcher>,
    recorder: Recorder,
    end_sender: EndSender,
    told: Option<Told>,
    device_thread: Option<DeviceThread>,
    first_instruction_ns: Arc<AtomicU64>,
    ends: EndReceiver,
}

/// The devices' windows as ACPI tells of them.
///
/// # Errors
/// A window that a 32-bit descriptor cannot name.
pub fn acpi_windows(windows: &[MmioWindow]) -> Result<Vec<VirtioWindow>, AssembleError> {
    let convert = |window: &MmioWindow| {
        let outside = |_| AssembleError::Window(window.base);
        let base = u32::try_from(window.base).map_err(outside)?;
        let length = u32::try_from(window.length).map_err(outside)?;
        Ok(VirtioWindow {
            base,
            length,
            gsi: window.gsi,
        })
    };
    windows.iter().map(convert).collect()
}

fn connect(vm: &VmFd, windows: &[MmioWindow], serial: &EventFd) -> Result<(), AssembleError> {
    let interrupt = |event: &EventFd, gsi| {
        vm.register_irqfd(event, gsi)
            .map_err(|source| AssembleError::Interrupt { gsi, source })
    };
    interrupt(serial, SERIAL_GSI)?;
    for window in windows {
        interrupt(&window.interrupt, window.gsi)?;
        let address = window.notify_address();
        for (queue, event) in &window.notify {
            vm.register_ioevent(event, &IoEventAddress::Mmio(address), *queue)
                .map_err(|source| AssembleError::Notification {
                    address,
                    queue: *queue,
                    source,
                })?;
        }
    }
    Ok(())
}

/// What a machine is put together from.
#[derive(Debug)]
pub struct Parts {
    /// The machine without a guest.
    pub bare: Bare,
    /// Devices; paused in a shell.
    pub devices: Arc<Devices>,
    /// Their windows.
    pub windows: Vec<MmioWindow>,
    /// Their disks' files, none in a shell.
    pub disk_bases: Vec<DiskBase>,
    /// What happened so far.
    pub timings: Timings,
}

impl Machine {
    /// Connects devices and starts threads. All vCPUs are paused.
    ///
    /// # Errors
    /// KVM refused a connection, or the host a thread.
    pub fn assemble(parts: Parts) -> Result<Self, AssembleError> {
        let Parts {
            bare,
            devices,
            windows,
            disk_bases,
            timings,
        } = parts;
        let Bare {
            vm,
            memory,
            vcpus,
            limits,
        } = bare;
        let serial = devices
            .serial_interrupt()
            .map_err(AssembleError::Describe)?;
        connect(&vm, &windows, &serial)?;
        let (end_sender, ends) = end::channel().map_err(AssembleError::EventFd)?;
        let (fault_sender, fault_receiver) = std::sync::mpsc::channel();
        let device_thread = devices
            .start(fault_sender)
            .map_err(AssembleError::Devices)?;
        let forward = end_sender.clone();
        std::thread::Builder::new()
            .name("device-faults".into())
            .spawn(move || {
                confine::thread(Role::Faults);
                end::forward_device_faults(&fault_receiver, &forward);
            })
            .map_err(AssembleError::FaultThread)?;
        let first_instruction_ns = Arc::new(AtomicU64::new(0));
        let context = VcpuContext {
            devices: Arc::clone(&devices),
            first_instruction_ns: Arc::clone(&first_instruction_ns),
            ends: end_sender.clone(),
        };
        let vcpus = (0u8..)
            .zip(vcpus)
            .map(|(number, fd)| Vcpu::start(number, fd, context.clone()))
            .collect::<Result<_, _>>()
            .map_err(AssembleError::Vcpu)?;
        let device_thread = Some(device_thread);
        Ok(Self {
            vm,
            memory,
            limits,
            devices,
            disk_bases,
            vcpus,
            origin: None,
            clocks: Clocks::Set,
            timings,
            to_fetch: Rest::default(),
            served: None,
            prefetcher: None,
            recorder: Recorder::default(),
            end_sender,
            told: None,
            device_thread,
            first_instruction_ns,
            ends,
        })
    }

    /// First start after a boot: the devices serve already.
    pub fn start(&mut self) {
        self.timings.resume_ns = Some(monotonic_ns());
        self.vcpus.iter().for_each(Vcpu::run);
    }

    /// Runs a paused machine; the request came at `asked_ns`.
    ///
    /// # Errors
    /// Time could not be set; the machine is of no use then.
    pub fn resume(&mut self, asked_ns: u64) -> Result<(), SwitchError> {
        self.timings.resume_ns = Some(asked_ns);
        self.first_instruction_ns.store(0, Ordering::SeqCst);
        self.devices.prime();
        self.timings.primed_ns = Some(monotonic_ns());
        self.devices.resume();
        if self.clocks == Clocks::Frozen {
            self.set_time()?;
            self.clocks = Clocks::Set;
        }
        for (vcpu, running) in self.vcpus.iter().enumerate() {
            vcpu_state::tell_paused(&running.fd())
                .map_err(|source| SwitchError::Time { vcpu, source })?;
        }
        self.timings.time_set_ns = Some(monotonic_ns());
        self.vcpus.iter().for_each(Vcpu::run);
        self.start_prefetch();
        Ok(())
    }

    /// The guest runs without it too, only slower.
    fn start_prefetch(&mut self) {
        match Prefetcher::start(std::mem::take(&mut self.to_fetch), &self.memory) {
            Ok(None) => {}
            Ok(started) => self.prefetcher = started,
            Err(error) => tracing::warn!(%error, "no thread for the rest of the working set"),
        }
    }

    /// Pages that were touched since the machine was restored, those of earlier calls first.
    ///
    /// # Errors
    /// The host does not let this process see its own pages.
    pub fn working_set(&mut self) -> io::Result<WorkingSet> {
        match &self.served {
            Some(served) => {
                let mut touches = served.touches()?;
                if let Some(origin) = &self.origin {
                    let original = origin.snapshot.memory_reader().map_err(io::Error::other)?;
                    paging::tell_writes(&mut touches, &self.memory, &original)?;
                }
                Ok(in_order(&touches, self.memory.bytes()))
            }
            None => self.recorder.look(&self.memory),
        }
    }

    /// Hears of ends that come from elsewhere.
    pub(crate) fn end_sender(&self) -> EndSender {
        self.end_sender.clone()
    }

    /// Steps 10 to 12 of [`vcpu_state`]'s order.
    fn set_time(&self) -> Result<(), SwitchError> {
        let time = |vcpu| move |source| SwitchError::Time { vcpu, source };
        let (Some(first), Some(origin)) = (self.vcpus.first(), &self.origin) else {
            return Ok(());
        };
        let MachineStateV1 {
            time: frozen,
            vcpus: states,
            ..
        } = &origin.state;
        let offset = vcpu_state::offset_for(&first.fd(), frozen.tsc).map_err(time(0))?;
        for (number, (vcpu, state)) in self.vcpus.iter().zip(states).enumerate() {
            vcpu_state::set_time(&vcpu.fd(), state, offset).map_err(time(number))?;
        }
        interrupts::set_clock_ns(&self.vm, frozen.clock_ns).map_err(SwitchError::Clock)?;
        for (number, (vcpu, state)) in self.vcpus.iter().zip(states).enumerate() {
            vcpu_state::set_deadline(&vcpu.fd(), state).map_err(time(number))?;
        }
        Ok(())
    }

    /// Stops a running machine: all vCPUs, then the devices.
    ///
    /// # Errors
    /// Something did not stop in time or has ended.
    pub fn pause(&mut self) -> Result<(), SwitchError> {
        self.stop_vcpus()?;
        self.devices.pause().map_err(SwitchError::Devices)
    }

    fn stop_vcpus(&mut self) -> Result<(), SwitchError> {
        if let Some(prefetcher) = self.prefetcher.take() {
            prefetcher.stop();
        }
        self.vcpus.iter().for_each(Vcpu::request_pause);
        (self.vcpus.iter()).try_for_each(|vcpu| vcpu.wait_paused().map_err(SwitchError::Vcpu))
    }

    /// As [`Machine::pause`], but what devices have not served stays so: the machine's state is given up. A machine that is
    /// paused stays so.
    ///
    /// # Errors
    /// As [`Machine::pause`].
    pub(crate) fn park(&mut self) -> Result<(), SwitchError> {
        self.stop_vcpus()?;
        self.devices.park().map_err(SwitchError::Devices)
    }

    /// All parts were put back to `origin`: the clocks stand, and nothing has happened since.
    pub(crate) fn begin_anew(&mut self, origin: Origin, timings: Timings) {
        self.first_instruction_ns.store(0, Ordering::SeqCst);
        self.origin = Some(origin);
        self.clocks = Clocks::Frozen;
        self.timings = timings;
        self.recorder = Recorder::default();
    }

    /// The origin of a machine whose clocks no resume has set yet: they still stand where they stood there.
    pub(crate) fn frozen(&self) -> Option<&MachineStateV1> {
        let origin = self
            .origin
            .as_ref()
            .filter(|_| self.clocks == Clocks::Frozen);
        origin.map(|origin| &origin.state)
    }

    /// When things happened.
    pub fn timings(&self) -> Timings {
        let first_instruction = self.first_instruction_ns.load(Ordering::SeqCst);
        Timings {
            first_instruction_ns: (first_instruction != 0).then_some(first_instruction),
            first_agent_byte_ns: self.devices.first_agent_byte_ns(),
            ..self.timings
        }
    }

    /// The console's tail.
    pub fn console(&self) -> Vec<u8> {
        self.devices.console_tail()
    }

    /// Readable when the machine may have ended.
    pub fn wake(&self) -> &OwnedFd {
        &self.ends.wake
    }

    /// How the machine ended by itself, if it did. All vCPUs are told to stop then.
    pub fn ended(&mut self) -> Option<Exit> {
        let end = self.ends.take()?;
        self.vcpus.iter().for_each(Vcpu::request_pause);
        let exit = end.exit(&self.console());
        self.told = end.into_told();
        Some(exit)
    }

    /// Its end was reported.
    pub fn end_was_reported(&mut self) {
        self.told = None;
    }

    /// Ends threads. Nothing more can be asked of the machine.
    pub fn close(self) {
        self.vcpus.into_iter().for_each(Vcpu::close);
        if let Some(Err(error)) = self.device_thread.map(DeviceThread::stop) {
            tracing::warn!(error = %error, "device thread did not end");
        }
    }
}
