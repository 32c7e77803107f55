//! Drives one freeze: monitor, agent and files, step by step, each with its deadline.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thaw_agent_protocol::{AgentMessage, HostMessage};
use thaw_snapshot::{PendingFile, TagError, tag};
use thaw_vmm_control::{
    BootRequest, Disk, DiskAccess, DiskSource, ExitReason, Failure, Fault, Network, Request,
    SaveRequest,
};
use tokio::time::Instant;

use super::{
    FreezeError, FreezeRequest, FreezeStep, FreezeTimings, Frozen, GUEST_COMMAND_LINE,
    INIT_LOG_BYTES_MAX, InitFailure, base,
};
use crate::HostError;
use crate::monitor::Size;
use crate::network::Plug;
use crate::node::Node;
use crate::points::Point;
use crate::sandbox::DISK_IDS;
use crate::tail::Tail;
use crate::vm::{Vm, VmEvent, after, brief};

/// What the agent may take over its own limit to report that it was met.
const INIT_MARGIN: Duration = Duration::from_secs(5);
/// How long a monitor may take to tell why the agent's channel closed.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);
/// How often a guest may die before its agent is up until the freeze fails.
const BOOT_ATTEMPTS_MAX: u32 = 3;
/// `ENOSPC` and `EDQUOT` as the standard library prints them: the monitor tells its causes as text.
const NO_SPACE: [&str; 2] = ["(os error 28)", "(os error 122)"];

/// Progress, as the caller of a freeze wants it told.
pub(super) type Progress<'a> = &'a mut (dyn FnMut(FreezeStep) + Send);

/// See [`crate::Runtime::freeze`].
pub(crate) async fn freeze(
    node: &Node,
    request: FreezeRequest,
    progress: Progress<'_>,
) -> Result<Frozen, FreezeError> {
    let mut unusable = None;
    let run = loop {
        let mut used = None;
        if let Some(base) = &request.base {
            base::make(node, &request, base, unusable, progress).await?;
            used = base::file_id(&base.file).await;
        }
        match attempts(node, &request, Goal::Function, progress).await {
            Err(FreezeError::Base { .. }) if unusable.is_none() && used.is_some() => {
                unusable = used;
            }
            run => break run?,
        }
    };
    Ok(run.expect("a function's freeze makes a snapshot of it"))
}

/// Boots, and freezes as soon as the agent is up: a base.
pub(super) async fn boot_and_freeze(
    node: &Node,
    request: &FreezeRequest,
    progress: Progress<'_>,
) -> Result<(), FreezeError> {
    attempts(node, request, Goal::Base, progress)
        .await
        .map(drop)
}

/// Where a freeze ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    /// At the agent's hello.
    Base,
    /// When the function waits for its first request.
    Function,
}

/// What its monitor may use.
async fn size(request: &FreezeRequest) -> Result<Size, HostError> {
    let overlay = tokio::fs::metadata(&request.overlay).await;
    let overlay = overlay.map_err(|source| HostError::File {
        act: "cannot open",
        path: request.overlay.clone(),
        source,
    })?;
    Ok(Size {
        vcpus: request.vcpu_count,
        memory_mib: request.memory_mib,
        disk_bytes: overlay.len(),
    })
}

/// Tries again when the guest dies before anything of the function has run.
async fn attempts(
    node: &Node,
    request: &FreezeRequest,
    goal: Goal,
    progress: Progress<'_>,
) -> Result<Option<Frozen>, FreezeError> {
    let size = size(request).await?;
    let mut attempt = 1;
    loop {
        let plug = match &request.network {
            Some(policy) if request.configure.network => {
                let limit = node.config.restore_limit;
                Some(node.networks.plug(policy, limit).await?)
            }
            _ => None,
        };
        let (monitor, channel) = node.spawner.spawn(size).await?;
        Point::FreezeStarted.reached();
        let mut freeze = Freeze {
            plug,
            vm: Vm::new(monitor, channel),
            log: Tail::new(INIT_LOG_BYTES_MAX),
            agent_is_up: false,
            node,
        };
        let result = freeze.run(request.clone(), goal, progress).await;
        freeze.vm.monitor.end().await;
        let (reason, detail, console) = match result {
            Err(FreezeError::GuestDied {
                reason,
                detail,
                console,
            }) if !freeze.agent_is_up => (reason, detail, console),
            result => return result,
        };
        // Nothing of the function has run yet: this is the kernel, or what it runs on.
        tracing::warn!(
            attempt,
            ?reason,
            detail,
            console,
            "guest died while it booted"
        );
        if attempt == BOOT_ATTEMPTS_MAX {
            return Err(died_booting(&console));
        }
        attempt += 1;
    }
}

