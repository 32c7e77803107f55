//! One invocation, whichever door it came through: find the sandboxes, run, write the log, sort the outcome.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use thaw_runtime::{
    End, ExitReason, Invocation, InvocationTimings, InvokeError, Measure, Outcome, Start,
    StreamPart, ThrottleReason,
};

use tokio::sync::mpsc;

use crate::auth::quota::{Exceeded, Quota};
use crate::clock;
use crate::deploy;
use crate::engine::{Sandboxes, chain};
use crate::logs::Write;
use crate::record::{self, InitCause, InitFailure, Serving, State, Version, VersionId};
use crate::state::{App, Live, LiveFunction, PoolSlot};

pub mod complaints;
pub mod duplicates;
pub mod fault;
pub mod report;
pub mod running;

use complaints::Telling;
use report::{Report, Status};

/// Lambda's limit for a synchronous request, bytes.
pub const PAYLOAD_BYTES_MAX: usize = 6 * 1024 * 1024;

/// Lambda's limit for a response, bytes.
pub const RESPONSE_BYTES_MAX: usize = 6_291_556;

/// How long lines wait to be written with others'.
const LOG_DELAY: Duration = Duration::from_millis(10);

/// Pools of one function that an invocation tries: an update may close one under it.
const POOLS_MAX: usize = 3;

/// A request to a function.
#[derive(Clone, Debug)]
pub struct Request {
    /// Unique.
    pub request_id: String,
    /// ARN as the function sees it.
    pub function_arn: String,
    /// The event, JSON.
    pub payload: Bytes,
    /// Decoded JSON.
    pub client_context: Option<String>,
    /// `X-Amzn-Trace-Id`.
    pub trace_id: Option<String>,
    /// Whether timings are wanted.
    pub measure: Measure,
    /// What its caller's key may use.
    pub quota: Option<Quota>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Which version answered.
    pub version: VersionId,
    /// Answer or error.
    pub result: FunctionResult,
    /// SnapStart's hooks after the restore failed, and the function did not run. Hooks of a function without SnapStart are its
    /// own, and so are their errors.
    pub restore: Option<RestoreFault>,
    /// START, output, END, REPORT.
    pub log: Bytes,
    /// With [`Measure::On`], when the guest answered.
    pub timings: Option<InvocationTimings>,
    /// How its sandbox was had; `None` when the function's initialisation had failed, and nothing ran.
    pub start: Option<Start>,
}

/// How SnapStart's hooks after the restore failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreFault {
    /// One of them raised.
    Error,
    /// They took longer than they may.
    TimedOut,
}

/// A function's answer or error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FunctionResult {
    /// It answered.
    Response(Bytes),
    /// It failed.
    Error {
        /// The error's type, when known.
        error_type: String,
        /// JSON.
        document: Bytes,
    },
}

/// Why it did not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The function is Pending or Failed.
    Inactive(State),
    /// The function runs as often as is reserved for it.
    Reserved,
    /// The caller's key has as much at once as it may.
    Quota(Exceeded),
    /// Too many at once of this function; why, for people.
    Throttled(String),
    /// The machine has no room for it; why, for people.
    Full(String),
    /// The payload does not fit.
    TooLarge,
    /// The function was deleted meanwhile.
    Gone,
    /// The client of a stream went away before its end; the function was ended.
    Abandoned,
    /// This machine failed, and how.
    Host(String),
    /// The gateway is ending.
    Stopping,
}

/// Runs one invocation. It goes on to its end even when the caller goes away, as Lambda's do; its log is kept.
///
/// # Errors
/// See [`Refusal`].
pub async fn run(
    app: &Arc<App>,
    function: &Arc<LiveFunction>,
    live: &Arc<Live>,
    request: Request,
) -> Result<Answer, Refusal> {
    go(app, function, live, request, None).await
}

/// Runs one invocation and hands on its answer as it comes; what is returned then has an empty one. When the receiver of `sink`
/// is dropped, the invocation ends. A function that fails before it answers sends nothing.
///
/// # Errors
/// See [`Refusal`].
pub async fn run_streaming(
    app: &Arc<App>,
    function: &Arc<LiveFunction>,
    live: &Arc<Live>,
    request: Request,
    sink: mpsc::Sender<StreamPart>,
) -> Result<Answer, Refusal> {
    go(app, function, live, request, Some(sink)).await
}

