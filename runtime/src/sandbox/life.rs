//! The life of one sandbox as a plain state machine: what the VM says goes in, how the invocation ended comes out, once.

use std::time::Duration;

use bytes::Bytes;
use thaw_agent_protocol::{
    AgentMessage, RESPONSE_BYTES_MAX, STREAM_BYTES_MAX, STREAM_CHUNK_BYTES_MAX, StreamEnd,
};
use thaw_vmm_control::{Exit, ExitReason, Failure, Fault, Reply};

use crate::tail::Tail;
use crate::vm::{VmEvent, brief};
use crate::{End, HostError, INVOCATION_LOG_BYTES_MAX, StreamPart};

/// What a failed hook is called that its client gave no name.
const AFTER_RESTORE: &str = "Runtime.AfterRestoreError";

/// A sandbox whose guest has been told its request and is being run.
#[derive(Debug)]
pub(crate) struct Life {
    request_id: String,
    begin: Begin,
    has_begun: bool,
    unique_after: Option<Duration>,
    extensions: bool,
    hooks: Hooks,
    log: Tail,
    /// A streamed answer that has begun.
    stream: Option<Stream>,
    state: State,
}

/// A streamed answer.
#[derive(Debug)]
struct Stream {
    content_type: Option<String>,
    /// Bytes so far.
    total: usize,
}

/// How a guest comes to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// It is claimed and run in one request: `Restore`.
    Claim,
    /// It is paused: `Resume`.
    Resume,
    /// It runs already, and waits for its next invocation (measurements only).
    Continue,
}

impl Begin {
    /// The request that the monitor was sent.
    fn request(self) -> &'static str {
        match self {
            Self::Claim => "restore",
            Self::Resume | Self::Continue => "resume",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The monitor is told to run the guest, and has not said that it does.
    Beginning,
    /// The guest runs; the agent has not yet said that the clone is unique.
    Running,
    /// The clone is unique; its answer is waited for.
    Thawed,
    /// The agent's channel is closed; what ended the guest is waited for.
    Orphaned,
    /// The verdict is out.
    Ended,
}

/// The runtime's hooks for restored clones, as far as it is known that there are any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hooks {
    None,
    Running,
    Done,
}

/// What moves a life on.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time, on the stack, for the moment of a step"
)]
pub(crate) enum Input {
    /// The VM said something.
    Vm(VmEvent),
    /// The invocation's time is over.
    Deadline,
    /// The time between [`Step::Orphaned`] and the news of the guest's end is over.
    GraceOver,
}

/// What comes of an input.
#[derive(Debug)]
pub(crate) enum Step {
    /// Go on.
    Continue,
    /// A piece of the answer, for the caller.
    Part(StreamPart),
    /// The runtime's hooks run, which have a time of their own from the guest's begin. Comes once.
    Restoring,
    /// They have run: the function's time begins. Comes once, after [`Self::Restoring`].
    Restored,
    /// The agent is gone; give the monitor a bounded time to say why.
    Orphaned,
    /// It is over. Comes once.
    Ended(Result<End, HostError>),
}

impl Life {
    pub(crate) fn new(request_id: String, begin: Begin) -> Self {
        Self {
            request_id,
            begin,
            has_begun: begin == Begin::Continue,
            unique_after: None,
            extensions: false,
            hooks: Hooks::None,
            log: Tail::new(INVOCATION_LOG_BYTES_MAX),
            stream: None,
            state: match begin {
                Begin::Claim | Begin::Resume => State::Beginning,
                Begin::Continue => State::Running,
            },
        }
    }

    /// Whether the guest is known to run or to have run.
    pub(crate) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// How long the agent says that it took to make the clone unique: a guest's word, any number.
    pub(crate) fn unique_after(&self) -> Option<Duration> {
        self.unique_after
    }

    /// Whether the guest said that it has extensions: something follows its answer.
    pub(crate) fn has_extensions(&self) -> bool {
        self.extensions
    }

