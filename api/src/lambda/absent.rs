//! What deployment tools read of every function, and what is the same for all here: nothing is signed, no queue is polled, and
//! functions run on the runtime that this gateway has.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::json;

use super::{Answer, Call, json as answer};
use crate::state::App;

/// GetFunctionCodeSigningConfig: no function has one.
pub(super) fn code_signing(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    call.function(app, name)?;
    answer(StatusCode::OK, &json!({}))
}

/// GetRuntimeManagementConfig: a function gets the runtime of today when it is frozen.
pub(super) fn runtime_management(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let arn = app.version_arn(&found.function.name, found.live.id);
    answer(
        StatusCode::OK,
        &json!({"UpdateRuntimeOn": "Auto", "FunctionArn": arn}),
    )
}

/// A list of what this gateway has none of.
pub(super) fn list(member: &str) -> Answer {
    answer(StatusCode::OK, &json!({member: []}))
}
