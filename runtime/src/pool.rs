//! A pool: restored, paused VMs of one snapshot, and the queue of those who want one.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::{HostError, Invocation, InvokeError, Outcome};

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
pub struct Pool {}

impl Pool {
    /// Runs one request in a VM of its own.
    ///
    /// Dropping the future gives back its place in the queue, and destroys the VM if it ran already.
    ///
    /// # Errors
    /// No VM within the pool's limits, the pool closed, or a failure of this machine. What the function did is an [`Outcome`].
    pub async fn invoke(&self, invocation: Invocation) -> Result<Outcome, InvokeError> {
        let _ = invocation;
        Err(InvokeError::Closed)
    }

    /// The pool at this moment.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        PoolStats::default()
    }

    /// Refuses new invocations, fails the waiting ones, gives the running ones
    /// [`crate::RuntimeConfig::close_limit`] to finish, and destroys every VM.
    pub async fn close(&self) {}
}
