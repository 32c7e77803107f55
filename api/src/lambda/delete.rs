//! DeleteFunction: the function with all its versions, or one published version.

use std::sync::Arc;

use axum::http::StatusCode;

use super::errors::ApiError;
use super::{Answer, Call, change_error, empty, find};
use crate::functions::{self, ChangeError, versions};
use crate::state::App;

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let mut reference = call.reference(name)?;
    let alias = reference.names_alias();
    let version = match reference.qualifier.take().as_deref() {
        None => None,
        Some("$LATEST") => {
            return Err(ApiError::invalid_parameter(
                "$LATEST version cannot be deleted without deleting the function.",
            ));
        }
        Some(_) if alias => {
            return Err(ApiError::invalid_parameter(
                "Deletion of aliases is not currently supported.",
            ));
        }
        Some(number) => Some(number.parse()),
    };
    let name = find(app, reference)?.function.name.clone();
    let deleted = match version {
        None => functions::delete(app, &name).await,
        // What is no version is not there, which is what the client wants.
        Some(Err(_)) => Ok(()),
        Some(Ok(id)) => match versions::delete(app, &name, id).await {
            Err(ChangeError::NoVersion(..)) => Ok(()),
            deleted => deleted,
        },
    };
    deleted.map_err(|error| change_error(app, &error))?;
    Ok(empty(StatusCode::NO_CONTENT))
}
