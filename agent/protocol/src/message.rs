//! Messages: what a frame means, in both directions.
//!
//! Order of a sandbox's life as seen on the channel:
//! `Hello` ← · `Configure` → · `Log`* ← · `Ready` ← (the snapshot is taken here) or `InitError`/`RuntimeExit` ← ·
//! then, in each clone: `Thaw` → · `Invoke` → · `Thawed` ← · `Log`* ← · `Response`, `InvocationError`, `RestoreError` or
//! `RuntimeExit` ←. A runtime that has hooks for restored clones: `Restoring` ← after `Thawed`, `Restored` ← when they are done. A streamed response is `ResponseBegin` ← · `ResponseChunk`* ← · `ResponseEnd` ←, with `Log`s between.
//! With extensions, `Log`* ← · `Settled` ← follow. `Shutdown` → is said to a clone with extensions whose time is over.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::frame::{Frame, FrameError, Generation};

/// Names of the environment and of the process, sent once before the runtime starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configure {
    /// Program that speaks the Runtime API, tried in order; the first that exists and is executable runs.
    pub bootstrap: Vec<String>,
    /// The runtime's whole environment, but for `AWS_LAMBDA_RUNTIME_API` and `THAW_GENERATION_FILE`, which the agent adds.
    pub environment: BTreeMap<String, String>,
    /// Longest time from start to the first `/invocation/next`, milliseconds.
    pub init_limit_ms: u64,
    /// Host name while the snapshot is built.
    pub hostname: String,
    /// The function's account, for extensions that ask for it.
    #[serde(default)]
    pub account_id: Option<String>,
    /// Set up `eth0` as [`crate::network`] says, before anything of the function runs. The VM must have a network device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub network: bool,
    /// A certificate (PEM) that the function's programs are to trust: it is added to [`crate::network::AUTHORITIES_FILE`]. With a network alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
}

/// Makes a clone unique. Always the first message after a restore; no request runs before it is carried out. A guest
/// restored from a snapshot without a function gets one before its `Configure`, too, so that the function starts with a
/// right clock and randomness of its own; invocations are refused in that generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thaw {
    /// Wall clock, nanoseconds since the Unix epoch.
    pub unix_time_ns: u64,
    /// Host name of this clone.
    pub hostname: String,
    /// Fresh random bytes for the kernel's generator; 64 of them. In the body of the frame.
    #[serde(skip)]
    pub entropy: Vec<u8>,
}

/// One invocation. The payload (at most [`crate::PAYLOAD_BYTES_MAX`] bytes) is the body of the frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoke {
    /// `Lambda-Runtime-Aws-Request-Id`.
    pub request_id: String,
    /// Wall-clock deadline, milliseconds since the Unix epoch: `Lambda-Runtime-Deadline-Ms`.
    pub deadline_unix_ms: u64,
    /// `Lambda-Runtime-Invoked-Function-Arn`.
    pub function_arn: String,
    /// `Lambda-Runtime-Trace-Id`.
    #[serde(default)]
    pub trace_id: Option<String>,
    /// Decoded JSON for `Lambda-Runtime-Client-Context`.
    #[serde(default)]
    pub client_context: Option<String>,
    /// JSON for `Lambda-Runtime-Cognito-Identity`.
    #[serde(default)]
    pub cognito_identity: Option<String>,
    /// The event, JSON bytes.
    #[serde(skip)]
    pub payload: Vec<u8>,
}

/// A successful answer, from `POST …/response`. The answer's bytes are the body of the frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The invocation answered.
    pub request_id: String,
    /// Content-Type as the runtime sent it.
    #[serde(default)]
    pub content_type: Option<String>,
    /// The answer, at most [`crate::RESPONSE_BYTES_MAX`] bytes.
    #[serde(skip)]
    pub payload: Vec<u8>,
}

/// The beginning of a streamed response: a `POST …/response` in response mode `streaming` of which the head was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamBegin {
    /// The invocation answered.
    pub request_id: String,
    /// Content-Type as the runtime sent it; `application/vnd.awslambda.http-integration-response` announces a prelude.
    #[serde(default)]
    pub content_type: Option<String>,
}

/// The end of a streamed response.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEnd {
    /// The invocation answered.
    pub request_id: String,
    /// Why it ended early; `None`: it is whole.
    #[serde(default)]
    pub failure: Option<StreamFailure>,
}

/// A streamed response that failed midway: what its trailers report, or what the agent found. The error document is the
/// body of the frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamFailure {
    /// `Lambda-Runtime-Function-Error-Type`, or the agent's own finding (`Runtime.TruncatedResponse`).
    pub error_type: String,
    /// The error document.
    #[serde(skip)]
    pub document: Vec<u8>,
}

