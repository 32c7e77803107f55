//! One monitor process: its start, requests and replies, its end.

use std::convert::Infallible;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::Signal;
use thaw_jail::{Cell, JAIL_ARGUMENT, Jailer, JailerError, Limits};
use thaw_vmm_control::wire::{self, Read, Receiver, WireError};
use thaw_vmm_control::{
    AGENT_FD, CONTROL_FD, Event, Exit, FromMonitor, Reply, Request, Rewound, Saved, Status,
    WorkingSetRun,
};
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::HostError;
use crate::channel::AgentChannel;
use crate::schedule::Shape;
use crate::tail::Tail;
use crate::vm::chain;

/// Bytes of a monitor's standard error kept for error messages.
const STDERR_BYTES_MAX: usize = 4096;
/// Memory of a monitor beside its guest's and its disk's, bytes: heap, stacks, page tables, vCPUs in the kernel.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// What a guest can write to its disk unless its function asks for more: Lambda's 512 MiB of ephemeral storage.
const USUAL_DISK_BYTES: u64 = 512 << 20;
/// Threads of a monitor: vCPUs, devices, fetching.
const TASKS_MAX: u64 = 32;
/// What one VM may read, and write, of the disk per second: an NVMe drive's whole rate, so that no neighbour loses all of an array's.
const IO_BYTES_PER_SECOND: u64 = 2 << 30;
/// How long the last words of a dead monitor are waited for.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);
/// Longest wait for a killed process to be gone; tear-down of a large VM takes tens of milliseconds.
const REAP_LIMIT: Duration = Duration::from_secs(30);

/// Stack of a thread that starts a monitor and waits for its end.
const HOLDER_STACK_BYTES: usize = 128 * 1024;

/// Starts monitors, each from a thread of its own, which lives as long as the monitor: that asks the kernel to be killed when its
/// parent ends, and the kernel takes the *thread* that forked it for the parent (`PR_SET_PDEATHSIG`, prctl(2)). Tokio's threads
/// come and go. A thread also is what a process's PID namespace is made by ([`Jailer::turn_thread`]).
#[derive(Debug)]
pub(crate) struct Spawner {
    vmm: PathBuf,
    /// Without one, monitors reach what this process reaches.
    jailer: Option<Jailer>,
    tokio: tokio::runtime::Handle,
    alive: Arc<watch::Sender<usize>>,
}

/// What one monitor is made for: what it may use follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    /// What the guest can write to its copy-on-write disk, which is memory.
    pub(crate) disk_bytes: u64,
}

impl Size {
    /// Of a shell, whose disk is not known yet.
    pub(crate) fn of_shell(shape: Shape) -> Self {
        Self {
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
            disk_bytes: USUAL_DISK_BYTES,
        }
    }

    fn memory_bytes(self) -> u64 {
        (u64::from(self.memory_mib) << 20) + self.disk_bytes + OVERHEAD_BYTES
    }

    fn limits(self) -> Limits {
        Limits {
            memory_bytes: self.memory_bytes(),
            tasks: TASKS_MAX,
            // Its devices run beside its processors.
            cpu_thousandths: 1000 * (u64::from(self.vcpus) + 1),
            io_bytes_per_second: IO_BYTES_PER_SECOND,
        }
    }
}

impl Spawner {
    pub(crate) fn new(vmm: PathBuf, jailer: Option<Jailer>, tokio: tokio::runtime::Handle) -> Self {
        let alive = Arc::new(watch::Sender::new(0));
        Self {
            vmm,
            jailer,
            tokio,
            alive,
        }
    }

    /// A fresh monitor, without a VM, and its agent channel.
    pub(crate) async fn spawn(&self, size: Size) -> Result<(Monitor, AgentChannel), HostError> {
        let (reply, answer) = oneshot::channel();
        let counted = Counted::new(&self.alive);
        let (vmm, jailer, tokio) = (self.vmm.clone(), self.jailer.clone(), self.tokio.clone());
        let hold = move || {
            let _context = tokio.enter();
            let (held, until_gone) = std::sync::mpsc::channel();
            let made = Monitor::spawn(&vmm, jailer.as_ref(), size, counted, held);
            // Nobody waiting any more: what was started is dropped, and so killed.
            let _ = reply.send(made);
            // An error: the process's owner has dropped the other end.
            let _ = until_gone.recv();
        };
        let thread = std::thread::Builder::new().name("thaw-holder".into());
        let thread = thread.stack_size(HOLDER_STACK_BYTES).spawn(hold);
        thread.map_err(|source| HostError::Spawn {
            path: self.vmm.clone(),
            source,
        })?;
        answer.await.map_err(|_| HostError::ShutDown)?
    }

