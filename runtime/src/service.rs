//! The runtime: what all pools and freezes share.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::freeze::freeze;
use crate::monitor::Spawner;
use crate::pool::WeakPool;
use crate::{
    FreezeError, FreezeRequest, FreezeStep, Frozen, HostError, OpenPoolError, Pool, PoolSpec,
};

/// Longest wait for killed processes to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(30);

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

/// Makes snapshots and pools. Clones are the same runtime; with the last of them and of its pools every monitor ends.
#[derive(Clone, Debug)]
pub struct Runtime {
    shared: Arc<Shared>,
}

/// What all pools and freezes share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: RuntimeConfig,
    pub(crate) spawner: Spawner,
    pub(crate) restores: Semaphore,
    pub(crate) tokio: Handle,
    stop: CancellationToken,
    pools: Mutex<Vec<WeakPool>>,
}

impl Runtime {
    /// A runtime; call it inside a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// Impossible limits, no tokio runtime, no thread.
    pub fn new(config: RuntimeConfig) -> Result<Self, StartError> {
        if config.restore_concurrency_max == 0 {
            return Err(StartError::Limits("restore_concurrency_max is 0"));
        }
        if config.restore_concurrency_max > Semaphore::MAX_PERMITS {
            return Err(StartError::Limits("restore_concurrency_max is too large"));
        }
        let tokio = Handle::try_current().map_err(|_| StartError::NoTokio)?;
        let spawner =
            Spawner::start(config.vmm.clone(), tokio.clone()).map_err(StartError::Thread)?;
        let shared = Shared {
            restores: Semaphore::new(config.restore_concurrency_max),
            config,
            spawner,
            tokio,
            stop: CancellationToken::new(),
            pools: Mutex::new(Vec::new()),
        };
        Ok(Self {
            shared: Arc::new(shared),
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
        let shared = &self.shared;
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => Err(HostError::ShutDown.into()),
            result = freeze(&shared.spawner, &shared.config, request, progress) => result,
        }
    }

    /// Verifies a snapshot in full, once, keeps its files open, and begins to keep VMs ready.
    ///
    /// # Errors
    /// The snapshot is not whole, a file cannot be opened, or the limits are impossible.
    pub async fn open_pool(&self, spec: PoolSpec) -> Result<Pool, OpenPoolError> {
        let pool = Pool::open(Arc::clone(&self.shared), spec).await?;
        let stopped = {
            let mut pools = self.pools();
            pools.retain(WeakPool::is_in_use);
            pools.push(pool.downgrade());
            // Under the lock: a shutdown sees this pool, or we see the shutdown.
            self.shared.stop.is_cancelled()
        };
        if stopped {
            pool.close_within(Duration::ZERO).await;
            return Err(HostError::ShutDown.into());
        }
        Ok(pool)
    }

    /// Ends all freezes, closes all pools, and returns when no monitor is left. Invocations that run have until
    /// `deadline`, counted from now.
    pub async fn shutdown(&self, deadline: Duration) {
        self.shared.stop.cancel();
        let pools: Vec<WeakPool> = std::mem::take(&mut *self.pools());
        let mut closing = tokio::task::JoinSet::new();
        for pool in pools.iter().filter_map(WeakPool::upgrade) {
            closing.spawn(async move { pool.close_within(deadline).await });
        }
        while closing.join_next().await.is_some() {}
        if tokio::time::timeout(GONE_LIMIT, self.shared.spawner.all_gone())
            .await
            .is_err()
        {
            tracing::error!("a killed monitor does not end");
        }
    }

    fn pools(&self) -> std::sync::MutexGuard<'_, Vec<WeakPool>> {
        self.shared
            .pools
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
