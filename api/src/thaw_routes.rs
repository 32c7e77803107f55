//! Thaw's own routes: health, the richer listing, deployments' progress, logs, code.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _};
use serde::Deserialize;
use thaw_api_types::thaw::{
    FunctionSummary, ListResponse, MachineSummary, PoolSummary, ProgressEvent, SnapshotSummary,
    Step,
};
use tokio::sync::broadcast::error::RecvError;

use crate::clock;
use crate::deploy::{self, CODE_ZIP};
use crate::function_url;
use crate::record::{self, LastUpdate, VersionId};
use crate::state::{App, Health, Live, PoolSlot};

/// Lines of a log's past, unless the client wants others.
const TAIL_LINES: usize = 100;

/// `GET /healthz`: 200 once functions can be invoked.
pub async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    let health = app.health.borrow().clone();
    match health {
        Health::Ready => text(StatusCode::OK, "ok\n".to_owned()),
        Health::NotReady(reason) => text(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {reason}\n"),
        ),
        Health::Stopping => text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned()),
    }
}

/// `GET /thaw/v1/functions`.
pub async fn list(State(app): State<Arc<App>>) -> Response<Body> {
    let functions = app
        .all()
        .iter()
        .map(|function| summary(&app, &function.latest))
        .collect();
    let now = app.engine.stats();
    let machine = MachineSummary {
        shells: u64::try_from(now.shells).unwrap_or(u64::MAX),
        memory_mib: now.memory_mib,
        memory_budget_mib: now.memory_budget_mib,
        vcpus: now.vcpus,
        vcpu_budget: now.vcpu_budget,
    };
    json(&ListResponse { functions, machine })
}

/// Which version of a function a client means.
#[derive(Debug, Deserialize)]
pub struct VersionQuery {
    /// `$LATEST`, unless it is given.
    #[serde(default)]
    version: VersionId,
}

/// One version of a function.
fn find(app: &App, name: &str, query: &VersionQuery) -> Option<Arc<Live>> {
    app.find(name)?.version(query.version)
}

/// `GET /thaw/v1/functions/{name}?version=N`.
pub async fn function(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    Query(query): Query<VersionQuery>,
) -> Response<Body> {
    match find(&app, &name, &query) {
        Some(live) => json(&summary(&app, &live)),
        None => missing(&name),
    }
}

/// `GET /thaw/v1/functions/{name}/code?version=N`: the zip.
pub async fn code(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    Query(query): Query<VersionQuery>,
) -> Response<Body> {
    let Some(live) = find(&app, &name, &query) else {
        return missing(&name);
    };
    let path = app
        .folder(&name)
        .join(&live.record().target.id)
        .join(CODE_ZIP);
    zip(&path).await
}

/// `GET /thaw/v1/layers/{name}/{version}/code`: the zip.
pub async fn layer_code(
    State(app): State<Arc<App>>,
    Path((name, number)): Path<(String, u64)>,
) -> Response<Body> {
    match app.layers.zip(&name, number) {
        Some(path) => zip(&path).await,
        None => text(
            StatusCode::NOT_FOUND,
            "there is no such layer version here\n".to_owned(),
        ),
    }
}

async fn zip(path: &std::path::Path) -> Response<Body> {
    match tokio::fs::read(path).await {
        Ok(zip) => {
            let mut response = Response::new(Body::from(zip));
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/zip"),
            );
            response
        }
        Err(error) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("cannot read {}: {error}\n", path.display()),
        ),
    }
}

/// What a client wants of a log.
#[derive(Debug, Deserialize)]
pub struct LogQuery {
    /// Keep the stream open.
    #[serde(default)]
    follow: bool,
    /// Lines of the past.
    tail: Option<usize>,
}

/// `GET /thaw/v1/functions/{name}/logs?follow=true&tail=N`.
pub async fn logs(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Response<Body> {
    let Some(function) = app.find(&name) else {
        return missing(&name);
    };
    let log = Arc::clone(&function.log);
    let lines = query.tail.unwrap_or(TAIL_LINES);
    let read = tokio::task::spawn_blocking(move || log.tail(lines)).await;
    let (past, follower) = match read {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            return text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("cannot read the log: {error}\n"),
            );
        }
        Err(_) => {
            return text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "cannot read the log\n".to_owned(),
            );
        }
    };
    let body = if query.follow {
        let past = stream::once(async move { Bytes::from(past) });
        // The function's own end closes its channel once nobody holds it: so this stream must not.
        drop(function);
        let news = stream::unfold(follower, |mut follower| async move {
            let piece = match follower.recv().await {
                Ok(piece) => piece,
                Err(RecvError::Lagged(count)) => Bytes::from(format!(
                    "… {count} entries were lost, the reader is too slow …\n"
                )),
                Err(RecvError::Closed) => return None,
            };
            Some((piece, follower))
        });
        streamed(&app, past.chain(news))
    } else {
        Body::from(past)
    };
    typed(body, "text/plain; charset=utf-8")
}

