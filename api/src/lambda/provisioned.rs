//! Put, Get, Delete and List of ProvisionedConcurrencyConfig: sandboxes of an alias or a version that are kept ready.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{
    ListProvisionedConcurrencyConfigsResponse, ProvisionedConcurrency,
    ProvisionedConcurrencyConfig, ProvisionedStatus,
};

use super::account::{UNRESERVED_MIN, unreserved};
use super::errors::{ApiError, violation};
use super::names::FunctionRef;
use super::paging::Page;
use super::{Answer, Call, Found, change_function, empty, find_alias_or_version, json, validate};
use crate::clock;
use crate::record::{Function, Provisioned, VersionId};
use crate::state::{App, LiveFunction, PoolSlot};

pub(super) async fn put(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let reference = call.reference(name)?;
    let limit = call.json_limit();
    let operation = "PutProvisionedConcurrencyConfig";
    let request: ProvisionedConcurrency = call.json(limit, operation).await?;
    let requested = requested(request)?;
    if reference.qualifier.as_deref() == Some("$LATEST") {
        return Err(unpublished());
    }
    let found = find_alias_or_version(app, reference)?;
    let qualifier = qualifier(&found.reference)?.to_owned();
    let record = found.function.record();
    check(app, &record, &qualifier, requested)?;
    let config = Provisioned {
        requested,
        modified_unix_ms: clock::unix_ms(),
    };
    let kept = qualifier.clone();
    change_function(app, &found.function, move |record| {
        record.provisioned.insert(kept, config);
    })
    .await?;
    let body = ProvisionedConcurrencyConfig {
        available_provisioned_concurrent_executions: 0,
        allocated_provisioned_concurrent_executions: 0,
        status: ProvisionedStatus::InProgress,
        status_reason: None,
        ..view(&found.function, &qualifier, config)
    };
    json(StatusCode::ACCEPTED, &body)
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = find_published(app, call, name)?;
    let (qualifier, config) = read(&found)?;
    let body = view(&found.function, qualifier, config);
    json(StatusCode::OK, &body)
}

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = find_published(app, &call, name)?;
    let qualifier = qualifier(&found.reference)?.to_owned();
    change_function(app, &found.function, move |record| {
        record.provisioned.remove(&qualifier);
    })
    .await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) fn list(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let function = call.function(app, name)?;
    let record = function.record();
    let entries = record.provisioned.iter().map(|(qualifier, config)| {
        let entry = ProvisionedConcurrencyConfig {
            function_arn: Some(format!("{}:{qualifier}", app.arn(&function.name))),
            ..view(&function, qualifier, *config)
        };
        (qualifier.clone(), entry)
    });
    let (provisioned_concurrency_configs, next_marker) = Page::of(call)?.cut(entries);
    let body = ListProvisionedConcurrencyConfigsResponse {
        provisioned_concurrency_configs,
        next_marker,
    };
    json(StatusCode::OK, &body)
}

fn find_published(app: &App, call: &Call, name: &str) -> Result<Found, ApiError> {
    let reference = call.reference(name)?;
    qualifier(&reference)?;
    find_alias_or_version(app, reference)
}

fn unpublished() -> ApiError {
    ApiError::invalid_parameter(
        "Provisioned Concurrency Configs cannot be applied to unpublished function versions.",
    )
}

/// The alias or the version's number that a request is about.
fn qualifier(reference: &FunctionRef) -> Result<&str, ApiError> {
    match reference.qualifier.as_deref() {
        Some("$LATEST") => Err(ApiError::invalid_parameter(
            "The function resource provided must be an alias or a published version.",
        )),
        Some(qualifier) => Ok(qualifier),
        None => Err(ApiError::validation(&[validate::null("qualifier")])),
    }
}

fn read(found: &Found) -> Result<(&str, Provisioned), ApiError> {
    let qualifier = qualifier(&found.reference)?;
    let config = found.function.record().provisioned.get(qualifier).copied();
    let config = config.ok_or_else(|| {
        ApiError::no_provisioned_concurrency(
            "No Provisioned Concurrency Config found for this function",
        )
    })?;
    Ok((qualifier, config))
}

