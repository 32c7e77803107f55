//! What follows from one attempt at an event: pure.
//!
//! As Lambda does it: a failure of the function is tried again, up to twice, after one minute and then two; what did not reach the
//! function (throttled, this machine's failure) is tried again after 1 s, doubling up to 5 minutes, as long as the event is
//! young enough. (AWS Lambda Developer Guide, "How Lambda handles errors and retries with asynchronous invocation".)

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::{EVENT_BYTES_MAX, Event, EventConfig};
use crate::clock;
use crate::invocation::{FunctionResult, PAYLOAD_BYTES_MAX};
use crate::record::VersionId;

/// Largest record for a destination, bytes: an event, an answer, and what is said of both. A record's event can be a record itself:
/// without a bound it would grow with every function that it comes through.
const RECORD_BYTES_MAX: usize = EVENT_BYTES_MAX + PAYLOAD_BYTES_MAX + 64 * 1024;

/// How often a function runs in one chain of records, Lambda's "approximately 16 times" (AWS Lambda Developer Guide, "Use Lambda recursive loop
/// detection to prevent infinite loops").
pub const LOOP_MAX: u32 = 16;
/// Attempts after the first, unless configured.
const RETRIES_MAX: u32 = 2;
/// Oldest event, unless configured; and how long a record is tried to be delivered.
const AGE_SECONDS_MAX: u32 = 6 * 60 * 60;
/// First and longest wait after an attempt that did not reach the function.
const DEFER_FIRST: Duration = Duration::from_secs(1);
pub(super) const DEFER_MAX: Duration = Duration::from_secs(300);

/// Waits before the second and the third attempt of a function that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retries(pub [Duration; 2]);

impl Default for Retries {
    fn default() -> Self {
        Self([Duration::from_secs(60), Duration::from_secs(120)])
    }
}

/// How one attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The function ran.
    Answered {
        /// Which version.
        version: VersionId,
        /// Its answer or error.
        result: FunctionResult,
    },
    /// It did not, for this reason.
    Unreachable(String),
    /// It was not tried, as the event is too old.
    TooOld,
    /// No concurrency at all is reserved for the function: no attempt will be any better.
    Barred,
    /// It was not tried: records of the function have led back to it, again and again.
    Loop,
    /// A record is where it should be.
    Delivered,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Keep the event like this.
    Again(Event),
    /// Forget it; send this record there.
    End(Option<(String, Bytes)>),
}

/// Whether an event of this age, milliseconds, is not to be tried any more.
#[must_use]
pub fn is_too_old(config: &EventConfig, age_ms: i64) -> bool {
    let limit = config.age_max_seconds.unwrap_or(AGE_SECONDS_MAX);
    age_ms > i64::from(limit) * 1000
}

/// Whether an event is one more of a loop of records.
#[must_use]
pub fn loops(event: &Event) -> bool {
    let ran = event.lineage.get(&event.function).copied();
    event.url.is_none() && ran.unwrap_or_default() >= LOOP_MAX
}

/// What follows now, when the event has this age in milliseconds.
#[must_use]
pub fn decide(
    event: &Event,
    config: &EventConfig,
    retries: &Retries,
    attempt: Attempt,
    arn: &str,
    (now, age): (i64, i64),
) -> Next {
    match attempt {
        Attempt::Delivered => Next::End(None),
        Attempt::Unreachable(reason) => {
            let wait = DEFER_FIRST
                .saturating_mul(1 << event.deferrals.min(16))
                .min(DEFER_MAX);
            if event.url.is_some() && is_too_old(&EventConfig::default(), age) {
                tracing::error!(event = %event.id, %reason, "record is not delivered, and is given up");
                return Next::End(None);
            }
            if event.url.is_some() && event.deferrals == 0 {
                tracing::warn!(event = %event.id, %reason, "record is not delivered, and is tried again");
            } else {
                tracing::debug!(event = %event.id, %reason, ?wait, "event is tried again");
            }
            Next::Again(Event {
                deferrals: event.deferrals.saturating_add(1),
                due_unix_ms: later(now, wait),
                ..event.clone()
            })
        }
        Attempt::TooOld => end(event, config, "EventAgeExceeded", arn, now, None),
        Attempt::Loop => {
            tracing::warn!(
                event = %event.id, function = %event.function, runs = LOOP_MAX,
                "a loop of destinations is ended: lead them elsewhere, or allow loops (PutFunctionRecursionConfig)"
            );
            end(event, config, "RecursiveLoop", arn, now, None)
        }
        Attempt::Barred => end(event, config, "ZeroReservedConcurrency", arn, now, None),
        Attempt::Answered { version, result } => {
            let (document, failed) = match result {
                FunctionResult::Response(payload) => (payload, false),
                FunctionResult::Error { document, .. } => (document, true),
            };
            let answer = serde_json::from_slice(&document)
                .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&document).into_owned()));
            if !failed {
                return end(event, config, "Success", arn, now, Some((version, answer)));
            }
            let again = usize::try_from(event.failures)
                .ok()
                .filter(|_| event.failures < config.retries_max.unwrap_or(RETRIES_MAX))
                .and_then(|failures| retries.0.get(failures));
            let failed_once_more = Event {
                failures: event.failures.saturating_add(1),
                deferrals: 0,
                ..event.clone()
            };
            match again {
                Some(wait) if !is_too_old(config, later(age, *wait)) => Next::Again(Event {
                    due_unix_ms: later(now, *wait),
                    ..failed_once_more
                }),
                Some(_) => {
                    let event = &failed_once_more;
                    let answered = Some((version, answer));
                    end(event, config, "EventAgeExceeded", arn, now, answered)
                }
                None => {
                    let event = &failed_once_more;
                    let answered = Some((version, answer));
                    end(event, config, "RetriesExhausted", arn, now, answered)
                }
            }
        }
    }
}

