//! A guest that means harm, as seeded campaigns (`thaw-fuzz`): registers, rings, chains, requests, packets, ports and saved
//! states, mostly as a driver makes them, and spoilt. What must hold is checked after every step by [`machine::Machine`].
//!
//! Another device is another row of [`DEVICES`].

mod block;
mod chains;
mod machine;
mod net;
mod offer;
mod registers;
mod ring;
mod rng;
mod serial;
mod state;
mod vsock;

use thaw_fuzz::{CountingHeap, Dice};

use super::driver::{COW, NET, READ_ONLY, RNG, VSOCK};
use ring::Want;

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

/// One device on which campaigns are played.
pub struct Device {
    window: usize,
    queues: u32,
    /// A request that a well-meaning driver might put into this queue.
    request: fn(&mut Dice, queue: u32) -> Vec<Want>,
}

const DEVICES: [Device; 5] = [
    Device {
        window: COW,
        queues: 1,
        request: block::request,
    },
    Device {
        window: READ_ONLY,
        queues: 1,
        request: block::request,
    },
    Device {
        window: VSOCK,
        queues: 3,
        request: vsock::request,
    },
    Device {
        window: RNG,
        queues: 1,
        request: rng::request,
    },
    Device {
        window: NET,
        queues: 2,
        request: net::request,
    },
];
