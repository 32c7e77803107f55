//! Create, Get, Update, Delete and List of FunctionUrlConfig.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{
    Cors, FunctionUrlConfig, FunctionUrlRequest, ListFunctionUrlConfigsResponse,
};

use super::errors::{ApiError, violation};
use super::paging::Page;
use super::{Answer, Call, Found, change_function, empty, find_or, function_or, json, validate};
use crate::clock;
use crate::function_url;
use crate::record::{Function, UrlAuth, UrlConfig};
use crate::state::App;

/// Most seconds of `MaxAge`.
const MAX_AGE_SECONDS_MAX: u32 = 86_400;
/// Most entries of a list.
const CORS_ENTRIES_MAX: usize = 100;

pub(super) async fn create(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = find(app, &call, name, no_function)?;
    let base = call.base(app);
    let limit = call.json_limit();
    let request: FunctionUrlRequest = call.json(limit, "CreateFunctionUrlConfig").await?;
    let Some(auth) = &request.auth_type else {
        return Err(ApiError::validation(&[validate::null("authType")]));
    };
    let now = clock::unix_ms();
    let config = merge(
        UrlConfig {
            id: function_url::id(&function_url::target(
                &found.function.name,
                found.reference.qualifier.as_deref(),
            )),
            auth: read_auth(auth)?,
            cors: None,
            streams: false,
            created_unix_ms: now,
            modified_unix_ms: now,
        },
        request,
    )?;
    let kept = config.clone();
    let is_new = change(app, &found, move |record, qualifier| {
        let is_new = !record.urls.contains_key(&qualifier);
        if is_new {
            record.urls.insert(qualifier, kept);
        }
        is_new
    });
    if !is_new.await? {
        return Err(ApiError::conflict(format!(
            "Failed to create function url config for [functionArn = {}]. Error message:  FunctionUrlConfig exists for this Lambda function",
            found.arn(app)
        )));
    }
    json(StatusCode::CREATED, &view(app, &base, &found, &config))
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = find(app, call, name, ApiError::no_resource)?;
    let config = read(&found)?;
    json(StatusCode::OK, &view(app, &call.base(app), &found, &config))
}

pub(super) async fn update(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = find(app, &call, name, no_function)?;
    let base = call.base(app);
    let current = read(&found)?;
    let limit = call.json_limit();
    let request: FunctionUrlRequest = call.json(limit, "UpdateFunctionUrlConfig").await?;
    let auth = match &request.auth_type {
        Some(auth) => read_auth(auth)?,
        None => current.auth,
    };
    let changed = UrlConfig {
        auth,
        modified_unix_ms: clock::unix_ms(),
        ..current
    };
    let config = merge(changed, request)?;
    let kept = config.clone();
    change(app, &found, move |record, qualifier| {
        record.urls.insert(qualifier, kept);
    })
    .await?;
    json(StatusCode::OK, &view(app, &base, &found, &config))
}

