//! What runs beside the runtime: the extensions' part in the life of a sandbox.

use thaw_agent_protocol::{
    AgentMessage, InitError, InvocationError, LogStream, RuntimeExitCause, StreamEnd, StreamFailure,
};

use super::{Effect, Life, Phase};
use crate::document;
use crate::extensions::{ExtensionCall, Failure, Reason};

impl Life {
    /// Whether any extension takes part in this sandbox.
    pub fn has_extensions(&self) -> bool {
        self.extensions.take_part()
    }

    /// Name, state and events of each extension.
    pub(crate) fn extensions(&self) -> Vec<(String, &'static str, Vec<&'static str>)> {
        self.extensions.described()
    }

    /// The programs of these names were started as extensions, in this order: [`Effect::Start`] is carried out.
    pub fn extensions_launched(&mut self, names: Vec<String>) -> Vec<Effect> {
        self.extensions.launched(names);
        self.consequences()
    }

    /// The last of the extensions that are told as launched could not be started, or there are too many.
    pub fn extension_launch_failed(&mut self, names: Vec<String>, reason: String) -> Vec<Effect> {
        let last = names.len().saturating_sub(1);
        self.extensions.launched(names);
        let failure = self.extensions.launch_failed(last, reason);
        self.extension_failed(&failure)
    }

    /// The process of an extension ended.
    pub fn extension_ended(&mut self, at: usize, cause: &RuntimeExitCause) -> Vec<Effect> {
        let failure = self.extensions.exited(at, cause);
        let failed = failure.map(|failure| self.extension_failed(&failure));
        let mut effects = failed.unwrap_or_default();
        effects.extend(self.consequences());
        effects
    }

    /// The parked call of an extension is gone: its client closed the connection.
    pub fn extension_call_lost(&mut self, at: usize) {
        self.extensions.parked_call_lost(at);
    }

    /// The limit that [`Effect::Within`] set has passed.
    pub fn end_limit_passed(&mut self) -> Vec<Effect> {
        let mut effects = self.extensions.limit_passed();
        effects.extend(self.consequences());
        effects
    }

    pub(super) fn extension_called(&mut self, call: ExtensionCall) -> Vec<Effect> {
        let (mut effects, failure) = self.extensions.call(call, self.is_initialising());
        if let Some(failure) = failure {
            effects.extend(self.extension_failed(&failure));
        }
        effects.extend(self.consequences());
        effects
    }

    /// The runtime's call is parked; initialisation is over if every extension is ready, too.
    pub(super) fn announce(&mut self) -> Vec<Effect> {
        if self.is_initialising() && !self.extensions.are_ready() {
            return Vec::new();
        }
        let report = self.is_initialising().then(|| self.extensions.report());
        self.phase = Phase::Idle { announced: true };
        let mut effects: Vec<Effect> = report.flatten().into_iter().collect();
        effects.push(Effect::Send(AgentMessage::Ready));
        effects
    }

    /// The invocation was answered, or ended otherwise: with extensions, the clone's end begins.
    pub(super) fn answered(&mut self) -> Vec<Effect> {
        if !self.is_clone() {
            return Vec::new();
        }
        let failed = matches!(self.phase, Phase::Ended).then_some(Reason::Failure);
        let mut effects = self.extensions.close(failed);
        effects.extend(self.settled());
        effects
    }

    pub(super) fn shut_down(&mut self) -> Vec<Effect> {
        let reason = match self.request_id() {
            Some(_) => Reason::Timeout,
            None => Reason::Spindown,
        };
        self.phase = Phase::Ended;
        if !self.extensions.take_part() || self.extensions.is_over() {
            return vec![Effect::PowerOff];
        }
        self.powering_off = true;
        // What runs has had its time; extensions have theirs now.
        let mut effects = Vec::new();
        if reason == Reason::Timeout {
            effects.push(Effect::Kill);
        }
        effects.extend(self.extensions.close(Some(reason)));
        effects.extend(self.settled());
        effects
    }

    /// What follows from the extensions' states.
    fn consequences(&mut self) -> Vec<Effect> {
        if self.is_initialising() {
            if !self.runtime_started && self.extensions.are_registered() {
                self.runtime_started = true;
                return vec![Effect::StartRuntime];
            }
            if self.parked.is_some() {
                return self.announce();
            }
            return Vec::new();
        }
        let mut effects = self.extensions.advance();
        effects.extend(self.settled());
        effects
    }

    /// The word that the sandbox's end is complete, once.
    fn settled(&mut self) -> Option<Effect> {
        if !self.extensions.is_over() || self.is_settled {
            return None;
        }
        self.is_settled = true;
        Some(match self.powering_off {
            true => Effect::PowerOff,
            false => Effect::Send(AgentMessage::Settled),
        })
    }

    fn extension_failed(&mut self, failure: &Failure) -> Vec<Effect> {
        let error_type = failure.error_type;
        let text = format!("Error: {}", failure.text);
        if let Some(request_id) = self.request_id().map(str::to_owned) {
            return self.fail_with(failure, request_id);
        }
        match self.phase {
            Phase::Initialising { .. } => {
                self.phase = Phase::Ended;
                let mut effects = vec![Effect::Kill];
                effects.extend(self.extensions.report());
                effects.push(Effect::Send(AgentMessage::InitError(InitError {
                    error_type: error_type.into(),
                    payload: document::error(error_type, &text),
                })));
                effects
            }
            // The client has its answer; who reads the log should know all the same.
            Phase::Idle { .. } if self.extensions.is_closing() => {
                vec![Effect::Send(AgentMessage::Log {
                    stream: LogStream::Stderr,
                    bytes: format!("{text}\n{error_type}\n").into_bytes(),
                })]
            }
            Phase::Idle { .. } => {
                self.extension_failure = Some(failure.clone());
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// The invocation fails because an extension did, and with it this clone.
    pub(super) fn fail_with(&mut self, failure: &Failure, request_id: String) -> Vec<Effect> {
        let error_type = failure.error_type;
        let text = format!("RequestId: {request_id} Error: {}", failure.text);
        let document = document::error(error_type, &text);
        let log = Effect::Send(AgentMessage::Log {
            stream: LogStream::Stderr,
            bytes: format!("{text}\n{error_type}\n").into_bytes(),
        });
        let message = match &self.phase {
            Phase::Streaming(_) => AgentMessage::ResponseEnd(StreamEnd {
                request_id,
                failure: Some(StreamFailure {
                    error_type: error_type.into(),
                    document,
                }),
            }),
            _ => AgentMessage::InvocationError(InvocationError {
                request_id,
                error_type: Some(error_type.into()),
                payload: document,
            }),
        };
        self.phase = Phase::Ended;
        let mut effects = vec![Effect::Kill, log, Effect::Send(message)];
        effects.extend(self.answered());
        effects
    }
}
