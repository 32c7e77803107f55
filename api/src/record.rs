//! What a function is: the documents that the database keeps, and the words of their state machine.
//!
//! A function is what its **versions** share: tags, aliases, limits. A version, `$LATEST` or a published one, has a **target**
//! revision, which clients see, and a **serving** one, which answers invocations. They differ while an update of `$LATEST` is
//! frozen; a published version's never changes. Each revision has a folder of its own, so nothing is ever overwritten.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thaw_api_types::lambda::Cors;
use thaw_runtime::NetworkPolicy;
use uuid::Uuid;

use crate::engine::{Artifact, EPHEMERAL_MIB_DEFAULT};
use crate::events::EventConfig;
use crate::policy::Policy;

/// What all versions of a function share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Function {
    /// The bare name.
    pub name: String,
    /// Tags.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// Names for versions.
    #[serde(default)]
    pub aliases: BTreeMap<String, Alias>,
    /// The newest version ever published, 0 for none: numbers are not given twice.
    #[serde(default)]
    pub last_number: u64,
    /// What was published last, to tell whether another version would differ from it.
    #[serde(default)]
    pub last_published: Option<Published>,
    /// Invocations of all versions that may run at once; `None` for the gateway's limits alone.
    #[serde(default)]
    pub reserved_concurrency: Option<u32>,
    /// How asynchronous invocations are treated, by qualifier, `$LATEST` for none.
    #[serde(default)]
    pub event_configs: BTreeMap<String, EventConfig>,
    /// Sandboxes that are kept ready, by alias or version number.
    #[serde(default)]
    pub provisioned: BTreeMap<String, Provisioned>,
    /// Resource-based policies, by qualifier, `$LATEST` for none.
    #[serde(default)]
    pub policies: BTreeMap<String, Policy>,
    /// Whether a client has allowed recursive loops, by way of destinations.
    #[serde(default)]
    pub allows_loops: bool,
    /// URLs that were configured, by alias, `$LATEST` for none.
    #[serde(default)]
    pub urls: BTreeMap<String, UrlConfig>,
}

impl Function {
    /// Sandboxes of a version that are to be kept ready: an alias with two versions divides its own by weight.
    #[must_use]
    pub fn provisioned_for(&self, id: VersionId) -> u32 {
        let qualifiers = self.provisioned.keys();
        let shares = qualifiers.map(|qualifier| self.provisioned_by(qualifier, id));
        shares.fold(0, u32::saturating_add)
    }

    /// Those of them that one alias or version number asks for.
    #[must_use]
    pub fn provisioned_by(&self, qualifier: &str, id: VersionId) -> u32 {
        let requested = self.provisioned.get(qualifier).map_or(0, |p| p.requested);
        match self.aliases.get(qualifier) {
            Some(alias) => alias.share(id, requested),
            None if qualifier == id.to_string() => requested,
            None => 0,
        }
    }

    /// What is provisioned for all qualifiers but one.
    #[must_use]
    pub fn provisioned_except(&self, qualifier: &str) -> u64 {
        let others = self.provisioned.iter().filter(|(key, _)| *key != qualifier);
        others.map(|(_, config)| u64::from(config.requested)).sum()
    }
}

/// Provisioned concurrency of an alias or a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provisioned {
    /// Sandboxes that are kept ready, at least 1.
    pub requested: u32,
    /// Milliseconds since the Unix epoch.
    pub modified_unix_ms: i64,
}

/// A function's URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UrlConfig {
    /// First label of its host name.
    pub id: String,
    /// Who may call it.
    pub auth: UrlAuth,
    /// Which other origins may read answers; `None` leaves that to the function.
    pub cors: Option<Cors>,
    /// Whether answers are handed on as the function writes them.
    #[serde(default)]
    pub streams: bool,
    /// Milliseconds since the Unix epoch.
    pub created_unix_ms: i64,
    /// Milliseconds since the Unix epoch.
    pub modified_unix_ms: i64,
}

/// Who may call a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UrlAuth {
    /// Anyone.
    None,
    /// Who signs with a key that may invoke the function, wherever the gateway asks for signatures.
    AwsIam,
}

