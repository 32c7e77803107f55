//! Thaw's own routes, below `/thaw/v1`.

use serde::{Deserialize, Serialize};

/// One line of `GET /thaw/v1/functions/{name}/progress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressEvent {
    /// Which step begins (or, for the last line, how the deployment ended).
    pub step: Step,
    /// A few words for people.
    pub message: String,
    /// Since the deployment began, milliseconds.
    pub elapsed_ms: u64,
    /// The deployment has ended; no line follows.
    pub done: bool,
    /// Why it failed (`step` is `failed`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The function's own initialisation failed: it is deployed, and each invocation answers with this error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_error: Option<InitErrorSummary>,
    /// The snapshot, once it is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotSummary>,
}

/// A step of a deployment, in the order in which they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The code is accepted and waits for its turn.
    #[default]
    Queued,
    /// Kernel, initramfs and runtime image are made ready.
    Images,
    /// The zip becomes a disk image.
    Code,
    /// The guest's kernel boots.
    Booting,
    /// The agent answers; the function's runtime is started.
    Agent,
    /// The function initialises.
    Initializing,
    /// The runtime waits for its first event.
    Ready,
    /// The machine is written to the snapshot.
    Saving,
    /// The snapshot is verified and sandboxes are restored ahead.
    Pool,
    /// Last line: the function can be invoked.
    Active,
    /// Last line: it cannot.
    Failed,
}

/// A failed initialisation, briefly.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitErrorSummary {
    /// As in `Runtime.ImportModuleError`.
    pub error_type: String,
    /// The error's message.
    pub message: String,
    /// What the function wrote while it initialised, the tail.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub log: String,
}

/// A snapshot file, briefly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSummary {
    /// Length of the file, bytes.
    pub file_bytes: u64,
    /// Bytes that are not holes.
    pub stored_bytes: u64,
}

/// Body of `GET /thaw/v1/functions`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListResponse {
    /// Ordered by name.
    pub functions: Vec<FunctionSummary>,
    /// What all of them use of the machine.
    #[serde(default)]
    pub machine: MachineSummary,
}

/// What sandboxes use of the machine, now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSummary {
    /// Monitors made ahead of demand, for any function of their size.
    pub shells: u64,
    /// Memory that all sandboxes may come to use, as the scheduler counts, MiB.
    pub memory_mib: u64,
    /// Its limit; absent for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_budget_mib: Option<u64>,
    /// Virtual CPUs that run invocations.
    pub vcpus: u64,
    /// Their limit; absent for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_budget: Option<u32>,
}

/// One function, as `thaw ls` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionSummary {
    /// The bare name.
    pub name: String,
    /// The full ARN.
    pub arn: String,
    /// Path of the function's URL on this gateway, `/fn/<name>/`.
    pub url_path: String,
    /// `python3.11`, …
    pub runtime: String,
    /// `module.function`.
    pub handler: String,
    /// `Pending`, `Active` or `Failed`.
    pub state: String,
    /// Why, unless Active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// `InProgress`, `Successful` or `Failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update_status: Option<String>,
    /// The function's own initialisation failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_error: Option<InitErrorSummary>,
    /// MiB.
    pub memory_mib: u32,
    /// Seconds.
    pub timeout_seconds: u32,
    /// Size of the zip.
    pub code_bytes: u64,
    /// SHA-256 of the zip, base64.
    pub code_sha256: String,
    /// ISO 8601.
    pub last_modified: String,
    /// Revision that serves; names the folder with its artifacts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Path of the snapshot file on the gateway's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_path: Option<String>,
    /// The snapshot's size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotSummary>,
    /// The pool of sandboxes.
    pub pool: PoolSummary,
    /// The newest failure of an invocation or of the pool since the gateway started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// A pool, now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSummary {
    /// `closed`, `opening`, `open` or `failed`.
    pub state: String,
    /// Sandboxes restored ahead.
    pub ready: u64,
    /// Invocations that run.
    pub running: u64,
    /// Invocations that wait.
    pub waiting: u64,
    /// Invocations since the gateway started.
    pub invocations: u64,
    /// Of these, on a monitor that was started for them.
    #[serde(default)]
    pub cold: u64,
    /// Of these, on a sandbox claimed from a shell, or ahead of them.
    #[serde(default)]
    pub claimed: u64,
    /// Of these, on a sandbox that was rewound.
    #[serde(default)]
    pub rewound: u64,
    /// Sandboxes that could not be rewound, and were replaced.
    #[serde(default)]
    pub rewind_failures: u64,
}
