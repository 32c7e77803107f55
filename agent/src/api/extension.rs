//! The Extensions API, in Lambda's statuses, headers and words.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use thaw_agent_protocol::{Configure, Invoke};

use super::body::Received;
use super::{render, telemetry, text};
use crate::extensions::{Event, ExtensionAnswer, ExtensionCall, Reason, Refusal, SHUTDOWN_LIMIT};
use crate::telemetry::Api;

const IDENTIFIER: &str = "lambda-extension-identifier";
const EVENT_IDENTIFIER: &str = "lambda-extension-event-identifier";
const ERROR_TYPE: &str = "lambda-extension-function-error-type";
/// The body of a subscription is outside its schema: 400, where all else is 403.
const INVALID: &str = "ValidationError";
const ACCEPT: &str = "lambda-extension-accept-feature";

type Reply = Response<Full<Bytes>>;

/// What a registered extension learns of the function.
#[derive(Clone, Debug)]
pub(crate) struct Registration {
    document: Value,
    account_id: Option<String>,
}

impl Registration {
    pub(crate) fn of(configure: &Configure) -> Self {
        let variable = |name: &str| configure.environment.get(name).cloned().unwrap_or_default();
        Self {
            document: json!({
                "functionName": variable("AWS_LAMBDA_FUNCTION_NAME"),
                "functionVersion": variable("AWS_LAMBDA_FUNCTION_VERSION"),
                "handler": variable("_HANDLER"),
            }),
            account_id: configure.account_id.clone(),
        }
    }

    /// The answer to an extension that sent these headers.
    fn answer(&self, headers: &HeaderMap, identifier: &str) -> Reply {
        let mut document = self.document.clone();
        let wants_account = text(headers, ACCEPT)
            .is_some_and(|features| features.split(',').any(|one| one.trim() == "accountId"));
        if wants_account && let Some(account_id) = &self.account_id {
            document["accountId"] = json!(account_id);
        }
        let mut response = render::json(StatusCode::OK, document.to_string().into());
        put(&mut response, IDENTIFIER, identifier);
        response
    }
}

/// The body of a registration; a member that is null is none.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wish {
    events: Option<Vec<String>>,
    configuration_keys: Option<Vec<String>>,
}

/// `POST …/extension/register`; or why it is refused before it is looked at.
pub(crate) fn register(headers: &HeaderMap, received: Received) -> Result<ExtensionCall, Refusal> {
    let malformed = |message: &str| Refusal::new("InvalidRequestFormat", message);
    let name = text(headers, "lambda-extension-name").unwrap_or_default();
    if name.is_empty() {
        return Err(Refusal::new(
            "Extension.InvalidExtensionName",
            "Empty extension name",
        ));
    }
    let Received::Whole { payload } = received else {
        return Err(malformed("the body is too large"));
    };
    let wish: Wish =
        serde_json::from_slice(&payload).map_err(|error| malformed(&error.to_string()))?;
    if wish.configuration_keys.is_some_and(|keys| !keys.is_empty()) {
        return Err(malformed(
            "configurationKeys are deprecated; use environment variables instead",
        ));
    }
    Ok(ExtensionCall::Register {
        name,
        identifier: fresh_identifier(),
        events: wish.events.unwrap_or_default(),
    })
}

/// `GET …/extension/event/next`; or why it is refused before it is looked at.
pub(crate) fn next(headers: &HeaderMap) -> Result<ExtensionCall, Refusal> {
    identifier(headers).map(|identifier| ExtensionCall::Next { identifier })
}

/// `POST …/extension/init/error`; or why it is refused before it is looked at.
pub(crate) fn init_error(headers: &HeaderMap) -> Result<ExtensionCall, Refusal> {
    let (identifier, error_type) = failure(headers)?;
    Ok(ExtensionCall::InitError {
        identifier,
        error_type,
    })
}

/// `POST …/extension/exit/error`; or why it is refused before it is looked at.
pub(crate) fn exit_error(headers: &HeaderMap) -> Result<ExtensionCall, Refusal> {
    let (identifier, error_type) = failure(headers)?;
    Ok(ExtensionCall::ExitError {
        identifier,
        error_type,
    })
}

