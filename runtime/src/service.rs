//! The runtime: what all pools and freezes share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::{
    FreezeError, FreezeRequest, FreezeStep, Frozen, HostError, OpenPoolError, Pool, PoolSpec,
};

/// Configuration of a [`Runtime`].
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// The `thaw-vmm` executable.
    pub vmm: PathBuf,
    /// Most restores under way at once, over all pools; at least 1.
    pub restore_concurrency_max: usize,
    /// Longest time for a restore.
    pub restore_limit: Duration,
    /// Longest time for a monitor's answer to anything but boot, restore and save.
    pub reply_limit: Duration,
    /// Longest time for writing a snapshot.
    pub save_limit: Duration,
    /// How long [`Pool::close`] lets running invocations finish.
    pub close_limit: Duration,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            vmm: PathBuf::from("thaw-vmm"),
            restore_concurrency_max: 2,
            restore_limit: Duration::from_secs(30),
            reply_limit: Duration::from_secs(10),
            save_limit: Duration::from_secs(120),
            close_limit: Duration::from_secs(10),
        }
    }
}

/// Why a runtime could not be made.
#[derive(Debug, Error)]
pub enum StartError {
    /// A limit makes no sense.
    #[error("runtime limits are impossible: {0}")]
    Limits(&'static str),
    /// [`Runtime::new`] was called outside a tokio runtime with I/O and time.
    #[error("no tokio runtime here")]
    NoTokio,
    /// The thread that starts monitors could not be made.
    #[error("cannot start the spawner thread")]
    Thread(#[source] std::io::Error),
}

/// Makes snapshots and pools. Clones are the same runtime.
#[derive(Clone, Debug)]
pub struct Runtime {
    config: Arc<RuntimeConfig>,
}

impl Runtime {
    /// A runtime; call it inside a tokio runtime.
    ///
    /// # Errors
    /// Impossible limits, no tokio runtime, no thread.
    pub fn new(config: RuntimeConfig) -> Result<Self, StartError> {
        Ok(Self {
            config: Arc::new(config),
        })
    }

    /// Boots a VM, starts the function's runtime in it, waits until that asks for its first request, and writes the
    /// snapshot, which appears under its final name in full or not at all. Dropping the future ends the VM.
    ///
    /// # Errors
    /// See [`FreezeError`]; its `fault` tells the function's failures from this machine's.
    pub async fn freeze(
        &self,
        request: FreezeRequest,
        progress: &mut (dyn FnMut(FreezeStep) + Send),
    ) -> Result<Frozen, FreezeError> {
        let _ = (request, progress, &self.config);
        Err(HostError::ShutDown.into())
    }

    /// Verifies a snapshot in full, once, keeps its files open, and begins to keep VMs ready.
    ///
    /// # Errors
    /// The snapshot is not whole, a file cannot be opened, or the limits are impossible.
    pub async fn open_pool(&self, spec: PoolSpec) -> Result<Pool, OpenPoolError> {
        let _ = spec;
        Err(HostError::ShutDown.into())
    }

    /// Closes all pools, ends all freezes, and waits until no monitor is left; kills what is left at the deadline.
    pub async fn shutdown(&self, deadline: Duration) {
        let _ = deadline;
    }
}
