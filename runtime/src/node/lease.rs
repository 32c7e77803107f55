//! A caller's right to one sandbox, for one invocation.

use std::sync::Arc;

use tokio::sync::watch;

use super::{Lesson, Member, Node};
use crate::monitor::Size;
use crate::sandbox::answer::Answer;
use crate::sandbox::settle::Left;
use crate::sandbox::{Moment, NotRun, Sandbox};
use crate::schedule::{Input, Start, Verdict, VmId};
use crate::{End, HostError, Invocation, InvokeError, LateLog, Outcome, PoolStats};

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
    /// Where extensions' output after the answer goes.
    late_log: Option<watch::Sender<Option<Vec<u8>>>>,
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
            late_log: None,
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
            none => match Sandbox::spawn(&self.node.spawner, Size::of_shell(member.shape)).await {
                Ok(fresh) => none.insert(fresh),
                Err(error) => {
                    let error = Arc::new(error);
                    self.fate = Fate::ClaimFailed(Arc::clone(&error));
                    return Err(RunError::NotRun(error));
                }
            },
        };
        let plug = match sandbox.is_shell() {
            true => match self.node.plug(member).await {
                Ok(plug) => plug,
                Err(error) => {
                    let error = Arc::new(error);
                    self.fate = Fate::ClaimFailed(Arc::clone(&error));
                    return Err(RunError::NotRun(error));
                }
            },
            false => None,
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
                (&member.files(), plug),
                answer,
                (asked, claimed_at),
                &node.config,
                &mut begun,
            )
            .await;
        match result {
            Ok(mut outcome) => {
                outcome.start = *start;
                if sandbox.is_unsettled() || sandbox.has_network() {
                    let (sender, late_log) = LateLog::new();
                    self.late_log = Some(sender);
                    outcome.late_log = Some(late_log);
                }
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
        let handed = Handed {
            node: Arc::clone(&self.node),
            member: Arc::clone(&self.parts.member),
            vm,
            start,
            sandbox,
            fate,
        };
        // Extensions are at work still: the sandbox is the invocation's until they are done.
        match self.late_log.take() {
            Some(late_log) => drop(self.node.tokio.spawn(handed.settle(late_log))),
            None => handed.back(),
        }
    }
}

/// A sandbox on its way back to the schedule.
struct Handed {
    node: Arc<Node>,
    member: Arc<Member>,
    vm: VmId,
    start: Start,
    sandbox: Option<Sandbox>,
    fate: Fate,
}

impl Handed {
    /// Waits for the extensions first, unless the pool is closed.
    async fn settle(mut self, late_log: watch::Sender<Option<Vec<u8>>>) {
        let member = Arc::clone(&self.member);
        if let Some(sandbox) = &mut self.sandbox {
            let (log, left) = tokio::select! {
                biased;
                () = member.stop_running.cancelled() => (Vec::new(), Left::Dead),
                settled = sandbox.settle() => settled,
            };
            if left == Left::Dead {
                self.fate = Fate::Used(Verdict::Spoilt);
            }
            late_log.send_replace(Some(log));
        }
        self.back();
    }

    fn back(self) {
        let Self {
            node,
            member,
            vm,
            start,
            sandbox,
            fate,
        } = self;
        node.apply_with(|desk| {
            let entry = desk.members.get_mut(&member.id);
            let input = match fate {
                Fate::Untouched => Input::GaveBack(vm),
                Fate::Used(verdict) => {
                    if let Some(entry) = entry {
                        count(&mut entry.counts, start);
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

fn count(counts: &mut PoolStats, start: Start) {
    counts.invocations += 1;
    match start {
        Start::Cold => counts.cold += 1,
        Start::Claimed => counts.claimed += 1,
        Start::Rewound => counts.rewound += 1,
        Start::Warm => {}
    }
}
