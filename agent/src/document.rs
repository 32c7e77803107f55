//! Error documents that the agent itself writes: `{"errorType":…,"errorMessage":…}`, as Lambda's clients expect them.
//!
//! While a sandbox initialises there is no invocation yet, so these documents lack the `RequestId: <id> ` that Lambda
//! puts before the message; the host adds it when it answers an invocation with one of them.

use serde::{Deserialize, Serialize};
use serde_json::json;
use thaw_agent_protocol::RESPONSE_BYTES_MAX;

/// No bootstrap can be run.
pub const INVALID_ENTRYPOINT: &str = "Runtime.InvalidEntrypoint";
/// The init limit passed.
pub const TIMED_OUT: &str = "Sandbox.Timedout";
/// The function answered more than [`RESPONSE_BYTES_MAX`].
pub const RESPONSE_TOO_LARGE: &str = "Function.ResponseSizeTooLarge";

/// A response in a mode that Lambda does not know.
pub const INVALID_MODE: &str = "Runtime.InvalidResponseModeHeader";
/// What is said of it.
pub const INVALID_MODE_MESSAGE: &str = "Invalid function response mode";

/// A streamed response broke off.
pub const TRUNCATED: &str = "Runtime.TruncatedResponse";

/// A document of this type with this message.
pub fn error(error_type: &str, message: &str) -> Vec<u8> {
    json!({"errorType": error_type, "errorMessage": message})
        .to_string()
        .into_bytes()
}

/// For a response over the limit.
pub fn response_too_large() -> Vec<u8> {
    let message = format!(
        "Response payload size exceeded maximum allowed payload size ({RESPONSE_BYTES_MAX} bytes)."
    );
    error(RESPONSE_TOO_LARGE, &message)
}

/// An error document of a runtime without the cause that it carries for X-Ray: what Lambda hands to the client of
/// `application/vnd.aws.lambda.error.cause+json`.
pub fn without_cause(document: &[u8]) -> Vec<u8> {
    let Ok(read) = serde_json::from_slice::<WithCause>(document) else {
        return br#""Invalid error body""#.to_vec();
    };
    serde_json::to_vec(&read).unwrap_or_default()
}

/// The parts that are handed on.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WithCause {
    error_message: String,
    error_type: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stack_trace: Vec<String>,
}

/// For an init over its limit, in milliseconds.
pub fn timed_out(limit_ms: u64) -> Vec<u8> {
    let (seconds, hundredths) = (limit_ms / 1000, limit_ms % 1000 / 10);
    error(
        TIMED_OUT,
        &format!("Error: Task timed out after {seconds}.{hundredths:02} seconds"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_kept_from_the_client() {
        let document = br#"{"errorMessage":"m","errorType":"t","errorCause":{"paths":[]}}"#;
        assert_eq!(
            without_cause(document),
            br#"{"errorMessage":"m","errorType":"t"}"#
        );
        let document = br#"{"errorType":"t","stackTrace":["a"],"errorCause":""}"#;
        assert_eq!(
            without_cause(document),
            br#"{"errorMessage":"","errorType":"t","stackTrace":["a"]}"#
        );
        assert_eq!(without_cause(br#"{"a":b}"#), br#""Invalid error body""#);
    }

    #[test]
    fn documents_read_as_lambda_writes_them() {
        let read = |bytes: Vec<u8>| serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
        assert_eq!(
            read(response_too_large()),
            json!({"errorType": "Function.ResponseSizeTooLarge",
                "errorMessage": "Response payload size exceeded maximum allowed payload size (6291556 bytes)."})
        );
        assert_eq!(
            read(timed_out(10_050)),
            json!({"errorType": "Sandbox.Timedout", "errorMessage": "Error: Task timed out after 10.05 seconds"})
        );
    }
}
