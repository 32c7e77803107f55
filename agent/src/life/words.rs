//! What goes into a [`super::Life`], and what comes out.

use bytes::Bytes;
use thaw_agent_protocol::{
    AgentMessage, Configure, Generation, InitError, InvocationError, Invoke, Reply, StreamBegin,
    StreamEnd, Thaw,
};
use thiserror::Error;

#[cfg(doc)]
use super::Life;
use crate::extensions::{Event, ExtensionAnswer, ExtensionCall, Limit};
use crate::telemetry::Subscription;

/// One invocation as the Runtime API hands it out; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// Everything but the payload, which was taken out.
    pub head: Invoke,
    /// The event's bytes.
    pub payload: Bytes,
}

/// A call of the runtime, or of an extension, whose answer depends on the life of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// `GET …/invocation/next`.
    Next,
    /// `GET …/restore/next`.
    RestoreNext,
    /// `POST …/invocation/{id}/response`.
    Response(Reply),
    /// The head of a `POST …/invocation/{id}/response` in response mode `streaming`.
    ResponseBegin(StreamBegin),
    /// A piece of its body, not empty.
    ResponseChunk {
        /// The id in the path.
        request_id: String,
        /// At most [`thaw_agent_protocol::STREAM_CHUNK_BYTES_MAX`].
        bytes: Bytes,
    },
    /// The end of its body.
    ResponseEnd(StreamEnd),
    /// `POST …/invocation/{id}/response` or `…/error` that cannot be handed on; the id in the path, and why not.
    Unfit(String, Unfit),
    /// `POST …/invocation/{id}/error`, or a response whose trailers say that it failed midway.
    Error(InvocationError),
    /// `POST …/runtime/init/error`.
    InitError(InitError),
    /// `POST …/runtime/restore/error`.
    RestoreError(InitError),
    /// A call of the Extensions API.
    Extension(ExtensionCall),
}

/// Why what a runtime posted for an invocation is not handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It is over [`thaw_agent_protocol::RESPONSE_BYTES_MAX`].
    TooLarge,
    /// It names a response mode that Lambda does not know.
    ResponseMode,
}

/// What the Runtime API answers to a [`Call`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// 200 with an invocation.
    Invocation(Invocation),
    /// 200, empty: go on after the restore.
    Restored,
    /// 202.
    Accepted,
    /// 400: no such invocation is running.
    InvalidRequestId,
    /// 403: not in this phase.
    NotAllowed {
        /// The phase in which the call came.
        from: &'static str,
        /// What the call would have led to.
        to: &'static str,
    },
    /// 413 or 400: what was posted is not handed on; the invocation failed of it.
    Unfit(Unfit),
    /// What the Extensions API answers.
    Extension(ExtensionAnswer),
}

/// What the driver does next; effects are carried out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Keep the current call without an answer. A call parked earlier is turned away.
    Park,
    /// Answer the current call.
    Answer(Answer),
    /// Answer the parked call.
    Wake(Answer),
    /// Tell the host, after all output written so far.
    Send(AgentMessage),
    /// Tell the host, not at once: with what is said next.
    Queue(AgentMessage),
    /// Start the extensions; then [`Life::extensions_launched`].
    Start(Configure),
    /// Start the runtime.
    StartRuntime,
    /// Keep the current call, of this extension, without an answer.
    ParkExtension(usize),
    /// Tell this extension, whose call is parked, of an event.
    WakeExtension(usize, Event),
    /// The extension of this name hears telemetry from now on.
    Subscribe(String, Subscription),
    /// From now on this limit holds for the end of the sandbox, see [`Life::end_limit_passed`].
    Within(Limit),
    /// Become the clone that the host describes, in this generation; tell the host.
    Adopt(Generation, Thaw),
    /// End the runtime's processes at once.
    Kill,
    /// Power off in good order.
    PowerOff,
}

/// The host broke the order of a sandbox's life. The sandbox ends: better no answer than one of the wrong life.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LifeError {
    /// An invocation of another life, or before any thaw.
    #[error("invocation of generation {got} refused in generation {current}")]
    StaleInvocation {
        /// Generation of the frame.
        got: u64,
        /// Generation of this sandbox.
        current: u64,
    },
    /// A thaw that does not begin a new life.
    #[error("thaw to generation {got} refused in generation {current}")]
    StaleThaw {
        /// Generation of the frame.
        got: u64,
        /// Generation of this sandbox.
        current: u64,
    },
    /// A message that has no meaning in this phase.
    #[error("{message} refused while {phase}")]
    OutOfOrder {
        /// The message.
        message: &'static str,
        /// The phase.
        phase: &'static str,
    },
}
