//! What subscribers of the Telemetry API, and of the older Logs API, hear of a sandbox: the events of Lambda's developer guide,
//! "Telemetry API", pushed to where they listen inside the guest.
//!
//! Without subscribers nothing of this has an effect. Until the sandbox is initialised, events are kept for those who subscribe
//! later. A subscriber that does not listen, or too slowly, loses events and hears how many; nobody waits for it, but for the
//! end: `SHUTDOWN` is told when what came before it was delivered, see [`Telemetry::delivered`].

mod delivery;
mod moment;

use std::time::{Instant, SystemTime};

use serde_json::{Value, json};
use thaw_agent_protocol::{AgentMessage, Configure, LogStream};
use tokio::sync::oneshot;

use crate::life::Invocation;
use delivery::Subscriber;

/// Bytes of output that are kept for those who subscribe later, and longest line that is one event.
const KEPT_BYTES_MAX: usize = 256 * 1024;

/// Which of the two APIs somebody subscribed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `PUT /2020-08-15/logs`.
    Logs,
    /// `PUT /2022-07-01/telemetry`.
    Telemetry,
}

/// What an event is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The sandbox.
    Platform,
    /// Output of the runtime.
    Function,
    /// Output of extensions.
    Extension,
}

/// Where a subscriber listens, on the loopback interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// POST, or PUT, of a JSON array to this port and path.
    Http {
        /// PUT instead of POST.
        put: bool,
        /// The port.
        port: u16,
        /// The path, with its query.
        path: String,
    },
    /// Lines of JSON over one connection to this port.
    Tcp {
        /// The port.
        port: u16,
    },
}

/// What somebody wants to hear, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// By which API.
    pub api: Api,
    /// Kinds of events.
    pub kinds: Vec<Kind>,
    /// Where they go.
    pub destination: Destination,
    /// Most events of one delivery.
    pub items_max: usize,
    /// Most bytes of one delivery, but for its last event.
    pub bytes_max: usize,
    /// Longest time that an event waits for others, milliseconds.
    pub timeout_ms: u64,
}

impl Subscription {
    /// Names of the kinds, as the API spells them.
    fn types(&self) -> Vec<&'static str> {
        self.kinds.iter().map(|kind| kind.name()).collect()
    }
}

impl Kind {
    /// As the API spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Function => "function",
            Self::Extension => "extension",
        }
    }
}

/// One event.
#[derive(Clone, Debug)]
struct Event {
    kind: Kind,
    name: &'static str,
    document: Value,
}

/// The invocation that runs.
#[derive(Debug)]
struct Running {
    request_id: String,
    tracing: Value,
    began: Instant,
    /// Set when the runtime is done.
    done: Option<(&'static str, f64)>,
}

/// All that is told to whom.
#[derive(Debug)]
pub(crate) struct Telemetry {
    subscribers: Vec<Subscriber>,
    /// While the sandbox initialises.
    early: Option<Vec<Event>>,
    early_bytes: usize,
    lines: [(Kind, LogStream, Vec<u8>); 4],
    initialization_type: String,
    version: String,
    memory_mib: u64,
    began: Instant,
    running: Option<Running>,
}

impl Telemetry {
    /// Nobody listens yet.
    pub(crate) fn new() -> Self {
        let line = |kind, stream| (kind, stream, Vec::new());
        Self {
            subscribers: Vec::new(),
            early: Some(Vec::new()),
            early_bytes: 0,
            lines: [
                line(Kind::Function, LogStream::Stdout),
                line(Kind::Function, LogStream::Stderr),
                line(Kind::Extension, LogStream::Stdout),
                line(Kind::Extension, LogStream::Stderr),
            ],
            initialization_type: String::new(),
            version: String::new(),
            memory_mib: 0,
            began: Instant::now(),
            running: None,
        }
    }

    fn is_heard(&self) -> bool {
        self.early.is_some() || !self.subscribers.is_empty()
    }

