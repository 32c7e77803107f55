//! Asynchronous invocations: accepted once the database has them, carried out until they end, at least once.
//!
//! **Invariant:** an event that was acknowledged stays in the database until its last attempt has ended and what its destination gets
//! is there in its place: `acknowledged_events_survive_a_restart_and_reach_their_destination`. Events of one function wait in a line
//! of their own, so that no function's failures delay another's.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thaw_runtime::Point;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock;
use crate::engine::chain;
use crate::invocation::{self, Refusal, Request};
use crate::lambda;
use crate::lambda::names::FunctionRef;
use crate::state::{App, LiveFunction};
use crate::store::{StoreError, Write};

pub mod destination;
pub mod outcome;

use destination::Target;
use outcome::{Attempt, Next};

/// Largest event, bytes; Lambda's limit.
pub const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// Events of one function that wait; more are refused.
const WAITING_MAX: usize = 100_000;

/// What their payloads may weigh together, bytes: they are on the disk that all functions share.
const WAITING_BYTES_MAX: u64 = 1 << 30;

/// Events of one function that run at once: invocations that somebody waits for share the function's sandboxes with them.
const RUNNING_MAX: usize = 8;

/// After a failure of the database, until the next look.
const STORE_PAUSE: Duration = Duration::from_secs(5);

/// One event in the database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Unique; `Lambda-Runtime-Aws-Request-Id` of all attempts.
    pub id: String,
    /// The function's bare name.
    pub function: String,
    /// As the client named it: `$LATEST`, a version or an alias.
    pub qualifier: Option<String>,
    /// Decoded JSON of the client context.
    #[serde(default)]
    pub client_context: Option<String>,
    /// `X-Amzn-Trace-Id`.
    #[serde(default)]
    pub trace_id: Option<String>,
    /// When it was accepted, milliseconds since the Unix epoch.
    pub received_unix_ms: i64,
    /// Not before then.
    pub due_unix_ms: i64,
    /// Attempts in which the function failed.
    #[serde(default)]
    pub failures: u32,
    /// Attempts that did not reach the function, one after another.
    #[serde(default)]
    pub deferrals: u32,
    /// How often each function ran in the chain of records that led here, before this event.
    #[serde(default)]
    pub lineage: BTreeMap<String, u32>,
    /// It is a record for this URL, not for the function: the function's invocation has ended.
    #[serde(default)]
    pub url: Option<String>,
    /// The key that it was accepted of: its quota is for attempts, too.
    pub key: Option<String>,
    /// Length of the payload.
    #[serde(default)]
    pub payload_bytes: u64,
    /// JSON.
    #[serde(skip)]
    pub payload: Bytes,
}

/// How asynchronous invocations of a function, or of one qualifier of it, are treated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventConfig {
    /// Milliseconds since the Unix epoch.
    pub modified_unix_ms: i64,
    /// Further attempts after the function failed, 0 to 2.
    pub retries_max: Option<u32>,
    /// Seconds, 60 to 21,600.
    pub age_max_seconds: Option<u32>,
    /// What gets a record of each success.
    pub on_success: Option<String>,
    /// What gets a record of each failure.
    pub on_failure: Option<String>,
}

/// The events of one function that wait, in memory: their ids, when they are due, and what they weigh.
#[derive(Debug, Default)]
pub struct Line {
    places: Mutex<Places>,
    wake: Notify,
    is_served: AtomicBool,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct Places {
    due: BinaryHeap<Reverse<Place>>,
    /// Of all.
    payload_bytes: u64,
}

/// An event's place in a line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    due_unix_ms: i64,
    id: String,
    payload_bytes: u64,
}

impl Place {
    fn of(event: &Event) -> Self {
        Self {
            due_unix_ms: event.due_unix_ms,
            id: event.id.clone(),
            payload_bytes: event.payload_bytes,
        }
    }
}

impl Places {
    fn push(&mut self, place: Place) {
        self.payload_bytes = self.payload_bytes.saturating_add(place.payload_bytes);
        self.due.push(Reverse(place));
    }
}