    /// Returns when no monitor process is left.
    pub(crate) async fn all_gone(&self) {
        // Fails only without the sender, which is ours.
        let _ = self.alive.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// Counts a process from before its start until it is reaped.
#[derive(Debug)]
struct Counted(Arc<watch::Sender<usize>>);

impl Counted {
    fn new(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|alive| *alive += 1);
        Self(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|alive| *alive -= 1);
    }
}

#[derive(Debug)]
struct Process {
    child: Child,
    cell: Option<Cell>,
    counted: Counted,
    /// Its thread ends with this.
    _held: std::sync::mpsc::Sender<Infallible>,
}

impl Process {
    async fn end(mut self) {
        // Fails only for a process that is gone already.
        let _ = self.child.start_kill();
        match tokio::time::timeout(REAP_LIMIT, self.child.wait()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot wait for a monitor"),
            Err(_) => {
                tracing::error!(pid = self.child.id(), "killed monitor does not end");
            }
        }
        if let Some(cell) = self.cell.take() {
            let closed = tokio::task::spawn_blocking(move || cell.close()).await;
            if let Ok(Err(error)) = closed {
                tracing::warn!(error = chain(&error), "cannot remove a monitor's cell");
            }
        }
        drop(self.counted);
    }
}

/// One monitor process. Dropping it kills the process, in the background.
///
/// A request whose future was dropped half-way leaves the control socket out of step: drop the monitor then.
#[derive(Debug)]
pub(crate) struct Monitor {
    control: UnixStream,
    receiver: Receiver,
    process: Option<Process>,
    stderr: Arc<Mutex<Tail>>,
    stderr_reader: Option<JoinHandle<()>>,
    exit: Option<Exit>,
    /// Requests sent whose replies have not come.
    owed: usize,
    /// When it was asked for a sign of life that it has not given yet.
    asked: Option<Instant>,
}

impl Monitor {
    fn spawn(
        vmm: &Path,
        jailer: Option<&Jailer>,
        size: Size,
        counted: Counted,
        held: std::sync::mpsc::Sender<Infallible>,
    ) -> Result<(Self, AgentChannel), HostError> {
        let failed = |source| HostError::Spawn {
            path: vmm.to_owned(),
            source,
        };
        let (control, control_theirs) = socket_pair().map_err(failed)?;
        let (agent, agent_theirs) = socket_pair().map_err(failed)?;
        let cell = jailer.map(|jailer| jailer.cell(&size.limits()));
        let cell = cell.transpose().map_err(HostError::Jail)?;
        let mut command = Command::new(vmm);
        if let Some(cell) = &cell {
            command.args([JAIL_ARGUMENT, &cell.orders.to_argument()]);
        }
        command
            // The gateway's environment may hold secrets; a monitor needs nothing of it.
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mapping = |parent_fd, child_fd| FdMapping {
            parent_fd,
            child_fd,
        };
        command
            .fd_mappings(vec![
                mapping(control_theirs, CONTROL_FD),
                mapping(agent_theirs, AGENT_FD),
            ])
            .map_err(|error| failed(io::Error::other(error)))?;
        if let Some(jailer) = jailer {
            jailer.turn_thread();
        }
        let mut child = command.spawn().map_err(failed)?;
        let stderr = Arc::new(Mutex::new(Tail::new(STDERR_BYTES_MAX)));
        let stderr_reader = child
            .stderr
            .take()
            .map(|pipe| tokio::spawn(collect(pipe, Arc::clone(&stderr))));
        let monitor = Self {
            control,
            receiver: Receiver::new(),
            process: Some(Process {
                child,
                cell,
                counted,
                _held: held,
            }),
            stderr,
            stderr_reader,
            exit: None,
            owed: 0,
            asked: None,
        };
        Ok((monitor, AgentChannel::new(agent)))
    }

    /// Process id, for logs and tests.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.as_ref().and_then(|p| p.child.id())
    }

