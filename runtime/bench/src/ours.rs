//! Thaw's own monitor, driven as the runtime drives it: its control protocol, and the guest's bytes on the agent channel.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use std::sync::mpsc;
use std::thread;

use anyhow::{Context as _, bail, ensure};
use command_fds::{CommandFdExt as _, FdMapping};
use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use thaw_jail::{Cell, JAIL_ARGUMENT, Jailer, Limits, Owner};
use thaw_snapshot::{TouchedRun, WorkingSet, set_working_set};
use thaw_vmm_control::wire::{self, Read, Receiver};
use thaw_vmm_control::{
    AGENT_FD, BootRequest, CONTROL_FD, Event, FromMonitor, Network, Paging, Prefetch,
    PrepareRequest, Reply, Request, RestoreRequest, SaveForm, SaveRequest, Timings,
};

use crate::echo::{COMMAND_LINE, PATIENCE, PROBE, READY};

/// How monitors are started.
#[derive(Clone, Debug)]
pub struct Vmm {
    program: PathBuf,
    /// None: without the walls of a jail, with the filters of system calls that every monitor sets itself.
    jailer: Option<Jailer>,
}

impl Vmm {
    /// Finds out how far a jail reaches on this machine, and says so; `work` is a folder of the measurement's own.
    ///
    /// # Errors
    /// The program does not run.
    pub fn new(program: PathBuf, work: &Path) -> anyhow::Result<Self> {
        let (jailer, reach) = Jailer::survey(&program, Owner::Command(work))?;
        eprintln!("thaw-bench: jail around each monitor: {reach}");
        let jailer = Some(jailer);
        Ok(Self { program, jailer })
    }

    /// The same program without a jail, to tell what that costs.
    pub fn unjailed(&self) -> Self {
        let program = self.program.clone();
        Self {
            program,
            jailer: None,
        }
    }
}

/// What one monitor may use: more than any measurement does.
const LIMITS: Limits = Limits {
    memory_bytes: 16 << 30,
    tasks: 64,
    cpu_thousandths: 64_000,
    io_bytes_per_second: 16 << 30,
};

/// What clones are made of.
#[derive(Clone, Debug)]
pub struct Ours {
    /// The monitor's program, and the jail that each of its processes is in, as under the gateway.
    pub vmm: Vmm,
    /// Memory of a guest, MiB.
    pub memory_mib: u32,
    /// The frozen guest, once [`Ours::freeze`] has made it.
    pub snapshot: PathBuf,
}

impl Ours {
    /// Boots the guest, hears it answer, and freezes it into [`Self::snapshot`].
    ///
    /// # Errors
    /// It does not boot or answer, or cannot be saved; with the guest's console.
    pub fn freeze(&self, kernel: &Path, initramfs: &Path) -> anyhow::Result<()> {
        let open = |path: &Path| {
            File::open(path).with_context(|| format!("cannot open {}", path.display()))
        };
        let (kernel, initramfs) = (open(kernel)?, open(initramfs)?);
        let mut monitor = Monitor::spawn(&self.vmm)?;
        let boot = Request::Boot(BootRequest {
            vcpu_count: 1,
            memory_mib: self.memory_mib,
            command_line: COMMAND_LINE.into(),
            has_initramfs: true,
            disks: Vec::new(),
            network: Network::Absent,
        });
        monitor.done(&boot, &[kernel.as_fd(), initramfs.as_fd()])?;
        let mut first = [0];
        if monitor.agent.read_exact(&mut first).is_err() || first != [READY] {
            let console = monitor.status().map(|status| status.console);
            bail!(
                "the bench's guest did not come up: {}",
                console.unwrap_or_default()
            );
        }
        monitor.answer()?;
        monitor.done(&Request::Pause, &[])?;
        let file = File::create(&self.snapshot)
            .with_context(|| format!("cannot make {}", self.snapshot.display()))?;
        let save = Request::Save(SaveRequest {
            metadata: serde_json::json!({ "function": "bench" }),
            form: SaveForm::Whole,
        });
        match monitor.ask(&save, &[file.as_fd()])? {
            Reply::Saved(_) => self.record(),
            other => bail!("the monitor cannot save: {other:?}"),
        }
    }

