//! The walls, one by one.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One thing that keeps a jailed process in. The order is the one in which they are raised: each needs privileges that a later
/// one takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wall {
    /// It is in a cgroup of its own, with limits (cgroups(7)).
    Cgroup,
    /// It sees and signals no process but itself (pid_namespaces(7)). Made by the parent; the process looks whether it stands.
    PidNamespace,
    /// Mounts are its own (mount_namespaces(7)).
    MountNamespace,
    /// Its root is an empty file system that cannot be written (pivot_root(2)).
    EmptyRoot,
    /// No interface, no socket of the host's network, abstract Unix sockets included (network_namespaces(7)).
    NetworkNamespace,
    /// No System V IPC, no POSIX message queue of others (ipc_namespaces(7)).
    IpcNamespace,
    /// A host name of its own, which tells nothing of the host's (uts_namespaces(7)).
    UtsNamespace,
    /// Names of the host's cgroups are hidden (cgroup_namespaces(7)).
    CgroupNamespace,
    /// Bounds on descriptors, threads, file sizes and locked memory; no core dumps (setrlimit(2)).
    ResourceLimits,
    /// A user and group that nothing else on the host has, and no supplementary groups.
    OwnUser,
    /// Whatever privilege it came by would count in a user namespace of its own alone, in which nobody is mapped
    /// (user_namespaces(7)).
    UserNamespace,
    /// No capability, and none to be had: sets and bounding set are empty, secure bits locked (capabilities(7)).
    Capabilities,
}

impl Wall {
    /// All, in the order in which they are raised.
    pub const ALL: [Self; 12] = [
        Self::Cgroup,
        Self::PidNamespace,
        Self::MountNamespace,
        Self::EmptyRoot,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::ResourceLimits,
        Self::OwnUser,
        Self::UserNamespace,
        Self::Capabilities,
    ];
}

impl fmt::Display for Wall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cgroup => "cgroup",
            Self::PidNamespace => "pid namespace",
            Self::MountNamespace => "mount namespace",
            Self::EmptyRoot => "empty root",
            Self::NetworkNamespace => "network namespace",
            Self::IpcNamespace => "ipc namespace",
            Self::UtsNamespace => "uts namespace",
            Self::CgroupNamespace => "cgroup namespace",
            Self::ResourceLimits => "resource limits",
            Self::OwnUser => "user of its own",
            Self::UserNamespace => "user namespace",
            Self::Capabilities => "no capabilities",
        })
    }
}

/// A wall that cannot be raised here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Which.
    pub wall: Wall,
    /// Why not, for people.
    pub reason: String,
}
