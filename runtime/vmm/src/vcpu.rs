//! A virtual processor: a thread that runs it, and explicit states around that.
//!
//! ```text
//!           run()                exit that ends the machine
//! Paused ----------> Running ---------------------------------> Exited
//!    ^-------------- pause()                                       ^
//!    '--------------------------- close() -------------------------'
//! ```
//! A vCPU is stopped by a flag and a real-time signal. The signal's handler sets `immediate_exit` in the vCPU's shared page, so
//! that a signal which comes just before `KVM_RUN` is not lost (Documentation/virt/kvm/api.rst, 5. The kvm_run structure).
//! Before a vCPU is paused, KVM finishes the device access it has exited for: without that a saved instruction would be half done.
//!
//! Invariant: the thread holds the lock of the vCPU's descriptor exactly while Running, so that whoever reads or sets state
//! waits until it is paused.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use thaw_vmm_control::ExitReason;
use thiserror::Error;

use crate::arch::x86_64::layout;
use crate::confine::{self, Role};
use crate::devices::Devices;
use crate::end::{EndSender, MachineEnd};

/// Longest wait for a vCPU to leave the guest. It is microseconds, unless the host is overloaded.
const PAUSE_DEADLINE: Duration = Duration::from_secs(10);

thread_local! {
    /// Shared page of the vCPU that this thread is running; null outside.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Why a vCPU cannot run on.
#[derive(Debug, Error)]
pub enum RunError {
    /// Power-off.
    #[error("guest powered itself off")]
    PowerOff,
    /// Reset by the ACPI register or the keyboard controller.
    #[error("guest asked for a reset")]
    Reset,
    /// A fault while handling a fault while handling a fault.
    #[error("vcpu {vcpu} took a triple fault at rip {rip:#x}")]
    TripleFault {
        /// Which.
        vcpu: u8,
        /// Where; 0 if it could not be read.
        rip: u64,
    },
    /// The processor refused the guest's state.
    #[error("vcpu {vcpu} could not be entered: hardware reason {reason:#x} on cpu {cpu}")]
    FailEntry {
        /// Which.
        vcpu: u8,
        /// Reason of the processor.
        reason: u64,
        /// CPU of the host.
        cpu: u32,
    },
    /// KVM cannot emulate what the guest does.
    #[error("vcpu {vcpu}: kvm internal error {suberror} at rip {rip:#x}")]
    Internal {
        /// Which.
        vcpu: u8,
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Where; 0 if it could not be read.
        rip: u64,
    },
    /// A system event other than shutdown and reset.
    #[error("vcpu {vcpu}: system event {event}")]
    SystemEvent {
        /// Which.
        vcpu: u8,
        /// `KVM_SYSTEM_EVENT_*`.
        event: u32,
    },
    /// The guest touched memory that the host cannot give it.
    #[error("vcpu {vcpu}: memory fault at {address:#x}")]
    MemoryFault {
        /// Which.
        vcpu: u8,
        /// Guest-physical.
        address: u64,
    },
    /// An exit that this monitor never asked KVM for.
    #[error("vcpu {vcpu}: unexpected exit {exit}")]
    Unexpected {
        /// Which.
        vcpu: u8,
        /// KVM's name or number of it.
        exit: String,
    },
    /// The monitor's own fault.
    #[error("thread of vcpu {vcpu} panicked")]
    Bug {
        /// Which.
        vcpu: u8,
    },
    /// The call itself.
    #[error("vcpu {vcpu}: KVM_RUN failed")]
    Run {
        /// Which.
        vcpu: u8,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl RunError {
    /// What to tell the runtime. A panic is told from a reset by the console, which is not known here.
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::PowerOff => ExitReason::Shutdown,
            Self::Reset => ExitReason::Reset,
            Self::TripleFault { .. } | Self::Internal { .. } | Self::SystemEvent { .. } => {
                ExitReason::GuestFault
            }
            Self::FailEntry { .. }
            | Self::MemoryFault { .. }
            | Self::Unexpected { .. }
            | Self::Bug { .. }
            | Self::Run { .. } => ExitReason::HostFault,
        }
    }
}

/// Why a vCPU could not be made or stopped.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// The signal's handler could not be set.
    #[error("kick signal handler could not be set")]
    Signal(#[source] io::Error),
    /// No thread.
    #[error("thread of vcpu {vcpu} could not be started")]
    Thread {
        /// Which.
        vcpu: u8,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It did not stop in time.
    #[error("vcpu {vcpu} did not stop within {PAUSE_DEADLINE:?}")]
    Stuck {
        /// Which.
        vcpu: u8,
    },
    /// It has ended for good.
    #[error("vcpu {vcpu} has ended")]
    Ended {
        /// Which.
        vcpu: u8,
    },
}

/// Where a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// Stopped between two instructions; its state may be read and set.
    Paused,
    /// In the guest, or serving one of its exits.
    Running,
    /// Ended.
    Exited,
}

/// Where it should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Paused,
    Running,
    Exited,
}

