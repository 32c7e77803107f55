//! Tests that drive the devices as a guest's drivers do, through registers and rings in guest memory.

#![expect(
    clippy::cast_possible_truncation,
    reason = "tests cut their own small numbers and patterns"
)]

mod arithmetic;
mod block;
pub(crate) mod driver;
mod fuzz;
mod net;
mod reset;
pub(crate) mod restore;
mod thread;
mod transport;
mod vsock;
