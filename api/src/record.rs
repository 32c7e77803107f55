//! What a function is: the document that the database keeps, and the words of its state machine.
//!
//! A function has a **target** revision, which clients see, and a **serving** one, which answers invocations. They differ
//! while an update is frozen. Each revision has a folder of its own, so nothing is ever overwritten.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::engine::Artifact;

/// One function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// The bare name.
    pub name: String,
    /// Milliseconds since the Unix epoch.
    pub modified_unix_ms: i64,
    /// Changes with every change a client makes; Lambda's `RevisionId`.
    pub revision_id: String,
    /// Tags.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// What clients asked for.
    pub target: Revision,
    /// Whether it can be invoked.
    pub state: State,
    /// How the newest update went; `None` until the first deployment has ended.
    #[serde(default)]
    pub last_update: Option<LastUpdate>,
    /// What answers invocations.
    #[serde(default)]
    pub serving: Option<Serving>,
}

/// Code and settings that belong together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Name of its folder.
    pub id: String,
    /// Its settings.
    pub settings: Settings,
    /// Its code.
    pub code: Code,
}

/// Settings, validated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// `python3.11`, `provided.al2023`, …
    pub runtime: String,
    /// `module.function`.
    pub handler: String,
    /// An IAM role's ARN; recorded only.
    pub role: String,
    /// Free text.
    pub description: String,
    /// Seconds, 1 to 900.
    pub timeout_seconds: u32,
    /// MiB, 128 to 10,240.
    pub memory_mib: u32,
    /// Environment of the function; `None` when the client named none.
    pub environment: Option<BTreeMap<String, String>>,
}

/// A zip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Code {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, base64.
    pub sha256: String,
}

/// Lambda's state of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Being created.
    Pending,
    /// Can be invoked.
    Active,
    /// Could not be created, and why.
    Failed(String),
}

impl State {
    /// Lambda's word for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Active => "Active",
            Self::Failed(_) => "Failed",
        }
    }
}

/// How the newest update went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LastUpdate {
    /// The new revision is being frozen; the old one serves.
    InProgress,
    /// The target serves.
    Successful,
    /// The old revision still serves, and why.
    Failed(String),
}

impl LastUpdate {
    /// Lambda's word for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::InProgress => "InProgress",
            Self::Successful => "Successful",
            Self::Failed(_) => "Failed",
        }
    }
}

/// What answers invocations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// Which revision.
    pub revision: Revision,
    /// What freezing it gave.
    pub outcome: Outcome,
}

/// What freezing a revision gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A snapshot.
    Frozen(Artifact),
    /// The function failed to initialise: every invocation answers so.
    InitFailed(InitFailure),
}

/// A failed initialisation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitFailure {
    /// What failed.
    pub cause: InitCause,
    /// What the function wrote, the tail.
    pub log: String,
}

/// How an initialisation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitCause {
    /// The runtime reported an error.
    Document {
        /// `Runtime.ImportModuleError`, …
        error_type: String,
        /// The runtime's JSON document.
        document: String,
    },
    /// The platform found it; the text follows `RequestId: … Error: `.
    Found {
        /// `Runtime.ExitError`, …
        error_type: String,
        /// As in "Runtime exited with error: exit status 1".
        text: String,
    },
}

impl InitCause {
    /// The error's type.
    #[must_use]
    pub fn error_type(&self) -> &str {
        match self {
            Self::Document { error_type, .. } | Self::Found { error_type, .. } => error_type,
        }
    }

    /// The error's message for people.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Found { text, .. } => text.clone(),
            Self::Document { document, .. } => serde_json::from_str::<serde_json::Value>(document)
                .ok()
                .and_then(|value| Some(value.get("errorMessage")?.as_str()?.to_owned()))
                .unwrap_or_else(|| document.clone()),
        }
    }
}