    /// The output so far.
    pub(crate) fn take_log(&mut self) -> Vec<u8> {
        self.log.take()
    }

    pub(crate) fn step(&mut self, input: Input) -> Step {
        if self.state == State::Ended {
            return Step::Continue;
        }
        if let Input::Vm(VmEvent::Agent(_) | VmEvent::Exited(_) | VmEvent::Reply(Reply::Done)) =
            input
        {
            self.has_begun = true;
        }
        let step = match input {
            Input::Deadline if self.hooks == Hooks::Running => {
                Step::Ended(Ok(End::RestoreTimedOut))
            }
            Input::Deadline => Step::Ended(Ok(End::TimedOut)),
            Input::GraceOver if self.state == State::Orphaned => {
                guest_fault("agent closed its channel".into())
            }
            Input::GraceOver => Step::Continue,
            Input::Vm(VmEvent::Agent(message)) => self.heard(message),
            Input::Vm(VmEvent::AgentClosed) => {
                self.state = State::Orphaned;
                Step::Orphaned
            }
            Input::Vm(VmEvent::AgentBroken(detail)) => guest_fault(detail),
            Input::Vm(VmEvent::Reply(reply)) => self.replied(reply),
            Input::Vm(VmEvent::Exited(exit)) => Step::Ended(died(exit)),
            Input::Vm(VmEvent::MonitorGone(error)) => Step::Ended(Err(error)),
        };
        if matches!(step, Step::Ended(_)) {
            self.state = State::Ended;
        }
        step
    }

    fn replied(&mut self, reply: Reply) -> Step {
        match reply {
            Reply::Done => {
                if self.state == State::Beginning {
                    self.state = State::Running;
                }
                Step::Continue
            }
            Reply::Failed(source) => Step::Ended(Err(HostError::Refused {
                request: self.begin.request(),
                source,
            })),
            Reply::Saved(_) | Reply::Rewound(_) | Reply::WorkingSet(_) | Reply::Status(_) => {
                Step::Ended(Err(HostError::UnexpectedReply {
                    request: self.begin.request(),
                    reply: "an answer to another request",
                }))
            }
        }
    }

