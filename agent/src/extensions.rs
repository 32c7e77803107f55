//! The extensions of one sandbox as a plain value: external ones, programs of /opt/extensions that run beside the runtime, and
//! internal ones, which the runtime registers from its own process.
//!
//! ```text
//! Started --register--> Registered --next--> Ready --INVOKE--> Running --next--> Ready --SHUTDOWN--> Told --exit | next--> gone
//! ```
//! An extension *takes part* if it is external or wants events. With none that does, nothing here has any effect.
//! [`crate::life::Life`] owns the value and says when an invocation begins and is answered.

mod words;

use std::time::Duration;

use thaw_agent_protocol::{AgentMessage, Invoke, LogStream, RuntimeExitCause};

use crate::life::{Answer, Effect};
use crate::telemetry::Api;

pub use words::{Event, ExtensionAnswer, ExtensionCall, Failure, Limit, Reason, Refusal};

/// Most extensions of a sandbox, as on Lambda.
pub const EXTENSIONS_MAX: usize = 10;

/// Time that extensions have after `SHUTDOWN`, as on Lambda.
pub const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);

const NOT_ALLOWED: &str = "State transition is not allowed";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Started,
    Registered,
    Ready,
    Running,
    /// It was told of the end.
    Told,
    InitError,
    ExitError,
    LaunchError,
    Exited,
    /// It was told of the end, and has nothing more to do.
    Done,
}

#[derive(Debug)]
struct Extension {
    name: String,
    is_external: bool,
    identifier: String,
    on_invoke: bool,
    on_shutdown: bool,
    state: State,
    /// An event for its next `next`.
    waiting: Option<Event>,
    error_type: Option<String>,
}

/// How far the end of the sandbox has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// It has not begun.
    No,
    /// The function has answered; extensions are still at work on the invocation.
    Invocation,
    /// Extensions were told.
    Shutdown,
    /// None has anything left to do.
    Over,
}

/// All extensions of one sandbox. The external ones come first, in the order in which they were launched.
#[derive(Debug)]
pub struct Extensions {
    all: Vec<Extension>,
    closing: Closing,
    deadline_unix_ms: u64,
}

impl Default for Extensions {
    fn default() -> Self {
        Self::new()
    }
}

impl Extensions {
    /// None yet.
    pub fn new() -> Self {
        Self {
            all: Vec::new(),
            closing: Closing::No,
            deadline_unix_ms: 0,
        }
    }

    /// These programs were started.
    pub(crate) fn launched(&mut self, names: impl IntoIterator<Item = String>) {
        let started = names.into_iter().map(|name| Extension {
            name,
            is_external: true,
            identifier: String::new(),
            on_invoke: false,
            on_shutdown: false,
            state: State::Started,
            waiting: None,
            error_type: None,
        });
        self.all.extend(started);
    }

    /// Whether any takes part.
    pub(crate) fn take_part(&self) -> bool {
        self.all.iter().any(Extension::takes_part)
    }

    /// Every external one has registered: the runtime may start.
    pub(crate) fn are_registered(&self) -> bool {
        self.all.iter().all(|one| one.state != State::Started)
    }

    /// Every one that takes part waits for its first event.
    pub(crate) fn are_ready(&self) -> bool {
        let mut part = self.all.iter().filter(|one| one.takes_part());
        part.all(|one| one.state == State::Ready)
    }

