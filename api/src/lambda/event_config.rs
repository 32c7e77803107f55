//! Put, Update, Get, Delete and List of FunctionEventInvokeConfig: how asynchronous invocations are treated.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{
    Destination, DestinationConfig, EventInvokeConfig, EventInvokeConfigRequest,
    ListEventInvokeConfigsResponse,
};

use super::errors::{ApiError, violation};
use super::names::FunctionRef;
use super::paging::Page;
use super::{Answer, Call, Found, change_function, empty, find_or, function_or, json};
use crate::auth::admission::Caller;
use crate::clock;
use crate::events::destination::Target;
use crate::events::{EventConfig, destination};
use crate::record::Function;
use crate::state::App;

/// What a destination must be, in the model's words.
const PATTERN: &str = r"Member must satisfy regular expression pattern: $|kafka://([^.]([a-zA-Z0-9\-_.]{0,248}))|arn:(aws[a-zA-Z0-9-]*):([a-zA-Z0-9\-])+:((eusc-)?[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1})?:(\d{12})?:(.*)";

/// Whether members that a request leaves out keep their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Members {
    /// Put: they go.
    Replaced,
    /// Update: they stay.
    Merged,
}

pub(super) async fn keep(app: &Arc<App>, call: Call, name: &str, members: Members) -> Answer {
    let reference = call.reference(name)?;
    let caller = call.caller.clone();
    let limit = call.json_limit();
    let request: EventInvokeConfigRequest =
        call.json(limit, "PutFunctionEventInvokeConfig").await?;
    if request == EventInvokeConfigRequest::default() {
        return Err(ApiError::invalid_parameter(
            "You must specify at least one of error handling or destination setting.",
        ));
    }
    let found = find_or(app, reference, |_| no_function())?;
    let current = match members {
        Members::Replaced => EventConfig::default(),
        Members::Merged => read(app, &found)?,
    };
    let names_destinations = request.destination_config.is_some();
    let config = merge(app, &found, current, request)?;
    if names_destinations {
        may_send(app, caller.as_ref(), &config)?;
    }
    let kept = config.clone();
    change(app, &found, move |record, qualifier| {
        record.event_configs.insert(qualifier, kept);
    })
    .await?;
    json(
        StatusCode::OK,
        &view(
            app,
            &found.function.name,
            qualifier(&found.reference),
            &config,
        ),
    )
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = find_configured(app, call, name)?;
    let config = read(app, &found)?;
    json(
        StatusCode::OK,
        &view(
            app,
            &found.function.name,
            qualifier(&found.reference),
            &config,
        ),
    )
}

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = find_configured(app, &call, name)?;
    read(app, &found)?;
    change(app, &found, |record, qualifier| {
        record.event_configs.remove(&qualifier);
    })
    .await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) fn list(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let function = function_or(app, name, |_| no_function())?;
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

fn no_function() -> ApiError {
    ApiError::missing("The function doesn't exist.")
}

fn no_config(app: &App, reference: &FunctionRef) -> ApiError {
    ApiError::missing(format!(
        "The function {}:{} doesn't have an EventInvokeConfig",
        app.arn(&reference.name),
        qualifier(reference)
    ))
}

/// What is not there has no configuration either.
fn find_configured(app: &App, call: &Call, name: &str) -> Result<Found, ApiError> {
    find_or(app, call.reference(name)?, |reference| {
        no_config(app, reference)
    })
}

fn qualifier(reference: &FunctionRef) -> &str {
    reference.qualifier.as_deref().unwrap_or("$LATEST")
}

fn read(app: &App, found: &Found) -> Result<EventConfig, ApiError> {
    let record = found.function.record();
    let config = record.event_configs.get(qualifier(&found.reference));
    config
        .cloned()
        .ok_or_else(|| no_config(app, &found.reference))
}

async fn change(
    app: &App,
    found: &Found,
    work: impl FnOnce(&mut Function, String),
) -> Result<(), ApiError> {
    let qualifier = qualifier(&found.reference).to_owned();
    change_function(app, &found.function, |record| work(record, qualifier)).await
}

fn merge(
    app: &App,
    found: &Found,
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
    let (on_success, on_failure) = match request.destination_config {
        Some(config) => destinations(app, found, config)?,
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

/// Services that AWS could send records to and this gateway cannot.
const SERVICES: [&str; 4] = [":sqs:", ":sns:", ":events:", ":s3:"];

/// What gets records of successes and of failures.
fn destinations(
    app: &App,
    found: &Found,
    config: DestinationConfig,
) -> Result<(Option<String>, Option<String>), ApiError> {
    let given = |destination: Destination| destination.destination.filter(|text| !text.is_empty());
    let (on_success, on_failure) = (given(config.on_success), given(config.on_failure));
    let sides = [("onSuccess", &on_success), ("onFailure", &on_failure)];
    for (side, text) in sides {
        if let Some(text) = text.as_ref().filter(|text| !is_destination(text)) {
            let member = format!("destinationConfig.{side}.destination");
            return Err(ApiError::validation(&[violation(text, &member, PATTERN)]));
        }
    }
    for text in [&on_success, &on_failure].into_iter().flatten() {
        let named = text
            .starts_with("arn:")
            .then(|| FunctionRef::parse(text, None).ok());
        let refused = match (destination::parse(app, text), named.flatten()) {
            (Ok(_), Some(named)) if named.name == found.function.name => {
                "You can't specify the function as a destination for itself.".to_owned()
            }
            (Ok(_), _) => continue,
            (Err(_), Some(_)) => format!("The destination ARN {text} is invalid."),
            (Err(why), None) if is_here_or_known(text) => {
                format!("The provided destination config is invalid: {why}.")
            }
            (Err(_), None) => {
                let shown = |side: &str, text: &Option<String>| match text {
                    Some(text) => format!("{side}(destination={text})"),
                    None => "null".to_owned(),
                };
                format!(
                    "The provided destination config DestinationConfig(onSuccess={}, onFailure={}) is invalid.",
                    shown("OnSuccess", &on_success),
                    shown("OnFailure", &on_failure)
                )
            }
        };
        return Err(ApiError::invalid_parameter(refused));
    }
    Ok((on_success, on_failure))
}

/// A record is sent with the gateway's own reach, on the word of who says where to: he may only name what he may call himself. URLs may
/// lead to whatever this machine reaches, so they take a key for everything.
fn may_send(app: &App, caller: Option<&Caller>, config: &EventConfig) -> Result<(), ApiError> {
    let Some(caller) = caller else { return Ok(()) };
    let named = [&config.on_success, &config.on_failure];
    for text in named.into_iter().flatten() {
        let may = match destination::parse(app, text) {
            Ok(Target::Function(to)) => app.auth.reaches(caller, Some(&to.name)),
            Ok(Target::Url(_)) => app.auth.reaches(caller, None),
            // Nothing is sent there.
            Err(_) => true,
        };
        if !may {
            return Err(ApiError::invalid_parameter(format!(
                "This key may not have records sent to {text}: to functions that it is for, and to URLs only if it is for all functions."
            )));
        }
    }
    Ok(())
}

/// Whether this gateway has more to say of it than that it is wrong.
fn is_here_or_known(text: &str) -> bool {
    !text.starts_with("arn:") || SERVICES.iter().any(|service| text.contains(service))
}

/// An ARN, or a URL, which is this gateway's own kind of destination.
fn is_destination(text: &str) -> bool {
    let service = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match text.split(':').collect::<Vec<_>>().as_slice() {
        ["http" | "https" | "kafka", rest, ..] => rest.starts_with("//"),
        ["arn", partition, name, _, _, _, ..] => partition.starts_with("aws") && service(name),
        _ => false,
    }
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
