//! Responses of the Runtime API: statuses, headers and bodies as its native clients insist on them.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;
use thaw_agent_protocol::RESPONSE_BYTES_MAX;

use crate::document;
use crate::life::{Answer, Invocation, Unfit};

type Reply = Response<Full<Bytes>>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

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
        Answer::Extension(_) => internal_error(),
        Answer::Unfit(Unfit::ResponseMode) => error(
            StatusCode::BAD_REQUEST,
            "InvalidFunctionResponseMode",
            document::INVALID_MODE_MESSAGE,
        ),
        Answer::Unfit(Unfit::TooLarge) => error(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLarge",
            &format!("Exceeded maximum allowed payload size ({RESPONSE_BYTES_MAX} bytes)."),
        ),
    }
}

/// 202 with `{"status":"OK"}`.
pub(crate) fn accepted() -> Reply {
    json(
        StatusCode::ACCEPTED,
        Bytes::from_static(b"{\"status\":\"OK\"}\n"),
    )
}

/// 500, for what is no fault of the client's.
pub(crate) fn internal_error() -> Reply {
    error(
        StatusCode::INTERNAL_SERVER_ERROR,
        "InternalServerError",
        "Internal Server Error",
    )
}

/// A status with a few words.
pub(crate) fn text(status: StatusCode, words: &'static str) -> Reply {
    let mut response = Response::new(Full::new(Bytes::from_static(words.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, TEXT);
    response
}

/// A status without a body.
pub(crate) fn plain(status: StatusCode) -> Reply {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// A JSON document.
pub(super) fn json(status: StatusCode, body: Bytes) -> Reply {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// An error as Lambda writes it.
pub(super) fn error(status: StatusCode, error_type: &str, message: &str) -> Reply {
    let body = json!({"errorMessage": message, "errorType": error_type});
    json(status, Bytes::from(format!("{body}\n")))
}

fn invocation(invocation: &Invocation) -> Reply {
    let head = &invocation.head;
    // The native clients refuse an empty body, and crash without a content type.
    let payload = if invocation.payload.is_empty() {
        Bytes::from_static(b"{}")
    } else {
        invocation.payload.clone()
    };
    let mut response = json(StatusCode::OK, payload);
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
