//! PublishVersion, ListVersionsByFunction.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{ListVersionsResponse, PublishVersionRequest};

use super::paging::Page;
use super::view::{self, Detail};
use super::{Answer, Call, change_error, json, validate};
use crate::functions::versions::{self, Wanted};
use crate::state::App;

pub(super) async fn publish(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let function = call.function(app, name)?;
    let (limit, caller) = (call.json_limit(), call.caller.clone());
    let request: PublishVersionRequest = call.json_or_nothing(limit, "PublishVersion").await?;
    validate::check_description(request.description.as_deref())?;
    let wanted = Wanted {
        code_sha256: request.code_sha256.filter(|digest| !digest.is_empty()),
        description: request.description.filter(|text| !text.is_empty()),
        revision_id: request.revision_id,
        caller,
    };
    let version = versions::publish(app, &function.name, wanted)
        .await
        .map_err(|error| change_error(app, &error))?;
    json(StatusCode::CREATED, &view::version(app, &version))
}

pub(super) fn list(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let function = call.function(app, name)?;
    let all = function.all();
    let entries = all.iter().map(|live| {
        let version = live.record();
        let arn = app.version_arn(&version.name, version.id);
        let view = view::configuration(&version, &arn, &app.region, Detail::ListItem);
        (view::key(&version), view)
    });
    let (versions, next_marker) = Page::of(call)?.cut(entries);
    let body = ListVersionsResponse {
        versions,
        next_marker,
    };
    json(StatusCode::OK, &body)
}