/// A function's own error, from `POST …/error`. The error document is the body of the frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvocationError {
    /// The invocation that failed.
    pub request_id: String,
    /// `Lambda-Runtime-Function-Error-Type`, when sent.
    #[serde(default)]
    pub error_type: Option<String>,
    /// The error document: `{"errorMessage":…,"errorType":…,"stackTrace":…}`.
    #[serde(skip)]
    pub payload: Vec<u8>,
}

/// A failure before the first `/invocation/next`, from `POST …/init/error`. The error document is the body of the frame.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitError {
    /// `Lambda-Runtime-Function-Error-Type`, or the agent's own finding (`Runtime.InvalidEntrypoint`, `Sandbox.Timedout`).
    pub error_type: String,
    /// The error document.
    #[serde(skip)]
    pub payload: Vec<u8>,
}

/// How the runtime process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuntimeExitCause {
    /// `exit(code)`.
    Code(i32),
    /// Ended by this signal number.
    Signal(i32),
}

/// The runtime process ended, which it should not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeExit {
    /// How it ended.
    pub cause: RuntimeExitCause,
    /// The kernel's out-of-memory killer struck since the runtime started.
    #[serde(default)]
    pub out_of_memory: bool,
    /// The invocation that was running, if one was.
    #[serde(default)]
    pub request_id: Option<String>,
}

/// Where output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogStream {
    /// File descriptor 1.
    Stdout,
    /// File descriptor 2.
    Stderr,
}

/// From the host to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMessage {
    /// Start the runtime.
    Configure(Configure),
    /// Become a clone of your own; the frame's generation is the new one.
    Thaw(Thaw),
    /// Answer the waiting `/invocation/next` with this.
    Invoke(Invoke),
    /// End extensions (the event `SHUTDOWN`) and the runtime (SIGTERM, then SIGKILL) and power off. While an invocation
    /// runs, it means that its time is over.
    Shutdown,
}

/// From the agent to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentMessage {
    /// The agent is up; its version for people.
    Hello {
        /// The agent's package version.
        agent_version: String,
    },
    /// The runtime blocks in `/invocation/next` or `/restore/next` for the first time: freeze now.
    Ready,
    /// The function failed before it was ready.
    InitError(InitError),
    /// The clone is unique; clocks, the kernel's generator, names and ids are set. Comes before any other message of its
    /// generation, not necessarily at once: a short invocation's answer travels in the same write.
    Thawed {
        /// What that took, nanoseconds of the guest's monotonic clock. Agents of older snapshots do not tell.
        unique_after_ns: Option<u64>,
        /// Extensions take part in this sandbox: a [`Self::Settled`] follows its answer, or its failure.
        extensions: bool,
    },
    /// The runtime runs its hooks for restored clones, before it takes the invocation. Follows [`Self::Thawed`].
    Restoring,
    /// It has run them, and takes the invocation. Follows [`Self::Restoring`], not necessarily at once.
    Restored,
    /// Output of the runtime and of extensions, at most 64 KiB a message; the bytes are the body of the frame.
    Log {
        /// Where it came from.
        stream: LogStream,
        /// The bytes, as written.
        bytes: Vec<u8>,
    },
    /// The function answered.
    Response(Reply),
    /// The function begins to answer in pieces.
    ResponseBegin(StreamBegin),
    /// The next piece, not empty, at most [`crate::STREAM_CHUNK_BYTES_MAX`] bytes; of all pieces together
    /// [`crate::STREAM_BYTES_MAX`]. The bytes are the body of the frame.
    ResponseChunk(Vec<u8>),
    /// The function has answered, or failed to.
    ResponseEnd(StreamEnd),
    /// The function raised.
    InvocationError(InvocationError),
    /// A hook for restored clones failed, from `POST …/restore/error`: the function's handler never saw the invocation.
    /// Agents of older snapshots send [`Self::InvocationError`].
    RestoreError(InvocationError),
    /// The runtime process ended.
    RuntimeExit(RuntimeExit),
    /// The invocation is over for the extensions, too, and they were told that the sandbox ends: nothing that matters comes any
    /// more. Only from sandboxes whose [`Self::Thawed`] said that there are extensions.
    Settled,
    /// The agent cannot go on; for people and logs.
    Fatal {
        /// What failed, and on what.
        message: String,
    },
}

