//! A monitor that misbehaves on purpose. It has no VM; what it does is told by the name it was started under, up to the
//! first dot. A name with `first-` in front is played by the first process alone, later ones play `well`.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::exit;

use thaw_agent_protocol::{
    AgentMessage, Decoder, Generation, HostMessage, InitError, Invoke, LogStream, Message as _,
    Reply as Answer, StreamBegin, StreamEnd, StreamFailure,
};
use thaw_snapshot::{Metadata, Writer};
use thaw_vmm_control::wire::{Read, Receiver, send};
use thaw_vmm_control::{
    AGENT_FD, CONTROL_FD, Event, Exit, ExitReason, Failure, Fault, Reply, Request, Rewound, Saved,
    Status, Timings, WorkingSet, WorkingSetRun,
};

fn main() {
    let program = PathBuf::from(std::env::args_os().next().expect("a name"));
    let name = program.file_name().and_then(|n| n.to_str()).expect("UTF-8");
    let script = name.split('.').next().unwrap_or(name).to_owned();
    let script = match script.strip_prefix("first-") {
        Some(script) if is_first(&program) => script.to_owned(),
        Some(_) => "well".to_owned(),
        None => script,
    };
    Monitor {
        control: inherited(CONTROL_FD),
        receiver: Receiver::new(),
        agent: inherited(AGENT_FD),
        decoder: Decoder::new(),
        generation: 0,
        old: Vec::new(),
        script,
    }
    .play();
}

fn is_first(program: &Path) -> bool {
    File::create_new(program.with_extension("played")).is_ok()
}

fn inherited(number: i32) -> UnixStream {
    // SAFETY: the runtime starts a monitor with its two sockets at these numbers, and nothing else here owns them.
    unsafe { OwnedFd::from_raw_fd(number) }.into()
}

struct Monitor {
    control: UnixStream,
    receiver: Receiver,
    agent: UnixStream,
    decoder: Decoder,
    /// Of the newest thaw.
    generation: u64,
    /// Agent streams of lives that are over.
    old: Vec<UnixStream>,
    script: String,
}

impl Monitor {
    fn play(mut self) {
        loop {
            let (request, fds) = self.request();
            match (self.script.as_str(), &request) {
                ("hangs-in-restore", Request::Restore(_)) => {}
                ("dies-in-restore", Request::Restore(_)) => {
                    eprintln!("cannot open /dev/kvm");
                    exit(1);
                }
                ("refuses-restore", Request::Restore(_)) => {
                    self.fail("host lacks avx512", Fault::Host)
                }
                ("foreign-snapshot", Request::Restore(_)) => {
                    self.fail("host lacks avx512", Fault::Caller)
                }
                ("garbage-in-restore", Request::Restore(_)) => {
                    self.control.write_all(&[0xff; 64]).expect("garbage");
                }
                ("no-space", Request::Save(_)) => {
                    self.fail(
                        "cannot write memory: No space left on device (os error 28)",
                        Fault::Host,
                    );
                }
                ("refuses-prepare", Request::Prepare(_)) => self.fail("no /dev/kvm", Fault::Host),
                ("refuses-rewind", Request::Rewind) => self.fail("no dirty log", Fault::Host),
                ("dies-in-rewind", Request::Rewind) => exit(1),
                ("hangs-in-rewind", Request::Rewind) => {}
                (_, Request::Boot(_)) => self.boot(),
                (_, Request::Restore(restore)) if restore.resume => self.resume(),
                (_, Request::Prepare(_) | Request::Restore(_) | Request::Pause) => {
                    self.reply(Reply::Done);
                }
                (_, Request::Resume) => self.resume(),
                (_, Request::Rewind) => self.rewind(fds),
                ("forgets-touches", Request::WorkingSet) => {
                    self.note("asked");
                    self.fail("touches were lost", Fault::Host);
                }
                ("dies-when-asked", Request::WorkingSet) => exit(1),
                (_, Request::WorkingSet) => {
                    self.note("asked");
                    self.tell_touches();
                }
                (_, Request::Save(_)) => {
                    let [file] = <[OwnedFd; 1]>::try_from(fds).expect("one file");
                    let mut writer = Writer::new(File::from(file));
                    writer.metadata(&Metadata::default()).expect("save");
                    writer.finish().expect("save");
                    self.reply(Reply::Saved(Saved {
                        file_bytes: 6,
                        stored_bytes: 6,
                        digest: "d".into(),
                    }));
                }
                ("deaf", Request::Status) => {}
                ("tells-its-status", Request::Status) => {
                    self.note("asked");
                    self.reply(Reply::Status(Status::default()));
                }
                (_, Request::Status) => self.reply(Reply::Status(Status {
                    console: "console of the guest".into(),
                    timings: Timings {
                        claimed_ns: Some(1),
                        state_set_ns: Some(2),
                        first_instruction_ns: Some(3),
                        first_agent_byte_ns: Some(4),
                        ..Timings::default()
                    },
                })),
                (_, Request::Quit) => exit(0),
            }
        }
    }