    /// Somebody of this name subscribed; it hears all that was told before, too.
    pub(crate) fn subscribe(&mut self, name: &str, subscription: Subscription) {
        let event = match subscription.api {
            Api::Telemetry => "platform.telemetrySubscription",
            Api::Logs => "platform.logsSubscription",
        };
        let record = json!({"name": name, "state": "Subscribed", "types": subscription.types()});
        let mut subscriber = Subscriber::new(subscription);
        for early in self.early.iter().flatten() {
            subscriber.tell(early);
        }
        self.subscribers.push(subscriber);
        self.tell(event, record);
    }

    /// The sandbox begins to initialise.
    pub(crate) fn starting(&mut self, configure: &Configure) {
        let variable = |name: &str| configure.environment.get(name).cloned().unwrap_or_default();
        self.initialization_type = variable("AWS_LAMBDA_INITIALIZATION_TYPE");
        self.version = variable("AWS_LAMBDA_FUNCTION_VERSION");
        let memory = variable("AWS_LAMBDA_FUNCTION_MEMORY_SIZE").parse();
        self.memory_mib = memory.unwrap_or_default();
        self.began = Instant::now();
        let record = json!({
            "initializationType": self.initialization_type, "phase": "init",
            "functionName": variable("AWS_LAMBDA_FUNCTION_NAME"), "functionVersion": self.version,
        });
        self.tell("platform.initStart", record);
    }

