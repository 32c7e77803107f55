//! Function URLs, payload format 2.0, for curl and browsers: `ANY /fn/{name}/…` and `/fn/{name}:{alias}/…` on the gateway's own
//! host, and any path on the host `{id}.lambda-url.…` of a URL that was configured.
//!
//! A function answers at its path without a configuration, too; that says who may call it, and what browsers may.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request as HttpRequest};
use axum::http::{HeaderName, HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::auth::admission::Caller;
use crate::body::{self, BodyError};
use crate::invocation::running::Running;
use crate::invocation::{self, FunctionResult, PAYLOAD_BYTES_MAX, Refusal, Request};
use crate::lambda;
use crate::lambda::names::FunctionRef;
use crate::record::{State, UrlConfig};
use crate::state::{App, Live};
use crate::timing;

pub mod cors;
pub mod event;
pub mod result;
mod streamed;

pub use event::id;

use event::Incoming;
use streamed::Begun;

/// Path below which functions answer.
pub const PREFIX: &str = "/fn/";

/// What follows a URL's id in its host name.
const HOST_INFIX: &str = ".lambda-url.";

/// Which function a request is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Name, and alias or version behind a colon.
    pub target: String,
    /// Below the function's own path, percent-encoded as it came.
    pub raw_path: String,
}

impl Destination {
    /// By a path below [`PREFIX`].
    #[must_use]
    pub fn by_path(path: &str) -> Self {
        let rest = path.strip_prefix(PREFIX).unwrap_or_default();
        let (target, below) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, "/"),
        };
        Self {
            target: percent_decode_str(target).decode_utf8_lossy().into_owned(),
            raw_path: below.to_owned(),
        }
    }

    /// By the host; `None` for one that is no function URL's.
    ///
    /// # Errors
    /// It has the form of one, and is nobody's: the answer for the client.
    pub fn by_host(app: &App, host: &str, path: &str) -> Option<Result<Self, Response<Body>>> {
        let (id, _) = host.split_once(HOST_INFIX)?;
        let found = app.all().iter().find_map(|function| {
            let record = function.record();
            let (qualifier, _) = record.urls.iter().find(|(_, url)| url.id == id)?;
            let qualifier = Some(qualifier.as_str()).filter(|text| *text != "$LATEST");
            Some(Self {
                target: target(&function.name, qualifier),
                raw_path: path.to_owned(),
            })
        });
        Some(found.ok_or_else(|| forbidden(&Value::Null)))
    }

    /// The function's bare name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.target.split(':').next().unwrap_or_default()
    }

    /// The URL's configuration, if it has one.
    #[must_use]
    pub fn config(&self, app: &App) -> Option<UrlConfig> {
        let qualifier = self.target.split_once(':').map_or("$LATEST", |(_, q)| q);
        app.find(self.name())?.record().urls.get(qualifier).cloned()
    }
}

/// A function, or an alias of it, in URLs and ARNs.
#[must_use]
pub fn target(name: &str, qualifier: Option<&str>) -> String {
    match qualifier {
        Some(qualifier) => format!("{name}:{qualifier}"),
        None => name.to_owned(),
    }
}

/// Answers one request; `config` is that of its destination.
pub async fn serve(
    app: Arc<App>,
    destination: Destination,
    config: Option<UrlConfig>,
    request: HttpRequest,
) -> Response<Body> {
    let arrived = Instant::now();
    let streams = config.as_ref().is_some_and(|config| config.streams);
    let cors = config.and_then(|config| config.cors);
    if let Some(cors) = &cors
        && let Some(granted) = cors::preflight(cors, request.method(), request.headers())
    {
        return granted;
    }
    let headers = cors.is_some().then(|| request.headers().clone());
    let incoming = Identified {
        trace_id: timing::trace_id(request.headers()),
        request,
        id: Uuid::new_v4().to_string(),
        arrived,
    };
    let (id, trace) = (incoming.id.clone(), incoming.trace_id.clone());
    let mut response = answer(&app, &destination, streams, incoming).await;
    if let (Some(cors), Some(headers)) = (&cors, &headers) {
        cors::allow(cors, headers, &mut response);
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert("x-amzn-requestid", id);
    }
    if let Some(trace) = timing::trace_header(&trace) {
        headers.insert(timing::TRACE_HEADER, trace);
    }
    response
}

/// A request with what it is known by.
struct Identified {
    request: HttpRequest,
    id: String,
    trace_id: String,
    arrived: Instant,
}