    fn boot(&mut self) {
        self.reply(Reply::Done);
        match self.script.as_str() {
            "never-says-hello" => return,
            "panics-in-boot" => return self.exited(ExitReason::Panic),
            _ => {}
        }
        self.say(
            AgentMessage::Hello {
                agent_version: "7".into(),
            },
            0,
        );
        let HostMessage::Configure(_) = self.hear().1 else {
            panic!("no configuration");
        };
        self.log("starting\n", 0);
        match self.script.as_str() {
            "fails-in-init" => self.say(
                AgentMessage::InitError(InitError {
                    error_type: "Runtime.ImportModuleError".into(),
                    payload: b"{}".to_vec(),
                }),
                0,
            ),
            "never-ready" => {}
            _ => self.say(AgentMessage::Ready, 0),
        }
    }

    /// The old stream stays open, and goes on talking, so that nobody can take it for the new one unnoticed.
    fn rewind(&mut self, fds: Vec<OwnedFd>) {
        let [agent] = <[OwnedFd; 1]>::try_from(fds).expect("one agent channel");
        let mut old = std::mem::replace(&mut self.agent, agent.into());
        self.decoder = Decoder::new();
        let _ = old.write_all(&frame(
            &AgentMessage::Thawed {
                unique_after_ns: None,
                extensions: false,
            },
            self.generation,
        ));
        self.old.push(old);
        self.reply(Reply::Rewound(Rewound::default()));
    }

    fn resume(&mut self) {
        let (generation, thaw) = self.hear();
        assert!(matches!(thaw, HostMessage::Thaw(_)), "first comes Thaw");
        assert_ne!(generation, self.generation, "a generation comes once");
        self.generation = generation;
        let HostMessage::Invoke(invoke) = self.hear().1 else {
            panic!("then comes Invoke");
        };
        self.reply(Reply::Done);
        match self.script.as_str() {
            "dies-in-run" => {
                eprintln!("thread panicked at vcpu.rs");
                exit(134);
            }
            "hangs-in-run" => {}
            "babbles-in-run" => loop {
                if self.agent.write_all(&frame(&babble(), generation)).is_err() {
                    return;
                }
            },
            "garbage-from-agent" => self
                .agent
                .write_all(b"no frame, by any means")
                .expect("garbage"),
            "panics-in-run" => {
                self.log("last words\n", generation);
                self.exited(ExitReason::Panic);
            }
            "answers-and-powers-off" => {
                self.answer(invoke, generation);
                self.exited(ExitReason::Shutdown);
                exit(0);
            }
            "closes-agent" => self
                .agent
                .shutdown(std::net::Shutdown::Both)
                .expect("close"),
            "old-answers" => {
                let old = Invoke {
                    payload: b"old".to_vec(),
                    ..invoke.clone()
                };
                self.answer(old, 0);
                self.answer(invoke, generation);
            }
            "streams" => self.stream(invoke, generation, None),
            "breaks-off" => self.stream(
                invoke,
                generation,
                Some(StreamFailure {
                    error_type: "Runtime.StreamError".into(),
                    document: b"{}".to_vec(),
                }),
            ),
            "streams-forever" => {
                self.begin_stream(&invoke, generation);
                let chunk = frame(
                    &AgentMessage::ResponseChunk(vec![b'x'; 512 * 1024]),
                    generation,
                );
                while self.agent.write_all(&chunk).is_ok() {}
            }
            "begins-and-hangs" => self.begin_stream(&invoke, generation),
            "runs-hooks" | "hangs-in-hooks" => {
                self.thawed(generation);
                self.say(AgentMessage::Restoring, generation);
                if self.script == "runs-hooks" {
                    self.wait_for("go");
                    self.say(AgentMessage::Restored, generation);
                    self.say(reply(invoke), generation);
                }
            }
            "settles-when-told" | "never-settles" => {
                self.thawed_with_extensions(generation);
                self.say(reply(invoke), generation);
                if self.script == "settles-when-told" {
                    self.wait_for("go");
                    self.log("late words\n", generation);
                    self.say(AgentMessage::Settled, generation);
                }
            }
            "hears-of-its-time-out" => {
                self.thawed_with_extensions(generation);
                let HostMessage::Shutdown = self.hear().1 else {
                    panic!("then comes Shutdown");
                };
                self.log("told\n", generation);
                self.exited(ExitReason::Shutdown);
                exit(0);
            }
            // Invocations follow one another without a word of the runtime's to the monitor.
            "stays-warm" => {
                self.answer(invoke, generation);
                let (next, HostMessage::Thaw(_)) = self.hear() else {
                    panic!("first comes Thaw");
                };
                assert!(next > generation, "generations of one life grow");
                let (_, HostMessage::Invoke(invoke)) = self.hear() else {
                    panic!("then comes Invoke");
                };
                self.answer(invoke, next);
            }
            _ => self.answer(invoke, generation),
        }
    }

