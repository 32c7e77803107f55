//! The life of one sandbox as a plain value: what happened in, what to do out. No sockets, no clocks, no processes.
//!
//! ```text
//! Booted --Configure--> Initialising --next | restore/next--> Idle --Invoke--> Assigned --next--> Running --answer--> Idle
//!                                                                    Running --begin--> Streaming --end--> Idle
//! ```
//! An invocation that finds the runtime already blocked in `/next` skips `Assigned`. Every phase can turn into `Ended`.
//! With extensions, the runtime starts when they have registered, `Idle` begins when each waits for its first event, and the
//! answer begins the end of the sandbox: see `life/beside.rs`.
//!
//! Always holds: nothing runs before the clone is unique. An `Invoke` is accepted only in the generation of the last
//! `Thaw`, and never in the generation in which the runtime was configured: 0, or that of a `Thaw` before `Configure`, for a
//! guest that was itself restored, from a snapshot without a function. Between `Ready` in that generation and the next
//! `Thaw` nothing is written to the channel (but the end of the runtime), because the snapshot is being taken there: see
//! [`Life::is_frozen`].

mod beside;
mod words;

use std::time::Duration;

use bytes::Bytes;
use thaw_agent_protocol::{
    AgentMessage, Configure, Generation, HostMessage, InitError, InvocationError, Invoke,
    RuntimeExit, RuntimeExitCause, StreamBegin, StreamEnd, StreamFailure, Thaw,
};

use crate::document;
use crate::extensions::{Extensions, Failure};

pub use words::{Answer, Call, Effect, Invocation, LifeError, Unfit};

/// Request id under which a runtime that is still initialising may post an answer to nobody: a rehearsal of an invocation,
/// so that the code and the connection of the real one are in the snapshot.
pub const REHEARSAL: &str = "rehearsal";

#[derive(Debug)]
enum Phase {
    Booted,
    Initialising {
        limit_ms: u64,
    },
    Idle {
        announced: bool,
    },
    Assigned(Invocation),
    Running(Invocation),
    /// A streamed response of this request is under way.
    Streaming(String),
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parked {
    Next,
    RestoreNext,
}

/// The life of one sandbox.
#[derive(Debug)]
pub struct Life {
    generation: Generation,
    configured_in: Generation,
    phase: Phase,
    parked: Option<Parked>,
    answered: Option<String>,
    restore_error: Option<InitError>,
    /// The runtime was told that it is restored, and has not asked for work since: its hooks run.
    is_restoring: bool,
    extensions: Extensions,
    /// An extension failed while nothing ran that could be answered with it.
    extension_failure: Option<Failure>,
    runtime_started: bool,
    /// The word that the sandbox's end is complete is said.
    is_settled: bool,
    /// The host wants the power off as soon as the extensions are done.
    powering_off: bool,
}

impl Default for Life {
    fn default() -> Self {
        Self::new()
    }
}

impl Life {
    /// A sandbox that was just booted, in generation 0.
    pub fn new() -> Self {
        Self {
            generation: Generation::default(),
            configured_in: Generation::default(),
            phase: Phase::Booted,
            parked: None,
            answered: None,
            restore_error: None,
            is_restoring: false,
            extensions: Extensions::new(),
            extension_failure: None,
            runtime_started: false,
            is_settled: false,
            powering_off: false,
        }
    }

    /// The generation of the last thaw; 0 before any.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The runtime was started and has not asked for work yet; its init limit holds.
    pub fn is_initialising(&self) -> bool {
        matches!(self.phase, Phase::Initialising { .. })
    }

    /// The snapshot may be taken at any moment: write nothing to the channel, since a clone's host would get the
    /// second half of a frame whose first half went to the original's.
    pub fn is_frozen(&self) -> bool {
        !self.is_clone() && matches!(self.phase, Phase::Idle { announced: true })
    }

    /// This is a clone of a configured runtime: only clones run invocations.
    fn is_clone(&self) -> bool {
        self.generation != self.configured_in
    }

