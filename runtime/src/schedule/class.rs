//! The shells of one size class, and how often a failing try is repeated.

use std::time::Duration;

use super::ledger::{Phase, Vm};
use super::{Time, VmId};

/// Failures in a row after which it is no accident any more: tries pause, and callers are told.
const ACCIDENTS_MAX: u32 = 1;
/// Pause after the failure that follows the accidents; doubles with each further one.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause between two tries.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(30);

/// One size class.
#[derive(Debug, Default)]
pub(super) struct Class {
    /// Open functions of this size.
    pub(super) functions: usize,
    /// Idle shells, the newest last.
    pub(super) shells: Vec<VmId>,
    /// Shells being made.
    pub(super) preparing: usize,
    pub(super) backoff: Backoff,
}

impl Class {
    pub(super) fn ready(&self) -> usize {
        self.shells.len()
    }

    pub(super) fn is_unused(&self) -> bool {
        self.functions == 0 && self.shells.is_empty() && self.preparing == 0
    }

    pub(super) fn lift(&mut self, id: VmId, vm: &Vm) {
        match vm.phase {
            Phase::Preparing => self.preparing -= 1,
            Phase::Shell => self.shells.retain(|shell| *shell != id),
            _ => {}
        }
    }

    pub(super) fn place(&mut self, id: VmId, vm: &Vm) {
        match vm.phase {
            Phase::Preparing => self.preparing += 1,
            Phase::Shell => self.shells.push(id),
            _ => {}
        }
    }
}

/// Failures in a row, and the pause that they cost.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    paused_until: Option<Time>,
}

impl Backoff {
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
        self.paused_until = None;
    }

    /// The end of the pause, if there is one now.
    pub(super) fn failed(&mut self, now: Time) -> Option<Time> {
        self.failures = self.failures.saturating_add(1);
        let doublings = self.failures.checked_sub(ACCIDENTS_MAX + 1)?;
        let pause = PAUSE_MIN
            .saturating_mul(1 << doublings.min(16))
            .min(PAUSE_MAX);
        self.paused_until = Some(now + pause);
        self.paused_until
    }

    pub(super) fn is_paused(&self, now: Time) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// After a failure one try goes ahead of the others.
    pub(super) fn allows(&self, under_way: usize, now: Time) -> bool {
        !self.is_paused(now) && (self.failures == 0 || under_way == 0)
    }
}
