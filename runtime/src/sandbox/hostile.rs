//! An agent that means harm: frames as they come from the socket, spoilt or not, through the channel into a life.

use std::io::Write as _;
use std::os::unix::net::UnixStream as StdStream;

use thaw_agent_protocol::frame::FRAME_BYTES_MAX;
use thaw_agent_protocol::{
    AgentMessage, Generation, InitError, InvocationError, LogStream, Message as _, Reply,
    RuntimeExit, RuntimeExitCause, STREAM_CHUNK_BYTES_MAX, StreamBegin, StreamEnd,
};
use thaw_fuzz::{Campaign, CountingHeap, Dice, measured};
use thaw_vmm_control::ExitReason;
use tokio::net::UnixStream;

use super::life::{Begin, Input, Life, Step};
use crate::channel::{AgentChannel, Incoming};
use crate::vm::{REASON_BYTES_MAX, VmEvent, chain};
use crate::{End, INVOCATION_LOG_BYTES_MAX, StreamPart};

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

const REQUEST: &str = "r";
const GENERATION: Generation = Generation(7);
/// What the channel and the life of one sandbox may hold: a frame and the log, in buffers that double, and a read.
const HELD_BYTES_MAX: usize = 2 * (FRAME_BYTES_MAX + INVOCATION_LOG_BYTES_MAX + 64 * 1024);
/// Bytes of the line that tells of output that was dropped.
const NOTE_BYTES_MAX: usize = 100;

fn text(dice: &mut Dice) -> String {
    match dice.range(0, 9) {
        0 => "ü".repeat(dice.index(20_000)),
        1 => String::new(),
        2 => "another".into(),
        _ => REQUEST.into(),
    }
}

fn bytes(dice: &mut Dice) -> Vec<u8> {
    let length = *dice.pick(&[0, 1, 100, 4000, 70_000]);
    vec![b'x'; length]
}

fn message(dice: &mut Dice) -> AgentMessage {
    let error = |dice: &mut Dice| InvocationError {
        request_id: text(dice),
        error_type: Some(text(dice)),
        payload: bytes(dice),
    };
    match dice.range(0, 30) {
        0..=2 => AgentMessage::Thawed {
            unique_after_ns: Some(dice.edge(64)),
            extensions: dice.in_thousand(500),
        },
        3 => AgentMessage::Restoring,
        4 => AgentMessage::Restored,
        5 => AgentMessage::Settled,
        6 => AgentMessage::Hello {
            agent_version: text(dice),
        },
        7 => AgentMessage::InitError(InitError {
            error_type: text(dice),
            payload: bytes(dice),
        }),
        8 => AgentMessage::Fatal {
            message: text(dice),
        },
        9 => AgentMessage::RuntimeExit(RuntimeExit {
            cause: RuntimeExitCause::Code(*dice.pick(&[0, 1, i32::MIN, i32::MAX])),
            out_of_memory: true,
            request_id: Some(text(dice)),
        }),
        10 => AgentMessage::InvocationError(error(dice)),
        11 => AgentMessage::RestoreError(error(dice)),
        12 | 13 => AgentMessage::Response(Reply {
            request_id: text(dice),
            content_type: Some(text(dice)),
            payload: bytes(dice),
        }),
        14..=16 => AgentMessage::ResponseBegin(StreamBegin {
            request_id: text(dice),
            content_type: None,
        }),
        17..=20 => AgentMessage::ResponseChunk(bytes(dice)),
        21 if dice.in_thousand(200) => {
            AgentMessage::ResponseChunk(vec![0; STREAM_CHUNK_BYTES_MAX + 1])
        }
        21 => AgentMessage::ResponseEnd(StreamEnd {
            request_id: text(dice),
            failure: None,
        }),
        22..=27 => AgentMessage::Log {
            stream: LogStream::Stderr,
            bytes: bytes(dice),
        },
        _ => AgentMessage::Ready,
    }
}

fn stream(dice: &mut Dice) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut say = |message: AgentMessage, generation| {
        message.encode(generation, &mut stream).unwrap();
    };
    if dice.in_thousand(800) {
        let thawed = AgentMessage::Thawed {
            unique_after_ns: None,
            extensions: false,
        };
        say(thawed, GENERATION);
    }
    for _ in 0..dice.range(0, 12) {
        let generation = match dice.in_thousand(900) {
            true => GENERATION,
            false => Generation(dice.edge(64)),
        };
        let message = message(dice);
        say(message, generation);
    }
    if dice.in_thousand(300) {
        (0..dice.range(1, 3)).for_each(|_| dice.spoil(&mut stream));
    }
    stream
}

