//! CreateFunction.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::CreateFunctionRequest;

use super::errors::ApiError;
use super::names::FunctionRef;
use super::view::{Detail, configuration};
use super::{Answer, CODE_BODY_BYTES_MAX, Call, change_error, json, validate};
use crate::functions;
use crate::state::App;

pub(super) async fn create(app: &Arc<App>, call: Call) -> Answer {
    let _upload = app.uploads.acquire().await;
    let mut request: CreateFunctionRequest =
        call.json(CODE_BODY_BYTES_MAX, "CreateFunction").await?;
    let name = request.function_name.take().unwrap_or_default();
    let reference = FunctionRef::parse(&name, None)?;
    let settings = validate::create(&request)?;
    if request.publish == Some(true) {
        return Err(ApiError::invalid_parameter(
            "Versions are not supported by this gateway: create the function without Publish.",
        ));
    }
    let elsewhere = reference
        .region
        .as_ref()
        .is_some_and(|region| *region != app.region)
        || reference
            .account
            .as_ref()
            .is_some_and(|account| *account != app.account_id);
    if elsewhere || reference.qualifier.is_some() {
        return Err(ApiError::invalid_parameter(format!(
            "{name} does not name a function that can be created here."
        )));
    }
    let zip = validate::zip(request.code.unwrap_or_default())?;
    let tags = request.tags.unwrap_or_default();
    let record = functions::create(app, &reference.name, settings, tags, zip)
        .await
        .map_err(|error| change_error(app, &error))?;
    let view = configuration(&record, &app.arn(&record.name), &app.region, Detail::Full);
    json(StatusCode::CREATED, &view)
}
