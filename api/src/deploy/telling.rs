//! What a deployment tells, while it goes on and at its end: whose fault a failure is, and what helps.

use std::time::Duration;

use thaw_api_types::thaw::{InitErrorSummary, ProgressEvent, SnapshotSummary, Step};
use thaw_runtime::FreezeError;

use crate::engine::{Artifact, EngineError, EngineStep, chain};
use crate::invocation::fault;
use crate::record::{InitCause, InitFailure, Outcome};
use crate::state::Live;

/// Most of an initialisation's output that the database keeps, bytes.
const INIT_LOG_BYTES_MAX: usize = 64 * 1024;

/// Sorts the function's own failures from this machine's.
pub(super) fn init_failure(
    error: FreezeError,
    limit: Duration,
) -> Result<InitFailure, FreezeError> {
    let (cause, log) = match error {
        // The agent's own finding, which is told with each request's id.
        FreezeError::Init(failure) if failure.error_type.starts_with("Extension.") => (
            InitCause::Found {
                text: fault::text_of(&failure.document),
                error_type: failure.error_type,
            },
            failure.log,
        ),
        FreezeError::Init(failure) => (
            InitCause::Document {
                error_type: failure.error_type,
                document: String::from_utf8_lossy(&failure.document).into_owned(),
            },
            failure.log,
        ),
        FreezeError::RuntimeExit { exit, log } => (fault::exit(&exit).into(), log),
        // A guest that did not even boot within its limit is no fault of the function.
        FreezeError::TimedOut {
            waiting_for,
            log,
            console,
            ..
        } if waiting_for.contains("init") || waiting_for.contains("ready") => {
            let _ = console;
            (fault::init_timed_out(limit).into(), log)
        }
        FreezeError::GuestDied {
            reason,
            detail,
            console,
        } if reason != thaw_runtime::ExitReason::HostFault => {
            let death = fault::death(reason, &detail, &console);
            (death.into(), console.into_bytes())
        }
        error => return Err(error),
    };
    Ok(InitFailure {
        cause,
        log: tail(&log),
    })
}

/// Text for people, with what they can do about it.
pub(super) fn explain(error: &EngineError) -> String {
    let text = chain(error);
    match error {
        EngineError::Freeze(FreezeError::DiskFull { path }) => format!(
            "no space left for {}: free some on that file system, then deploy again",
            path.display()
        ),
        EngineError::Freeze(FreezeError::TimedOut { console, .. }) => {
            format!(
                "{text}; the guest's console ends with: {}",
                fault::last_line(console)
            )
        }
        EngineError::Image { .. } => {
            format!(
                "{text}; `thaw up` builds what is missing, `thaw doctor` says what this machine lacks"
            )
        }
        _ => text,
    }
}

pub(super) fn bounded(artifact: Artifact) -> Artifact {
    Artifact {
        init_log: tail(artifact.init_log.as_bytes()),
        ..artifact
    }
}

fn tail(log: &[u8]) -> String {
    let start = log.len().saturating_sub(INIT_LOG_BYTES_MAX);
    String::from_utf8_lossy(log.get(start..).unwrap_or_default()).into_owned()
}

pub(super) fn tell(live: &Live, step: EngineStep) {
    let (step, message) = match step {
        EngineStep::Images => (Step::Images, "kernel and runtime image"),
        EngineStep::Image(step) => {
            tracing::info!(function = %live.label, %step, "the runtime's image is made");
            live.progress
                .push(Step::Images, &format!("runtime image: {step}"));
            return;
        }
        EngineStep::Code => (Step::Code, "make the code image"),
        EngineStep::Booting => (Step::Booting, "boot the guest"),
        EngineStep::AgentUp => (Step::Agent, "agent is up"),
        EngineStep::Initializing => (Step::Initializing, "initialise the function"),
        EngineStep::Ready => (Step::Ready, "function waits for its first event"),
        EngineStep::Saving => (Step::Saving, "write the snapshot"),
        EngineStep::Saved {
            file_bytes,
            stored_bytes,
        } => {
            live.progress.push_event(ProgressEvent {
                step: Step::Saving,
                message: "snapshot is written".to_owned(),
                snapshot: Some(SnapshotSummary {
                    file_bytes,
                    stored_bytes,
                }),
                ..ProgressEvent::default()
            });
            return;
        }
    };
    live.progress.push(step, message);
}

/// The last line of a successful deployment.
#[must_use]
pub fn done_event(outcome: &Outcome) -> ProgressEvent {
    let (message, init_error, snapshot) = match outcome {
        Outcome::Frozen(artifact) => (
            "function is ready",
            None,
            Some(SnapshotSummary {
                file_bytes: artifact.file_bytes,
                stored_bytes: artifact.stored_bytes,
            }),
        ),
        Outcome::InitFailed(failure) => (
            "function is deployed, but fails to initialise",
            Some(init_summary(failure)),
            None,
        ),
    };
    ProgressEvent {
        step: Step::Active,
        message: message.to_owned(),
        done: true,
        init_error,
        snapshot,
        ..ProgressEvent::default()
    }
}

/// A failed initialisation, briefly.
#[must_use]
pub fn init_summary(failure: &InitFailure) -> InitErrorSummary {
    InitErrorSummary {
        error_type: failure.cause.error_type().to_owned(),
        message: failure.cause.message(),
        log: failure.log.clone(),
    }
}

pub(super) fn failed_event(live: &Live, reason: String) {
    live.progress.push_event(ProgressEvent {
        step: Step::Failed,
        message: "deployment failed".to_owned(),
        done: true,
        error: Some(reason),
        ..ProgressEvent::default()
    });
}