    /// Lets a clone answer once and writes what it touched into the snapshot, page by page as userfaultfd tells it. What it only read
    /// is kept where KVM maps pages ahead; fetching that beside the guest makes a claim slower.
    fn record(&self) -> anyhow::Result<()> {
        let mut monitor = self.shell()?;
        monitor.question()?;
        let restore = Request::Restore(RestoreRequest {
            resume: true,
            paging: Paging::Recorded,
            ..Default::default()
        });
        monitor.send(&restore, &[self.open()?.as_fd()])?;
        monitor.hear()?;
        monitor.finish()?;
        let Reply::WorkingSet(touched) = monitor.ask(&Request::WorkingSet, &[])? else {
            bail!("the monitor does not tell what its guest touched");
        };
        let kvm = kvm_ioctls::Kvm::new().context("cannot open /dev/kvm")?;
        let maps_ahead = kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0;
        let runs = touched
            .runs
            .iter()
            .filter(|run| run.written || maps_ahead)
            .map(|run| TouchedRun::new(run.start, run.count, run.written));
        let set = WorkingSet::new(runs.collect(), u64::from(self.memory_mib) << 20)?;
        set_working_set(&self.snapshot, &set, None)?;
        Ok(())
    }

    /// A monitor with everything of a VM that no snapshot is needed for.
    ///
    /// # Errors
    /// The monitor cannot be started or refuses.
    pub fn shell(&self) -> anyhow::Result<Monitor> {
        let mut monitor = Monitor::spawn(&self.vmm)?;
        let prepare = Request::Prepare(PrepareRequest {
            vcpu_count: 1,
            memory_mib: self.memory_mib,
            disks: Vec::new(),
            has_network: false,
        });
        monitor.done(&prepare, &[])?;
        Ok(monitor)
    }

    /// The snapshot, opened as a pool holds it: before any request.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(&self) -> anyhow::Result<File> {
        File::open(&self.snapshot)
            .with_context(|| format!("cannot open {}", self.snapshot.display()))
    }
}

/// One monitor process; it dies with this value.
#[derive(Debug)]
pub struct Monitor {
    process: Child,
    cell: Option<Cell>,
    /// The thread that started it ends with this, and it would end with the thread.
    _held: mpsc::Sender<()>,
    control: UnixStream,
    receiver: Receiver,
    agent: UnixStream,
}

impl Monitor {
    /// A monitor without a VM.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(vmm: &Vmm) -> anyhow::Result<Self> {
        let (control, control_theirs) = UnixStream::pair().context("cannot make a socket")?;
        let (agent, agent_theirs) = UnixStream::pair().context("cannot make a socket")?;
        let mapping = |socket: UnixStream, child_fd| FdMapping {
            parent_fd: OwnedFd::from(socket),
            child_fd,
        };
        let jailer = vmm.jailer.clone();
        let cell = jailer.as_ref().map(|it| it.cell(&LIMITS)).transpose()?;
        let mut command = Command::new(&vmm.program);
        if let Some(cell) = &cell {
            command.args([JAIL_ARGUMENT, &cell.orders.to_argument()]);
        }
        command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .fd_mappings(vec![
                mapping(control_theirs, CONTROL_FD),
                mapping(agent_theirs, AGENT_FD),
            ])
            .context("cannot pass the sockets")?;
        let (held, until_gone) = mpsc::channel();
        let (started, starting) = mpsc::channel();
        thread::spawn(move || {
            if let Some(jailer) = jailer {
                jailer.turn_thread();
            }
            // Fails only if nobody waits for it.
            let _ = started.send(command.spawn());
            let _ = until_gone.recv();
        });
        let process = starting.recv().context("the starting thread is gone")?;
        let process = process.with_context(|| format!("cannot start {}", vmm.program.display()))?;
        for socket in [&control, &agent] {
            socket.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(Self {
            process,
            cell,
            _held: held,
            control,
            receiver: Receiver::new(),
            agent,
        })
    }

