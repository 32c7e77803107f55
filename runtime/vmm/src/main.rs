//! `thaw-vmm`: runs one virtual machine for its parent, which talks to it over inherited sockets.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::Context as _;
use rustix::fs::{FileType, fstat};
use thaw_jail::{JAIL_ARGUMENT, Orders, SURVEY_ARGUMENT};
use thaw_vmm::control_loop::Monitor;
use thaw_vmm::fault::chain;
use thaw_vmm_control::{AGENT_FD, CONTROL_FD};
use tracing_subscriber::EnvFilter;

const USAGE: &str = "usage: thaw-vmm [--jail ORDERS] is started by thaw, with its control socket as descriptor 3 and its agent \
                     channel as descriptor 4\n";

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

/// Ctrl-C and terminal stops are the gateway's business: it ends its monitors in order. A snapshot that is cut off under its guest ends this process by the
/// signal for that (SIGBUS), which the gateway explains: Rust's own handler would make a system call that is forbidden by then.
fn settle_signals() {
    for (signal, what) in [
        (libc::SIGINT, libc::SIG_IGN),
        (libc::SIGTTOU, libc::SIG_IGN),
        (libc::SIGBUS, libc::SIG_DFL),
    ] {
        // SAFETY: sets a disposition that runs no code of ours.
        unsafe { libc::signal(signal, what) };
    }
}

/// What the command line asks for.
enum Asked {
    /// A monitor, in a jail by these orders; with none, it only gives up what every process can.
    Monitor(Orders),
    /// To tell which walls of a jail can be had.
    Survey(Orders),
}

fn asked() -> Option<Asked> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => Some(Asked::Monitor(Orders::default())),
        [what, orders] => {
            let orders = Orders::from_argument(orders).ok()?;
            match what.as_str() {
                JAIL_ARGUMENT => Some(Asked::Monitor(orders)),
                SURVEY_ARGUMENT => Some(Asked::Survey(orders)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Everything that takes rights, then none of them.
fn confine(orders: &Orders) -> anyhow::Result<()> {
    thaw_vmm::belongings::take();
    thaw_jail::enter(orders).context("no jail")?;
    thaw_vmm::vcpu::install_kick_handler().context("signals could not be set")?;
    thaw_vmm::confine::process().context("system calls could not be restricted")
}

fn main() -> ExitCode {
    let (orders, sockets) = match asked() {
        Some(Asked::Survey(orders)) => {
            let missing = thaw_jail::survey(&orders);
            println!("{}", serde_json::json!(missing));
            return ExitCode::SUCCESS;
        }
        Some(Asked::Monitor(orders)) => (orders, inherited(CONTROL_FD).zip(inherited(AGENT_FD))),
        None => (Orders::default(), None),
    };
    let Some((control, agent)) = sockets else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    let filter = EnvFilter::new("warn");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    settle_signals();
    if let Err(error) = confine(&orders) {
        tracing::error!(
            error = format!("{error:#}"),
            "monitor could not be confined"
        );
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