impl Line {
    /// A line with what the database has. What was written by a clock that has been set back since is due as late as anything
    /// may be.
    #[must_use]
    pub fn new(events: &[Event], now: i64) -> Self {
        let last = outcome::later(now, outcome::DEFER_MAX);
        let mut places = Places::default();
        for event in events {
            let place = Place::of(event);
            places.push(Place {
                due_unix_ms: place.due_unix_ms.min(last),
                ..place
            });
        }
        Self {
            places: Mutex::new(places),
            ..Self::default()
        }
    }

    /// Ends the line with its function; events that run may finish.
    pub fn close(&self) {
        self.closed.cancel();
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: &Event) {
        self.places().push(Place::of(event));
        self.wake.notify_one();
    }

    /// Events that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.places().due.len()
    }

    /// Whether one more may wait.
    fn check(&self) -> Result<(), AcceptError> {
        let places = self.places();
        if places.due.len() >= WAITING_MAX {
            return Err(AcceptError::TooMany(places.due.len()));
        }
        if places.payload_bytes >= WAITING_BYTES_MAX {
            return Err(AcceptError::TooLarge(places.payload_bytes));
        }
        Ok(())
    }

    /// The next event if it is due, or how long it is until then.
    fn next(&self, now: i64) -> Result<Place, Option<Duration>> {
        let mut places = self.places();
        match places.due.peek() {
            Some(Reverse(first)) if first.due_unix_ms > now => Err(Some(Duration::from_millis(
                (first.due_unix_ms - now).unsigned_abs(),
            ))),
            Some(_) => {
                let Some(Reverse(place)) = places.due.pop() else {
                    return Err(None);
                };
                places.payload_bytes = places.payload_bytes.saturating_sub(place.payload_bytes);
                Ok(place)
            }
            None => Err(None),
        }
    }
}

/// Why an event was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// So many of the function wait already.
    #[error("{0} events of this function wait already")]
    TooMany(usize),
    /// Those that wait weigh as much as they may.
    #[error("events of {0} bytes wait for this function already")]
    TooLarge(u64),
    /// The database refused.
    #[error("the event cannot be kept")]
    Store(#[from] StoreError),
}

/// Accepts an event: when this answers, it is in the database.
///
/// # Errors
/// See [`AcceptError`]; the event is not kept.
pub async fn accept(
    app: &Arc<App>,
    function: &Arc<LiveFunction>,
    event: &Event,
) -> Result<(), AcceptError> {
    function.events.check()?;
    app.store.commit(&[Write::Event(event)]).await?;
    Point::EventCommitted.reached();
    function.events.push(event);
    serve(app, function);
    Ok(())
}

/// Carries out a function's events, from now until the function or the gateway ends.
pub fn serve(app: &Arc<App>, function: &Arc<LiveFunction>) {
    if !function.events.is_served.swap(true, Ordering::Relaxed) {
        let (app, function) = (Arc::clone(app), Arc::clone(function));
        app.tasks.clone().spawn(work(app, function));
    }
}

async fn work(app: Arc<App>, function: Arc<LiveFunction>) {
    let line = &function.events;
    let mut running = JoinSet::new();
    loop {
        let wait = if running.len() < RUNNING_MAX {
            match line.next(clock::steady_unix_ms()) {
                Ok(place) => {
                    running.spawn(attempt(Arc::clone(&app), Arc::clone(&function), place));
                    continue;
                }
                Err(wait) => wait,
            }
        } else {
            None
        };
        tokio::select! {
            () = app.stop.cancelled() => break,
            () = line.closed.cancelled() => break,
            _ = running.join_next(), if !running.is_empty() => {}
            () = line.wake.notified() => {}
            () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
        }
    }
    // What runs ends by itself or, with the gateway, not at all: then it runs again after the next start.
    running.detach_all();
}

