//! Bytes that a guest might send instead of frames, and heads that are no messages, for both directions.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed test says where, and cuts its own numbers"
)]

use std::collections::BTreeMap;

use thaw_agent_protocol::frame::{BODY_BYTES_MAX, FRAME_BYTES_MAX, HEAD_BYTES_MAX, HEADER_BYTES};
use thaw_agent_protocol::{
    AgentMessage, Configure, Decoder, Frame, FrameError, Generation, HostMessage, InitError,
    InvocationError, Invoke, LogStream, Message, Reply, RuntimeExit, RuntimeExitCause, StreamBegin,
    StreamEnd, StreamFailure, Thaw,
};
use thaw_fuzz::{Campaign, CountingHeap, Dice, measured};

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

/// Bytes that a reader feeds at once, as both sides do.
const CHUNK_BYTES: usize = 64 * 1024;
/// What a message may need in memory for each byte of its head: an empty string in a list has three bytes there, and 24 here.
const HEAD_FACTOR: usize = 32;

fn text(dice: &mut Dice) -> String {
    let length = *dice.pick(&[0, 1, 8, 100]);
    let text: String = (0..length)
        .map(|_| *dice.pick(&['a', '"', '\\', '\0', 'ü', '\u{1f980}', '\u{ffff}']))
        .collect();
    text
}

fn maybe(dice: &mut Dice) -> Option<String> {
    dice.in_thousand(500).then(|| text(dice))
}

fn payload(dice: &mut Dice) -> Vec<u8> {
    let length = *dice.pick(&[0, 1, 100, 5000]);
    dice.bytes(length)
}

fn from_agent(dice: &mut Dice) -> AgentMessage {
    let error = |dice: &mut Dice| InvocationError {
        request_id: text(dice),
        error_type: maybe(dice),
        payload: payload(dice),
    };
    match dice.range(0, 15) {
        0 => AgentMessage::Hello {
            agent_version: text(dice),
        },
        1 => AgentMessage::Ready,
        2 => AgentMessage::InitError(InitError {
            error_type: text(dice),
            payload: payload(dice),
        }),
        3 => AgentMessage::Thawed {
            unique_after_ns: Some(dice.edge(64)),
            extensions: dice.in_thousand(500),
        },
        4 => AgentMessage::Log {
            stream: *dice.pick(&[LogStream::Stdout, LogStream::Stderr]),
            bytes: payload(dice),
        },
        5 => AgentMessage::Response(Reply {
            request_id: text(dice),
            content_type: maybe(dice),
            payload: payload(dice),
        }),
        6 => AgentMessage::ResponseBegin(StreamBegin {
            request_id: text(dice),
            content_type: maybe(dice),
        }),
        7 => AgentMessage::ResponseChunk(payload(dice)),
        8 => AgentMessage::ResponseEnd(StreamEnd {
            request_id: text(dice),
            failure: dice.in_thousand(500).then(|| StreamFailure {
                error_type: text(dice),
                document: payload(dice),
            }),
        }),
        9 => AgentMessage::InvocationError(error(dice)),
        10 => AgentMessage::RestoreError(error(dice)),
        11 => AgentMessage::RuntimeExit(RuntimeExit {
            cause: match dice.in_thousand(500) {
                true => RuntimeExitCause::Code(dice.edge(32) as i32),
                false => RuntimeExitCause::Signal(dice.edge(32) as i32),
            },
            out_of_memory: dice.in_thousand(500),
            request_id: maybe(dice),
        }),
        12 => AgentMessage::Settled,
        13 => AgentMessage::Restoring,
        14 => AgentMessage::Restored,
        _ => AgentMessage::Fatal {
            message: text(dice),
        },
    }
}

fn from_host(dice: &mut Dice) -> HostMessage {
    match dice.range(0, 3) {
        0 => HostMessage::Configure(Configure {
            bootstrap: (0..dice.range(0, 3)).map(|_| text(dice)).collect(),
            environment: BTreeMap::from([(text(dice), text(dice))]),
            init_limit_ms: dice.edge(64),
            hostname: text(dice),
            account_id: maybe(dice),
            network: *dice.pick(&[false, true]),
            authority: None,
        }),
        1 => HostMessage::Thaw(Thaw {
            unix_time_ns: dice.edge(64),
            hostname: text(dice),
            entropy: payload(dice),
        }),
        2 => HostMessage::Invoke(Invoke {
            request_id: text(dice),
            deadline_unix_ms: dice.edge(64),
            function_arn: text(dice),
            trace_id: maybe(dice),
            client_context: maybe(dice),
            cognito_identity: maybe(dice),
            payload: payload(dice),
        }),
        _ => HostMessage::Shutdown,
    }
}

