//! GetFunction, GetFunctionConfiguration, ListFunctions.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{Concurrency, ListFunctionsResponse};

use super::errors::{ApiError, violation};
use super::paging::Page;
use super::view::{self, Detail};
use super::{Answer, Call, json};
use crate::state::App;

pub(super) fn function(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let version = found.live.record();
    let location = format!(
        "{}/thaw/v1/functions/{}/code?version={}",
        call.base(app),
        version.name,
        version.id
    );
    let view = view::configuration(&version, &found.arn(app), &app.region, Detail::Full);
    let record = found.function.record();
    let mut view = view::function(view, &record.tags, location);
    view.concurrency = record.reserved_concurrency.map(|reserved| Concurrency {
        reserved_concurrent_executions: Some(reserved.into()),
    });
    json(StatusCode::OK, &view)
}

pub(super) fn configuration(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let arn = found.arn(app);
    let view = view::configuration(&found.live.record(), &arn, &app.region, Detail::Full);
    json(StatusCode::OK, &view)
}

pub(super) fn list(app: &Arc<App>, call: &Call) -> Answer {
    let all_versions = match call.query("FunctionVersion").as_deref() {
        None | Some("") => false,
        Some("ALL") => true,
        Some(other) => {
            let constraint = "Member must satisfy enum value set: [ALL]";
            return Err(ApiError::validation(&[violation(
                other,
                "functionVersion",
                constraint,
            )]));
        }
    };
    let functions = app.all();
    let versions = functions.iter().flat_map(|function| match all_versions {
        true => function.all(),
        false => vec![Arc::clone(&function.latest)],
    });
    let entries = versions.map(|live| {
        let version = live.record();
        let arn = match all_versions {
            true => app.version_arn(&version.name, version.id),
            false => app.arn(&version.name),
        };
        let view = view::configuration(&version, &arn, &app.region, Detail::ListItem);
        (view::key(&version), view)
    });
    let (functions, next_marker) = Page::of(call)?.cut(entries);
    let body = ListFunctionsResponse {
        functions,
        next_marker,
    };
    json(StatusCode::OK, &body)
}
