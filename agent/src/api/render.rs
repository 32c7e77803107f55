//! Responses of the Runtime API: statuses, headers and bodies as its native clients insist on them.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;
use thaw_agent_protocol::RESPONSE_BYTES_MAX;

use crate::api::body::Received;
use crate::life::{Answer, Invocation};

type Reply = Response<Full<Bytes>>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The answer on the wire.
pub(crate) fn answer(answer: Answer) -> Reply {
    match answer {
        Answer::Invocation(invocation) => self::invocation(&invocation),
        Answer::Restored => Response::new(Full::default()),
        Answer::Accepted => accepted(),
        Answer::InvalidRequestId => error(
            StatusCode::BAD_REQUEST,
            "InvalidRequestID",
            "Invalid request ID",
        ),
        Answer::NotAllowed { from, to } => error(
            StatusCode::FORBIDDEN,
            "InvalidStateTransition",
            &format!(
                "State transition from {from} to {to} failed for runtime. Error: State transition is not allowed"
            ),
        ),
        Answer::TooLarge => error(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLarge",
            &format!("Exceeded maximum allowed payload size ({RESPONSE_BYTES_MAX} bytes)."),
        ),
    }
}

/// 202 with `{"status":"OK"}`.
pub(crate) fn accepted() -> Reply {
    document(
        StatusCode::ACCEPTED,
        Bytes::from_static(br#"{"status":"OK"}"#),
    )
}

/// A status without a body.
pub(crate) fn plain(status: StatusCode) -> Reply {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// Answers an extension's registration. Extensions inside the runtime that want no events (a way to get SIGTERM) are
/// welcome; wanting events is refused, because none would ever come.
pub(crate) fn registered(headers: &HeaderMap, received: Received, body: Bytes) -> Reply {
    let wants_events = match received {
        Received::Whole { payload } if payload.is_empty() => Some(false),
        Received::Whole { payload } => serde_json::from_slice::<serde_json::Value>(&payload)
            .ok()
            .map(|body| body["events"].as_array().is_some_and(|e| !e.is_empty())),
        Received::TooLarge => None,
    };
    if !headers.contains_key("lambda-extension-name") || wants_events.is_none() {
        return error(
            StatusCode::BAD_REQUEST,
            "InvalidRequestFormat",
            "an extension registers with the header Lambda-Extension-Name and a JSON body",
        );
    }
    if wants_events == Some(true) {
        return error(
            StatusCode::FORBIDDEN,
            "Extension.InvalidEventType",
            "this sandbox delivers no events to extensions",
        );
    }
    let mut response = document(StatusCode::OK, body);
    let identifier = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    if let Ok(identifier) = HeaderValue::from_str(identifier.trim()) {
        let name = HeaderName::from_static("lambda-extension-identifier");
        response.headers_mut().insert(name, identifier);
    }
    response
}

fn document(status: StatusCode, body: Bytes) -> Reply {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

fn error(status: StatusCode, error_type: &str, message: &str) -> Reply {
    let body = json!({"errorMessage": message, "errorType": error_type});
    document(status, Bytes::from(body.to_string()))
}

fn invocation(invocation: &Invocation) -> Reply {
    let head = &invocation.head;
    // The native clients refuse an empty body, and crash without a content type.
    let payload = if invocation.payload.is_empty() {
        Bytes::from_static(b"{}")
    } else {
        invocation.payload.clone()
    };
    let mut response = document(StatusCode::OK, payload);
    let headers = response.headers_mut();
    let mut put = |name, value: &str| {
        if let Some(value) = header_value(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    put("lambda-runtime-aws-request-id", &head.request_id);
    put(
        "lambda-runtime-deadline-ms",
        &head.deadline_unix_ms.to_string(),
    );
    put("lambda-runtime-invoked-function-arn", &head.function_arn);
    let optional = [
        ("lambda-runtime-trace-id", &head.trace_id),
        ("lambda-runtime-client-context", &head.client_context),
        ("lambda-runtime-cognito-identity", &head.cognito_identity),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            put(name, value);
        }
    }
    response
}

/// Control characters become spaces: in JSON they can only stand between tokens.
fn header_value(text: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(text)
        .or_else(|_| {
            let printable: Vec<u8> = text
                .bytes()
                .map(|b| if b.is_ascii_control() { b' ' } else { b })
                .collect();
            HeaderValue::from_bytes(&printable)
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pretty_printed_client_context_still_fits_a_header() {
        let value = header_value("{\n\t\"a\": \"ü\"\r\n}").unwrap();
        assert_eq!(value.as_bytes(), "{  \"a\": \"ü\"  }".as_bytes());
    }
}
