//! The agent without a virtual machine: real driver, real Runtime API over TCP, real processes. The test is the host.

mod channel;
mod processes;
mod runtime_api;
mod runtimes;
mod support;