    fn tell_touches(&self) {
        let runs = [(7, 2, false), (3, 1, true)].map(|(start, count, written)| WorkingSetRun {
            start,
            count,
            written,
        });
        self.reply(Reply::WorkingSet(WorkingSet {
            runs: runs.to_vec(),
        }));
    }

    /// A line in a file beside the program, for the test to count.
    fn note(&self, what: &str) {
        let program = PathBuf::from(std::env::args_os().next().expect("a name"));
        let path = program.with_extension(what);
        let file = File::options().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(b"\n"))
            .expect("a line");
    }

    fn answer(&mut self, invoke: Invoke, generation: u64) {
        let unique_after_ns = Some(u64::MAX);
        self.say(
            AgentMessage::Thawed {
                unique_after_ns,
                extensions: false,
            },
            generation,
        );
        self.log("hello from the function\n", generation);
        self.say(reply(invoke), generation);
    }

    fn thawed(&mut self, generation: u64) {
        let thawed = AgentMessage::Thawed {
            unique_after_ns: None,
            extensions: false,
        };
        self.say(thawed, generation);
    }

    fn thawed_with_extensions(&mut self, generation: u64) {
        let thawed = AgentMessage::Thawed {
            unique_after_ns: None,
            extensions: true,
        };
        self.say(thawed, generation);
    }

    /// Until the test makes this file beside the program.
    fn wait_for(&self, what: &str) {
        let program = PathBuf::from(std::env::args_os().next().expect("a name"));
        while !program.with_extension(what).exists() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn begin_stream(&mut self, invoke: &Invoke, generation: u64) {
        self.thawed(generation);
        let begin = StreamBegin {
            request_id: invoke.request_id.clone(),
            content_type: Some("text/event-stream".into()),
        };
        self.say(AgentMessage::ResponseBegin(begin), generation);
    }

    /// The payload, a byte a piece, and then how it ended.
    fn stream(&mut self, invoke: Invoke, generation: u64, failure: Option<StreamFailure>) {
        self.begin_stream(&invoke, generation);
        for byte in invoke.payload {
            self.say(AgentMessage::ResponseChunk(vec![byte]), generation);
        }
        self.log("streamed\n", generation);
        let request_id = invoke.request_id;
        self.say(
            AgentMessage::ResponseEnd(StreamEnd {
                request_id,
                failure,
            }),
            generation,
        );
    }

    fn exited(&self, reason: ExitReason) {
        let event = Event::Exited(Exit {
            reason,
            detail: "as the script says".into(),
            console: "Kernel panic".into(),
        });
        send(&self.control, &event, &[]).expect("event");
    }

    fn fail(&self, message: &str, fault: Fault) {
        self.reply(Reply::Failed(Failure {
            message: message.into(),
            fault,
        }));
    }

    fn reply(&self, reply: Reply) {
        send(&self.control, &reply, &[]).expect("reply");
    }

    fn log(&mut self, text: &str, generation: u64) {
        let bytes = text.as_bytes().to_vec();
        self.say(
            AgentMessage::Log {
                stream: LogStream::Stdout,
                bytes,
            },
            generation,
        );
    }

    fn say(&mut self, message: AgentMessage, generation: u64) {
        self.agent
            .write_all(&frame(&message, generation))
            .expect("agent channel");
    }

    fn request(&mut self) -> (Request, Vec<OwnedFd>) {
        loop {
            if let Some(message) = self.receiver.next_message().expect("a request") {
                return message;
            }
            if self.receiver.read_from(&self.control).expect("control") == Read::Closed {
                exit(0);
            }
        }
    }

    fn hear(&mut self) -> (u64, HostMessage) {
        let mut chunk = vec![0; 65536];
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("a frame") {
                let Generation(generation) = frame.generation;
                return (
                    generation,
                    HostMessage::from_frame(frame).expect("a message"),
                );
            }
            match self.agent.read(&mut chunk).expect("agent channel") {
                0 => exit(0),
                count => self.decoder.feed(&chunk[..count]),
            }
        }
    }
}

fn babble() -> AgentMessage {
    AgentMessage::Log {
        stream: LogStream::Stderr,
        bytes: vec![b'.'; 60_000],
    }
}

fn frame(message: &AgentMessage, generation: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    message
        .clone()
        .encode(Generation(generation), &mut bytes)
        .expect("a frame");
    bytes
}

fn reply(invoke: Invoke) -> AgentMessage {
    AgentMessage::Response(Answer {
        request_id: invoke.request_id,
        content_type: Some("application/json".into()),
        payload: invoke.payload,
    })
}
