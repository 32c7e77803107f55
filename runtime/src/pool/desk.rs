//! Drives the schedule: holds the VMs and the callers it decides about, and carries out its effects in tasks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::schedule::{Effect, Input, Limits, Refusal, SandboxId, Schedule, Ticket};
use super::{PoolSpec, PoolStats};
use crate::sandbox::{Moment, Sandbox, SnapshotFiles};
use crate::service::Shared;
use crate::vm::chain;
use crate::{HostError, Invocation, InvokeError, Outcome, ThrottleReason};

/// Whom a VM, or the news that there is none, is sent to.
type Grant = oneshot::Sender<Result<Lease, InvokeError>>;

/// A pool's one shared state.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) runtime: Arc<Shared>,
    pub(super) spec: PoolSpec,
    pub(super) limits: Limits,
    pub(super) stop_starting: CancellationToken,
    pub(super) stop_running: CancellationToken,
    files: SnapshotFiles,
    desk: Mutex<Desk>,
    drained: watch::Sender<bool>,
}

/// What the schedule decides about. Locked for moments only, never across an await.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) schedule: Schedule,
    pub(super) shelf: HashMap<SandboxId, Sandbox>,
    pub(super) counts: PoolStats,
    callers: HashMap<Ticket, Grant>,
    next_number: u64,
    last_failure: Option<Arc<HostError>>,
}

/// An effect with what it needs, to be carried out without the lock.
enum Deed {
    Start,
    Hand(Grant, Sandbox),
    Refuse(Grant, InvokeError),
    Destroy(Sandbox),
    WakeAt(std::time::Instant),
}

impl Inner {
    pub(super) fn new(runtime: Arc<Shared>, files: SnapshotFiles, spec: PoolSpec) -> Self {
        let limits = Limits {
            ready_count: spec.ready_count,
            concurrency_max: spec.concurrency_max,
            queue_max: spec.queue_max,
        };
        Self {
            runtime,
            spec,
            limits,
            stop_starting: CancellationToken::new(),
            stop_running: CancellationToken::new(),
            files,
            desk: Mutex::new(Desk {
                schedule: Schedule::new(limits),
                shelf: HashMap::new(),
                counts: PoolStats::default(),
                callers: HashMap::new(),
                next_number: 0,
                last_failure: None,
            }),
            drained: watch::Sender::new(false),
        }
    }

    pub(super) fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to keep VMs ready.
    pub(super) fn fill(self: &Arc<Self>) {
        let mut desk = self.desk();
        let effects = desk.schedule.fill();
        let deeds = desk.deeds(effects);
        drop(desk);
        self.carry_out(deeds);
    }

    /// Puts a caller into the queue, or refuses it; either way `grant` hears of it.
    pub(super) fn enter(self: &Arc<Self>, grant: Grant) -> Ticket {
        let ticket = {
            let mut desk = self.desk();
            let ticket = Ticket(desk.number());
            desk.callers.insert(ticket, grant);
            ticket
        };
        self.apply(Input::Ask(ticket));
        ticket
    }

    /// Takes a caller out of the queue, if it is there.
    pub(super) fn leave(self: &Arc<Self>, ticket: Ticket) {
        self.desk().callers.remove(&ticket);
        self.apply(Input::Leave(ticket));
    }

    /// Returns when the pool is closed and no VM is left.
    pub(super) async fn drained(&self) {
        // Fails only when the sender, which is ours, is gone.
        let _ = self.drained.subscribe().wait_for(|drained| *drained).await;
    }

    pub(super) fn apply(self: &Arc<Self>, input: Input) {
        self.apply_with(|_| input);
    }

    /// Feeds the schedule what `prepare` makes of the desk, in one step.
    fn apply_with(self: &Arc<Self>, prepare: impl FnOnce(&mut Desk) -> Input) {
        let mut desk = self.desk();
        let input = prepare(&mut desk);
        let effects = desk.schedule.step(std::time::Instant::now(), input);
        let deeds = desk.deeds(effects);
        if desk.schedule.is_drained() {
            self.drained.send_replace(true);
        }
        drop(desk);
        self.carry_out(deeds);
    }

    fn carry_out(self: &Arc<Self>, deeds: Vec<Deed>) {
        for deed in deeds {
            match deed {
                Deed::Start => {
                    self.runtime.tokio.spawn(Arc::clone(self).start());
                }
                Deed::Hand(grant, sandbox) => {
                    let lease = Lease {
                        inner: Arc::clone(self),
                        sandbox: Some(sandbox),
                        used: Used::Not,
                    };
                    // A caller that has gone: the lease comes back in the error, is dropped, and so returns the VM.
                    let _ = grant.send(Ok(lease));
                }
                Deed::Refuse(grant, error) => {
                    let _ = grant.send(Err(error));
                }
                Deed::Destroy(sandbox) => self.destroy(sandbox),
                Deed::WakeAt(at) => {
                    let inner = Arc::clone(self);
                    self.runtime.tokio.spawn(async move {
                        tokio::select! {
                            () = tokio::time::sleep_until(at.into()) => inner.apply(Input::Woke),
                            () = inner.stop_starting.cancelled() => {}
                        }
                    });
                }
            }
        }
    }