fn died_booting(console: &str) -> FreezeError {
    let last = console.lines().rfind(|line| !line.trim().is_empty());
    let message = format!(
        "it died {BOOT_ATTEMPTS_MAX} times before its agent was up; its console ends with: {}",
        last.unwrap_or("nothing")
    );
    FreezeError::Host(HostError::Refused {
        request: "boot the guest",
        source: Failure {
            message,
            fault: Fault::Host,
        },
    })
}

/// What a VM boots from.
struct BootFiles {
    kernel: File,
    initramfs: File,
    disks: [File; 3],
}

impl BootFiles {
    async fn open(request: &FreezeRequest) -> Result<Self, HostError> {
        Ok(Self {
            kernel: open(&request.kernel).await?,
            initramfs: open(&request.initramfs).await?,
            disks: [
                open(&request.rootfs).await?,
                open(&request.code).await?,
                open(&request.overlay).await?,
            ],
        })
    }
}

/// Opens a file for reading, off the runtime's threads.
pub(crate) async fn open(path: &Path) -> Result<File, HostError> {
    match tokio::fs::File::open(path).await {
        Ok(file) => Ok(file.into_std().await),
        Err(source) => Err(HostError::File {
            act: "cannot open",
            path: path.to_owned(),
            source,
        }),
    }
}

pub(super) struct Freeze<'a> {
    pub(super) vm: Vm,
    /// The function's network while it initialises.
    pub(super) plug: Option<Plug>,
    log: Tail,
    agent_is_up: bool,
    pub(super) node: &'a Node,
}

