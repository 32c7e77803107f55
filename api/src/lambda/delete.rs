//! DeleteFunction: the function with all its versions, or one published version.

use std::sync::Arc;

use axum::http::StatusCode;

use super::errors::ApiError;
use super::{Answer, Call, change_error, empty};
use crate::functions::{self, versions};
use crate::record::VersionId;
use crate::state::App;

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let name = &found.function.name;
    let deleted = match found.reference.qualifier.as_deref() {
        None => functions::delete(app, name).await,
        Some(qualifier) => match qualifier.parse() {
            Ok(VersionId::Latest) => {
                return Err(ApiError::invalid_parameter(
                    "$LATEST version cannot be deleted without deleting the function.",
                ));
            }
            Ok(id) => versions::delete(app, name, id).await,
            Err(_) => {
                return Err(ApiError::invalid_parameter(
                    "Deletion of aliases is not currently supported.",
                ));
            }
        },
    };
    deleted.map_err(|error| change_error(app, &error))?;
    Ok(empty(StatusCode::NO_CONTENT))
}