/// Why a frame is not a message. The peer is at fault: end the sandbox.
#[derive(Debug, Error)]
pub enum MessageError {
    /// No such message in this direction.
    #[error("agent frame has unknown kind {0}")]
    Kind(u8),
    /// The head is not what the kind demands.
    #[error("head of agent message kind {kind} is malformed")]
    Head {
        /// The frame's kind.
        kind: u8,
        /// What JSON found.
        #[source]
        source: serde_json::Error,
    },
    /// The message is over a limit of the frame.
    #[error("agent message does not fit a frame")]
    Frame(#[from] FrameError),
}

const CONFIGURE: u8 = 1;
const THAW: u8 = 2;
const INVOKE: u8 = 3;
const SHUTDOWN: u8 = 4;
const HELLO: u8 = 65;
const READY: u8 = 66;
const INIT_ERROR: u8 = 67;
const THAWED: u8 = 68;
const LOG: u8 = 69;
const RESPONSE: u8 = 70;
const INVOCATION_ERROR: u8 = 71;
const RUNTIME_EXIT: u8 = 72;
const FATAL: u8 = 73;
const RESTORE_ERROR: u8 = 74;
const RESPONSE_BEGIN: u8 = 75;
const RESPONSE_CHUNK: u8 = 76;
const RESPONSE_END: u8 = 77;
const SETTLED: u8 = 78;
const RESTORING: u8 = 79;
const RESTORED: u8 = 80;

#[derive(Serialize, Deserialize)]
struct HelloHead {
    agent_version: String,
}

#[derive(Serialize, Deserialize)]
struct LogHead {
    stream: LogStream,
}

#[derive(Serialize, Deserialize)]
struct ThawedHead {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unique_after_ns: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    extensions: bool,
}

#[derive(Serialize, Deserialize)]
struct FatalHead {
    message: String,
}

#[derive(Serialize, Deserialize)]
struct Empty {}

fn frame<T: Serialize>(
    kind: u8,
    generation: Generation,
    head: &T,
    body: Vec<u8>,
) -> Result<Frame, MessageError> {
    let head = serde_json::to_vec(head).map_err(|source| MessageError::Head { kind, source })?;
    Ok(Frame {
        kind,
        generation,
        head,
        body,
    })
}

fn head<'a, T: Deserialize<'a>>(frame: &'a Frame) -> Result<T, MessageError> {
    serde_json::from_slice(&frame.head).map_err(|source| MessageError::Head {
        kind: frame.kind,
        source,
    })
}

/// Both directions: a message is written to bytes in a generation, and read back from a frame.
pub trait Message: Sized {
    /// The message as a frame of `generation`. The body is moved, not copied.
    ///
    /// # Errors
    /// The head cannot be written as JSON.
    fn into_frame(self, generation: Generation) -> Result<Frame, MessageError>;

    /// Reads a frame's meaning.
    ///
    /// # Errors
    /// A kind of the other direction or of the future, or a malformed head.
    fn from_frame(frame: Frame) -> Result<Self, MessageError>;

    /// Appends the message's bytes to `out`.
    ///
    /// # Errors
    /// The message is over a limit of the frame.
    fn encode(self, generation: Generation, out: &mut Vec<u8>) -> Result<(), MessageError> {
        Ok(self.into_frame(generation)?.encode(out)?)
    }
}

impl Message for HostMessage {
    fn into_frame(self, generation: Generation) -> Result<Frame, MessageError> {
        match self {
            Self::Configure(configure) => frame(CONFIGURE, generation, &configure, Vec::new()),
            Self::Thaw(mut thaw) => {
                let entropy = std::mem::take(&mut thaw.entropy);
                frame(THAW, generation, &thaw, entropy)
            }
            Self::Invoke(mut invoke) => {
                let payload = std::mem::take(&mut invoke.payload);
                frame(INVOKE, generation, &invoke, payload)
            }
            Self::Shutdown => frame(SHUTDOWN, generation, &Empty {}, Vec::new()),
        }
    }

