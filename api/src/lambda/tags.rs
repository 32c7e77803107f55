//! TagResource, UntagResource, ListTags: tags of functions.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::Tags;

use super::errors::{ApiError, violation};
use super::names::FunctionRef;
use super::validate::TAGS_MAX;
use super::{Answer, Call, change_function, empty, find, json, query, revise_version};
use crate::state::{App, LiveFunction};

const KEY_CHARS_MAX: usize = 128;
const VALUE_CHARS_MAX: usize = 256;

pub(super) async fn tag(app: &Arc<App>, call: Call, resource: &str) -> Answer {
    let function = resource_of(app, resource)?;
    let limit = call.json_limit();
    let Tags { tags } = call.json(limit, "TagResource").await?;
    if tags.is_empty() {
        return Err(ApiError::invalid_parameter(
            "An error occurred and the request cannot be processed.",
        ));
    }
    for (key, value) in &tags {
        if key.is_empty() || key.chars().count() > KEY_CHARS_MAX {
            let constraint = "Map keys must satisfy constraint: [Member must have length less than or equal to 128, Member must have length greater than or equal to 1]";
            return Err(ApiError::validation(&[violation(key, "tags", constraint)]));
        }
        if value.chars().count() > VALUE_CHARS_MAX {
            let constraint = "Map values must satisfy constraint: [Member must have length less than or equal to 256]";
            return Err(ApiError::validation(&[violation(
                value, "tags", constraint,
            )]));
        }
    }
    let record = function.record();
    let new = tags.keys().filter(|key| !record.tags.contains_key(*key));
    if record.tags.len() + new.count() > TAGS_MAX {
        return Err(ApiError::too_many_tags());
    }
    change_function(app, &function, |record| record.tags.extend(tags)).await?;
    revise_version(app, &function.latest).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) async fn untag(app: &Arc<App>, call: Call, resource: &str) -> Answer {
    let function = resource_of(app, resource)?;
    let pairs = query(call.uri.query().unwrap_or_default());
    let keys: Vec<String> = pairs
        .filter(|(name, _)| name == "tagKeys")
        .map(|(_, key)| key)
        .collect();
    if keys.is_empty() {
        return Err(ApiError::validation(&[super::validate::null("tagKeys")]));
    }
    change_function(app, &function, |record| {
        record.tags.retain(|key, _| !keys.contains(key));
    })
    .await?;
    revise_version(app, &function.latest).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) fn list(app: &Arc<App>, resource: &str) -> Answer {
    let tags = resource_of(app, resource)?.record().tags.clone();
    json(StatusCode::OK, &Tags { tags })
}

/// What a tagged resource must be, in the model's words.
const PATTERN: &str = r"Member must satisfy regular expression pattern: arn:(aws[a-zA-Z-]*):lambda:(eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1}:\d{12}:(function:[a-zA-Z0-9-_]+(:(\$LATEST|[a-zA-Z0-9-_]+))?|layer:([a-zA-Z0-9-_]+)|code-signing-config:csc-[a-z0-9]{17}|event-source-mapping:[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}|capacity-provider:[a-zA-Z0-9-_]+)";

fn resource_of(app: &App, resource: &str) -> Result<Arc<LiveFunction>, ApiError> {
    let malformed = || ApiError::validation(&[violation(resource, "resource", PATTERN)]);
    let parts: Vec<&str> = resource.split(':').collect();
    let kind = match parts.as_slice() {
        ["arn", _, "lambda", _, _, "function", _]
        | ["arn", _, "lambda", _, _, "function", _, _] => {
            let reference = FunctionRef::parse(resource, None).map_err(|_| malformed())?;
            if reference.qualifier.is_some() {
                return Err(ApiError::invalid_parameter(
                    "Tags on function aliases and versions are not supported. Please specify a function ARN.",
                ));
            }
            return Ok(find(app, reference)?.function);
        }
        // There are none of these here.
        ["arn", _, "lambda", _, _, "event-source-mapping", _] => "Event source mapping",
        ["arn", _, "lambda", _, _, "capacity-provider", _] => "Capacity provider",
        ["arn", _, "lambda", _, _, "code-signing-config", _] => "Code signing config",
        ["arn", _, "lambda", _, _, "layer", _] => "Layer",
        _ => return Err(malformed()),
    };
    Err(ApiError::missing(format!("{kind} not found: {resource}")))
}