#[derive(Debug)]
struct Phase {
    wanted: Wanted,
    state: VcpuState,
}

#[derive(Debug)]
struct Shared {
    number: u8,
    phase: Mutex<Phase>,
    changed: Condvar,
    /// The thread should leave the guest.
    stop: AtomicBool,
    fd: Mutex<VcpuFd>,
}

/// What all vCPUs of a machine share.
#[derive(Clone, Debug)]
pub struct VcpuContext {
    /// Where device accesses go.
    pub devices: Arc<Devices>,
    /// `CLOCK_MONOTONIC` of the first entry after a resume, nanoseconds; 0 is none yet.
    pub first_instruction_ns: Arc<AtomicU64>,
    /// Where the exit that ends the machine goes.
    pub ends: EndSender,
}

/// One virtual processor and its thread.
#[derive(Debug)]
pub struct Vcpu {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `CLOCK_MONOTONIC`, nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanoseconds) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
    seconds
        .wrapping_mul(1_000_000_000)
        .wrapping_add(nanoseconds)
}

extern "C" fn on_kick(_: libc::c_int) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: the pointer is set only while this very thread runs the vCPU whose page it is, which stays mapped that
        // long. A volatile store of one byte is all that a signal handler may do here, and KVM reads it as such.
        unsafe { (&raw mut (*page).immediate_exit).write_volatile(1) };
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Sets the kick signal's handler for this process.
///
/// # Errors
/// The host refused.
pub fn install_kick_handler() -> Result<(), VcpuError> {
    // SAFETY: a zeroed sigaction is a valid one; the handler is async-signal-safe (it reads a thread-local without a
    // destructor and stores one byte). No SA_RESTART: the signal's purpose is to interrupt KVM_RUN.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(kick_signal(), &action, ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(VcpuError::Signal(io::Error::last_os_error()))
    }
}

