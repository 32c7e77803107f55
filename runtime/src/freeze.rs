//! Freezing: boot a function's VM, wait until it is ready for its first request, write it down.

mod base;
mod drive;

use std::path::PathBuf;
use std::time::Duration;

use thaw_agent_protocol::{Configure, RuntimeExit};
use thaw_network::Policy;
use thaw_snapshot::Metadata;
use thaw_vmm_control::{ExitReason, Fault};
use thiserror::Error;

use crate::HostError;

pub use self::base::BaseFileError;
pub(crate) use self::drive::{freeze, open};

/// Most bytes of output kept from a function's initialisation; of more, the newest are kept behind a note.
pub const INIT_LOG_BYTES_MAX: usize = 256 * 1024;

/// Command line of every guest kernel. Options are those of the kernel's
/// `Documentation/admin-guide/kernel-parameters.txt`; each is here for a reason:
///
/// - `console=ttyS0 8250.nr_uarts=1`: the monitor's one serial port, and no probing for three that are not there.
/// - `quiet loglevel=4`: each character on the console costs an exit to the monitor; warnings and worse still come.
/// - `panic=-1 reboot=acpi`: a panic resets at once, by the ACPI reset register, which the monitor takes for the guest's
///   end. Without them a panicked guest would spin until its invocation times out.
/// - `oops=panic`: a kernel that went wrong answers no requests.
/// - `random.trust_cpu=on`: the generator is ready at once; each clone is reseeded from the host after its thaw.
/// - `pci=off`: the monitor has no PCI bus; devices are described by ACPI.
///
/// Mitigations stay as the kernel chooses: what runs in the guest is not trusted by its own kernel either.
pub const GUEST_COMMAND_LINE: &str = "console=ttyS0 8250.nr_uarts=1 quiet loglevel=4 panic=-1 reboot=acpi oops=panic \
     random.trust_cpu=on pci=off";

/// What to freeze, and where to.
#[derive(Clone, Debug)]
pub struct FreezeRequest {
    /// Kernel image: bzImage or ELF vmlinux.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Root file system, shared read-only: /dev/vda.
    pub rootfs: PathBuf,
    /// The function's code, shared read-only: /dev/vdb.
    pub code: PathBuf,
    /// Writable overlay, copied on write: /dev/vdc. Its content goes into the snapshot.
    pub overlay: PathBuf,
    /// 1 to [`thaw_vmm_control::VCPU_COUNT_MAX`].
    pub vcpu_count: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// What the agent starts.
    pub configure: Configure,
    /// What the function may reach while it initialises, if [`Configure::network`] gives it a network; `None`: nothing, and what it
    /// sends is lost. It is no part of the snapshot.
    pub network: Option<Policy>,
    /// The snapshot's metadata; agent version, processor count, memory size and network are filled in here.
    pub metadata: Metadata,
    /// Final name of the snapshot file. It is there in full or not at all.
    pub output: PathBuf,
    /// Freeze over this base; `None`: the snapshot stands by itself.
    pub base: Option<BaseRequest>,
    /// Longest time from the start of the VM to the agent's first message.
    pub boot_limit: Duration,
}

/// The snapshot of a runtime that was booted and knows no function yet; functions' snapshots store what differs from it.
#[derive(Clone, Debug)]
pub struct BaseRequest {
    /// Its file, made if it is not there. Its name tells runtime, kernel, agent, memory, processors and network apart: a base of others
    /// is not recognised as such.
    pub file: PathBuf,
    /// A code disk without code, as long as every function's.
    pub code: PathBuf,
}

/// Where a freeze is, told in this order. A base that has to be made first tells its own steps before, to its `Saving`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FreezeStep {
    /// The monitor runs; the kernel starts.
    Booting,
    /// The agent has said hello.
    AgentUp {
        /// Its version.
        agent_version: String,
    },
    /// The agent was told to start the function's runtime.
    RuntimeStarting,
    /// The runtime waits for its first request.
    Ready,
    /// The VM is paused; the snapshot is being written.
    Saving,
    /// The snapshot has its final name.
    Saved {
        /// Length of the file.
        file_bytes: u64,
        /// Bytes that are not holes.
        stored_bytes: u64,
    },
}

/// A snapshot as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Its file.
    pub snapshot: PathBuf,
    /// Its identity: hexadecimal blake3.
    pub digest: String,
    /// Length of the file.
    pub file_bytes: u64,
    /// Bytes that are not holes.
    pub stored_bytes: u64,
    /// Output of the function's initialisation, at most [`INIT_LOG_BYTES_MAX`] bytes and a note.
    pub init_log: Vec<u8>,
    /// How long each step took.
    pub timings: FreezeTimings,
}

/// How long the steps of a freeze took, by this host's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreezeTimings {
    /// Start of the monitor to the agent's hello.
    pub boot: Duration,
    /// From there to the runtime waiting for its first request.
    pub init: Duration,
    /// From there to the snapshot under its final name.
    pub save: Duration,
}

/// A function that failed before it was ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitFailure {
    /// `Lambda-Runtime-Function-Error-Type`, or the agent's own finding.
    pub error_type: String,
    /// The error document, JSON.
    pub document: Vec<u8>,
    /// What the function wrote until then.
    pub log: Vec<u8>,
}

/// Why a function could not be frozen.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// The function failed in its initialisation.
    #[error("function failed to initialise: {}", .0.error_type)]
    Init(InitFailure),
    /// The base of the runtime cannot be used.
    #[error("base {} cannot be used: remove it, and the next deployment makes it again", .path.display())]
    Base {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: BaseFileError,
    },
    /// The function's process ended in its initialisation.
    #[error("function's runtime ended before it was ready: {:?}", .exit.cause)]
    RuntimeExit {
        /// How.
        exit: RuntimeExit,
        /// What it wrote until then.
        log: Vec<u8>,
    },
    /// The guest did not boot, or the function did not become ready, in time.
    #[error("{waiting_for} took longer than {limit:?}")]
    TimedOut {
        /// What did not happen.
        waiting_for: &'static str,
        /// How long it had.
        limit: Duration,
        /// What the function wrote until then.
        log: Vec<u8>,
        /// The last bytes of the guest's serial console.
        console: String,
    },
    /// The guest itself ended, or broke its protocol.
    #[error("guest died: {reason:?} {detail}")]
    GuestDied {
        /// What ended it.
        reason: ExitReason,
        /// For people.
        detail: String,
        /// The last bytes of its serial console.
        console: String,
    },
    /// No space for the snapshot.
    #[error("no space left for {path}")]
    DiskFull {
        /// The snapshot's final name.
        path: PathBuf,
    },
    /// The configuration is over a limit of the agent protocol.
    #[error("configuration does not fit the agent protocol")]
    TooLarge(#[source] thaw_agent_protocol::MessageError),
    /// This machine failed.
    #[error("this host failed the freeze")]
    Host(#[from] HostError),
}

impl FreezeError {
    /// Whose fault it is. The function's own fault counts as the guest's.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Init(_)
            | Self::RuntimeExit { .. }
            | Self::TimedOut { .. }
            | Self::GuestDied { .. } => Fault::Guest,
            Self::TooLarge(_) => Fault::Caller,
            Self::DiskFull { .. } | Self::Base { .. } | Self::Host(_) => Fault::Host,
        }
    }
}
