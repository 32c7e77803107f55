//! The node: one schedule for all functions, and its driver, which holds the monitors and the callers that the schedule
//! decides about and carries out its effects in tasks.

mod desk;
mod lease;
mod lesson;
mod watchdog;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use thaw_snapshot::Key;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::desk::{Deed, Desk};
use crate::monitor::{Size, Spawner};
use crate::network::{Networks, Plug};
use crate::points::Point;
use crate::sandbox::{Sandbox, SnapshotFiles};
use crate::schedule::{FunctionId, Input, Rules, Shape, Ticket, Time, Turn, VmId};
use crate::vm::chain;
use crate::{HostError, InvokeError, PoolSpec, RuntimeConfig};

pub(crate) use self::lease::{Lease, RunError};
pub(crate) use self::lesson::{Learning, Lesson, learning, touched};
pub(crate) use self::watchdog::Turn as Watched;

/// Whom a sandbox, or the news that there is none, is sent to.
pub(crate) type Grant = oneshot::Sender<Result<Lease, InvokeError>>;

/// What a monitor costs beside its guest's memory, MiB: its own heap, stacks and page tables.
const MONITOR_MIB: u32 = 16;
/// A sandbox that never ran counts with this fraction of its memory: the pages that its restore wrote and those that
/// are copied ahead of the guest, a working set of some tens of MiB at most.
const IDLE_DIVISOR: u32 = 8;
/// Shells in all, over all size classes.
const SHELLS_MAX: usize = 16;
/// Shortest time between two beginnings of shells.
const SHELL_INTERVAL: Duration = Duration::from_millis(5);
/// Longest wait for the killed VMs of a closed pool.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// "No limit" that still can be summed.
const UNLIMITED: u64 = 1 << 40;

/// One machine's sandboxes.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) config: RuntimeConfig,
    /// Monitors, which hold guests, never get it.
    pub(crate) key: Key,
    pub(crate) spawner: Spawner,
    pub(crate) networks: Arc<Networks>,
    /// Ends freezes and everything that is made ahead.
    pub(crate) stop: CancellationToken,
    tokio: Handle,
    began: Instant,
    desk: Mutex<Desk>,
    alarm: watch::Sender<Option<Instant>>,
}

/// A function as its pool opened it.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) id: FunctionId,
    pub(crate) spec: PoolSpec,
    pub(crate) shape: Shape,
    /// Of its snapshot.
    pub(crate) key: Key,
    /// Those of the next claim.
    pub(crate) files: Mutex<Arc<SnapshotFiles>>,
    /// Of its working set.
    pub(crate) learning: Learning,
    /// Ends claims ahead of demand.
    pub(crate) stop_claims: CancellationToken,
    /// Ends invocations.
    pub(crate) stop_running: CancellationToken,
    /// Nothing of it is left.
    pub(crate) gone: watch::Sender<bool>,
}

impl Member {
    /// Returns when nothing of it is left: it is removed, and what runs has until `limit`, counted from now.
    pub(crate) async fn drain(&self, limit: Duration) {
        self.stop_claims.cancel();
        // Fails only without the sender, which is ours.
        let gone = async || drop(self.gone.subscribe().wait_for(|gone| *gone).await);
        if tokio::time::timeout(limit, gone()).await.is_err() {
            self.stop_running.cancel();
            if tokio::time::timeout(DRAIN_LIMIT, gone()).await.is_err() {
                tracing::error!(pool = self.spec.name, "VMs are left in a closed pool");
            }
        }
        self.learning.close().await;
    }

