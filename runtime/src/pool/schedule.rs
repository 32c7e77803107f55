//! The pool's decisions as a plain state machine: who gets which VM, who is refused, when a VM is restored or destroyed.
//! No clock, no task, no lock: the driver tells the time and carries out the effects.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Consecutive failures of restore after which it is no accident any more: restores pause, and callers are told.
const ACCIDENTS_MAX: u32 = 1;
/// Pause after the failure that follows the accidents; doubles with each further one.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// One caller, waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ticket(pub(crate) u64);

/// One restored VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SandboxId(pub(crate) u64);

/// A pool's limits, see [`crate::PoolSpec`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) ready_count: usize,
    pub(crate) concurrency_max: usize,
    pub(crate) queue_max: usize,
}

impl Limits {
    /// Most VMs that exist at once: the ready, the running, and as many that are being torn down.
    pub(crate) fn alive_max(&self) -> usize {
        self.ready_count
            .saturating_add(self.concurrency_max.saturating_mul(2))
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// A caller wants a VM.
    Ask(Ticket),
    /// A caller went away, or its patience ended. Nothing if it does not wait.
    Leave(Ticket),
    /// A restore that was started has come to its end.
    Restored(SandboxId),
    /// A restore that was started has failed.
    RestoreFailed,
    /// A caller returns the VM it was granted, unused.
    GaveBack(SandboxId),
    /// A caller is done with its VM; its tear-down begins.
    Finished,
    /// A tear-down is over.
    Reaped,
    /// The time of an [`Effect::WakeAt`] has come.
    Woke,
    /// No more callers; every VM is to go.
    Close,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Restore one VM.
    Start,
    /// This caller has this VM, and runs.
    Grant(Ticket, SandboxId),
    /// This caller gets none.
    Refuse(Ticket, Refusal),
    /// Tear this VM down.
    Destroy(SandboxId),
    /// Say [`Input::Woke`] at this time.
    WakeAt(Instant),
}

/// Why a caller gets no VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many wait as may.
    QueueFull,
    /// Restores fail, again and again.
    RestoresFail,
    /// The pool is closed.
    Closed,
}

/// The state of a pool.
#[derive(Debug)]
pub(crate) struct Schedule {
    limits: Limits,
    open: bool,
    starting: usize,
    ready: VecDeque<SandboxId>,
    running: usize,
    ending: usize,
    waiting: VecDeque<Ticket>,
    failures: u32,
    paused_until: Option<Instant>,
}

impl Schedule {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            open: true,
            starting: 0,
            ready: VecDeque::new(),
            running: 0,
            ending: 0,
            waiting: VecDeque::new(),
            failures: 0,
            paused_until: None,
        }
    }

    pub(crate) fn starting(&self) -> usize {
        self.starting
    }

    pub(crate) fn ready(&self) -> usize {
        self.ready.len()
    }

    pub(crate) fn running(&self) -> usize {
        self.running
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Closed, and no VM is left.
    pub(crate) fn is_drained(&self) -> bool {
        !self.open && self.alive() == 0
    }

    /// Begins to fill the pool. Once, before the first input.
    pub(crate) fn fill(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.settle(&mut effects);
        effects
    }

    /// Takes in what happened at `now`, and says what is to be done.
    pub(crate) fn step(&mut self, now: Instant, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Ask(ticket) => self.ask(ticket, &mut effects),
            Input::Leave(ticket) => self.waiting.retain(|waiting| *waiting != ticket),
            Input::Restored(sandbox) => {
                assert!(self.starting > 0, "a restore ended that was not started");
                self.starting -= 1;
                self.failures = 0;
                self.paused_until = None;
                self.ready.push_back(sandbox);
            }
            Input::RestoreFailed => {
                assert!(self.starting > 0, "a restore failed that was not started");
                self.starting -= 1;
                self.failed(now, &mut effects);
            }
            Input::GaveBack(sandbox) => {
                assert!(self.running > 0, "a VM came back that was not granted");
                self.running -= 1;
                self.ready.push_front(sandbox);
            }
            Input::Finished => {
                assert!(self.running > 0, "a VM finished that was not granted");
                self.running -= 1;
                self.ending += 1;
            }
            Input::Reaped => {
                assert!(self.ending > 0, "a VM was reaped that was not ending");
                self.ending -= 1;
            }
            Input::Woke => {
                if self.paused_until.is_some_and(|until| until <= now) {
                    self.paused_until = None;
                }
            }
            Input::Close => self.open = false,
        }
        self.settle(&mut effects);
        effects
    }

    fn ask(&mut self, ticket: Ticket, effects: &mut Vec<Effect>) {
        // Who waits only for a restore, with a free place to run, does not count as queued.
        let places = self.free_places().saturating_add(self.limits.queue_max);
        if !self.open {
            effects.push(Effect::Refuse(ticket, Refusal::Closed));
        } else if self.waiting.len() >= places {
            effects.push(Effect::Refuse(ticket, Refusal::QueueFull));
        } else {
            self.waiting.push_back(ticket);
        }
    }

    fn failed(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.failures = self.failures.saturating_add(1);
        let Some(doublings) = self.failures.checked_sub(ACCIDENTS_MAX + 1) else {
            return;
        };
        let pause = PAUSE_MIN
            .saturating_mul(1 << doublings.min(16))
            .min(PAUSE_MAX);
        self.paused_until = Some(now + pause);
        effects.push(Effect::WakeAt(now + pause));
    }

    /// Brings the pool as near to its limits as it may be now. Idempotent.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        if !self.open {
            let waiting = self.waiting.drain(..);
            effects.extend(waiting.map(|ticket| Effect::Refuse(ticket, Refusal::Closed)));
            while let Some(sandbox) = self.ready.pop_front() {
                self.destroy(sandbox, effects);
            }
            return;
        }
        while self.free_places() > 0
            && let Some(ticket) = self.waiting.front().copied()
            && let Some(sandbox) = self.ready.pop_front()
        {
            self.waiting.pop_front();
            self.running += 1;
            effects.push(Effect::Grant(ticket, sandbox));
        }
        let wanted = self.limits.ready_count + self.waiting.len().min(self.free_places());
        if self.paused_until.is_some() {
            // Nobody waits for what is not coming. The last come is the first to go.
            while self.waiting.len() > self.ready.len() + self.starting
                && let Some(ticket) = self.waiting.pop_back()
            {
                effects.push(Effect::Refuse(ticket, Refusal::RestoresFail));
            }
        } else {
            // After a failure one restore goes ahead to try.
            let starting_max = if self.failures > 0 { 1 } else { usize::MAX };
            while self.starting + self.ready.len() < wanted
                && self.starting < starting_max
                && self.alive() < self.limits.alive_max()
            {
                self.starting += 1;
                effects.push(Effect::Start);
            }
        }
        while self.ready.len() > wanted
            && let Some(sandbox) = self.ready.pop_back()
        {
            self.destroy(sandbox, effects);
        }
    }

    fn destroy(&mut self, sandbox: SandboxId, effects: &mut Vec<Effect>) {
        self.ending += 1;
        effects.push(Effect::Destroy(sandbox));
    }

    fn free_places(&self) -> usize {
        self.limits.concurrency_max.saturating_sub(self.running)
    }

    fn alive(&self) -> usize {
        self.starting + self.ready.len() + self.running + self.ending
    }
}

