//! What both doors to a function share in headers: measuring, how a sandbox was had, and trace ids.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use thaw_runtime::{InvocationTimings, Measure, Start};
use uuid::Uuid;

use crate::clock;

/// The header that carries a trace id, there and back.
pub const TRACE_HEADER: &str = "x-amzn-trace-id";

/// Longest trace id that is taken from a client.
const TRACE_ID_BYTES_MAX: usize = 256;

/// The response header that says how the sandbox was had: `cold`, `claimed`, `rewound`; `warm` in measurements alone.
pub const START_HEADER: &str = "x-thaw-start";

/// Its value.
#[must_use]
pub fn start(start: Start) -> HeaderValue {
    HeaderValue::from_static(match start {
        Start::Cold => "cold",
        Start::Claimed => "claimed",
        Start::Rewound => "rewound",
        Start::Warm => "warm",
    })
}

/// Whether the client wants `Server-Timing`: `X-Thaw-Timing: 1`.
#[must_use]
pub fn measure(headers: &HeaderMap) -> Measure {
    match headers.get("x-thaw-timing").map(HeaderValue::as_bytes) {
        Some(b"1") => Measure::On,
        _ => Measure::Off,
    }
}

/// `Server-Timing`, milliseconds: `restore` was done ahead of the request and is no part of `total`, which is the
/// gateway's own, from the request's head to the response. `identity`, the guest's own word, lies within the others.
#[must_use]
pub fn header(timings: &InvocationTimings, total: Duration) -> HeaderValue {
    let metrics = [
        ("queue", timings.queued),
        ("claim", timings.claim_to_first_instruction),
        ("first-byte", timings.first_instruction_to_agent_byte),
        ("function", timings.agent_byte_to_response),
        ("restore", timings.restore),
        ("total", total),
    ];
    let identity = timings.identity.map(|took| ("identity", took));
    let text: Vec<String> = metrics
        .into_iter()
        .chain(identity)
        .map(|(name, took)| format!("{name};dur={:.3}", took.as_secs_f64() * 1000.0))
        .collect();
    // Names and numbers always make a header.
    HeaderValue::from_str(&text.join(", ")).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The client's `X-Amzn-Trace-Id`, or a new one that is not sampled.
#[must_use]
pub fn trace_id(headers: &HeaderMap) -> String {
    let given = headers
        .get(TRACE_HEADER)
        .and_then(|value| value.to_str().ok())
        .filter(|text| !text.is_empty() && text.len() <= TRACE_ID_BYTES_MAX);
    if let Some(given) = given {
        return given.to_owned();
    }
    let random = Uuid::new_v4().simple().to_string();
    let (root, parent) = (&random[..24], &Uuid::new_v4().simple().to_string()[..16]);
    let seconds = clock::unix_ms() / 1000;
    format!("Root=1-{seconds:08x}-{root};Parent={parent};Sampled=0")
}

/// A trace id for the response.
#[must_use]
pub fn trace_header(trace_id: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(trace_id).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timings_are_milliseconds() {
        let timings = InvocationTimings {
            queued: Duration::from_micros(1500),
            ..InvocationTimings::default()
        };
        let value = header(&timings, Duration::from_millis(12));
        assert_eq!(
            value,
            "queue;dur=1.500, claim;dur=0.000, first-byte;dur=0.000, function;dur=0.000, restore;dur=0.000, total;dur=12.000"
        );
        let timings = InvocationTimings {
            identity: Some(Duration::from_micros(250)),
            ..timings
        };
        let value = header(&timings, Duration::ZERO);
        assert!(value.to_str().unwrap().ends_with(", identity;dur=0.250"));
    }

    #[test]
    fn a_trace_id_is_made_when_none_came() {
        let made = trace_id(&HeaderMap::new());
        assert!(
            made.starts_with("Root=1-") && made.ends_with(";Sampled=0"),
            "{made}"
        );
        let mut headers = HeaderMap::new();
        headers.insert("x-amzn-trace-id", HeaderValue::from_static("Root=1-a-b"));
        assert_eq!(trace_id(&headers), "Root=1-a-b");
    }
}
