//! The agent channel: packet headers of any content, and a machine of buffers and credit that no header may lead astray.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use thaw_fuzz::{Campaign, Dice};
use vm_memory::{Address, Bytes, GuestAddress};

use super::ring::Want;
use crate::devices::state::{ChannelStateV1, DeviceStateV1};
use crate::devices::tests::driver::{EVENT_IDX, GUEST_CID, Guest, Part, VERSION_1, VSOCK};
use crate::devices::vsock::packet::{
    HEADER_BYTES, Header, OP_REQUEST, OP_RST, OP_RW, OP_SHUTDOWN, PAYLOAD_BYTES_MAX, TYPE_STREAM,
};
use crate::devices::vsock::{AGENT_PORT, BUFFERED_BYTES_MAX, Channel, HOST_CID};

const PORTS: [u32; 3] = [5000, 5001, 0];
/// What one side may have buffered of one connection, as the device grants it.
const WINDOW_BYTES: usize = 256 * 1024;
/// Answers that may wait: those to packets, and the one that tells of the host's end.
const REPLIES_MAX: usize = 65;

/// A header that is mostly right.
fn header(dice: &mut Dice, length: usize) -> Header {
    let op = *dice.pick(&[1, 1, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 6, 7]);
    let mut header = Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: PORTS[if dice.in_thousand(900) {
            0
        } else {
            dice.index(3)
        }],
        dst_port: AGENT_PORT,
        length: length as u32,
        kind: TYPE_STREAM,
        op,
        flags: if op == OP_SHUTDOWN {
            dice.range(0, 3) as u32
        } else {
            0
        },
        buf_alloc: *dice.pick(&[0, 1, 4096, 1 << 18, u32::MAX]),
        fwd_cnt: 0,
    };
    if dice.in_thousand(80) {
        match dice.range(0, 7) {
            0 => header.src_cid = dice.edge(64),
            1 => header.dst_cid = dice.edge(64),
            2 => header.src_port = dice.edge(32) as u32,
            3 => header.dst_port = dice.edge(32) as u32,
            4 => header.kind = dice.edge(16) as u16,
            5 => header.op = dice.edge(16) as u16,
            6 => header.flags = dice.edge(32) as u32,
            _ => header.fwd_cnt = dice.edge(32) as u32,
        }
    }
    header
}

/// A packet for the transmit queue, buffers for the others.
pub fn request(dice: &mut Dice, queue: u32) -> Vec<Want> {
    if queue != 1 {
        return vec![Want::In(*dice.pick(&[44, 45, 100, 4096, 4140, 66_000]))];
    }
    let length = *dice.pick(&[0, 0, 1, 100, 3000, PAYLOAD_BYTES_MAX]);
    let mut header = header(dice, length);
    if dice.in_thousand(20) {
        header.length = dice.edge(32) as u32;
    }
    let (bytes, payload) = (header.encode().to_vec(), dice.bytes(length));
    match dice.range(0, 9) {
        0 => vec![Want::Out([bytes, payload].concat())],
        1 => {
            let (one, two) = bytes.split_at(dice.index(HEADER_BYTES));
            vec![Want::Out(one.to_vec()), Want::Out([two, &payload].concat())]
        }
        _ => vec![Want::Out(bytes), Want::Out(payload)],
    }
}

/// The channel alone, with an account of what must come out of it.
struct Account {
    channel: Channel,
    to_host: VecDeque<u8>,
    to_guest: VecDeque<u8>,
    is_host_open: bool,
}

