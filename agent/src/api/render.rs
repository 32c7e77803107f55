//! Responses of the Runtime API: statuses, headers and bodies as its native clients insist on them.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;
use thaw_agent_protocol::RESPONSE_BYTES_MAX;

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
        // Rendered with the request's headers, in `api::extension`.
        Answer::Extension(_) => plain(StatusCode::INTERNAL_SERVER_ERROR),
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

/// A JSON document.
pub(super) fn document(status: StatusCode, body: Bytes) -> Reply {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// An error as Lambda writes it.
pub(super) fn error(status: StatusCode, error_type: &str, message: &str) -> Reply {
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