impl Vcpu {
    /// Takes a vCPU's descriptor and starts its thread, Paused.
    ///
    /// # Errors
    /// No thread.
    pub fn start(number: u8, fd: VcpuFd, context: VcpuContext) -> Result<Self, VcpuError> {
        let phase = Mutex::new(Phase {
            wanted: Wanted::Paused,
            state: VcpuState::Paused,
        });
        let (changed, stop) = (Condvar::new(), AtomicBool::new(false));
        let shared = Arc::new(Shared {
            number,
            phase,
            changed,
            stop,
            fd: Mutex::new(fd),
        });
        let body = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{number}"))
            .spawn(move || {
                confine::thread(Role::Vcpu);
                thread_main(&body, &context);
            })
            .map_err(|source| VcpuError::Thread {
                vcpu: number,
                source,
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The descriptor; waits while the vCPU runs, so only for a paused one.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.shared.fd)
    }

    /// Lets a paused vCPU run.
    pub fn run(&self) {
        let mut phase = lock(&self.shared.phase);
        if phase.wanted == Wanted::Paused {
            self.shared.stop.store(false, Ordering::SeqCst);
            phase.wanted = Wanted::Running;
            self.shared.changed.notify_all();
        }
    }

    /// Asks it to leave the guest, without waiting.
    pub fn request_pause(&self) {
        self.request(Wanted::Paused);
    }

    fn request(&self, wanted: Wanted) {
        let mut phase = lock(&self.shared.phase);
        if phase.wanted != Wanted::Exited {
            phase.wanted = wanted;
        }
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        if let Some(thread) = self
            .thread
            .as_ref()
            .filter(|_| phase.state == VcpuState::Running)
        {
            // SAFETY: the handle is not joined yet, so the thread's id is valid; the signal has a handler
            // (install_kick_handler) before any vCPU is started.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }

    /// Waits until it has left the guest.
    ///
    /// # Errors
    /// It did not within [`PAUSE_DEADLINE`], or it has ended.
    pub fn wait_paused(&self) -> Result<(), VcpuError> {
        let phase = lock(&self.shared.phase);
        let left = |phase: &mut Phase| phase.state == VcpuState::Running;
        let (phase, _) = self
            .shared
            .changed
            .wait_timeout_while(phase, PAUSE_DEADLINE, left)
            .unwrap_or_else(PoisonError::into_inner);
        let vcpu = self.shared.number;
        match phase.state {
            VcpuState::Paused => Ok(()),
            VcpuState::Running => Err(VcpuError::Stuck { vcpu }),
            VcpuState::Exited => Err(VcpuError::Ended { vcpu }),
        }
    }

    /// Ends the thread for good; the descriptor stays.
    pub fn close(mut self) {
        self.request(Wanted::Exited);
        let left = |phase: &mut Phase| phase.state != VcpuState::Exited;
        let phase = lock(&self.shared.phase);
        let (phase, _) = self
            .shared
            .changed
            .wait_timeout_while(phase, PAUSE_DEADLINE, left)
            .unwrap_or_else(PoisonError::into_inner);
        let exited = phase.state == VcpuState::Exited;
        drop(phase);
        if let Some(thread) = self.thread.take().filter(|_| exited) {
            // A panic of the thread was already told as an end of the machine.
            let _ = thread.join();
        }
    }
}

/// Says Exited on every way out of the thread, a panic included.
struct ExitGuard<'a> {
    shared: &'a Shared,
    ends: &'a EndSender,
}

impl Drop for ExitGuard<'_> {
    fn drop(&mut self) {
        lock(&self.shared.phase).state = VcpuState::Exited;
        self.shared.changed.notify_all();
        if std::thread::panicking() {
            self.ends.send(MachineEnd::Vcpu(RunError::Bug {
                vcpu: self.shared.number,
            }));
        }
    }
}

fn thread_main(shared: &Shared, context: &VcpuContext) {
    let _guard = ExitGuard {
        shared,
        ends: &context.ends,
    };
    loop {
        let mut phase = lock(&shared.phase);
        phase.state = VcpuState::Paused;
        shared.changed.notify_all();
        let waiting = |phase: &mut Phase| phase.wanted == Wanted::Paused;
        phase = shared
            .changed
            .wait_while(phase, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if phase.wanted == Wanted::Exited {
            return;
        }
        phase.state = VcpuState::Running;
        drop(phase);
        if let Err(end) = run_until_stopped(shared, context) {
            context.ends.send(MachineEnd::Vcpu(end));
            return;
        }
    }
}

/// Clears the thread's page pointer on every way out.
struct PageGuard;

impl Drop for PageGuard {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null_mut());
    }
}

fn run_until_stopped(shared: &Shared, context: &VcpuContext) -> Result<(), RunError> {
    let mut fd = lock(&shared.fd);
    RUN_PAGE.set(ptr::from_mut(fd.get_kvm_run()));
    let _page = PageGuard;
    // The first vCPU to get here; the closest to the guest's first instruction that can be seen from outside.
    let _ = context.first_instruction_ns.compare_exchange(
        0,
        monotonic_ns(),
        Ordering::SeqCst,
        Ordering::Relaxed,
    );
    while !shared.stop.load(Ordering::SeqCst) {
        step(&mut fd, shared.number, &context.devices)?;
    }
    // Finish the access that the last exit was for: with immediate_exit KVM completes it and does not enter the guest. One
    // access may need several exits.
    loop {
        fd.set_kvm_immediate_exit(1);
        if step(&mut fd, shared.number, &context.devices)? == Step::Interrupted {
            break;
        }
    }
    fd.set_kvm_immediate_exit(0);
    Ok(())
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// An exit was served.
    Served,
    /// `KVM_RUN` was interrupted; nothing is pending.
    Interrupted,
}

