//! Versions, aliases, tags and concurrency of a function.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::FunctionConfiguration;

/// Body of PublishVersion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PublishVersionRequest {
    /// The code must have this SHA-256, base64.
    #[serde(skip_serializing_if = "Option::is_none", rename = "CodeSha256")]
    pub code_sha256: Option<String>,
    /// Free text, at most 256 characters; that of `$LATEST` unless it is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Refused unless `$LATEST` is at this revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision_id: Option<String>,
}

/// Body of ListVersionsByFunction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ListVersionsResponse {
    /// One page: `$LATEST`, then by number.
    pub versions: Vec<FunctionConfiguration>,
    /// Where the next page starts; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_marker: Option<String>,
}

/// Body of CreateAlias and, but for the name, of UpdateAlias.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AliasRequest {
    /// Required on creation: 1 to 128 letters, digits, `-`, `_`, not digits alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Required on creation: `$LATEST` or a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_version: Option<String>,
    /// Free text, at most 256 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// A second version and its share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing_config: Option<RoutingConfig>,
    /// UpdateAlias is refused unless the alias is at this revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision_id: Option<String>,
}

/// How an alias divides invocations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RoutingConfig {
    /// At most one published version and its share, 0 to 1.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub additional_version_weights: BTreeMap<String, f64>,
}

/// What an alias is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AliasConfiguration {
    /// The function's ARN with the alias as qualifier.
    pub alias_arn: String,
    /// Its name.
    pub name: String,
    /// `$LATEST` or a number.
    pub function_version: String,
    /// Free text.
    pub description: String,
    /// A second version, when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing_config: Option<RoutingConfig>,
    /// Changes with every change of the alias.
    pub revision_id: String,
}

/// Body of ListAliases.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ListAliasesResponse {
    /// One page, ordered by name.
    pub aliases: Vec<AliasConfiguration>,
    /// Where the next page starts; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_marker: Option<String>,
}

/// Body of TagResource and of ListTags' answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Tags {
    /// Key to value.
    pub tags: BTreeMap<String, String>,
}

/// A function's share of the account's concurrency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Concurrency {
    /// Invocations of all its versions at once; absent when nothing is reserved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserved_concurrent_executions: Option<i64>,
}

/// Body of PutProvisionedConcurrencyConfig.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ProvisionedConcurrency {
    /// Sandboxes to keep ready, at least 1.
    pub provisioned_concurrent_executions: Option<i64>,
}

/// The sandboxes that are kept ready for an alias or a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ProvisionedConcurrencyConfig {
    /// With the qualifier; in lists alone.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub function_arn: Option<String>,
    /// How many are wanted.
    pub requested_provisioned_concurrent_executions: u32,
    /// How many wait for an invocation.
    pub available_provisioned_concurrent_executions: u32,
    /// How many there are, those that run included.
    pub allocated_provisioned_concurrent_executions: u32,
    /// How far it is.
    pub status: ProvisionedStatus,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status_reason: Option<String>,
    /// ISO 8601.
    pub last_modified: String,
}

/// How far provisioning is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ProvisionedStatus {
    /// Fewer are there than are wanted.
    InProgress,
    /// All are there.
    Ready,
    /// The version's snapshot cannot be used.
    Failed,
}

/// Body of ListProvisionedConcurrencyConfigs' answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ListProvisionedConcurrencyConfigsResponse {
    /// One page, ordered by qualifier.
    pub provisioned_concurrency_configs: Vec<ProvisionedConcurrencyConfig>,
    /// Where the next page starts; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_marker: Option<String>,
}

/// Body of PutFunctionRecursionConfig, and its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RecursionConfig {
    /// `Allow` or `Terminate`; required.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recursive_loop: Option<String>,
}

/// Body of PutFunctionCodeSigningConfig.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct FunctionCodeSigningRequest {
    /// Required.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code_signing_config_arn: Option<String>,
}

/// Body of PutRuntimeManagementConfig.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RuntimeManagementRequest {
    /// `Auto`, `FunctionUpdate` or `Manual`; required.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_runtime_on: Option<String>,
    /// A build, of `Manual` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_version_arn: Option<String>,
}

/// Body of AddPermission.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddPermissionRequest {
    /// The statement's name within the policy.
    pub statement_id: Option<String>,
    /// `lambda:InvokeFunction`, …
    pub action: Option<String>,
    /// An account, an ARN, a service or `*`.
    pub principal: Option<String>,
    /// Condition: the resource that calls.
    pub source_arn: Option<String>,
    /// Condition: the account of the resource that calls.
    pub source_account: Option<String>,
    /// Condition: a token of the caller's.
    pub event_source_token: Option<String>,
    /// Condition: the caller's organisation.
    #[serde(rename = "PrincipalOrgID")]
    pub principal_org_id: Option<String>,
    /// Condition: `NONE` or `AWS_IAM`.
    pub function_url_auth_type: Option<String>,
    /// The policy must be at this revision.
    pub revision_id: Option<String>,
}

/// Body of AddPermission's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddPermissionResponse {
    /// The statement, JSON.
    pub statement: String,
}

/// Body of GetPolicy's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GetPolicyResponse {
    /// The policy, JSON.
    pub policy: String,
    /// Changes with every change of the policy.
    pub revision_id: String,
}

/// Body of GetAccountSettings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AccountSettings {
    /// What there may be.
    pub account_limit: AccountLimit,
    /// What there is.
    pub account_usage: AccountUsage,
}

/// Limits of all functions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AccountLimit {
    /// Bytes of all zips.
    pub total_code_size: u64,
    /// Bytes of one zip's content.
    pub code_size_unzipped: u64,
    /// Bytes of one zip.
    pub code_size_zipped: u64,
    /// Invocations at once.
    pub concurrent_executions: u64,
    /// Of these, what no function has reserved.
    pub unreserved_concurrent_executions: u64,
}

/// What all functions use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AccountUsage {
    /// Bytes of all zips, of published versions and of layers too.
    pub total_code_size: u64,
    /// Functions.
    pub function_count: u64,
}

/// Body of PutFunctionEventInvokeConfig and UpdateFunctionEventInvokeConfig.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EventInvokeConfigRequest {
    /// Further attempts after a failure, 0 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_retry_attempts: Option<i64>,
    /// Seconds, 60 to 21,600.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_event_age_in_seconds: Option<i64>,
    /// What gets records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_config: Option<DestinationConfig>,
}

/// What gets records of asynchronous invocations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DestinationConfig {
    /// Of successes.
    pub on_success: Destination,
    /// Of failures.
    pub on_failure: Destination,
}

/// One destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Destination {
    /// A function's ARN, or a URL; absent for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
}

/// How asynchronous invocations are treated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EventInvokeConfig {
    /// Seconds since the Unix epoch.
    pub last_modified: f64,
    /// With a qualifier.
    pub function_arn: String,
    /// As configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_retry_attempts: Option<u32>,
    /// As configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum_event_age_in_seconds: Option<u32>,
    /// As configured.
    pub destination_config: DestinationConfig,
}

/// Body of ListFunctionEventInvokeConfigs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ListEventInvokeConfigsResponse {
    /// One page, ordered by qualifier.
    pub function_event_invoke_configs: Vec<EventInvokeConfig>,
    /// Where the next page starts; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_marker: Option<String>,
}
