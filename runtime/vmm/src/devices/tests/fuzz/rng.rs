//! The entropy device: whatever it is asked for, it gives little, and holds nothing.

use thaw_fuzz::{Campaign, Dice};
use vm_memory::GuestAddress;

use super::DEVICES;
use super::chains::bring_up;
use super::machine::Machine;
use super::ring::Want;
use crate::devices::tests::driver::{EVENT_IDX, Guest, RNG, VERSION_1};

/// Bytes of one answer at most, as the device's own limit is.
const ANSWER_BYTES_MAX: usize = 4096;

pub fn request(dice: &mut Dice, _: u32) -> Vec<Want> {
    let mut wants = Vec::new();
    if dice.in_thousand(20) {
        wants.push(Want::Out(vec![0; 16]));
    }
    for _ in 0..dice.range(1, 3) {
        wants.push(Want::In(
            *dice.pick(&[0, 1, 8, 64, 4095, 4096, 4097, 20_000]),
        ));
    }
    wants
}

fn play(dice: &mut Dice) {
    let mut machine = Machine::new();
    let device = DEVICES.iter().find(|device| device.window == RNG).unwrap();
    let mut ring = bring_up(&mut machine, dice, device).remove(0);
    for _ in 0..dice.range(1, 10) {
        // Alone, and with no zero byte that is there for certain before.
        let length = *dice.pick(&[1usize, 2, 64, 4096, 4097, 60_000]);
        let placed = ring.offer(&machine, dice, &[Want::In(length)]);
        let (address, _) = placed.buffers[0];
        machine.poke(address, &vec![0; length]);
        machine.serve(RNG);
        if machine.is_broken(RNG) {
            machine.tell_faults();

            panic!("{:?} was broken by {length} bytes at {address:#x}", ring);
        }
        let used = machine.state_of(RNG).queues[0].as_ref().unwrap().position;
        let slot = u64::from(used.wrapping_sub(1) % ring.size);
        if ring.waiting(&machine) == 0 {
            let told = machine.peek(ring.used + 4 + 8 * slot + 4, 4);
            let told = u32::from_le_bytes(told.try_into().unwrap()) as usize;
            assert_eq!(told, length.min(ANSWER_BYTES_MAX), "bytes of an answer");
            let after = machine.peek(address + told as u64, length - told);
            assert!(after.iter().all(|&byte| byte == 0), "more than was told");
            dice.saw("answered");
        }
    }
}

/// "virtio-rng host memory cap": a request of 4 GiB costs the host nothing beyond its answer.
#[test]
fn an_entropy_request_of_any_length_is_answered_with_little_and_held_nowhere() {
    let name = "an_entropy_request_of_any_length_is_answered_with_little_and_held_nowhere";
    Campaign::new(env!("CARGO_PKG_NAME"), name, 400)
        .must_see(&["answered"])
        .play(play);

    // The longest chain that there can be: buffers that overlap, 4 GiB less a byte in all.
    let guest = Guest::with_two_disks();
    let ring = &mut guest.bring_up(RNG, VERSION_1 | EVENT_IDX, 1)[0];
    let (count, length) = (64, 4 * 1024 * 1024 - 4096);
    for index in 0..count {
        let flags = if index + 1 < count { 3 } else { 2 };
        ring.set_descriptor(&guest.memory, index, (4096, length, flags, index + 1));
    }
    ring.publish(&guest.memory, 0);
    let (_, grown) = thaw_fuzz::measured(|| guest.devices.slots[RNG].serve());
    // The list of its buffers, which is gone when it is answered.
    assert!(grown.held == 0 && grown.peak < 64 * 1024, "{grown:?}");
    let used =
        vm_memory::Bytes::read_obj::<u64>(&guest.memory, GuestAddress(ring.used + 4)).unwrap();
    assert_eq!(used >> 32, ANSWER_BYTES_MAX as u64);
}
