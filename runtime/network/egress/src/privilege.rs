//! What the relay gives up before it reads a guest's first byte.

use std::collections::BTreeMap;
use std::io;

use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus, Scope, path_beneath_rules,
};
use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Calls that the relay has no use for.
const FORBIDDEN: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fsopen,
    libc::SYS_io_uring_setup,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];
/// Flags of clone(2) that make a namespace.
const NAMESPACES: &[i32] = &[
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
];
/// Who the relay of a gateway that runs as root is: nobody.
const NOBODY: u32 = 65534;
/// What it reads while it runs: the machine's resolvers and hosts file, which may be links to elsewhere.
const READABLE: &[&str] = &[
    "/etc",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
];

/// The kernel kills this process when the thread that started it ends.
pub fn die_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(
        Signal::KILL,
    ))?)
}

/// Gives up what this thread, and so this process while it has no other, may do beyond speaking to the network. Tells whether files were put out of reach, which
/// the kernel may not know how to do.
pub fn give_up() -> anyhow::Result<RulesetStatus> {
    let files = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    setrlimit(Resource::Nofile, most)?;
    if Uid::effective().is_root() {
        become_nobody()?;
    }
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    set_no_new_privs(true)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // Where the kernel has no Landlock, the user's own rights are what is left.
    let all = AccessFs::from_all(ABI::V6);
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rules(path_beneath_rules(READABLE, AccessFs::from_read(ABI::V6)))?
        .restrict_self()?;
    forbid_calls()?;
    Ok(restricted.ruleset)
}

/// No other program, no other namespace, no other process's memory, and none of the calls that have been doors into the kernel: each fails with `EPERM`.
fn forbid_calls() -> anyhow::Result<()> {
    let errno = |number: i32| SeccompAction::Errno(number.unsigned_abs());
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> =
        FORBIDDEN.iter().map(|call| (*call, Vec::new())).collect();
    let with = |flag: i32| {
        let flag = u64::from(flag.unsigned_abs());
        let set = SeccompCmpOp::MaskedEq(flag);
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, set, flag)?;
        SeccompRule::new(vec![condition])
    };
    let namespaces: Result<_, BackendError> = NAMESPACES.iter().map(|flag| with(*flag)).collect();
    calls.insert(libc::SYS_clone, namespaces?);
    // Keeps its flags in memory, where a filter does not see them: it is said not to exist, and libraries take clone.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    for (calls, action) in [(calls, errno(libc::EPERM)), (clone3, errno(libc::ENOSYS))] {
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, action, arch)?;
        seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?;
    }
    Ok(())
}

/// Leaves root for a user who owns nothing. In a user namespace that has no other user than its root, root is who made it, and stays.
fn become_nobody() -> io::Result<()> {
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    if setresgid(group, group, group) == Err(Errno::EINVAL) {
        return Ok(());
    }
    setgroups(&[])?;
    setresuid(user, user, user)?;
    // A change of user clears it.
    die_with_parent()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::process::Command;

    /// Marks the process in which privileges are given up: what is given up is the whole process's.
    const INSIDE: &str = "THAW_TEST_INSIDE";

    #[test]
    fn what_is_given_up_is_gone() {
        let program = std::env::current_exe().unwrap();
        if std::env::var_os(INSIDE).is_none() {
            let status = Command::new(&program)
                .args([
                    "--exact",
                    "privilege::tests::what_is_given_up_is_gone",
                    "--nocapture",
                ])
                .env(INSIDE, "1")
                .status()
                .unwrap();
            assert!(status.success());
            return;
        }
        let status = give_up().unwrap();
        let denied = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EPERM));
        };
        denied(Command::new("/bin/true").status().map(drop));
        for flag in [
            nix::sched::CloneFlags::CLONE_NEWUSER,
            nix::sched::CloneFlags::CLONE_NEWNET,
        ] {
            denied(nix::sched::unshare(flag).map_err(io::Error::from));
        }
        denied(rustix::process::chroot("/").map_err(io::Error::from));
        // Threads are made all the same, names resolved and sockets opened.
        std::thread::spawn(|| File::open("/etc/hosts").unwrap())
            .join()
            .unwrap();
        std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        if status != RulesetStatus::NotEnforced {
            assert!(File::open("/proc/self/status").is_err());
        }
        assert!(File::create("/etc/thaw-test").is_err());
    }
}
