//! What the relay gives up before it reads a guest's first byte.

use std::io;

use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, Scope, path_beneath_rules,
};
use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};

/// Who the relay of a gateway that runs as root is: nobody.
const NOBODY: u32 = 65534;
/// What it reads while it runs: the machine's resolvers and hosts file, which may be links to elsewhere.
const READABLE: &[&str] = &["/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager"];

/// The kernel kills this process when the thread that started it ends.
pub fn die_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(
        Signal::KILL,
    ))?)
}

/// Gives up what this thread, and so this process while it has no other, may do beyond speaking to the network.
pub fn give_up() -> anyhow::Result<()> {
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
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rules(path_beneath_rules(READABLE, AccessFs::from_read(ABI::V6)))?
        .restrict_self()?;
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
