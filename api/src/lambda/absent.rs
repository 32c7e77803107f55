//! What deployment tools read of every function, and what is the same for all here: nothing is signed, no queue is polled, and
//! functions run on the runtime that this gateway has.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::json;
use thaw_api_types::lambda::{FunctionCodeSigningRequest, RuntimeManagementRequest};

use super::errors::{ApiError, violation};
use super::{Answer, Call, Found, empty, json as answer, validate};
use crate::state::App;

/// GetFunctionCodeSigningConfig: no function has one.
pub(super) fn code_signing(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    call.function(app, name)?;
    answer(StatusCode::OK, &json!({}))
}

/// GetRuntimeManagementConfig: a function gets the runtime of today when it is frozen.
pub(super) fn runtime_management(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    managed(app, &call.version(app, name)?)
}

/// PutRuntimeManagementConfig: `Auto` is what this gateway does anyway, and all that it can.
pub(super) async fn manage_runtime(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let limit = call.json_limit();
    let operation = "PutRuntimeManagementConfig";
    let request: RuntimeManagementRequest = call.json(limit, operation).await?;
    match request.update_runtime_on.as_deref() {
        Some("Auto") if request.runtime_version_arn.is_none() => managed(app, &found),
        Some("Auto") => Err(ApiError::invalid_parameter(
            "RuntimeVersionArn must not be provided when UpdateRuntimeOn is Auto.",
        )),
        Some("FunctionUpdate" | "Manual") => Err(ApiError::invalid_parameter(
            "UpdateRuntimeOn must be Auto: this gateway has one build of each runtime.",
        )),
        Some(other) => {
            let constraint = "Member must satisfy enum value set: [Auto, Manual, FunctionUpdate]";
            Err(ApiError::validation(&[violation(
                other,
                "updateRuntimeOn",
                constraint,
            )]))
        }
        None => Err(ApiError::validation(&[validate::null("updateRuntimeOn")])),
    }
}

fn managed(app: &App, found: &Found) -> Answer {
    let arn = app.version_arn(&found.function.name, found.live.id);
    answer(
        StatusCode::OK,
        &json!({"UpdateRuntimeOn": "Auto", "FunctionArn": arn}),
    )
}

/// Get, Update and Delete of an EventSourceMapping: there is none.
pub(super) fn mapping() -> Answer {
    Err(ApiError::no_resource())
}

/// Get, Update and Delete of a CodeSigningConfig, and ListFunctionsByCodeSigningConfig: there is none.
pub(super) fn code_signing_config(arn: &str) -> Answer {
    Err(ApiError::missing(format!(
        "The Lambda code signing configuration {arn} can not be found."
    ))
    .untyped())
}

/// PutFunctionCodeSigningConfig: there is none that a function could have.
pub(super) async fn put_code_signing(call: Call) -> Answer {
    let limit = call.json_limit();
    let operation = "PutFunctionCodeSigningConfig";
    let request: FunctionCodeSigningRequest = call.json(limit, operation).await?;
    let Some(arn) = request.code_signing_config_arn else {
        let violation = validate::null("codeSigningConfigArn");
        return Err(ApiError::validation(&[violation]));
    };
    Err(ApiError::no_code_signing_config(&arn))
}

/// DeleteFunctionCodeSigningConfig: a function has none, and then has none.
pub(super) fn delete_code_signing(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    call.function(app, name)?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// A list of what this gateway has none of.
pub(super) fn list(member: &str) -> Answer {
    answer(StatusCode::OK, &json!({member: []}))
}