/// One attempt at an event, and what follows from it.
async fn attempt(app: Arc<App>, function: Arc<LiveFunction>, place: Place) {
    let event = match app.store.event(&place.id).await {
        Ok(Some(event)) => event,
        Ok(None) => return,
        Err(error) => {
            tracing::error!(event = %place.id, reason = %chain(&error), "event is not read");
            tokio::time::sleep(STORE_PAUSE).await;
            function.events.places().push(Place {
                due_unix_ms: clock::steady_unix_ms(),
                ..place
            });
            return;
        }
    };
    let config = config(&function, event.qualifier.as_deref());
    let age = || clock::lived_since(event.received_unix_ms);
    let attempt = if event.url.is_none() && outcome::is_too_old(&config, age()) {
        Attempt::TooOld
    } else if outcome::loops(&event) && !function.record().allows_loops {
        Attempt::Loop
    } else {
        match &event.url {
            Some(url) => destination::deliver(&app.courier, url, &event).await,
            None => invoke(&app, &function, &event).await,
        }
    };
    if app.stop.is_cancelled() {
        // A gateway that ends refuses everything: that says nothing of the event.
        return;
    }
    let arn = arn(&app, &event);
    let next = outcome::decide(
        &event,
        &config,
        &app.limits.event_retries,
        attempt,
        &arn,
        (clock::steady_unix_ms(), age()),
    );
    Point::EventAttempted.reached();
    settle(&app, &function, event, next).await;
}

/// Commits what follows from an attempt, until the database takes it or the function is gone, and its events with it.
async fn settle(app: &Arc<App>, function: &Arc<LiveFunction>, event: Event, next: Next) {
    let (again, record) = match next {
        Next::Again(event) => (Some(event), None),
        Next::End(record) => (None, record),
    };
    loop {
        // Found anew each time: a destination may go while the database refuses.
        let follower = match (&again, &record) {
            (Some(event), _) => Some((Arc::clone(function), event.clone())),
            (None, Some((to, payload))) => follower(app, &event, to, payload.clone()),
            (None, None) => None,
        };
        let mut writes = Vec::new();
        if again.is_none() {
            writes.push(Write::RemoveEvent(&event.id));
        }
        if let Some((_, next)) = &follower {
            writes.push(Write::Event(next));
        }
        let Err(error) = app.store.commit(&writes).await else {
            Point::EventSettled.reached();
            if let Some((function, next)) = &follower {
                function.events.push(next);
                serve(app, function);
            }
            return;
        };
        if function.events.closed.is_cancelled() {
            return;
        }
        tracing::error!(event = %event.id, reason = %chain(&error), "end of an attempt is not committed, and is tried again");
        tokio::time::sleep(STORE_PAUSE).await;
    }
}

/// The event that takes a record to its destination, and in whose line it waits.
fn follower(
    app: &Arc<App>,
    event: &Event,
    to: &str,
    payload: Bytes,
) -> Option<(Arc<LiveFunction>, Event)> {
    let now = clock::steady_unix_ms();
    let mut lineage = event.lineage.clone();
    *lineage.entry(event.function.clone()).or_default() += 1;
    let next = |function: &str, qualifier, url| Event {
        id: Uuid::new_v4().to_string(),
        function: function.to_owned(),
        qualifier,
        client_context: None,
        trace_id: event.trace_id.clone(),
        received_unix_ms: now,
        due_unix_ms: now,
        failures: 0,
        deferrals: 0,
        lineage,
        url,
        key: event.key.clone(),
        payload_bytes: payload.len() as u64,
        payload,
    };
    let (name, qualifier, url) = match destination::parse(app, to) {
        Ok(Target::Url(url)) => (event.function.clone(), None, Some(url)),
        Ok(Target::Function(reference)) => (reference.name, reference.qualifier, None),
        Err(reason) => {
            tracing::error!(event = %event.id, to, %reason, "destination is not there any more");
            return None;
        }
    };
    let Some(function) = app.find(&name) else {
        tracing::error!(event = %event.id, to, "destination is not there any more");
        return None;
    };
    Some((function, next(&name, qualifier, url)))
}