/// The target of `$LATEST` as it was published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// As which version.
    pub number: u64,
    /// Its code.
    pub code: Code,
    /// Its settings.
    pub settings: Settings,
}

/// A name for a version, or for two between which it divides invocations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alias {
    /// The version that it names.
    pub version: VersionId,
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// Changes with every change of the alias.
    pub revision_id: String,
    /// A second published version and its share of invocations, 0 to 1.
    #[serde(default)]
    pub canary: Option<Canary>,
}

/// The second version of an alias.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Canary {
    /// Which.
    pub version: VersionId,
    /// Its share, 0 to 1.
    pub weight: f64,
}

impl Alias {
    /// The version that answers an invocation; `dice` is uniform in 0..1.
    #[must_use]
    pub fn pick(&self, dice: f64) -> VersionId {
        match &self.canary {
            Some(canary) if dice < canary.weight => canary.version,
            _ => self.version,
        }
    }

    /// How many of `count` sandboxes are a version's: the second version's are rounded up.
    fn share(&self, id: VersionId, count: u32) -> u32 {
        let weight = self.canary.map_or(0.0, |canary| canary.weight);
        let wanted = (f64::from(count) * weight).ceil();
        let second = (0..=count)
            .find(|n| f64::from(*n) >= wanted)
            .unwrap_or(count);
        match self.canary {
            Some(canary) if canary.version == id => second,
            _ if self.version == id => count - second,
            _ => 0,
        }
    }

    /// Whether it names this version, alone or beside another.
    #[must_use]
    pub fn names(&self, version: VersionId) -> bool {
        self.version == version || self.canary.is_some_and(|canary| canary.version == version)
    }
}

/// Which version of a function. Written `$LATEST` or as a decimal number from 1.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub enum VersionId {
    /// The one that clients change.
    #[default]
    Latest,
    /// A published one, which nobody changes.
    Number(u64),
}

impl fmt::Display for VersionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("$LATEST"),
            Self::Number(number) => number.fmt(f),
        }
    }
}

/// A text that names no version.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is neither $LATEST nor a version's number")]
pub struct NoVersion(String);

impl FromStr for VersionId {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let number = || text.parse().ok().filter(|&number: &u64| number > 0);
        match text {
            "$LATEST" => Ok(Self::Latest),
            _ if !text.starts_with(['0', '+']) => number()
                .map(Self::Number)
                .ok_or_else(|| NoVersion(text.to_owned())),
            _ => Err(NoVersion(text.to_owned())),
        }
    }
}

impl From<VersionId> for String {
    fn from(version: VersionId) -> Self {
        version.to_string()
    }
}

impl TryFrom<String> for VersionId {
    type Error = NoVersion;

    fn try_from(text: String) -> Result<Self, NoVersion> {
        text.parse()
    }
}

/// One version of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The function's bare name.
    pub name: String,
    /// Which version.
    #[serde(default)]
    pub id: VersionId,
    /// Milliseconds since the Unix epoch.
    pub modified_unix_ms: i64,
    /// Changes with every change a client makes, and when its state changes; Lambda's `RevisionId`.
    pub revision_id: String,
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

impl Version {
    /// Whether its code is being frozen.
    #[must_use]
    pub fn is_deploying(&self) -> bool {
        self.state == State::Pending
            || self.last_update == Some(LastUpdate::InProgress)
            || self.is_promised()
    }

    /// Whether it is told to be Active and still being frozen: a published version can be invoked at once, the invocation waits.
    #[must_use]
    pub fn is_promised(&self) -> bool {
        self.state == State::Active && self.serving.is_none()
    }

    /// Memory of a sandbox that answers invocations, MiB.
    #[must_use]
    pub fn memory_mib(&self) -> u32 {
        let serving = self.serving.as_ref().map(|serving| &serving.revision);
        serving.unwrap_or(&self.target).settings.memory_mib
    }