async fn go(
    app: &Arc<App>,
    function: &Arc<LiveFunction>,
    live: &Arc<Live>,
    request: Request,
    sink: Option<mpsc::Sender<StreamPart>>,
) -> Result<Answer, Refusal> {
    let running = function.enter(live.id).ok_or(Refusal::Reserved)?;
    let quota = request.quota.as_ref();
    let entered = quota.map(|quota| quota.enter(live.record().memory_mib()));
    let entered = entered.transpose().map_err(Refusal::Quota)?;
    let (app, live) = (Arc::clone(app), Arc::clone(live));
    let tasks = app.tasks.clone();
    tasks
        .spawn(async move {
            let _counted = (running, entered);
            let answer = serve(&app, &live, request, sink).await;
            if let Err(Refusal::Host(reason)) = &answer {
                complain(&app, &live, reason);
                live.set_last_error(Some(reason.clone()));
            }
            answer
        })
        .await
        .unwrap_or_else(|_| Err(Refusal::Host("the invocation's task died".to_owned())))
}

/// Logs that this machine failed an invocation: what fails each request would fill the log.
fn complain(app: &App, live: &Arc<Live>, reason: &str) {
    match live.complaints().hear(reason, Instant::now()) {
        Telling::Now => {
            tracing::error!(function = %live.label, %reason, "invocation failed on this machine");
        }
        Telling::After(wait, reason) => {
            let live = Arc::clone(live);
            app.tasks.spawn(async move {
                tokio::time::sleep(wait).await;
                let count = live.complaints().take(&reason, Instant::now());
                tracing::error!(function = %live.label, count, %reason, "more invocations failed on this machine");
            });
        }
        Telling::Counted => {}
    }
}

async fn serve(
    app: &Arc<App>,
    live: &Arc<Live>,
    request: Request,
    sink: Option<mpsc::Sender<StreamPart>>,
) -> Result<Answer, Refusal> {
    let record = deploy::settled(app, live).await;
    let Some(serving) = &record.serving else {
        return Err(match &record.state {
            _ if !app.is_current(live) => Refusal::Gone,
            State::Active => Refusal::Inactive(State::Pending),
            state => Refusal::Inactive(state.clone()),
        });
    };
    let mut late_log = None;
    let answer = match &serving.outcome {
        record::Outcome::InitFailed(failure) => init_failed(&request, live.id, serving, failure),
        record::Outcome::Frozen(_) => {
            let mut outcome = attempt(app, live, &record, serving, &request, sink).await?;
            late_log = outcome.late_log.take();
            sort(&request, live.id, serving, outcome)?
        }
    };
    if let FunctionResult::Error {
        error_type,
        document,
    } = &answer.result
    {
        let document = String::from_utf8_lossy(document.get(..1024).unwrap_or(document));
        live.set_last_error(Some(format!("{error_type}: {document}")));
    }
    keep_log(app, live, answer.log.clone()).await;
    if let Some(late_log) = late_log {
        let (app, live) = (Arc::clone(app), Arc::clone(live));
        let tasks = app.tasks.clone();
        tasks.spawn(async move {
            let log = late_log.whole().await;
            if !log.is_empty() {
                keep_log(&app, &live, log.into()).await;
            }
        });
    }
    Ok(answer)
}

/// Writes to a function's log.
pub(crate) async fn keep_log(app: &Arc<App>, live: &Arc<Live>, text: Bytes) {
    match live.log.push(text) {
        Write::Others => {}
        Write::Now => write_log(Arc::clone(live)).await,
        Write::Soon => {
            let live = Arc::clone(live);
            app.tasks.spawn(async move {
                tokio::time::sleep(LOG_DELAY).await;
                write_log(live).await;
            });
        }
    }
}

async fn write_log(live: Arc<Live>) {
    let write = move || {
        if let Err(error) = live.log.write() {
            tracing::warn!(function = %live.label, %error, "log is not written");
        }
    };
    // Fails only if it panics, which is told by then.
    let _ = tokio::task::spawn_blocking(write).await;
}

