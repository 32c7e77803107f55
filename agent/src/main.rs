//! The guest's init; see the library of this package.
#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::Context as _;
use thaw_agent::api;
use thaw_agent::boot;
use thaw_agent::channel;
use thaw_agent::driver::{Driver, Settings, chain};
use thaw_agent::identity::Guest;
use thaw_agent::process::{Host, Reap};
use thaw_agent::sys::{self, User};
use thaw_agent_protocol::AGENT_PORT;

/// sbx_user1051 of Lambda: code in the wild expects these numbers.
const RUNTIME_USER: User = User { uid: 993, gid: 990 };

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("thaw-agent is the init of a Thaw sandbox and runs only as process 1");
        return ExitCode::FAILURE;
    }
    // A panic anywhere leaves the sandbox in a state nobody has thought of.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("thaw-agent: {panic}");
        power_off();
    }));
    if let Err(error) = live() {
        eprintln!("thaw-agent: {}", chain(error.as_ref()));
    }
    power_off();
    ExitCode::FAILURE
}

fn live() -> anyhow::Result<()> {
    boot::boot()?;
    let machine = Guest::open()?;
    let listener = TcpListener::bind(api::ADDRESS)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .with_context(|| format!("listening on {}", api::ADDRESS))?;
    // Last, so that whatever else fails is on the console and the host sees no agent at all.
    let channel = sys::connect_host(AGENT_PORT)
        .with_context(|| format!("connecting to the host, vsock port {AGENT_PORT}"))?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?
        .block_on(serve(channel, listener, machine))
}

async fn serve(channel: OwnedFd, listener: TcpListener, machine: Guest) -> anyhow::Result<()> {
    let (reader, writer) = channel::split(channel).context("polling the agent channel")?;
    let settings = Settings {
        listener: tokio::net::TcpListener::from_std(listener).context("polling the Runtime API")?,
        host: Host {
            user: Some(RUNTIME_USER),
            task_root: "/var/task".into(),
            extensions: "/opt/extensions".into(),
            reap: Reap::Everyone,
        },
        machine,
    };
    Ok(Driver::new(reader, writer, settings)?.run().await?)
}

/// Does not return when it succeeds.
fn power_off() {
    rustix::fs::sync();
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        eprintln!("thaw-agent: powering off: {error}");
    }
}
