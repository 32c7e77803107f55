//! Invoke.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::IgnoredAny;

use super::errors::{ApiError, CONCURRENT, RESERVED, violation};
use super::names::FunctionRef;
use super::{Answer, Call, Found, arn, empty, find, json};
use crate::body::{self, BodyError};
use crate::clock;
use crate::engine::chain;
use crate::events::{self, AcceptError, EVENT_BYTES_MAX, Event};
use crate::functions::storage;
use crate::invocation::duplicates::Key;
use crate::invocation::{
    self, FunctionResult, PAYLOAD_BYTES_MAX, Refusal, Request, RestoreFault, report,
};
use crate::record::{State, VersionId};
use crate::state::{App, Live};
use crate::timing;

/// Largest decoded client context, bytes; Lambda's limit.
const CLIENT_CONTEXT_BYTES_MAX: usize = 3583;

/// What the client wants to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    RequestResponse,
    Event,
    DryRun,
}

/// The version that a client wants to invoke. Where it named none, the error names `$LATEST`, as Lambda's does.
pub(super) fn version(app: &App, call: &Call, name: &str) -> Result<Found, ApiError> {
    let mut reference = FunctionRef::parse(name, call.query("Qualifier").as_deref())?;
    find(app, reference.clone()).map_err(|_| {
        let latest = || "$LATEST".to_owned();
        reference.qualifier.get_or_insert_with(latest);
        ApiError::not_found(&arn(app, &reference))
    })
}

pub(super) async fn invoke(app: &Arc<App>, mut call: Call, name: &str) -> Answer {
    let arrived = Instant::now();
    let found = version(app, &call, name)?;
    let kind = kind(&call.headers)?;
    let tail = wants_tail(&call.headers)?;
    let client_context = client_context(&call.headers)?;
    let limit = match kind {
        Kind::Event => EVENT_BYTES_MAX,
        Kind::RequestResponse | Kind::DryRun => PAYLOAD_BYTES_MAX,
    };
    let payload = payload(app, &mut call, limit).await?;
    let trace_id = Some(timing::trace_id(&call.headers));
    match kind {
        Kind::DryRun => return Ok(empty(StatusCode::NO_CONTENT)),
        Kind::Event => {
            let event = Event {
                client_context,
                key: storage::key_of(call.caller.as_ref()),
                ..event(&found, call.request_id, payload, trace_id)
            };
            accept(app, &found, &event).await?;
            return Ok(empty(StatusCode::ACCEPTED));
        }
        Kind::RequestResponse => {}
    }
    let request = Request {
        request_id: call.request_id.clone(),
        function_arn: found.arn(app),
        payload,
        client_context,
        trace_id,
        measure: timing::measure(&call.headers),
        quota: call.caller.map(|caller| caller.quota),
    };
    let live = found.pick();
    let key = text(&call.headers, "amz-sdk-invocation-id")
        .and_then(|id| Key::new(id, &request.function_arn, &request.payload));
    let trace = request.trace_id.as_deref().and_then(timing::trace_header);
    let answer = match key {
        Some(key) => {
            let (app, function, live) = (app.clone(), found.function.clone(), live.clone());
            let duplicates = Arc::clone(&app.duplicates);
            let run = async move { invocation::run(&app, &function, &live, request).await };
            duplicates.once(key, run).await
        }
        None => invocation::run(app, &found.function, &live, request).await,
    }
    .map_err(|refusal| refused(&refusal, &live, &found.arn(app)))?;
    let (body, failed) = match answer.result {
        FunctionResult::Response(payload) => (payload, false),
        FunctionResult::Error { document, .. } => match answer.restore {
            Some(RestoreFault::Error) => return Err(ApiError::snap_start(&document)),
            Some(RestoreFault::TimedOut) => return Err(ApiError::snap_start_timeout()),
            None => (document, true),
        },
    };
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    if let Ok(version) = HeaderValue::from_str(&answer.version.to_string()) {
        headers.insert("x-amz-executed-version", version);
    }
    if let Some(trace) = trace {
        headers.insert(timing::TRACE_HEADER, trace);
    }
    if failed {
        headers.insert(
            "x-amz-function-error",
            HeaderValue::from_static("Unhandled"),
        );
    }
    if tail && let Ok(value) = HeaderValue::from_str(&report::tail(&answer.log)) {
        headers.insert("x-amz-log-result", value);
    }
    if let Some(start) = answer.start {
        headers.insert(timing::START_HEADER, timing::start(start));
    }
    if let Some(timings) = &answer.timings {
        headers.insert("server-timing", timing::header(timings, arrived.elapsed()));
    }
    Ok(response)
}