async fn invoke(app: &Arc<App>, function: &Arc<LiveFunction>, event: &Event) -> Attempt {
    let reference = reference(event);
    let found = match lambda::find(app, reference) {
        Ok(found) if Arc::ptr_eq(&found.function, function) => found,
        // The version or the alias is gone; or the function, and with it the event.
        _ => {
            return Attempt::Unreachable("the function's version is not there any more".to_owned());
        }
    };
    let live = found.pick();
    let request = Request {
        request_id: event.id.clone(),
        function_arn: found.arn(app),
        payload: event.payload.clone(),
        client_context: event.client_context.clone(),
        trace_id: event.trace_id.clone(),
        measure: thaw_runtime::Measure::Off,
        quota: (event.key.as_deref()).and_then(|key| app.auth.quota_of(key)),
    };
    match invocation::run(app, function, &live, request).await {
        Ok(answer) => Attempt::Answered {
            version: answer.version,
            result: answer.result,
        },
        Err(Refusal::Reserved) if function.record().reserved_concurrency == Some(0) => {
            Attempt::Barred
        }
        Err(refusal) => Attempt::Unreachable(format!("{refusal:?}")),
    }
}

fn reference(event: &Event) -> FunctionRef {
    FunctionRef {
        name: event.function.clone(),
        qualifier: event.qualifier.clone(),
        region: None,
        account: None,
    }
}

/// The ARN in records: always with a qualifier.
fn arn(app: &App, event: &Event) -> String {
    let qualifier = event.qualifier.as_deref().unwrap_or("$LATEST");
    format!("{}:{qualifier}", app.arn(&event.function))
}

/// What applies to an event: that of its own qualifier.
fn config(function: &LiveFunction, qualifier: Option<&str>) -> EventConfig {
    let record = function.record();
    let qualifier = qualifier.unwrap_or("$LATEST");
    record
        .event_configs
        .get(qualifier)
        .cloned()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, due: i64) -> Event {
        Event {
            id: id.to_owned(),
            function: "f".to_owned(),
            qualifier: None,
            client_context: None,
            trace_id: None,
            received_unix_ms: 0,
            due_unix_ms: due,
            failures: 0,
            deferrals: 0,
            lineage: BTreeMap::new(),
            url: None,
            key: None,
            payload_bytes: 0,
            payload: Bytes::new(),
        }
    }

    #[test]
    fn a_line_gives_what_is_due_in_its_order() {
        let line = Line::new(&[event("late", 30), event("first", 5)], 0);
        line.push(&event("second", 6));
        assert_eq!(line.next(10), Ok(Place::of(&event("first", 5))));
        assert_eq!(line.next(10), Ok(Place::of(&event("second", 6))));
        assert_eq!(line.next(10), Err(Some(Duration::from_millis(20))));
        assert_eq!(line.next(30), Ok(Place::of(&event("late", 30))));
        assert_eq!(line.next(30), Err(None));
    }

    #[test]
    fn a_clock_that_was_set_back_by_hours_delays_an_event_by_minutes() {
        let (now, hours) = (1_000_000, 10 * 60 * 60 * 1000);
        let line = Line::new(&[event("ahead", now + hours)], now);
        let longest = outcome::DEFER_MAX;
        assert_eq!(line.next(now), Err(Some(longest)));
        let ahead = line.next(outcome::later(now, longest)).unwrap();
        assert_eq!(ahead.id, "ahead");
    }

    #[test]
    fn what_waits_has_a_bound_in_number_and_in_bytes_after_a_restart_too() {
        let heavy = |id: &str| Event {
            payload_bytes: WAITING_BYTES_MAX / 2,
            ..event(id, 0)
        };
        // As the database has it: without the payload itself.
        let text = serde_json::to_string(&heavy("first")).unwrap();
        let line = Line::new(&[serde_json::from_str(&text).unwrap()], 0);
        line.check().unwrap();
        line.push(&heavy("second"));
        assert!(matches!(
            line.check(),
            Err(AcceptError::TooLarge(WAITING_BYTES_MAX))
        ));
        line.next(0).unwrap();
        line.check().unwrap();
        (1..WAITING_MAX).for_each(|number| line.push(&event(&number.to_string(), 0)));
        assert!(matches!(
            line.check(),
            Err(AcceptError::TooMany(WAITING_MAX))
        ));
    }
}
