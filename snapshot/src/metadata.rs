//! What a snapshot is of: for people, listings and error messages; nothing that a restore depends on.

use serde::{Deserialize, Serialize};

/// Metadata of a snapshot. Unknown fields of a later version are kept in `other`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Function name.
    pub function: String,
    /// Which deployment of the function.
    pub revision: String,
    /// Base runtime, for instance `python3.11`.
    pub runtime: String,
    /// Handler.
    pub handler: String,
    /// When it was taken, milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// Version of thaw that took it.
    pub thaw_version: String,
    /// Version of the agent frozen in it.
    pub agent_version: String,
    /// Release of the guest's kernel.
    pub kernel_version: String,
    /// Digest of the runtime's image.
    pub image_digest: String,
    /// Virtual CPUs.
    pub vcpu_count: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// The VM has a network device.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub network: bool,
    /// Everything else.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}