    pub(crate) fn files(&self) -> Arc<SnapshotFiles> {
        Arc::clone(&self.files.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_files(&self, files: SnapshotFiles) {
        *self.files.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(files);
    }
}

impl Node {
    pub(crate) fn new(
        config: RuntimeConfig,
        key: Key,
        spawner: Spawner,
        tokio: Handle,
    ) -> Arc<Self> {
        let rules = Rules {
            memory_mib: config.memory_budget_mib.unwrap_or(UNLIMITED),
            vcpus: config.vcpu_budget.map_or(UNLIMITED, u64::from),
            overhead_mib: MONITOR_MIB,
            idle_divisor: IDLE_DIVISOR,
            background_max: config.restore_concurrency_max,
            shells_per_class: config.shells_per_class,
            shells_max: SHELLS_MAX,
            shell_interval: SHELL_INTERVAL,
            keep_alive: config.keep_alive,
            recycle: config.recycle,
        };
        let alarm = watch::Sender::new(None);
        let times = alarm.subscribe();
        let node = Arc::new(Self {
            networks: Arc::new(Networks::new(config.egress.clone(), &key)),
            config,
            key,
            spawner,
            stop: CancellationToken::new(),
            began: Instant::now(),
            desk: Mutex::new(Desk::new(rules)),
            alarm,
            tokio,
        });
        node.tokio.spawn(ring(Arc::downgrade(&node), times));
        let interval = node.config.watch_interval;
        node.tokio
            .spawn(watchdog::watch(Arc::downgrade(&node), interval));
        node
    }

    pub(crate) fn tokio(&self) -> &Handle {
        &self.tokio
    }

    /// The schedule's clock.
    pub(crate) fn now(&self) -> Time {
        self.began.elapsed()
    }

    pub(crate) fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a function that is to be added.
    pub(crate) fn fresh_function(&self) -> FunctionId {
        FunctionId(self.desk().number())
    }

    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        let desk = self.desk();
        let entries = desk.members.values();
        entries.map(|entry| Arc::clone(&entry.member)).collect()
    }

    pub(crate) fn add(self: &Arc<Self>, member: &Arc<Member>) {
        self.apply_with(|desk| desk.add(Arc::clone(member)));
    }

    /// Puts a caller into the queue, or refuses it; either way `grant` hears of it.
    pub(crate) fn ask(
        self: &Arc<Self>,
        function: FunctionId,
        deadline: Time,
        turn: Turn,
        grant: Grant,
    ) -> Ticket {
        let mut ticket = Ticket(0);
        self.apply_with(|desk| {
            ticket = Ticket(desk.number());
            desk.callers.insert(ticket, (function, grant));
            Input::Ask {
                ticket,
                function,
                deadline,
                turn,
            }
        });
        ticket
    }

    /// Takes a caller out of the queue, if it is there.
    pub(crate) fn leave(self: &Arc<Self>, ticket: Ticket) {
        self.apply_with(|desk| {
            desk.callers.remove(&ticket);
            Input::Leave(ticket)
        });
    }

    pub(crate) fn apply(self: &Arc<Self>, input: Input) {
        self.apply_with(|_| input);
    }

    /// Feeds the schedule what `prepare` makes of the desk, in one step.
    fn apply_with(self: &Arc<Self>, prepare: impl FnOnce(&mut Desk) -> Input) {
        self.apply_all(|desk| [prepare(desk)]);
    }

    /// The same with several inputs: nothing comes between the look at the desk and the steps.
    fn apply_all<I: IntoIterator<Item = Input>>(
        self: &Arc<Self>,
        prepare: impl FnOnce(&mut Desk) -> I,
    ) {
        let mut all = Vec::new();
        {
            let mut desk = self.desk();
            for input in prepare(&mut desk) {
                let effects = desk.schedule.step(self.now(), input);
                let (deeds, wake) = desk.deeds(effects);
                if let Some(at) = wake {
                    // Under the lock, so that the newest time is the last.
                    self.alarm.send_replace(Some(self.began + at));
                }
                all.extend(deeds);
            }
        }
        for deed in all {
            self.carry_out(deed);
        }
    }

    fn carry_out(self: &Arc<Self>, deed: Deed) {
        let node = Arc::clone(self);
        match deed {
            Deed::Prepare(id, shape) => {
                self.tokio.spawn(node.prepare(id, shape));
            }
            Deed::Claim(id, shell, member) => {
                self.tokio.spawn(node.claim(id, shell, member));
            }
            Deed::Rewind(id, sandbox, member) => {
                self.tokio.spawn(node.rewind(id, sandbox, member));
            }
            Deed::Hand(grant, parts) => {
                Point::Granted.reached();
                // A caller that has gone: the lease comes back in the error, is dropped, and so returns the sandbox.
                let _ = grant.send(Ok(Lease::new(node, parts)));
            }
            Deed::Refuse(grant, error) => {
                let _ = grant.send(Err(error));
            }
            Deed::Destroy(id, sandbox) => {
                self.tokio.spawn(node.destroy(id, sandbox));
            }
            Deed::Gone(member) => {
                member.gone.send_replace(true);
            }
        }
    }

    async fn prepare(self: Arc<Self>, id: VmId, shape: Shape) {
        let began = Instant::now();
        let mut held = None;
        let made = tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(HostError::ShutDown),
            made = self.try_prepare(&mut held, shape) => made,
        };
        if let Err(error) = &made
            && !self.stop.is_cancelled()
        {
            tracing::warn!(error = chain(error), "cannot make a shell");
        }
        self.apply_with(|desk| {
            desk.held.extend(held.map(|shell| (id, shell)));
            match made {
                Ok(()) => Input::Prepared(id, began.elapsed()),
                Err(_) => Input::PrepareFailed(id),
            }
        });
    }

