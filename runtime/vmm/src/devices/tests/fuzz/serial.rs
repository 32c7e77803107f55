//! The serial console: any access to its ports, and what it keeps.

use thaw_fuzz::{Campaign, Dice, measured};

use super::machine::Machine;
use crate::devices::{CONSOLE_BYTES_MAX, HEAP_BYTES_MAX, SERIAL_PORT};

/// Bytes of a 16550's receive queue.
const FIFO_BYTES_MAX: usize = 64;

fn play(dice: &mut Dice) {
    let mut machine = Machine::new();
    let mut held = 0;
    for _ in 0..dice.range(1, 400) {
        let port = SERIAL_PORT - 2 + dice.range(0, 11) as u16;
        // Byte accesses are what a 16550 knows; the others must do nothing.
        let width = *dice.pick(&[1, 1, 1, 1, 1, 0, 2, 4, 8]);
        let mut data = dice.bytes(width);
        if dice.in_thousand(300) {
            // Loop-back, and a flood of bytes into it.
            machine.guest.devices.pio_write(SERIAL_PORT + 4, &[0x10]);
            for byte in 0..100 {
                machine.guest.devices.pio_write(SERIAL_PORT, &[byte]);
            }
        }
        let devices = &machine.guest.devices;
        let is_ours = (SERIAL_PORT..SERIAL_PORT + 8).contains(&port);
        let is_write = dice.in_thousand(700);
        let (was_ours, grown) = measured(|| {
            if is_write {
                devices.pio_write(port, &data)
            } else {
                devices.pio_read(port, &mut data)
            }
        });
        assert_eq!(was_ours, is_ours, "port {port:#x}");
        held += grown.held;
        assert!(held <= HEAP_BYTES_MAX as i64);
        if dice.in_thousand(5) {
            for at in 0..CONSOLE_BYTES_MAX {
                devices.pio_write(SERIAL_PORT, &[at as u8]);
            }
        }
        let kept = devices.console_tail().len();
        assert!(kept <= CONSOLE_BYTES_MAX);
        dice.saw(if kept == CONSOLE_BYTES_MAX {
            "full"
        } else {
            "room"
        });
        if dice.in_thousand(20) {
            let state = machine.freeze();
            assert!(
                state.serial.in_buffer.len() <= FIFO_BYTES_MAX,
                "loop-back is bounded"
            );
            if !state.serial.in_buffer.is_empty() {
                dice.saw("looped back");
            }
            machine.round_trip(dice);
            held = 0;
        }
    }
}

#[test]
fn whatever_is_done_to_the_serial_ports_is_harmless_and_bounded() {
    let name = "whatever_is_done_to_the_serial_ports_is_harmless_and_bounded";
    Campaign::new(env!("CARGO_PKG_NAME"), name, 300)
        .must_see(&["full", "room", "looped back"])
        .play(play);
}