    fn heard(&mut self, message: AgentMessage) -> Step {
        let thawed = self.state == State::Thawed;
        match message {
            // The reply to `Resume` may be overtaken by the guest, on the other socket.
            AgentMessage::Thawed {
                unique_after_ns,
                extensions,
            } => {
                self.state = State::Thawed;
                self.extensions = extensions;
                self.unique_after = unique_after_ns.map(Duration::from_nanos);
                Step::Continue
            }
            AgentMessage::Log { bytes, .. } => {
                self.log.push(&bytes);
                Step::Continue
            }
            AgentMessage::Restoring if self.hooks == Hooks::None && thawed => {
                self.hooks = Hooks::Running;
                Step::Restoring
            }
            AgentMessage::Restored if self.hooks == Hooks::Running => {
                self.hooks = Hooks::Done;
                Step::Restored
            }
            // A guest does not get more time by saying so again.
            AgentMessage::Restoring | AgentMessage::Restored => {
                guest_fault("agent told of hooks out of order".into())
            }
            // The runtime asks for its next request; there is none.
            AgentMessage::Ready => Step::Continue,
            AgentMessage::Response(reply) => {
                if let Some(broken) = self.not_an_answer(thawed, &reply.request_id) {
                    return guest_fault(broken);
                }
                if reply.payload.len() > RESPONSE_BYTES_MAX {
                    let bytes = reply.payload.len();
                    return guest_fault(format!(
                        "agent sent a response of {bytes} bytes, limit is {RESPONSE_BYTES_MAX}"
                    ));
                }
                Step::Ended(Ok(End::Response {
                    payload: Bytes::from(reply.payload),
                    content_type: reply.content_type,
                }))
            }
            AgentMessage::ResponseBegin(begin) => {
                if let Some(broken) = self.not_an_answer(thawed, &begin.request_id) {
                    return guest_fault(broken);
                }
                self.stream = Some(Stream {
                    content_type: begin.content_type.clone(),
                    total: 0,
                });
                Step::Part(StreamPart::Head {
                    content_type: begin.content_type,
                })
            }
            AgentMessage::ResponseChunk(bytes) => {
                let Some(stream) = &mut self.stream else {
                    return guest_fault("agent sent a piece of no answer".into());
                };
                if bytes.is_empty() || bytes.len() > STREAM_CHUNK_BYTES_MAX {
                    let bytes = bytes.len();
                    return guest_fault(format!(
                        "agent sent a piece of {bytes} bytes, limit is {STREAM_CHUNK_BYTES_MAX}"
                    ));
                }
                stream.total = stream.total.saturating_add(bytes.len());
                if stream.total > STREAM_BYTES_MAX {
                    return guest_fault(format!(
                        "agent streamed a response over the limit of {STREAM_BYTES_MAX} bytes"
                    ));
                }
                Step::Part(StreamPart::Chunk(bytes.into()))
            }
            AgentMessage::ResponseEnd(end) => self.stream_ended(end),
            AgentMessage::InvocationError(error) => {
                if let Some(broken) = self.not_an_answer(thawed, &error.request_id) {
                    return guest_fault(broken);
                }
                Step::Ended(Ok(End::FunctionError {
                    error_type: error.error_type,
                    document: Bytes::from(error.payload),
                }))
            }
            AgentMessage::RestoreError(error) => {
                if let Some(broken) = self.not_an_answer(thawed, &error.request_id) {
                    return guest_fault(broken);
                }
                Step::Ended(Ok(End::RestoreError {
                    error_type: error.error_type.unwrap_or_else(|| AFTER_RESTORE.into()),
                    document: Bytes::from(error.payload),
                }))
            }
            AgentMessage::RuntimeExit(exit) => Step::Ended(Ok(End::RuntimeExit(exit))),
            AgentMessage::Fatal { message } => {
                guest_fault(format!("agent cannot go on: {message}"))
            }
            AgentMessage::Settled => guest_fault("agent settled what it had not answered".into()),
            AgentMessage::Hello { .. } => guest_fault("agent started anew after the thaw".into()),
            AgentMessage::InitError(error) => guest_fault(format!(
                "agent reported {} after the thaw",
                error.error_type
            )),
        }
    }

    fn stream_ended(&mut self, end: StreamEnd) -> Step {
        let Some(stream) = self.stream.take() else {
            return guest_fault("agent ended no answer".into());
        };
        if end.request_id != self.request_id {
            return guest_fault("agent answered another request".into());
        }
        Step::Ended(Ok(match end.failure {
            Some(failure) => End::FunctionError {
                error_type: Some(failure.error_type),
                document: Bytes::from(failure.document),
            },
            None => End::Response {
                payload: Bytes::new(),
                content_type: stream.content_type,
            },
        }))
    }

    /// Fail closed: an answer from a clone that never said it was unique is none.
    fn not_an_answer(&self, thawed: bool, request_id: &str) -> Option<String> {
        if !thawed {
            Some("agent answered before it was thawed".into())
        } else if request_id != self.request_id {
            Some("agent answered another request".into())
        } else if self.stream.is_some() {
            Some("agent answered twice".into())
        } else {
            None
        }
    }
}

fn guest_fault(detail: String) -> Step {
    Step::Ended(Ok(End::GuestDied {
        reason: ExitReason::GuestFault,
        detail: brief(detail),
        console: String::new(),
    }))
}

fn died(exit: Exit) -> Result<End, HostError> {
    if exit.reason == ExitReason::HostFault {
        return Err(HostError::Refused {
            request: "run the guest",
            source: Failure {
                message: exit.detail,
                fault: Fault::Host,
            },
        });
    }
    Ok(End::GuestDied {
        reason: exit.reason,
        detail: exit.detail,
        console: exit.console,
    })
}

#[cfg(test)]
mod tests;
