//! Child processes that die with us.

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Child, Command},
};

/// Starts `command` so that it gets `inherited` under the same numbers, ignores the terminal's Ctrl-C (own process group), and is killed
/// when the calling thread ends, however it ends.
pub fn spawn_tied(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> io::Result<Tied> {
    let fds: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            return Err(io::Error::other("the parent is gone")); // it died before the line above
        }
        for &fd in &fds {
            keep_on_exec(fd)?;
        }
        Ok(())
    };
    command.process_group(0);
    before_exec(command, prepare);
    command.spawn().map(Tied)
}

#[expect(
    unsafe_code,
    reason = "code between fork and exec must be async-signal-safe"
)]
fn before_exec(
    command: &mut Command,
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: `prepare` (the one closure above) only makes the system calls prctl, getppid and fcntl on values computed before the fork;
    // it takes no lock. `io::Error::other` allocates on the way to a child that never runs, after which it only exits; glibc's malloc
    // is usable in the child of a fork.
    unsafe { command.pre_exec(prepare) };
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
