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

/// `PUT /thaw/v1/keys/{id}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeKeyRequest {
    /// Whether it is let in.
    pub enabled: bool,
}
