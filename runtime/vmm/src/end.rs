//! How a machine ends by itself, and how its owner hears of it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use rustix::event::{EventfdFlags, eventfd};
use thaw_vmm_control::{Exit, ExitReason};

use crate::devices::DeviceFault;
use crate::fault;
use crate::paging::{Lost, Told};
use crate::vcpu::RunError;

/// What a kernel that gives up writes to its console (kernel/panic.c).
const PANIC_MARK: &[u8] = b"Kernel panic";

/// What ended a machine.
#[derive(Debug)]
pub enum MachineEnd {
    /// A vCPU.
    Vcpu(RunError),
    /// A device.
    Device(DeviceFault),
    /// Its memory, which was served as it was touched.
    Memory(Lost),
}

impl MachineEnd {
    /// What is to be dropped when the report was sent.
    pub fn into_told(self) -> Option<Told> {
        match self {
            Self::Memory(lost) => Some(lost.told),
            Self::Vcpu(_) | Self::Device(_) => None,
        }
    }

    /// The report to the runtime, given the console's tail.
    pub fn exit(&self, console: &[u8]) -> Exit {
        let (reason, detail) = match self {
            Self::Vcpu(end) => (end.reason(), fault::chain(end)),
            Self::Device(end @ DeviceFault::Guest { .. }) => {
                (ExitReason::GuestFault, fault::chain(end))
            }
            Self::Device(end) => (ExitReason::HostFault, fault::chain(end)),
            Self::Memory(lost) => (ExitReason::HostFault, fault::chain(&lost.failure)),
        };
        let panicked = console
            .windows(PANIC_MARK.len())
            .any(|window| window == PANIC_MARK);
        // A panicking kernel resets (`panic=-1`) or faults on its way there.
        let reason = match reason {
            ExitReason::Reset | ExitReason::GuestFault if panicked => ExitReason::Panic,
            reason => reason,
        };
        let detail = if reason == ExitReason::Shutdown {
            String::new()
        } else {
            detail
        };
        Exit {
            reason,
            detail,
            console: String::from_utf8_lossy(console).into_owned(),
        }
    }
}

/// Tells the machine's owner of an end.
#[derive(Clone, Debug)]
pub struct EndSender {
    sender: Sender<MachineEnd>,
    wake: Arc<OwnedFd>,
}

/// Where the machine's owner hears of ends: the channel, and an eventfd that is readable when something is in it.
#[derive(Debug)]
pub struct EndReceiver {
    /// What ended it; the first one counts.
    pub receiver: Receiver<MachineEnd>,
    /// For `poll`.
    pub wake: Arc<OwnedFd>,
}

impl EndReceiver {
    /// The next end, if there is one.
    pub fn take(&self) -> Option<MachineEnd> {
        // Would block if nothing was sent, which is as good.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        self.receiver.try_recv().ok()
    }
}

/// A channel for ends.
///
/// # Errors
/// No eventfd.
pub fn channel() -> std::io::Result<(EndSender, EndReceiver)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((
        EndSender {
            sender,
            wake: Arc::clone(&wake),
        },
        EndReceiver { receiver, wake },
    ))
}

impl EndSender {
    /// Sends; an owner that is gone is tearing the machine down.
    pub fn send(&self, end: MachineEnd) {
        let _ = self.sender.send(end);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Passes on what devices report until they are gone: what ends the machine as an end, the rest to the log.
pub fn forward_device_faults(faults: &Receiver<DeviceFault>, ends: &EndSender) {
    for fault in faults {
        match fault {
            // The agent may close its channel and connect again: what that means is its protocol's business.
            DeviceFault::AgentDisconnected => {
                tracing::debug!(fault = %fault, "agent channel closed");
            }
            DeviceFault::Guest { .. } | DeviceFault::AgentStreamClosed | DeviceFault::Thread(_) => {
                ends.send(MachineEnd::Device(fault));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_vmm_control::{Event, FromMonitor, Reply, Status, Timings, wire};

    use crate::devices::CONSOLE_BYTES_MAX;

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let end = MachineEnd::Vcpu(RunError::Reset);
        assert_eq!(
            end.exit(b"[1.0] Kernel panic - not syncing: oops").reason,
            ExitReason::Panic
        );
        assert_eq!(
            end.exit(b"reboot: Restarting system").reason,
            ExitReason::Reset
        );
    }

    #[test]
    fn a_power_off_is_a_shutdown_whatever_was_on_the_console() {
        let exit =
            MachineEnd::Vcpu(RunError::PowerOff).exit(b"Kernel panic in a log that was replayed");
        assert_eq!(
            (exit.reason, exit.detail.as_str()),
            (ExitReason::Shutdown, "")
        );
    }

    /// Or the report could not be sent, and the monitor would seem to have died by itself.
    #[test]
    fn the_worst_console_fits_the_report_of_an_end() {
        // JSON has six bytes for some of one, and what is no UTF-8 takes three.
        for byte in [0, b'"', 0x7f, 0x80, 0xff] {
            let exit = MachineEnd::Vcpu(RunError::Reset).exit(&[byte; CONSOLE_BYTES_MAX]);
            let message = FromMonitor::Event(Event::Exited(exit.clone()));
            wire::encode(&message).unwrap();
            let status = Status {
                console: exit.console,
                timings: Timings::default(),
            };
            wire::encode(&FromMonitor::Reply(Reply::Status(status))).unwrap();
        }
    }

    #[test]
    fn the_console_survives_broken_utf8() {
        assert_eq!(
            MachineEnd::Vcpu(RunError::Reset).exit(b"a\xffb").console,
            "a\u{fffd}b"
        );
    }
}