/// The old way to say `Event`.
pub(super) async fn invoke_async(app: &Arc<App>, mut call: Call, name: &str) -> Answer {
    let reference = FunctionRef::parse(name, None)?;
    let found = find(app, reference)?;
    let payload = payload(app, &mut call, EVENT_BYTES_MAX).await?;
    let trace_id = Some(timing::trace_id(&call.headers));
    let event = Event {
        key: storage::key_of(call.caller.as_ref()),
        ..event(&found, call.request_id, payload, trace_id)
    };
    accept(app, &found, &event).await?;
    json(StatusCode::ACCEPTED, &serde_json::json!({"Status": 202}))
}

fn event(found: &Found, id: String, payload: Bytes, trace_id: Option<String>) -> Event {
    let now = clock::steady_unix_ms();
    Event {
        id,
        function: found.function.name.clone(),
        qualifier: found.reference.qualifier.clone(),
        client_context: None,
        key: None,
        trace_id,
        received_unix_ms: now,
        due_unix_ms: now,
        failures: 0,
        deferrals: 0,
        lineage: BTreeMap::new(),
        url: None,
        payload_bytes: payload.len() as u64,
        payload,
    }
}

async fn accept(app: &Arc<App>, found: &Found, event: &Event) -> Result<(), ApiError> {
    events::accept(app, &found.function, event)
        .await
        .map_err(|error| match error {
            AcceptError::TooMany(_) | AcceptError::TooLarge(_) => {
                ApiError::throttled(CONCURRENT, &error.to_string())
            }
            AcceptError::Store(_) => ApiError::service(chain(&error)),
        })
}

pub(super) async fn payload(app: &App, call: &mut Call, limit: usize) -> Result<Bytes, ApiError> {
    let body = std::mem::take(&mut call.body);
    let _room = match call.caller {
        None => app.auth.room(None, &call.headers, limit).await?, // auth is off
        Some(_) => None,                                          // it is in memory already
    };
    let payload = body::read(&call.headers, body, limit)
        .await
        .map_err(|error| match error {
            BodyError::TooLarge(limit) => ApiError::request_too_large(limit),
            other => ApiError::invalid_content(other.to_string()),
        })?;
    payload_json(payload)
}

fn kind(headers: &HeaderMap) -> Result<Kind, ApiError> {
    match text(headers, "x-amz-invocation-type") {
        None | Some("RequestResponse") => Ok(Kind::RequestResponse),
        Some("DryRun") => Ok(Kind::DryRun),
        Some("Event") => Ok(Kind::Event),
        Some(other) => Err(ApiError::validation(&[violation(
            other,
            "invocationType",
            "Member must satisfy enum value set: [Event, RequestResponse, DryRun]",
        )])),
    }
}

pub(super) fn wants_tail(headers: &HeaderMap) -> Result<bool, ApiError> {
    match text(headers, "x-amz-log-type") {
        None | Some("None") => Ok(false),
        Some("Tail") => Ok(true),
        Some(other) => Err(ApiError::validation(&[violation(
            other,
            "logType",
            "Member must satisfy enum value set: [None, Tail]",
        )])),
    }
}

/// The decoded client context, JSON.
pub(super) fn client_context(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get("x-amz-client-context") else {
        return Ok(None);
    };
    let malformed = || {
        ApiError::invalid_content(
            "Client context must be a valid Base64-encoded JSON object.".to_owned(),
        )
    };
    let bytes = STANDARD.decode(value.as_bytes()).map_err(|_| malformed())?;
    if bytes.len() > CLIENT_CONTEXT_BYTES_MAX {
        return Err(ApiError::invalid_content(format!(
            "Client context must be no more than {CLIENT_CONTEXT_BYTES_MAX} bytes."
        )));
    }
    let decoded = String::from_utf8(bytes).map_err(|_| malformed())?;
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&decoded)
        .map_err(|_| malformed())?;
    Ok(Some(decoded))
}

