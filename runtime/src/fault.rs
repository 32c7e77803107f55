//! What can go wrong on this machine, as opposed to in a guest or in a request.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thaw_vmm_control::Failure;
use thaw_vmm_control::wire::WireError;
use thiserror::Error;

/// This machine, or the monitor process, failed a VM. Nothing the function or its caller did.
#[derive(Debug, Error)]
pub enum HostError {
    /// A file that a VM needs could not be opened, made or synced.
    #[error("{act} {path}")]
    File {
        /// What was tried: "cannot open", "cannot create".
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The monitor's executable could not be started.
    #[error("cannot start the monitor {path}")]
    Spawn {
        /// The executable.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What keeps the monitor apart from this machine could not be made.
    #[error("cannot make a jail for a monitor")]
    Jail(#[source] thaw_jail::JailerError),
    /// The function's network.
    #[error("cannot give a sandbox its network")]
    Network(#[source] thaw_network::EgressError),
    /// The monitor refused or failed a request.
    #[error("monitor failed to {request}")]
    Refused {
        /// "boot", "restore", "resume", …
        request: &'static str,
        /// The monitor's own chain of causes.
        #[source]
        source: Failure,
    },
    /// The monitor did not answer in time.
    #[error("monitor did not {request} within {limit:?}{stderr}")]
    Silent {
        /// "boot", "restore", "resume", …
        request: &'static str,
        /// How long it had.
        limit: Duration,
        /// The last lines it wrote to its standard error, introduced by a colon; or empty.
        stderr: String,
    },
    /// The monitor's process ended or closed its control socket.
    #[error("monitor died{stderr}")]
    Died {
        /// The last lines it wrote to its standard error, introduced by a colon; or empty.
        stderr: String,
    },
    /// The monitor sent what the control protocol does not allow.
    #[error("monitor broke its control protocol")]
    Protocol(#[source] WireError),
    /// The monitor answered a request with a reply of another kind.
    #[error("monitor answered {request} with {reply}")]
    UnexpectedReply {
        /// What was asked.
        request: &'static str,
        /// What came.
        reply: &'static str,
    },
    /// No new agent channel could be made.
    #[error("cannot make an agent channel")]
    Channel(#[source] io::Error),
    /// The kernel's random generator failed.
    #[error("cannot get random bytes")]
    Random(#[source] io::Error),
    /// The runtime is shutting down.
    #[error("the runtime is shutting down")]
    ShutDown,
}