    async fn try_prepare(&self, held: &mut Option<Sandbox>, shape: Shape) -> Result<(), HostError> {
        let shell = held.insert(Sandbox::spawn(&self.spawner, Size::of_shell(shape)).await?);
        Point::ShellStarted.reached();
        shell.prepare(shape, &self.config).await?;
        Point::ShellMade.reached();
        Ok(())
    }

    async fn claim(self: Arc<Self>, id: VmId, mut held: Option<Sandbox>, member: Arc<Member>) {
        let began = Instant::now();
        let claimed = tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(HostError::ShutDown),
            () = member.stop_claims.cancelled() => Err(HostError::ShutDown),
            claimed = self.try_claim(&mut held, &member) => claimed,
        };
        match claimed {
            Ok(()) => self.apply_with(|desk| {
                desk.held.extend(held.map(|sandbox| (id, sandbox)));
                Input::Claimed(id, began.elapsed())
            }),
            Err(error) => self.claim_failed(id, held, &member, Arc::new(error)),
        }
    }

    async fn try_claim(
        &self,
        held: &mut Option<Sandbox>,
        member: &Arc<Member>,
    ) -> Result<(), HostError> {
        let sandbox = match held {
            Some(shell) => shell,
            none => {
                let size = Size::of_shell(member.shape);
                none.insert(Sandbox::spawn(&self.spawner, size).await?)
            }
        };
        let plug = self.plug(member).await?;
        sandbox.claim(&member.files(), plug, &self.config).await?;
        Point::Claimed.reached();
        Ok(())
    }

    /// The network of the next life of one of the function's sandboxes, if it has one.
    pub(crate) async fn plug(&self, member: &Member) -> Result<Option<Plug>, HostError> {
        match &member.spec.network {
            Some(policy) if member.shape.network => {
                let plug = self.networks.plug(policy, self.config.restore_limit);
                plug.await.map(Some)
            }
            _ => Ok(None),
        }
    }

    async fn destroy(self: Arc<Self>, id: VmId, sandbox: Option<Sandbox>) {
        let mut taught = None;
        if let Some(mut sandbox) = sandbox {
            taught = sandbox.taught(&self.config).await;
            sandbox.end().await;
        }
        self.apply(Input::Reaped(id));
        if let Some((lesson, told)) = taught {
            lesson.keep(told).await;
        }
    }

    fn claim_failed(
        self: &Arc<Self>,
        id: VmId,
        sandbox: Option<Sandbox>,
        member: &Member,
        error: Arc<HostError>,
    ) {
        if !member.stop_claims.is_cancelled() {
            tracing::warn!(
                pool = member.spec.name,
                error = chain(&*error),
                "cannot restore a VM"
            );
        }
        self.apply_with(|desk| {
            if let Some(entry) = desk.members.get_mut(&member.id) {
                entry.counts.restore_failures += 1;
                entry.last_failure = Some(error);
            }
            desk.held.extend(sandbox.map(|sandbox| (id, sandbox)));
            Input::ClaimFailed(id)
        });
    }

    async fn rewind(self: Arc<Self>, id: VmId, mut sandbox: Sandbox, member: Arc<Member>) {
        let taught = sandbox.taught(&self.config).await;
        let began = Instant::now();
        Point::RewindBegun.reached();
        // Each life has a slot of its own: nothing of an earlier one's connections can come.
        let rewound = match self.plug(&member).await {
            Ok(plug) => sandbox.rewind(plug, &self.config).await,
            Err(error) => Err(error),
        };
        Point::Rewound.reached();
        self.apply_with(|desk| {
            desk.held.insert(id, sandbox);
            match rewound {
                Ok(_) => Input::Rewound(id, began.elapsed()),
                Err(error) => {
                    tracing::debug!(
                        pool = member.spec.name,
                        error = chain(&error),
                        "cannot rewind a VM; it is replaced"
                    );
                    if let Some(entry) = desk.members.get_mut(&member.id) {
                        entry.counts.rewind_failures += 1;
                    }
                    Input::RewindFailed(id)
                }
            }
        });
        if let Some((lesson, told)) = taught {
            lesson.keep(told).await;
        }
    }
}

/// Wakes the schedule at the newest time it asked for, until the node is gone.
async fn ring(node: Weak<Node>, mut times: watch::Receiver<Option<Instant>>) {
    loop {
        let next = *times.borrow_and_update();
        let sleep = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            changed = times.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = sleep => {
                let Some(node) = node.upgrade() else { return };
                // Not again at this time; a newer one stays.
                node.alarm.send_if_modified(|at| *at == next && at.take().is_some());
                node.apply(Input::Woke);
            }
        }
    }
}
