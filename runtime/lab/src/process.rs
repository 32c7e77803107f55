//! Child processes that die with us.

use rustix::{
    io::Errno,
    process::{Pid, Resource, Rlimit, Signal, getrlimit, setrlimit},
};
use seccompiler::{BpfProgram, BpfProgramRef, SeccompAction, SeccompFilter, TargetArch};
use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Child, Command},
};

/// What a child needs beyond being started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leniency {
    /// Nothing.
    None,
    /// setgroups(2) does nothing and succeeds: it is forbidden in an ordinary user's user namespace, and virtiofsd insists on
    /// dropping its groups. They stay, and give it no right that the user has not.
    SetgroupsIgnored,
}

/// Starts `command` so that it gets `inherited` under the same numbers, ignores the terminal's Ctrl-C (own process group), and is killed
/// when the calling thread ends, however it ends.
pub fn spawn_tied(
    command: &mut Command,
    inherited: &[BorrowedFd<'_>],
    leniency: Leniency,
) -> io::Result<Tied> {
    let fds: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = rustix::process::getpid();
    let filter = match leniency {
        Leniency::None => None,
        Leniency::SetgroupsIgnored => Some(ignore_setgroups().map_err(io::Error::other)?),
    };
    command.process_group(0);
    #[expect(
        unsafe_code,
        reason = "code between fork and exec must be async-signal-safe"
    )]
    // SAFETY: `prepare` only makes system calls on values computed before the fork; it takes no lock and allocates nothing.
    unsafe {
        command.pre_exec(move || prepare(parent, &fds, filter.as_deref()))
    };
    command.spawn().map(Tied)
}

/// Files that a child may have open: our hard limit, which [`spawn_tied`] makes its soft one.
pub fn open_files_max() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(1_000_000)
}

fn prepare(parent: Pid, fds: &[RawFd], filter: Option<BpfProgramRef<'_>>) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        return Err(Errno::SRCH.into()); // the parent died before the line above
    }
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )?;
    for &fd in fds {
        keep_on_exec(fd)?;
    }
    filter.map_or(Ok(()), |filter| {
        seccompiler::apply_filter(filter).map_err(|_| Errno::INVAL.into())
    })
}

fn ignore_setgroups() -> Result<BpfProgram, seccompiler::BackendError> {
    const SYS_SETGROUPS: i64 = 116; // arch/x86/entry/syscalls/syscall_64.tbl
    let rules = [(SYS_SETGROUPS, Vec::new())].into();
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(0),
        TargetArch::x86_64,
    )?
    .try_into()
}

#[expect(
    unsafe_code,
    reason = "a raw descriptor number is all that survives the fork"
)]
fn keep_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: the caller of `spawn_tied` borrows the descriptor for the whole call, so it is open in the child as well.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).map_err(io::Error::from)
}

/// A child that is killed and reaped when dropped.
#[derive(Debug)]
pub struct Tied(Child);

impl Tied {
    /// The child itself, to take its pipes or ask for its state.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Tied {
    fn drop(&mut self) {
        let _ = self.0.kill(); // fails when it has ended by itself
        let _ = self.0.wait(); // ends at once: nothing survives SIGKILL
    }
}
