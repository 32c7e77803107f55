//! UpdateFunctionCode and UpdateFunctionConfiguration: a new revision is frozen while the old one serves, then swapped in.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{UpdateFunctionCodeRequest, UpdateFunctionConfigurationRequest};

use super::errors::ApiError;
use super::view::{self, Detail};
use super::{Answer, CODE_BODY_BYTES_MAX, Call, change_error, json, validate};
use crate::code;
use crate::functions::{self, Change, ChangeError};
use crate::record::Function;
use crate::state::App;

pub(super) async fn code(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let (reference, live) = call.function(app, name)?;
    check_qualifier(reference.qualifier.as_deref())?;
    let _upload = app.uploads.acquire().await;
    let request: UpdateFunctionCodeRequest =
        call.json(CODE_BODY_BYTES_MAX, "UpdateFunctionCode").await?;
    validate::check_architectures(request.architectures.as_deref())?;
    if request.publish == Some(true) {
        return Err(ApiError::invalid_parameter(
            "Versions are not supported by this gateway: update the code without Publish.",
        ));
    }
    let zip = validate::zip(request.code)?;
    if request.dry_run == Some(true) {
        let checked = tokio::task::spawn_blocking(move || code::check(&zip)).await;
        checked
            .map_err(|_| ChangeError::Worker)
            .and_then(|checked| checked.map_err(ChangeError::Code))
            .map_err(|error| change_error(app, &error))?;
        return answer(app, &live.record());
    }
    let revision_id = request.revision_id.as_deref();
    let record = functions::update(app, &live.name, revision_id, Change::Code(zip))
        .await
        .map_err(|error| change_error(app, &error))?;
    answer(app, &record)
}

pub(super) async fn configuration(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let (reference, live) = call.function(app, name)?;
    check_qualifier(reference.qualifier.as_deref())?;
    let limit = call.json_limit();
    let request: UpdateFunctionConfigurationRequest =
        call.json(limit, "UpdateFunctionConfiguration").await?;
    let current = live.record().target.settings.clone();
    let settings = validate::update(current, request.role.as_deref(), &request.settings)?;
    let change = Change::Settings(Box::new(settings));
    let record = functions::update(app, &live.name, request.revision_id.as_deref(), change)
        .await
        .map_err(|error| change_error(app, &error))?;
    answer(app, &record)
}

fn check_qualifier(qualifier: Option<&str>) -> Result<(), ApiError> {
    match qualifier {
        None | Some("$LATEST") => Ok(()),
        Some(_) => Err(ApiError::invalid_parameter("Only $LATEST can be updated.")),
    }
}

fn answer(app: &App, record: &Function) -> Answer {
    let arn = app.arn(&record.name);
    json(
        StatusCode::OK,
        &view::configuration(record, &arn, &app.region, Detail::Full),
    )
}
