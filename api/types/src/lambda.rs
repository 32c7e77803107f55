//! The Lambda REST API, `2015-03-31`. Field names and optionality are the service model's; units stand on the fields.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

mod layers;
mod urls;
mod versions;

pub use layers::*;
pub use urls::*;
pub use versions::*;

/// Body of CreateFunction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CreateFunctionRequest {
    /// Required; a name, a partial ARN or a full ARN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_name: Option<String>,
    /// Required by the model; an IAM role's ARN, which Thaw records and does not use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Required: where the code comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<FunctionCode>,
    /// All that UpdateFunctionConfiguration can change too.
    #[serde(flatten)]
    pub settings: FunctionSettings,
    /// `Zip` (default) or `Image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package_type: Option<String>,
    /// Instruction sets; one entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architectures: Option<Vec<String>>,
    /// Publish version 1 at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publish: Option<bool>,
    /// Tags of the function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeMap<String, String>>,
    /// Whose signatures its code must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code_signing_config_arn: Option<String>,
}

/// Settings of a function that a client may name on creation and change afterwards; `None` is "not named".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FunctionSettings {
    /// `python3.11`, `provided.al2023`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<String>,
    /// `module.function`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handler: Option<String>,
    /// Free text, at most 256 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Seconds, 1 to 900.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<i64>,
    /// MiB, 128 to 10,240.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_size: Option<i64>,
    /// Environment of the function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<Environment>,
    /// Layer versions' ARNs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<String>>,
    /// Size of /tmp.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ephemeral_storage: Option<EphemeralStorage>,
    /// When snapshots are taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snap_start: Option<SnapStart>,
    /// How its log is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logging_config: Option<LoggingConfigRequest>,
    /// What X-Ray is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tracing_config: Option<TracingConfig>,
    /// What it may reach; Thaw's own, of which AWS knows nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thaw_network: Option<serde_json::Value>,
    /// A key of a key management service.
    #[serde(rename = "KMSKeyArn", skip_serializing_if = "Option::is_none")]
    pub kms_key_arn: Option<serde_json::Value>,
    /// Where events go that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter_config: Option<serde_json::Value>,
    /// Network file systems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_system_configs: Option<serde_json::Value>,
    /// Entry point of an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_config: Option<serde_json::Value>,
    /// Virtual private cloud.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vpc_config: Option<serde_json::Value>,
}

/// Body of UpdateFunctionConfiguration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UpdateFunctionConfigurationRequest {
    /// A new role's ARN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// The change is refused unless the function is at this revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision_id: Option<String>,
    /// What to change.
    #[serde(flatten)]
    pub settings: FunctionSettings,
}

/// Body of UpdateFunctionCode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct UpdateFunctionCodeRequest {
    /// Where the code comes from.
    #[serde(flatten)]
    pub code: FunctionCode,
    /// Publish a version as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publish: Option<bool>,
    /// Only validate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
    /// The change is refused unless the function is at this revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision_id: Option<String>,
    /// Instruction sets; one entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architectures: Option<Vec<String>>,
}

/// Where a function's code comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FunctionCode {
    /// The zip itself, base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zip_file: Option<String>,
    /// Bucket of a zip in S3.
    #[serde(skip_serializing_if = "Option::is_none", rename = "S3Bucket")]
    pub s3_bucket: Option<String>,
    /// Key of a zip in S3.
    #[serde(skip_serializing_if = "Option::is_none", rename = "S3Key")]
    pub s3_key: Option<String>,
    /// Version of the zip in S3.
    #[serde(skip_serializing_if = "Option::is_none", rename = "S3ObjectVersion")]
    pub s3_object_version: Option<String>,
    /// An OCI image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_uri: Option<String>,
}

/// Environment variables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Environment {
    /// Name to value.
    pub variables: BTreeMap<String, String>,
}

/// Size of /tmp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct EphemeralStorage {
    /// MiB, 512 to 10,240.
    pub size: i64,
}

/// When snapshots are taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SnapStart {
    /// `None` or `PublishedVersions`.
    pub apply_on: String,
}