    /// Gives it the snapshot and runs it: of a shell, a claim; of a fresh monitor, a cold start.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn claim(&mut self, snapshot: &File) -> anyhow::Result<()> {
        self.send_claim(snapshot, Prefetch::WorkingSet)?;
        self.finish()
    }

    /// Gives it the snapshot and leaves it paused, as a pool keeps one.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn restore(&mut self, snapshot: &File) -> anyhow::Result<()> {
        let restore = Request::Restore(RestoreRequest {
            disks: Vec::new(),
            resume: false,
            prefetch: Prefetch::WorkingSet,
            ..Default::default()
        });
        self.done(&restore, &[snapshot.as_fd()])
    }

    /// [`Self::claim`] without waiting for the reply: the guest's answer may come first.
    ///
    /// # Errors
    /// The monitor is gone.
    pub fn send_claim(&mut self, snapshot: &File, prefetch: Prefetch) -> anyhow::Result<()> {
        let restore = Request::Restore(RestoreRequest {
            disks: Vec::new(),
            resume: true,
            prefetch,
            ..Default::default()
        });
        self.send(&restore, &[snapshot.as_fd()])
    }

    /// The reply to what was sent, which must be [`Reply::Done`].
    ///
    /// # Errors
    /// It is another one.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        match self.reply()? {
            Reply::Done => Ok(()),
            other => bail!("the monitor failed: {other:?}"),
        }
    }

    /// Puts the VM back to its snapshot, paused, with a fresh agent channel in which the next question lies already.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn rewind(&mut self) -> anyhow::Result<()> {
        let (agent, theirs) = UnixStream::pair().context("cannot make a socket")?;
        agent.set_read_timeout(Some(PATIENCE))?;
        // The old one stays open until it is replaced: the guest that still runs has it.
        let _old = std::mem::replace(&mut self.agent, agent);
        self.question()?;
        match self.ask(&Request::Rewind, &[theirs.as_fd()])? {
            Reply::Rewound(_) => Ok(()),
            other => bail!("the monitor did not rewind: {other:?}"),
        }
    }

    /// Sends [`Request::Resume`] without waiting for its reply.
    ///
    /// # Errors
    /// The monitor is gone.
    pub fn send_resume(&mut self) -> anyhow::Result<()> {
        self.send(&Request::Resume, &[])
    }

    /// Writes the byte that the guest answers.
    ///
    /// # Errors
    /// The monitor is gone.
    pub fn question(&mut self) -> anyhow::Result<()> {
        self.agent
            .write_all(&[PROBE])
            .context("the agent channel is closed")
    }

    /// Reads the guest's answer.
    ///
    /// # Errors
    /// None came in time, or another.
    pub fn hear(&mut self) -> anyhow::Result<()> {
        let mut answer = [0];
        self.agent
            .read_exact(&mut answer)
            .context("the guest does not answer")?;
        ensure!(answer == [PROBE], "the guest answers {answer:?}");
        Ok(())
    }

    /// A byte to the guest and back.
    ///
    /// # Errors
    /// As [`Self::hear`].
    pub fn answer(&mut self) -> anyhow::Result<()> {
        self.question()?;
        self.hear()
    }

    /// When things happened.
    ///
    /// # Errors
    /// The monitor does not tell.
    pub fn timings(&mut self) -> anyhow::Result<Timings> {
        Ok(self.status()?.timings)
    }

    /// Of the process, for looking at its memory.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    fn status(&mut self) -> anyhow::Result<thaw_vmm_control::Status> {
        match self.ask(&Request::Status, &[])? {
            Reply::Status(status) => Ok(status),
            other => bail!("the monitor does not tell its status: {other:?}"),
        }
    }

    fn send(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        wire::send(&self.control, request, fds).context("the monitor is gone")
    }

    fn reply(&mut self) -> anyhow::Result<Reply> {
        loop {
            if let Some((message, _)) = self.receiver.next_message().context("monitor's message")? {
                match message {
                    FromMonitor::Reply(reply) => return Ok(reply),
                    FromMonitor::Event(Event::Exited(exit)) => bail!("the guest ended: {exit:?}"),
                }
            }
            let read = self.receiver.read_from(&self.control);
            ensure!(
                read.context("the monitor is silent")? == Read::Some,
                "the monitor is gone"
            );
        }
    }

    fn ask(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> anyhow::Result<Reply> {
        self.send(request, fds)?;
        self.reply()
    }

    fn done(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        self.send(request, fds)?;
        self.finish()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(cell) = self.cell.take() {
            let _ = cell.close();
        }
    }
}