impl Freeze<'_> {
    async fn run(
        &mut self,
        mut request: FreezeRequest,
        goal: Goal,
        progress: Progress<'_>,
    ) -> Result<Option<Frozen>, FreezeError> {
        let started = Instant::now();
        let agent_version = match &request.base {
            Some(base) => self.start_from_base(&request, &base.file, progress).await?,
            None => self.start_from_kernel(&request, progress).await?,
        };
        self.agent_is_up = true;
        let up = Instant::now();
        progress(FreezeStep::AgentUp {
            agent_version: agent_version.clone(),
        });
        request.metadata.agent_version.clone_from(&agent_version);
        request.metadata.vcpu_count = request.vcpu_count;
        request.metadata.memory_mib = request.memory_mib;
        request.metadata.network = request.configure.network;
        if goal == Goal::Base {
            self.save(&request, progress).await?;
            return Ok(None);
        }
        let init_limit =
            Duration::from_millis(request.configure.init_limit_ms).saturating_add(INIT_MARGIN);
        let mut configure = std::mem::take(&mut request.configure);
        let policy = request.network.as_ref().filter(|_| configure.network);
        configure.authority = policy.and_then(|policy| self.node.networks.authority(policy));
        self.vm
            .channel
            .queue(HostMessage::Configure(configure))
            .map_err(FreezeError::TooLarge)?;
        self.vm.channel.push();
        progress(FreezeStep::RuntimeStarting);
        self.ready(init_limit, after(init_limit)).await?;
        Point::FreezeReady.reached();
        let ready = Instant::now();
        progress(FreezeStep::Ready);

        let saved = self.save(&request, progress).await?;
        let timings = FreezeTimings {
            boot: up - started,
            init: ready - up,
            save: ready.elapsed(),
        };
        progress(FreezeStep::Saved {
            file_bytes: saved.file_bytes,
            stored_bytes: saved.stored_bytes,
        });
        Ok(Some(Frozen {
            snapshot: request.output,
            digest: saved.digest,
            file_bytes: saved.file_bytes,
            stored_bytes: saved.stored_bytes,
            init_log: self.log.take(),
            timings,
        }))
    }

    /// Boots; returns the agent's version.
    async fn start_from_kernel(
        &mut self,
        request: &FreezeRequest,
        progress: Progress<'_>,
    ) -> Result<String, FreezeError> {
        progress(FreezeStep::Booting);
        let files = BootFiles::open(request).await?;
        self.boot(request, &files).await?;
        self.hello(request.boot_limit, after(request.boot_limit))
            .await
    }

    async fn boot(&mut self, request: &FreezeRequest, files: &BootFiles) -> Result<(), HostError> {
        let accesses = [
            DiskAccess::ReadOnly,
            DiskAccess::ReadOnly,
            DiskAccess::CopyOnWrite,
        ];
        let disks = DISK_IDS
            .iter()
            .zip(accesses)
            .map(|(id, access)| Disk {
                id: (*id).into(),
                access,
                source: DiskSource::Descriptor,
            })
            .collect();
        let tap = self.plug.as_ref().map(|plug| &plug.tap);
        let boot = Request::Boot(BootRequest {
            vcpu_count: request.vcpu_count,
            memory_mib: request.memory_mib,
            command_line: GUEST_COMMAND_LINE.into(),
            has_initramfs: true,
            disks,
            network: match tap {
                Some(_) => Network::Plugged,
                None if request.configure.network => Network::Unplugged,
                None => Network::Absent,
            },
        });
        let [rootfs, code, overlay] = &files.disks;
        let files = [&files.kernel, &files.initramfs, rootfs, code, overlay];
        let files = files.into_iter().map(AsFd::as_fd);
        let fds: Vec<_> = files.chain(tap.map(|tap| tap.as_fd())).collect();
        self.vm
            .monitor
            .command(&boot, &fds, request.boot_limit)
            .await
    }

    async fn hello(&mut self, limit: Duration, deadline: Instant) -> Result<String, FreezeError> {
        match self.message("the guest's boot", limit, deadline).await? {
            AgentMessage::Hello { agent_version } => Ok(brief(agent_version)),
            other => Err(self.unfit(&other).await),
        }
    }

    async fn ready(&mut self, limit: Duration, deadline: Instant) -> Result<(), FreezeError> {
        match self
            .message("the function's initialisation", limit, deadline)
            .await?
        {
            AgentMessage::Ready => Ok(()),
            // A restored base has become a clone of its own, as it was told to.
            AgentMessage::Thawed { .. } => Box::pin(self.ready(limit, deadline)).await,
            AgentMessage::InitError(error) => Err(FreezeError::Init(InitFailure {
                error_type: error.error_type,
                document: error.payload,
                log: self.log.take(),
            })),
            AgentMessage::RuntimeExit(exit) => Err(FreezeError::RuntimeExit {
                exit,
                log: self.log.take(),
            }),
            other => Err(self.unfit(&other).await),
        }
    }

    /// The agent's next message that is not output.
    async fn message(
        &mut self,
        waiting_for: &'static str,
        limit: Duration,
        deadline: Instant,
    ) -> Result<AgentMessage, FreezeError> {
        let mut until = deadline;
        loop {
            // As timeout_at looks at the clock only when nothing is there, an endless stream of output is cut off here.
            let event = if Instant::now() < until {
                tokio::time::timeout_at(until, self.vm.next()).await.ok()
            } else {
                None
            };
            match event {
                Some(VmEvent::Agent(AgentMessage::Log { bytes, .. })) => self.log.push(&bytes),
                Some(VmEvent::Agent(message)) => return Ok(message),
                Some(VmEvent::AgentClosed) => until = until.min(Instant::now() + ORPHAN_LIMIT),
                Some(VmEvent::AgentBroken(detail)) => return Err(self.broken(detail).await),
                Some(VmEvent::Exited(exit)) => return Err(died(exit)),
                Some(VmEvent::MonitorGone(error)) => return Err(error.into()),
                // Every request here is awaited where it is made; a stray reply means nothing.
                Some(VmEvent::Reply(_)) => {}
                None if until < deadline => {
                    return Err(self.broken("agent closed its channel".into()).await);
                }
                None => {
                    return Err(FreezeError::TimedOut {
                        waiting_for,
                        limit,
                        log: self.log.take(),
                        console: self.vm.console(self.node.config.reply_limit).await,
                    });
                }
            }
        }
    }

    async fn save(
        &mut self,
        request: &FreezeRequest,
        progress: Progress<'_>,
    ) -> Result<thaw_vmm_control::Saved, FreezeError> {
        let config = &self.node.config;
        let (limit, output) = (config.reply_limit, &request.output);
        let monitor = &mut self.vm.monitor;
        monitor.command(&Request::Pause, &[], limit).await?;
        if let Some(exit) = monitor.take_exit() {
            return Err(died(exit));
        }
        progress(FreezeStep::Saving);
        let pending = {
            let output = output.clone();
            blocking(move || PendingFile::create(&output)).await
        };
        let pending = pending.map_err(|source| file_error("cannot create", output, source))?;
        Point::FreezeCreated.reached();
        let save = Request::Save(SaveRequest {
            metadata: serde_json::to_value(&request.metadata).map_err(|source| {
                HostError::Protocol(thaw_vmm_control::wire::WireError::Malformed(source))
            })?,
            form: Self::form(request),
        });
        let saved = monitor
            .save(&save, pending.file().as_fd(), config.save_limit)
            .await
            .map_err(|error| save_error(error, output))?;
        Point::FreezeSaved.reached();
        // A tag of what the header tells: a monitor that goes on writing makes a file that is refused.
        let key = self.node.key.clone();
        let commit = move || {
            tag(pending.file(), &key).map_err(|error| match error {
                TagError::Write(source) => source,
                error @ TagError::Open(_) => std::io::Error::other(error),
            })?;
            Point::FreezeTagged.reached();
            pending.commit()
        };
        blocking(commit)
            .await
            .map_err(|source| file_error("cannot commit", output, source))?;
        Point::FreezeCommitted.reached();
        Ok(saved)
    }

    async fn unfit(&mut self, message: &AgentMessage) -> FreezeError {
        let detail = match message {
            AgentMessage::Fatal { message } => format!("agent cannot go on: {message}"),
            _ => "agent spoke out of turn".into(),
        };
        self.broken(detail).await
    }

    async fn broken(&mut self, detail: String) -> FreezeError {
        FreezeError::GuestDied {
            reason: ExitReason::GuestFault,
            detail: brief(detail),
            console: self.vm.console(self.node.config.reply_limit).await,
        }
    }
}

fn died(exit: thaw_vmm_control::Exit) -> FreezeError {
    if exit.reason == ExitReason::HostFault {
        return FreezeError::Host(HostError::Refused {
            request: "run the guest",
            source: Failure {
                message: exit.detail,
                fault: Fault::Host,
            },
        });
    }
    FreezeError::GuestDied {
        reason: exit.reason,
        detail: exit.detail,
        console: exit.console,
    }
}

fn save_error(error: HostError, output: &Path) -> FreezeError {
    match &error {
        HostError::Refused { source, .. }
            if NO_SPACE.iter().any(|code| source.message.contains(code)) =>
        {
            FreezeError::DiskFull {
                path: output.to_owned(),
            }
        }
        _ => error.into(),
    }
}

fn file_error(act: &'static str, output: &Path, source: std::io::Error) -> FreezeError {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    let path: PathBuf = output.to_owned();
    if matches!(source.kind(), StorageFull | QuotaExceeded) {
        return FreezeError::DiskFull { path };
    }
    HostError::File { act, path, source }.into()
}

async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(act)
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
}