    /// The end of the sandbox has begun.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing != Closing::No
    }

    /// The end of the sandbox is complete.
    pub(crate) fn is_over(&self) -> bool {
        self.closing == Closing::Over
    }

    /// A call, while the sandbox initialises or later.
    pub(crate) fn call(
        &mut self,
        call: ExtensionCall,
        is_initialising: bool,
    ) -> (Vec<Effect>, Option<Failure>) {
        let result = match call {
            ExtensionCall::Register {
                name,
                identifier,
                events,
            } => {
                let registered = self.register(name, &identifier, &events, is_initialising);
                registered.map(|()| {
                    (
                        vec![reply(ExtensionAnswer::Registered { identifier })],
                        None,
                    )
                })
            }
            ExtensionCall::Next { identifier } => {
                self.next(&identifier).map(|effects| (effects, None))
            }
            ExtensionCall::InitError {
                identifier,
                error_type,
            } => self.failed(&identifier, error_type, State::InitError),
            ExtensionCall::ExitError {
                identifier,
                error_type,
            } => self.failed(&identifier, error_type, State::ExitError),
            ExtensionCall::Subscribe {
                identifier,
                subscription,
            } => self
                .subscriber(&identifier, subscription.api, is_initialising)
                .map(|name| {
                    let subscribed = Effect::Subscribe(name, subscription);
                    (vec![subscribed, reply(ExtensionAnswer::Subscribed)], None)
                }),
        };
        result.unwrap_or_else(|refused| (vec![reply(ExtensionAnswer::Refused(refused))], None))
    }

    fn register(
        &mut self,
        name: String,
        identifier: &str,
        events: &[String],
        is_initialising: bool,
    ) -> Result<(), Refusal> {
        let external = self
            .all
            .iter()
            .position(|one| one.is_external && one.name == name);
        let wants = |wanted: &str| events.iter().any(|event| event == wanted);
        for event in events {
            let why = match event.as_str() {
                "INVOKE" => continue,
                "SHUTDOWN" if external.is_some() => continue,
                // The end of the runtime's process is not told to what is part of it.
                "SHUTDOWN" => "ShutdownEventNotSupportedForInternalExtension",
                _ => "ErrorInvalidEventType",
            };
            let message = format!("{event}: {why}");
            return Err(Refusal::new("Extension.InvalidEventType", message));
        }
        let at = match external {
            Some(at) if self.all[at].state != State::Started => {
                return Err(self.all[at].not_allowed("Registered", &name));
            }
            Some(at) => at,
            None if !is_initialising => {
                let message = "Extension registration closed already";
                return Err(Refusal::new("Extension.RegistrationClosed", message));
            }
            None if self.all.iter().any(|one| one.name == name) => {
                let message = "Extension with this name already registered";
                return Err(Refusal::new("Extension.InvalidExtensionState", message));
            }
            None if self.all.len() >= EXTENSIONS_MAX => {
                let message = format!("Extension limit ({EXTENSIONS_MAX}) reached");
                return Err(Refusal::new("Extension.TooManyExtensions", message));
            }
            None => {
                self.launched([name]);
                let at = self.all.len() - 1;
                self.all[at].is_external = false;
                at
            }
        };
        let one = &mut self.all[at];
        identifier.clone_into(&mut one.identifier);
        (one.on_invoke, one.on_shutdown) = (wants("INVOKE"), wants("SHUTDOWN"));
        one.state = State::Registered;
        Ok(())
    }

    /// The extension with this identifier; or Lambda's refusal, in the words of the call.
    fn find(&self, identifier: &str, unknown: impl Into<String>) -> Result<usize, Refusal> {
        let found = self
            .all
            .iter()
            .position(|one| !identifier.is_empty() && one.identifier == identifier);
        found.ok_or_else(|| Refusal::new("Extension.UnknownExtensionIdentifier", unknown))
    }

    fn next(&mut self, identifier: &str) -> Result<Vec<Effect>, Refusal> {
        let at = self.find(identifier, format!("Unknown extension {identifier}"))?;
        let one = &mut self.all[at];
        match one.state {
            State::Registered | State::Running => {}
            State::Told | State::Done => {
                one.state = State::Done;
                return Ok(vec![Effect::ParkExtension(at)]);
            }
            _ => return Err(one.not_allowed("Ready", identifier)),
        }
        Ok(vec![match one.waiting.take() {
            Some(event) => {
                one.state = event.leads_to();
                reply(ExtensionAnswer::Event(event))
            }
            None => {
                one.state = State::Ready;
                Effect::ParkExtension(at)
            }
        }])
    }

    /// The name of an extension that may subscribe to telemetry.
    fn subscriber(
        &self,
        identifier: &str,
        api: Api,
        is_initialising: bool,
    ) -> Result<String, Refusal> {
        let at = self.find(identifier, format!("Unknown extension {identifier}"))?;
        let (error_type, message) = match api {
            Api::Logs => (
                "Logs.SubscriptionClosed",
                "Logs API subscription is closed already",
            ),
            Api::Telemetry => (
                "Telemetry.SubscriptionClosed",
                "Telemetry API subscription is closed already",
            ),
        };
        if is_initialising {
            Ok(self.all[at].name.clone())
        } else {
            Err(Refusal::new(error_type, message))
        }
    }

    fn failed(
        &mut self,
        identifier: &str,
        error_type: String,
        state: State,
    ) -> Result<(Vec<Effect>, Option<Failure>), Refusal> {
        let at = self.find(identifier, "Unknown Lambda-Extension-Identifier")?;
        let one = &mut self.all[at];
        // Said again it is accepted and changes nothing.
        if one.state == state {
            return Ok((vec![reply(ExtensionAnswer::Accepted)], None));
        }
        let (allowed, name, to) = match state {
            State::InitError => (
                one.state == State::Registered,
                "Extension.InitError",
                "InitError",
            ),
            _ => (one.is_alive(), "Extension.ExitError", "Exited"),
        };
        if !allowed {
            return Err(one.not_allowed(to, identifier));
        }
        one.state = state;
        one.error_type = Some(error_type.clone());
        let failure = Failure {
            error_type: name,
            text: error_type,
        };
        Ok((vec![reply(ExtensionAnswer::Accepted)], Some(failure)))
    }

    /// The external extension that was launched as number `at` could not be started.
    pub(crate) fn launch_failed(&mut self, at: usize, reason: String) -> Failure {
        if let Some(one) = self.all.get_mut(at) {
            one.state = State::LaunchError;
            one.error_type = Some("UnknownError".into());
        }
        Failure {
            error_type: "Extension.LaunchError",
            text: reason,
        }
    }

    /// The process of an external extension ended. A failure, unless it said so before or was told to.
    pub(crate) fn exited(&mut self, at: usize, cause: &RuntimeExitCause) -> Option<Failure> {
        let one = self.all.get_mut(at)?;
        one.waiting = None;
        if !one.is_alive() && one.state != State::Started {
            return None;
        }
        let was_told = one.state == State::Told;
        one.state = State::Exited;
        if was_told {
            return None;
        }
        let error_type = "Extension.Crash";
        one.error_type = Some(error_type.into());
        let text = match cause {
            RuntimeExitCause::Code(0) => "exit code 0".to_owned(),
            RuntimeExitCause::Code(code) => format!("exit status {code}"),
            RuntimeExitCause::Signal(libc::SIGKILL) => "signal: killed".to_owned(),
            RuntimeExitCause::Signal(number) => format!("signal {number}"),
        };
        Some(Failure { error_type, text })
    }

    /// The parked call of extension `at` is gone: its client closed the connection.
    pub(crate) fn parked_call_lost(&mut self, at: usize) {
        if let Some(one) = self.all.get_mut(at)
            && one.state == State::Ready
        {
            one.state = State::Registered;
        }
    }

    /// An invocation begins.
    pub(crate) fn invoke(&mut self, head: &Invoke) -> Vec<Effect> {
        self.closing = Closing::No;
        self.deadline_unix_ms = head.deadline_unix_ms;
        self.tell(&Event::Invoke(head.clone()), |one| one.on_invoke)
    }

    /// The invocation was answered, well (`None`) or because something failed or took too long: the end begins.
    pub(crate) fn close(&mut self, reason: Option<Reason>) -> Vec<Effect> {
        if self.closing != Closing::No || !self.take_part() {
            return Vec::new();
        }
        self.closing = Closing::Invocation;
        match reason {
            Some(reason) => self.shut_down(reason),
            None => {
                let limit = Limit::Deadline(self.deadline_unix_ms);
                let mut effects = vec![Effect::Within(limit)];
                effects.extend(self.advance());
                effects
            }
        }
    }

    /// The limit that [`Effect::Within`] set has passed.
    pub(crate) fn limit_passed(&mut self) -> Vec<Effect> {
        match self.closing {
            Closing::Invocation => self.shut_down(Reason::Timeout),
            Closing::Shutdown => self.over(),
            Closing::No | Closing::Over => Vec::new(),
        }
    }

    /// Goes on with the end as far as the extensions' states allow.
    pub(crate) fn advance(&mut self) -> Vec<Effect> {
        let is_busy = |one: &Extension| {
            one.is_alive() && (one.state == State::Running || one.waiting.is_some())
        };
        let has_more = |one: &Extension| one.on_shutdown && one.is_alive();
        match self.closing {
            Closing::Invocation if !self.all.iter().any(is_busy) => {
                self.shut_down(Reason::Spindown)
            }
            Closing::Shutdown if !self.all.iter().any(has_more) => self.over(),
            _ => Vec::new(),
        }
    }

    fn shut_down(&mut self, reason: Reason) -> Vec<Effect> {
        self.closing = Closing::Shutdown;
        let mut effects = self.tell(&Event::Shutdown(reason), |one| one.on_shutdown);
        effects.insert(0, Effect::Within(Limit::Shutdown));
        effects.extend(self.advance());
        effects
    }

    fn over(&mut self) -> Vec<Effect> {
        self.closing = Closing::Over;
        vec![Effect::Within(Limit::None)]
    }

    fn tell(&mut self, event: &Event, whom: impl Fn(&Extension) -> bool) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (at, one) in self.all.iter_mut().enumerate() {
            if !whom(one) || !one.is_alive() {
                continue;
            }
            if one.state == State::Ready {
                one.state = event.leads_to();
                effects.push(Effect::WakeExtension(at, event.clone()));
            } else {
                one.waiting = Some(event.clone());
            }
        }
        effects
    }

    /// Name, state and events of each.
    pub(crate) fn described(&self) -> Vec<(String, &'static str, Vec<&'static str>)> {
        let one = |one: &Extension| (one.name.clone(), one.state.name(), one.wanted());
        self.all.iter().map(one).collect()
    }

    /// The lines about the extensions that Lambda writes into the log at the end of an initialisation; nothing without any.
    pub(crate) fn report(&self) -> Option<Effect> {
        if !self.take_part() {
            return None;
        }
        let lines = self.all.iter().map(Extension::line);
        Some(Effect::Send(AgentMessage::Log {
            stream: LogStream::Stdout,
            bytes: lines.collect::<String>().into_bytes(),
        }))
    }
}

