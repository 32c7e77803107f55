//! What the schedule decides about: the monitors that nobody uses at the moment, and the callers that wait.

use std::collections::HashMap;
use std::sync::Arc;

use super::lease::Parts;
use super::{Grant, Member};
use crate::sandbox::Sandbox;
use crate::schedule::{
    Effect, FunctionId, Input, Limits, Refusal, Rules, Schedule, Shape, Start, Ticket, Time, VmId,
};
use crate::{HostError, InvokeError, PoolStats, ThrottleReason};

/// Locked for moments only, never across an await.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) schedule: Schedule,
    /// Idle monitors, and those about to be torn down or rewound.
    pub(super) held: HashMap<VmId, Sandbox>,
    pub(super) callers: HashMap<Ticket, (FunctionId, Grant)>,
    pub(crate) members: HashMap<FunctionId, Entry>,
    next_number: u64,
}

/// A function and its counts.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) member: Arc<Member>,
    pub(crate) counts: PoolStats,
    pub(super) last_failure: Option<Arc<HostError>>,
}

/// An effect with what it needs, to be carried out without the lock.
#[derive(Debug)]
pub(super) enum Deed {
    Prepare(VmId, Shape),
    Claim(VmId, Option<Sandbox>, Arc<Member>),
    Rewind(VmId, Sandbox, Arc<Member>),
    Hand(Grant, Parts),
    Refuse(Grant, InvokeError),
    Destroy(VmId, Option<Sandbox>),
    Gone(Arc<Member>),
}

impl Desk {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            schedule: Schedule::new(rules),
            held: HashMap::new(),
            callers: HashMap::new(),
            members: HashMap::new(),
            next_number: 0,
        }
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Process ids of a function's ready monitors.
    pub(crate) fn ready_pids(&self, function: FunctionId) -> Vec<u32> {
        let ready = self.schedule.ready(function);
        let held = ready.iter().filter_map(|id| self.held.get(id));
        held.filter_map(Sandbox::pid).collect()
    }

    pub(super) fn add(&mut self, member: Arc<Member>) -> Input {
        let (id, spec) = (member.id, &member.spec);
        let limits = Limits {
            shape: member.shape,
            ready_min: spec.ready_count,
            concurrency_max: spec.concurrency_max,
            queue_max: spec.queue_max,
        };
        let entry = Entry {
            member,
            counts: PoolStats::default(),
            last_failure: None,
        };
        self.members.insert(id, entry);
        Input::Add(id, limits)
    }

    /// Joins the schedule's effects with the monitors and callers they name; and when to wake it.
    pub(super) fn deeds(&mut self, effects: Vec<Effect>) -> (Vec<Deed>, Option<Time>) {
        let (mut deeds, mut wake) = (Vec::with_capacity(effects.len()), None);
        for effect in effects {
            deeds.push(match effect {
                Effect::WakeAt(at) => {
                    wake = Some(at);
                    continue;
                }
                Effect::Prepare(id, shape) => Deed::Prepare(id, shape),
                Effect::Claim(id, function) => {
                    Deed::Claim(id, self.held.remove(&id), self.member(function))
                }
                Effect::Grant { ticket, vm, start } => self.hand(ticket, vm, start),
                Effect::Refuse(ticket, refusal) => {
                    let Some((function, grant)) = self.callers.remove(&ticket) else {
                        continue;
                    };
                    Deed::Refuse(grant, self.refused(function, refusal))
                }
                Effect::Rewind(id, function) => {
                    let sandbox = self.held.remove(&id);
                    let sandbox =
                        sandbox.expect("a used sandbox is handed back before it is rewound");
                    Deed::Rewind(id, sandbox, self.member(function))
                }
                Effect::Destroy(id) => Deed::Destroy(id, self.held.remove(&id)),
                Effect::Gone(function) => match self.members.remove(&function) {
                    Some(entry) => Deed::Gone(entry.member),
                    None => continue,
                },
            });
        }
        (deeds, wake)
    }

    fn hand(&mut self, ticket: Ticket, vm: VmId, start: Start) -> Deed {
        let caller = self.callers.remove(&ticket);
        let (function, grant) = caller.expect("a caller takes its ticket out of the queue first");
        let parts = Parts {
            member: self.member(function),
            vm,
            sandbox: self.held.remove(&vm),
            start,
        };
        Deed::Hand(grant, parts)
    }

    fn member(&self, function: FunctionId) -> Arc<Member> {
        let entry = self.members.get(&function);
        let entry = entry.expect("a function stays until the schedule says that it is gone");
        Arc::clone(&entry.member)
    }

    fn refused(&mut self, function: FunctionId, refusal: Refusal) -> InvokeError {
        let counts = self.schedule.function(function);
        let Some(entry) = self.members.get_mut(&function) else {
            return InvokeError::Closed;
        };
        let reason = match refusal {
            Refusal::Closed => return InvokeError::Closed,
            Refusal::ClaimsFail => {
                let failure = entry.last_failure.clone();
                return InvokeError::Host(failure.unwrap_or_else(|| HostError::ShutDown.into()));
            }
            Refusal::QueueFull => ThrottleReason::QueueFull,
            Refusal::DeadlinePassed => ThrottleReason::WaitedTooLong,
            Refusal::MachineFull => ThrottleReason::MachineFull,
            Refusal::TooBig => ThrottleReason::TooBig,
        };
        entry.counts.throttled += 1;
        InvokeError::Throttled {
            reason,
            running: counts.running,
            waiting: counts.waiting,
        }
    }
}
