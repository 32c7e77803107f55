//! A pool: the sandboxes of one snapshot, and the queue of those who want one, as the caller sees them. What becomes of
//! them is the node's to decide.

mod record;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use thaw_agent_protocol::{FrameError, PAYLOAD_BYTES_MAX};
use thaw_network::Policy;
use thaw_snapshot::{Key, SectionKind, Snapshot};
use thaw_vmm_control::{Paging, VCPU_COUNT_MAX};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::freeze::open;
use crate::node::{Learning, Lease, Member, Node, RunError, learning};
use crate::sandbox::answer::Answer;
use crate::sandbox::{Moment, SnapshotFiles};
use crate::schedule::{Input, Shape, Ticket, Time, Turn};
use crate::{End, HostError, Invocation, InvokeError, Outcome, StreamPart};

/// Sandboxes that one invocation tries: those found dead before use, and claims that failed before the guest ran. Claims
/// that go on failing are refused by the schedule long before.
const ATTEMPTS_MAX: u32 = 64;

/// What a pool is made of, and its limits.
#[derive(Clone, Debug)]
pub struct PoolSpec {
    /// For logs.
    pub name: String,
    /// The snapshot file.
    pub snapshot: PathBuf,
    /// The snapshot that it is a difference over, if it is one; for a stub the folder of the store that has its memory, which is
    /// then fetched and verified as guests touch it.
    pub base: Option<PathBuf>,
    /// The root file system it was frozen with.
    pub rootfs: PathBuf,
    /// The code it was frozen with.
    pub code: PathBuf,
    /// VMs kept restored and paused, at least. More are kept as recent demand explains; with 0 none without demand.
    pub ready_count: usize,
    /// Most invocations running at once; at least 1.
    pub concurrency_max: usize,
    /// Most invocations waiting for a VM.
    pub queue_max: usize,
    /// Longest wait for a VM.
    pub queue_wait_max: Duration,
    /// What its guests may reach, if the snapshot has a network device; `None`: nothing, and what they send is lost.
    pub network: Option<Policy>,
    /// What is learned from the first invocations.
    pub learn: Learn,
}

/// What a pool learns from its first invocations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Learn {
    /// Nothing; the snapshot stays as it is.
    #[default]
    Nothing,
    /// Which pages of memory the first invocation that succeeds has touched, if the snapshot has no working set yet; looked at after
    /// its answer. The set is stored with the snapshot, in a new file of the same name, which needs room for both at once; later VMs
    /// are restored from that. Nothing is learned of a stub.
    WorkingSet,
}

/// A pool at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// VMs restored and paused.
    pub ready: usize,
    /// VMs being restored.
    pub starting: usize,
    /// VMs being put back to the snapshot.
    pub rewinding: usize,
    /// Invocations running.
    pub running: usize,
    /// Invocations waiting for a VM.
    pub waiting: usize,
    /// A VM should be ready, and the machine has no room for it.
    pub is_held_back: bool,
    /// Invocations that ran, since the pool was opened.
    pub invocations: u64,
    /// Of these, on a monitor that was started for them.
    pub cold: u64,
    /// Of these, on a VM that was claimed from a shell, or ahead of them.
    pub claimed: u64,
    /// Of these, on a VM that had been rewound.
    pub rewound: u64,
    /// Invocations refused for want of a VM, since the pool was opened.
    pub throttled: u64,
    /// Restores that failed, since the pool was opened.
    pub restore_failures: u64,
    /// Rewinds that failed, since the pool was opened; each VM was replaced.
    pub rewind_failures: u64,
    /// Frames of another generation that were dropped, since the pool was opened.
    pub stale_frames: u64,
}

/// Why a pool could not be opened.
#[derive(Debug, Error)]
pub enum OpenPoolError {
    /// The snapshot file is not whole, or not ours.
    #[error("snapshot {path} is not usable")]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A limit of the spec makes no sense.
    #[error("pool limits are impossible: {0}")]
    Limits(&'static str),
    /// This machine failed.
    #[error("this host failed to open the pool")]
    Host(#[from] HostError),
}

/// VMs of one snapshot. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: Arc<Node>,
    member: Arc<Member>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.member.stop_claims.cancel();
        self.node.apply(Input::Remove(self.member.id));
    }
}

