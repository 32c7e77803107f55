//! What a monitor that was taken over may send the gateway, as the gateway reads it: frames of messages, spoilt, in any pieces, with
//! descriptors that nobody asked for.

#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;

use thaw_fuzz::{Campaign, CountingHeap, Dice, measured};
use thaw_vmm_control::wire::{self, Read, Receiver, WireError};
use thaw_vmm_control::{
    Event, Exit, ExitReason, FDS_MAX, Failure, Fault, FromMonitor, MESSAGE_BYTES_MAX, Reply, Saved,
    Status, WorkingSet, WorkingSetRun,
};

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

/// What the receiver may need: the longest message, twice while its buffer grows and thrice while it moves, the message itself
/// taken apart, and what is read at once.
const HEAP_BYTES_MAX: i64 = 6 * MESSAGE_BYTES_MAX as i64;
/// Longest text of a message.
const TEXT_BYTES_MAX: usize = 3000;

fn text(dice: &mut Dice) -> String {
    let length = dice.index(TEXT_BYTES_MAX);
    let letters = ['a', '"', '\\', '\0', '\n', 'ü', '\u{1f980}', '\u{ffff}'];
    (0..length).map(|_| *dice.pick(&letters)).collect()
}

fn message(dice: &mut Dice) -> FromMonitor {
    let reply = match dice.range(0, 6) {
        0 => Reply::Done,
        1 => Reply::Saved(Saved {
            file_bytes: dice.edge(64),
            stored_bytes: dice.edge(64),
            digest: text(dice),
        }),
        2 => Reply::WorkingSet(WorkingSet {
            runs: (0..dice.index(2000))
                .map(|_| WorkingSetRun {
                    start: dice.edge(64),
                    count: dice.edge(64),
                    written: dice.in_thousand(500),
                })
                .collect(),
        }),
        3 => Reply::Status(Status {
            console: text(dice),
            ..Status::default()
        }),
        4 => Reply::Failed(Failure {
            message: text(dice),
            fault: *dice.pick(&[Fault::Caller, Fault::Guest, Fault::Host]),
        }),
        _ => {
            return FromMonitor::Event(Event::Exited(Exit {
                reason: *dice.pick(&[ExitReason::Panic, ExitReason::HostFault]),
                detail: text(dice),
                console: text(dice),
            }));
        }
    };
    FromMonitor::Reply(reply)
}

/// Frames, and the messages that they are if nobody spoilt them.
fn stream(dice: &mut Dice) -> (Vec<u8>, Vec<FromMonitor>) {
    let messages: Vec<FromMonitor> = (0..dice.range(1, 4)).map(|_| message(dice)).collect();
    let encoded = messages
        .iter()
        .map(|message| wire::encode(message).unwrap());
    let mut bytes = encoded.collect::<Vec<_>>().concat();
    if dice.in_thousand(400) {
        return (bytes, messages);
    }
    match dice.range(0, 3) {
        // A length, and what is as long but no message: brackets without end, or one long text.
        0 => {
            let length = *dice.pick(&[MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX + 1, 100_000, 200]);
            bytes = u32::try_from(length).unwrap().to_le_bytes().to_vec();
            let opening = *dice.pick(&[
                &b"["[..],
                b"{\"reply\":",
                b"\"",
                b"{\"reply\":{\"working_set\":{\"runs\":[",
                b"\\u00",
            ]);
            bytes.extend(opening.iter().copied().cycle().take(length));
        }
        1 => {
            let at = dice.index(bytes.len());
            bytes.truncate(at);
        }
        _ => (0..dice.range(1, 8)).for_each(|_| dice.spoil(&mut bytes)),
    }
    (bytes, Vec::new())
}

/// Everything that can be taken of what has come, as `Monitor::is_quiet` and its reader do.
fn take(receiver: &mut Receiver, got: &mut Vec<FromMonitor>, dice: &mut Dice) -> bool {
    loop {
        let (next, grown) = measured(|| receiver.next_message::<FromMonitor>());
        assert!(grown.peak <= HEAP_BYTES_MAX, "{} bytes", grown.peak);
        match next {
            Ok(Some((message, fds))) => {
                assert!(fds.len() <= FDS_MAX);
                got.push(message);
            }
            Ok(None) => return true,
            Err(WireError::TooLarge { .. }) => {
                dice.saw("too large");
                return false;
            }
            Err(error) => {
                assert!(matches!(error, WireError::Malformed(_)), "{error}");
                dice.saw("malformed");
                return false;
            }
        }
    }
}

#[test]
fn no_monitor_makes_the_gateway_hold_more_than_its_bounds_or_take_what_was_not_said() {
    let names = ["too large", "malformed", "too many descriptors", "whole"];
    let campaign = Campaign::new(
        "thaw-vmm-control",
        "no_monitor_makes_the_gateway_hold_more_than_its_bounds_or_take_what_was_not_said",
        3000,
    );
    campaign.must_see(&names).play(|dice| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (bytes, messages) = stream(dice);
        let (mut receiver, mut got, mut held) = (Receiver::new(), Vec::new(), 0);
        let most = *dice.pick(&[1, 5, 100, 16 * 1024, 64 * 1024]);
        // One byte at a time takes for ever where there are many.
        let most = most.max(bytes.len() / 500 + 1);
        let floods = messages.is_empty() && dice.in_thousand(300);
        let mut sent = 0;
        let mut is_well = true;
        while is_well && sent < bytes.len() {
            let end = bytes.len().min(sent + 1 + dice.index(most));
            let count = if floods { dice.index(FDS_MAX + 1) } else { 0 };
            let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| ours.as_fd()).collect();
            sent += match wire::send_some(&theirs, &bytes[sent..end], &fds) {
                // The socket is full until some of it is read.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                count => count.unwrap(),
            };
            let (read, grown) = measured(|| receiver.read_from(&ours));
            held += grown.held;
            assert!(
                held <= HEAP_BYTES_MAX && grown.peak <= HEAP_BYTES_MAX,
                "{held} held, {} needed",
                grown.peak
            );
            match read {
                Ok(read) => assert_eq!(read, Read::Some),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
                    dice.saw("too many descriptors");
                    is_well = false;
                }
            }
            is_well = is_well && take(&mut receiver, &mut got, dice);
        }
        if !messages.is_empty() {
            // A read takes 16 KiB at most.
            while receiver.read_from(&ours).is_ok() {
                assert!(take(&mut receiver, &mut got, dice));
            }
            assert_eq!(got, messages);
            dice.saw("whole");
        }
    });
}
