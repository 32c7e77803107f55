//! What a driver of the network device puts into its queues.

use thaw_fuzz::Dice;

use super::ring::Want;

/// Header, Ethernet header with a tag, MTU.
const BUFFER: usize = 12 + 18 + 1500;

/// Room for a frame in queue 0, a frame with its header in queue 1; or nearly.
pub fn request(dice: &mut Dice, queue: u32) -> Vec<Want> {
    let length = *dice.pick(&[
        BUFFER, BUFFER, BUFFER, 0, 1, 11, 12, 13, 25, 26, 1526, 1527, 9000,
    ]);
    if queue == 0 {
        let mut wants = vec![Want::In(length)];
        if dice.in_thousand(100) {
            wants.push(Want::In(64));
        }
        if dice.in_thousand(20) {
            wants.push(Want::Out(vec![0; 12]));
        }
        return wants;
    }
    let mut frame = dice.bytes(length);
    let mut wants = Vec::new();
    if dice.in_thousand(300) {
        // The header in a buffer of its own, as drivers without a modern device do.
        let at = frame.len().min(12);
        let rest = frame.split_off(at);
        wants.push(Want::Out(frame));
        frame = rest;
    }
    wants.push(Want::Out(frame));
    if dice.in_thousand(20) {
        wants.push(Want::In(16));
    }
    wants
}
