//! CreateFunction.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::CreateFunctionRequest;

use super::errors::ApiError;
use super::names::FunctionRef;
use super::{
    Answer, CODE_BODY_BYTES_MAX, Call, change_error, check_region, is_elsewhere, json, layers,
    source, validate, view,
};
use crate::functions::{self, storage, versions};
use crate::state::App;

pub(super) async fn create(app: &Arc<App>, call: Call) -> Answer {
    let _upload = app.uploads.acquire().await;
    let caller = call.caller.clone();
    let mut request: CreateFunctionRequest =
        call.json(CODE_BODY_BYTES_MAX, "CreateFunction").await?;
    let name = request.function_name.take().unwrap_or_default();
    let reference = FunctionRef::parse_new(&name)?;
    check_region(app, &reference)?;
    if is_elsewhere(app, &reference) {
        return Err(ApiError::access_denied());
    }
    let mut settings = validate::create(&request)?;
    layers::attach(app, &mut settings, request.settings.layers.as_deref())?;
    if reference.qualifier.is_some() {
        return Err(ApiError::invalid_parameter(format!(
            "{name} does not name a function that can be created here."
        )));
    }
    if let Some(arn) = request
        .code_signing_config_arn
        .filter(|arn| !arn.is_empty())
    {
        return Err(ApiError::no_code_signing_config(&arn));
    }
    let zip = source::zip(app, request.code.unwrap_or_default()).await?;
    let tags = request.tags.unwrap_or_default();
    let refused = |error| change_error(app, &error);
    if request.publish == Some(true) {
        // $LATEST and the version count, each as on AWS: without room for both, none is made.
        let both = (zip.len() as u64).saturating_mul(2);
        let room = storage::reserve(app, caller.as_ref(), both, None);
        room.map_err(|exceeded| refused(exceeded.into()))?;
    }
    let function = functions::create(app, &reference.name, settings, tags, zip, caller.as_ref())
        .await
        .map_err(refused)?;
    let mut view = view::unqualified(app, &function.latest.record());
    if request.publish == Some(true) {
        let state = versions::at_once(&function.latest.record().target.settings);
        let version = versions::publish_at_once(app, &function.name, state, caller.as_ref())
            .await
            .map_err(refused)?;
        // As on AWS: the function that was made, under the version's number.
        view.version = version.id.to_string();
    }
    json(StatusCode::CREATED, &view)
}