    /// The invocation that is assigned or running.
    pub fn request_id(&self) -> Option<&str> {
        match &self.phase {
            Phase::Assigned(invocation) | Phase::Running(invocation) => {
                Some(&invocation.head.request_id)
            }
            Phase::Streaming(request_id) => Some(request_id),
            _ => None,
        }
    }

    /// A message from the host, from a frame of `generation`.
    ///
    /// # Errors
    /// The message does not belong to this life or phase; end the sandbox.
    pub fn host(
        &mut self,
        generation: Generation,
        message: HostMessage,
    ) -> Result<Vec<Effect>, LifeError> {
        match message {
            HostMessage::Configure(configure) => self.configure(configure),
            HostMessage::Thaw(thaw) => self.thaw(generation, thaw),
            HostMessage::Invoke(invoke) => self.invoke(generation, invoke),
            HostMessage::Shutdown => Ok(self.shut_down()),
        }
    }

    /// A call of the runtime or of an extension.
    pub fn call(&mut self, call: Call) -> Vec<Effect> {
        let was_open = self.request_id().is_some();
        let mut effects = self.called(call);
        if was_open && self.request_id().is_none() {
            effects.extend(self.answered());
        }
        effects
    }

    fn called(&mut self, call: Call) -> Vec<Effect> {
        match call {
            Call::Extension(call) => self.extension_called(call),
            Call::Next => self.next(),
            Call::RestoreNext => self.restore_next(),
            Call::Response(reply) => {
                let id = reply.request_id.clone();
                self.finish(&id, "InvocationResponse", AgentMessage::Response(reply))
            }
            Call::ResponseBegin(begin) => self.begin_stream(begin),
            Call::ResponseChunk { request_id, bytes } => {
                if self.is_rehearsal(&request_id) {
                    return vec![Effect::Answer(Answer::Accepted)];
                }
                if !self.is_streaming(&request_id) {
                    return self.not_allowed("InvocationResponse");
                }
                vec![
                    Effect::Send(AgentMessage::ResponseChunk(bytes.into())),
                    Effect::Answer(Answer::Accepted),
                ]
            }
            Call::ResponseEnd(end) if self.is_streaming(&end.request_id) => self.end_stream(end),
            Call::ResponseEnd(end) if self.is_rehearsal(&end.request_id) => {
                vec![Effect::Answer(Answer::Accepted)]
            }
            Call::ResponseEnd(_) => self.not_allowed("InvocationResponse"),
            // What the handler raises while its response is under way ends the response.
            Call::Error(error) if self.is_streaming(&error.request_id) => {
                self.end_stream(StreamEnd {
                    request_id: error.request_id,
                    failure: Some(StreamFailure {
                        error_type: error.error_type.unwrap_or_else(|| "Unhandled".into()),
                        document: error.payload,
                    }),
                })
            }
            Call::Error(error) => {
                let id = error.request_id.clone();
                let message = AgentMessage::InvocationError(error);
                self.finish(&id, "InvocationErrorResponse", message)
            }
            Call::Unfit(request_id, unfit) => self.unfit(&request_id, unfit),
            // Clients of before `restore/error` report failed hooks so, and Lambda still takes it.
            Call::InitError(error) if self.is_restoring => self.restore_failed(error),
            Call::InitError(error) if self.is_initialising() => {
                self.phase = Phase::Ended;
                vec![
                    Effect::Send(AgentMessage::InitError(error)),
                    Effect::Answer(Answer::Accepted),
                ]
            }
            Call::InitError(_) => self.not_allowed("InitError"),
            Call::RestoreError(error) => self.restore_failed(error),
        }
    }

    /// The call that was parked is gone: its client closed the connection.
    pub fn parked_call_lost(&mut self) {
        self.parked = None;
    }

