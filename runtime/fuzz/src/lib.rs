//! What seeded tests share: random numbers from a seed, campaigns that play one seed after another and can play any of them
//! again, and a count of the heap that code under test holds.
//!
//! Owns: seeds, replay, time limits. Must not know what is played. For tests alone; it depends on nothing.
//! Start at [`Campaign`]. Always holds: one seed plays the same on every machine.
//!
//! How to replay, and how to play longer, is written in ARCHITECTURE.md ("Hostile guests").

mod campaign;
mod dice;
mod heap;

pub use campaign::Campaign;
pub use dice::Dice;
pub use heap::{CountingHeap, Grown, measured};
