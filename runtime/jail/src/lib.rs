//! The walls around a monitor: what a process that holds a stranger's guest can reach, should the guest take it over.
//!
//! Owns: namespaces, cgroups, users, capabilities, resource limits and the filters of system calls. Must not know: KVM, the
//! control protocol, tokio. The two sides:
//!
//! * **Outside** ([`Jailer`]): what the parent does for each process before it starts: a user of its own, a cgroup with limits, a
//!   PID namespace; and, once, what of all this is possible here ([`Reach`]).
//! * **Inside** ([`enter`]): what the process does to itself as its first act, while it has one thread and has read nothing
//!   from anyone, by the [`Orders`] in its arguments. What it needs of the file system it opens before.
//!
//! Start with [`Wall`]: each is one thing that keeps the process in, with its reason. What always holds: a wall that was ordered
//! stands, or the process ends; what cannot be had on a machine is found out once ([`Jailer::survey`]), said, and not ordered.

mod cgroup;
mod folder;
mod inside;
mod jailer;
mod orders;
mod rootless;
pub mod seccomp;
mod wall;

pub use cgroup::{CgroupError, Limits};
pub use folder::open_alone;
pub use inside::{EnterError, enter, survey};
pub use jailer::{Cell, Jailer, JailerError, Owner, Reach, Reduced};
pub use orders::{Orders, OrdersError};
pub use rootless::{RootlessError, become_root_of_own_namespace};
pub use wall::{Missing, Wall};

/// The argument before the [`Orders`] of a process that enters its jail and goes on.
pub const JAIL_ARGUMENT: &str = "--jail";
/// The argument before the [`Orders`] of a process that tries each wall, prints a JSON list of [`Missing`] and ends.
pub const SURVEY_ARGUMENT: &str = "--survey-jail";
