//! Function URLs: `ANY /fn/{name}/…`, payload format 2.0, for curl and browsers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request as HttpRequest};
use axum::http::{HeaderName, HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use uuid::Uuid;

use crate::body::{self, BodyError};
use crate::invocation::{self, FunctionResult, PAYLOAD_BYTES_MAX, Refusal, Request};
use crate::record::State;
use crate::state::{App, Live};
use crate::timing;

pub mod event;
pub mod result;

use event::Incoming;

/// Path below which functions answer.
pub const PREFIX: &str = "/fn/";

/// Answers one request below [`PREFIX`].
pub async fn serve(app: Arc<App>, request: HttpRequest) -> Response<Body> {
    let arrived = Instant::now();
    let request_id = Uuid::new_v4().to_string();
    let mut response = answer(&app, request, &request_id, arrived).await;
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert("x-amzn-requestid", id);
    }
    response
}

async fn answer(
    app: &Arc<App>,
    request: HttpRequest,
    request_id: &str,
    arrived: Instant,
) -> Response<Body> {
    let (name, raw_path) = split(request.uri().path());
    let Some(function) = app.find(&name) else {
        return unknown(&name);
    };
    let live = &function.latest;
    let source = request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map_or_else(|| app.address, |info| info.0);
    let (parts, body) = request.into_parts();
    let body = match body::read(&parts.headers, body, PAYLOAD_BYTES_MAX).await {
        Ok(body) => body,
        Err(BodyError::TooLarge(_)) => return too_large(),
        Err(error) => return message(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let trace_id = timing::trace_id(&parts.headers);
    let event = event::build(&Incoming {
        function: &live.name,
        method: parts.method.as_str(),
        raw_path: &raw_path,
        raw_query: parts.uri.query().unwrap_or_default(),
        version: parts.version,
        headers: &parts.headers,
        body: &body,
        source,
        local: app.address,
        request_id,
        trace_id: &trace_id,
        unix_ms: crate::clock::unix_ms(),
    });
    drop(body);
    let payload = match serde_json::to_vec(&event) {
        Ok(payload) if payload.len() <= PAYLOAD_BYTES_MAX => Bytes::from(payload),
        Ok(_) => return too_large(),
        Err(error) => return message(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    };
    let request = Request {
        request_id: request_id.to_owned(),
        function_arn: app.arn(&live.name),
        payload,
        client_context: None,
        trace_id: Some(trace_id),
        measure: timing::measure(&parts.headers),
    };
    match invocation::run(app, &function, live, request).await {
        Ok(answer) => {
            let mut response = match answer.result {
                FunctionResult::Response(payload) => {
                    result::response(payload).unwrap_or_else(|fault| malformed(live, &fault))
                }
                FunctionResult::Error { error_type, .. } => failed(&error_type),
            };
            if let Some(start) = answer.start {
                let value = timing::start(start);
                response.headers_mut().insert(timing::START_HEADER, value);
            }
            if let Some(timings) = &answer.timings {
                let value = timing::header(timings, arrived.elapsed());
                response.headers_mut().insert("server-timing", value);
            }
            response
        }
        Err(refusal) => refused(&refusal, &name),
    }
}

/// The function that a path below [`PREFIX`] names.
#[must_use]
pub fn name(path: &str) -> String {
    split(path).0
}

/// Name, and what follows it, percent-encoded as it came.
fn split(path: &str) -> (String, String) {
    let rest = path.strip_prefix(PREFIX).unwrap_or_default();
    let (name, below) = match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, "/"),
    };
    let name = percent_decode_str(name).decode_utf8_lossy().into_owned();
    (name, below.to_owned())
}

fn unknown(name: &str) -> Response<Body> {
    let shown: String = name.chars().take(64).collect();
    let text = format!(
        "There is no function {shown:?} here. Deploy one: thaw deploy DIR --name {shown}\nWhat is there: thaw ls\n"
    );
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    error_type(&mut response, "ResourceNotFoundException");
    response
}

fn refused(refusal: &Refusal, name: &str) -> Response<Body> {
    match refusal {
        Refusal::Reserved => throttled("Rate Exceeded."),
        Refusal::Throttled(why) => throttled(&format!("Rate Exceeded. {why}")),
        Refusal::Full(why) => {
            let mut response = message(StatusCode::SERVICE_UNAVAILABLE, why);
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            error_type(&mut response, "ServiceUnavailableException");
            response
        }
        Refusal::TooLarge => too_large(),
        Refusal::Gone => unknown(name),
        Refusal::Inactive(State::Failed(reason)) => {
            let text = format!("The function could not be deployed: {reason}");
            let mut response = message(StatusCode::SERVICE_UNAVAILABLE, &text);
            error_type(&mut response, "ResourceConflictException");
            response
        }
        Refusal::Inactive(_) => {
            let text = "The function is still being deployed.";
            let mut response = message(StatusCode::SERVICE_UNAVAILABLE, text);
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            error_type(&mut response, "ResourceConflictException");
            response
        }
        Refusal::Host(_) => {
            let text = "Internal Server Error";
            let mut response = message(StatusCode::INTERNAL_SERVER_ERROR, text);
            error_type(&mut response, "ServiceException");
            response
        }
        Refusal::Stopping => {
            let text = "The gateway is stopping.";
            let mut response = message(StatusCode::SERVICE_UNAVAILABLE, text);
            error_type(&mut response, "ServiceUnavailableException");
            response
        }
    }
}

fn throttled(text: &str) -> Response<Body> {
    let mut response = message(StatusCode::TOO_MANY_REQUESTS, text);
    response
        .headers_mut()
        .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    error_type(&mut response, "TooManyRequestsException");
    response
}

/// The function failed: which error it was is for its owner, in the header and in the log.
fn failed(kind: &str) -> Response<Body> {
    let mut response = message(StatusCode::BAD_GATEWAY, "Internal Server Error");
    error_type(&mut response, kind);
    response
}

fn malformed(live: &Live, fault: &result::ResultFault) -> Response<Body> {
    live.set_last_error(Some(format!(
        "the function's result is no HTTP response: {fault}"
    )));
    tracing::debug!(function = %live.label, %fault, "result is no HTTP response");
    failed("Function.MalformedHttpResponse")
}

fn too_large() -> Response<Body> {
    let mut response = message(StatusCode::PAYLOAD_TOO_LARGE, "Request Entity Too Large");
    error_type(&mut response, "RequestTooLargeException");
    response
}

fn message(status: StatusCode, text: &str) -> Response<Body> {
    let body = serde_json::json!({ "message": text }).to_string();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn error_type(response: &mut Response<Body>, kind: &str) {
    // A type that came out of a guest may be anything.
    if let Ok(value) = HeaderValue::from_str(kind) {
        let name = HeaderName::from_static("x-amzn-errortype");
        response.headers_mut().insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_and_the_name_are_taken_off_the_path() {
        let of = |path| {
            let (name, below) = split(path);
            format!("{name} {below}")
        };
        assert_eq!(of("/fn/hello"), "hello /");
        assert_eq!(of("/fn/hello/"), "hello /");
        assert_eq!(of("/fn/hello/a%20b/c/"), "hello /a%20b/c/");
        assert_eq!(of("/fn/hello//x"), "hello //x");
        assert_eq!(of("/fn/"), " /");
    }
}