pub(super) fn later(now: i64, wait: Duration) -> i64 {
    now.saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX))
}

/// The record of an event that has ended, as Lambda writes it. `answered` is the last version that answered and what it said, if
/// any did.
fn end(
    event: &Event,
    config: &EventConfig,
    condition: &str,
    arn: &str,
    now: i64,
    answered: Option<(VersionId, Value)>,
) -> Next {
    let is_success = condition == "Success";
    let to = if is_success {
        &config.on_success
    } else {
        &config.on_failure
    };
    let Some(to) = to else {
        if !is_success {
            tracing::warn!(event = %event.id, function = %event.function, condition, "event is given up");
        }
        return Next::End(None);
    };
    let request: Value = serde_json::from_slice(&event.payload).unwrap_or(Value::Null);
    let count = event.failures + u32::from(is_success);
    let mut record = json!({
        "version": "1.0",
        "timestamp": clock::log_stamp(now),
        "requestContext": {
            "requestId": event.id,
            "functionArn": arn,
            "condition": condition,
            "approximateInvokeCount": count,
        },
        "requestPayload": request,
    });
    if let Some((version, answer)) = answered {
        let mut context = json!({"statusCode": 200, "executedVersion": version});
        if !is_success {
            context["functionError"] = "Unhandled".into();
        }
        record["responseContext"] = context;
        record["responsePayload"] = answer;
    }
    let record = record.to_string();
    if record.len() > RECORD_BYTES_MAX {
        tracing::error!(event = %event.id, to, bytes = record.len(), "a record is too large for its destination, and dropped");
        return Next::End(None);
    }
    Next::End(Some((to.clone(), record.into())))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const ARN: &str = "arn:aws:lambda:us-east-1:0:function:f:$LATEST";

    fn event(failures: u32) -> Event {
        Event {
            id: "i".to_owned(),
            function: "f".to_owned(),
            qualifier: None,
            client_context: None,
            trace_id: None,
            received_unix_ms: 1000,
            due_unix_ms: 1000,
            failures,
            deferrals: 3,
            lineage: BTreeMap::new(),
            url: None,
            key: None,
            payload_bytes: 7,
            payload: Bytes::from_static(b"{\"a\":1}"),
        }
    }

    fn failed() -> Attempt {
        Attempt::Answered {
            version: VersionId::Number(2),
            result: FunctionResult::Error {
                error_type: "E".to_owned(),
                document: Bytes::from_static(b"{\"errorMessage\":\"no\"}"),
            },
        }
    }

    fn follows(event: &Event, config: &EventConfig, attempt: Attempt) -> Next {
        decide(
            event,
            config,
            &Retries::default(),
            attempt,
            ARN,
            (5000, 5000 - event.received_unix_ms),
        )
    }

    #[test]
    fn a_failure_is_tried_again_after_a_minute_and_after_two_then_given_up() {
        let config = EventConfig::default();
        for (failures, wait) in [(0, 60_000), (1, 120_000)] {
            let expected = Event {
                failures: failures + 1,
                deferrals: 0,
                due_unix_ms: 5000 + wait,
                ..event(failures)
            };
            assert_eq!(
                follows(&event(failures), &config, failed()),
                Next::Again(expected)
            );
        }
        assert_eq!(follows(&event(2), &config, failed()), Next::End(None));
        let none = EventConfig {
            retries_max: Some(0),
            ..config
        };
        assert_eq!(follows(&event(0), &none, failed()), Next::End(None));
    }

    #[test]
    fn destinations_get_lambdas_record() {
        let config = EventConfig {
            on_success: Some("good".to_owned()),
            on_failure: Some("bad".to_owned()),
            ..EventConfig::default()
        };
        let Next::End(Some((to, record))) = follows(&event(2), &config, failed()) else {
            panic!("not ended")
        };
        assert_eq!(to, "bad");
        let record: Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(
            record,
            json!({
                "version": "1.0", "timestamp": "1970-01-01T00:00:05.000Z",
                "requestContext": {"requestId": "i", "functionArn": ARN, "condition": "RetriesExhausted", "approximateInvokeCount": 3},
                "requestPayload": {"a": 1},
                "responseContext": {"statusCode": 200, "executedVersion": "2", "functionError": "Unhandled"},
                "responsePayload": {"errorMessage": "no"},
            })
        );
        let answered = Attempt::Answered {
            version: VersionId::Latest,
            result: FunctionResult::Response(Bytes::from_static(b"7")),
        };
        let Next::End(Some((to, record))) = follows(&event(0), &config, answered) else {
            panic!("not ended")
        };
        let record: Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(
            (to.as_str(), &record["responsePayload"]),
            ("good", &json!(7))
        );
        assert_eq!(record["requestContext"]["condition"], "Success");
        assert_eq!(record["requestContext"]["approximateInvokeCount"], 1);
        assert!(record["responseContext"].get("functionError").is_none());
    }

    #[test]
    fn a_record_that_has_grown_too_large_is_dropped() {
        let config = EventConfig {
            on_success: Some("good".to_owned()),
            ..EventConfig::default()
        };
        for (bytes, is_told) in [
            (EVENT_BYTES_MAX, true),
            (EVENT_BYTES_MAX + 64 * 1024, false),
        ] {
            let text = |bytes: usize| Bytes::from(format!("\"{}\"", "x".repeat(bytes - 2)));
            let large = Event {
                payload: text(bytes),
                ..event(0)
            };
            let answered = Attempt::Answered {
                version: VersionId::Latest,
                result: FunctionResult::Response(text(PAYLOAD_BYTES_MAX)),
            };
            let next = follows(&large, &config, answered);
            assert_eq!(matches!(next, Next::End(Some(_))), is_told);
            assert_eq!(next == Next::End(None), !is_told);
        }
    }

    #[test]
    fn what_did_not_reach_the_function_waits_ever_longer_and_counts_as_no_failure() {
        let config = EventConfig::default();
        let unreachable = || Attempt::Unreachable("full".to_owned());
        let Next::Again(next) = follows(&event(1), &config, unreachable()) else {
            panic!("given up")
        };
        assert_eq!((next.failures, next.deferrals), (1, 4));
        assert_eq!(next.due_unix_ms, 5000 + 8000);
        let late = Event {
            deferrals: u32::MAX,
            ..event(0)
        };
        let Next::Again(next) = follows(&late, &config, unreachable()) else {
            panic!("given up")
        };
        assert_eq!(next.due_unix_ms, 5000 + 300_000);
    }

    #[test]
    fn an_event_that_is_or_would_be_too_old_is_given_up() {
        let config = EventConfig {
            age_max_seconds: Some(60),
            on_failure: Some("bad".to_owned()),
            ..EventConfig::default()
        };
        assert!(!is_too_old(&config, 60_000) && is_too_old(&config, 60_001));
        for attempt in [Attempt::TooOld, failed()] {
            let Next::End(Some((_, record))) = follows(&event(0), &config, attempt) else {
                panic!("tried again")
            };
            let record: Value = serde_json::from_slice(&record).unwrap();
            assert_eq!(record["requestContext"]["condition"], "EventAgeExceeded");
        }
    }

    #[test]
    fn a_function_that_may_not_run_at_all_is_given_up_at_once() {
        let config = EventConfig {
            on_failure: Some("bad".to_owned()),
            ..EventConfig::default()
        };
        let Next::End(Some((_, record))) = follows(&event(0), &config, Attempt::Barred) else {
            panic!("tried again")
        };
        let record: Value = serde_json::from_slice(&record).unwrap();
        let context = &record["requestContext"];
        assert_eq!(context["condition"], "ZeroReservedConcurrency");
        assert_eq!(context["approximateInvokeCount"], 0);
        assert!(record.get("responseContext").is_none() && record.get("responsePayload").is_none());
    }

    #[test]
    fn a_record_is_delivered_or_given_up_in_the_end() {
        let config = EventConfig::default();
        let record = Event {
            url: Some("http://h/".to_owned()),
            ..event(0)
        };
        assert_eq!(
            follows(&record, &config, Attempt::Delivered),
            Next::End(None)
        );
        let unreachable = || Attempt::Unreachable("down".to_owned());
        assert!(matches!(
            follows(&record, &config, unreachable()),
            Next::Again(_)
        ));
        let old = Event {
            received_unix_ms: -i64::from(AGE_SECONDS_MAX) * 1000,
            ..record
        };
        assert_eq!(follows(&old, &config, unreachable()), Next::End(None));
    }
}
