//! Sandboxes as a service: freeze a function once, keep restored machines ready, give each invocation one of its own.
//!
//! Owns: monitor processes (`thaw-vmm`, one for each VM) from their start to their end, the conversation with the
//! guest's agent, the scheduler of this machine: shells, claims, rewinds, queues, budgets, back-off. Must not know: HTTP,
//! Lambda's error documents, KVM, guest memory (a monitor gets descriptors; the gateway's process never maps a guest).
//!
//! Start at [`Runtime`]: [`Runtime::freeze`] makes a snapshot of a booted function, [`Runtime::open_pool`] gives a
//! [`Pool`], [`Pool::invoke`] runs one request. The decisions are plain state machines without I/O (`schedule` for the
//! machine, `sandbox::life` for one invocation); `node` drives the one, `sandbox` the other.
//!
//! Always holds: an invocation sees a VM that equals its snapshot, restored or rewound; a dropped future gives back its
//! place and destroys the VM it had started; no monitor outlives the [`Runtime`].
#![forbid(unsafe_code)]

mod service;

mod freeze;
mod invocation;
mod pool;

mod node;
mod schedule;

mod channel;
mod fault;
mod monitor;
mod network;
mod points;
mod sandbox;
mod tail;
mod vm;

pub use fault::HostError;
pub use freeze::{
    BaseFileError, BaseRequest, FreezeError, FreezeRequest, FreezeStep, FreezeTimings, Frozen,
    GUEST_COMMAND_LINE, INIT_LOG_BYTES_MAX, InitFailure,
};
pub use invocation::{
    End, INVOCATION_LOG_BYTES_MAX, Invocation, InvocationTimings, InvokeError, LateLog, Measure,
    Outcome, StreamPart, ThrottleReason,
};
pub use points::Point;
#[cfg(feature = "fault-points")]
pub use points::arm;
pub use pool::{Learn, OpenPoolError, Pool, PoolSpec, PoolStats};
pub use schedule::{Recycle, Start};
pub use service::{Runtime, RuntimeConfig, RuntimeStats, StartError};
pub use thaw_agent_protocol::network::AUTHORITIES_FILE;
pub use thaw_agent_protocol::{Configure, RuntimeExit, RuntimeExitCause};
pub use thaw_jail::{Jailer, JailerError, Owner, Reach, become_root_of_own_namespace};
pub use thaw_network::{EgressOptions, Policy as NetworkPolicy, is_metadata};
pub use thaw_vmm_control::{ExitReason, Failure, Fault};