    /// The runtime process ended.
    pub fn runtime_ended(&mut self, cause: RuntimeExitCause, out_of_memory: bool) -> Vec<Effect> {
        if matches!(self.phase, Phase::Ended) {
            return Vec::new();
        }
        if self.restore_error.is_some() {
            // Having told why its hooks failed, it ends: the invocation on its way is to hear that, not of the end.
            return vec![Effect::Kill];
        }
        let request_id = self.request_id().map(str::to_owned);
        self.phase = Phase::Ended;
        let mut effects = vec![
            Effect::Kill,
            Effect::Send(AgentMessage::RuntimeExit(RuntimeExit {
                cause,
                out_of_memory,
                request_id,
            })),
        ];
        effects.extend(self.answered());
        effects
    }

    /// The runtime could not be started; `reason` is for the function's owner.
    pub fn start_failed(&mut self, reason: &str) -> Vec<Effect> {
        self.phase = Phase::Ended;
        vec![Effect::Send(AgentMessage::InitError(InitError {
            error_type: document::INVALID_ENTRYPOINT.into(),
            payload: document::error(document::INVALID_ENTRYPOINT, &format!("Error: {reason}")),
        }))]
    }

    /// The init limit passed. Nothing happens if the runtime is past its init.
    pub fn init_timed_out(&mut self) -> Vec<Effect> {
        let Phase::Initialising { limit_ms } = self.phase else {
            return Vec::new();
        };
        self.phase = Phase::Ended;
        let mut effects = vec![Effect::Kill];
        effects.extend(self.extensions.report());
        effects.push(Effect::Send(AgentMessage::InitError(InitError {
            error_type: document::TIMED_OUT.into(),
            payload: document::timed_out(limit_ms),
        })));
        effects
    }

    fn configure(&mut self, configure: Configure) -> Result<Vec<Effect>, LifeError> {
        if !matches!(self.phase, Phase::Booted) {
            return Err(self.out_of_order("configure"));
        }
        self.configured_in = self.generation;
        self.phase = Phase::Initialising {
            limit_ms: configure.init_limit_ms,
        };
        Ok(vec![Effect::Start(configure)])
    }

    fn thaw(&mut self, generation: Generation, thaw: Thaw) -> Result<Vec<Effect>, LifeError> {
        if generation <= self.generation {
            return Err(LifeError::StaleThaw {
                got: generation.0,
                current: self.generation.0,
            });
        }
        if !matches!(
            self.phase,
            Phase::Booted | Phase::Idle { .. } | Phase::Ended
        ) {
            return Err(self.out_of_order("thaw"));
        }
        self.generation = generation;
        let mut effects = vec![Effect::Adopt(generation, thaw)];
        if self.parked == Some(Parked::RestoreNext) {
            self.parked = None;
            self.is_restoring = true;
            effects.push(Effect::Queue(AgentMessage::Restoring));
            effects.push(Effect::Wake(Answer::Restored));
        }
        Ok(effects)
    }

    fn invoke(
        &mut self,
        generation: Generation,
        mut head: Invoke,
    ) -> Result<Vec<Effect>, LifeError> {
        if generation != self.generation || !self.is_clone() {
            return Err(LifeError::StaleInvocation {
                got: generation.0,
                current: self.generation.0,
            });
        }
        match self.phase {
            // The runtime ended while the invocation was on its way: RuntimeExit told the host already.
            Phase::Ended => return Ok(Vec::new()),
            Phase::Idle { .. } => {}
            _ => return Err(self.out_of_order("invocation")),
        }
        if let Some(error) = self.restore_error.take() {
            self.phase = Phase::Ended;
            let mut effects = vec![Effect::Send(failed_restore(head.request_id, error))];
            effects.extend(self.answered());
            return Ok(effects);
        }
        if let Some(failure) = self.extension_failure.take() {
            return Ok(self.fail_with(&failure, head.request_id));
        }
        self.is_settled = false;
        let beside = self.extensions.invoke(&head);
        let invocation = Invocation {
            payload: Bytes::from(std::mem::take(&mut head.payload)),
            head,
        };
        if self.parked == Some(Parked::Next) {
            self.parked = None;
            self.phase = Phase::Running(invocation.clone());
            let mut effects = vec![Effect::Wake(Answer::Invocation(invocation))];
            effects.extend(beside);
            Ok(effects)
        } else {
            self.phase = Phase::Assigned(invocation);
            Ok(beside)
        }
    }

