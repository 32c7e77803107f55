//! Tests that drive the devices as a guest's drivers do, through registers and rings in guest memory.

#![expect(
    clippy::cast_possible_truncation,
    reason = "tests cut their own small numbers and patterns"
)]

mod arithmetic;
mod block;
mod driver;
mod fuzz;
mod reset;
mod restore;
mod thread;
mod transport;
mod vsock;