/// `PUT …/telemetry` or `…/logs`; or why it is refused before it is looked at.
pub(crate) fn subscribe(
    api: Api,
    headers: &HeaderMap,
    received: Received,
) -> Result<ExtensionCall, Refusal> {
    let identifier = identifier(headers)?;
    let Received::Whole { payload } = received else {
        return Err(Refusal::new(INVALID, "the body is too large"));
    };
    let subscription =
        telemetry::subscription(api, &payload).map_err(|reason| Refusal::new(INVALID, reason))?;
    Ok(ExtensionCall::Subscribe {
        identifier,
        subscription,
    })
}

fn failure(headers: &HeaderMap) -> Result<(String, String), Refusal> {
    let identifier = identifier(headers)?;
    match text(headers, ERROR_TYPE).filter(|error_type| !error_type.is_empty()) {
        Some(error_type) => Ok((identifier, error_type)),
        None => Err(Refusal::new(
            "Extension.MissingHeader",
            "Lambda-Extension-Function-Error-Type not found",
        )),
    }
}

fn identifier(headers: &HeaderMap) -> Result<String, Refusal> {
    let identifier = text(headers, IDENTIFIER).unwrap_or_default();
    if identifier.is_empty() {
        return Err(Refusal::new(
            "Extension.MissingExtensionIdentifier",
            "Missing Lambda-Extension-Identifier header",
        ));
    }
    let is_uuid = identifier.len() == 36
        && identifier
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if is_uuid {
        Ok(identifier)
    } else {
        Err(Refusal::new(
            "Extension.InvalidExtensionIdentifier",
            "Invalid Lambda-Extension-Identifier",
        ))
    }
}

/// The answer on the wire to a request with these headers.
pub(crate) fn answer(
    answer: ExtensionAnswer,
    headers: &HeaderMap,
    registration: &Registration,
) -> Reply {
    match answer {
        ExtensionAnswer::Registered { identifier } => registration.answer(headers, &identifier),
        ExtensionAnswer::Event(event) => {
            let document = match event {
                Event::Invoke(head) => invoke(&head),
                Event::Shutdown(reason) => shutdown(reason),
            };
            let mut response = render::json(StatusCode::OK, document.to_string().into());
            put(&mut response, EVENT_IDENTIFIER, &fresh_identifier());
            response
        }
        ExtensionAnswer::Accepted => render::accepted(),
        ExtensionAnswer::Subscribed => render::text(StatusCode::OK, "\"OK\""),
        ExtensionAnswer::Refused(refusal) => refused(&refusal),
    }
}

fn invoke(head: &Invoke) -> Value {
    let mut event = json!({
        "eventType": "INVOKE",
        "deadlineMs": head.deadline_unix_ms,
        "requestId": head.request_id,
        "invokedFunctionArn": head.function_arn,
    });
    if let Some(trace_id) = head.trace_id.as_deref().filter(|id| !id.is_empty()) {
        event["tracing"] = json!({"type": "X-Amzn-Trace-Id", "value": trace_id});
    }
    event
}

fn shutdown(reason: Reason) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let deadline = now.unwrap_or_default().saturating_add(SHUTDOWN_LIMIT);
    json!({
        "eventType": "SHUTDOWN",
        "shutdownReason": match reason {
            Reason::Spindown => "spindown",
            Reason::Timeout => "timeout",
            Reason::Failure => "failure",
        },
        "deadlineMs": u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
    })
}

/// The answer to a call that was refused.
pub(crate) fn refused(refusal: &Refusal) -> Reply {
    let status = match refusal.error_type {
        INVALID => StatusCode::BAD_REQUEST,
        _ => StatusCode::FORBIDDEN,
    };
    render::error(status, refusal.error_type, &refusal.message)
}

fn put(response: &mut Reply, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        let name = HeaderName::from_static(name);
        response.headers_mut().insert(name, value);
    }
}

/// A UUID of the kernel's; empty, and so good for nothing, where it gives none.
fn fresh_identifier() -> String {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    uuid.trim().to_owned()
}