impl Event {
    fn leads_to(&self) -> State {
        match self {
            Self::Invoke(_) => State::Running,
            Self::Shutdown(_) => State::Told,
        }
    }
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Started => "Started",
            Self::Registered => "Registered",
            Self::Ready | Self::Done => "Ready",
            Self::Running | Self::Told => "Running",
            Self::InitError => "InitError",
            Self::ExitError => "ExitError",
            Self::LaunchError => "LaunchError",
            Self::Exited => "Exited",
        }
    }
}

impl Extension {
    fn takes_part(&self) -> bool {
        self.is_external || self.on_invoke
    }

    /// Registered, and able to take an event now or later.
    fn is_alive(&self) -> bool {
        matches!(
            self.state,
            State::Registered | State::Ready | State::Running | State::Told
        )
    }

    /// `who` is what the call named it by.
    fn not_allowed(&self, to: &str, who: &str) -> Refusal {
        let from = self.state.name();
        Refusal::new(
            "Extension.InvalidExtensionState",
            format!(
                "State transition from {from} to {to} failed for extension {who}. Error: {NOT_ALLOWED}"
            ),
        )
    }

    /// The events that it is told of.
    fn wanted(&self) -> Vec<&'static str> {
        [(self.on_invoke, "INVOKE"), (self.on_shutdown, "SHUTDOWN")]
            .iter()
            .filter_map(|(wanted, event)| wanted.then_some(*event))
            .collect()
    }

    fn line(&self) -> String {
        let (name, state, events) = (&self.name, self.state.name(), self.wanted().join(","));
        let error = self.error_type.as_ref();
        let error = error.map(|error| format!("\tError Type: {error}"));
        let error = error.unwrap_or_default();
        format!("EXTENSION\tName: {name}\tState: {state}\tEvents: [{events}]{error}\n")
    }
}

fn reply(answer: ExtensionAnswer) -> Effect {
    Effect::Answer(Answer::Extension(answer))
}

#[cfg(test)]
mod tests;
