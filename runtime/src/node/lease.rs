//! A caller's right to one sandbox, for one invocation.

use std::sync::Arc;

use super::{Lesson, Member, Node};
use crate::sandbox::answer::Answer;
use crate::sandbox::{Moment, NotRun, Sandbox};
use crate::schedule::{Input, Start, Verdict, VmId};
use crate::{End, HostError, Invocation, InvokeError, Outcome, PoolStats};

/// What a caller is granted.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(super) member: Arc<Member>,
    pub(super) vm: VmId,
    /// A ready sandbox or a shell; none when the monitor is still to be started.
    pub(super) sandbox: Option<Sandbox>,
    pub(super) start: Start,
}

/// A sandbox that a caller was granted. Dropped untouched it is given back; dropped after a clean end it is rewound; else it
/// is destroyed. None of this is waited for.
#[derive(Debug)]
pub(crate) struct Lease {
    node: Arc<Node>,
    parts: Parts,
    fate: Fate,
}

#[derive(Debug)]
enum Fate {
    /// Nothing was done with it.
    Untouched,
    /// Its monitor was found dead before anything was done.
    Lost,
    /// Its claim failed.
    ClaimFailed(Arc<HostError>),
    /// Bytes went into its channel.
    Used(Verdict),
}

/// Why a lease brought no outcome.
#[derive(Debug)]
pub(crate) enum RunError {
    /// The claim failed before the guest ran: the request may be tried again.
    NotRun(Arc<HostError>),
    /// It is over.
    Failed(InvokeError),
}

impl Lease {
    pub(super) fn new(node: Arc<Node>, parts: Parts) -> Self {
        Self {
            node,
            parts,
            fate: Fate::Untouched,
        }
    }

    /// Whether the monitor is as it was left. One that is still to be started is.
    pub(crate) fn is_well(&mut self) -> bool {
        let well = self.parts.sandbox.as_mut().is_none_or(Sandbox::is_well);
        if !well {
            self.fate = Fate::Lost;
        }
        well
    }

    /// Claims the sandbox if it is none yet, and runs the invocation in it. Once.
    pub(crate) async fn run(
        &mut self,
        invocation: &Invocation,
        answer: &mut Answer,
        asked: Moment,
    ) -> Result<Outcome, RunError> {
        // What is dropped half-way is not used again.
        self.fate = Fate::Used(Verdict::Spoilt);
        let claimed_at = Moment::now();
        let Parts {
            member,
            vm,
            sandbox,
            start,
        } = &mut self.parts;
        let sandbox = match sandbox {
            Some(sandbox) => sandbox,
            none => match Sandbox::spawn(&self.node.spawner).await {
                Ok(fresh) => none.insert(fresh),
                Err(error) => {
                    let error = Arc::new(error);
                    self.fate = Fate::ClaimFailed(Arc::clone(&error));
                    return Err(RunError::NotRun(error));
                }
            },
        };
        let (mut claims, node, vm) = (sandbox.is_shell(), &self.node, *vm);
        let mut begun = || {
            if std::mem::take(&mut claims) {
                node.apply(Input::Claimed(vm, claimed_at.elapsed()));
            }
        };
        let result = sandbox
            .run(
                invocation,
                &member.files(),
                answer,
                (asked, claimed_at),
                &node.config,
                &mut begun,
            )
            .await;
        match result {
            Ok(mut outcome) => {
                outcome.start = *start;
                if matches!(outcome.end, End::Response { .. }) {
                    sandbox.learn(Lesson::of(member));
                }
                if matches!(
                    outcome.end,
                    End::Response { .. } | End::FunctionError { .. } | End::RestoreError { .. }
                ) {
                    self.fate = Fate::Used(Verdict::Clean);
                }
                Ok(outcome)
            }
            Err(NotRun::Surely(error)) => {
                if claims {
                    self.fate = Fate::ClaimFailed(Arc::clone(&error));
                    return Err(RunError::NotRun(error));
                }
                Err(RunError::Failed(InvokeError::Host(error)))
            }
            Err(NotRun::Perhaps(error)) => {
                if claims && let InvokeError::Host(cause) = &error {
                    self.fate = Fate::ClaimFailed(Arc::clone(cause));
                }
                Err(RunError::Failed(error))
            }
        }
    }

    fn count(counts: &mut PoolStats, start: Start) {
        counts.invocations += 1;
        match start {
            Start::Cold => counts.cold += 1,
            Start::Claimed => counts.claimed += 1,
            Start::Rewound => counts.rewound += 1,
            Start::Warm => {}
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let (vm, start) = (self.parts.vm, self.parts.start);
        let sandbox = self.parts.sandbox.take();
        let fate = std::mem::replace(&mut self.fate, Fate::Lost);
        if let Fate::ClaimFailed(error) = fate {
            return self
                .node
                .claim_failed(vm, sandbox, &self.parts.member, error);
        }
        self.node.apply_with(|desk| {
            let entry = desk.members.get_mut(&self.parts.member.id);
            let input = match fate {
                Fate::Untouched => Input::GaveBack(vm),
                Fate::Used(verdict) => {
                    if let Some(entry) = entry {
                        Self::count(&mut entry.counts, start);
                        let stale = sandbox.as_ref().map_or(0, Sandbox::stale_frames);
                        entry.counts.stale_frames += stale;
                    }
                    Input::Finished(vm, verdict)
                }
                Fate::Lost | Fate::ClaimFailed(_) => Input::Lost(vm),
            };
            if let Some(sandbox) = sandbox {
                desk.held.insert(vm, sandbox);
            }
            input
        });
    }
}
