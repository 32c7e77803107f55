//! The runtime: what all pools and freezes share.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thaw_snapshot::Key;
use thiserror::Error;
use tokio::runtime::Handle;

use thaw_jail::Jailer;
use thaw_network::EgressOptions;

use crate::freeze::freeze;
use crate::monitor::Spawner;
use crate::node::Node;
use crate::schedule::{Input, Recycle};
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
    /// What keeps monitors apart from this machine and from each other; `None`: nothing but what a process does by itself.
    pub jailer: Option<Jailer>,
    /// The program that gives functions a network; `None`: they have none.
    pub egress: Option<EgressOptions>,
    /// Memory that all monitors together may come to use, MiB; `None` for no limit. A VM that runs or has run counts with
    /// its whole memory. What guests write to their copy-on-write disks is not counted: leave room for it.
    pub memory_budget_mib: Option<u64>,
    /// Virtual CPUs that run invocations at once, at least 1; `None` for no limit.
    pub vcpu_budget: Option<u32>,
    /// Sandboxes that recent demand explains are kept at least so long, and at most twice.
    pub keep_alive: Duration,
    /// Shells kept ahead for each size of VM that a pool has.
    pub shells_per_class: usize,
    /// What becomes of a sandbox after its invocation.
    pub recycle: Recycle,
    /// Most shells and restores ahead of demand under way at once, over all pools; at least 1.
    pub restore_concurrency_max: usize,
    /// Longest time for making a shell, and for a restore.
    pub restore_limit: Duration,
    /// Longest time from a guest's begin until a runtime has run its hooks for restored clones. The invocation's own time begins
    /// only then. AWS gives 10 s (AWS Lambda Developer Guide, "Lambda SnapStart runtime hooks").
    pub hooks_limit: Duration,
    /// Longest time for a monitor's answer to anything but boot, restore and save.
    pub reply_limit: Duration,
    /// How often each idle monitor is asked for a sign of life, which it has the reply limit for.
    pub watch_interval: Duration,
    /// Longest time for writing a snapshot.
    pub save_limit: Duration,
    /// How long [`Pool::close`] lets running invocations finish.
    pub close_limit: Duration,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            vmm: PathBuf::from("thaw-vmm"),
            jailer: None,
            egress: None,
            memory_budget_mib: None,
            vcpu_budget: None,
            keep_alive: Duration::from_secs(60),
            shells_per_class: 2,
            recycle: Recycle::Rewind,
            restore_concurrency_max: 2,
            restore_limit: Duration::from_secs(30),
            hooks_limit: Duration::from_secs(10),
            reply_limit: Duration::from_secs(10),
            watch_interval: Duration::from_secs(30),
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
}

/// The machine's sandboxes at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuntimeStats {
    /// Monitors made ahead, without a snapshot.
    pub shells: usize,
    /// Memory that all monitors may come to use, as the scheduler counts, MiB.
    pub memory_mib: u64,
    /// [`RuntimeConfig::memory_budget_mib`].
    pub memory_budget_mib: Option<u64>,
    /// Virtual CPUs that run invocations.
    pub vcpus: u64,
    /// [`RuntimeConfig::vcpu_budget`].
    pub vcpu_budget: Option<u32>,
}

/// Makes snapshots and pools. Clones are the same runtime; with the last of them and of its pools every monitor ends.
#[derive(Clone, Debug)]
pub struct Runtime {
    node: Arc<Node>,
}

impl Runtime {
    /// A runtime; call it inside a tokio runtime with I/O and time. It vouches with `key` for each snapshot that it makes, and uses
    /// none that has no tag of that key.
    ///
    /// # Errors
    /// Impossible limits, no tokio runtime.
    pub fn new(config: RuntimeConfig, key: Key) -> Result<Self, StartError> {
        if config.restore_concurrency_max == 0 {
            return Err(StartError::Limits("restore_concurrency_max is 0"));
        }
        if config.vcpu_budget == Some(0) {
            return Err(StartError::Limits("vcpu_budget is 0"));
        }
        let tokio = Handle::try_current().map_err(|_| StartError::NoTokio)?;
        let spawner = Spawner::new(config.vmm.clone(), config.jailer.clone(), tokio.clone());
        Ok(Self {
            node: Node::new(config, key, spawner, tokio),
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
        let node = &self.node;
        tokio::select! {
            biased;
            () = node.stop.cancelled() => Err(HostError::ShutDown.into()),
            result = freeze(node, request, progress) => result,
        }
    }

    /// Checks that a snapshot is authentic, verifies it in full, once, keeps its files open, and begins to keep VMs ready.
    ///
    /// # Errors
    /// The snapshot is not authentic or not whole, a file cannot be opened, or the limits are impossible.
    pub async fn open_pool(&self, spec: PoolSpec) -> Result<Pool, OpenPoolError> {
        Pool::open(Arc::clone(&self.node), spec).await
    }

    /// The machine's sandboxes at this moment.
    #[must_use]
    pub fn stats(&self) -> RuntimeStats {
        let (node, config) = (self.node.desk().schedule.node(), &self.node.config);
        RuntimeStats {
            shells: node.shells,
            memory_mib: node.memory_mib,
            memory_budget_mib: config.memory_budget_mib,
            vcpus: node.vcpus,
            vcpu_budget: config.vcpu_budget,
        }
    }

    /// Ends all freezes, closes all pools, and returns when no monitor is left. Invocations that run have until
    /// `deadline`, counted from now.
    pub async fn shutdown(&self, deadline: Duration) {
        self.node.stop.cancel();
        let members = self.node.members();
        self.node.apply(Input::Close);
        let mut closing = tokio::task::JoinSet::new();
        for member in members {
            closing.spawn(async move { member.drain(deadline).await });
        }
        while closing.join_next().await.is_some() {}
        if tokio::time::timeout(GONE_LIMIT, self.node.spawner.all_gone())
            .await
            .is_err()
        {
            tracing::error!("a killed monitor does not end");
        }
    }
}