impl Account {
    fn guest_speaks(&mut self, dice: &mut Dice) {
        if !self.channel.can_receive() {
            dice.saw("full of answers");
            return;
        }
        let length = match dice.range(0, 40) {
            0 => PAYLOAD_BYTES_MAX,
            at => at as usize * 7,
        };
        let mut header = header(dice, length);
        header.length = length as u32;
        let payload = dice.bytes(length);
        let before = self.channel.save();
        self.channel.receive(&header, &payload, self.is_host_open);
        let after = self.channel.save();

        let port = |state: &ChannelStateV1| state.connection.as_ref().map(|c| c.guest_port);
        let is_ours = header.src_cid == GUEST_CID
            && header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM
            && header.dst_port == AGENT_PORT;
        let speaks = is_ours && port(&before) == Some(header.src_port);
        let grown = after.to_host.len() - before.to_host.len();
        if grown > 0 {
            assert!(
                speaks && header.op == OP_RW && grown == length,
                "{header:?} was taken"
            );
            self.to_host.extend(&payload);
            dice.saw("taken");
        }
        match (port(&before), port(&after)) {
            (None, Some(_)) => {
                assert!(
                    is_ours && header.op == OP_REQUEST && self.is_host_open,
                    "{header:?}"
                );
                dice.saw("opened");
            }
            (Some(_), None) => {
                assert!(speaks, "{header:?} closed another's connection");
                self.to_guest.clear();
                dice.saw(if header.op == OP_RST {
                    "closed by reset"
                } else {
                    "closed"
                });
            }
            (before, after) => assert_eq!(before, after, "{header:?} took the channel over"),
        }
        assert!(
            after.replies.len() <= before.replies.len() + 1,
            "one answer a packet"
        );
    }

    fn host_speaks(&mut self, dice: &mut Dice) {
        let room = self.channel.room_for_guest();
        let length = match dice.range(0, 20) {
            0 => room,
            _ => room.min(dice.index(3000)),
        };
        let bytes = dice.bytes(length);
        self.channel.push_for_guest(&bytes);
        self.to_guest.extend(&bytes);
    }

    fn guest_hears(&mut self, dice: &mut Dice) {
        let room = *dice.pick(&[1, 100, 4096, 100_000]);
        let before = self.channel.save();
        let has_packet = self.channel.has_packet();
        let mut payload = vec![1; 10];
        let header = self.channel.next_packet(room, &mut payload);
        assert_eq!(header.is_some(), has_packet);
        let Some(header) = header else {
            return;
        };
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        assert_eq!(header.length as usize, payload.len());
        assert!(payload.is_empty() || header.op == OP_RW);
        if header.op == OP_RW {
            let peer = before.connection.expect("data goes to somebody");
            let credit =
                (peer.peer_buf_alloc).saturating_sub(peer.sent.wrapping_sub(peer.peer_fwd_cnt));
            assert!(
                payload.len() <= room.min(credit as usize),
                "more than there is room for"
            );
            assert!(
                !payload.is_empty(),
                "a packet that carries nothing, for ever"
            );
            let expected: Vec<u8> = self.to_guest.drain(..payload.len()).collect();
            assert!(payload == expected, "bytes of the host are out of order");
            dice.saw("sent");
        }
    }

    fn host_takes(&mut self, dice: &mut Dice) {
        let waiting = self.channel.host_bytes();
        if waiting.is_empty() {
            return;
        }
        let count = if dice.in_thousand(500) {
            waiting.len()
        } else {
            1 + dice.index(waiting.len())
        };
        let expected: Vec<u8> = self.to_host.drain(..count).collect();
        assert!(
            waiting[..count] == expected,
            "bytes of the guest are out of order"
        );
        self.channel.host_took(count);
    }

    fn check(&self) {
        let state = self.channel.save();
        let waiting = state.to_host.len() - state.stale as usize;
        assert!(waiting <= WINDOW_BYTES && state.to_guest.len() <= WINDOW_BYTES);
        assert!(state.to_host.len() + state.to_guest.len() <= BUFFERED_BYTES_MAX);
        assert!(state.replies.len() <= REPLIES_MAX);
        assert!(state.to_host.len() == self.to_host.len());
        assert!(state.to_guest.len() == self.to_guest.len());
    }
}

