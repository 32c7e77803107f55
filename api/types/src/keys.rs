//! Thaw's own routes for access keys, below `/thaw/v1/keys`.

use serde::{Deserialize, Serialize};

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Allow {
    /// Call functions, by the API and by their URLs.
    Invoke,
    /// Everything that is done with functions: create, change, read, call and delete them, read their logs.
    Manage,
    /// Everything, keys included.
    All,
}

/// What a key may use. What is `None` is bounded by the gateway's own limits alone; no number may be 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyLimits {
    /// Requests a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u32>,
    /// Requests at once after a pause; as many as a second's, unless given. Only with `rate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// Invocations at once, of all functions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Memory, as configured, of the functions that these invocations run, MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// Zips of functions' versions and of layer versions that were stored with the key, MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_mib: Option<u32>,
}

/// `POST /thaw/v1/keys`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateKeyRequest {
    /// For people, and the user's name in refusals; the id when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it may do.
    pub allow: Allow,
    /// Functions it may do it with: a name with `*` and `?`. All when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub functions: Option<String>,
    /// What it may use.
    #[serde(default)]
    pub limits: KeyLimits,
}

/// A key without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeySummary {
    /// Access key id.
    pub access_key_id: String,
    /// For people.
    pub name: String,
    /// What it may do.
    pub allow: Allow,
    /// Functions it may do it with.
    pub functions: String,
    /// Whether it is let in.
    pub enabled: bool,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: i64,
    /// What it may use.
    #[serde(default)]
    pub limits: KeyLimits,
}

/// A new key: the only answer that ever holds the secret.
#[derive(Clone, Serialize, Deserialize)]
pub struct CreatedKey {
    /// The key.
    #[serde(flatten)]
    pub key: KeySummary,
    /// Its secret.
    pub secret_access_key: String,
}

/// `GET /thaw/v1/keys`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyList {
    /// All keys, oldest first.
    pub keys: Vec<KeySummary>,
    /// Whether requests must be signed.
    pub required: bool,
}

/// `PUT /thaw/v1/keys/{id}`: what is not given stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeKeyRequest {
    /// Whether it is let in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// What it may use: all of it, in place of what it might before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<KeyLimits>,
}
