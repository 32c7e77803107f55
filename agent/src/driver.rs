//! The one task that owns a sandbox: waits for what happens, asks [`Life`] what to do, does it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal};
use thaw_agent_protocol::{
    AgentMessage, Configure, Generation, HostMessage, RuntimeExitCause, Thaw,
};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::api::extension::Registration;
use crate::api::{self, PendingCall};
use crate::boot::BootError;
use crate::channel::{self, ChannelError, Incoming, Writer};
use crate::extensions::{EXTENSIONS_MAX, Event as Told, ExtensionAnswer, Limit, SHUTDOWN_LIMIT};
use crate::identity::files::GENERATION_FILE;
use crate::identity::{AdoptError, Machine};
use crate::life::{Answer, Call, Effect, Life, LifeError};
use crate::output::{Output, WritingEnds, Written};
use crate::process::{self, Host, Process};
use crate::telemetry::Telemetry;

/// Time that the runtime gets between SIGTERM and SIGKILL.
const TERMINATE_GRACE: Duration = Duration::from_secs(2);

/// Time for the last message of a failing agent to leave.
const FATAL_GRACE: Duration = Duration::from_secs(1);

/// How long output may lie in the pipes once some was seen, so that many small writes make few messages.
const OUTPUT_DELAY: Duration = Duration::from_millis(5);

/// How long nobody looks at the pipes after an invocation was delivered, and nothing is sent. A short invocation's output
/// and the word that the clone is unique then travel with its answer, in one write to the channel, and the agent does not
/// wake before it is asked to. The pipes hold what the runtime writes meanwhile.
const FIRST_OUTPUT_DELAY: Duration = Duration::from_millis(50);

/// How long the word of the end waits for the telemetry that came before it; a part of what extensions have for their end.
const DELIVERY_LIMIT: Duration = Duration::from_millis(500);

/// Bytes that may be queued for the channel before they are written.
const QUEUED_BYTES_MAX: usize = 128 * 1024;

