//! One request to a function and what became of it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thaw_agent_protocol::RuntimeExit;
use thaw_vmm_control::{ExitReason, Fault};
use thiserror::Error;
use tokio::sync::watch;

use crate::HostError;
use crate::schedule::Start;

/// Most bytes of output kept for one invocation; of more, the newest are kept behind a note.
pub const INVOCATION_LOG_BYTES_MAX: usize = 256 * 1024;

/// One request to a function.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// Unique; the guest sees it as `Lambda-Runtime-Aws-Request-Id`.
    pub request_id: String,
    /// `Lambda-Runtime-Invoked-Function-Arn`.
    pub function_arn: String,
    /// JSON, at most [`thaw_agent_protocol::PAYLOAD_BYTES_MAX`] bytes.
    pub payload: Bytes,
    /// Longest time from the guest's resume to its answer. The VM is destroyed then.
    pub timeout: Duration,
    /// Decoded JSON of the client context.
    pub client_context: Option<String>,
    /// JSON of the Cognito identity.
    pub cognito_identity: Option<String>,
    /// `Lambda-Runtime-Trace-Id`.
    pub trace_id: Option<String>,
    /// Whether to ask the monitor for its moments after the answer.
    pub measure: Measure,
}

/// What comes of an answer before the outcome, for [`crate::Pool::invoke_streaming`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamPart {
    /// The function begins to answer. Comes first, once; not at all if the function fails before.
    Head {
        /// As the function's runtime sent it; `application/vnd.awslambda.http-integration-response` announces a prelude.
        content_type: Option<String>,
    },
    /// The next bytes, not empty, as the guest wrote them: at most [`thaw_agent_protocol::STREAM_CHUNK_BYTES_MAX`] of a stream,
    /// [`thaw_agent_protocol::RESPONSE_BYTES_MAX`] of an answer that the function gave whole.
    Chunk(Bytes),
}

/// Whether an invocation is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Measure {
    /// Only [`Outcome::duration`].
    #[default]
    Off,
    /// [`Outcome::timings`] too, at the price of one more round trip to the monitor after the answer.
    On,
}

/// What became of an invocation that ran.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// Standard output and error of the function, in order of arrival, at most [`INVOCATION_LOG_BYTES_MAX`] bytes and a note.
    pub log: Vec<u8>,
    /// From the resume of the guest to its answer or end.
    pub duration: Duration,
    /// How its sandbox was had.
    pub start: Start,
    /// With [`Measure::On`], when the guest answered.
    pub timings: Option<InvocationTimings>,
    /// What the function's extensions write after the answer; none where the function has no extensions.
    pub late_log: Option<LateLog>,
}

/// Output that comes when the outcome is known already. Clones are the same output.
#[derive(Clone, Debug)]
pub struct LateLog(watch::Receiver<Option<Vec<u8>>>);

impl LateLog {
    /// One that [`watch::Sender::send_replace`] of the first completes; dropped, it is empty.
    pub(crate) fn new() -> (watch::Sender<Option<Vec<u8>>>, Self) {
        let (sender, receiver) = watch::channel(None);
        (sender, Self(receiver))
    }

    /// The whole of it, at most [`INVOCATION_LOG_BYTES_MAX`] bytes and a note, when the sandbox is done: within the function's
    /// time and what the shutdown of extensions takes.
    pub async fn whole(mut self) -> Vec<u8> {
        match self.0.wait_for(Option::is_some).await {
            Ok(log) => log.clone().unwrap_or_default(),
            // The sandbox was ended, and with it what it had to say.
            Err(_) => Vec::new(),
        }
    }
}

