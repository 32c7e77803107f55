//! Queues and chains of every device: requests as drivers make them, in rings that are spoilt more or less.

use std::io::Write as _;

use thaw_fuzz::{Campaign, Dice};

use super::machine::{MEMORY_BYTES, Machine};
use super::ring::Ring;
use super::{DEVICES, Device};
use crate::devices::tests::driver::{EVENT_IDX, INDIRECT, VERSION_1};

/// Features, queues and DRIVER_OK; queues are large, small, or have one entry.
pub fn bring_up(machine: &mut Machine, dice: &mut Dice, device: &Device) -> Vec<Ring> {
    let Device { window, queues, .. } = *device;
    let features = VERSION_1 | *dice.pick(&[0, EVENT_IDX, INDIRECT, EVENT_IDX | INDIRECT]);
    for status in [0, 1, 3] {
        machine.write(window, 0x70, status);
    }
    for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
        machine.write(window, 0x24, select);
        machine.write(window, 0x20, half);
    }
    machine.write(window, 0x70, 11);
    let rings: Vec<_> = (0..queues)
        .map(|index| {
            // Old contents of the rings would be a driver's fault of its own.
            machine.write(window, 0x30, index);
            let size_max = u64::from(machine.guest.read(window, 0x34).ilog2());
            let ring = Ring::new(window, index, 1 << dice.range(0, size_max));
            machine.poke(ring.descriptors, &[0; 0x1800]);
            ring.set_up(machine);
            ring
        })
        .collect();
    machine.write(window, 0x70, 15);
    rings
}

fn play(dice: &mut Dice) {
    let mut machine = Machine::new();
    let device = dice.pick(&DEVICES);
    let noise = dice.bytes(4096);
    (0..MEMORY_BYTES / 4096).for_each(|page| machine.poke(page * 4096, &noise));
    let mut rings = bring_up(&mut machine, dice, device);
    let harm = *dice.pick(&[0, 50, 300]);
    let mut is_unspoilt = true;
    for _ in 0..dice.range(1, 12) {
        for ring in &mut rings {
            for _ in 0..dice.range(0, 3) {
                if ring.waiting(&machine) >= ring.size {
                    break;
                }
                let request = (device.request)(dice, ring.index);
                ring.offer(&machine, dice, &request);
            }
            while dice.in_thousand(harm) {
                ring.spoil(&machine, dice);
                is_unspoilt = false;
            }
        }
        if dice.in_thousand(200) {
            let bytes = dice.bytes(500);
            // A full socket takes less.
            let _ = machine.guest.host.write(&bytes);
        }
        let queue = dice.range(0, u64::from(device.queues));
        machine.write(device.window, 0x50, queue as u32);
        machine.serve(device.window);
        let state = machine.state_of(device.window);
        if state
            .queues
            .iter()
            .flatten()
            .any(|queue| queue.position > 0)
        {
            dice.saw(format!("window {} used chains", device.window));
        }
        if machine.is_broken(device.window) {
            dice.saw(format!("window {} broke", device.window));
            machine.serve(device.window);
            machine.write(device.window, 0x70, 15);
            machine.serve(device.window);
            if dice.in_thousand(500) {
                rings = bring_up(&mut machine, dice, device);
                assert!(
                    !machine.is_broken(device.window),
                    "a reset does not mend it"
                );
            }
        }
        if dice.in_thousand(60) {
            machine.round_trip(dice);
        }
        if dice.in_thousand(300) {
            machine.hear();
        }
    }
    if is_unspoilt && harm == 0 {
        dice.saw(format!("window {} unspoilt", device.window));
    }
    machine.round_trip(dice);
}

#[test]
fn whatever_lies_in_rings_is_harmless() {
    let name = "whatever_lies_in_rings_is_harmless";
    let seen: Vec<String> = (DEVICES.iter())
        .flat_map(|device| {
            ["used chains", "broke", "unspoilt"]
                .map(|what| format!("window {} {what}", device.window))
        })
        .collect();
    let seen: Vec<&str> = seen.iter().map(String::as_str).collect();
    Campaign::new(env!("CARGO_PKG_NAME"), name, 2000)
        .must_see(&seen)
        .play(play);
}