pub(super) async fn delete(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = find(app, &call, name, ApiError::no_resource)?;
    read(&found)?;
    change(app, &found, |record, qualifier| {
        record.urls.remove(&qualifier);
    })
    .await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

pub(super) fn list(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let function = function_or(app, name, |_| no_function())?;
    let base = call.base(app);
    let record = function.record();
    let entries = record.urls.iter().map(|(qualifier, config)| {
        let named = Some(qualifier.as_str()).filter(|qualifier| *qualifier != "$LATEST");
        let view = view_of(app, &base, &function.name, named, config);
        (qualifier.clone(), view)
    });
    let (function_url_configs, next_marker) = Page::of(call)?.cut(entries);
    let body = ListFunctionUrlConfigsResponse {
        function_url_configs,
        next_marker,
    };
    json(StatusCode::OK, &body)
}

fn no_function() -> ApiError {
    ApiError::missing("Function does not exist")
}

/// The function or the alias; versions have no URLs.
fn find(app: &App, call: &Call, name: &str, missing: fn() -> ApiError) -> Result<Found, ApiError> {
    let mut reference = call.reference(name)?;
    // What stands in the name may be $LATEST, which is what a function's own URL calls.
    let is_latest = reference.qualifier.as_deref() == Some("$LATEST");
    if is_latest && call.query("Qualifier").is_none_or(|text| text.is_empty()) {
        reference.qualifier = None;
    }
    if let Some(text) = &reference.qualifier
        && !reference.names_alias()
    {
        return Err(ApiError::validation(&[violation(
            text,
            "qualifier",
            r"Member must satisfy regular expression pattern: ((?!^\d+$)^[0-9a-zA-Z-_]+$)",
        )]));
    }
    find_or(app, reference, |_| missing())
}

fn read(found: &Found) -> Result<UrlConfig, ApiError> {
    let record = found.function.record();
    let qualifier = found.reference.qualifier.as_deref().unwrap_or("$LATEST");
    let config = record.urls.get(qualifier).cloned();
    config.ok_or_else(ApiError::no_resource)
}

async fn change<T>(
    app: &App,
    found: &Found,
    work: impl FnOnce(&mut Function, String) -> T,
) -> Result<T, ApiError> {
    let qualifier = found.reference.qualifier.as_deref().unwrap_or("$LATEST");
    change_function(app, &found.function, |record| {
        work(record, qualifier.to_owned())
    })
    .await
}

fn read_auth(text: &str) -> Result<UrlAuth, ApiError> {
    match text {
        "NONE" => Ok(UrlAuth::None),
        "AWS_IAM" => Ok(UrlAuth::AwsIam),
        other => Err(ApiError::validation(&[violation(
            other,
            "authType",
            "Member must satisfy enum value set: [NONE, AWS_IAM]",
        )])),
    }
}

fn merge(config: UrlConfig, request: FunctionUrlRequest) -> Result<UrlConfig, ApiError> {
    let streams = match request.invoke_mode.as_deref() {
        None => config.streams,
        Some("BUFFERED") => false,
        Some("RESPONSE_STREAM") => true,
        Some(other) => {
            return Err(ApiError::validation(&[violation(
                other,
                "invokeMode",
                "Member must satisfy enum value set: [BUFFERED, RESPONSE_STREAM]",
            )]));
        }
    };
    let cors = match request.cors {
        Some(cors) => {
            check_cors(&cors)?;
            Some(cors).filter(|cors| *cors != Cors::default())
        }
        None => config.cors,
    };
    Ok(UrlConfig {
        cors,
        streams,
        ..config
    })
}

fn check_cors(cors: &Cors) -> Result<(), ApiError> {
    if let Some(seconds) = cors.max_age.filter(|age| *age > MAX_AGE_SECONDS_MAX) {
        let constraint = "Member must have value less than or equal to 86400";
        let text = seconds.to_string();
        return Err(ApiError::validation(&[violation(
            &text,
            "cors.maxAge",
            constraint,
        )]));
    }
    for (member, entries) in [
        ("cors.allowHeaders", &cors.allow_headers),
        ("cors.allowMethods", &cors.allow_methods),
        ("cors.allowOrigins", &cors.allow_origins),
        ("cors.exposeHeaders", &cors.expose_headers),
    ] {
        let entries = entries.as_deref().unwrap_or_default();
        let is_plain = |text: &String| text.bytes().all(|byte| byte.is_ascii_graphic());
        if entries.len() > CORS_ENTRIES_MAX || !entries.iter().all(is_plain) {
            let constraint = "Member must have at most 100 entries of printable characters";
            let text = format!("[{}]", entries.join(", "));
            return Err(ApiError::validation(&[violation(
                &text, member, constraint,
            )]));
        }
    }
    Ok(())
}

fn view(app: &App, base: &str, found: &Found, config: &UrlConfig) -> FunctionUrlConfig {
    let qualifier = found.reference.qualifier.as_deref();
    view_of(app, base, &found.function.name, qualifier, config)
}

fn view_of(
    app: &App,
    base: &str,
    name: &str,
    qualifier: Option<&str>,
    config: &UrlConfig,
) -> FunctionUrlConfig {
    let target = function_url::target(name, qualifier);
    FunctionUrlConfig {
        function_url: format!("{base}{}{target}/", function_url::PREFIX),
        function_arn: app.arn(&target),
        auth_type: match config.auth {
            UrlAuth::None => "NONE",
            UrlAuth::AwsIam => "AWS_IAM",
        }
        .to_owned(),
        cors: config.cors.clone(),
        creation_time: clock::log_stamp(config.created_unix_ms),
        last_modified_time: clock::log_stamp(config.modified_unix_ms),
        invoke_mode: if config.streams {
            "RESPONSE_STREAM"
        } else {
            "BUFFERED"
        }
        .to_owned(),
    }
}