    /// Sends a request; the reply comes from [`Self::next`].
    pub(crate) async fn send(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), HostError> {
        let bytes = wire::encode(request).map_err(HostError::Protocol)?;
        self.owed += 1;
        let (mut sent, mut fds) = (0, fds);
        while sent < bytes.len() {
            let result = self
                .control
                .async_io(Interest::WRITABLE, || {
                    wire::send_some(&self.control, &bytes[sent..], fds)
                })
                .await;
            match result {
                Ok(count) => {
                    sent += count;
                    fds = &[];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(self.died().await),
            }
        }
        Ok(())
    }

    /// The monitor's next message. Cancelling loses nothing.
    pub(crate) async fn next(&mut self) -> Result<FromMonitor, HostError> {
        loop {
            match self.receiver.next_message() {
                Ok(Some((message, _fds))) => {
                    if matches!(message, FromMonitor::Reply(_)) {
                        // It was asked before anything else that it owes.
                        if self.asked.take().is_some() {
                            continue;
                        }
                        self.owed = self.owed.saturating_sub(1);
                    }
                    return Ok(message);
                }
                Ok(None) => {}
                Err(error) => return Err(HostError::Protocol(error)),
            }
            let (control, receiver) = (&self.control, &mut self.receiver);
            let read = control
                .async_io(Interest::READABLE, || receiver.read_from(control))
                .await;
            match read {
                Ok(Read::Some) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Read::Closed) => return Err(self.died().await),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(HostError::Protocol(WireError::Socket(error)));
                }
                Err(_) => return Err(self.died().await),
            }
        }
    }

    /// Sends a request and waits for its reply; an exit of the guest meanwhile is kept for [`Self::take_exit`].
    pub(crate) async fn request(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Reply, HostError> {
        let name = name(request);
        let exchange = async {
            self.send(request, fds).await?;
            loop {
                match self.next().await? {
                    // To an earlier request, whose sender had what it wanted from the guest first.
                    FromMonitor::Reply(_) if self.owed > 0 => {}
                    FromMonitor::Reply(Reply::Failed(source)) => {
                        return Err(HostError::Refused {
                            request: name,
                            source,
                        });
                    }
                    FromMonitor::Reply(reply) => return Ok(reply),
                    FromMonitor::Event(Event::Exited(exit)) => self.exit = Some(exit),
                }
            }
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(result) => result,
            Err(_) => Err(self.silent(name, limit)),
        }
    }

    /// A request that is answered by [`Reply::Done`].
    pub(crate) async fn command(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), HostError> {
        match self.request(request, fds, limit).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(request, &other)),
        }
    }

    /// [`Request::Status`].
    pub(crate) async fn status(&mut self, limit: Duration) -> Result<Status, HostError> {
        match self.request(&Request::Status, &[], limit).await? {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected(&Request::Status, &other)),
        }
    }

    /// The console's tail, or nothing if the monitor does not tell.
    pub(crate) async fn console(&mut self, limit: Duration) -> String {
        match self.status(limit).await {
            Ok(status) => status.console,
            Err(error) => {
                tracing::debug!(%error, "no console from the monitor");
                String::new()
            }
        }
    }

    /// [`Request::Save`].
    pub(crate) async fn save(
        &mut self,
        request: &Request,
        file: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<Saved, HostError> {
        match self.request(request, &[file], limit).await? {
            Reply::Saved(saved) => Ok(saved),
            other => Err(unexpected(request, &other)),
        }
    }

    /// [`Request::Rewind`] onto a new agent channel, whose other end is `channel`, and a new tap if there is one.
    pub(crate) async fn rewind(
        &mut self,
        (channel, tap): (BorrowedFd<'_>, Option<BorrowedFd<'_>>),
        limit: Duration,
    ) -> Result<Rewound, HostError> {
        let fds: Vec<_> = [channel].into_iter().chain(tap).collect();
        match self.request(&Request::Rewind, &fds, limit).await? {
            Reply::Rewound(rewound) => Ok(rewound),
            other => Err(unexpected(&Request::Rewind, &other)),
        }
    }

    /// [`Request::WorkingSet`].
    pub(crate) async fn working_set(
        &mut self,
        limit: Duration,
    ) -> Result<Vec<WorkingSetRun>, HostError> {
        match self.request(&Request::WorkingSet, &[], limit).await? {
            Reply::WorkingSet(set) => Ok(set.runs),
            other => Err(unexpected(&Request::WorkingSet, &other)),
        }
    }

    /// That it did not answer `request` within `limit`.
    pub(crate) fn silent(&self, request: &'static str, limit: Duration) -> HostError {
        HostError::Silent {
            request,
            limit,
            stderr: self.reason(),
        }
    }

    /// The guest's exit that came while a reply was waited for.
    pub(crate) fn take_exit(&mut self) -> Option<Exit> {
        self.exit.take()
    }

    /// Whether the process still holds its end of the control socket and has said nothing but what it was asked by
    /// [`Self::ask_for_life`]: what is to be expected of a paused VM.
    pub(crate) fn is_quiet(&mut self) -> bool {
        loop {
            // Past tokio's readiness on purpose: the socket does not block, and an end that the driver has not seen yet counts.
            match self.receiver.read_from(&self.control) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.exit.is_none();
                }
                Ok(Read::Some) if self.asked.is_some() => {}
                _ => return false,
            }
            loop {
                match self.receiver.next_message::<FromMonitor>() {
                    Ok(None) => break,
                    Ok(Some((FromMonitor::Reply(_), _))) if self.asked.take().is_some() => {}
                    _ => return false,
                }
            }
        }
    }

    /// Asks an idle monitor for its status, unless it is still to answer; does not wait. Its answer is what it says next, and is
    /// dropped there. `false` if it takes no request any more.
    pub(crate) fn ask_for_life(&mut self) -> bool {
        // What owes another reply has spoken, or runs into the limit of that.
        if self.asked.is_some() || self.owed > 0 {
            return true;
        }
        let Ok(bytes) = wire::encode(&Request::Status) else {
            return false;
        };
        self.asked = Some(Instant::now());
        // Some bytes always fit into the socket of a monitor that reads it.
        matches!(wire::send_some(&self.control, &bytes, &[]), Ok(sent) if sent == bytes.len())
    }

    /// Whether it was asked and has not answered.
    pub(crate) fn owes_life(&self) -> bool {
        self.asked.is_some()
    }

    /// For how long it has not answered.
    pub(crate) fn owes_life_for(&self) -> Duration {
        self.asked.map_or(Duration::ZERO, |asked| asked.elapsed())
    }

    /// Kills the process and waits until it is gone.
    pub(crate) async fn end(mut self) {
        if let Some(process) = self.process.take() {
            process.end().await;
        }
    }

    fn reason(&self) -> String {
        let cell = self.process.as_ref().and_then(|p| p.cell.as_ref());
        if cell.is_some_and(Cell::ran_out_of_memory) {
            return ": it has used all of the memory that its VM, its disk and the monitor itself may use: give the function more memory, or let it write less to its disk".into();
        }
        self.stderr
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_reason()
    }

    /// Lets it use what a VM of this size may use.
    pub(crate) fn resize(&self, size: Size) -> Result<(), HostError> {
        let cell = self.process.as_ref().and_then(|p| p.cell.as_ref());
        cell.map_or(Ok(()), |cell| cell.limit_memory(size.memory_bytes()))
            .map_err(|error| HostError::Jail(JailerError::Cgroup(error)))
    }

    async fn died(&mut self) -> HostError {
        if let Some(reader) = &mut self.stderr_reader
            && tokio::time::timeout(LAST_WORDS_LIMIT, reader).await.is_ok()
        {
            self.stderr_reader = None;
        }
        let mut stderr = self.reason();
        if stderr.is_empty()
            && let Some(process) = &mut self.process
            && let Ok(Ok(status)) =
                tokio::time::timeout(LAST_WORDS_LIMIT, process.child.wait()).await
        {
            stderr = wordless_end(status);
        }
        HostError::Died { stderr }
    }
}

