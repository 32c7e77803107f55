//! `thaw-vmm`: runs one virtual machine for its parent, which talks to it over inherited sockets.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::fs::{FileType, fstat};
use rustix::process::{DumpableBehavior, Signal};
use thaw_vmm::control_loop::Monitor;
use thaw_vmm::fault::chain;
use thaw_vmm_control::{AGENT_FD, CONTROL_FD};
use tracing_subscriber::EnvFilter;

const USAGE: &str = "usage: thaw-vmm is started by thaw, with its control socket as descriptor 3 and its agent channel as \
                     descriptor 4; it takes no arguments\n";

/// Takes an inherited socket, once.
fn inherited(fd: RawFd) -> Option<UnixStream> {
    // SAFETY: only asks whether the descriptor exists and what it is; nothing else in this process owns descriptors this early,
    // and the borrow ends here.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let status = fstat(borrowed).ok()?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Socket {
        return None;
    }
    // SAFETY: the descriptor is open (checked above), was left to us by our parent, and is taken exactly once.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(UnixStream::from(owned))
}

/// What a process that holds a guest owes its host: it dies with its parent, gains no privileges, and shows its memory to nobody.
fn harden() -> rustix::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::thread::set_no_new_privs(true)?;
    if !cfg!(debug_assertions) {
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    Ok(())
}

/// Ctrl-C and terminal stops are the gateway's business: it ends its monitors in order.
fn ignore_terminal_signals() {
    for signal in [libc::SIGINT, libc::SIGTTOU] {
        // SAFETY: sets a disposition that runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

fn main() -> ExitCode {
    let sockets = (std::env::args_os().len() == 1)
        .then(|| inherited(CONTROL_FD).zip(inherited(AGENT_FD)))
        .flatten();
    let Some((control, agent)) = sockets else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    let filter = EnvFilter::new("warn");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    ignore_terminal_signals();
    if let Err(error) = harden() {
        tracing::error!(error = %error, "process could not be hardened");
        return ExitCode::FAILURE;
    }
    if let Err(error) = thaw_vmm::vcpu::install_kick_handler() {
        tracing::error!(error = chain(&error), "signals could not be set");
        return ExitCode::FAILURE;
    }
    match Monitor::new(control, agent).serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error), "monitor cannot go on");
            ExitCode::FAILURE
        }
    }
}