/// Runs in the function's pool; in its successor when an update closes it first.
async fn attempt(
    app: &Arc<App>,
    live: &Arc<Live>,
    record: &Version,
    serving: &Serving,
    request: &Request,
    sink: Option<mpsc::Sender<StreamPart>>,
) -> Result<Outcome, Refusal> {
    let deadline = Instant::now() + app.limits.queue_wait_max;
    let mut closed: Option<Arc<dyn Sandboxes>> = None;
    for _ in 0..POOLS_MAX {
        let pool = pool(app, live, closed.as_ref(), deadline).await?;
        let invocation = Invocation {
            request_id: request.request_id.clone(),
            function_arn: request.function_arn.clone(),
            payload: request.payload.clone(),
            timeout: Duration::from_secs(serving.revision.settings.timeout_seconds.into()),
            client_context: request.client_context.clone(),
            cognito_identity: None,
            trace_id: request.trace_id.clone(),
            measure: request.measure,
        };
        let ended = match &sink {
            Some(sink) => pool.invoke_streaming(invocation, sink.clone()).await,
            None => pool.invoke(invocation).await,
        };
        match ended {
            Ok(outcome) => return Ok(outcome),
            Err(InvokeError::Closed) => closed = Some(pool),
            Err(InvokeError::Throttled {
                reason,
                running,
                waiting,
            }) => return Err(throttled(reason, running, waiting)),
            Err(InvokeError::TooLarge(_)) => return Err(Refusal::TooLarge),
            Err(error)
                if error.refuses_snapshot()
                    && deploy::replace_refused(app, live, &pool, chain(&error)) =>
            {
                closed = Some(pool);
            }
            Err(InvokeError::Abandoned) => return Err(Refusal::Abandoned),
            Err(error @ InvokeError::Host(_)) => {
                let reason = chain(&error);
                // For those that come: this request may have run.
                deploy::replace_harmed(app, live, &pool, &reason).await;
                return Err(Refusal::Host(reason));
            }
        }
    }
    Err(Refusal::Host(format!(
        "the pool of {} closed {POOLS_MAX} times",
        record.name
    )))
}

/// The function's own limits are its callers' to keep; that the machine is full is not.
fn throttled(reason: ThrottleReason, running: usize, waiting: usize) -> Refusal {
    let text = format!("{reason}; of this function {running} run and {waiting} wait");
    match reason {
        ThrottleReason::QueueFull | ThrottleReason::WaitedTooLong => Refusal::Throttled(text),
        ThrottleReason::MachineFull | ThrottleReason::TooBig => Refusal::Full(text),
    }
}

/// The function's open pool, other than `closed`; waits for one that is being opened.
async fn pool(
    app: &App,
    live: &Arc<Live>,
    closed: Option<&Arc<dyn Sandboxes>>,
    deadline: Instant,
) -> Result<Arc<dyn Sandboxes>, Refusal> {
    let mut slot = live.pool.subscribe();
    loop {
        match &*slot.borrow_and_update() {
            PoolSlot::Open(pool) if closed.is_none_or(|closed| !Arc::ptr_eq(closed, pool)) => {
                return Ok(Arc::clone(pool));
            }
            PoolSlot::Failed(reason) => return Err(Refusal::Host(reason.clone())),
            PoolSlot::Open(_) | PoolSlot::Closed | PoolSlot::Opening => {}
        }
        if app.stop.is_cancelled() {
            return Err(Refusal::Stopping);
        }
        if !app.is_current(live) {
            return Err(Refusal::Gone);
        }
        tokio::select! {
            changed = slot.changed() => changed.map_err(|_| Refusal::Gone)?,
            () = app.stop.cancelled() => return Err(Refusal::Stopping),
            () = tokio::time::sleep_until(deadline.into()) => {
                return Err(Refusal::Throttled("the function was not ready in time".to_owned()));
            }
        }
    }
}