    fn from_frame(frame: Frame) -> Result<Self, MessageError> {
        match frame.kind {
            CONFIGURE => Ok(Self::Configure(head(&frame)?)),
            THAW => Ok(Self::Thaw(Thaw {
                entropy: frame.body.clone(),
                ..head(&frame)?
            })),
            INVOKE => {
                let invoke: Invoke = head(&frame)?;
                Ok(Self::Invoke(Invoke {
                    payload: frame.body,
                    ..invoke
                }))
            }
            SHUTDOWN => head::<Empty>(&frame).map(|_| Self::Shutdown),
            kind => Err(MessageError::Kind(kind)),
        }
    }
}

impl Message for AgentMessage {
    fn into_frame(self, generation: Generation) -> Result<Frame, MessageError> {
        match self {
            Self::Hello { agent_version } => {
                frame(HELLO, generation, &HelloHead { agent_version }, Vec::new())
            }
            Self::Ready => frame(READY, generation, &Empty {}, Vec::new()),
            Self::InitError(mut error) => {
                let payload = std::mem::take(&mut error.payload);
                frame(INIT_ERROR, generation, &error, payload)
            }
            Self::Thawed {
                unique_after_ns,
                extensions,
            } => {
                let head = ThawedHead {
                    unique_after_ns,
                    extensions,
                };
                frame(THAWED, generation, &head, Vec::new())
            }
            Self::Log { stream, bytes } => frame(LOG, generation, &LogHead { stream }, bytes),
            Self::Response(mut reply) => {
                let payload = std::mem::take(&mut reply.payload);
                frame(RESPONSE, generation, &reply, payload)
            }
            Self::ResponseBegin(begin) => frame(RESPONSE_BEGIN, generation, &begin, Vec::new()),
            Self::ResponseChunk(bytes) => frame(RESPONSE_CHUNK, generation, &Empty {}, bytes),
            Self::ResponseEnd(mut end) => {
                let document = end
                    .failure
                    .as_mut()
                    .map(|f| std::mem::take(&mut f.document));
                frame(RESPONSE_END, generation, &end, document.unwrap_or_default())
            }
            Self::InvocationError(mut error) => {
                let payload = std::mem::take(&mut error.payload);
                frame(INVOCATION_ERROR, generation, &error, payload)
            }
            Self::RestoreError(mut error) => {
                let payload = std::mem::take(&mut error.payload);
                frame(RESTORE_ERROR, generation, &error, payload)
            }
            Self::RuntimeExit(exit) => frame(RUNTIME_EXIT, generation, &exit, Vec::new()),
            Self::Settled => frame(SETTLED, generation, &Empty {}, Vec::new()),
            Self::Restoring => frame(RESTORING, generation, &Empty {}, Vec::new()),
            Self::Restored => frame(RESTORED, generation, &Empty {}, Vec::new()),
            Self::Fatal { message } => frame(FATAL, generation, &FatalHead { message }, Vec::new()),
        }
    }

