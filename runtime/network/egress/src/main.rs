//! `thaw-egress`: the network of every guest, in a process of its own.
//!
//! Two processes, started as one. The *maker* may configure networks, in namespaces of its own making and no others; it makes slots (`maker.rs`) and reads
//! nothing that a guest has sent. The *relay*, its parent, has no privilege left (`privilege.rs`); it decides (`rules.rs`, pure), answers names (`dns.rs`),
//! carries connections (`tcp.rs`, `web.rs`), and speaks with the gateway (`relay.rs`). Both end when the gateway's end of the control socket closes.
#![deny(unsafe_code)]

mod answered;
mod bucket;
mod capacity;
mod dns;
mod hello;
mod machine;
mod maker;
mod meter;
mod privilege;
mod ranges;
mod relay;
mod rules;
mod slot;
mod tcp;
mod web;

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::{FileType, fstat};
use tracing_subscriber::EnvFilter;

const USAGE: &str = "usage: thaw-egress is started by thaw, as `thaw-egress --ready COUNT`, with its control socket as standard input\n";
/// What the maker is started as.
const MAKER: &str = "maker";
/// Most slots that can be kept ready.
const READY_MAX: usize = 1024;

/// The control socket, if standard input is one.
fn control() -> Option<UnixStream> {
    let stdin = std::io::stdin();
    let status = fstat(&stdin).ok()?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Socket {
        return None;
    }
    let owned: OwnedFd = stdin.as_fd().try_clone_to_owned().ok()?;
    Some(UnixStream::from(owned))
}

/// The whole chain of causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(
            "warn,hickory_resolver=error,hickory_net=error,hickory_proto=error",
        ))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match (&*arguments, control()) {
        ([MAKER], Some(control)) => maker::serve(control).map_err(|error| chain(&error)),
        (["--ready", count], Some(control)) => match count.parse() {
            Ok(ready @ 0..=READY_MAX) => serve(control, ready).map_err(|error| error.to_string()),
            _ => Err(format!(
                "{count} slots cannot be kept ready, {READY_MAX} at most"
            )),
        },
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "thaw-egress cannot go on");
            ExitCode::FAILURE
        }
    }
}

/// Starts the maker, gives up every privilege, and relays. Threads come last: what is given up is each thread's own.
fn serve(control: UnixStream, ready: usize) -> anyhow::Result<()> {
    privilege::die_with_parent()?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut child = Command::new(std::env::current_exe()?)
        .arg(MAKER)
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()?;
    let machine = machine::Machine::new();
    privilege::give_up()?;
    for socket in [&control, &ours] {
        socket.set_nonblocking(true)?;
    }
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("thaw-egress")
        .build()?;
    tokio.block_on(relay::serve(control, ours, machine, ready))?;
    // Its socket is closed, so it ends.
    child.wait()?;
    Ok(())
}
