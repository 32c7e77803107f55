//! The life of one sandbox as a plain state machine: what the VM says goes in, how the invocation ended comes out, once.

use std::time::Duration;

use bytes::Bytes;
use thaw_agent_protocol::{AgentMessage, RESPONSE_BYTES_MAX, STREAM_BYTES_MAX, StreamEnd};
use thaw_vmm_control::{Exit, ExitReason, Failure, Fault, Reply};

use crate::tail::Tail;
use crate::vm::VmEvent;
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
        detail,
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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use thaw_agent_protocol::{
        InitError, InvocationError, LogStream, Reply as Answer, RuntimeExit, RuntimeExitCause,
        StreamBegin, StreamFailure,
    };
    use thaw_vmm_control::Status;

    fn agent(message: AgentMessage) -> Input {
        Input::Vm(VmEvent::Agent(message))
    }

    fn answer(request_id: &str, length: usize) -> AgentMessage {
        AgentMessage::Response(Answer {
            request_id: request_id.into(),
            content_type: None,
            payload: vec![b'x'; length],
        })
    }

    fn exit(reason: ExitReason) -> Input {
        Input::Vm(VmEvent::Exited(Exit {
            reason,
            detail: "why".into(),
            console: "panic".into(),
        }))
    }

    fn thawed() -> Life {
        let mut life = Life::new("r".into(), Begin::Resume);
        life.step(Input::Vm(VmEvent::Reply(Reply::Done)));
        life.step(agent(AgentMessage::Thawed {
            unique_after_ns: None,
            extensions: false,
        }));
        life
    }

    fn end(step: Step) -> End {
        match step {
            Step::Ended(Ok(end)) => end,
            other => panic!("not ended by the guest: {other:?}"),
        }
    }

    fn is_guest_fault(step: Step) -> bool {
        matches!(
            end(step),
            End::GuestDied {
                reason: ExitReason::GuestFault,
                ..
            }
        )
    }

    #[test]
    fn an_answer_after_the_thaw_is_the_end() {
        let mut life = thawed();
        life.step(agent(AgentMessage::Log {
            stream: LogStream::Stdout,
            bytes: b"a".to_vec(),
        }));
        life.step(agent(AgentMessage::Log {
            stream: LogStream::Stderr,
            bytes: b"b".to_vec(),
        }));
        let payload = Bytes::from_static(b"xx");
        assert_eq!(
            end(life.step(agent(answer("r", 2)))),
            End::Response {
                payload,
                content_type: None
            }
        );
        assert_eq!(life.take_log(), b"ab");
        assert!(matches!(life.step(Input::Deadline), Step::Continue));
    }

    #[test]
    fn an_answer_may_overtake_the_reply_to_resume() {
        let mut life = Life::new("r".into(), Begin::Resume);
        life.step(agent(AgentMessage::Thawed {
            unique_after_ns: None,
            extensions: false,
        }));
        life.step(Input::Vm(VmEvent::Reply(Reply::Done)));
        assert!(matches!(
            end(life.step(agent(answer("r", 1)))),
            End::Response { .. }
        ));
    }

    #[test]
    fn an_answer_before_the_thaw_is_a_guest_fault() {
        let mut life = Life::new("r".into(), Begin::Resume);
        life.step(Input::Vm(VmEvent::Reply(Reply::Done)));
        assert!(is_guest_fault(life.step(agent(answer("r", 1)))));
    }

    #[test]
    fn an_answer_to_another_request_is_a_guest_fault() {
        assert!(is_guest_fault(thawed().step(agent(answer("other", 1)))));
    }

    #[test]
    fn a_streamed_answer_comes_in_parts_and_ends_once() {
        let begin = |id: &str| {
            agent(AgentMessage::ResponseBegin(StreamBegin {
                request_id: id.into(),
                content_type: Some("t".into()),
            }))
        };
        let chunk = |length| agent(AgentMessage::ResponseChunk(vec![b'x'; length]));
        let over = |id: &str, failure| {
            agent(AgentMessage::ResponseEnd(StreamEnd {
                request_id: id.into(),
                failure,
            }))
        };
        let streaming = || {
            let mut life = thawed();
            assert!(matches!(
                life.step(begin("r")),
                Step::Part(StreamPart::Head { .. })
            ));
            assert!(
                matches!(life.step(chunk(2)), Step::Part(StreamPart::Chunk(bytes)) if bytes == "xx")
            );
            life
        };
        let content_type = Some("t".into());
        let payload = Bytes::new();
        assert_eq!(
            end(streaming().step(over("r", None))),
            End::Response {
                payload,
                content_type
            }
        );
        let failure = StreamFailure {
            error_type: "E".into(),
            document: b"{}".to_vec(),
        };
        assert!(matches!(
            end(streaming().step(over("r", Some(failure)))),
            End::FunctionError { error_type: Some(kind), .. } if kind == "E"
        ));
        assert!(is_guest_fault(streaming().step(begin("r"))));
        assert!(is_guest_fault(streaming().step(agent(answer("r", 1)))));
        assert!(is_guest_fault(streaming().step(over("q", None))));
        assert!(is_guest_fault(thawed().step(begin("q"))));
        assert!(is_guest_fault(thawed().step(chunk(1))));
        assert!(is_guest_fault(thawed().step(over("r", None))));
        let mut unthawed = Life::new("r".into(), Begin::Resume);
        assert!(is_guest_fault(unthawed.step(begin("r"))));
        let mut life = streaming();
        for _ in 0..STREAM_BYTES_MAX >> 20 {
            assert!(!matches!(life.step(chunk((1 << 20) - 1)), Step::Ended(_)));
        }
        assert!(is_guest_fault(life.step(chunk(1 << 20))));
    }

    #[test]
    fn a_failed_restore_hook_is_an_end_of_its_own_and_only_after_the_thaw() {
        let failed = |request_id: &str| {
            agent(AgentMessage::RestoreError(InvocationError {
                request_id: request_id.into(),
                error_type: None,
                payload: b"{}".to_vec(),
            }))
        };
        assert_eq!(
            end(thawed().step(failed("r"))),
            End::RestoreError {
                error_type: AFTER_RESTORE.into(),
                document: Bytes::from_static(b"{}"),
            }
        );
        assert!(is_guest_fault(thawed().step(failed("other"))));
        let mut life = Life::new("r".into(), Begin::Resume);
        assert!(is_guest_fault(life.step(failed("r"))));
    }

    #[test]
    fn an_answer_over_the_limit_is_a_guest_fault() {
        assert!(is_guest_fault(
            thawed().step(agent(answer("r", RESPONSE_BYTES_MAX + 1)))
        ));
        assert!(matches!(
            end(thawed().step(agent(answer("r", RESPONSE_BYTES_MAX)))),
            End::Response { .. }
        ));
    }

    #[test]
    fn a_closed_channel_waits_for_the_guests_end_but_not_for_ever() {
        let mut life = thawed();
        assert!(matches!(
            life.step(Input::Vm(VmEvent::AgentClosed)),
            Step::Orphaned
        ));
        assert!(matches!(
            end(life.step(exit(ExitReason::Panic))),
            End::GuestDied {
                reason: ExitReason::Panic,
                ..
            }
        ));
        let mut life = thawed();
        life.step(Input::Vm(VmEvent::AgentClosed));
        assert!(is_guest_fault(life.step(Input::GraceOver)));
    }

    #[test]
    fn a_host_fault_and_a_dead_monitor_are_not_the_guests() {
        assert!(matches!(
            thawed().step(exit(ExitReason::HostFault)),
            Step::Ended(Err(HostError::Refused { .. }))
        ));
        let gone = Input::Vm(VmEvent::MonitorGone(HostError::Died {
            stderr: String::new(),
        }));
        assert!(matches!(
            thawed().step(gone),
            Step::Ended(Err(HostError::Died { .. }))
        ));
    }

    fn input() -> impl Strategy<Value = u8> {
        0u8..21
    }

    fn make(kind: u8) -> Input {
        let text = String::new;
        match kind {
            0 => agent(AgentMessage::Thawed {
                unique_after_ns: None,
                extensions: false,
            }),
            1 => agent(AgentMessage::Ready),
            2 => agent(answer("r", 3)),
            3 => agent(answer("q", 3)),
            4 => agent(AgentMessage::InvocationError(InvocationError {
                request_id: "r".into(),
                ..InvocationError::default()
            })),
            5 => agent(AgentMessage::RuntimeExit(RuntimeExit {
                cause: RuntimeExitCause::Code(1),
                out_of_memory: false,
                request_id: None,
            })),
            6 => agent(AgentMessage::InitError(InitError::default())),
            7 => agent(AgentMessage::Fatal { message: text() }),
            8 => agent(AgentMessage::Hello {
                agent_version: text(),
            }),
            9 => agent(AgentMessage::Log {
                stream: LogStream::Stdout,
                bytes: vec![1; 1000],
            }),
            10 => Input::Vm(VmEvent::AgentClosed),
            11 => Input::Vm(VmEvent::AgentBroken(text())),
            12 => Input::Vm(VmEvent::Reply(Reply::Status(Status::default()))),
            13 => Input::Vm(VmEvent::Reply(Reply::Done)),
            14 => Input::GraceOver,
            15 => agent(AgentMessage::ResponseBegin(StreamBegin {
                request_id: "r".into(),
                content_type: None,
            })),
            16 => agent(AgentMessage::ResponseChunk(b"x".to_vec())),
            17 => agent(AgentMessage::ResponseEnd(StreamEnd {
                request_id: "r".into(),
                failure: None,
            })),
            18 => agent(AgentMessage::ResponseEnd(StreamEnd::default())),
            19 => agent(AgentMessage::Settled),
            _ => Input::Deadline,
        }
    }

    proptest! {
        #[test]
        fn every_life_ends_once_and_never_answers_unthawed(inputs in prop::collection::vec(input(), 0..30)) {
            let mut life = Life::new("r".into(), Begin::Resume);
            let (mut ends, mut thawed) = (0, false);
            for kind in inputs {
                thawed |= kind == 0;
                match life.step(make(kind)) {
                    Step::Ended(Ok(End::Response { .. } | End::FunctionError { .. })) => {
                        prop_assert!(thawed);
                        ends += 1;
                    }
                    Step::Ended(_) => ends += 1,
                    Step::Part(_) => prop_assert!(thawed),
                    Step::Continue | Step::Orphaned => {}
                }
            }
            life.step(Input::Deadline);
            prop_assert!(ends <= 1);
            prop_assert_eq!(life.state, State::Ended);
        }
    }
}
