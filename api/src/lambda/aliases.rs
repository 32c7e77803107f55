//! CreateAlias, GetAlias, UpdateAlias, DeleteAlias, ListAliases.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{
    AliasConfiguration, AliasRequest, ListAliasesResponse, RoutingConfig,
};

use super::errors::{ApiError, violation};
use super::paging::Page;
use super::{Answer, Call, arn, change_error, empty, function_or, json, validate};
use crate::functions::aliases::{self, Wanted};
use crate::record::{Alias, Canary, VersionId};
use crate::state::App;

const NAME_CHARS_MAX: usize = 128;
/// What versions of a routing configuration must be, in the model's words.
const VERSION_KEYS: &str = "Map keys must satisfy constraint: [Member must have length less than or equal to 1024, Member must have length greater than or equal to 1, Member must satisfy regular expression pattern: [0-9]+]";
/// What their shares must be.
const WEIGHT_VALUES: &str = "Map value must satisfy constraint: [Member must have value less than or equal to 1.0, Member must have value greater than or equal to 0.0, Member must not be null]";

pub(super) async fn create(app: &Arc<App>, call: Call, function: &str) -> Answer {
    let named = function;
    let limit = call.json_limit();
    let request: AliasRequest = call.json(limit, "CreateAlias").await?;
    let name = request.name.clone().unwrap_or_default();
    check_name(&name)?;
    let Some(version) = &request.function_version else {
        return Err(ApiError::validation(&[validate::null("functionVersion")]));
    };
    let version = read_version(version)?;
    let wanted = wanted(request, Some(version))?;
    let function = function_or(app, named, |reference| {
        ApiError::not_found(&format!("{}:{version}", arn(app, reference)))
    })?;
    let alias = aliases::create(app, &function.name, &name, version, wanted)
        .await
        .map_err(|error| change_error(app, &error))?;
    json(
        StatusCode::CREATED,
        &view(app, &function.name, &name, &alias),
    )
}

pub(super) fn get(app: &Arc<App>, call: &Call, function: &str, name: &str) -> Answer {
    let function = call.function(app, function)?;
    let alias = aliases::find(&function, name)
        .map_err(|_| ApiError::no_alias(&format!("{}:{name}", app.arn(&function.name))))?;
    json(StatusCode::OK, &view(app, &function.name, name, &alias))
}

pub(super) async fn update(app: &Arc<App>, call: Call, function: &str, name: &str) -> Answer {
    let function = call.function(app, function)?;
    let current = aliases::find(&function, name).map_err(|error| change_error(app, &error))?;
    let limit = call.json_limit();
    let request: AliasRequest = call.json(limit, "UpdateAlias").await?;
    let version = request
        .function_version
        .as_deref()
        .map(read_version)
        .transpose()?;
    let mut wanted = wanted(request, Some(version.unwrap_or(current.version)))?;
    wanted.version = version;
    let alias = aliases::update(app, &function.name, name, wanted)
        .await
        .map_err(|error| change_error(app, &error))?;
    json(StatusCode::OK, &view(app, &function.name, name, &alias))
}

pub(super) async fn delete(app: &Arc<App>, call: Call, function: &str, name: &str) -> Answer {
    let function = call.function(app, function)?;
    aliases::delete(app, &function.name, name)
        .await
        .map_err(|error| change_error(app, &error))?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) fn list(app: &Arc<App>, call: &Call, function: &str) -> Answer {
    let function = call.function(app, function)?;
    let of = call
        .query("FunctionVersion")
        .map(|version| read_version(&version))
        .transpose()?;
    let record = function.record();
    let entries = record
        .aliases
        .iter()
        .filter(|(_, alias)| of.is_none_or(|version| alias.names(version)))
        .map(|(name, alias)| (name.clone(), view(app, &function.name, name, alias)));
    let (aliases, next_marker) = Page::of(call)?.cut(entries);
    let body = ListAliasesResponse {
        aliases,
        next_marker,
    };
    json(StatusCode::OK, &body)
}

/// What a request wants; `version` is the first version that the alias will have.
fn wanted(request: AliasRequest, version: Option<VersionId>) -> Result<Wanted, ApiError> {
    validate::check_description(request.description.as_deref())?;
    let canary = match (request.routing_config, version) {
        (Some(routing), Some(first)) => Some(canary(&routing, first)?),
        _ => None,
    };
    Ok(Wanted {
        version,
        description: request.description,
        canary,
        revision_id: request.revision_id,
    })
}

fn canary(routing: &RoutingConfig, first: VersionId) -> Result<Option<Canary>, ApiError> {
    let weights = &routing.additional_version_weights;
    if weights.len() > 1 {
        return Err(ApiError::invalid_parameter(
            "Number of items in AdditionalVersionWeights cannot be greater than 1",
        ));
    }
    let Some((second, &weight)) = weights.first_key_value() else {
        return Ok(None);
    };
    let refused = |constraint: &str| {
        ApiError::validation(&[violation(
            // As Java writes a map of floating-point numbers.
            &format!("{{{second}={weight:?}}}"),
            "routingConfig.additionalVersionWeights",
            constraint,
        )])
    };
    let Ok(second @ VersionId::Number(_)) = second.parse() else {
        return Err(refused(VERSION_KEYS));
    };
    if first == VersionId::Latest {
        return Err(ApiError::invalid_parameter(
            "$LATEST is not supported for an alias pointing to more than 1 version",
        )
        .untyped());
    }
    if first == second {
        return Err(ApiError::invalid_parameter(format!(
            "Invalid function version {second}. Function version {second} is already included in routing configuration."
        )));
    }
    if !(0.0..=1.0).contains(&weight) {
        return Err(refused(WEIGHT_VALUES));
    }
    Ok(Some(Canary {
        version: second,
        weight,
    }))
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let refused =
        |constraint: &str| Err(ApiError::validation(&[violation(name, "name", constraint)]));
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if name.is_empty() {
        return refused("Member must have length greater than or equal to 1");
    }
    if name.len() > NAME_CHARS_MAX {
        return refused("Member must have length less than or equal to 128");
    }
    if !name.bytes().all(is_word) || name.bytes().all(|byte| byte.is_ascii_digit()) {
        return refused(
            "Member must satisfy regular expression pattern: (?!^[0-9]+$)([a-zA-Z0-9-_]+)",
        );
    }
    Ok(())
}

fn read_version(text: &str) -> Result<VersionId, ApiError> {
    text.parse().map_err(|_| {
        ApiError::validation(&[violation(
            text,
            "functionVersion",
            "Member must satisfy regular expression pattern: (\\$LATEST|[0-9]+)",
        )])
    })
}

fn view(app: &App, function: &str, name: &str, alias: &Alias) -> AliasConfiguration {
    AliasConfiguration {
        alias_arn: format!("{}:{name}", app.arn(function)),
        name: name.to_owned(),
        function_version: alias.version.to_string(),
        description: alias.description.clone(),
        routing_config: alias.canary.map(|canary| RoutingConfig {
            additional_version_weights: BTreeMap::from([(
                canary.version.to_string(),
                canary.weight,
            )]),
        }),
        revision_id: alias.revision_id.clone(),
    }
}
