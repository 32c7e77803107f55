//! The agent without a virtual machine: real driver, real Runtime API over TCP, real processes. The test is the host.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod channel;
mod extensions;
mod network;
mod processes;
mod runtime_api;
mod runtimes;
mod streams;
mod support;
mod telemetry;
