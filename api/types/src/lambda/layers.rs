//! Layers: folders that functions share, published in versions.

use serde::{Deserialize, Serialize};

use super::FunctionCode;

/// Body of PublishLayerVersion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PublishLayerVersionRequest {
    /// Required: where the zip comes from, as a function's code does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<FunctionCode>,
    /// Free text, at most 256 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Runtimes that it is for, at most 15; told to clients, not enforced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compatible_runtimes: Option<Vec<String>>,
    /// `x86_64`, `arm64`; told to clients, not enforced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compatible_architectures: Option<Vec<String>>,
    /// Free text, at most 512 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub license_info: Option<String>,
}

/// Answer of PublishLayerVersion, GetLayerVersion and GetLayerVersionByArn.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerVersionResponse {
    /// The zip.
    pub content: LayerContent,
    /// The layer's ARN, without a version.
    pub layer_arn: String,
    /// What the version is.
    #[serde(flatten)]
    pub version: LayerVersionItem,
}

/// A layer version's zip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerContent {
    /// URL of the zip, on this gateway.
    pub location: String,
    /// Its SHA-256, base64.
    pub code_sha256: String,
    /// Its size, bytes.
    pub code_size: u64,
}

/// A layer version in lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerVersionItem {
    /// Its ARN.
    pub layer_version_arn: String,
    /// Its number, from 1.
    pub version: u64,
    /// Free text.
    pub description: String,
    /// ISO 8601 with milliseconds and `+0000`.
    pub created_date: String,
    /// Runtimes that it is for, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compatible_runtimes: Option<Vec<String>>,
    /// Instruction sets that it is for, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compatible_architectures: Option<Vec<String>>,
    /// Its licence, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub license_info: Option<String>,
}

/// Answer of ListLayerVersions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ListLayerVersionsResponse {
    /// One page, the newest first.
    pub layer_versions: Vec<LayerVersionItem>,
    /// Where the next page starts; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_marker: Option<String>,
}

/// Answer of ListLayers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ListLayersResponse {
    /// One page, ordered by name.
    pub layers: Vec<LayerItem>,
    /// Where the next page starts; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_marker: Option<String>,
}

/// A layer in lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerItem {
    /// Its name.
    pub layer_name: String,
    /// Its ARN.
    pub layer_arn: String,
    /// Its newest version that fits what the client asked for.
    pub latest_matching_version: LayerVersionItem,
}

/// A layer version that a function has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerReference {
    /// The layer version's ARN.
    pub arn: String,
    /// Size of its zip, bytes.
    pub code_size: u64,
}

/// Body of AddLayerVersionPermission.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddLayerVersionPermissionRequest {
    /// Required: names the statement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statement_id: Option<String>,
    /// Required: `lambda:GetLayerVersion`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Required: an account's number or ARN, or `*`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<String>,
    /// An organization that the account must be in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub organization_id: Option<String>,
}

/// Answer of AddLayerVersionPermission.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerStatementResponse {
    /// The statement, JSON.
    pub statement: String,
    /// Changes with every change of the policy.
    pub revision_id: String,
}

/// Answer of GetLayerVersionPolicy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LayerPolicyResponse {
    /// The policy document, JSON.
    pub policy: String,
    /// Changes with every change of the policy.
    pub revision_id: String,
}
