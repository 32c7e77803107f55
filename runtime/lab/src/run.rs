//! One run: boot (with a deadline, and again when it hangs), start the command once, pass streams and signals, end everything.

mod session;

use crate::{
    LabRun, Paging, PortForward, StartMode,
    artifacts::{self, Artifacts, NotBuilt},
    clock,
    machine::{Machine, MachineError},
    process,
    protocol::{self, HostMessage, InitMessage},
    qemu::{self, Plan},
    saved::{SavedState, StateError},
    streams::{self, StoppableInput, Stream},
};
use session::{Act, End, Input, Session};
use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    net::TcpListener,
    os::unix::{ffi::OsStringExt, net::UnixStream},
    path::PathBuf,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant, SystemTime},
};

/// Boots tried before giving up: about one in ten used to hang before the causes were found.
const BOOT_ATTEMPTS_MAX: u32 = 3;
/// A cold boot takes 3.3 to 5.3 s on two idle cores and 12 s on busy ones.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// Plugging, mounting and starting the command take well under a second.
const START_LIMIT: Duration = Duration::from_secs(30);
/// A control message is taken at once by a living lab.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Fresh randomness handed to the lab.
const ENTROPY_BYTES: usize = 64;

/// Why a run failed. The command's own failure is an exit code, not one of these.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// [`crate::Lab::build`] has not been called.
    #[error(transparent)]
    NotBuilt(#[from] NotBuilt),
    /// The machine could not be started.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The caller asked for something impossible.
    #[error("{0}")]
    Request(String),
    /// A writable folder.
    #[error("cannot use writable folder {}", path.display())]
    Writable {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A forwarded port.
    #[error("cannot listen on 127.0.0.1:{port}")]
    Port {
        /// The port.
        port: u16,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No boot came up.
    #[error("the lab did not come up in {attempts} attempts; the end of its console:\n{console}")]
    Boot {
        /// Boots tried.
        attempts: u32,
        /// Last lines.
        console: String,
    },
    /// The command could not be started: `code` is 127 if it does not exist, else 126.
    #[error("{why}")]
    Command {
        /// Exit code that a shell would give.
        code: i32,
        /// What failed.
        why: String,
    },
    /// The time limit passed.
    #[error("the command was ended after its time limit of {} s", .0.as_secs())]
    TimeLimit(Duration),
    /// QEMU ended or the lab fell silent while the command ran.
    #[error("the lab {how}; the end of its console:\n{console}")]
    Lost {
        /// What happened.
        how: &'static str,
        /// Last lines.
        console: String,
    },
    /// A local system call.
    #[error("cannot {act}")]
    Io {
        /// What was being done.
        act: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Why a state could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// [`crate::Lab::build`] has not been called.
    #[error(transparent)]
    NotBuilt(#[from] NotBuilt),
    /// The lab to be saved did not boot.
    #[error(transparent)]
    Boot(#[from] RunError),
    /// The machine could not be started.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Saving.
    #[error(transparent)]
    State(#[from] StateError),
    /// The lock file.
    #[error("cannot lock {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What the driver hears. Messages of an earlier attempt's lab are told apart by the attempt's number.
enum Event {
    Init(u32, InitMessage),
    Gone(u32),
    StreamEnd,
    Signal(i32),
}

impl Event {
    /// What the event means to the command's session in this attempt's lab.
    fn input_for(self, attempt: u32) -> Option<Input> {
        match self {
            Self::Signal(signal) => Some(Input::Signal(signal)),
            Self::StreamEnd => Some(Input::StreamEnd),
            Self::Gone(from) => (from == attempt).then_some(Input::Gone),
            Self::Init(from, _) if from != attempt => None,
            Self::Init(_, InitMessage::Exited(code)) => Some(Input::Exited(code)),
            Self::Init(_, InitMessage::Failed(code, why)) => Some(Input::Failed(code, why)),
            Self::Init(..) => Some(Input::Alive),
        }
    }
}

/// How an attempt to get the command started ended.
enum Attempt {
    Started(Machine),
    /// Worth another attempt; the console's end.
    Failed(String),
    /// A signal came first.
    Signalled(i32),
}

/// See [`crate::Lab::run`].
pub fn run(
    artifacts: &Artifacts,
    paging: Paging,
    mut run: LabRun,
    notice: &mut dyn FnMut(&str),
) -> Result<i32, RunError> {
    let start = start_message(artifacts, &run)?;
    check_ports(&run.forwards)?;
    let mut plan = plan(
        artifacts,
        Size {
            memory_mib: run.memory_mib,
            cpu_count: run.cpu_count,
            paging,
        },
    );
    plan.forwards.clone_from(&run.forwards);
    let (sender, events) = channel();
    if let Some(signals) = run.signals.take() {
        let sender = sender.clone();
        thread::spawn(move || {
            signals
                .iter()
                .try_for_each(|signal| sender.send(Event::Signal(signal)))
        });
    }
    let mut driver = Driver {
        attempt: 0,
        sender,
        events,
        start,
    };
    let saved = SavedState::of(&plan)?;
    if run.start == StartMode::Resume && saved.exists() {
        match driver.resume(&plan, &saved)? {
            Attempt::Started(machine) => return driver.drive(machine, run),
            Attempt::Signalled(signal) => return Ok(128 + signal),
            Attempt::Failed(why) => {
                saved.forget(); // the next start makes a new one
                notice(&format!("the saved lab did not resume, booting: {why}"));
            }
        }
    }
    driver.attempt = 0;
    let mut console = String::new();
    while driver.attempt < BOOT_ATTEMPTS_MAX {
        driver.attempt += 1;
        match driver.boot(&plan)? {
            Attempt::Started(machine) => return driver.drive(machine, run),
            Attempt::Signalled(signal) => return Ok(128 + signal),
            Attempt::Failed(tail) => {
                notice(&format!(
                    "boot {} of the lab did not come up",
                    driver.attempt
                ));
                console = tail;
            }
        }
    }
    Err(RunError::Boot {
        attempts: driver.attempt,
        console,
    })
}

/// The command line's clock must be right even when the machine is busy: five rounds of 20 ms.
fn plan(artifacts: &Artifacts, size: Size) -> Plan {
    let tsc_khz = clock::tsc_khz(5, Duration::from_millis(20));
    Plan {
        kernel: artifacts.kernel.clone(),
        initrd: artifacts.initrd.clone(),
        memory_mib: size.memory_mib,
        cpu_count: size.cpu_count,
        paging: size.paging,
        tsc_khz,
        forwards: Vec::new(),
    }
}

/// What a saved state fits, the artifacts apart.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub memory_mib: u32,
    pub cpu_count: u8,
    pub paging: Paging,
}

/// See [`crate::Lab::save`].
pub fn save(
    artifacts: &Artifacts,
    size: Size,
    progress: &mut dyn FnMut(&str),
) -> Result<(), SaveError> {
    let mut plan = plan(artifacts, size);
    let saved = SavedState::of(&plan)?;
    let lock = artifacts.folder.join("saving");
    let failed = |source| SaveError::Io {
        path: lock.clone(),
        source,
    };
    let file = File::create(&lock).map_err(failed)?;
    if saved.exists() {
        return Ok(());
    }
    file.lock().map_err(failed)?; // freed when `file` is closed
    if saved.exists() {
        return Ok(());
    }
    artifacts::sweep(&artifacts.folder, &[".saving"], Duration::ZERO);
    artifacts::sweep(&artifacts.folder, &["saved-"], artifacts::KEPT_FOR);
    progress("booting the lab once, to resume it from now on");
    let mut console = String::new();
    for attempt in 1..=BOOT_ATTEMPTS_MAX {
        let (sender, events) = channel();
        let mut driver = Driver {
            attempt,
            sender,
            events,
            start: protocol::Start::default(),
        };
        plan.tsc_khz = clock::tsc_khz(5, Duration::from_millis(20));
        let mut machine = Machine::start(
            &plan,
            Machine::memory(size.memory_mib)?,
            qemu::Start::BootToSave,
        )?;
        driver.listen(&machine)?;
        match driver.await_init(&mut machine, BOOT_LIMIT)? {
            Heard::Message(InitMessage::Booted) => return Ok(saved.save(&machine, plan.tsc_khz)?),
            Heard::Message(_) | Heard::Signal(_) | Heard::Gone | Heard::Nothing => {
                console = machine.console.tail()
            }
        }
    }
    Err(RunError::Boot {
        attempts: BOOT_ATTEMPTS_MAX,
        console,
    }
    .into())
}

fn start_message(artifacts: &Artifacts, run: &LabRun) -> Result<protocol::Start, RunError> {
    if run.command.is_empty() {
        return Err(RunError::Request("no command to run in the lab".to_owned()));
    }
    if run.memory_mib < 512 || run.cpu_count == 0 {
        return Err(RunError::Request(format!(
            "a lab of {} MiB and {} processors is too small",
            run.memory_mib, run.cpu_count
        )));
    }
    let absolute = |path: &PathBuf| {
        path.canonicalize().map_err(|source| RunError::Writable {
            path: path.clone(),
            source,
        })
    };
    let writable = run
        .writable
        .iter()
        .map(absolute)
        .collect::<Result<Vec<_>, _>>()?;
    let bytes = |path: PathBuf| path.into_os_string().into_vec();
    let pair = |(key, value): &(OsString, OsString)| {
        [key.clone(), value.clone()].join("=".as_ref()).into_vec()
    };
    Ok(protocol::Start {
        cwd: bytes(std::path::absolute(&run.cwd).unwrap_or_else(|_| run.cwd.clone())),
        command: run
            .command
            .iter()
            .cloned()
            .map(OsString::into_vec)
            .collect(),
        env: run.env.iter().map(pair).collect(),
        writable: writable.into_iter().map(bytes).collect(),
        modules: artifacts
            .modules
            .canonicalize()
            .map(bytes)
            .unwrap_or_default(),
        rootless: u8::from(!rustix::process::geteuid().is_root()),
        shared_files_max: process::open_files_max(),
        ..protocol::Start::default()
    })
}

/// A port already taken is the caller's affair, not a boot to try again.
fn check_ports(forwards: &[PortForward]) -> Result<(), RunError> {
    for &PortForward { host: port, .. } in forwards {
        TcpListener::bind(("127.0.0.1", port)).map_err(|source| RunError::Port { port, source })?;
    }
    Ok(())
}

struct Driver {
    attempt: u32,
    sender: Sender<Event>,
    events: Receiver<Event>,
    start: protocol::Start,
}

impl Driver {
    fn boot(&mut self, plan: &Plan) -> Result<Attempt, RunError> {
        let mut machine =
            Machine::start(plan, Machine::memory(plan.memory_mib)?, qemu::Start::Boot)?;
        self.listen(&machine)?;
        match self.await_init(&mut machine, BOOT_LIMIT)? {
            Heard::Message(InitMessage::Booted) => {}
            Heard::Signal(signal) => return Ok(Attempt::Signalled(signal)),
            Heard::Message(_) | Heard::Gone | Heard::Nothing => {
                return Ok(Attempt::Failed(machine.console.tail()));
            }
        }
        self.send_start(machine)
    }

    fn resume(&mut self, plan: &Plan, saved: &SavedState) -> Result<Attempt, RunError> {
        self.attempt = u32::MAX; // never the number of a boot
        match saved.resume(plan) {
            Ok(machine) => {
                self.listen(&machine)?;
                self.send_start(machine)
            }
            Err(StateError::Machine(error)) => Err(error.into()),
            Err(error) => Ok(Attempt::Failed(chain(&error))),
        }
    }

    /// Hands over the command; the answer decides between once and again.
    fn send_start(&mut self, mut machine: Machine) -> Result<Attempt, RunError> {
        self.start.entropy = fresh_entropy()?;
        let since_1970 = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        self.start.unix_nanos = u64::try_from(since_1970.as_nanos()).unwrap_or_default();
        if HostMessage::Start(self.start.clone())
            .write(&mut machine.control)
            .is_err()
        {
            return Ok(Attempt::Failed(machine.console.tail()));
        }
        Ok(match self.await_init(&mut machine, START_LIMIT)? {
            Heard::Message(InitMessage::Started) => Attempt::Started(machine),
            Heard::Signal(signal) => Attempt::Signalled(signal),
            Heard::Message(_) | Heard::Gone => Attempt::Failed(machine.console.tail()),
            Heard::Nothing => {
                let console = machine.console.tail();
                drop(machine);
                self.after_silence(console)?
            }
        })
    }

    /// The machine is gone; what it still said tells whether another attempt would start the command a second time.
    fn after_silence(&mut self, console: String) -> Result<Attempt, RunError> {
        loop {
            match self.events.recv_timeout(SEND_LIMIT) {
                Ok(Event::Init(attempt, InitMessage::Started)) if attempt == self.attempt => {
                    let how = "hung while it started the command";
                    return Err(RunError::Lost { how, console });
                }
                Ok(Event::Gone(attempt)) if attempt == self.attempt => {
                    return Ok(Attempt::Failed(console));
                }
                Ok(Event::Signal(signal)) => return Ok(Attempt::Signalled(signal)),
                Ok(_) => {}
                Err(_) => return Ok(Attempt::Failed(console)),
            }
        }
    }

    fn listen(&self, machine: &Machine) -> Result<(), RunError> {
        let failed = |source| RunError::Io {
            act: "use the control socket",
            source,
        };
        machine
            .control
            .set_write_timeout(Some(SEND_LIMIT))
            .map_err(failed)?;
        let mut control = machine.control.try_clone().map_err(failed)?;
        let (sender, attempt) = (self.sender.clone(), self.attempt);
        thread::spawn(move || {
            while let Ok(message) = InitMessage::read(&mut control) {
                if sender.send(Event::Init(attempt, message)).is_err() {
                    return;
                }
            }
            let _ = sender.send(Event::Gone(attempt)); // nobody listens after the run
        });
        Ok(())
    }

    fn await_init(&mut self, machine: &mut Machine, limit: Duration) -> Result<Heard, RunError> {
        let end = Instant::now() + limit;
        loop {
            match self
                .events
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(Event::Init(attempt, InitMessage::Failed(code, why)))
                    if attempt == self.attempt =>
                {
                    return Err(RunError::Command { code, why });
                }
                Ok(Event::Init(attempt, message)) if attempt == self.attempt => {
                    return Ok(Heard::Message(message));
                }
                Ok(Event::Gone(attempt)) if attempt == self.attempt => {
                    settle(machine);
                    return Ok(Heard::Gone);
                }
                Ok(Event::Signal(signal)) => return Ok(Heard::Signal(signal)),
                Ok(_) => {}
                Err(_) => return Ok(Heard::Nothing),
            }
        }
    }

    /// From the command's start to its end.
    fn drive(&mut self, mut machine: Machine, run: LabRun) -> Result<i32, RunError> {
        self.receive(&machine.stdout, streams::writer(run.stdout, io::stdout()))?;
        self.receive(&machine.stderr, streams::writer(run.stderr, io::stderr()))?;
        let _stopper = send_stdin(&machine.stdin, run.stdin)?;
        let mut session = Session::new(Instant::now(), run.time_limit, run.grace);
        loop {
            let wait = session.wake_at().saturating_duration_since(Instant::now());
            let input = match self.events.recv_timeout(wait) {
                Ok(event) => event.input_for(self.attempt),
                Err(_) => Some(Input::Nothing),
            };
            let Some(input) = input else { continue };
            match session.on(Instant::now(), input) {
                Act::Wait => {}
                Act::Pass(signal) => {
                    // A lab that takes no message is ended by the grace period.
                    let _ = HostMessage::Signal(signal).write(&mut machine.control);
                }
                Act::End(End::Code(code)) => return Ok(code),
                Act::End(End::TimeLimit) => {
                    return Err(RunError::TimeLimit(run.time_limit.unwrap_or_default()));
                }
                Act::End(End::Failed(code, why)) => return Err(RunError::Command { code, why }),
                Act::End(End::Lost(how)) => {
                    settle(&mut machine);
                    let console = machine.console.tail();
                    return Err(RunError::Lost { how, console });
                }
            }
        }
    }

    fn receive(&self, port: &UnixStream, mut to: Box<dyn Write + Send>) -> Result<(), RunError> {
        let mut port = port.try_clone().map_err(|source| RunError::Io {
            act: "use a stream socket",
            source,
        })?;
        let sender = self.sender.clone();
        thread::spawn(move || {
            let _ = protocol::copy_from_chunks(&mut port, &mut to); // an early end shows on the control socket
            let _ = sender.send(Event::StreamEnd); // nobody listens after the run
        });
        Ok(())
    }
}

enum Heard {
    Message(InitMessage),
    Signal(i32),
    /// The control socket closed.
    Gone,
    /// The deadline passed.
    Nothing,
}

fn send_stdin(port: &UnixStream, source: Stream) -> Result<io::PipeWriter, RunError> {
    let failed = |source| RunError::Io {
        act: "use the input socket",
        source,
    };
    let mut port = port.try_clone().map_err(failed)?;
    let (mut input, stopper) = StoppableInput::new(source).map_err(failed)?;
    thread::spawn(move || protocol::copy_into_chunks(&mut input, &mut port));
    Ok(stopper)
}

/// Gives a QEMU that has closed its sockets a moment to end, so that its last words are on the console.
fn settle(machine: &mut Machine) {
    let end = Instant::now() + Duration::from_secs(1);
    while !machine.has_ended() && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

fn fresh_entropy() -> Result<Vec<u8>, RunError> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut entropy))
        .map_err(|source| RunError::Io {
            act: "read /dev/urandom",
            source,
        })?;
    Ok(entropy)
}
