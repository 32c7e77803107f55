//! A pool: restored, paused VMs of one snapshot, and the queue of those who want one.

mod desk;
mod schedule;

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use thaw_agent_protocol::{FrameError, PAYLOAD_BYTES_MAX};
use thaw_snapshot::Snapshot;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::time::Instant;

use self::desk::{Inner, Lease};
use self::schedule::{Input, Ticket};
use crate::freeze::open;
use crate::sandbox::{Moment, Sandbox, SnapshotFiles};
use crate::service::Shared;
use crate::vm::after;
use crate::{HostError, Invocation, InvokeError, Outcome, ThrottleReason};

/// Longest wait for the killed VMs of a closed pool.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// What a pool is made of, and its limits.
#[derive(Clone, Debug)]
pub struct PoolSpec {
    /// For logs.
    pub name: String,
    /// The snapshot file.
    pub snapshot: PathBuf,
    /// The root file system it was frozen with.
    pub rootfs: PathBuf,
    /// The code it was frozen with.
    pub code: PathBuf,
    /// VMs kept restored and paused. With 0 each invocation restores its own.
    pub ready_count: usize,
    /// Most invocations running at once; at least 1.
    pub concurrency_max: usize,
    /// Most invocations waiting for a VM.
    pub queue_max: usize,
    /// Longest wait for a VM.
    pub queue_wait_max: Duration,
}

/// A pool at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// VMs restored and paused.
    pub ready: usize,
    /// VMs being restored.
    pub starting: usize,
    /// Invocations running.
    pub running: usize,
    /// Invocations waiting for a VM.
    pub waiting: usize,
    /// Invocations that ran, since the pool was opened.
    pub invocations: u64,
    /// Invocations refused for want of a VM, since the pool was opened.
    pub throttled: u64,
    /// Restores that failed, since the pool was opened.
    pub restore_failures: u64,
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

/// A pool that somebody else keeps open.
#[derive(Clone, Debug)]
pub(crate) struct WeakPool(Weak<Inner>);

impl Pool {
    pub(crate) async fn open(runtime: Arc<Shared>, spec: PoolSpec) -> Result<Self, OpenPoolError> {
        if spec.concurrency_max == 0 {
            return Err(OpenPoolError::Limits("concurrency_max is 0"));
        }
        let files = SnapshotFiles {
            snapshot: verified(spec.snapshot.clone()).await?,
            rootfs: open(&spec.rootfs).await?,
            code: open(&spec.code).await?,
        };
        let inner = Arc::new(Inner::new(runtime, files, spec));
        inner.fill();
        Ok(Self { inner })
    }

    /// Runs one request in a VM of its own.
    ///
    /// Dropping the future gives back its place in the queue, and destroys the VM if it ran already.
    ///
    /// # Errors
    /// No VM within the pool's limits, the pool closed, or a failure of this machine. What the function did is an [`Outcome`].
    pub async fn invoke(&self, invocation: Invocation) -> Result<Outcome, InvokeError> {
        let bytes = invocation.payload.len();
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(InvokeError::TooLarge(Arc::new(
                FrameError::BodyTooLarge(bytes).into(),
            )));
        }
        let asked = Moment::now();
        let patience = after(self.inner.spec.queue_wait_max);
        let mut lease = self.acquire(patience).await?;
        tokio::select! {
            biased;
            () = self.inner.stop_running.cancelled() => Err(InvokeError::Closed),
            result = lease.run(invocation, asked) => result,
        }
    }

    /// The pool at this moment.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let desk = self.inner.desk();
        PoolStats {
            ready: desk.schedule.ready(),
            starting: desk.schedule.starting(),
            running: desk.schedule.running(),
            waiting: desk.schedule.waiting(),
            ..desk.counts
        }
    }

    /// Process ids of the monitors of the ready VMs.
    #[doc(hidden)] // for tests that kill them
    #[must_use]
    pub fn ready_pids(&self) -> Vec<u32> {
        let desk = self.inner.desk();
        desk.shelf.values().filter_map(Sandbox::pid).collect()
    }

    /// Refuses new invocations, fails the waiting ones, gives the running ones
    /// [`crate::RuntimeConfig::close_limit`] to finish, and destroys every VM.
    pub async fn close(&self) {
        self.close_within(self.inner.runtime.config.close_limit)
            .await;
    }

    pub(crate) async fn close_within(&self, limit: Duration) {
        let inner = &self.inner;
        inner.stop_starting.cancel();
        inner.apply(Input::Close);
        if tokio::time::timeout(limit, inner.drained()).await.is_err() {
            inner.stop_running.cancel();
            if tokio::time::timeout(DRAIN_LIMIT, inner.drained())
                .await
                .is_err()
            {
                tracing::error!(pool = inner.spec.name, "VMs are left in a closed pool");
            }
        }
    }

    pub(crate) fn downgrade(&self) -> WeakPool {
        WeakPool(Arc::downgrade(&self.inner))
    }

    /// A VM for the caller, alive a moment ago.
    async fn acquire(&self, patience: Instant) -> Result<Lease, InvokeError> {
        // Each VM found dead was one of those on the shelf, or restored meanwhile by a machine in trouble.
        for _ in 0..=self.inner.limits.alive_max() {
            let mut lease = self.wait(patience).await?;
            if lease.is_well() {
                return Ok(lease);
            }
            tracing::warn!(
                pool = self.inner.spec.name,
                "a ready VM's monitor is gone; taking another"
            );
        }
        Err(InvokeError::Host(Arc::new(HostError::Died {
            stderr: String::new(),
        })))
    }

    async fn wait(&self, patience: Instant) -> Result<Lease, InvokeError> {
        let (grant, granted) = oneshot::channel();
        let ticket = self.inner.enter(grant);
        let place = Place {
            inner: &self.inner,
            ticket,
        };
        let result = tokio::time::timeout_at(patience, granted).await;
        match result {
            Ok(Ok(result)) => result,
            // The sender is dropped without a word only with the pool.
            Ok(Err(_)) => Err(InvokeError::Closed),
            Err(_) => {
                drop(place);
                let mut desk = self.inner.desk();
                desk.counts.throttled += 1;
                Err(InvokeError::Throttled {
                    reason: ThrottleReason::WaitedTooLong,
                    running: desk.schedule.running(),
                    waiting: desk.schedule.waiting(),
                })
            }
        }
    }
}

impl WeakPool {
    pub(crate) fn upgrade(&self) -> Option<Pool> {
        self.0.upgrade().map(|inner| Pool { inner })
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.0.strong_count() > 0
    }
}

/// A caller's place in the queue; given back when dropped.
struct Place<'a> {
    inner: &'a Arc<Inner>,
    ticket: Ticket,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.inner.leave(self.ticket);
    }
}

/// Opens a snapshot and checks every byte of it, before anything in it is used.
async fn verified(path: PathBuf) -> Result<std::fs::File, OpenPoolError> {
    let check = move || {
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| OpenPoolError::Snapshot {
            path: path.clone(),
            source,
        };
        let snapshot = Snapshot::open(&path).map_err(|error| unusable(error.into()))?;
        snapshot.verify().map_err(|error| unusable(error.into()))?;
        let file = snapshot.file().try_clone();
        file.map_err(|source| {
            OpenPoolError::Host(HostError::File {
                act: "cannot keep open",
                path: path.clone(),
                source,
            })
        })
    };
    match tokio::task::spawn_blocking(check).await {
        Ok(result) => result,
        // The check panicked, or the tokio runtime is going down.
        Err(_) => Err(HostError::ShutDown.into()),
    }
}
