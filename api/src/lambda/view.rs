//! How a function looks to Lambda's clients. Pure.

use std::collections::BTreeMap;

use thaw_api_types::lambda::{
    CodeLocation, Environment, EphemeralStorage, FunctionConfiguration, GetFunctionResponse,
    LayerReference, LoggingConfig, RuntimeVersionConfig, SnapStartResponse, TracingConfig,
};

use crate::auth::sigv4::hex_digest;
use crate::clock;
use crate::network;
use crate::record::{LastUpdate, LayerUse, State, Version, VersionId};
use crate::state::App;

/// Which members a view has: lists omit what changes without a client's doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// All members.
    Full,
    /// Without State, LastUpdateStatus and RuntimeVersionConfig.
    ListItem,
}

/// A version, most often `$LATEST`, with the function's ARN, as operations that name no version answer.
#[must_use]
pub fn unqualified(app: &App, version: &Version) -> FunctionConfiguration {
    let arn = app.arn(&version.name);
    configuration(version, &arn, &app.region, Detail::Full)
}

/// A version with its number in the ARN.
#[must_use]
pub fn version(app: &App, version: &Version) -> FunctionConfiguration {
    let arn = app.version_arn(&version.name, version.id);
    configuration(version, &arn, &app.region, Detail::Full)
}

/// Orders versions by name and number.
#[must_use]
pub fn key(version: &Version) -> String {
    let number = match version.id {
        VersionId::Latest => 0,
        VersionId::Number(number) => number,
    };
    // No name contains a colon; numbers of one length compare as text.
    format!("{}:{number:020}", version.name)
}

/// FunctionConfiguration of a version's target. `arn` carries a qualifier if the client named one.
#[must_use]
pub fn configuration(
    function: &Version,
    arn: &str,
    region: &str,
    detail: Detail,
) -> FunctionConfiguration {
    let settings = &function.target.settings;
    let mut view = FunctionConfiguration {
        function_name: function.name.clone(),
        function_arn: arn.to_owned(),
        runtime: settings.runtime.clone(),
        role: settings.role.clone(),
        handler: settings.handler.clone(),
        code_size: function.target.code.bytes,
        code_sha256: function.target.code.sha256.clone(),
        description: settings.description.clone(),
        timeout: settings.timeout_seconds,
        memory_size: settings.memory_mib,
        last_modified: clock::last_modified(function.modified_unix_ms),
        version: function.id.to_string(),
        layers: settings.layers.iter().map(layer).collect(),
        environment: settings
            .environment
            .clone()
            .map(|variables| Environment { variables }),
        tracing_config: TracingConfig {
            mode: settings.tracing.word().to_owned(),
        },
        revision_id: function.revision_id.clone(),
        package_type: "Zip".to_owned(),
        architectures: vec!["x86_64".to_owned()],
        ephemeral_storage: EphemeralStorage {
            size: settings.ephemeral_mib.into(),
        },
        snap_start: snap_start(function),
        runtime_version_config: (detail == Detail::Full).then(|| RuntimeVersionConfig {
            runtime_version_arn: runtime_arn(region, &settings.runtime),
        }),
        logging_config: logging(function),
        thaw_network: settings.network.as_ref().map(network::shown),
        ..FunctionConfiguration::default()
    };
    if detail == Detail::Full {
        state(function, &mut view);
    }
    view
}

/// Names the one build of a runtime that this gateway has, as AWS does: by a digest.
fn runtime_arn(region: &str, runtime: &str) -> String {
    let digest = hex_digest(runtime.as_bytes());
    format!("arn:aws:lambda:{region}::runtime:{digest}")
}

fn logging(function: &Version) -> LoggingConfig {
    let logging = &function.target.settings.logging;
    let levels = logging.json.as_ref();
    LoggingConfig {
        log_format: if levels.is_some() { "JSON" } else { "Text" }.to_owned(),
        application_log_level: levels.map(|levels| levels.application.clone()),
        system_log_level: levels.map(|levels| levels.system.clone()),
        log_group: logging.group_of(&function.name),
    }
}

fn layer(layer: &LayerUse) -> LayerReference {
    LayerReference {
        arn: layer.arn.clone(),
        code_size: layer.code.bytes,
    }
}

/// `$LATEST` is frozen without hooks; a published version is optimised once it is frozen.
fn snap_start(version: &Version) -> SnapStartResponse {
    if !version.target.settings.snap_start {
        return SnapStartResponse::default();
    }
    let is_frozen = version.id != VersionId::Latest && version.state == State::Active;
    SnapStartResponse {
        apply_on: "PublishedVersions".to_owned(),
        optimization_status: if is_frozen { "On" } else { "Off" }.to_owned(),
    }
}

fn state(function: &Version, view: &mut FunctionConfiguration) {
    view.state = Some(function.state.word().to_owned());
    let (reason, code) = match &function.state {
        State::Active => (None, None),
        State::Pending => (Some("The function is being created."), Some("Creating")),
        State::Failed(reason) => (Some(reason.as_str()), Some("InternalError")),
        State::InitFailed(reason) => (Some(reason.as_str()), Some("FunctionError")),
    };
    view.state_reason = reason.map(str::to_owned);
    view.state_reason_code = code.map(str::to_owned);
    let Some(update) = &function.last_update else {
        return;
    };
    view.last_update_status = Some(update.word().to_owned());
    let (reason, code) = match update {
        LastUpdate::Successful => (None, None),
        // Lambda's own words for it.
        LastUpdate::InProgress => (Some("The function is being created."), Some("Creating")),
        LastUpdate::Failed(reason) => {
            let by_function = matches!(function.state, State::InitFailed(_));
            let code = if by_function {
                "FunctionError"
            } else {
                "InternalError"
            };
            (Some(reason.as_str()), Some(code))
        }
    };
    view.last_update_status_reason = reason.map(str::to_owned);
    view.last_update_status_reason_code = code.map(str::to_owned);
}

/// Body of GetFunction; the code is at `location`.
#[must_use]
pub fn function(
    configuration: FunctionConfiguration,
    tags: &BTreeMap<String, String>,
    location: String,
) -> GetFunctionResponse {
    GetFunctionResponse {
        configuration,
        code: CodeLocation {
            repository_type: "S3".to_owned(),
            location,
        },
        tags: tags.clone(),
        concurrency: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_pending_function_has_no_update_status() {
        let view = configuration(&testing::version("f"), "arn", "r", Detail::Full);
        assert_eq!(view.state.as_deref(), Some("Pending"));
        assert_eq!(
            view.state_reason.as_deref(),
            Some("The function is being created.")
        );
        assert_eq!(view.state_reason_code.as_deref(), Some("Creating"));
        assert_eq!(view.last_update_status, None);
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let of = |name: &str, id| {
            key(&Version {
                id,
                ..testing::version(name)
            })
        };
        let keys = [
            of("a", VersionId::Latest),
            of("a", VersionId::Number(2)),
            of("a", VersionId::Number(10)),
            of("ab", VersionId::Latest),
        ];
        assert!(keys.is_sorted(), "{keys:?}");
    }

    #[test]
    fn a_list_item_has_no_state() {
        let view = configuration(&testing::version("f"), "arn", "r", Detail::ListItem);
        assert_eq!(view.state, None);
        assert_eq!(view.runtime_version_config, None);
    }
}
