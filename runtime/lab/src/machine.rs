//! One emulated machine: QEMU, virtiofsd beside it, and our ends of its sockets. Dropping it ends both.

use crate::{
    console::Console,
    process::{Leniency, Tied, spawn_tied},
    qemu::{self, Descriptors, Plan, Start},
    tools::{self, MissingTool},
};
use rustix::fs::MemfdFlags;
use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
};

/// A machine that runs or is about to.
#[derive(Debug)]
pub struct Machine {
    qemu: Tied,
    _virtiofsd: Tied,
    /// What kernel, QEMU and virtiofsd said.
    pub console: Console,
    /// QEMU's monitor.
    pub monitor: UnixStream,
    /// Guest memory.
    pub memory: OwnedFd,
    /// The init's control port.
    pub control: UnixStream,
    /// Stream ports, in chunks.
    pub stdin: UnixStream,
    pub stdout: UnixStream,
    pub stderr: UnixStream,
}

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// QEMU or virtiofsd is not installed.
    #[error(transparent)]
    Missing(#[from] MissingTool),
    /// A system call.
    #[error("cannot {act}")]
    Io {
        /// What was being done.
        act: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn io_error<E: Into<io::Error>>(act: &'static str) -> impl FnOnce(E) -> MachineError {
    move |source| MachineError::Io {
        act,
        source: source.into(),
    }
}

impl Machine {
    /// Guest memory of that size, all zero.
    pub fn memory(memory_mib: u32) -> Result<OwnedFd, MachineError> {
        let memory = rustix::fs::memfd_create("thaw-lab-memory", MemfdFlags::CLOEXEC)
            .map_err(io_error("make guest memory"))?;
        rustix::fs::ftruncate(&memory, u64::from(memory_mib) << 20)
            .map_err(io_error("size guest memory"))?;
        Ok(memory)
    }

    /// Starts QEMU and virtiofsd. From [`Start::Boot`] on, the init's messages come on `control`.
    pub fn start(plan: &Plan, memory: OwnedFd, start: Start) -> Result<Self, MachineError> {
        let console = Console::default();
        let (root, virtiofsd) = share_root(&console)?;
        let pair = || UnixStream::pair().map_err(io_error("make a socket pair"));
        let [
            (monitor, qemu_monitor),
            (control, qemu_control),
            (stdin, qemu_stdin),
            (stdout, qemu_stdout),
            (stderr, qemu_stderr),
        ] = [pair()?, pair()?, pair()?, pair()?, pair()?];
        let fds = Descriptors {
            memory: memory.as_raw_fd(),
            monitor: qemu_monitor.as_raw_fd(),
            root: root.as_raw_fd(),
            control: qemu_control.as_raw_fd(),
            stdin: qemu_stdin.as_raw_fd(),
            stdout: qemu_stdout.as_raw_fd(),
            stderr: qemu_stderr.as_raw_fd(),
        };
        let inherited = [
            memory.as_fd(),
            qemu_monitor.as_fd(),
            root.as_fd(),
            qemu_control.as_fd(),
            qemu_stdin.as_fd(),
            qemu_stdout.as_fd(),
            qemu_stderr.as_fd(),
        ];
        let mut command = Command::new(tools::qemu()?);
        command
            .args(qemu::arguments(plan, &fds, start))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut qemu = spawn_tied(&mut command, &inherited, Leniency::None)
            .map_err(io_error("start qemu-system-x86_64"))?;
        follow(&mut qemu, &console);
        Ok(Self {
            qemu,
            _virtiofsd: virtiofsd,
            console,
            monitor,
            memory,
            control,
            stdin,
            stdout,
            stderr,
        })
    }

    /// True once QEMU has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.qemu.child().try_wait(), Ok(None))
    }
}

/// Starts virtiofsd for `/` and returns a socket connected to it. Its listening socket has a name only while we connect.
fn share_root(console: &Console) -> Result<(UnixStream, Tied), MachineError> {
    let virtiofsd = tools::virtiofsd()?;
    let folder = tempfile::Builder::new()
        .prefix("thaw-lab-")
        .tempdir()
        .map_err(io_error("make a folder for a socket"))?;
    let path = folder.path().join("root");
    let listener = UnixListener::bind(&path).map_err(io_error("make virtiofsd's socket"))?;
    let root = UnixStream::connect(&path).map_err(io_error("connect to virtiofsd's socket"))?;
    drop(folder);
    let is_root = rustix::process::geteuid().is_root();
    let leniency = if is_root {
        Leniency::None
    } else {
        Leniency::SetgroupsIgnored
    };
    let mut command = virtiofsd_command(&virtiofsd, is_root);
    command.arg(format!("--fd={}", listener.as_raw_fd()));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = spawn_tied(&mut command, &[listener.as_fd()], leniency)
        .map_err(io_error("start virtiofsd"))?;
    follow(&mut child, console);
    Ok((root, child))
}

/// An ordinary user gets a user namespace in which he is root, because virtiofsd changes its root folder and its identity; files of other
/// users then show as nobody's. `cache=always`: within one run this machine's changes to files already seen may go unnoticed.
fn virtiofsd_command(virtiofsd: &Path, is_root: bool) -> Command {
    let mut command = if is_root {
        Command::new(virtiofsd)
    } else {
        let mut unshare = Command::new("unshare");
        unshare
            .arg("--map-root-user")
            .arg("--")
            .arg(virtiofsd)
            .arg("--rlimit-nofile=0");
        unshare
    };
    for option in ["source=/", "cache=always", "sandbox=chroot"] {
        command.args(["-o", option]);
    }
    command
}

fn follow(process: &mut Tied, console: &Console) {
    let child = process.child();
    if let Some(pipe) = child.stdout.take() {
        console.follow(pipe);
    }
    if let Some(pipe) = child.stderr.take() {
        console.follow(pipe);
    }
}
