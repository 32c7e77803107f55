//! GetFunction, GetFunctionConfiguration, ListFunctions.

use std::sync::Arc;

use axum::http::{StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use thaw_api_types::lambda::ListFunctionsResponse;

use super::errors::{ApiError, violation};
use super::view::{self, Detail};
use super::{Answer, Call, arn, json};
use crate::state::App;

/// Functions on a page, unless the client wants fewer; Lambda's number.
const PAGE_MAX: usize = 50;

/// Largest `MaxItems`.
const ITEMS_MAX: usize = 10_000;

pub(super) fn function(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let (reference, live) = call.function(app, name)?;
    let record = live.record();
    let host = call
        .headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .map_or_else(|| app.address.to_string(), str::to_owned);
    let location = format!("http://{host}/thaw/v1/functions/{}/code", record.name);
    let view = view::configuration(&record, &arn(app, &reference), &app.region, Detail::Full);
    json(
        StatusCode::OK,
        &view::function(view, &record.tags, location),
    )
}

pub(super) fn configuration(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let (reference, live) = call.function(app, name)?;
    let arn = arn(app, &reference);
    let view = view::configuration(&live.record(), &arn, &app.region, Detail::Full);
    json(StatusCode::OK, &view)
}

pub(super) fn list(app: &Arc<App>, call: &Call) -> Answer {
    let count = match call.query("MaxItems") {
        None => PAGE_MAX,
        Some(text) => match text.parse::<usize>() {
            Ok(count) if (1..=ITEMS_MAX).contains(&count) => count.min(PAGE_MAX),
            _ => {
                let constraint = "Member must have value between 1 and 10000";
                return Err(ApiError::validation(&[violation(
                    &text, "maxItems", constraint,
                )]));
            }
        },
    };
    let after = call.query("Marker").filter(|marker| !marker.is_empty());
    let after = after.map(|marker| read_marker(&marker)).transpose()?;
    let mut functions = Vec::new();
    let mut next_marker = None;
    // Pages go by name, not by number: functions that come and go in between shift nothing.
    for live in app.all() {
        if after.as_ref().is_some_and(|after| live.name <= *after) {
            continue;
        }
        if functions.len() == count {
            next_marker =
                functions
                    .last()
                    .map(|last: &thaw_api_types::lambda::FunctionConfiguration| {
                        URL_SAFE_NO_PAD.encode(&last.function_name)
                    });
            break;
        }
        let record = live.record();
        let arn = app.arn(&record.name);
        functions.push(view::configuration(
            &record,
            &arn,
            &app.region,
            Detail::ListItem,
        ));
    }
    let body = ListFunctionsResponse {
        functions,
        next_marker,
    };
    json(StatusCode::OK, &body)
}

fn read_marker(marker: &str) -> Result<String, ApiError> {
    URL_SAFE_NO_PAD
        .decode(marker)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| ApiError::invalid_parameter("Marker is not one that ListFunctions gave."))
}
