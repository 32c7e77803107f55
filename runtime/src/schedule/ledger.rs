//! The account of all monitors: what each is at, and what all of them cost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{FunctionId, Rules, Shape, Start, VmId};

/// Where a monitor is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A shell is being made.
    Preparing,
    /// An idle shell.
    Shell,
    /// Claimed ahead of demand; not there yet.
    Claiming,
    /// Paused and pristine.
    Ready,
    /// Granted; its claim is the caller's first act.
    Starting(Origin),
    /// Granted, and claimed.
    Running,
    /// Being put back to its snapshot.
    Rewinding,
    /// Being torn down.
    Ending,
}

/// What a granted monitor was before its claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Shell,
    Nothing,
}

/// One monitor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vm {
    pub(super) shape: Shape,
    pub(super) function: Option<FunctionId>,
    pub(super) phase: Phase,
    /// How it is had by the next request.
    pub(super) next: Start,
    /// It ran once: a rewind puts pages back and keeps them mapped.
    pub(super) has_run: bool,
    /// What was spent on it before its claim.
    pub(super) spent: Duration,
    cost_mib: u64,
    /// When it became ready, in order.
    since: u64,
}

impl Vm {
    pub(super) fn new(shape: Shape, phase: Phase) -> Self {
        Self {
            shape,
            function: None,
            phase,
            next: Start::Claimed,
            has_run: false,
            spent: Duration::ZERO,
            cost_mib: 0,
            since: 0,
        }
    }
}

/// All monitors and their sums.
#[derive(Debug)]
pub(super) struct Ledger {
    rules: Rules,
    vms: BTreeMap<VmId, Vm>,
    /// The ready ones, the oldest first.
    idle: BTreeSet<(u64, VmId)>,
    used_mib: u64,
    ending_mib: u64,
    vcpus: u64,
    background: usize,
    order: u64,
}

impl Ledger {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            vms: BTreeMap::new(),
            idle: BTreeSet::new(),
            used_mib: 0,
            ending_mib: 0,
            vcpus: 0,
            background: 0,
            order: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }

    pub(super) fn used_mib(&self) -> u64 {
        self.used_mib
    }

    pub(super) fn vcpus(&self) -> u64 {
        self.vcpus
    }

    /// Shells being made and claims ahead of demand.
    pub(super) fn background(&self) -> usize {
        self.background
    }

    pub(super) fn get(&self, id: VmId) -> &Vm {
        self.vms.get(&id).expect("a monitor is known until reaped")
    }

    /// Ready sandboxes, the one that has been idle longest first.
    pub(super) fn idle(&self) -> impl Iterator<Item = VmId> {
        self.idle.iter().map(|(_, id)| *id)
    }

    pub(super) fn could_ever_run(&self, shape: Shape) -> bool {
        self.full_mib(shape) <= self.rules.memory_mib && u64::from(shape.vcpus) <= self.rules.vcpus
    }

    /// Virtual CPUs that may still begin to run.
    pub(super) fn free_vcpus(&self) -> u64 {
        self.rules.vcpus.saturating_sub(self.vcpus)
    }

    pub(super) fn fits(&self, extra_mib: u64) -> bool {
        self.used_mib.saturating_add(extra_mib) <= self.rules.memory_mib
    }

    /// Whether it fits once everything that is being torn down is gone.
    pub(super) fn will_fit(&self, extra_mib: u64) -> bool {
        (self.used_mib - self.ending_mib).saturating_add(extra_mib) <= self.rules.memory_mib
    }

    pub(super) fn shell_mib(&self) -> u64 {
        u64::from(self.rules.overhead_mib)
    }

    pub(super) fn idle_mib(&self, shape: Shape) -> u64 {
        let share = shape.memory_mib.div_ceil(self.rules.idle_divisor.max(1));
        self.shell_mib() + u64::from(share)
    }

    pub(super) fn full_mib(&self, shape: Shape) -> u64 {
        self.shell_mib() + u64::from(shape.memory_mib)
    }

    /// What it costs more when it runs than it does now.
    pub(super) fn extra_to_run(&self, id: VmId) -> u64 {
        let vm = self.get(id);
        self.full_mib(vm.shape).saturating_sub(vm.cost_mib)
    }

    pub(super) fn lift(&mut self, id: VmId) -> Vm {
        let vm = self.vms.remove(&id);
        let vm = vm.expect("a monitor is known until reaped");
        self.used_mib -= vm.cost_mib;
        match vm.phase {
            Phase::Preparing | Phase::Claiming => self.background -= 1,
            Phase::Ready => {
                self.idle.remove(&(vm.since, id));
            }
            Phase::Starting(_) | Phase::Running => self.vcpus -= u64::from(vm.shape.vcpus),
            Phase::Ending => self.ending_mib -= vm.cost_mib,
            Phase::Shell | Phase::Rewinding => {}
        }
        vm
    }

    pub(super) fn place(&mut self, id: VmId, mut vm: Vm) {
        vm.cost_mib = match vm.phase {
            Phase::Preparing | Phase::Shell => self.shell_mib(),
            Phase::Claiming => self.idle_mib(vm.shape),
            Phase::Ready if !vm.has_run => self.idle_mib(vm.shape),
            Phase::Ready | Phase::Starting(_) | Phase::Running | Phase::Rewinding => {
                self.full_mib(vm.shape)
            }
            // Until it is reaped it has what it had.
            Phase::Ending => vm.cost_mib,
        };
        self.used_mib += vm.cost_mib;
        match vm.phase {
            Phase::Preparing | Phase::Claiming => self.background += 1,
            Phase::Ready => {
                self.order += 1;
                vm.since = self.order;
                self.idle.insert((vm.since, id));
            }
            Phase::Starting(_) | Phase::Running => self.vcpus += u64::from(vm.shape.vcpus),
            Phase::Ending => self.ending_mib += vm.cost_mib,
            Phase::Shell | Phase::Rewinding => {}
        }
        self.vms.insert(id, vm);
    }
}
