//! Registers of every device: any offset, any width, any value, between turns, saves and rewinds.

use thaw_fuzz::{Campaign, Dice};

use super::DEVICES;
use super::machine::{MEMORY_BYTES, Machine};
use super::ring::Ring;
use crate::devices::{MMIO_BASE, SERIAL_PORT};

/// Registers that mean something, those twice that lead somewhere.
const REGISTERS: [u64; 30] = [
    0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x44, 0x50, 0x50, 0x60,
    0x64, 0x70, 0x70, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xac, 0xc0, 0xfc, 0x100,
];

fn value(dice: &mut Dice, register: u64) -> u32 {
    let likely: &[u32] = match register {
        0x14 | 0x24 => &[0, 1],
        0x20 => &[0, 1, 1 << 28, 1 << 29, 3 << 28],
        0x30 | 0x50 => &[0, 1, 2, 3],
        0x38 => &[1, 2, 16, 64, 128, 256],
        0x44 => &[0, 1],
        0x64 => &[0, 1, 2, 3],
        0x70 => &[0, 1, 3, 11, 15, 0x40, 0x80, 0x8f],
        0x80 | 0x90 | 0xa0 => &[0, 0x1000, 0x2000, 0x3_f000, 0x3_fff0, MEMORY_BYTES as u32],
        _ => &[0],
    };
    match dice.range(0, 9) {
        0 => dice.edge(32) as u32,
        _ => *dice.pick(likely),
    }
}

/// Brings a device up as far as chance lets it.
fn begin(machine: &mut Machine, dice: &mut Dice) {
    let device = dice.pick(&DEVICES);
    let steps = dice.range(1, 6);
    for (step, (register, value)) in [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
    ]
    .into_iter()
    .enumerate()
    {
        if step as u64 <= steps {
            machine.write(device.window, register, value);
        }
    }
    for queue in 0..device.queues {
        if dice.in_thousand(850) {
            let size = 1 << dice.range(0, 7);
            Ring::new(device.window, queue, size).set_up(machine);
        }
    }
    if dice.in_thousand(100) {
        // A first queue that lies nowhere, if it is not ready yet.
        machine.write(device.window, 0x30, 0);
        machine.write(device.window, 0xa4, 1);
        machine.write(device.window, 0x44, 1);
    }
    if dice.in_thousand(800) {
        machine.write(device.window, 0x70, 15);
    }
    if dice.in_thousand(100) {
        // More chains than the queue has room for.
        let ring = Ring::new(device.window, 0, 128);
        machine.poke(ring.available + 2, &0x7fffu16.to_le_bytes());
        machine.serve(device.window);
    }
    let status = machine.state_of(device.window).registers.status;
    dice.saw(format!("status {status:#x}"));
}

fn play(dice: &mut Dice) {
    let mut machine = Machine::new();
    for _ in 0..dice.range(5, 60) {
        let window = dice.index(DEVICES.len() + 1);
        match dice.range(0, 19) {
            0..=7 => {
                let register = *dice.pick(&REGISTERS);
                let value = value(dice, register);
                if window < DEVICES.len() {
                    machine.write(window, register, value);
                }
            }
            8 => {
                let width = dice.range(0, 9) as usize;
                let data = dice.bytes(width);
                let offset = dice.range(0, 0x1000 * (DEVICES.len() as u64 + 2));
                machine.write_any((MMIO_BASE - 0x1000).wrapping_add(offset), &data);
            }
            9 | 10 => {
                let mut data = vec![0xaa; dice.range(0, 9) as usize];
                let address = if dice.in_thousand(100) {
                    dice.edge(64)
                } else {
                    MMIO_BASE + dice.range(0, 0x1000 * (DEVICES.len() as u64 + 1))
                };
                machine.read_any(address, &mut data);
            }
            11 => {
                let (port, data) = (dice.range(0, 9) as u16, dice.edge(8) as u8);
                machine
                    .guest
                    .devices
                    .pio_write(SERIAL_PORT - 1 + port, &[data]);
            }
            12..=14 => begin(&mut machine, dice),
            15 => machine.serve_all(),
            16 if window < DEVICES.len() => machine.serve(window),
            17 => machine.round_trip(dice),
            _ => {
                let at = dice.range(0, MEMORY_BYTES - 64);
                let noise = dice.bytes(64);
                machine.poke(at, &noise);
            }
        }
    }
    for window in machine.windows() {
        let status = machine.state_of(window).registers.status;
        dice.saw(format!("status {status:#x}"));
    }
    machine.round_trip(dice);
}

#[test]
fn whatever_is_written_to_registers_is_harmless() {
    Campaign::new(
        env!("CARGO_PKG_NAME"),
        "whatever_is_written_to_registers_is_harmless",
        1500,
    )
    .must_see(&[
        "status 0x0",
        "status 0xb",
        "status 0xf",
        "status 0x4b",
        "status 0x4f",
        "status 0x8f",
        "restored",
        "put back",
    ])
    .play(play);
}