/// Why a sandbox ended before the host asked for it.
#[derive(Debug, Error)]
pub enum DriverError {
    /// The channel is gone, and with it everyone who could ask for anything.
    #[error("the agent channel ended")]
    Channel(#[from] ChannelError),
    /// The host broke the order of messages.
    #[error("the host's message is out of order")]
    Life(#[from] LifeError),
    /// The clone could not be made unique.
    #[error("making the clone unique")]
    Adopt(#[from] AdoptError),
    /// A restored base's function cannot be mounted.
    #[error("mounting the function's code")]
    Code(#[from] BootError),
    /// The host has promised the function a network.
    #[error("setting up the network")]
    Network(#[source] BootError),
    /// The Runtime API's task is gone.
    #[error("the Runtime API server ended")]
    ServerEnded,
    /// A system call that never fails in a healthy guest failed.
    #[error("setting up the {what}")]
    System {
        /// What was set up.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Everything that differs between a guest and a test.
#[derive(Debug)]
pub struct Settings<M> {
    /// Where the Runtime API is served; bound before the runtime starts.
    pub listener: TcpListener,
    /// How processes run.
    pub host: Host,
    /// Whose identity a thaw changes.
    pub machine: M,
}

/// The driver of one sandbox's life.
#[derive(Debug)]
pub struct Driver<W, M> {
    life: Life,
    writer: Writer<W>,
    messages: mpsc::Receiver<Incoming>,
    calls: mpsc::Receiver<PendingCall>,
    server: Option<(TcpListener, mpsc::Sender<PendingCall>)>,
    host: Host,
    machine: M,
    children: SignalStream,
    /// The runtime, as long as it waits for extensions to register.
    unstarted: Option<Unstarted>,
    runtime: Option<Process>,
    /// In the order in which the life was told of them.
    extensions: Vec<Process>,
    output: Option<Output>,
    parked: Option<oneshot::Sender<Answer>>,
    parked_extensions: BTreeMap<usize, oneshot::Sender<Answer>>,
    init_limit: Option<Instant>,
    /// Of the sandbox's end.
    end_limit: Option<Instant>,
    output_due: Option<Instant>,
    telemetry: Telemetry,
    /// When the runtime's hooks for restored clones began to run.
    hooks_began: Option<Instant>,
}

enum Event {
    Message(Option<Incoming>),
    Call(Option<PendingCall>),
    OutputBegins,
    OutputDue,
    ChildEnded,
    InitLimit,
    EndLimit,
}

/// What the runtime is started with.
#[derive(Debug)]
struct Unstarted {
    bootstrap: Vec<String>,
    environment: BTreeMap<String, String>,
    output: WritingEnds,
}

enum Next {
    GoOn,
    PowerOff,
}

impl<W: AsyncWrite + Unpin, M: Machine> Driver<W, M> {
    /// Ready to say hello over a connected channel. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The signal handler cannot be set up.
    pub fn new<R>(reader: R, writer: W, settings: Settings<M>) -> Result<Self, DriverError>
    where
        R: AsyncRead + Unpin + Send + 'static,
    {
        let (messages_to, messages) = mpsc::channel(channel::MESSAGES_MAX);
        let (calls_to, calls) = mpsc::channel(api::CALLS_MAX);
        let children = signal(SignalKind::child()).map_err(|source| DriverError::System {
            what: "wait for children",
            source,
        })?;
        tokio::spawn(channel::read_messages(reader, messages_to));
        Ok(Self {
            life: Life::new(),
            writer: Writer::new(writer),
            messages,
            calls,
            server: Some((settings.listener, calls_to)),
            host: settings.host,
            machine: settings.machine,
            children,
            unstarted: None,
            runtime: None,
            extensions: Vec::new(),
            output: None,
            parked: None,
            parked_extensions: BTreeMap::new(),
            init_limit: None,
            end_limit: None,
            output_due: None,
            telemetry: Telemetry::new(),
            hooks_began: None,
        })
    }

    /// Lives until the host says `Shutdown`. On an error the host is told, if it still can be.
    ///
    /// # Errors
    /// The sandbox cannot go on.
    pub async fn run(mut self) -> Result<(), DriverError> {
        let result = self.live().await;
        for process in self.runtime.iter().chain(&self.extensions) {
            process.signal(Signal::KILL);
        }
        if let Err(error) = &result {
            let message = chain(error);
            // The channel may be what failed, or its reader may be stuck; power-off must not wait for it.
            let _ = timeout(
                FATAL_GRACE,
                self.writer.send(AgentMessage::Fatal { message }),
            )
            .await;
        }
        result
    }

    async fn live(&mut self) -> Result<(), DriverError> {
        self.writer
            .send(AgentMessage::Hello {
                agent_version: env!("CARGO_PKG_VERSION").into(),
            })
            .await?;
        loop {
            let event = match self.messages.try_recv() {
                Ok(message) => Event::Message(Some(message)),
                Err(_) => {
                    // While an invocation runs, the word of the thaw waits for its answer or its output.
                    if self.writer.queued_bytes() > 0 && self.life.request_id().is_none() {
                        self.writer.flush().await?;
                    }
                    self.wait().await
                }
            };
            if let Next::PowerOff = self.handle(event).await? {
                return Ok(());
            }
        }
    }

    async fn wait(&mut self) -> Event {
        let (init_limit, output_due, end_limit) =
            (self.init_limit, self.output_due, self.end_limit);
        let silent = self.life.is_frozen();
        tokio::select! {
            message = self.messages.recv() => Event::Message(message),
            call = self.calls.recv() => Event::Call(call),
            _ = self.children.recv() => Event::ChildEnded,
            () = begin_output(&mut self.output), if !silent && output_due.is_none() => Event::OutputBegins,
            () = sleep_until(output_due.unwrap_or_else(Instant::now)), if !silent && output_due.is_some() => Event::OutputDue,
            () = sleep_until(init_limit.unwrap_or_else(Instant::now)), if init_limit.is_some() => Event::InitLimit,
            () = sleep_until(end_limit.unwrap_or_else(Instant::now)), if end_limit.is_some() => Event::EndLimit,
        }
    }

    async fn handle(&mut self, event: Event) -> Result<Next, DriverError> {
        match event {
            Event::Message(message) => {
                let (generation, message) = message.unwrap_or(Err(ChannelError::Closed))?;
                if matches!(message, HostMessage::Invoke(_)) {
                    self.forget_lost_calls();
                }
                let effects = self.life.host(generation, message)?;
                self.carry_out(effects, None).await
            }
            Event::Call(None) => Err(DriverError::ServerEnded),
            Event::Call(Some(PendingCall { call, reply })) => self.called(call, reply).await,
            Event::OutputBegins => {
                self.output_due = Instant::now().checked_add(OUTPUT_DELAY);
                Ok(Next::GoOn)
            }
            Event::OutputDue => {
                self.queue_output_so_far().await?;
                self.writer.flush().await?;
                Ok(Next::GoOn)
            }
            Event::ChildEnded => {
                for (extension, cause) in self.reap() {
                    let effects = match (extension, &self.runtime) {
                        (Some(at), _) => self.life.extension_ended(at, &cause),
                        (None, Some(runtime)) => {
                            self.life.runtime_ended(cause, runtime.ran_out_of_memory())
                        }
                        (None, None) => Vec::new(),
                    };
                    if let Next::PowerOff = self.carry_out(effects, None).await? {
                        return Ok(Next::PowerOff);
                    }
                }
                Ok(Next::GoOn)
            }
            Event::EndLimit => {
                self.end_limit = None;
                let effects = self.life.end_limit_passed();
                self.carry_out(effects, None).await
            }
            Event::InitLimit => {
                let effects = self.life.init_timed_out();
                self.carry_out(effects, None).await
            }
        }
    }

    async fn called(
        &mut self,
        call: Call,
        reply: oneshot::Sender<Answer>,
    ) -> Result<Next, DriverError> {
        if matches!(call, Call::Extension(_)) {
            self.forget_lost_calls();
        }
        let mut effects = match self.hooks_began {
            Some(began) if call == Call::Next => {
                self.hooks_began = None;
                self.life.hooks_done(began.elapsed())
            }
            _ => Vec::new(),
        };
        effects.extend(self.life.call(call));
        self.carry_out(effects, Some(reply)).await
    }

    async fn carry_out(
        &mut self,
        effects: Vec<Effect>,
        mut reply: Option<oneshot::Sender<Answer>>,
    ) -> Result<Next, DriverError> {
        if !self.life.is_initialising() {
            self.init_limit = None;
        }
        let mut effects = std::collections::VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Park => self.parked = reply.take(),
                Effect::Answer(answer) => {
                    self.delivering(&answer);
                    self.answer(reply.take(), answer);
                }
                Effect::Wake(answer) => {
                    self.delivering(&answer);
                    let parked = self.parked.take();
                    self.answer(parked, answer);
                }
                Effect::Send(message) => {
                    self.queue_output_so_far().await?;
                    if message == AgentMessage::Ready {
                        self.telemetry.initialised(self.life.extensions());
                    }
                    self.telemetry.sending(&message);
                    self.writer.send(message).await?;
                }
                Effect::Queue(message) => self.writer.queue(message)?,
                Effect::Start(configure) => effects.extend(self.start(configure)?),
                Effect::StartRuntime => {
                    if let Err(reason) = self.start_runtime() {
                        self.init_limit = None;
                        effects.extend(self.life.start_failed(&reason));
                    }
                }
                Effect::ParkExtension(at) => {
                    if let Some(reply) = reply.take() {
                        self.parked_extensions.insert(at, reply);
                    }
                }
                Effect::WakeExtension(at, event) => {
                    let answer = Answer::Extension(ExtensionAnswer::Event(event));
                    let parked = self.parked_extensions.remove(&at);
                    self.answer(parked, answer);
                }
                Effect::Subscribe(name, subscription) => {
                    self.queue_output_so_far().await?;
                    self.telemetry.subscribe(&name, subscription);
                }
                Effect::Within(limit) => {
                    if limit == Limit::Shutdown {
                        let runtime = self.runtime.as_ref();
                        let used = || runtime.map_or(0, Process::memory_peak_mib);
                        self.telemetry.ending(used);
                    }
                    self.end_limit = moment(limit);
                }
                Effect::Adopt(generation, thaw) => self.adopt(generation, &thaw)?,
                Effect::Kill => {
                    if let Some(runtime) = &self.runtime {
                        runtime.signal(Signal::KILL);
                    }
                }
                Effect::PowerOff => {
                    self.stop().await;
                    return Ok(Next::PowerOff);
                }
            }
        }
        Ok(Next::GoOn)
    }

    fn delivering(&mut self, answer: &Answer) {
        if let Answer::Invocation(invocation) = answer {
            self.telemetry.invoked(invocation);
            self.output_due = Instant::now().checked_add(FIRST_OUTPUT_DELAY);
        }
    }

    /// Answers a call. Who hears of the end has heard all that came before.
    fn answer(&self, caller: Option<oneshot::Sender<Answer>>, answer: Answer) {
        // A caller that is gone needs no answer.
        let Some(caller) = caller else {
            return;
        };
        let is_end = matches!(
            &answer,
            Answer::Extension(ExtensionAnswer::Event(Told::Shutdown(_)))
        );
        let before = is_end.then(|| self.telemetry.delivered()).flatten();
        match before {
            Some(delivered) => {
                tokio::spawn(async move {
                    let _ = timeout(DELIVERY_LIMIT, delivered).await; // late telemetry is no reason to keep the end secret
                    let _ = caller.send(answer);
                });
            }
            None => drop(caller.send(answer)),
        }
    }

    fn adopt(
        &mut self,
        generation: thaw_agent_protocol::Generation,
        thaw: &Thaw,
    ) -> Result<(), DriverError> {
        self.writer.adopt(generation);
        let began = std::time::Instant::now();
        self.machine.adopt(thaw)?;
        let unique_after_ns = u64::try_from(began.elapsed().as_nanos()).ok();
        // Queued, not sent: an invocation that came with the thaw goes first, see `live`. Should the runtime not fetch it,
        // the word goes alone.
        self.output_due = Instant::now().checked_add(FIRST_OUTPUT_DELAY);
        self.hooks_began = self.life.is_restoring().then(Instant::now);
        self.writer.queue(AgentMessage::Thawed {
            unique_after_ns,
            extensions: self.life.has_extensions(),
        })?;
        Ok(())
    }

    /// Starts all but the runtime.
    fn start(&mut self, configure: Configure) -> Result<Vec<Effect>, DriverError> {
        self.machine.set_hostname(&configure.hostname)?;
        if self.life.generation() != Generation::default() {
            self.machine.take_code()?;
        }
        if configure.network {
            self.machine
                .set_up_network(configure.authority.as_deref())
                .map_err(DriverError::Network)?;
        }
        self.telemetry.starting(&configure);
        let address = self.serve(&configure)?;
        let mut environment = configure.environment;
        environment.insert("AWS_LAMBDA_RUNTIME_API".into(), address);
        environment.insert("THAW_GENERATION_FILE".into(), GENERATION_FILE.into());
        let (readers, output) =
            Output::new(self.host.user).map_err(|source| DriverError::System {
                what: "pipes for the runtime's output",
                source,
            })?;
        self.output = Some(readers);
        let limit = Duration::from_millis(configure.init_limit_ms);
        self.init_limit = Instant::now().checked_add(limit);
        let effects = self.launch_extensions(&environment)?;
        self.unstarted = Some(Unstarted {
            bootstrap: configure.bootstrap,
            environment,
            output,
        });
        Ok(effects)
    }

    /// Starts every external extension, up to the first that cannot be.
    fn launch_extensions(
        &mut self,
        environment: &BTreeMap<String, String>,
    ) -> Result<Vec<Effect>, DriverError> {
        let mut names = process::find_extensions(&self.host.extensions);
        let Some(output) = self.output.as_mut().filter(|_| !names.is_empty()) else {
            return Ok(self.life.extensions_launched(names));
        };
        let output =
            output
                .add_extensions(self.host.user)
                .map_err(|source| DriverError::System {
                    what: "pipes for the output of extensions",
                    source,
                })?;
        let environment = process::extension_environment(environment);
        for at in 0..names.len() {
            let path = self.host.extensions.join(&names[at]);
            let path = path.to_string_lossy();
            let started = match at {
                EXTENSIONS_MAX => Err("ErrTooManyExtensions".to_owned()),
                _ => output
                    .again()
                    .map_err(|error| format!("its output: {error}"))
                    .and_then(|output| Process::start(&path, &environment, &self.host, output)),
            };
            match started {
                Ok(process) => self.extensions.push(process),
                Err(reason) => {
                    names.truncate(at + 1);
                    return Ok(self.life.extension_launch_failed(names, reason));
                }
            }
        }
        Ok(self.life.extensions_launched(names))
    }

    /// The error is the function's own fault.
    fn start_runtime(&mut self) -> Result<(), String> {
        let Some(unstarted) = self.unstarted.take() else {
            return Ok(());
        };
        let bootstrap = process::find_bootstrap(&unstarted.bootstrap)?;
        let environment = &unstarted.environment;
        let runtime = Process::start(bootstrap, environment, &self.host, unstarted.output)?;
        self.runtime = Some(runtime);
        Ok(())
    }

    /// Parked calls whose clients have gone are no way to hand out an invocation.
    fn forget_lost_calls(&mut self) {
        if self.parked.as_ref().is_some_and(oneshot::Sender::is_closed) {
            self.parked = None;
            self.life.parked_call_lost();
        }
        let life = &mut self.life;
        self.parked_extensions.retain(|at, call| {
            let is_lost = call.is_closed();
            if is_lost {
                life.extension_call_lost(*at);
            }
            !is_lost
        });
    }

    /// The runtime (`None`) and extensions that were found ended, each once.
    fn reap(&mut self) -> Vec<(Option<usize>, RuntimeExitCause)> {
        let processes = self.runtime.iter().chain(&self.extensions);
        let living = processes.filter(|process| !process.has_ended());
        let own: Vec<Pid> = living.map(Process::pid).collect();
        let mut ended = Vec::new();
        for (pid, cause) in process::reap(self.host.reap, &own) {
            if let Some(runtime) = self.runtime.as_mut().filter(|one| one.pid() == pid) {
                runtime.set_ended();
                ended.push((None, cause));
            } else if let Some(at) = self.extensions.iter().position(|one| one.pid() == pid) {
                self.extensions[at].set_ended();
                ended.push((Some(at), cause));
            }
        }
        ended
    }

    /// Starts the Runtime API; the runtime is told the address it is at.
    fn serve(&mut self, configure: &Configure) -> Result<String, DriverError> {
        let Some((listener, calls)) = self.server.take() else {
            return Ok(api::ADDRESS.into());
        };
        let address = listener
            .local_addr()
            .map_err(|source| DriverError::System {
                what: "Runtime API",
                source,
            })?;
        let registration = Arc::new(Registration::of(configure));
        tokio::spawn(api::serve(listener, calls, registration));
        Ok(address.to_string())
    }

    /// Queues what the runtime has written up to now; what it writes meanwhile can wait.
    async fn queue_output_so_far(&mut self) -> Result<(), ChannelError> {
        self.output_due = None;
        let Some(output) = &mut self.output else {
            return Ok(());
        };
        let mut backlog = output.backlog();
        while let Some(Written {
            kind,
            stream,
            bytes,
        }) = output.take(&mut backlog)
        {
            self.telemetry.written(kind, stream, &bytes);
            self.writer.queue(AgentMessage::Log { stream, bytes })?;
            if self.writer.queued_bytes() > QUEUED_BYTES_MAX {
                self.writer.flush().await?;
            }
        }
        Ok(())
    }

    /// Ends the runtime: SIGTERM, its last output, SIGKILL. The host may have stopped listening.
    async fn stop(&mut self) {
        if let Some(runtime) = &self.runtime {
            runtime.signal(Signal::TERM);
        }
        let _ = timeout(TERMINATE_GRACE, self.last_output()).await;
        if let Some(runtime) = &self.runtime {
            runtime.signal(Signal::KILL);
        }
    }

    async fn last_output(&mut self) -> Result<(), ChannelError> {
        while let Some(runtime) = &self.runtime
            && !runtime.has_ended()
        {
            tokio::select! {
                _ = self.children.recv() => drop(self.reap()),
                () = begin_output(&mut self.output) => {
                    self.queue_output_so_far().await?;
                    self.writer.flush().await?;
                }
            }
        }
        self.queue_output_so_far().await?;
        self.writer.flush().await
    }
}

/// When a limit of the sandbox's end, set now, will have passed.
fn moment(limit: Limit) -> Option<Instant> {
    let left = match limit {
        Limit::None => return None,
        Limit::Shutdown => SHUTDOWN_LIMIT,
        Limit::Deadline(unix_ms) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            Duration::from_millis(unix_ms).saturating_sub(now.unwrap_or_default())
        }
    };
    Instant::now().checked_add(left)
}

async fn begin_output(output: &mut Option<Output>) {
    match output {
        Some(output) => output.readable().await,
        None => std::future::pending().await,
    }
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
