//! DeleteFunction.

use std::sync::Arc;

use axum::http::StatusCode;

use super::errors::ApiError;
use super::{Answer, Call, change_error, empty};
use crate::functions;
use crate::state::App;

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let (reference, live) = call.function(app, name)?;
    if reference.qualifier.is_some() {
        return Err(ApiError::invalid_parameter(
            "$LATEST version cannot be deleted without deleting the function.",
        ));
    }
    functions::delete(app, &live.name)
        .await
        .map_err(|error| change_error(app, &error))?;
    Ok(empty(StatusCode::NO_CONTENT))
}
