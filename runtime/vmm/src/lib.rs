//! The monitor: one virtual machine in one process.
//!
//! Owns: KVM, guest memory, vCPU threads, devices, and what of them goes into a snapshot. Must not know: HTTP, functions,
//! the agent's messages (it carries the agent channel byte for byte), tokio.
//!
//! Start at [`control_loop`]: it reads requests and drives a [`machine::Machine`], which [`boot`] or [`restore`] makes.
//! Always holds: devices and saved state are touched only while every vCPU is paused; bytes from the guest or from a
//! snapshot never panic the process; architecture code lives under [`arch`] alone.

pub mod arch;
pub mod belongings;
pub mod boot;
mod bytes;
pub mod confine;
pub mod control_loop;
pub mod devices;
pub mod end;
pub mod fault;
pub mod host;
pub mod lifecycle;
pub mod machine;
pub mod memory;
#[cfg(test)]
#[path = "../tests/harness/mutation.rs"]
#[expect(dead_code, reason = "the rest is for tests with KVM")]
mod mutation;
pub mod outbox;
pub mod paging;
pub mod prefault;
pub mod prefetch;
pub mod rehearsal;
pub mod restore;
pub mod rewind;
pub mod save;
pub mod shell;
pub mod state;
pub mod vcpu;