/// How an invocation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The function answered.
    Response {
        /// The answer, at most [`thaw_agent_protocol::RESPONSE_BYTES_MAX`] bytes; empty when it was streamed.
        payload: Bytes,
        /// As the function's runtime sent it.
        content_type: Option<String>,
    },
    /// The function raised.
    FunctionError {
        /// `Lambda-Runtime-Function-Error-Type`, when sent.
        error_type: Option<String>,
        /// The error document as the function's runtime wrote it, JSON.
        document: Bytes,
    },
    /// A hook for restored clones failed; the handler never saw the request. Agents of older snapshots say
    /// [`Self::FunctionError`] with the same type.
    RestoreError {
        /// `Lambda-Runtime-Function-Error-Type`: `Runtime.AfterRestoreError` from the clients that have hooks.
        error_type: String,
        /// The error document as the function's runtime wrote it, JSON.
        document: Bytes,
    },
    /// Hooks for restored clones were not done within [`crate::RuntimeConfig::hooks_limit`]; the handler never saw the request,
    /// and the VM is gone.
    RestoreTimedOut,
    /// No answer within [`Invocation::timeout`]; the VM is gone.
    TimedOut,
    /// The function's process ended.
    RuntimeExit(RuntimeExit),
    /// The guest itself ended, or broke its protocol.
    GuestDied {
        /// What ended it.
        reason: ExitReason,
        /// For people.
        detail: String,
        /// The last bytes of its serial console.
        console: String,
    },
}

/// Why an invocation did not run, or is not known to have run to its end.
#[derive(Clone, Debug, Error)]
pub enum InvokeError {
    /// No sandbox within the limits of the function and of the machine.
    #[error("throttled: {reason}, {running} running, {waiting} waiting")]
    Throttled {
        /// Which limit was met.
        reason: ThrottleReason,
        /// Invocations running at that moment.
        running: usize,
        /// Invocations waiting at that moment.
        waiting: usize,
    },
    /// The payload or a head field is over a limit of the agent protocol.
    #[error("request does not fit the agent protocol")]
    TooLarge(#[source] Arc<thaw_agent_protocol::MessageError>),
    /// The receiver of [`crate::Pool::invoke_streaming`] was dropped: nobody waits for the answer, and the VM is gone.
    #[error("nobody takes the answer any more")]
    Abandoned,
    /// The pool is closed.
    #[error("the pool is closed")]
    Closed,
    /// This machine failed the invocation.
    #[error("this host failed the invocation")]
    Host(#[source] Arc<HostError>),
}

impl InvokeError {
    /// Whether this host refuses the snapshot itself: no attempt will succeed, but one frozen here would. It was taken on another
    /// processor, for instance.
    #[must_use]
    pub fn refuses_snapshot(&self) -> bool {
        let Self::Host(error) = self else {
            return false;
        };
        matches!(
            &**error,
            HostError::Refused { request: "restore", source } if source.fault == Fault::Caller
        )
    }

    /// Whose fault it is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Throttled { .. } | Self::TooLarge(_) | Self::Abandoned => Fault::Caller,
            Self::Closed | Self::Host(_) => Fault::Host,
        }
    }
}

/// Which limit a throttled invocation met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThrottleReason {
    /// [`crate::PoolSpec::queue_max`] invocations wait already.
    QueueFull,
    /// [`crate::PoolSpec::queue_wait_max`] went by while the function ran as much as it may.
    WaitedTooLong,
    /// [`crate::PoolSpec::queue_wait_max`] went by while the machine had no memory or processor left to run it.
    MachineFull,
    /// The function alone is larger than the machine's budget.
    TooBig,
}

impl std::fmt::Display for ThrottleReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::QueueFull => "the queue is full",
            Self::WaitedTooLong => "no sandbox came free in time",
            Self::MachineFull => "the machine had no room in time",
            Self::TooBig => "the function is larger than the machine's budget",
        })
    }
}

/// Where an invocation's time went: durations between consecutive moments, all on this host's `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InvocationTimings {
    /// From [`crate::Pool::invoke`] to the claim of a VM.
    pub queued: Duration,
    /// From the claim to the guest's first instruction.
    pub claim_to_first_instruction: Duration,
    /// From there to the first byte from the agent.
    pub first_instruction_to_agent_byte: Duration,
    /// From there to the whole response.
    pub agent_byte_to_response: Duration,
    /// What was done ahead of the request: from the monitor's `Restore` to a paused, ready VM. Not part of `total`.
    pub restore: Duration,
    /// What the agent did to make the clone unique, as it tells; it is part of the durations around it. Never more than the
    /// guest ran. None from agents of older snapshots.
    pub identity: Option<Duration>,
    /// From [`crate::Pool::invoke`] to the whole response.
    pub total: Duration,
}