/// The event; no body at all means `{}`, as the runtime clients need some JSON.
fn payload_json(payload: Bytes) -> Result<Bytes, ApiError> {
    if payload.is_empty() {
        return Ok(Bytes::from_static(b"{}"));
    }
    let malformed = |why: String| {
        ApiError::invalid_content(format!(
            "Could not parse request body into json: Could not parse payload into json: {why}"
        ))
    };
    // The parser passes over strings and does not look whether they are UTF-8.
    if let Err(error) = std::str::from_utf8(&payload) {
        let at = error.valid_up_to();
        let byte = payload.get(at).copied().unwrap_or_default();
        return Err(malformed(format!(
            "Invalid UTF-8 start byte 0x{byte:02x} at offset {at}"
        )));
    }
    serde_json::from_slice::<IgnoredAny>(&payload).map_err(|error| malformed(error.to_string()))?;
    Ok(payload)
}

pub(super) fn refused(refusal: &Refusal, live: &Live, arn: &str) -> ApiError {
    match refusal {
        Refusal::Inactive(State::Pending)
            if live.id != VersionId::Latest && live.record().target.settings.snap_start =>
        {
            ApiError::snap_start_not_ready()
        }
        Refusal::Inactive(state) => ApiError::inactive(state),
        Refusal::Reserved => ApiError::throttled(RESERVED, ""),
        Refusal::Quota(exceeded) => ApiError::throttled(CONCURRENT, &exceeded.to_string()),
        Refusal::Throttled(why) => ApiError::throttled(CONCURRENT, why),
        Refusal::Full(why) => ApiError::unavailable(why.clone()),
        Refusal::TooLarge => ApiError::request_too_large(PAYLOAD_BYTES_MAX),
        Refusal::Gone => ApiError::not_found(arn),
        Refusal::Host(reason) => ApiError::service(reason.clone()),
        Refusal::Stopping => ApiError::unavailable("The gateway is stopping."),
        Refusal::Abandoned => ApiError::unavailable("The client went away."),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn an_empty_event_is_an_empty_object() {
        assert_eq!(payload_json(Bytes::new()).unwrap(), "{}");
        assert_eq!(payload_json(Bytes::from_static(b"[1]")).unwrap(), "[1]");
        let error = payload_json(Bytes::from_static(b"hello")).unwrap_err();
        assert_eq!(error.code, "InvalidRequestContentException");
        assert!(error.message.starts_with(
            "Could not parse request body into json: Could not parse payload into json: "
        ));
        let error = payload_json(Bytes::from_static(b"\"\x87\"")).unwrap_err();
        assert_eq!(error.code, "InvalidRequestContentException");
        assert!(
            error
                .message
                .ends_with("Invalid UTF-8 start byte 0x87 at offset 1")
        );
    }

    #[test]
    fn client_contexts_are_decoded_and_checked() {
        let good = STANDARD.encode(r#"{"custom":{"a":1}}"#);
        let name = "x-amz-client-context";
        assert_eq!(
            client_context(&headers(name, &good)).unwrap().unwrap(),
            r#"{"custom":{"a":1}}"#
        );
        assert!(client_context(&headers(name, "%%%")).is_err());
        assert!(client_context(&headers(name, &STANDARD.encode("[1]"))).is_err());
        assert!(client_context(&HeaderMap::new()).unwrap().is_none());
    }

    #[test]
    fn invocation_types_are_lambdas() {
        let name = "x-amz-invocation-type";
        assert_eq!(kind(&HeaderMap::new()).unwrap(), Kind::RequestResponse);
        assert_eq!(kind(&headers(name, "Event")).unwrap(), Kind::Event);
        assert_eq!(
            kind(&headers(name, "x")).unwrap_err().code,
            "ValidationException"
        );
    }
}
