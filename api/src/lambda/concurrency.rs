//! PutFunctionConcurrency, GetFunctionConcurrency, DeleteFunctionConcurrency: what is reserved for a function.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::Concurrency;

use super::account::{UNRESERVED_MIN, unreserved};
use super::errors::{ApiError, violation};
use super::{Answer, Call, arn, change_function, empty, function_or, json, validate};
use crate::state::{App, LiveFunction};

pub(super) async fn put(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let function = function_or(app, name, |reference| {
        ApiError::not_found(&format!("{}:$LATEST", arn(app, reference)))
    })?;
    let limit = call.json_limit();
    let request: Concurrency = call.json(limit, "PutFunctionConcurrency").await?;
    let Some(wanted) = request.reserved_concurrent_executions else {
        return Err(ApiError::validation(&[validate::null(
            "reservedConcurrentExecutions",
        )]));
    };
    let Ok(reserved) = u32::try_from(wanted) else {
        let constraint = "Member must have value greater than or equal to 0";
        return Err(ApiError::validation(&[violation(
            &wanted.to_string(),
            "reservedConcurrentExecutions",
            constraint,
        )]));
    };
    let record = function.record();
    let provisioned = record.provisioned_except("");
    if u64::from(reserved) < provisioned {
        return Err(ApiError::invalid_parameter(format!(
            "ReservedConcurrentExecutions {reserved} should not be lower than function's total provisioned concurrency [{provisioned}]."
        )));
    }
    let own = record.reserved_concurrency.unwrap_or_default();
    let left = unreserved(app) + u64::from(own);
    if left < u64::from(reserved) + UNRESERVED_MIN {
        return Err(ApiError::invalid_parameter(format!(
            "Specified ReservedConcurrentExecutions for function decreases account's UnreservedConcurrentExecution below its minimum value of [{UNRESERVED_MIN}]."
        ))
        .untyped());
    }
    keep(app, &function, Some(reserved)).await?;
    json(StatusCode::OK, &view(Some(reserved)))
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let function = call.function(app, name)?;
    json(
        StatusCode::OK,
        &view(function.record().reserved_concurrency),
    )
}

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let function = call.function(app, name)?;
    keep(app, &function, None).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

async fn keep(
    app: &App,
    function: &Arc<LiveFunction>,
    reserved: Option<u32>,
) -> Result<(), ApiError> {
    change_function(app, function, |record| {
        record.reserved_concurrency = reserved
    })
    .await
}

fn view(reserved: Option<u32>) -> Concurrency {
    Concurrency {
        reserved_concurrent_executions: reserved.map(i64::from),
    }
}
