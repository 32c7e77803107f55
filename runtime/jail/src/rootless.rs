//! A gateway without root's rights: it becomes root of a user namespace of its own, which is what it takes to make the others.

use std::io;

use rustix::process::{getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use thiserror::Error;

/// No user namespace here. The process is as it was, or, if only a map could not be written, should end.
#[derive(Debug, Error)]
pub enum RootlessError {
    /// The kernel refuses one.
    #[error(
        "no user namespace can be made (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
    )]
    Refused(#[source] io::Error),
    /// Its maps cannot be written.
    #[error("the map of a user namespace cannot be written: {file}")]
    Map {
        /// Below /proc/self.
        file: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Makes the calling process root of a user namespace of its own, in which its user alone exists, as 0; root stays what it is. Files are made and reached
/// by the same user as before. To be called while the process has one thread (user_namespaces(7)).
///
/// # Errors
/// See [`RootlessError`].
pub fn become_root_of_own_namespace() -> Result<(), RootlessError> {
    if geteuid().is_root() {
        return Ok(());
    }
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    // SAFETY: descriptors stay shared: the flag is not FILES.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }
        .map_err(|error| RootlessError::Refused(error.into()))?;
    // A group can be mapped only by who has given up setgroups(2).
    let maps = [
        ("setgroups", "deny".to_owned()),
        ("gid_map", format!("0 {group} 1")),
        ("uid_map", format!("0 {user} 1")),
    ];
    for (file, text) in maps {
        std::fs::write(format!("/proc/self/{file}"), text)
            .map_err(|source| RootlessError::Map { file, source })?;
    }
    Ok(())
}