    fn from_frame(frame: Frame) -> Result<Self, MessageError> {
        match frame.kind {
            HELLO => head::<HelloHead>(&frame).map(|h| Self::Hello {
                agent_version: h.agent_version,
            }),
            READY => head::<Empty>(&frame).map(|_| Self::Ready),
            INIT_ERROR => {
                let error: InitError = head(&frame)?;
                Ok(Self::InitError(InitError {
                    payload: frame.body,
                    ..error
                }))
            }
            THAWED => head::<ThawedHead>(&frame).map(|h| Self::Thawed {
                unique_after_ns: h.unique_after_ns,
                extensions: h.extensions,
            }),
            LOG => {
                let LogHead { stream } = head(&frame)?;
                Ok(Self::Log {
                    stream,
                    bytes: frame.body,
                })
            }
            RESPONSE => {
                let reply: Reply = head(&frame)?;
                Ok(Self::Response(Reply {
                    payload: frame.body,
                    ..reply
                }))
            }
            RESPONSE_BEGIN => Ok(Self::ResponseBegin(head(&frame)?)),
            RESPONSE_CHUNK => {
                head::<Empty>(&frame)?;
                Ok(Self::ResponseChunk(frame.body))
            }
            RESPONSE_END => {
                let mut end: StreamEnd = head(&frame)?;
                if let Some(failure) = &mut end.failure {
                    failure.document = frame.body;
                }
                Ok(Self::ResponseEnd(end))
            }
            INVOCATION_ERROR => {
                let error: InvocationError = head(&frame)?;
                Ok(Self::InvocationError(InvocationError {
                    payload: frame.body,
                    ..error
                }))
            }
            RESTORE_ERROR => {
                let error: InvocationError = head(&frame)?;
                Ok(Self::RestoreError(InvocationError {
                    payload: frame.body,
                    ..error
                }))
            }
            RUNTIME_EXIT => Ok(Self::RuntimeExit(head(&frame)?)),
            SETTLED => head::<Empty>(&frame).map(|_| Self::Settled),
            RESTORING => head::<Empty>(&frame).map(|_| Self::Restoring),
            RESTORED => head::<Empty>(&frame).map(|_| Self::Restored),
            FATAL => head::<FatalHead>(&frame).map(|h| Self::Fatal { message: h.message }),
            kind => Err(MessageError::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<M: Message + Clone + PartialEq + std::fmt::Debug>(message: M) {
        let frame = message.clone().into_frame(Generation(7)).unwrap();
        assert_eq!(frame.generation, Generation(7));
        assert_eq!(M::from_frame(frame).unwrap(), message);
    }

    #[test]
    fn every_message_survives_the_round_trip() {
        round_trip(HostMessage::Configure(Configure {
            bootstrap: vec!["/var/runtime/bootstrap".into()],
            environment: BTreeMap::from([("TZ".into(), ":UTC".into())]),
            init_limit_ms: 10_000,
            hostname: "sandbox".into(),
            account_id: Some("000000000000".into()),
            network: true,
            authority: Some("-----BEGIN CERTIFICATE-----".into()),
        }));
        round_trip(HostMessage::Thaw(Thaw {
            unix_time_ns: 5,
            hostname: "a".into(),
            entropy: vec![1; 64],
        }));
        round_trip(HostMessage::Invoke(Invoke {
            request_id: "r".into(),
            payload: b"{}".to_vec(),
            ..Invoke::default()
        }));
        round_trip(HostMessage::Shutdown);
        round_trip(AgentMessage::Hello {
            agent_version: "0.1.0".into(),
        });
        round_trip(AgentMessage::Ready);
        round_trip(AgentMessage::Thawed {
            unique_after_ns: Some(u64::MAX),
            extensions: true,
        });
        round_trip(AgentMessage::Settled);
        round_trip(AgentMessage::Restoring);
        round_trip(AgentMessage::Restored);
        round_trip(AgentMessage::InitError(InitError {
            error_type: "Runtime.ImportModuleError".into(),
            payload: b"{}".to_vec(),
        }));
        round_trip(AgentMessage::Log {
            stream: LogStream::Stderr,
            bytes: b"x\n".to_vec(),
        });
        round_trip(AgentMessage::Response(Reply {
            request_id: "r".into(),
            content_type: None,
            payload: vec![0; 10],
        }));
        round_trip(AgentMessage::InvocationError(InvocationError {
            request_id: "r".into(),
            ..InvocationError::default()
        }));
        round_trip(AgentMessage::ResponseBegin(StreamBegin {
            request_id: "r".into(),
            content_type: Some("text/event-stream".into()),
        }));
        round_trip(AgentMessage::ResponseChunk(b"data: 1\n\n".to_vec()));
        round_trip(AgentMessage::ResponseEnd(StreamEnd {
            request_id: "r".into(),
            failure: None,
        }));
        round_trip(AgentMessage::ResponseEnd(StreamEnd {
            request_id: "r".into(),
            failure: Some(StreamFailure {
                error_type: "E".into(),
                document: b"{}".to_vec(),
            }),
        }));
        round_trip(AgentMessage::RestoreError(InvocationError {
            request_id: "r".into(),
            error_type: Some("Runtime.AfterRestoreError".into()),
            payload: b"{}".to_vec(),
        }));
        round_trip(AgentMessage::RuntimeExit(RuntimeExit {
            cause: RuntimeExitCause::Signal(9),
            out_of_memory: true,
            request_id: None,
        }));
        round_trip(AgentMessage::Fatal {
            message: "no disk".into(),
        });
    }

    #[test]
    fn a_message_of_the_other_direction_is_refused() {
        let frame = AgentMessage::Ready.into_frame(Generation(0)).unwrap();
        assert!(matches!(
            HostMessage::from_frame(frame),
            Err(MessageError::Kind(READY))
        ));
    }

    #[test]
    fn an_older_agents_thawed_tells_no_time() {
        let frame = Frame {
            kind: THAWED,
            generation: Generation(3),
            head: b"{}".to_vec(),
            body: vec![],
        };
        assert_eq!(
            AgentMessage::from_frame(frame).unwrap(),
            AgentMessage::Thawed {
                unique_after_ns: None,
                extensions: false,
            }
        );
    }

    #[test]
    fn an_older_hosts_configure_asks_for_no_network_and_one_without_says_nothing_of_it() {
        let frame = HostMessage::Configure(Configure::default())
            .into_frame(Generation(0))
            .unwrap();
        assert!(!String::from_utf8_lossy(&frame.head).contains("network"));
        let read = HostMessage::from_frame(frame).unwrap();
        assert_eq!(read, HostMessage::Configure(Configure::default()));
    }

    #[test]
    fn unknown_fields_from_a_newer_peer_are_ignored() {
        let frame = Frame {
            kind: HELLO,
            generation: Generation(0),
            head: br#"{"agent_version":"9","new":1}"#.to_vec(),
            body: vec![],
        };
        assert_eq!(
            AgentMessage::from_frame(frame).unwrap(),
            AgentMessage::Hello {
                agent_version: "9".into()
            }
        );
    }
}
