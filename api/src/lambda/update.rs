//! UpdateFunctionCode and UpdateFunctionConfiguration: a new revision is frozen while the old one serves, then swapped in.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{UpdateFunctionCodeRequest, UpdateFunctionConfigurationRequest};

use super::errors::ApiError;
use super::{
    Answer, CODE_BODY_BYTES_MAX, Call, change_error, json, layers, source, validate, view,
};
use crate::code;
use crate::functions::{self, Change, ChangeError, versions};
use crate::record::State;
use crate::state::App;

pub(super) async fn code(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    check_qualifier(found.reference.qualifier.as_deref())?;
    let live = &found.live;
    let caller = call.caller.clone();
    let _upload = app.uploads.acquire().await;
    let request: UpdateFunctionCodeRequest =
        call.json(CODE_BODY_BYTES_MAX, "UpdateFunctionCode").await?;
    validate::check_architectures(request.architectures.as_deref())?;
    let zip = source::zip(app, request.code).await?;
    if request.dry_run == Some(true) {
        let checked = tokio::task::spawn_blocking(move || code::check(&zip)).await;
        checked
            .map_err(|_| ChangeError::Worker)
            .and_then(|checked| checked.map_err(ChangeError::Code))
            .map_err(|error| change_error(app, &error))?;
        return json(StatusCode::OK, &view::unqualified(app, &live.record()));
    }
    let revision_id = request.revision_id.as_deref();
    let refused = |error| change_error(app, &error);
    let record = functions::update(
        app,
        &live.name,
        revision_id,
        Change::Code(zip),
        caller.as_ref(),
    )
    .await
    .map_err(refused)?;
    let view = if request.publish == Some(true) {
        let version = versions::publish_at_once(app, &live.name, State::Pending, caller.as_ref())
            .await
            .map_err(refused)?;
        view::version(app, &version)
    } else {
        view::unqualified(app, &record)
    };
    json(StatusCode::OK, &view)
}

pub(super) async fn configuration(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    check_qualifier(found.reference.qualifier.as_deref())?;
    let live = &found.live;
    let limit = call.json_limit();
    let request: UpdateFunctionConfigurationRequest =
        call.json(limit, "UpdateFunctionConfiguration").await?;
    let current = live.record().target.settings.clone();
    let mut settings = validate::update(current, request.role.as_deref(), &request.settings)?;
    layers::attach(app, &mut settings, request.settings.layers.as_deref())?;
    let change = Change::Settings(Box::new(settings));
    let record = functions::update(
        app,
        &live.name,
        request.revision_id.as_deref(),
        change,
        None,
    )
    .await
    .map_err(|error| change_error(app, &error))?;
    json(StatusCode::OK, &view::unqualified(app, &record))
}

fn check_qualifier(qualifier: Option<&str>) -> Result<(), ApiError> {
    match qualifier {
        None | Some("$LATEST") => Ok(()),
        Some(_) => Err(ApiError::invalid_parameter("Only $LATEST can be updated.")),
    }
}