    /// Gives it another `RevisionId`.
    pub fn revise(&mut self) {
        self.revision_id = Uuid::new_v4().to_string();
    }
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
    /// The key that stored the code; `None` for the owner's, and while nobody is asked for one.
    pub key: Option<String>,
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
    /// Published versions run SnapStart's hooks around their snapshot.
    #[serde(default)]
    pub snap_start: bool,
    /// Layers, in their order.
    #[serde(default)]
    pub layers: Vec<LayerUse>,
    /// Size of the disk that /tmp is on, MiB, 512 to 10,240.
    #[serde(default = "ephemeral_default")]
    pub ephemeral_mib: u32,
    /// How its log is written.
    #[serde(default)]
    pub logging: Logging,
    /// What X-Ray is told; recorded only, as there is none here: no trace that Thaw begins is sampled.
    #[serde(default)]
    pub tracing: Tracing,
    /// What it may reach; `None`: nothing, and it has no network device.
    #[serde(default)]
    pub network: Option<NetworkPolicy>,
}

/// Whose decision it is that an invocation is traced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tracing {
    /// The caller's.
    #[default]
    PassThrough,
    /// The function's.
    Active,
}

impl Tracing {
    /// As the Lambda API spells it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::PassThrough => "PassThrough",
            Self::Active => "Active",
        }
    }
}

/// How a function's log is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logging {
    /// The group's name as the function is told it; `None` for `/aws/lambda/NAME`.
    #[serde(default)]
    pub group: Option<String>,
    /// Lines are JSON, of these levels; `None` for text.
    #[serde(default)]
    pub json: Option<LogLevels>,
}

impl Logging {
    /// The group's name.
    #[must_use]
    pub fn group_of(&self, function: &str) -> String {
        let own = || format!("/aws/lambda/{function}");
        self.group.clone().unwrap_or_else(own)
    }
}

/// Which lines of a JSON log there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLevels {
    /// The least level of the function's own: `TRACE`, `DEBUG`, `INFO`, `WARN`, `ERROR`, `FATAL`. The runtime's client keeps to it.
    pub application: String,
    /// The least level of the platform's: `DEBUG`, `INFO`, `WARN`.
    pub system: String,
}

impl Default for LogLevels {
    fn default() -> Self {
        Self {
            application: "INFO".to_owned(),
            system: "INFO".to_owned(),
        }
    }
}

fn ephemeral_default() -> u32 {
    EPHEMERAL_MIB_DEFAULT
}

/// A layer version that a function has. It stays usable when it is deleted: each revision has its zip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerUse {
    /// The layer version's ARN.
    pub arn: String,
    /// The layer's name.
    pub name: String,
    /// The version's number.
    pub number: u64,
    /// Its zip.
    pub code: Code,
}

/// A zip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Code {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, base64.
    pub sha256: String,
    /// Its files together, bytes; 0 for what was uploaded before this was kept.
    #[serde(default)]
    pub unzipped_bytes: u64,
}

/// Lambda's state of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Being created.
    Pending,
    /// Can be invoked.
    Active,
    /// Could not be created, and why.
    Failed(String),
    /// The function's own initialisation failed while a version with SnapStart was created, and how.
    InitFailed(String),
}

impl State {
    /// Lambda's word for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Active => "Active",
            Self::Failed(_) | Self::InitFailed(_) => "Failed",
        }
    }

    /// Why it is not there.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Failed(reason) | Self::InitFailed(reason) => Some(reason),
            Self::Pending | Self::Active => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_latest_or_numbers_from_one() {
        for (text, version) in [
            ("$LATEST", Some(VersionId::Latest)),
            ("1", Some(VersionId::Number(1))),
            ("12", Some(VersionId::Number(12))),
            ("0", None),
            ("01", None),
            ("+1", None),
            ("live", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<VersionId>().ok(), version, "{text}");
        }
        assert!(VersionId::Latest < VersionId::Number(1));
    }

    #[test]
    fn an_alias_divides_by_weight() {
        let mut alias = Alias {
            version: VersionId::Number(1),
            description: String::new(),
            revision_id: String::new(),
            canary: None,
        };
        assert_eq!(alias.pick(0.0), VersionId::Number(1));
        alias.canary = Some(Canary {
            version: VersionId::Number(2),
            weight: 0.25,
        });
        assert_eq!(alias.pick(0.2), VersionId::Number(2));
        assert_eq!(alias.pick(0.25), VersionId::Number(1));
        assert!(alias.names(VersionId::Number(2)) && !alias.names(VersionId::Latest));
    }
}
