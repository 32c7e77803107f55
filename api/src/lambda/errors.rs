//! Errors as Lambda's clients read them: status, `x-amzn-ErrorType`, and a body whose spelling depends on the type.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Map, Value};

use crate::policy::PolicyError;
use crate::record::State;

/// Most bytes of a client's value that an error repeats.
const ECHO_BYTES_MAX: usize = 1024;

/// `Reason` when a function runs as often as is reserved for it.
pub const RESERVED: &str = "ReservedFunctionConcurrentInvocationLimitExceeded";

/// `Reason` when a function waits as often as this gateway lets it.
pub const CONCURRENT: &str = "ConcurrentInvocationLimitExceeded";

/// `Reason` when a key's requests come faster than they may.
pub const CALLER_RATE: &str = "CallerRateLimitExceeded";

/// An error of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// `ResourceNotFoundException`, …
    pub code: &'static str,
    /// For people; empty where AWS says nothing.
    pub message: String,
    /// Whether the body has a `Type`; AWS leaves it out of some.
    pub is_typed: bool,
    /// `Reason` of a throttled request.
    pub reason: Option<&'static str>,
    /// When a throttled or unavailable client should come back, seconds.
    pub retry_seconds: u64,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            is_typed: true,
            reason: None,
            retry_seconds: 1,
        }
    }

    /// The same, which says when there is room.
    #[must_use]
    pub fn retried_after(self, wait: Duration) -> Self {
        let retry_seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        Self {
            retry_seconds,
            ..self
        }
    }

    /// The same without `Type` in its body.
    #[must_use]
    pub fn untyped(self) -> Self {
        Self {
            is_typed: false,
            ..self
        }
    }

    /// 400, a value that makes no sense or is not supported.
    pub fn invalid_parameter(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "InvalidParameterValueException",
            message,
        )
    }

    /// 400, a body that is no JSON or not the JSON expected.
    pub fn invalid_content(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "InvalidRequestContentException",
            message,
        )
    }

    /// 404, no such function.
    pub fn not_found(arn: &str) -> Self {
        Self::missing(format!("Function not found: {arn}"))
    }

    /// 404, a function of another region than this gateway's.
    pub fn unreachable_region(theirs: &str, ours: &str) -> Self {
        Self::missing(format!(
            "Functions from '{theirs}' are not reachable in this region ('{ours}')"
        ))
    }

    /// 403, something of another account; AWS says no more of it.
    pub fn access_denied() -> Self {
        Self::new(StatusCode::FORBIDDEN, "AccessDeniedException", "").untyped()
    }

    /// 404, something that an operation names has none of what it asks for.
    pub fn no_resource() -> Self {
        Self::missing("The resource you requested does not exist.")
    }

    /// 400, a function is to have more tags than it may.
    pub fn too_many_tags() -> Self {
        Self::invalid_parameter("Number of tags exceeds resource tag limit.")
    }

    /// 404, no such code signing configuration.
    pub fn no_code_signing_config(arn: &str) -> Self {
        let code = "CodeSigningConfigNotFoundException";
        let message = format!(
            "The code signing configuration cannot be found. Check that the provided configuration is not deleted: {arn}."
        );
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// 404, no such alias.
    pub fn no_alias(arn: &str) -> Self {
        Self::missing(format!("Cannot find alias arn: {arn}"))
    }

    /// 404, nothing is provisioned for this alias or version.
    pub fn no_provisioned_concurrency(message: impl Into<String>) -> Self {
        let code = "ProvisionedConcurrencyConfigNotFoundException";
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// 404, something else that is not there.
    pub fn missing(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "ResourceNotFoundException", message)
    }

    /// 409, it cannot be invoked or published.
    pub fn inactive(state: &State) -> Self {
        let why = match state {
            State::Failed(reason) | State::InitFailed(reason) => format!(" ({reason})"),
            State::Pending | State::Active => String::new(),
        };
        Self::conflict(format!(
            "The operation cannot be performed at this time. The function is currently in the following state: {}{why}",
            state.word()
        ))
    }

    /// 409.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "ResourceConflictException", message)
    }

    /// 409, another change of the function is under way.
    pub fn update_in_progress(arn: &str) -> Self {
        Self::conflict(format!(
            "The operation cannot be performed at this time. An update is in progress for resource: {arn}"
        ))
    }

    /// 412, the function is at another revision.
    pub fn precondition_failed() -> Self {
        Self::new(
            StatusCode::PRECONDITION_FAILED,
            "PreconditionFailedException",
            "The Revision Id provided does not match the latest Revision Id. Call the GetFunction/GetAlias API to retrieve the latest Revision Id",
        )
    }

    /// 413 of Invoke.
    pub fn request_too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestTooLargeException",
            format!("Request must be smaller than {limit} bytes for the InvokeFunction operation"),
        )
    }

    /// 413 of operations that upload code.
    pub fn entity_too_large(limit: usize, operation: &str) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLargeException",
            format!("Request must be smaller than {limit} bytes for the {operation} operation"),
        )
    }

    /// 400; `why` follows AWS's own words.
    pub fn code_storage_exceeded(why: &str) -> Self {
        let message = format!("Code storage limit exceeded. {why}");
        Self::new(
            StatusCode::BAD_REQUEST,
            "CodeStorageExceededException",
            message,
        )
    }

    /// 414, no operation and hardly a function has such a path or query.
    pub fn uri_too_long(limit: usize) -> Self {
        Self::new(
            StatusCode::URI_TOO_LONG,
            "RequestUriTooLongException",
            format!("Path and query must be no longer than {limit} bytes"),
        )
    }

    /// 431.
    pub fn fields_too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "RequestHeaderFieldsTooLargeException",
            format!("Header fields must be no larger than {limit} bytes together"),
        )
    }

    /// 429; `why` follows Lambda's own words.
    pub fn throttled(reason: &'static str, why: &str) -> Self {
        Self {
            reason: Some(reason),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "TooManyRequestsException",
                format!("Rate Exceeded. {why}").trim_end(),
            )
        }
    }

    /// 409, the version's snapshot is still being made.
    pub fn snap_start_not_ready() -> Self {
        Self::new(
            StatusCode::CONFLICT,
            "SnapStartNotReadyException",
            "Lambda is initializing your function. It will be ready to invoke once your function state becomes ACTIVE.",
        )
    }

    /// 400, the version's hooks after the restore failed; `document` is the error as the runtime client told it.
    pub fn snap_start(document: &[u8]) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "SnapStartException",
            format!(
                "The afterRestore() runtime hook encountered an error: {}",
                String::from_utf8_lossy(document)
            ),
        )
    }

    /// 408, the version's hooks after the restore were not done in time.
    pub fn snap_start_timeout() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "SnapStartTimeoutException",
            "Lambda couldn't restore the snapshot within the timeout limit.",
        )
    }

    /// 500, this machine's fault.
    pub fn service(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "ServiceException",
            message,
        )
    }

    /// 503, not yet or not any more.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailableException",
            message,
        )
    }

    /// 404, not a path of the API at all.
    pub fn unknown_operation(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "UnknownOperationException", message)
    }

    /// 400, a runtime that AWS has given up.
    pub fn deprecated_runtime(runtime: &str) -> Self {
        Self::invalid_parameter(format!(
            "The runtime parameter of {runtime} is no longer supported for creating or updating AWS Lambda functions. \
             We recommend you use a supported runtime while creating or updating functions."
        ))
    }

    /// 400, values that break a constraint of the model; `violations` is not empty.
    pub fn validation(violations: &[String]) -> Self {
        let (count, noun) = match violations.len() {
            1 => (1, "error"),
            count => (count, "errors"),
        };
        Self::new(
            StatusCode::BAD_REQUEST,
            "ValidationException",
            format!(
                "{count} validation {noun} detected: {}",
                violations.join("; ")
            ),
        )
    }

    /// The response.
    #[must_use]
    pub fn into_response(self, request_id: &str) -> Response<Body> {
        let mut body = Map::new();
        let who = if self.status.is_server_error() {
            "Service"
        } else {
            "User"
        };
        if let Some(reason) = self.reason {
            body.insert("Reason".to_owned(), reason.into());
        }
        if self.is_typed {
            body.insert("Type".to_owned(), who.into());
        }
        let message = match self.message.is_empty() {
            true => Value::Null,
            false => self.message.into(),
        };
        body.insert(spelling(self.code).to_owned(), message);
        let mut response = Response::new(Body::from(Value::Object(body).to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        headers.insert("x-amzn-errortype", HeaderValue::from_static(self.code));
        if let Ok(id) = HeaderValue::from_str(request_id) {
            headers.insert("x-amzn-requestid", id);
        }
        if matches!(
            self.status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        ) {
            headers.insert(header::RETRY_AFTER, self.retry_seconds.into());
        }
        response
    }
}

impl From<PolicyError> for ApiError {
    fn from(error: PolicyError) -> Self {
        let message = error.to_string();
        match error {
            PolicyError::OtherRevision(_) => Self::new(
                StatusCode::PRECONDITION_FAILED,
                "PreconditionFailedException",
                message,
            ),
            PolicyError::Exists(_) => Self::conflict(message),
            PolicyError::NoStatement(_) | PolicyError::None => Self::missing(message),
            PolicyError::TooLong(_) => Self::new(
                StatusCode::BAD_REQUEST,
                "PolicyLengthExceededException",
                message,
            ),
            PolicyError::Json(_) => Self::service(message),
        }
    }
}

/// Member that carries the message: the service model spells it both ways.
fn spelling(code: &str) -> &'static str {
    match code {
        "AccessDeniedException"
        | "CodeSigningConfigNotFoundException"
        | "CodeVerificationFailedException"
        | "ResourceNotFoundException"
        | "ServiceException" => "Message",
        code if code.starts_with("SnapStart") => "Message",
        _ => "message",
    }
}

/// One violated constraint, in AWS's words.
#[must_use]
pub fn violation(value: &str, member: &str, constraint: &str) -> String {
    let mut end = value.len().min(ECHO_BYTES_MAX);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let value = value.get(..end).unwrap_or_default();
    format!("Value '{value}' at '{member}' failed to satisfy constraint: {constraint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spelling_follows_the_model() {
        assert_eq!(spelling("ResourceNotFoundException"), "Message");
        assert_eq!(spelling("ServiceException"), "Message");
        assert_eq!(spelling("SnapStartNotReadyException"), "Message");
        assert_eq!(spelling("ResourceConflictException"), "message");
    }

    #[test]
    fn throttling_says_when_to_come_back() {
        let response = ApiError::throttled(RESERVED, "").into_response("r");
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(
            response.headers()["x-amzn-errortype"],
            "TooManyRequestsException"
        );
    }
}