async fn answer(
    app: &Arc<App>,
    destination: &Destination,
    streams: bool,
    incoming: Identified,
) -> Response<Body> {
    let Identified {
        request,
        id: request_id,
        trace_id,
        arrived,
    } = incoming;
    let name = destination.name();
    let reference = FunctionRef::parse(&destination.target, None);
    let Some(found) = reference
        .ok()
        .and_then(|named| lambda::find(app, named).ok())
    else {
        return match app.find(name) {
            // As AWS answers for a URL whose alias was deleted.
            Some(_) => {
                forbidden(&format!("Forbidden. There is no {} here.", destination.target).into())
            }
            None => unknown(name),
        };
    };
    let live = found.pick();
    let caller = request.extensions().get::<Caller>().cloned();
    let source = request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map_or_else(|| app.address, |info| info.0);
    let (parts, body) = request.into_parts();
    // A caller's body is in memory already.
    let room = match caller {
        None => {
            let sender = Some(source.ip());
            app.auth
                .room(sender, &parts.headers, PAYLOAD_BYTES_MAX)
                .await
        }
        Some(_) => Ok(None),
    };
    let room = match room {
        Ok(room) => room,
        Err(error) => return unavailable(&error.message),
    };
    let body = match body::read(&parts.headers, body, PAYLOAD_BYTES_MAX).await {
        Ok(body) => body,
        Err(BodyError::TooLarge(_)) => return too_large(),
        Err(error) => return message(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let event = event::build(&Incoming {
        function: &destination.target,
        method: parts.method.as_str(),
        raw_path: &destination.raw_path,
        raw_query: parts.uri.query().unwrap_or_default(),
        version: parts.version,
        headers: &parts.headers,
        body: &body,
        source,
        caller: caller.as_ref(),
        account_id: &app.account_id,
        local: app.address,
        request_id: &request_id,
        trace_id: &trace_id,
        unix_ms: crate::clock::unix_ms(),
    });
    drop((body, room));
    let payload = match serde_json::to_vec(&event) {
        Ok(payload) if payload.len() <= PAYLOAD_BYTES_MAX => Bytes::from(payload),
        Ok(_) => return too_large(),
        Err(error) => return message(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    };
    let request = Request {
        request_id,
        function_arn: found.arn(app),
        payload,
        client_context: None,
        trace_id: Some(trace_id),
        measure: timing::measure(&parts.headers),
        quota: caller.map(|caller| caller.quota),
    };
    let ended = if streams {
        match streamed::begin(Running::start(app, &found.function, &live, request)).await {
            Begun::Response(response) => return response,
            Begun::Malformed(fault) => return malformed(&live, &fault),
            Begun::Ended(ended) => ended,
        }
    } else {
        invocation::run(app, &found.function, &live, request).await
    };
    match ended {
        Ok(answer) => {
            let mut response = match answer.result {
                FunctionResult::Response(payload) => result::response(payload)
                    .unwrap_or_else(|fault| malformed(&live, &fault.to_string())),
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
        Err(refusal) => refused(&refusal, name),
    }
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
        Refusal::Quota(exceeded) => throttled(&format!("Rate Exceeded. {exceeded}")),
        Refusal::Throttled(why) => throttled(&format!("Rate Exceeded. {why}")),
        Refusal::Full(why) => unavailable(why),
        Refusal::TooLarge => too_large(),
        Refusal::Gone => unknown(name),
        Refusal::Inactive(State::Failed(reason) | State::InitFailed(reason)) => {
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
        // Nobody hears it.
        Refusal::Abandoned => message(StatusCode::SERVICE_UNAVAILABLE, "The client went away."),
        Refusal::Stopping => {
            let text = "The gateway is stopping.";
            let mut response = message(StatusCode::SERVICE_UNAVAILABLE, text);
            error_type(&mut response, "ServiceUnavailableException");
            response
        }
    }
}

fn unavailable(text: &str) -> Response<Body> {
    let mut response = message(StatusCode::SERVICE_UNAVAILABLE, text);
    let headers = response.headers_mut();
    headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    error_type(&mut response, "ServiceUnavailableException");
    response
}

fn throttled(text: &str) -> Response<Body> {
    let mut response = message(StatusCode::TOO_MANY_REQUESTS, text);
    response
        .headers_mut()
        .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    error_type(&mut response, "TooManyRequestsException");
    response
}

/// The function failed: which error it was is for its owner, in the header and in the log. AWS's body is this text and no JSON.
fn failed(kind: &str) -> Response<Body> {
    let mut response = typed(StatusCode::BAD_GATEWAY, Body::from("Internal Server Error"));
    error_type(&mut response, kind);
    response
}

/// No URL that anybody may call, in AWS's shape.
fn forbidden(message: &Value) -> Response<Body> {
    let body = Body::from(json!({ "Message": message }).to_string());
    let mut response = typed(StatusCode::FORBIDDEN, body);
    error_type(&mut response, "AccessDeniedException");
    response
}

fn malformed(live: &Live, fault: &str) -> Response<Body> {
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
    typed(status, Body::from(json!({ "message": text }).to_string()))
}

fn typed(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
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
            let found = Destination::by_path(path);
            format!("{} {}", found.target, found.raw_path)
        };
        assert_eq!(of("/fn/hello"), "hello /");
        assert_eq!(of("/fn/hello/"), "hello /");
        assert_eq!(of("/fn/hello/a%20b/c/"), "hello /a%20b/c/");
        assert_eq!(of("/fn/hello//x"), "hello //x");
        assert_eq!(of("/fn/hello%3Alive/a"), "hello:live /a");
        assert_eq!(Destination::by_path("/fn/hello:live/a").name(), "hello");
        assert_eq!(of("/fn/"), " /");
    }
}
