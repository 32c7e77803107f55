//! One function: its queue, its sandboxes, its recent demand, and what claims and rewinds of it cost.

use std::collections::VecDeque;
use std::time::Duration;

use super::class::Backoff;
use super::ledger::{Phase, Vm};
use super::{FunctionCounts, Limits, Ticket, Time, VmId};

/// Rewinds that fail in a row before claims are preferred.
const REWIND_FAILURES_MAX: u32 = 3;
/// While claims are preferred, every so many sandboxes one is rewound, to see whether that still holds.
const REWIND_PROBE: u32 = 16;

/// One caller that waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) ticket: Ticket,
    pub(super) deadline: Time,
}

/// One function.
#[derive(Debug)]
pub(super) struct Function {
    pub(super) limits: Limits,
    pub(super) open: bool,
    pub(super) queue: VecDeque<Waiting>,
    /// Ready sandboxes, the newest last. The newest is used first: its memory is in the caches.
    pub(super) ready: VecDeque<VmId>,
    /// Granted and not yet claimed.
    pub(super) starting: usize,
    /// Granted, claimed or not.
    pub(super) running: usize,
    pub(super) claiming: usize,
    pub(super) rewinding: usize,
    /// All that are not reaped.
    pub(super) alive: usize,
    /// When it was last served, in order.
    pub(super) turn: u64,
    pub(super) demand: Demand,
    pub(super) backoff: Backoff,
    pub(super) claim_cost: Cost,
    rewind_cost: Cost,
    rewind_failures: u32,
    not_rewound: u32,
}

impl Function {
    pub(super) fn new(limits: Limits, open: bool, keep_alive: Duration) -> Self {
        Self {
            limits,
            open,
            queue: VecDeque::new(),
            ready: VecDeque::new(),
            starting: 0,
            running: 0,
            claiming: 0,
            rewinding: 0,
            alive: 0,
            turn: 0,
            demand: Demand::new(keep_alive),
            backoff: Backoff::default(),
            claim_cost: Cost::default(),
            rewind_cost: Cost::default(),
            rewind_failures: 0,
            not_rewound: 0,
        }
    }

    pub(super) fn counts(&self) -> FunctionCounts {
        FunctionCounts {
            ready: self.ready.len(),
            claiming: self.claiming,
            running: self.running,
            rewinding: self.rewinding,
            waiting: self.queue.len(),
            is_held_back: false,
        }
    }

    pub(super) fn free_places(&self) -> usize {
        self.limits.concurrency_max.saturating_sub(self.running)
    }

    /// Who waits with a free place to run, for want of a sandbox only, does not count as queued.
    pub(super) fn is_full(&self) -> bool {
        self.queue.len() >= self.free_places().saturating_add(self.limits.queue_max)
    }

    /// Sandboxes that will be ready without another claim.
    pub(super) fn incoming(&self) -> usize {
        self.claiming + self.rewinding
    }

    fn total(&self) -> usize {
        self.ready.len() + self.incoming() + self.running
    }

    /// More sandboxes than the configured minimum and the demand explain.
    pub(super) fn has_surplus(&self) -> bool {
        self.total() > self.limits.ready_min.saturating_add(self.demand.peak())
    }

    /// Fewer than the configured minimum are ready, or fewer are there than ran at once lately.
    pub(super) fn is_short(&self, now: Time) -> bool {
        let ready = self.ready.len() + self.incoming();
        self.open
            && (ready < self.limits.ready_min || self.total() < self.demand.peak())
            && self.may_claim(now)
    }

    pub(super) fn may_claim(&self, now: Time) -> bool {
        self.backoff.allows(self.claiming + self.starting, now)
    }

    /// Whether the next sandbox is rewound rather than replaced.
    pub(super) fn should_rewind(&mut self) -> bool {
        let is_dearer = match (self.rewind_cost.get(), self.claim_cost.get()) {
            (Some(rewind), Some(claim)) => rewind > claim,
            _ => false,
        };
        if !is_dearer && self.rewind_failures < REWIND_FAILURES_MAX {
            return true;
        }
        self.not_rewound += 1;
        if self.not_rewound < REWIND_PROBE {
            return false;
        }
        self.not_rewound = 0;
        true
    }

    pub(super) fn rewound(&mut self, took: Duration) {
        self.rewind_failures = 0;
        self.rewind_cost.note(took);
    }

    pub(super) fn rewind_failed(&mut self) {
        self.rewind_failures = self.rewind_failures.saturating_add(1);
    }

    pub(super) fn lift(&mut self, id: VmId, vm: &Vm) {
        self.alive -= 1;
        match vm.phase {
            Phase::Claiming => self.claiming -= 1,
            Phase::Ready => self.ready.retain(|ready| *ready != id),
            Phase::Starting(_) => {
                self.starting -= 1;
                self.running -= 1;
            }
            Phase::Running => self.running -= 1,
            Phase::Rewinding => self.rewinding -= 1,
            Phase::Preparing | Phase::Shell | Phase::Ending => {}
        }
    }

    pub(super) fn place(&mut self, id: VmId, vm: &Vm) {
        self.alive += 1;
        match vm.phase {
            Phase::Claiming => self.claiming += 1,
            Phase::Ready => self.ready.push_back(id),
            Phase::Starting(_) => {
                self.starting += 1;
                self.running += 1;
            }
            Phase::Running => self.running += 1,
            Phase::Rewinding => self.rewinding += 1,
            Phase::Preparing | Phase::Shell | Phase::Ending => {}
        }
    }
}

/// The peak of what ran at once, over the present keep-alive period and the one before.
#[derive(Debug)]
pub(super) struct Demand {
    keep_alive: Duration,
    now: usize,
    before: usize,
    /// The end of the present period, while there is a peak to remember.
    ends: Option<Time>,
}

impl Demand {
    pub(super) fn new(keep_alive: Duration) -> Self {
        Self {
            keep_alive,
            now: 0,
            before: 0,
            ends: None,
        }
    }

    pub(super) fn peak(&self) -> usize {
        self.now.max(self.before)
    }

    /// So many run now. Tells when to call [`Self::turn_over`], if nothing is waited for yet.
    pub(super) fn note(&mut self, running: usize, now: Time) -> Option<Time> {
        self.now = self.now.max(running);
        if self.ends.is_some() || self.now == 0 {
            return None;
        }
        self.ends = Some(now.saturating_add(self.keep_alive));
        self.ends
    }

    /// A period is over; tells when the next one is.
    pub(super) fn turn_over(&mut self, running: usize, now: Time) -> Option<Time> {
        self.before = std::mem::replace(&mut self.now, running);
        self.ends = (self.peak() > 0).then(|| now.saturating_add(self.keep_alive));
        self.ends
    }
}

/// What something took lately: each new figure counts a quarter.
#[derive(Debug, Default)]
pub(super) struct Cost(Option<Duration>);

impl Cost {
    pub(super) fn note(&mut self, took: Duration) {
        self.0 = Some(self.0.map_or(took, |old| (old * 3 + took) / 4));
    }

    fn get(&self) -> Option<Duration> {
        self.0
    }
}
