//! The agent's system calls that no safe wrapper covers. The only module, with its parts, that has `unsafe` in it.

pub mod interface;

use std::ffi::{CString, NulError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Gid, Resource, Rlimit, Uid};

/// Constants of libc in the types of the structures that take them.
const AF_VSOCK: libc::sa_family_t = 40;
const _: () = assert!(AF_VSOCK as libc::c_int == libc::AF_VSOCK);

/// Context id of the host, seen from a guest (vsock(7)).
const HOST_CID: u32 = 2;

/// Highest number a Linux capability can have (capabilities(7): sets are 64 bits wide).
const CAPABILITY_MAX: libc::c_ulong = 63;

/// `_IOW('R', 0x03, int[2])` of linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)` of linux/random.h.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// An unprivileged user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Connects to `port` of the host. Blocks; the kernel gives up after two seconds.
///
/// # Errors
/// No vsock device (`ENODEV`), nobody listens there (`ECONNRESET`), and others of connect(2).
pub fn connect_host(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd =
        check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: `fd` was just returned by socket(2) and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_vm is plain integers, for which all zeroes is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = AF_VSOCK;
    address.svm_cid = HOST_CID;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the pointer is to a sockaddr_vm that outlives the call, and the length is its size.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// `struct rand_pool_info` of random(4), with room for [`ENTROPY_BYTES_MAX`].
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; ENTROPY_BYTES_MAX],
}

/// Most bytes that [`add_entropy`] takes.
pub const ENTROPY_BYTES_MAX: usize = 256;

/// Mixes secret random bytes into the kernel's generator, credits them, and makes the generator use them at once: the
/// next byte that anyone on any processor reads depends on them. `random` is `/dev/random` or `/dev/urandom`.
///
/// # Errors
/// More than [`ENTROPY_BYTES_MAX`] bytes; no privilege.
pub fn add_entropy(random: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let mut info = RandPoolInfo {
        entropy_count: 0,
        buf_size: 0,
        buf: [0; ENTROPY_BYTES_MAX],
    };
    let (Some(room), Ok(length)) = (
        info.buf.get_mut(..bytes.len()),
        libc::c_int::try_from(bytes.len()),
    ) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    room.copy_from_slice(bytes);
    info.entropy_count = length * 8;
    info.buf_size = length;
    let fd = random.as_fd().as_raw_fd();
    // SAFETY: RNDADDENTROPY reads the two counts and then `buf_size` bytes, which is at most the length of `buf`.
    check(unsafe { libc::ioctl(fd, RNDADDENTROPY, &raw const info) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(fd, RNDRESEEDCRNG) })?;
    Ok(())
}

/// A program with its arguments and environment, as execve(2) wants them.
#[derive(Debug)]
pub struct Program {
    path: CString,
    environment: Vec<CString>,
}

impl Program {
    /// The program at `path`, without arguments, with these variables and no others.
    ///
    /// # Errors
    /// A NUL byte in any of them.
    pub fn new<'a>(
        path: &str,
        environment: impl Iterator<Item = (&'a String, &'a String)>,
    ) -> Result<Self, NulError> {
        Ok(Self {
            path: CString::new(path)?,
            environment: environment
                .map(|(name, value)| CString::new(format!("{name}={value}")))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// A command that runs `program` in a session of its own, as `user` if one is given, without capabilities or a way to
/// gain any, within Lambda's limits, and first in line for the out-of-memory killer.
pub fn confined(program: Program, user: Option<User>) -> Command {
    let mut command = Command::new(&*program.path.to_string_lossy());
    let mut pointers = ExecPointers::new(program);
    let enter = move || {
        rustix::process::setsid()?;
        if let Some(user) = user {
            prefer_as_oom_victim()?;
            limit_resources()?;
            drop_privileges(user)?;
        }
        // Not left to the standard library: its execvp hands files that are no program to a shell.
        Err(pointers.exec())
    };
    // SAFETY: the closure runs between fork and exec. It makes only system calls on values that it owns: it neither
    // allocates nor takes a lock.
    unsafe { command.pre_exec(enter) };
    command
}

/// Limits of a function's processes, as recorded from Lambda. That of processes is left to the kernel, which derives it from
/// the guest's memory there, too.
fn limit_resources() -> rustix::io::Result<()> {
    const CORE_BYTES: u64 = 10 * 1024 * 1024 * 1024;
    const OPEN_FILES: u64 = 1024;
    const LOCKED_BYTES: u64 = 64 * 1024;
    for (resource, limit) in [
        (Resource::Core, CORE_BYTES),
        (Resource::Nofile, OPEN_FILES),
        (Resource::Memlock, LOCKED_BYTES),
    ] {
        let limit = Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        rustix::process::setrlimit(resource, limit)?;
    }
    Ok(())
}

fn drop_privileges(user: User) -> io::Result<()> {
    for capability in 0..=CAPABILITY_MAX {
        // SAFETY: no pointers are passed. Numbers unknown to this kernel fail, which is as good.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    // Leaving uid 0 for all three ids empties the permitted, effective and ambient sets.
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

/// NULL-terminated arrays over a program's strings.
///
/// Invariant: every pointer but the last of each array points into a string of `program`, which is never changed.
struct ExecPointers {
    program: Program,
    arguments: [*const libc::c_char; 2],
    environment: Vec<*const libc::c_char>,
}

// SAFETY: the pointers are to heap memory of `program`, which is owned, never changed and freed with the value.
unsafe impl Send for ExecPointers {}
// SAFETY: as above; nothing is ever written through a shared reference.
unsafe impl Sync for ExecPointers {}

impl ExecPointers {
    fn new(program: Program) -> Self {
        // Moving `program` moves the CStrings' handles, not the heap memory that they own.
        let environment = program
            .environment
            .iter()
            .map(|variable| variable.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        Self {
            arguments: [program.path.as_ptr(), std::ptr::null()],
            environment,
            program,
        }
    }

    /// Returns only if it fails.
    fn exec(&mut self) -> io::Error {
        // SAFETY: by the invariant all three are valid for execve(2), and outlive the call.
        unsafe {
            libc::execve(
                self.program.path.as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
            )
        };
        io::Error::last_os_error()
    }
}

fn prefer_as_oom_victim() -> io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY, Mode::empty())?;
    rustix::io::write(&file, b"1000")?;
    Ok(())
}