fn sort(
    request: &Request,
    version: VersionId,
    serving: &Serving,
    outcome: Outcome,
) -> Result<Answer, Refusal> {
    let id = &request.request_id;
    let settings = &serving.revision.settings;
    let limit = Duration::from_secs(settings.timeout_seconds.into());
    let restore = match outcome.end {
        End::RestoreError { .. } if settings.snap_start => Some(RestoreFault::Error),
        End::RestoreTimedOut if settings.snap_start => Some(RestoreFault::TimedOut),
        _ => None,
    };
    let (result, note, status) = match outcome.end {
        End::Response { payload, .. } if payload.len() > RESPONSE_BYTES_MAX => {
            (too_large(), None, None)
        }
        End::Response { payload, .. } => (FunctionResult::Response(payload), None, None),
        End::FunctionError {
            error_type,
            document,
        } => {
            let error_type = error_type.unwrap_or_else(|| "Unhandled".to_owned());
            let result = FunctionResult::Error {
                error_type,
                document,
            };
            (result, None, None)
        }
        End::RestoreError {
            error_type,
            document,
        } => {
            let result = FunctionResult::Error {
                error_type,
                document,
            };
            (result, None, None)
        }
        ref end @ (End::TimedOut | End::RestoreTimedOut) => {
            let fault = match end {
                End::RestoreTimedOut => fault::restore_timed_out(),
                _ => fault::timed_out(limit),
            };
            let stamp = clock::log_stamp(clock::unix_ms());
            let note = format!("{stamp} {id} {}\n", fault.text);
            (platform(&fault, id), Some(note), Some("timeout"))
        }
        End::RuntimeExit(exit) => {
            let fault = fault::exit(&exit);
            let note = format!("{}\n{}", fault.message(id), fault.error_type);
            let status = fault.error_type;
            (platform(&fault, id), Some(note), Some(status))
        }
        End::GuestDied {
            reason: ExitReason::HostFault,
            detail,
            ..
        } => {
            return Err(Refusal::Host(format!(
                "this host failed the sandbox: {detail}"
            )));
        }
        End::GuestDied {
            reason,
            detail,
            console,
        } => {
            let fault = fault::death(reason, &detail, &console);
            let note = format!("{}\n{}", fault.message(id), fault.error_type);
            let status = fault.error_type;
            (platform(&fault, id), Some(note), Some(status))
        }
    };
    let report = Report {
        request_id: id,
        version,
        output: &outcome.log,
        note: note.as_deref(),
        duration: outcome.duration,
        memory_mib: settings.memory_mib,
        status: match status {
            None => Status::Completed,
            Some("timeout") => Status::TimedOut,
            Some(error_type) => Status::Failed(error_type),
        },
        logging: &settings.logging,
    };
    Ok(Answer {
        version,
        result,
        restore,
        log: report.text().into(),
        timings: outcome.timings,
        start: Some(outcome.start),
    })
}

fn platform(fault: &fault::PlatformFault, request_id: &str) -> FunctionResult {
    FunctionResult::Error {
        error_type: fault.error_type.to_owned(),
        document: fault.document(request_id),
    }
}

fn too_large() -> FunctionResult {
    let error_type = "Function.ResponseSizeTooLarge";
    let message = format!(
        "Response payload size exceeded maximum allowed payload size ({RESPONSE_BYTES_MAX} bytes)."
    );
    let document = serde_json::json!({"errorType": error_type, "errorMessage": message});
    FunctionResult::Error {
        error_type: error_type.to_owned(),
        document: document.to_string().into(),
    }
}

fn init_failed(
    request: &Request,
    version: VersionId,
    serving: &Serving,
    failure: &InitFailure,
) -> Answer {
    let id = &request.request_id;
    let (error_type, document) = match &failure.cause {
        InitCause::Document {
            error_type,
            document,
        } => (error_type, Bytes::from(document.clone())),
        InitCause::Found { error_type, text } => {
            (error_type, fault::document(error_type, id, text))
        }
    };
    let note = match &failure.cause {
        InitCause::Document { .. } => None,
        InitCause::Found { text, .. } => Some(fault::message(id, text)),
    };
    let report = Report {
        request_id: id,
        version,
        output: failure.log.as_bytes(),
        note: note.as_deref(),
        duration: Duration::ZERO,
        memory_mib: serving.revision.settings.memory_mib,
        status: Status::Failed(error_type),
        logging: &serving.revision.settings.logging,
    };
    Answer {
        version,
        result: FunctionResult::Error {
            error_type: error_type.clone(),
            document,
        },
        restore: None,
        log: report.text().into(),
        timings: None,
        start: None,
    }
}