fn requested(request: ProvisionedConcurrency) -> Result<u32, ApiError> {
    let member = "provisionedConcurrentExecutions";
    let Some(wanted) = request.provisioned_concurrent_executions else {
        return Err(ApiError::validation(&[validate::null(member)]));
    };
    match u32::try_from(wanted) {
        Ok(requested) if requested > 0 => Ok(requested),
        _ => {
            let constraint = "Member must have value greater than or equal to 1";
            let text = wanted.to_string();
            Err(ApiError::validation(&[violation(
                &text, member, constraint,
            )]))
        }
    }
}

/// Whether so many may be kept ready.
fn check(app: &App, record: &Function, qualifier: &str, requested: u32) -> Result<(), ApiError> {
    // An alias and a version that it names would both claim the version's sandboxes as their own.
    let is_alias = record.aliases.contains_key(qualifier);
    let overlaps = |other: &String| match (record.aliases.get(qualifier), record.aliases.get(other))
    {
        (Some(alias), None) => other.parse().is_ok_and(|version| alias.names(version)),
        (None, Some(alias)) => qualifier.parse().is_ok_and(|version| alias.names(version)),
        _ => false,
    };
    if record.provisioned.keys().any(overlaps) {
        return Err(ApiError::conflict(match is_alias {
            true => {
                "Alias can't be used for Provisioned Concurrency configuration on an already Provisioned version"
            }
            false => "Version is pointed by a Provisioned Concurrency alias",
        }));
    }
    if record
        .aliases
        .get(qualifier)
        .is_some_and(|alias| alias.names(VersionId::Latest))
    {
        return Err(unpublished());
    }
    let others = record.provisioned_except(qualifier);
    let wanted = u64::from(requested) + others;
    match record.reserved_concurrency {
        Some(reserved) if wanted > u64::from(reserved) => Err(ApiError::invalid_parameter(
            "Requested Provisioned Concurrency should not be greater than the reservedConcurrentExecution for function",
        )),
        None if wanted > unreserved(app) => Err(ApiError::invalid_parameter(format!(
            "Specified ConcurrentExecutions for function is greater than account's unreserved concurrency [{}].",
            unreserved(app)
        ))
        .untyped()),
        None if wanted + UNRESERVED_MIN > unreserved(app) => {
            Err(ApiError::invalid_parameter(format!(
                "Specified ConcurrentExecutions for function decreases account's UnreservedConcurrentExecution below its minimum value of [{UNRESERVED_MIN}]."
            ))
            .untyped())
        }
        _ => Ok(()),
    }
}

/// How far the machine is with it: what runs, is ready, or is about to be again, is allocated.
fn view(
    function: &LiveFunction,
    qualifier: &str,
    config: Provisioned,
) -> ProvisionedConcurrencyConfig {
    let record = function.record();
    let (mut allocated, mut available) = (0, 0);
    let (mut failure, mut is_held_back) = (None, false);
    for live in function.all() {
        let share = record.provisioned_by(qualifier, live.id);
        match &*live.pool.borrow() {
            PoolSlot::Open(pool) if share > 0 => {
                let stats = pool.stats();
                let there = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).min(share);
                allocated += there(stats.ready + stats.rewinding + stats.running);
                available += there(stats.ready + stats.rewinding);
                is_held_back |= stats.is_held_back;
            }
            PoolSlot::Failed(why) if share > 0 => failure = Some(why.clone()),
            _ => {}
        }
    }
    if is_held_back && allocated < config.requested {
        failure = failure.or_else(|| Some(held_back(allocated, config.requested)));
    }
    let status = match failure {
        Some(_) => ProvisionedStatus::Failed,
        None if allocated >= config.requested => ProvisionedStatus::Ready,
        None => ProvisionedStatus::InProgress,
    };
    ProvisionedConcurrencyConfig {
        function_arn: None,
        requested_provisioned_concurrent_executions: config.requested,
        available_provisioned_concurrent_executions: available,
        allocated_provisioned_concurrent_executions: allocated,
        status,
        status_reason: failure,
        last_modified: clock::last_modified(config.modified_unix_ms),
    }
}

/// It goes on by itself when there is room; until then somebody should know what to do.
fn held_back(allocated: u32, requested: u32) -> String {
    format!(
        "This machine has memory for {allocated} of {requested} sandboxes at the moment: ask for fewer, remove other functions, or give Thaw more (`thaw up --memory`)."
    )
}
