//! The lab: an emulated KVM host for machines whose own /dev/kvm is missing or too slow.
//!
//! It owns: building the emulated host's kernel and initramfs once ([`Lab::build`]), starting it and running one command in it
//! ([`Lab::run`]), and judging what this machine's own KVM is worth ([`host`]). It knows nothing of sandboxes, images or the gateway.
//!
//! The host is QEMU's TCG with nested SVM, booting the unmodified Debian cloud kernel. The command sees this machine's `/` (virtiofs, under
//! a tmpfs overlay), the writable folders at their own paths, a real `/dev/kvm`, user-mode network, and ends with its own exit code.
//!
//! What always holds:
//! - A command is started at most once; only a boot is tried again.
//! - Nothing outlives [`Lab::run`], nor this process: QEMU and virtiofsd die with the thread that started them.
//! - The lab is no security boundary: its command acts on the writable folders, and through virtiofsd on everything, with the rights
//!   of the user who started it. Keep untrusted code in the sandboxes inside.
//!
//! What the command sees of this machine's files: everything its user may read, `/run` and `/dev/shm` apart, which are fresh. The
//! writable folders go straight to this machine: mmap (shared and private), fsync, flock and record locks, fallocate with hole punching,
//! SEEK_HOLE, O_DIRECT, copy_file_range, sockets and SQLite's WAL mode work there; O_TMPFILE, reflinks and extended attributes fail with
//! EOPNOTSUPP. Locks are the lab's own: a process on this machine does not see them. An ordinary user's lab shows files of others as
//! nobody's, and a process in it that is not root cannot make files in the writable folders (EINVAL).
//!
//! Where to start: [`Lab`], then `run.rs` (one run), `machine.rs` (QEMU), `init/main.rs` (process 1 of the lab).

mod artifacts;
mod clock;
mod console;
pub mod host;
mod kernel;
mod machine;
mod monitor;
mod process;
pub mod protocol;
mod qemu;
mod run;
mod saved;
pub mod signals;
mod streams;
mod tools;

pub use artifacts::BuildError;
pub use kernel::KernelError;
pub use machine::MachineError;
pub use monitor::MonitorError;
pub use run::{RunError, SaveError};
pub use saved::StateError;
pub use streams::Stream;
pub use tools::MissingTool;

use std::{ffi::OsString, path::PathBuf, sync::mpsc::Receiver, time::Duration};

/// Memory of the lab unless asked otherwise, in MiB. It is taken as it is used.
pub const MEMORY_MIB_DEFAULT: u32 = 4096;
/// Processors of the lab unless asked otherwise.
pub const CPU_COUNT_DEFAULT: u8 = 2;

/// How the lab's KVM keeps its guests' memory apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Paging {
    /// KVM writes the page tables that the processor uses. Always right.
    #[default]
    Shadow,
    /// The processor walks two levels of page tables, as every processor with KVM does. QEMU 7.2 does so wrongly now and then, so
    /// that guests or the lab die: for measuring only.
    Nested,
}

/// The emulated host's files in one cache folder (`THAW_HOME/lab`).
#[derive(Debug, Clone)]
pub struct Lab {
    cache: PathBuf,
    paging: Paging,
}

/// One command to run in the lab.
#[derive(Debug)]
pub struct LabRun {
    /// Program (looked up in the `PATH` of `env`) and arguments.
    pub command: Vec<OsString>,
    /// The command's whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working folder; it must be visible on this machine or in the lab.
    pub cwd: PathBuf,
    /// Folders that the command may change; every other change is lost with the lab. They must exist.
    pub writable: Vec<PathBuf>,
    /// TCP ports of this machine's loopback that lead into the lab.
    pub forwards: Vec<PortForward>,
    /// Memory in MiB, at least 512.
    pub memory_mib: u32,
    /// Processors, at least 1.
    pub cpu_count: u8,
    /// Ends the command (SIGTERM, then the grace period) when it runs longer.
    pub time_limit: Option<Duration>,
    /// Time between a signal and the end of the lab.
    pub grace: Duration,
    /// Where the command reads from.
    pub stdin: Stream,
    /// Where its output goes.
    pub stdout: Stream,
    /// Where its errors go.
    pub stderr: Stream,
    /// How the lab starts.
    pub start: StartMode,
    /// Signals to pass to the command; the first one starts the grace period. See [`signals::of_this_process`].
    pub signals: Option<Receiver<i32>>,
}

/// How a lab comes to life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// From the saved state if there is one, else by booting.
    Resume,
    /// By booting.
    Boot,
}

/// `127.0.0.1:host` leads to port `lab` in the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortForward {
    /// Port on this machine's loopback address.
    pub host: u16,
    /// Port in the lab, on any of its addresses.
    pub lab: u16,
}

impl LabRun {
    /// A run of `command` with this process's environment, working folder and streams, default size, nothing writable.
    pub fn new(command: Vec<OsString>, cwd: PathBuf) -> Self {
        Self {
            command,
            env: std::env::vars_os().collect(),
            cwd,
            writable: Vec::new(),
            forwards: Vec::new(),
            memory_mib: MEMORY_MIB_DEFAULT,
            cpu_count: CPU_COUNT_DEFAULT,
            time_limit: None,
            grace: Duration::from_secs(15),
            stdin: Stream::Null,
            stdout: Stream::Inherit,
            stderr: Stream::Inherit,
            start: StartMode::Resume,
            signals: None,
        }
    }
}

impl Lab {
    /// The lab whose files are in `cache`; nothing is made yet.
    pub fn new(cache: PathBuf) -> Self {
        let paging = Paging::default();
        Self { cache, paging }
    }

    /// The same, with a processor that pages like this.
    #[must_use]
    pub fn with_paging(self, paging: Paging) -> Self {
        Self { paging, ..self }
    }

    /// Fetches the kernel and makes the initramfs, unless they are there and current. Concurrent builders wait for each other.
    pub fn build(&self, progress: &mut dyn FnMut(&str)) -> Result<(), BuildError> {
        artifacts::build(&self.cache, progress)
    }

    /// Boots a lab of this size once and saves it, so that later runs of the same size resume it instead of booting. Does nothing if that has
    /// been done. A failure costs no more than time: runs boot then.
    pub fn save(
        &self,
        memory_mib: u32,
        cpu_count: u8,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(), SaveError> {
        run::save(
            &artifacts::current(&self.cache)?,
            run::Size {
                memory_mib,
                cpu_count,
                paging: self.paging,
            },
            progress,
        )
    }

    /// Starts the lab, runs the command and ends the lab. Returns the command's exit code, 128 + n after signal n.
    ///
    /// Must be called from a thread that lives until it returns (any ordinary call does): QEMU dies with that thread.
    /// `notice` gets a line when a boot is tried again.
    pub fn run(&self, run: LabRun, notice: &mut dyn FnMut(&str)) -> Result<i32, RunError> {
        run::run(&artifacts::current(&self.cache)?, self.paging, run, notice)
    }
}
