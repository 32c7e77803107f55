//! What a process does to itself as its first act.
//!
//! # Why in this order
//! Cgroups are joined by their names in the host's file system, and limit what follows. Namespaces and mounts take the
//! parent's privileges (real ones as root, or root's of the gateway's own user namespace), which the new user has not. The user
//! namespace comes after that user was taken, so that its owner is nobody else, and after all other namespaces, so that
//! they belong to the outer one: the capabilities that its maker has within count for none of them. Then these go, too.

use std::io;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};
use rustix::{mount, process, thread};
use thiserror::Error;

use crate::{Missing, Orders, Wall};

/// Most open descriptors: a VM of four processors and eight disks has some 80; a store's chunks are opened one at a time.
const DESCRIPTORS_MAX: u64 = 512;
/// Most threads of the process's user: vCPUs, devices, fetching, paging.
const THREADS_MAX: u64 = 64;
/// Largest file that is written: a snapshot of 10 GiB of memory and its disks.
const FILE_BYTES_MAX: u64 = 32 << 30;
/// What a jailed process hears if it asks for the host's name.
const HOST_NAME: &[u8] = b"sandbox";
/// A folder that is there on every system with /proc, to mount the empty root on; only this process sees it covered.
const COVERED: &str = "/proc";

/// A wall that was ordered does not stand.
#[derive(Debug, Error)]
pub enum EnterError {
    /// One of the walls.
    #[error("the jail's {wall} cannot be had")]
    Wall {
        /// Which.
        wall: Wall,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What every process in a jail has: it dies with its parent, gains nothing by exec and shows its memory to nobody.
    #[error("the process cannot be hardened")]
    Harden(#[source] io::Error),
}

/// Raises the walls that are ordered. To be called by a process with one thread, before it has read anything that it does not
/// trust; whatever it needs of the file system is open by then.
///
/// # Errors
/// A wall does not stand: the process has to end.
pub fn enter(orders: &Orders) -> Result<(), EnterError> {
    for wall in Wall::ALL {
        if orders.walls.contains(&wall) {
            raise(wall, orders).map_err(|source| EnterError::Wall { wall, source })?;
        }
    }
    harden().map_err(EnterError::Harden)
}

/// Tries each of the walls that are ordered, and tells which do not stand.
#[must_use]
pub fn survey(orders: &Orders) -> Vec<Missing> {
    let ordered = Wall::ALL.into_iter().filter(|w| orders.walls.contains(w));
    let tried = ordered.filter_map(|wall| {
        let reason = raise(wall, orders).err()?.to_string();
        Some(Missing { wall, reason })
    });
    tried.collect()
}

fn raise(wall: Wall, orders: &Orders) -> io::Result<()> {
    match wall {
        Wall::Cgroup => join(orders),
        Wall::PidNamespace => is_first(),
        Wall::MountNamespace => leave(UnshareFlags::NEWNS),
        Wall::EmptyRoot => empty_root(),
        Wall::NetworkNamespace => leave(UnshareFlags::NEWNET),
        Wall::IpcNamespace => leave(UnshareFlags::NEWIPC),
        Wall::UtsNamespace => {
            leave(UnshareFlags::NEWUTS)?;
            Ok(rustix::system::sethostname(HOST_NAME)?)
        }
        Wall::CgroupNamespace => leave(UnshareFlags::NEWCGROUP),
        Wall::ResourceLimits => limit(),
        Wall::OwnUser => become_user(orders.user),
        Wall::UserNamespace => leave(UnshareFlags::NEWUSER),
        Wall::Capabilities => Ok(drop_capabilities()?),
    }
}

/// It dies with its parent, gains nothing by exec and shows its memory to nobody. Last: the kernel forgets the first and the last
/// of these when a process changes its user (`commit_creds`).
fn harden() -> io::Result<()> {
    thread::set_no_new_privs(true)?;
    if !cfg!(debug_assertions) {
        process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    Ok(process::set_parent_process_death_signal(Some(
        Signal::KILL,
    ))?)
}

fn join(orders: &Orders) -> io::Result<()> {
    // "0" is the writer itself, in whatever PID namespace (cgroups(7)).
    (orders.cgroups.iter()).try_for_each(|folder| std::fs::write(folder.join("cgroup.procs"), "0"))
}

fn is_first() -> io::Result<()> {
    match process::getpid().is_init() {
        true => Ok(()),
        false => Err(io::Error::other("the parent did not make one")),
    }
}

fn leave(namespace: UnshareFlags) -> io::Result<()> {
    // SAFETY: none of the flags above is FILES, so that descriptors stay what they are.
    Ok(unsafe { thread::unshare_unsafe(namespace) }?)
}

fn empty_root() -> io::Result<()> {
    let nothing = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    // What is mounted here is not to appear on the host.
    mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    mount::mount("none", COVERED, "tmpfs", nothing, c"size=4k,nr_inodes=2")?;
    process::chdir(COVERED)?;
    // The old root comes to lie over the new one, and is taken off (pivot_root(2), "pivot_root(".", ".")").
    process::pivot_root(".", ".")?;
    mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(process::chdir("/")?)
}

fn limit() -> io::Result<()> {
    let limits = [
        (Resource::Nofile, DESCRIPTORS_MAX),
        (Resource::Nproc, THREADS_MAX),
        (Resource::Fsize, FILE_BYTES_MAX),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nice, 0),
        (Resource::Rtprio, 0),
    ];
    for (resource, most) in limits {
        let most = process::getrlimit(resource)
            .maximum
            .map_or(most, |allowed| allowed.min(most));
        let both = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        process::setrlimit(resource, both)?;
    }
    Ok(())
}

fn become_user(user: u32) -> io::Result<()> {
    let (uid, gid) = (process::Uid::from_raw(user), process::Gid::from_raw(user));
    thread::set_thread_groups(&[])?;
    thread::set_thread_res_gid(gid, gid, gid)?;
    Ok(thread::set_thread_res_uid(uid, uid, uid)?)
}

fn drop_capabilities() -> rustix::io::Result<()> {
    // Those that this kernel knows; of others it says EINVAL.
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match thread::capability_is_in_bounding_set(capability) {
            Ok(true) => thread::remove_capability_from_bounding_set(capability)?,
            Ok(false) => {}
            Err(_) => break,
        }
    }
    let bits = [
        CapabilitiesSecureBits::NO_ROOT,
        CapabilitiesSecureBits::NO_ROOT_LOCKED,
        CapabilitiesSecureBits::NO_SETUID_FIXUP,
        CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED,
        CapabilitiesSecureBits::KEEP_CAPS_LOCKED,
        CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE,
        CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    ];
    thread::set_capabilities_secure_bits(bits.into_iter().collect())?;
    thread::clear_ambient_capability_set()?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    thread::set_capabilities(None, none)
}