/// What the host has heard and believed.
#[derive(Default)]
struct Heard {
    is_thawed: bool,
    has_begun_answer: bool,
    is_over: bool,
}

impl Heard {
    fn step(&mut self, dice: &mut Dice, life: &mut Life, event: VmEvent) {
        self.is_thawed |= matches!(event, VmEvent::Agent(AgentMessage::Thawed { .. }));
        match life.step(Input::Vm(event)) {
            Step::Continue => {}
            Step::Orphaned => dice.saw("orphaned"),
            Step::Restoring | Step::Restored => {
                assert!(self.is_thawed && !self.is_over);
                dice.saw("hooks");
            }
            Step::Part(part) => {
                assert!(
                    self.is_thawed && !self.is_over,
                    "{part:?} before the thaw or after the end"
                );
                match part {
                    StreamPart::Head { .. } => {
                        assert!(!self.has_begun_answer, "an answer begins twice");
                        self.has_begun_answer = true;
                    }
                    StreamPart::Chunk(bytes) => {
                        assert!(self.has_begun_answer);
                        assert!((1..=STREAM_CHUNK_BYTES_MAX).contains(&bytes.len()));
                        dice.saw("piece");
                    }
                }
            }
            Step::Ended(end) => {
                assert!(!self.is_over, "a life ends twice");
                self.is_over = true;
                self.ended(dice, end.unwrap());
            }
        }
    }

    fn ended(&self, dice: &mut Dice, end: End) {
        match end {
            End::Response { .. } | End::FunctionError { .. } | End::RestoreError { .. } => {
                assert!(self.is_thawed, "an answer of a clone that is not unique");
                dice.saw("answered");
            }
            End::GuestDied { reason, detail, .. } => {
                assert_eq!(reason, ExitReason::GuestFault);
                assert!(
                    detail.len() <= REASON_BYTES_MAX,
                    "{} bytes of reason",
                    detail.len()
                );
                dice.saw("refused");
            }
            End::RuntimeExit(_) => dice.saw("exited"),
            End::TimedOut | End::RestoreTimedOut => panic!("nobody said that its time is over"),
        }
    }
}

fn play(dice: &mut Dice) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .unwrap();
    let _context = runtime.enter();
    let (ours, mut theirs) = StdStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let stream = stream(dice);
    let writer = std::thread::spawn(move || {
        // The reader leaves when it has heard enough.
        let _ = theirs.write_all(&stream);
    });
    let mut channel = AgentChannel::new(UnixStream::from_std(ours).unwrap());
    channel.enter(GENERATION);
    let mut life = Life::new(REQUEST.into(), Begin::Resume);
    let (mut heard, mut held) = (Heard::default(), 0);
    loop {
        let (incoming, grown) = measured(|| runtime.block_on(channel.next()));
        held += grown.held;
        let event = match incoming {
            Incoming::Message(message) => VmEvent::Agent(message),
            Incoming::Closed => break,
            Incoming::Broken(error) => VmEvent::AgentBroken(chain(&error)),
        };
        let is_broken = matches!(event, VmEvent::AgentBroken(_));
        let ((), grown) = measured(|| heard.step(dice, &mut life, event));
        held += grown.held;
        assert!(held <= HELD_BYTES_MAX as i64, "{held} bytes are held");
        if is_broken {
            assert!(heard.is_over, "a life goes on without its agent");
            break;
        }
    }
    heard.step(dice, &mut life, VmEvent::AgentClosed);
    assert!(life.take_log().len() <= INVOCATION_LOG_BYTES_MAX + NOTE_BYTES_MAX);
    drop(channel);
    writer.join().unwrap();
}

#[test]
fn no_agent_leads_a_life_astray_or_makes_the_host_hold_more_than_its_bounds() {
    let name = "no_agent_leads_a_life_astray_or_makes_the_host_hold_more_than_its_bounds";
    Campaign::new(env!("CARGO_PKG_NAME"), name, 3000)
        .must_see(&[
            "orphaned", "hooks", "piece", "answered", "refused", "exited",
        ])
        .play(play);
}