fn play(dice: &mut Dice) {
    let mut account = Account {
        channel: Channel::new(GUEST_CID),
        to_host: VecDeque::new(),
        to_guest: VecDeque::new(),
        is_host_open: true,
    };
    let (deaf_host, deaf_guest) = (dice.in_thousand(200), dice.in_thousand(300));
    let steps_max = *dice.pick(&[20, 150, 800]);
    for _ in 0..dice.range(1, steps_max) {
        match dice.range(0, 9) {
            0..=3 => account.guest_speaks(dice),
            4 => account.host_speaks(dice),
            5 | 6 if !deaf_guest => account.guest_hears(dice),
            7 if !deaf_host => account.host_takes(dice),
            8 if dice.in_thousand(30) => {
                account.channel.reset();
                account.to_guest.clear();
                dice.saw("reset");
            }
            8 if dice.in_thousand(20) && account.is_host_open => {
                account.channel.close_by_host();
                account.is_host_open = false;
                account.to_host.clear();
                account.to_guest.clear();
                dice.saw("host gone");
            }
            9 if dice.in_thousand(200) => {
                let state = account.channel.save();
                account.channel = Channel::try_from((GUEST_CID, state.clone())).unwrap();
                assert_eq!(account.channel.save(), state);
                dice.saw("restored");
            }
            _ => {}
        }
        account.check();
    }
}

#[test]
fn no_packet_leads_the_channel_beyond_its_buffers_or_mixes_its_bytes() {
    let name = "no_packet_leads_the_channel_beyond_its_buffers_or_mixes_its_bytes";
    Campaign::new(env!("CARGO_PKG_NAME"), name, 3000)
        .must_see(&[
            "taken",
            "opened",
            "closed",
            "closed by reset",
            "full of answers",
            "sent",
            "reset",
            "host gone",
            "restored",
        ])
        .play(play);
}

/// The guest's other processors may change what is being read: the header counts as it was copied, once.
#[test]
fn a_header_that_changes_while_it_is_read_is_taken_once() {
    const SHORT: u32 = 8;
    const LONG: u32 = 1024;
    let guest = Guest::with_two_disks();
    guest.host.set_nonblocking(true).unwrap();
    let mut rings = guest.bring_up(VSOCK, VERSION_1 | EVENT_IDX, 3);
    let mut ring = rings.remove(1);
    let header = |op, length| Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: PORTS[0],
        dst_port: AGENT_PORT,
        kind: TYPE_STREAM,
        op,
        length,
        ..Header::default()
    };
    ring.submit(&guest, &[Part::Out(&header(OP_REQUEST, 0).encode())]);
    guest.run();
    let is_over = AtomicBool::new(false);
    let mut seen = [0; 2];
    std::thread::scope(|scope| {
        let place = GuestAddress(0x8_0000);
        let (memory, is_over) = (&guest.memory, &is_over);
        scope.spawn(move || {
            for length in [SHORT, LONG].into_iter().cycle() {
                memory.write_obj(length, place.unchecked_add(24)).unwrap();
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        guest
            .memory
            .write_slice(&header(OP_RW, LONG).encode(), place)
            .unwrap();
        for _ in 0..20_000 {
            while ring.take_used(&guest.memory).is_some() {}
            let packet = (place.0, HEADER_BYTES as u32 + LONG, 0, 0);
            ring.set_descriptor(&guest.memory, 0, packet);
            ring.publish(&guest.memory, 0);
            guest.devices.slots[VSOCK].serve();
            assert!(!guest.needs_reset(VSOCK), "both lengths are right");
            let came = std::io::Read::read(&mut &guest.host, &mut [0; 4096]).unwrap();
            seen[match came as u32 {
                SHORT => 0,
                LONG => 1,
                other => panic!("{other} bytes came of one packet"),
            }] += 1;
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(
        seen.iter().all(|&count| count > 0),
        "nothing changed meanwhile: {seen:?}"
    );
    let DeviceStateV1::Vsock(state) = guest.devices.slots[VSOCK].save().device else {
        panic!("window {VSOCK} is no socket");
    };
    assert!(state.to_host.is_empty());
}
