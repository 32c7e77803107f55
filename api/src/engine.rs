//! What the gateway asks of the machine below it: images made ready, functions frozen, pools of sandboxes.
//!
//! The trait stands on the gateway's side, so that its life cycle of functions runs unchanged against a machine without
//! KVM in tests. [`HostEngine`] is the real one: `thaw-images` and `thaw-runtime`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use thaw_runtime::{
    End, FreezeError, Invocation, InvokeError, NetworkPolicy, OpenPoolError, Outcome, PoolSpec,
    PoolStats, RuntimeStats, StreamPart,
};
use thiserror::Error;
use tokio::sync::mpsc;

mod bases;
pub mod host;

pub use host::HostEngine;

/// Makes snapshots of functions, and pools of sandboxes from snapshots.
pub trait Engine: Send + Sync + 'static {
    /// Makes sure that all that guests boot from is there. Cheap when it is.
    fn prepare(&self) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Makes `job`'s code a disk image and freezes the function. `step` hears what begins. Dropping the future ends the VM.
    fn freeze<'a>(
        &'a self,
        job: FreezeJob,
        step: &'a mut (dyn FnMut(EngineStep) + Send),
    ) -> BoxFuture<'a, Result<Artifact, EngineError>>;

    /// Says whether `artifact` still fits the machine: its files are there, none is cut off, and are what it was frozen with. Cheap.
    fn usable<'a>(&'a self, artifact: &'a Artifact, runtime: &'a str) -> BoxFuture<'a, bool>;

    /// Verifies a snapshot and begins to keep sandboxes ready.
    fn open_pool(&self, spec: PoolSpec)
    -> BoxFuture<'_, Result<Arc<dyn Sandboxes>, OpenPoolError>>;

    /// What all sandboxes use of the machine at this moment.
    fn stats(&self) -> RuntimeStats;

    /// Closes all pools and waits until no monitor is left, at most `deadline`.
    fn shutdown(&self, deadline: Duration) -> BoxFuture<'_, ()>;
}

/// A pool of sandboxes of one snapshot.
pub trait Sandboxes: Send + Sync + 'static {
    /// Runs one request in a sandbox of its own.
    fn invoke(&self, invocation: Invocation) -> BoxFuture<'_, Result<Outcome, InvokeError>>;
    /// Runs one request and sends its answer as it comes; see [`thaw_runtime::Pool::invoke_streaming`]. Where answers come whole
    /// alone, that is one piece.
    fn invoke_streaming(
        &self,
        invocation: Invocation,
        sink: mpsc::Sender<StreamPart>,
    ) -> BoxFuture<'_, Result<Outcome, InvokeError>> {
        Box::pin(async move {
            let mut outcome = self.invoke(invocation).await?;
            if let End::Response {
                payload,
                content_type,
            } = &mut outcome.end
            {
                let content_type = content_type.clone();
                for part in [
                    StreamPart::Head { content_type },
                    StreamPart::Chunk(std::mem::take(payload)),
                ] {
                    let sent = sink.send(part).await;
                    sent.map_err(|_| InvokeError::Abandoned)?;
                }
            }
            Ok(outcome)
        })
    }
    /// Keeps at least so many sandboxes ready from now on, as far as the machine has room.
    fn keep_ready(&self, count: usize);
    /// The pool at this moment.
    fn stats(&self) -> PoolStats;
    /// Refuses new invocations, lets running ones finish within a deadline, destroys the rest.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Lambda's default for [`FreezeJob::ephemeral_mib`].
pub const EPHEMERAL_MIB_DEFAULT: u32 = 512;

/// One function to freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreezeJob {
    /// For logs and for the snapshot's metadata.
    pub function: String,
    /// Revision that is frozen.
    pub revision: String,
    /// Runtime identifier, `python3.11`, `provided.al2023`, …
    pub runtime: String,
    /// The function's zip.
    pub zip: PathBuf,
    /// Zips of its layers, in their order.
    pub layers: Vec<PathBuf>,
    /// Folder for the code image and the snapshot, on the same file system as they end up on.
    pub folder: PathBuf,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpu_count: u8,
    /// Writable space, MiB: the size of the disk that /tmp is on. 512 to 10,240, as on Lambda.
    pub ephemeral_mib: u32,
    /// Programs that speak the Runtime API, tried in order.
    pub bootstrap: Vec<String>,
    /// The function's account, for extensions that ask for it.
    pub account_id: Option<String>,
    /// Environment of the function's runtime.
    pub environment: BTreeMap<String, String>,
    /// What the function may reach; `None`: nothing, and its guests have no network device.
    pub network: Option<NetworkPolicy>,
    /// Longest initialisation.
    pub init_limit: Duration,
}

/// Beginning of a step of a freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineStep {
    /// Kernel, initramfs and runtime image.
    Images,
    /// The runtime's image is not there yet: a step of making it, for people.
    Image(String),
    /// Code image.
    Code,
    /// The guest's kernel.
    Booting,
    /// The agent is up.
    AgentUp,
    /// The function's runtime initialises.
    Initializing,
    /// It waits for its first event.
    Ready,
    /// The snapshot is written.
    Saving,
    /// It is written.
    Saved {
        /// Length of the file, bytes.
        file_bytes: u64,
        /// Bytes that are not holes.
        stored_bytes: u64,
    },
}

/// A frozen function: what a pool is opened from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// The snapshot file.
    pub snapshot: PathBuf,
    /// The runtime's own snapshot, over which it is a difference.
    #[serde(default)]
    pub base: Option<PathBuf>,
    /// Its identity as it was frozen; a working set that is learned later gives it another.
    pub digest: String,
    /// Its length then, bytes.
    pub file_bytes: u64,
    /// Bytes that are not holes.
    pub stored_bytes: u64,
    /// Root file system it was frozen with.
    pub rootfs: PathBuf,
    /// Code image it was frozen with.
    pub code: PathBuf,
    /// Names the root file system's content: a snapshot fits no other.
    pub rootfs_digest: String,
    /// What the function wrote while it initialised, the tail.
    pub init_log: String,
    /// Time from the runtime's start to its first request for an event, milliseconds.
    pub init_ms: u64,
}

/// Why the machine did not do what it was asked.
#[derive(Debug, Error)]
pub enum EngineError {
    /// An image could not be made.
    #[error("cannot prepare {what}")]
    Image {
        /// "the kernel", "the code image", …
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The zip cannot be used.
    #[error("cannot use the uploaded code")]
    Code(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The function could not be frozen.
    #[error("cannot freeze the function")]
    Freeze(#[source] FreezeError),
    /// A thread of the gateway ended before it answered.
    #[error("worker for {0} died")]
    Worker(&'static str),
}

/// An error and its causes on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