impl Pool {
    pub(crate) async fn open(node: Arc<Node>, spec: PoolSpec) -> Result<Self, OpenPoolError> {
        if spec.concurrency_max == 0 {
            return Err(OpenPoolError::Limits("concurrency_max is 0"));
        }
        let paths = (spec.snapshot.clone(), spec.base.clone());
        let verified = verified(paths, node.key.clone()).await?;
        let files = SnapshotFiles {
            snapshot: verified.snapshot,
            base: verified.base,
            paging: verified.paging,
            rootfs: open(&spec.rootfs).await?,
            code: open(&spec.code).await?,
            disk_bytes: verified.disk_bytes,
        };
        let member = Arc::new(Member {
            id: node.fresh_function(),
            learning: match spec.learn {
                Learn::Nothing => Learning::over(),
                Learn::WorkingSet => verified.learning,
            },
            spec,
            shape: verified.shape,
            key: node.key.clone(),
            files: Mutex::new(Arc::new(files)),
            stop_claims: CancellationToken::new(),
            stop_running: CancellationToken::new(),
            gone: watch::Sender::new(false),
        });
        if member.spec.network.is_some() {
            node.networks.warm(node.tokio());
        }
        node.add(&member);
        if node.stop.is_cancelled() {
            node.apply(Input::Remove(member.id));
            return Err(HostError::ShutDown.into());
        }
        Ok(Self {
            inner: Arc::new(Inner { node, member }),
        })
    }

    /// Runs one request in a VM of its own.
    ///
    /// Dropping the future gives back its place in the queue, and destroys the VM if it ran already.
    ///
    /// # Errors
    /// No VM within the limits of pool and machine, the pool closed, or a failure of this machine. What the function did is
    /// an [`Outcome`].
    pub async fn invoke(&self, invocation: Invocation) -> Result<Outcome, InvokeError> {
        self.invoke_for(invocation, Answer::whole()).await
    }

    /// Runs one request in a VM of its own, and sends its answer to `sink` as the guest writes it: a [`StreamPart::Head`] and
    /// chunks, no faster than they are taken; an answer that the function gives whole is one chunk. The outcome comes
    /// at the end, its [`End::Response`] without a payload; an [`End::FunctionError`] after the head is one midway. The time
    /// that a slow receiver takes counts as the function's.
    ///
    /// Dropping the receiver, or the future, destroys the VM.
    ///
    /// # Errors
    /// As of [`Self::invoke`], and [`InvokeError::Abandoned`] when the receiver was dropped before the end.
    pub async fn invoke_streaming(
        &self,
        invocation: Invocation,
        sink: mpsc::Sender<StreamPart>,
    ) -> Result<Outcome, InvokeError> {
        let answer = Answer::Parts(sink.clone());
        let mut outcome = self.invoke_for(invocation, answer).await?;
        if let End::Response {
            payload,
            content_type,
        } = &mut outcome.end
            && !payload.is_empty()
        {
            // The function gave it whole. Its sandbox is free by now, however slow the caller.
            let head = StreamPart::Head {
                content_type: content_type.clone(),
            };
            for part in [head, StreamPart::Chunk(std::mem::take(payload))] {
                sink.send(part).await.map_err(|_| InvokeError::Abandoned)?;
            }
        }
        Ok(outcome)
    }

    async fn invoke_for(
        &self,
        invocation: Invocation,
        mut answer: Answer,
    ) -> Result<Outcome, InvokeError> {
        let bytes = invocation.payload.len();
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(InvokeError::TooLarge(Arc::new(
                FrameError::BodyTooLarge(bytes).into(),
            )));
        }
        let Inner { node, member } = &*self.inner;
        let asked = Moment::now();
        let deadline = node.now().saturating_add(member.spec.queue_wait_max);
        let mut failure = None;
        let mut turn = Turn::Last;
        for _ in 0..ATTEMPTS_MAX {
            let mut lease = self.acquire(deadline, turn).await?;
            turn = Turn::Again;
            if !lease.is_well() {
                tracing::warn!(
                    pool = member.spec.name,
                    "an idle VM's monitor is gone; taking another"
                );
                continue;
            }
            let result = tokio::select! {
                biased;
                () = member.stop_running.cancelled() => return Err(InvokeError::Closed),
                result = lease.run(&invocation, &mut answer, asked) => result,
            };
            match result {
                Ok(outcome) => return Ok(outcome),
                Err(RunError::Failed(error)) => return Err(error),
                Err(RunError::NotRun(error)) => failure = Some(error),
            }
        }
        let died = || {
            let stderr = String::new();
            Arc::new(HostError::Died { stderr })
        };
        Err(InvokeError::Host(failure.unwrap_or_else(died)))
    }

    /// The pool at this moment.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let Inner { node, member } = &*self.inner;
        let desk = node.desk();
        let now = desk.schedule.function(member.id);
        let counts = desk.members.get(&member.id).map(|entry| entry.counts);
        PoolStats {
            ready: now.ready,
            starting: now.claiming,
            rewinding: now.rewinding,
            running: now.running,
            waiting: now.waiting,
            is_held_back: now.is_held_back,
            ..counts.unwrap_or_default()
        }
    }

    /// Keeps at least `count` VMs restored and paused from now on, in place of [`PoolSpec::ready_count`], as far as the machine has
    /// room. Those above go when demand no longer explains them.
    pub fn keep_ready(&self, count: usize) {
        let Inner { node, member } = &*self.inner;
        node.apply(Input::KeepReady(member.id, count));
    }

    /// Process ids of the monitors of the ready VMs.
    #[doc(hidden)] // for tests that kill them
    #[must_use]
    pub fn ready_pids(&self) -> Vec<u32> {
        self.inner.node.desk().ready_pids(self.inner.member.id)
    }

    /// Refuses new invocations, fails the waiting ones, gives the running ones
    /// [`crate::RuntimeConfig::close_limit`] to finish, and destroys every VM.
    pub async fn close(&self) {
        let Inner { node, member } = &*self.inner;
        node.apply(Input::Remove(member.id));
        member.drain(node.config.close_limit).await;
    }

    async fn acquire(&self, deadline: Time, turn: Turn) -> Result<Lease, InvokeError> {
        let (grant, granted) = oneshot::channel();
        let node = &self.inner.node;
        let ticket = node.ask(self.inner.member.id, deadline, turn, grant);
        let mut place = Place {
            node,
            ticket: Some(ticket),
        };
        let result = granted.await;
        // Answered: it stands in no queue any more.
        place.ticket = None;
        // The sender is dropped without a word only with the node.
        result.unwrap_or(Err(InvokeError::Closed))
    }
}