/// `GET /thaw/v1/functions/{name}/progress?version=N`: one JSON document a line, from the beginning of the newest deployment.
pub async fn progress(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    Query(query): Query<VersionQuery>,
) -> Response<Body> {
    let Some(live) = find(&app, &name, &query) else {
        return missing(&name);
    };
    let body = match ended(&live) {
        Some(event) => Body::from(line(&event)),
        None => {
            let cursor = live.progress.subscribe();
            let events = stream::unfold(Some((live, cursor)), |state| async move {
                let (live, mut cursor) = state?;
                let event = live.progress.next(&mut cursor).await?;
                let next = (!event.done).then_some((live, cursor));
                Some((line(&event), next))
            });
            streamed(&app, events)
        }
    };
    typed(body, "application/x-ndjson")
}

/// The last line of a deployment that ended before this gateway started.
fn ended(live: &Live) -> Option<ProgressEvent> {
    if !live.progress.is_empty() {
        return None;
    }
    let record = live.record();
    if record.last_update == Some(LastUpdate::InProgress) {
        return None;
    }
    match (&record.state, &record.serving) {
        (record::State::Active, Some(serving)) => Some(deploy::done_event(&serving.outcome)),
        (record::State::Failed(reason) | record::State::InitFailed(reason), _) => {
            Some(ProgressEvent {
                step: Step::Failed,
                message: "deployment failed".to_owned(),
                done: true,
                error: Some(reason.clone()),
                ..ProgressEvent::default()
            })
        }
        _ => None,
    }
}

fn line(event: &ProgressEvent) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

fn summary(app: &App, live: &Live) -> FunctionSummary {
    let record = live.record();
    let settings = &record.target.settings;
    let (mut init_error, mut snapshot, mut snapshot_path) = (None, None, None);
    match record.serving.as_ref().map(|serving| &serving.outcome) {
        Some(record::Outcome::InitFailed(failure)) => {
            init_error = Some(deploy::init_summary(failure));
        }
        Some(record::Outcome::Frozen(artifact)) => {
            snapshot_path = Some(artifact.snapshot.display().to_string());
            snapshot = Some(SnapshotSummary {
                file_bytes: artifact.file_bytes,
                stored_bytes: artifact.stored_bytes,
            });
        }
        None => {}
    }
    FunctionSummary {
        arn: app.arn(&record.name),
        url_path: format!("{}{}/", function_url::PREFIX, record.name),
        runtime: settings.runtime.clone(),
        handler: settings.handler.clone(),
        state: record.state.word().to_owned(),
        state_reason: match &record.state {
            record::State::Failed(reason) | record::State::InitFailed(reason) => {
                Some(reason.clone())
            }
            record::State::Pending => Some("The function is being created.".to_owned()),
            record::State::Active => None,
        },
        last_update_status: record.last_update.as_ref().map(|u| u.word().to_owned()),
        init_error,
        memory_mib: settings.memory_mib,
        timeout_seconds: settings.timeout_seconds,
        code_bytes: record.target.code.bytes,
        code_sha256: record.target.code.sha256.clone(),
        last_modified: clock::last_modified(record.modified_unix_ms),
        revision: record.serving.as_ref().map(|s| s.revision.id.clone()),
        snapshot_path,
        snapshot,
        pool: pool_summary(live),
        last_error: live.last_error(),
        name: record.name.clone(),
    }
}

fn pool_summary(live: &Live) -> PoolSummary {
    let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let state = |word: &str| PoolSummary {
        state: word.to_owned(),
        ..PoolSummary::default()
    };
    match &*live.pool.borrow() {
        PoolSlot::Closed => state("closed"),
        PoolSlot::Opening => state("opening"),
        PoolSlot::Failed(_) => state("failed"),
        PoolSlot::Open(pool) => {
            let stats = pool.stats();
            PoolSummary {
                ready: number(stats.ready),
                running: number(stats.running),
                waiting: number(stats.waiting),
                invocations: stats.invocations,
                cold: stats.cold,
                claimed: stats.claimed,
                rewound: stats.rewound,
                rewind_failures: stats.rewind_failures,
                ..state("open")
            }
        }
    }
}

/// A body that ends with the gateway.
fn streamed(app: &App, pieces: impl Stream<Item = Bytes> + Send + 'static) -> Body {
    let stop = app.stop.clone();
    let pieces = pieces
        .take_until(async move { stop.cancelled().await })
        .map(Ok::<_, Infallible>);
    Body::from_stream(pieces)
}

fn missing(name: &str) -> Response<Body> {
    let shown: String = name.chars().take(64).collect();
    text(
        StatusCode::NOT_FOUND,
        format!("there is no function {shown:?} here\n"),
    )
}

fn text(status: StatusCode, text: String) -> Response<Body> {
    let mut response = typed(Body::from(text), "text/plain; charset=utf-8");
    *response.status_mut() = status;
    response
}

fn json<T: serde::Serialize>(value: &T) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => typed(Body::from(bytes), "application/json"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn typed(body: Body, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
