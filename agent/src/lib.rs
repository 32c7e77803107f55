//! The guest's init: boots the sandbox, serves the Lambda Runtime API to the function's runtime, and answers to the host.
//!
//! Owns: everything inside the guest. Must not know: virtual machines, pools, other sandboxes. Start at
//! [`driver::Driver`], which carries out what [`life::Life`] decides; [`boot`] comes before it, when the agent is PID 1.
//!
//! Always holds:
//! - one thread; no timer runs while a snapshot may be taken or a clone may lie asleep;
//! - output that the runtime wrote before it answered is on the channel before the answer is;
//! - memory is bounded whatever the runtime or the host sends: a full channel stops the reading of pipes and calls;
//! - absent: any guess. A frame of another life, a failed clock or a failed reseed ends the sandbox.
#![deny(unsafe_code)]

pub mod api;
pub mod boot;
pub mod channel;
pub mod document;
pub mod driver;
pub mod extensions;
pub mod identity;
pub mod life;
pub mod network;
pub mod output;
pub mod process;
#[expect(
    unsafe_code,
    reason = "the one module that makes system calls without a safe wrapper"
)]
pub mod sys;
pub mod telemetry;