    /// The runtime's hooks for restored clones run: the invocation's own time has not begun.
    pub fn is_restoring(&self) -> bool {
        self.is_restoring
    }

    /// The runtime asks for its first invocation after its hooks, which took so long: the deadline is later by that.
    pub fn hooks_done(&mut self, took: Duration) -> Vec<Effect> {
        if !std::mem::take(&mut self.is_restoring) {
            return Vec::new();
        }
        if let Phase::Assigned(invocation) = &mut self.phase {
            let took = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
            let deadline = &mut invocation.head.deadline_unix_ms;
            *deadline = deadline.saturating_add(took);
        }
        vec![Effect::Queue(AgentMessage::Restored)]
    }

    fn next(&mut self) -> Vec<Effect> {
        self.is_restoring = false;
        match &self.phase {
            Phase::Initialising { .. } | Phase::Idle { announced: false } => {
                self.park_and_announce(Parked::Next)
            }
            Phase::Idle { announced: true } => {
                self.parked = Some(Parked::Next);
                vec![Effect::Park]
            }
            // Asking again while an invocation runs gets the same one, as on Lambda: the answer may have been lost.
            Phase::Assigned(invocation) | Phase::Running(invocation) => {
                let invocation = invocation.clone();
                self.phase = Phase::Running(invocation.clone());
                vec![Effect::Answer(Answer::Invocation(invocation))]
            }
            Phase::Booted | Phase::Streaming(_) | Phase::Ended => self.not_allowed("Ready"),
        }
    }

    fn restore_next(&mut self) -> Vec<Effect> {
        match self.phase {
            Phase::Initialising { .. } => self.park_and_announce(Parked::RestoreNext),
            Phase::Idle { .. } if !self.is_clone() => {
                self.parked = Some(Parked::RestoreNext);
                vec![Effect::Park]
            }
            // The answer was lost with its connection; the clone is unique all the same.
            Phase::Idle { .. } | Phase::Assigned(_) => vec![Effect::Answer(Answer::Restored)],
            _ => self.not_allowed("RestoreReady"),
        }
    }

    fn park_and_announce(&mut self, call: Parked) -> Vec<Effect> {
        self.parked = Some(call);
        let mut effects = vec![Effect::Park];
        effects.extend(self.announce());
        effects
    }

    fn finish(&mut self, id: &str, to: &'static str, message: AgentMessage) -> Vec<Effect> {
        match &self.phase {
            Phase::Initialising { .. } if id == REHEARSAL => {
                vec![Effect::Answer(Answer::Accepted)]
            }
            Phase::Running(invocation) if invocation.head.request_id == id => {
                self.answered = Some(id.to_owned());
                self.phase = Phase::Idle { announced: false };
                vec![Effect::Send(message), Effect::Answer(Answer::Accepted)]
            }
            // The right id, of an invocation that the runtime has not asked for.
            Phase::Assigned(invocation) if invocation.head.request_id == id => self.not_allowed(to),
            Phase::Running(_) | Phase::Assigned(_) => {
                vec![Effect::Answer(Answer::InvalidRequestId)]
            }
            _ if self.answered.as_deref() == Some(id) => self.not_allowed(to),
            _ => vec![Effect::Answer(Answer::InvalidRequestId)],
        }
    }