/// A caller's place in the queue; given back when dropped.
struct Place<'a> {
    node: &'a Arc<Node>,
    ticket: Option<Ticket>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.node.leave(ticket);
        }
    }
}

/// A snapshot whose every byte is as it was written, here.
struct Verified {
    snapshot: File,
    base: Option<File>,
    paging: Paging,
    /// Size of its VM.
    shape: Shape,
    /// Of its disk.
    disk_bytes: u64,
    learning: Learning,
}

/// Opens a snapshot, and its base if it has one, and checks who made them and every byte of both, before anything in them is
/// used.
async fn verified(
    (path, base): (PathBuf, Option<PathBuf>),
    key: Key,
) -> Result<Verified, OpenPoolError> {
    let check = move || {
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| OpenPoolError::Snapshot {
            path: path.clone(),
            source,
        };
        let mut snapshot = Snapshot::open(&path).map_err(|error| unusable(error.into()))?;
        let mut base_file = None;
        let is_store = base.as_deref().is_some_and(Path::is_dir);
        if let Some(store) = base.as_deref().filter(|_| is_store) {
            base_file = Some(thaw_jail::open_alone(store).map_err(|error| unusable(error.into()))?);
        } else if let Some(base) = base {
            let base = Snapshot::open(&base).map_err(|error| unusable(error.into()))?;
            let kept = base.file().try_clone();
            base_file = Some(kept.map_err(|error| unusable(error.into()))?);
            snapshot
                .attach_base(base)
                .map_err(|error| unusable(error.into()))?;
        }
        snapshot
            .authenticate(&key)
            .map_err(|error| unusable(error.into()))?;
        // Of a stub, this is all but its memory, which is verified chunk by chunk when it is fetched.
        match is_store {
            true => snapshot.verify_own(),
            false => snapshot.verify(),
        }
        .map_err(|error| unusable(error.into()))?;
        let metadata = snapshot
            .metadata()
            .map_err(|error| unusable(error.into()))?;
        let shape = Shape {
            vcpus: metadata.vcpu_count,
            memory_mib: metadata.memory_mib,
            network: metadata.network,
        };
        let memory_bytes = snapshot
            .memory_bytes()
            .map_err(|error| unusable(error.into()))?;
        // The schedule counts with what the metadata tells.
        if !(1..=VCPU_COUNT_MAX).contains(&shape.vcpus)
            || memory_bytes == 0
            || memory_bytes != u64::from(shape.memory_mib) << 20
        {
            return Err(unusable("its metadata tells another size of the VM".into()));
        }
        let disks = snapshot.sections().filter_map(|(kind, bytes)| match kind {
            SectionKind::Disk(_) => Some(bytes),
            _ => None,
        });
        let disk_bytes = disks.sum();
        let file = snapshot.file().try_clone();
        let file = file.map_err(|source| {
            OpenPoolError::Host(HostError::File {
                act: "cannot keep open",
                path: path.clone(),
                source,
            })
        })?;
        let paging = match is_store {
            true => Paging::Store,
            false => Paging::Mapped,
        };
        Ok(Verified {
            snapshot: file,
            base: base_file,
            paging,
            shape,
            disk_bytes,
            learning: learning(&snapshot, paging).map_err(|error| unusable(error.into()))?,
        })
    };
    match tokio::task::spawn_blocking(check).await {
        Ok(result) => result,
        // The check panicked, or the tokio runtime is going down.
        Err(_) => Err(HostError::ShutDown.into()),
    }
}