/// Enters the guest once and serves the exit.
fn step(fd: &mut VcpuFd, vcpu: u8, devices: &Devices) -> Result<Step, RunError> {
    let exit = match fd.run() {
        Ok(exit) => exit,
        Err(error) => {
            return match error.errno() {
                libc::EINTR => {
                    fd.set_kvm_immediate_exit(0);
                    Ok(Step::Interrupted)
                }
                // A processor that waited for its start-up has been woken.
                libc::EAGAIN => Ok(Step::Served),
                _ => Err(RunError::Run {
                    vcpu,
                    source: error.into(),
                }),
            };
        }
    };
    match exit {
        VcpuExit::MmioRead(address, data) => devices.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => devices.mmio_write(address, data),
        VcpuExit::IoIn(port, data) => port_read(devices, port, data),
        VcpuExit::IoOut(port, data) => port_write(devices, port, data)?,
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => {
            return Err(RunError::PowerOff);
        }
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => {
            return Err(RunError::Reset);
        }
        VcpuExit::SystemEvent(event, _) => return Err(RunError::SystemEvent { vcpu, event }),
        VcpuExit::FailEntry(reason, cpu) => return Err(RunError::FailEntry { vcpu, reason, cpu }),
        VcpuExit::MemoryFault { gpa, .. } => {
            return Err(RunError::MemoryFault { vcpu, address: gpa });
        }
        VcpuExit::Shutdown => return Err(RunError::TripleFault { vcpu, rip: rip(fd) }),
        VcpuExit::InternalError => {
            // SAFETY: with this exit reason `internal` is the union's member, and every member is plain integers.
            let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
            return Err(RunError::Internal {
                vcpu,
                suberror,
                rip: rip(fd),
            });
        }
        // HLT never comes out of KVM with its own LAPIC; nor do the rest, which must be asked for.
        other => {
            return Err(RunError::Unexpected {
                vcpu,
                exit: format!("{other:?}"),
            });
        }
    }
    Ok(Step::Served)
}

fn rip(fd: &VcpuFd) -> u64 {
    fd.get_regs().map_or(0, |regs| regs.rip)
}

fn port_read(devices: &Devices, port: u16, data: &mut [u8]) {
    match port {
        // Nothing pending: a kernel that looks before it writes a command need not wait.
        layout::SLEEP_STATUS_PORT | layout::KEYBOARD_COMMAND_PORT => data.fill(0),
        _ if devices.pio_read(port, data) => {}
        _ => data.fill(0xff),
    }
}

fn port_write(devices: &Devices, port: u16, data: &[u8]) -> Result<(), RunError> {
    // Sleep control (ACPI 6.5, 4.8.3.7): SLP_TYPx in bits 2 to 4, SLP_EN in bit 5.
    const SLEEP_MASK: u8 = 0x3c;
    const SLEEP_S5: u8 = (layout::SLEEP_TYPE_S5 << 2) | (1 << 5);
    match (port, data) {
        (layout::SLEEP_CONTROL_PORT, [value]) if value & SLEEP_MASK == SLEEP_S5 => {
            Err(RunError::PowerOff)
        }
        (layout::RESET_PORT, [layout::RESET_VALUE]) => Err(RunError::Reset),
        (layout::KEYBOARD_COMMAND_PORT, [layout::KEYBOARD_RESET]) => Err(RunError::Reset),
        _ => {
            devices.pio_write(port, data);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_to_blame_for_an_end() {
        assert_eq!(
            RunError::TripleFault { vcpu: 0, rip: 0 }.reason(),
            ExitReason::GuestFault
        );
        assert_eq!(
            RunError::FailEntry {
                vcpu: 0,
                reason: 1,
                cpu: 2
            }
            .reason(),
            ExitReason::HostFault
        );
        assert_eq!(RunError::PowerOff.reason(), ExitReason::Shutdown);
    }
}