    /// What was posted fails the invocation.
    fn unfit(&mut self, request_id: &str, unfit: Unfit) -> Vec<Effect> {
        let (error_type, payload) = match unfit {
            Unfit::TooLarge => (document::RESPONSE_TOO_LARGE, document::response_too_large()),
            Unfit::ResponseMode => (
                document::INVALID_MODE,
                document::error(document::INVALID_MODE, document::INVALID_MODE_MESSAGE),
            ),
        };
        let message = AgentMessage::InvocationError(InvocationError {
            request_id: request_id.to_owned(),
            error_type: Some(error_type.into()),
            payload,
        });
        let mut effects = self.finish(request_id, "InvocationResponse", message);
        for effect in &mut effects {
            if *effect == Effect::Answer(Answer::Accepted) {
                *effect = Effect::Answer(Answer::Unfit(unfit));
            }
        }
        effects
    }

    fn is_rehearsal(&self, id: &str) -> bool {
        id == REHEARSAL && self.is_initialising()
    }

    fn is_streaming(&self, id: &str) -> bool {
        matches!(&self.phase, Phase::Streaming(streamed) if streamed == id)
    }

    fn begin_stream(&mut self, begin: StreamBegin) -> Vec<Effect> {
        let id = begin.request_id.clone();
        let message = AgentMessage::ResponseBegin(begin);
        let effects = self.finish(&id, "InvocationResponse", message);
        if matches!(effects.first(), Some(Effect::Send(_))) {
            self.phase = Phase::Streaming(id);
        }
        effects
    }

    fn end_stream(&mut self, end: StreamEnd) -> Vec<Effect> {
        self.phase = Phase::Idle { announced: false };
        vec![
            Effect::Send(AgentMessage::ResponseEnd(end)),
            Effect::Answer(Answer::Accepted),
        ]
    }

    fn restore_failed(&mut self, error: InitError) -> Vec<Effect> {
        let thawed = self.is_clone();
        match &self.phase {
            Phase::Idle { .. }
                if thawed && self.parked.is_none() && self.restore_error.is_none() =>
            {
                self.restore_error = Some(error);
                vec![Effect::Answer(Answer::Accepted)]
            }
            // A runtime that fetches its first invocation before it runs its hooks has not begun with it.
            Phase::Assigned(invocation) | Phase::Running(invocation)
                if thawed && self.answered.is_none() =>
            {
                let message = failed_restore(invocation.head.request_id.clone(), error);
                self.phase = Phase::Ended;
                vec![Effect::Send(message), Effect::Answer(Answer::Accepted)]
            }
            _ => self.not_allowed("RestoreError"),
        }
    }

    fn not_allowed(&self, to: &'static str) -> Vec<Effect> {
        vec![Effect::Answer(Answer::NotAllowed {
            from: self.phase_name(),
            to,
        })]
    }

    fn out_of_order(&self, message: &'static str) -> LifeError {
        LifeError::OutOfOrder {
            message,
            phase: self.phase_name(),
        }
    }

    /// The runtime's state by the names that Lambda gives them in its answers.
    fn phase_name(&self) -> &'static str {
        match self.phase {
            Phase::Booted | Phase::Initialising { .. } => "Started",
            _ if self.restore_error.is_some() => "RuntimeRestoreErrorState",
            Phase::Idle { .. } | Phase::Assigned(_) if self.is_restoring => "Restoring",
            Phase::Idle { .. } if self.parked == Some(Parked::RestoreNext) => "RestoreReady",
            Phase::Idle { announced: false } => "RuntimeResponseSentState",
            Phase::Idle { .. } | Phase::Assigned(_) => "Ready",
            Phase::Running(_) => "Running",
            Phase::Streaming(_) => "InvocationResponse",
            Phase::Ended if self.is_clone() => "RuntimeRestoreErrorState",
            Phase::Ended => "InitError",
        }
    }
}

fn failed_restore(request_id: String, error: InitError) -> AgentMessage {
    AgentMessage::RestoreError(InvocationError {
        request_id,
        error_type: Some(error.error_type),
        payload: error.payload,
    })
}

#[cfg(test)]
mod tests;