/// A frame as either side might send it, or one at the limits, or one that nobody sends.
fn frame(dice: &mut Dice) -> Frame {
    let generation = Generation(dice.edge(64));
    match dice.range(0, 9) {
        0..=4 => from_agent(dice).into_frame(generation).unwrap(),
        5..=7 => from_host(dice).into_frame(generation).unwrap(),
        8 if dice.in_thousand(60) => Frame {
            kind: dice.edge(8) as u8,
            generation,
            head: vec![b'['; HEAD_BYTES_MAX],
            body: vec![0; BODY_BYTES_MAX],
        },
        8 => Frame {
            kind: dice.edge(8) as u8,
            generation,
            head: br#"["",""#.repeat(dice.index(2000)),
            body: Vec::new(),
        },
        _ => {
            // A message of some kind with a head of another.
            let mut frame = from_agent(dice).into_frame(generation).unwrap();
            frame.kind = from_host(dice).into_frame(generation).unwrap().kind
                ^ (dice.range(0, 1) as u8 * 65);
            (0..dice.range(1, 3)).for_each(|_| dice.spoil(&mut frame.head));
            frame.head.truncate(HEAD_BYTES_MAX);
            frame
        }
    }
}

/// All frames of a stream that comes in pieces, and how it ends, with what a decoder may hold at any time.
fn decode(dice: &mut Dice, stream: &[u8], piece_max: usize) -> (Vec<Frame>, Option<FrameError>) {
    let mut decoder = Decoder::new();
    let (mut frames, mut rest, mut held) = (Vec::new(), stream, 0);
    let most = 2 * (FRAME_BYTES_MAX + CHUNK_BYTES) as i64;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(1 + dice.index(piece_max)));
        rest = after;
        let ((), grown) = measured(|| decoder.feed(piece));
        held += grown.held;
        assert!(
            held <= most && grown.peak <= 3 * most,
            "{held} held, {} needed",
            grown.peak
        );
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

/// What a frame says in one direction: it says it again, and costs no more memory than its bytes justify.
fn interpret<M: Message + Clone + PartialEq + std::fmt::Debug>(dice: &mut Dice, frame: &Frame) {
    let limit = HEAD_FACTOR * frame.head.len() + 2 * frame.body.len() + 4096;
    let copy = frame.clone();
    let (message, grown) = measured(|| M::from_frame(copy));
    assert!(
        grown.peak <= limit as i64,
        "{} bytes for {frame:?}",
        grown.peak
    );
    let Ok(message) = message else {
        dice.saw("no message");
        return;
    };
    dice.saw(format!("kind {}", frame.kind));
    let again = message.clone().into_frame(frame.generation).unwrap();
    assert_eq!(
        (again.kind, again.generation),
        (frame.kind, frame.generation)
    );
    assert_eq!(M::from_frame(again).unwrap(), message);
}

fn play(dice: &mut Dice) {
    let mut stream = Vec::new();
    for _ in 0..dice.range(1, 6) {
        frame(dice).encode(&mut stream).unwrap();
    }
    if dice.in_thousand(600) {
        (0..dice.range(1, 4)).for_each(|_| dice.spoil(&mut stream));
    }
    if dice.in_thousand(300) {
        // A header with any lengths.
        let at = dice.index(stream.len().max(HEADER_BYTES) - HEADER_BYTES + 1);
        if stream.len() >= at + HEADER_BYTES {
            stream[at..at + 3].copy_from_slice(b"TH\x01");
            stream[at + 12..at + 16].copy_from_slice(&(dice.edge(32) as u32).to_le_bytes());
            stream[at + 16..at + 20].copy_from_slice(&(dice.edge(32) as u32).to_le_bytes());
        }
    }
    let whole = decode(dice, &stream, CHUNK_BYTES);
    let piece_max = if stream.len() > 100_000 {
        CHUNK_BYTES
    } else {
        *dice.pick(&[1, 7, 100, 4096])
    };
    assert_eq!(
        decode(dice, &stream, piece_max),
        whole,
        "pieces make a difference"
    );

    let (frames, end) = whole;
    let mut again = Vec::new();
    for frame in &frames {
        assert!(frame.head.len() <= HEAD_BYTES_MAX && frame.body.len() <= BODY_BYTES_MAX);
        frame.encode(&mut again).unwrap();
        interpret::<AgentMessage>(dice, frame);
        interpret::<HostMessage>(dice, frame);
    }
    assert_eq!(
        stream[..again.len()],
        again,
        "frames are not what was in the stream"
    );
    dice.saw(match end {
        None if again.len() == stream.len() => "whole",
        None => "cut",
        Some(FrameError::Magic(_)) => "magic",
        Some(FrameError::Version(_)) => "version",
        Some(FrameError::HeadTooLarge(_)) => "head",
        Some(FrameError::BodyTooLarge(_)) => "body",
    });
}

#[test]
fn no_bytes_lead_a_decoder_astray_or_beyond_one_frame() {
    let kinds: Vec<String> = (1..=4)
        .chain(65..=80)
        .map(|kind| format!("kind {kind}"))
        .collect();
    let ends = [
        "no message",
        "whole",
        "cut",
        "magic",
        "version",
        "head",
        "body",
    ];
    let seen: Vec<&str> = kinds.iter().map(String::as_str).chain(ends).collect();
    Campaign::new(
        env!("CARGO_PKG_NAME"),
        "no_bytes_lead_a_decoder_astray_or_beyond_one_frame",
        6000,
    )
    .must_see(&seen)
    .play(play);
}