    /// The sandbox is initialised, with these extensions: name, state, events.
    pub(crate) fn initialised(&mut self, extensions: Vec<(String, &'static str, Vec<&str>)>) {
        if self.early.is_none() {
            return;
        }
        let kind = self.initialization_type.clone();
        let record = json!({"initializationType": kind, "phase": "init", "status": "success"});
        self.tell("platform.initRuntimeDone", record);
        for (name, state, events) in extensions {
            let record = json!({"name": name, "state": state, "events": events});
            self.tell("platform.extension", record);
        }
        let metrics = json!({"durationMs": milliseconds(self.began)});
        let record = json!({
            "initializationType": kind, "phase": "init", "status": "success", "metrics": metrics,
        });
        self.tell("platform.initReport", record);
        self.early = None;
    }

    /// The runtime was handed an invocation.
    pub(crate) fn invoked(&mut self, invocation: &Invocation) {
        let head = &invocation.head;
        let again = |running: &Running| running.request_id == head.request_id;
        if self.subscribers.is_empty() || self.running.as_ref().is_some_and(again) {
            return;
        }
        let tracing = head.trace_id.as_ref().map_or(
            Value::Null,
            |value| json!({"type": "X-Amzn-Trace-Id", "value": value}),
        );
        let mut record = json!({"requestId": head.request_id, "version": self.version});
        add(&mut record, "tracing", &tracing);
        self.tell("platform.start", record);
        self.running = Some(Running {
            request_id: head.request_id.clone(),
            tracing,
            began: Instant::now(),
            done: None,
        });
    }

    /// A message goes to the host: perhaps the end of the invocation.
    pub(crate) fn sending(&mut self, message: &AgentMessage) {
        let (status, error_type, bytes) = match message {
            AgentMessage::Response(reply) => ("success", None, reply.payload.len()),
            AgentMessage::ResponseEnd(end) => match &end.failure {
                None => ("success", None, 0),
                Some(failure) => ("error", Some(failure.error_type.as_str()), 0),
            },
            AgentMessage::InvocationError(error) | AgentMessage::RestoreError(error) => {
                ("error", error.error_type.as_deref(), error.payload.len())
            }
            AgentMessage::RuntimeExit(_) => ("failure", Some("Runtime.ExitError"), 0),
            _ => return,
        };
        self.done(status, error_type, bytes);
    }

    fn done(&mut self, status: &'static str, error_type: Option<&str>, bytes: usize) {
        let Some(running) = self.running.as_mut().filter(|one| one.done.is_none()) else {
            return;
        };
        let duration = milliseconds(running.began);
        running.done = Some((status, duration));
        let metrics = json!({"durationMs": duration, "producedBytes": bytes});
        let mut record = json!({
            "requestId": running.request_id, "status": status, "metrics": metrics, "spans": [],
        });
        add(&mut record, "tracing", &running.tracing);
        add(&mut record, "errorType", &json!(error_type));
        self.end_lines();
        self.tell("platform.runtimeDone", record);
        self.flush();
    }

    /// The sandbox's end begins; of `memory_used_mib` the runtime's greatest so far.
    pub(crate) fn ending(&mut self, memory_used_mib: impl Fn() -> u64) {
        self.done("timeout", None, 0);
        let Some(running) = self.running.take() else {
            return;
        };
        let (status, duration) = running.done.unwrap_or_default();
        let metrics = json!({
            "durationMs": duration, "billedDurationMs": duration.ceil(),
            "memorySizeMB": self.memory_mib, "maxMemoryUsedMB": memory_used_mib(),
        });
        let id = json!(running.request_id);
        let mut record = json!({"requestId": id, "status": status, "metrics": metrics});
        add(&mut record, "tracing", &running.tracing);
        self.end_lines();
        self.tell("platform.end", json!({"requestId": id}));
        self.tell("platform.report", record);
        self.flush();
    }

    /// Output was written.
    pub(crate) fn written(&mut self, kind: Kind, stream: LogStream, bytes: &[u8]) {
        if !self.is_heard() {
            return;
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let of = |line: &&mut (Kind, LogStream, Vec<u8>)| (line.0, line.1) == (kind, stream);
            let Some((_, _, line)) = self.lines.iter_mut().find(of) else {
                return;
            };
            line.extend_from_slice(piece);
            if line.ends_with(b"\n") || line.len() >= KEPT_BYTES_MAX {
                let text = String::from_utf8_lossy(&std::mem::take(line)).into_owned();
                self.hand_out(kind, kind.name(), json!(text));
            }
        }
    }

    /// What was written without an end of line is told as it is.
    fn end_lines(&mut self) {
        for at in 0..self.lines.len() {
            let (kind, _, line) = &mut self.lines[at];
            let (kind, line) = (*kind, std::mem::take(line));
            if !line.is_empty() {
                let text = String::from_utf8_lossy(&line).into_owned();
                self.hand_out(kind, kind.name(), json!(text));
            }
        }
    }

    fn tell(&mut self, name: &'static str, record: Value) {
        self.hand_out(Kind::Platform, name, record);
    }

    fn hand_out(&mut self, kind: Kind, name: &'static str, record: Value) {
        let time = moment::utc(SystemTime::now());
        let event = Event {
            kind,
            name,
            document: json!({"time": time, "type": name, "record": record}),
        };
        for subscriber in &mut self.subscribers {
            subscriber.tell(&event);
        }
        if let Some(early) = &mut self.early {
            self.early_bytes += event.document.to_string().len();
            if self.early_bytes <= KEPT_BYTES_MAX {
                early.push(event);
            }
        }
    }

    /// Nothing waits for others any longer.
    fn flush(&self) {
        for subscriber in &self.subscribers {
            subscriber.flush(None);
        }
    }

    /// Resolves when all that was told so far was delivered, or could not be; nothing where nobody listens.
    pub(crate) fn delivered(&self) -> Option<impl Future<Output = ()> + Send + use<>> {
        let waiting: Vec<oneshot::Receiver<()>> = self
            .subscribers
            .iter()
            .map(|subscriber| {
                let (done, waiting) = oneshot::channel();
                subscriber.flush(Some(done));
                waiting
            })
            .collect();
        (!waiting.is_empty()).then_some(async move {
            for one in waiting {
                let _ = one.await; // a delivery that has ended delivers nothing more
            }
        })
    }
}

/// Adds a member unless it is null.
fn add(record: &mut Value, name: &str, value: &Value) {
    if !value.is_null() {
        record[name] = value.clone();
    }
}

/// Since then, with the precision that Lambda tells.
fn milliseconds(began: Instant) -> f64 {
    (began.elapsed().as_secs_f64() * 1e6).round() / 1e3
}
