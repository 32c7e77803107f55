//! Put, Update, Get, Delete and List of FunctionEventInvokeConfig: how asynchronous invocations are treated.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{
    Destination, DestinationConfig, EventInvokeConfig, EventInvokeConfigRequest,
    ListEventInvokeConfigsResponse,
};

use super::errors::{ApiError, violation};
use super::paging::Page;
use super::{Answer, Call, Found, change_function, empty, json};
use crate::clock;
use crate::events::{EventConfig, destination};
use crate::record::Function;
use crate::state::App;

/// Whether members that a request leaves out keep their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Members {
    /// Put: they go.
    Replaced,
    /// Update: they stay.
    Merged,
}

pub(super) async fn keep(app: &Arc<App>, call: Call, name: &str, members: Members) -> Answer {
    let found = call.version(app, name)?;
    let current = match members {
        Members::Replaced => EventConfig::default(),
        Members::Merged => read(app, &found)?,
    };
    let limit = call.json_limit();
    let request: EventInvokeConfigRequest =
        call.json(limit, "PutFunctionEventInvokeConfig").await?;
    let config = merge(app, current, request)?;
    let kept = config.clone();
    change(app, &found, move |record, qualifier| {
        record.event_configs.insert(qualifier, kept);
    })
    .await?;
    json(
        StatusCode::OK,
        &view(app, &found.function.name, qualifier(&found), &config),
    )
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let config = read(app, &found)?;
    json(
        StatusCode::OK,
        &view(app, &found.function.name, qualifier(&found), &config),
    )
}

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    read(app, &found)?;
    change(app, &found, |record, qualifier| {
        record.event_configs.remove(&qualifier);
    })
    .await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) fn list(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let function = call.function(app, name)?;
    let record = function.record();
    let entries = record.event_configs.iter().map(|(qualifier, config)| {
        let view = view(app, &function.name, qualifier, config);
        (qualifier.clone(), view)
    });
    let (function_event_invoke_configs, next_marker) = Page::of(call)?.cut(entries);
    let body = ListEventInvokeConfigsResponse {
        function_event_invoke_configs,
        next_marker,
    };
    json(StatusCode::OK, &body)
}

fn qualifier(found: &Found) -> &str {
    found.reference.qualifier.as_deref().unwrap_or("$LATEST")
}

fn read(app: &App, found: &Found) -> Result<EventConfig, ApiError> {
    let record = found.function.record();
    let qualifier = qualifier(found);
    record.event_configs.get(qualifier).cloned().ok_or_else(|| {
        ApiError::missing(format!(
            "The function {}:{qualifier} doesn't have an EventInvokeConfig",
            app.arn(&found.function.name)
        ))
    })
}

async fn change(
    app: &App,
    found: &Found,
    work: impl FnOnce(&mut Function, String),
) -> Result<(), ApiError> {
    let qualifier = qualifier(found).to_owned();
    change_function(app, &found.function, |record| work(record, qualifier)).await
}

fn merge(
    app: &App,
    current: EventConfig,
    request: EventInvokeConfigRequest,
) -> Result<EventConfig, ApiError> {
    let number = |given: Option<i64>, member: &str, range: std::ops::RangeInclusive<u32>| {
        let Some(given) = given else { return Ok(None) };
        match u32::try_from(given) {
            Ok(value) if range.contains(&value) => Ok(Some(value)),
            _ => {
                let constraint = match given < i64::from(*range.start()) {
                    true => format!("greater than or equal to {}", range.start()),
                    false => format!("less than or equal to {}", range.end()),
                };
                let constraint = format!("Member must have value {constraint}");
                let text = given.to_string();
                Err(ApiError::validation(&[violation(
                    &text,
                    member,
                    &constraint,
                )]))
            }
        }
    };
    let retries = number(
        request.maximum_retry_attempts,
        "maximumRetryAttempts",
        0..=2,
    )?;
    let age = number(
        request.maximum_event_age_in_seconds,
        "maximumEventAgeInSeconds",
        60..=21_600,
    )?;
    let named = |destination: Destination| {
        let text = destination.destination.filter(|text| !text.is_empty());
        if let Some(text) = &text {
            destination::parse(app, text).map_err(|why| {
                ApiError::invalid_parameter(format!(
                    "The provided destination config is invalid: {why}."
                ))
            })?;
        }
        Ok::<_, ApiError>(text)
    };
    let (on_success, on_failure) = match request.destination_config {
        Some(config) => (named(config.on_success)?, named(config.on_failure)?),
        None => (current.on_success, current.on_failure),
    };
    Ok(EventConfig {
        modified_unix_ms: clock::unix_ms(),
        retries_max: retries.or(current.retries_max),
        age_max_seconds: age.or(current.age_max_seconds),
        on_success,
        on_failure,
    })
}

fn view(app: &App, name: &str, qualifier: &str, config: &EventConfig) -> EventInvokeConfig {
    let destination = |text: &Option<String>| Destination {
        destination: text.clone(),
    };
    EventInvokeConfig {
        last_modified: clock::seconds(config.modified_unix_ms),
        function_arn: format!("{}:{qualifier}", app.arn(name)),
        maximum_retry_attempts: config.retries_max,
        maximum_event_age_in_seconds: config.age_max_seconds,
        destination_config: DestinationConfig {
            on_success: destination(&config.on_success),
            on_failure: destination(&config.on_failure),
        },
    }
}
