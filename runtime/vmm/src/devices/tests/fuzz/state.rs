//! Saved states that were tampered with: devices refuse them or run them, and are as harmless then as any.

use std::os::unix::net::UnixStream;

use thaw_fuzz::{Campaign, Dice, measured};

use crate::devices::state::{ConnectionStateV1, DeviceStateV1, DevicesStateV1};
use crate::devices::tests::driver::{Guest, VSOCK, config, pattern, postcard_bytes};
use crate::devices::tests::restore::busy_guest;
use crate::devices::{Devices, HEAP_BYTES_MAX};

/// Changes one field to any value that its type has.
fn change(state: &mut DevicesStateV1, dice: &mut Dice) {
    let window = dice.index(state.slots.len());
    let slot = &mut state.slots[window];
    let queue = dice.index(slot.queues.len());
    let registers = &mut slot.registers;
    let ring = &mut registers.queues[queue];
    match dice.range(0, 13) {
        0 => registers.status = *dice.pick(&[0, 1, 2, 3, 4, 8, 11, 15, 0x40, 0x4f, 0x8f, 0xff]),
        1 => registers.driver_features = dice.edge(64),
        2 => registers.queue_select = dice.edge(32) as u32,
        3 => ring.size = dice.edge(16) as u16,
        4 => ring.ready = !ring.ready,
        5 => ring.descriptors = dice.edge(64),
        6 => ring.available = dice.edge(64),
        7 => ring.used = dice.edge(64),
        8 => slot.interrupt_status = dice.edge(32) as u32,
        9 => slot.queues[queue] = None,
        10 => {
            if let Some(cursor) = &mut slot.queues[queue] {
                cursor.position = dice.edge(16) as u16;
            }
        }
        11 => state.serial.in_buffer = vec![7; dice.index(100)],
        12 => state.serial.interrupt_identification = dice.edge(8) as u8,
        _ => {
            let DeviceStateV1::Vsock(channel) = &mut state.slots[VSOCK].device else {
                panic!("window {VSOCK} is no socket");
            };
            match dice.range(0, 5) {
                0 => channel.stale = dice.edge(32) as u32,
                1 => channel.to_host = vec![1; dice.index(600_000)],
                2 => channel.to_guest = vec![1; dice.index(300_000)],
                3 => channel.connection = None,
                4 => channel.guest_cid = dice.edge(64),
                _ => {
                    if let Some(connection) = &mut channel.connection {
                        *connection = any_connection(dice);
                    }
                }
            }
        }
    }
}

fn any_connection(dice: &mut Dice) -> ConnectionStateV1 {
    let mut number = || dice.edge(32) as u32;
    ConnectionStateV1 {
        guest_port: number(),
        peer_buf_alloc: number(),
        peer_fwd_cnt: number(),
        sent: number(),
        forwarded: number(),
        announced: number(),
        shutdown: number() % 5,
        credit_requested: dice.in_thousand(500),
        update_requested: dice.in_thousand(500),
    }
}

fn play(dice: &mut Dice, content: &[u8], guest: &Guest, good: &DevicesStateV1) {
    let mut state = good.clone();
    for _ in 0..dice.range(1, 3) {
        change(&mut state, dice);
    }
    let mut bytes = postcard_bytes(&state);
    if dice.in_thousand(400) {
        dice.spoil(&mut bytes);
    }
    let (decoded, grown) = measured(|| postcard::from_bytes::<DevicesStateV1>(&bytes));
    assert!(
        grown.peak <= HEAP_BYTES_MAX as i64,
        "decoding needs {}",
        grown.peak
    );
    let Ok(state) = decoded else {
        dice.saw("undecodable");
        return;
    };
    let (_host, agent) = UnixStream::pair().unwrap();
    let config = config(&[content, content], agent);
    let Ok(devices) = Devices::restore(config, guest.memory.clone(), &state) else {
        dice.saw("refused");
        return;
    };
    dice.saw("restored");
    assert_eq!(devices.save(), state, "what was restored is what was saved");
    devices.prime();
    devices.resume();
    let ((), grown) = measured(|| {
        for _ in 0..20 {
            devices.serve_all();
        }
    });
    assert!(grown.held <= HEAP_BYTES_MAX as i64 && grown.peak <= HEAP_BYTES_MAX as i64);
    devices.pause().unwrap();
    devices.save();
}

#[test]
fn a_saved_state_that_was_tampered_with_is_refused_or_harmless() {
    let content = pattern(8);
    let name = "a_saved_state_that_was_tampered_with_is_refused_or_harmless";
    Campaign::new(env!("CARGO_PKG_NAME"), name, 3000)
        .must_see(&["undecodable", "refused", "restored"])
        .play(|dice| {
            let (guest, _) = busy_guest(&content);
            guest.devices.pause().unwrap();
            let good = guest.devices.save();
            play(dice, &content, &guest, &good);
        });
}