/// What a function is, as every operation shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct FunctionConfiguration {
    /// The bare name.
    pub function_name: String,
    /// The full ARN, without a qualifier for `$LATEST`.
    pub function_arn: String,
    /// The runtime's identifier.
    pub runtime: String,
    /// The role as recorded.
    pub role: String,
    /// The handler.
    pub handler: String,
    /// Size of the zip, bytes.
    pub code_size: u64,
    /// SHA-256 of the zip, base64.
    pub code_sha256: String,
    /// Free text.
    pub description: String,
    /// Seconds.
    pub timeout: u32,
    /// MiB.
    pub memory_size: u32,
    /// ISO 8601 with milliseconds and `+0000`.
    pub last_modified: String,
    /// `$LATEST` or a number.
    pub version: String,
    /// Its layers, when it has any, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerReference>,
    /// Environment of the function, when it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Environment>,
    /// What X-Ray is told.
    pub tracing_config: TracingConfig,
    /// Changes with every change of the function.
    pub revision_id: String,
    /// `Pending`, `Active` or `Failed`; absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Why it is in that state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// The same for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason_code: Option<String>,
    /// `Successful`, `InProgress` or `Failed`; absent in lists and before the first deployment ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update_status: Option<String>,
    /// Why the last update has that status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update_status_reason: Option<String>,
    /// The same for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_update_status_reason_code: Option<String>,
    /// Always `Zip`.
    pub package_type: String,
    /// Always `x86_64`.
    pub architectures: Vec<String>,
    /// Size of /tmp.
    pub ephemeral_storage: EphemeralStorage,
    /// Whether published versions run SnapStart's hooks, and whether this one did.
    pub snap_start: SnapStartResponse,
    /// Which build of the runtime; absent in lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_version_config: Option<RuntimeVersionConfig>,
    /// Where logs go.
    pub logging_config: LoggingConfig,
    /// What it may reach; Thaw's own. Values of secrets are digests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw_network: Option<serde_json::Value>,
}

impl Default for EphemeralStorage {
    fn default() -> Self {
        Self { size: 512 }
    }
}

/// Tracing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TracingConfig {
    /// `PassThrough` or `Active`.
    pub mode: String,
}

impl Default for TracingConfig {
    fn default() -> Self {
        Self {
            mode: "PassThrough".to_owned(),
        }
    }
}

/// SnapStart as AWS reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SnapStartResponse {
    /// `None` or `PublishedVersions`.
    pub apply_on: String,
    /// `On` or `Off`.
    pub optimization_status: String,
}

impl Default for SnapStartResponse {
    fn default() -> Self {
        Self {
            apply_on: "None".to_owned(),
            optimization_status: "Off".to_owned(),
        }
    }
}

/// Which build of a runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RuntimeVersionConfig {
    /// An ARN that names the runtime.
    pub runtime_version_arn: String,
}

/// Where logs go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LoggingConfig {
    /// `Text` or `JSON`.
    pub log_format: String,
    /// Least level of the function's own lines; of JSON alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application_log_level: Option<String>,
    /// Least level of the platform's lines; of JSON alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_log_level: Option<String>,
    /// `/aws/lambda/<function>`, or as the client named it.
    pub log_group: String,
}

/// How a client wants the log; `None` is "not named".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct LoggingConfigRequest {
    /// `Text` or `JSON`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<String>,
    /// `TRACE`, `DEBUG`, `INFO`, `WARN`, `ERROR` or `FATAL`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_log_level: Option<String>,
    /// `DEBUG`, `INFO` or `WARN`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_log_level: Option<String>,
    /// The group's name, at most 512 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_group: Option<String>,
}

/// Body of GetFunction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct GetFunctionResponse {
    /// What the function is.
    pub configuration: FunctionConfiguration,
    /// Where its code can be had.
    pub code: CodeLocation,
    /// Its tags, when it has any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// What is reserved for it, when anything is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
}

/// Where code can be had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CodeLocation {
    /// `S3`, as AWS says it.
    pub repository_type: String,
    /// URL of the zip, on this gateway.
    pub location: String,
}

/// Body of ListFunctions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ListFunctionsResponse {
    /// One page, ordered by name.
    pub functions: Vec<FunctionConfiguration>,
    /// Where the next page starts; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_marker: Option<String>,
}

/// What a failed invocation answers with when the platform, not the function, writes the document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FunctionErrorDocument {
    /// What failed, for programs.
    pub error_type: String,
    /// What failed, for people.
    pub error_message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_request_as_botocore_writes_it_is_read() {
        let body = r#"{"FunctionName":"f","Role":"arn:aws:iam::000000000000:role/r","Runtime":"python3.11",
            "Handler":"a.b","Code":{"ZipFile":"UEs=","S3Bucket":"b"},"Timeout":3,"Environment":{"Variables":{"A":"b"}},
            "Unknown":{"x":1}}"#;
        let request: CreateFunctionRequest = serde_json::from_str(body).unwrap();
        assert_eq!(request.settings.runtime.as_deref(), Some("python3.11"));
        assert_eq!(request.settings.timeout, Some(3));
        let code = request.code.unwrap();
        assert_eq!(
            (code.zip_file.as_deref(), code.s3_bucket.as_deref()),
            (Some("UEs="), Some("b"))
        );
        assert_eq!(request.settings.environment.unwrap().variables["A"], "b");
    }

    #[test]
    fn a_list_item_without_state_omits_the_members() {
        let text = serde_json::to_string(&FunctionConfiguration::default()).unwrap();
        assert!(!text.contains("State\""), "{text}");
        assert!(text.contains("CodeSha256"), "{text}");
    }
}