/// What can be said of a process that said nothing.
fn wordless_end(status: ExitStatus) -> String {
    match status.signal() {
        // mmap(2): memory beyond the end of the file that it is mapped from, or whose bytes cannot be read.
        Some(signal) if signal == Signal::BUS.as_raw() => {
            ": a file that its memory is mapped from was cut off or cannot be read (SIGBUS)".into()
        }
        Some(signal) => format!(": it was killed by signal {signal}"),
        None => String::new(),
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let Some(mut process) = self.process.take() else {
            return;
        };
        let _ = process.child.start_kill();
        if let Ok(tokio) = tokio::runtime::Handle::try_current() {
            tokio.spawn(process.end());
        }
    }
}

/// Our end for tokio, theirs to be inherited or passed. Both are close-on-exec; the mapping lifts that for theirs.
pub(crate) fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

async fn collect(mut pipe: ChildStderr, tail: Arc<Mutex<Tail>>) {
    let mut chunk = [0; 1024];
    while let Ok(count @ 1..) = pipe.read(&mut chunk).await {
        tail.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(&chunk[..count]);
    }
}

fn name(request: &Request) -> &'static str {
    match request {
        Request::Boot(_) => "boot",
        Request::Prepare(_) => "prepare",
        Request::Restore(_) => "restore",
        Request::Rewind => "rewind",
        Request::WorkingSet => "tell its working set",
        Request::Resume => "resume",
        Request::Pause => "pause",
        Request::Save(_) => "save",
        Request::Status => "tell its status",
        Request::Quit => "quit",
    }
}

fn unexpected(request: &Request, reply: &Reply) -> HostError {
    let reply = match reply {
        Reply::Done => "done",
        Reply::Saved(_) => "saved",
        Reply::Rewound(_) => "rewound",
        Reply::WorkingSet(_) => "a working set",
        Reply::Status(_) => "a status",
        Reply::Failed(_) => "a failure",
    };
    HostError::UnexpectedReply {
        request: name(request),
        reply,
    }
}