    fn destroy(self: &Arc<Self>, sandbox: Sandbox) {
        let inner = Arc::clone(self);
        self.runtime.tokio.spawn(async move {
            sandbox.end().await;
            inner.apply(Input::Reaped);
        });
    }

    async fn start(self: Arc<Self>) {
        let restored = tokio::select! {
            biased;
            () = self.stop_starting.cancelled() => Err(HostError::ShutDown),
            restored = self.restore() => restored,
        };
        match restored {
            Ok(sandbox) => self.apply_with(|desk| {
                let id = SandboxId(desk.number());
                desk.shelf.insert(id, sandbox);
                Input::Restored(id)
            }),
            Err(error) => {
                if !self.stop_starting.is_cancelled() {
                    tracing::warn!(
                        pool = self.spec.name,
                        error = chain(&error),
                        "cannot restore a VM"
                    );
                }
                self.apply_with(|desk| {
                    desk.counts.restore_failures += 1;
                    desk.last_failure = Some(Arc::new(error));
                    Input::RestoreFailed
                });
            }
        }
    }

    async fn restore(&self) -> Result<Sandbox, HostError> {
        let Ok(_permit) = self.runtime.restores.acquire().await else {
            return Err(HostError::ShutDown);
        };
        Sandbox::restore(&self.runtime.spawner, &self.files, &self.runtime.config).await
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The tasks hold the pool itself; this ends only what sleeps.
        self.stop_starting.cancel();
    }
}

impl Desk {
    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Joins the schedule's effects with the VMs and callers they name.
    fn deeds(&mut self, effects: Vec<Effect>) -> Vec<Deed> {
        let mut deeds = Vec::new();
        for effect in effects {
            match effect {
                Effect::Start => deeds.push(Deed::Start),
                Effect::WakeAt(at) => deeds.push(Deed::WakeAt(at)),
                Effect::Destroy(id) => deeds.push(Deed::Destroy(self.unshelve(id))),
                Effect::Grant(ticket, id) => {
                    let sandbox = self.unshelve(id);
                    let grant = self.callers.remove(&ticket);
                    // A caller that leaves takes away its sender first: a closed one stands for it.
                    let grant = grant.unwrap_or_else(|| oneshot::channel().0);
                    deeds.push(Deed::Hand(grant, sandbox));
                }
                Effect::Refuse(ticket, refusal) => {
                    if let Some(grant) = self.callers.remove(&ticket) {
                        let error = self.refused(refusal);
                        deeds.push(Deed::Refuse(grant, error));
                    }
                }
            }
        }
        deeds
    }

    fn unshelve(&mut self, id: SandboxId) -> Sandbox {
        self.shelf
            .remove(&id)
            .expect("the schedule names a VM only while it is on the shelf")
    }

    fn refused(&mut self, refusal: Refusal) -> InvokeError {
        match refusal {
            Refusal::Closed => InvokeError::Closed,
            Refusal::QueueFull => {
                self.counts.throttled += 1;
                InvokeError::Throttled {
                    reason: ThrottleReason::QueueFull,
                    running: self.schedule.running(),
                    waiting: self.schedule.waiting(),
                }
            }
            Refusal::RestoresFail => {
                let failure = self.last_failure.clone();
                InvokeError::Host(failure.unwrap_or_else(|| Arc::new(HostError::ShutDown)))
            }
        }
    }
}

/// A VM that a caller was granted. Dropped unused it goes back to the shelf, else it is destroyed.
#[derive(Debug)]
pub(super) struct Lease {
    inner: Arc<Inner>,
    sandbox: Option<Sandbox>,
    used: Used,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Used {
    Not,
    /// Bytes went into its channel, or its monitor is gone.
    Yes,
}

impl Lease {
    pub(super) fn is_well(&mut self) -> bool {
        let well = self.sandbox.as_mut().is_some_and(Sandbox::is_well);
        if !well {
            self.used = Used::Yes;
        }
        well
    }

    pub(super) async fn run(
        &mut self,
        invocation: Invocation,
        asked: Moment,
    ) -> Result<Outcome, InvokeError> {
        self.used = Used::Yes;
        self.inner.desk().counts.invocations += 1;
        let Some(sandbox) = &mut self.sandbox else {
            return Err(InvokeError::Closed);
        };
        sandbox
            .run(invocation, asked, &self.inner.runtime.config)
            .await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(sandbox) = self.sandbox.take() else {
            return;
        };
        if self.used == Used::Not {
            self.inner.apply_with(|desk| {
                let id = SandboxId(desk.number());
                desk.shelf.insert(id, sandbox);
                Input::GaveBack(id)
            });
        } else {
            self.inner.desk().counts.stale_frames += sandbox.stale_frames();
            self.inner.apply(Input::Finished);
            self.inner.destroy(sandbox);
        }
    }
}
