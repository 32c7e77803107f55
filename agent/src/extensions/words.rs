//! What goes into [`super::Extensions`], and what comes out.

use thaw_agent_protocol::Invoke;

use crate::telemetry::Subscription;

/// A call of an extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtensionCall {
    /// `POST …/extension/register`.
    Register {
        /// `Lambda-Extension-Name`, not empty.
        name: String,
        /// The identifier that it gets, unless it has one already.
        identifier: String,
        /// What it asks to be told of.
        events: Vec<String>,
    },
    /// `GET …/extension/event/next`.
    Next {
        /// `Lambda-Extension-Identifier`.
        identifier: String,
    },
    /// `POST …/extension/init/error`.
    InitError {
        /// `Lambda-Extension-Identifier`.
        identifier: String,
        /// `Lambda-Extension-Function-Error-Type`.
        error_type: String,
    },
    /// `POST …/extension/exit/error`.
    ExitError {
        /// `Lambda-Extension-Identifier`.
        identifier: String,
        /// `Lambda-Extension-Function-Error-Type`.
        error_type: String,
    },
    /// `PUT …/telemetry` or `…/logs`.
    Subscribe {
        /// `Lambda-Extension-Identifier`.
        identifier: String,
        /// To what.
        subscription: Subscription,
    },
}

/// What the Extensions API answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtensionAnswer {
    /// 200 with what the function is.
    Registered {
        /// `Lambda-Extension-Identifier`.
        identifier: String,
    },
    /// 200 with an event.
    Event(Event),
    /// 202.
    Accepted,
    /// 200.
    Subscribed,
    /// 403.
    Refused(Refusal),
}

/// Why a call is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Lambda's name for it.
    pub error_type: &'static str,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal in these words.
    pub(crate) fn new(error_type: &'static str, message: impl Into<String>) -> Self {
        Self {
            error_type,
            message: message.into(),
        }
    }
}

/// What an extension is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `INVOKE`; the invocation without its payload.
    Invoke(Invoke),
    /// `SHUTDOWN`.
    Shutdown(Reason),
}

/// `shutdownReason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The invocation, and with it the clone, is over.
    Spindown,
    /// The invocation took too long.
    Timeout,
    /// The runtime or an extension failed.
    Failure,
}

/// How long the end of a sandbox may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Until the invocation's deadline, milliseconds since the Unix epoch.
    Deadline(u64),
    /// Lambda's time for extensions that were told of the end.
    Shutdown,
    /// It is over.
    None,
}

/// An extension failed, and with it the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// `Extension.Crash`, `Extension.InitError`, `Extension.ExitError` or `Extension.LaunchError`.
    pub error_type: &'static str,
    /// For people.
    pub text: String,
}
