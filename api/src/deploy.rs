//! Deployments: from an accepted revision to one that serves, and the way back after a restart.
//!
//! **Invariant:** a function serves its old revision until the new one's pool is open and committed. **Invariant:** a
//! failure of the function itself makes a function that answers with its error; only a failure of this machine makes one
//! that is Failed.

use std::sync::Arc;
use std::time::Duration;

use thaw_api_types::thaw::Step;
use thaw_runtime::{Learn, Point, PoolSpec};

use crate::engine::{Artifact, EngineError, EngineStep, FreezeJob, Sandboxes, chain};
use crate::environment;
use crate::events;
use crate::invocation;
use crate::record::{LastUpdate, Outcome, Revision, Serving, State, Version, VersionId};
use crate::state::{App, Health, Live, PoolSlot};

mod leftovers;
mod telling;

pub use leftovers::{clean, discard};
pub(crate) use leftovers::{entries, remove};
use telling::{bounded, explain, failed_event, init_failure, tell};
pub use telling::{done_event, init_summary};

/// Names within a revision's folder.
pub const CODE_ZIP: &str = "code.zip";

/// Name of a layer's zip within a revision's folder, by its place in the order, from 0.
#[must_use]
pub fn layer_zip(place: usize) -> String {
    format!("layer-{}.zip", place + 1)
}

/// First and longest wait between two attempts to prepare the images.
const PREPARE_RETRY_FIRST: Duration = Duration::from_secs(2);
const PREPARE_RETRY_MAX: Duration = Duration::from_secs(60);

/// Shortest limit of an initialisation that is snapshotted on Lambda.
const SNAP_START_INIT_LIMIT: Duration = Duration::from_secs(130);

type Pool = Arc<dyn Sandboxes>;

/// Makes all functions of the database ready, once the images are; runs beside the server.
pub async fn start_all(app: Arc<App>) {
    let mut wait = PREPARE_RETRY_FIRST;
    loop {
        let prepared = tokio::select! {
            prepared = app.engine.prepare() => prepared,
            () = app.stop.cancelled() => return,
        };
        let Err(error) = prepared else { break };
        let reason = chain(&error);
        tracing::error!(%reason, "images are not ready");
        app.health.send_replace(Health::NotReady(reason));
        tokio::select! {
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(PREPARE_RETRY_MAX),
            () = app.stop.cancelled() => return,
        }
    }
    for live in app.all().iter().flat_map(|function| function.all()) {
        let record = live.record();
        if matches!(
            &record.serving,
            Some(Serving {
                outcome: Outcome::Frozen(_),
                ..
            })
        ) {
            live.pool.send_replace(PoolSlot::Opening);
        }
        if record.serving.is_some() {
            app.tasks.spawn(reopen(Arc::clone(&app), Arc::clone(&live)));
        }
        // What this machine failed at may go well now. What a client deployed since this gateway started has begun.
        let is_wanted = record.is_deploying() || matches!(record.state, State::Failed(_));
        if is_wanted && live.progress.is_empty() {
            begin(&app, &live);
        }
    }
    for function in app.all() {
        if function.events.waiting() > 0 {
            events::serve(&app, &function);
        }
    }
    app.health.send_if_modified(|health| {
        let starting = matches!(health, Health::NotReady(_));
        if starting {
            *health = Health::Ready;
        }
        starting
    });
}

/// Opens the pool of a function that was Active; freezes it again when its snapshot does not fit any more.
async fn reopen(app: Arc<App>, live: Arc<Live>) {
    let record = live.record();
    let Some(Serving {
        revision,
        outcome: Outcome::Frozen(artifact),
    }) = &record.serving
    else {
        return;
    };
    let reason = {
        let Ok(_permit) = app.openings.acquire().await else {
            return;
        };
        if app
            .engine
            .usable(artifact, &revision.settings.runtime)
            .await
        {
            match open_pool(&app, &live, revision, artifact).await {
                Ok(pool) => {
                    live.pool.send_if_modified(|slot| {
                        // An update may have been quicker.
                        let waiting = matches!(slot, PoolSlot::Opening);
                        if waiting {
                            *slot = PoolSlot::Open(pool);
                        }
                        waiting
                    });
                    app.keep_ready(&live);
                    return;
                }
                Err(reason) => reason,
            }
        } else {
            "the snapshot was frozen with other images than this machine has now".to_owned()
        }
    };
    freeze_anew(&app, &live, revision.clone(), reason).await;
}

/// Freezes what serves from its stored code; requests wait for it meanwhile.
async fn freeze_anew(app: &Arc<App>, live: &Arc<Live>, revision: Revision, reason: String) {
    tracing::warn!(function = %live.label, %reason, "function is frozen again");
    live.progress.begin();
    match freeze(app, live, &revision).await {
        Ok((outcome, pool)) => finish(app, live, revision, outcome, pool).await,
        Err(reason) => {
            live.set_last_error(Some(reason.clone()));
            live.pool.send_if_modified(|slot| {
                // An update may have been quicker.
                let waiting = matches!(slot, PoolSlot::Opening);
                if waiting {
                    *slot = PoolSlot::Failed(reason.clone());
                }
                waiting
            });
            failed_event(live, reason);
        }
    }
}

/// Takes out of service the pool whose snapshot this machine refuses, and freezes the function again: once for a revision, so
/// that one that is refused again is not frozen for ever. Tells whether another pool than `refused` is there or to come.
pub fn replace_refused(app: &Arc<App>, live: &Arc<Live>, refused: &Pool, reason: String) -> bool {
    let record = live.record();
    let Some(Serving { revision, .. }) = &record.serving else {
        return false;
    };
    let is_refused =
        |slot: &PoolSlot| matches!(slot, PoolSlot::Open(pool) if Arc::ptr_eq(pool, refused));
    let is_taken = live.pool.send_if_modified(|slot| {
        let taken = is_refused(slot) && live.freezes_again(&revision.id);
        if taken {
            *slot = PoolSlot::Opening;
        }
        taken
    });
    if is_taken {
        let (app, live, refused) = (Arc::clone(app), Arc::clone(live), Arc::clone(refused));
        let revision = revision.clone();
        app.tasks.clone().spawn(async move {
            refused.close().await;
            freeze_anew(&app, &live, revision, reason).await;
        });
    }
    is_taken || !is_refused(&live.pool.borrow())
}

/// Does the same when its snapshot has come to harm since it was opened, cut off or removed: its monitors die of that.
pub async fn replace_harmed(app: &Arc<App>, live: &Arc<Live>, pool: &Pool, reason: &str) {
    let record = live.record();
    if let Some(Serving { revision, outcome }) = &record.serving
        && let Outcome::Frozen(artifact) = outcome
        && !(app.engine.usable(artifact, &revision.settings.runtime)).await
    {
        let reason = format!("its snapshot is damaged or gone: {reason}");
        replace_refused(app, live, pool, reason);
    }
}

/// The version as it is once what was promised of it is kept or not, or when it takes too long.
pub async fn settled(app: &App, live: &Live) -> Arc<Version> {
    let record = live.record();
    if !record.is_promised() {
        return record;
    }
    let (mut cursor, mut pool) = (live.progress.subscribe(), live.pool.subscribe());
    let frozen = async {
        loop {
            tokio::select! {
                event = live.progress.next(&mut cursor) => {
                    if event.is_none_or(|event| event.done) {
                        return;
                    }
                }
                // It is there, or the version was deleted.
                _ = pool.changed() => return,
            }
        }
    };
    let limit = app.limits.init_limit + app.limits.queue_wait_max;
    let _ = tokio::time::timeout(limit, frozen).await;
    live.record()
}

/// Freezes a function's target in the background and lets it serve.
pub fn begin(app: &Arc<App>, live: &Arc<Live>) {
    live.progress.begin();
    let task = app.tasks.spawn(deploy(Arc::clone(app), Arc::clone(live)));
    live.set_job(task.abort_handle());
}

async fn deploy(app: Arc<App>, live: Arc<Live>) {
    let revision = live.record().target.clone();
    match freeze(&app, &live, &revision).await {
        Ok((Outcome::InitFailed(failure), _)) if is_optimised(&live, &revision) => {
            let (kind, text) = (failure.cause.error_type(), failure.cause.message());
            let reason =
                format!("An error occurred during function initialization. {kind}: {text}");
            invocation::keep_log(&app, &live, failure.log.into()).await;
            fail(&app, &live, State::InitFailed(reason)).await;
        }
        Ok((outcome, pool)) => finish(&app, &live, revision, outcome, pool).await,
        Err(reason) => fail(&app, &live, State::Failed(reason)).await,
    }
}

/// A version with SnapStart, which is of no use when its initialisation fails: on Lambda such a version is `Failed`.
fn is_optimised(live: &Live, revision: &Revision) -> bool {
    revision.settings.snap_start && live.id != VersionId::Latest
}

/// Freezes one revision and opens its pool. The error is this machine's, in words for people.
async fn freeze(
    app: &Arc<App>,
    live: &Arc<Live>,
    revision: &Revision,
) -> Result<(Outcome, Option<Pool>), String> {
    let _permit = app
        .freezes
        .acquire()
        .await
        .map_err(|_| "the gateway is stopping".to_owned())?;
    let job = job(app, live, revision);
    let limit = job.init_limit;
    let mut step = |step: EngineStep| tell(live, step);
    match app.engine.freeze(job, &mut step).await {
        Ok(artifact) => {
            live.progress.push(Step::Pool, "restore sandboxes ahead");
            let pool = open_pool(app, live, revision, &artifact).await?;
            Point::Deployed.reached();
            Ok((Outcome::Frozen(bounded(artifact)), Some(pool)))
        }
        Err(EngineError::Freeze(error)) => match init_failure(error, limit) {
            Ok(failure) => Ok((Outcome::InitFailed(failure), None)),
            Err(error) => Err(explain(&EngineError::Freeze(error))),
        },
        Err(error) => Err(explain(&error)),
    }
}

fn job(app: &App, live: &Live, revision: &Revision) -> FreezeJob {
    let folder = app.folder(&live.name).join(&revision.id);
    let settings = &revision.settings;
    FreezeJob {
        function: live.label.clone(),
        revision: revision.id.clone(),
        runtime: settings.runtime.clone(),
        zip: folder.join(CODE_ZIP),
        layers: (0..settings.layers.len())
            .map(|place| folder.join(layer_zip(place)))
            .collect(),
        folder,
        memory_mib: settings.memory_mib,
        vcpu_count: environment::vcpu_count(settings.memory_mib),
        ephemeral_mib: settings.ephemeral_mib,
        bootstrap: environment::bootstrap(&settings.runtime),
        environment: environment::variables(&live.name, live.id, &app.region, settings),
        account_id: Some(app.account_id.clone()),
        network: settings.network.clone(),
        init_limit: match is_optimised(live, revision) {
            true => snap_start_init_limit(settings.timeout_seconds, app.limits.init_limit),
            false => app.limits.init_limit,
        },
    }
}

/// Lambda's limit for an initialisation that is snapshotted, hooks before the snapshot included: 130 s, or the function's own
/// time-out if that is longer (AWS Lambda Developer Guide, "Lambda SnapStart runtime hooks").
fn snap_start_init_limit(timeout_seconds: u32, ordinary: Duration) -> Duration {
    let own = Duration::from_secs(timeout_seconds.into());
    ordinary.max(SNAP_START_INIT_LIMIT).max(own)
}

async fn open_pool(
    app: &App,
    live: &Live,
    revision: &Revision,
    artifact: &Artifact,
) -> Result<Pool, String> {
    app.engine
        .open_pool(PoolSpec {
            name: live.label.clone(),
            snapshot: artifact.snapshot.clone(),
            base: artifact.base.clone(),
            rootfs: artifact.rootfs.clone(),
            code: artifact.code.clone(),
            ready_count: match live.id {
                VersionId::Latest => app.ready_count,
                // There may be many, and most are never called: what is provisioned and demand keep theirs.
                VersionId::Number(_) => 0,
            },
            concurrency_max: app.limits.concurrency_max,
            queue_max: app.limits.queue_max,
            queue_wait_max: app.limits.queue_wait_max,
            network: revision.settings.network.clone(),
            learn: Learn::WorkingSet,
        })
        .await
        .map_err(|error| chain(&error))
}

/// Commits what serves from now on, swaps the pool, and ends the old revision.
async fn finish(
    app: &Arc<App>,
    live: &Arc<Live>,
    revision: Revision,
    outcome: Outcome,
    pool: Option<Pool>,
) {
    let event = done_event(&outcome);
    let kept = revision.id.clone();
    let serving = Serving { revision, outcome };
    let old = match app.change(live, |record| serve(record, serving)).await {
        Ok(Some(old)) => old,
        not_served => {
            if let Some(pool) = pool {
                pool.close().await;
            }
            if let Err(error) = not_served {
                let reason = chain(&error);
                tracing::error!(function = %live.label, %reason, "deployment is not committed");
                live.set_last_error(Some(reason.clone()));
                failed_event(live, reason);
            }
            return;
        }
    };
    Point::Served.reached();
    let previous = live
        .pool
        .send_replace(pool.map_or(PoolSlot::Closed, PoolSlot::Open));
    app.keep_ready(live);
    tracing::info!(function = %live.label, revision = %kept, "function is deployed");
    live.set_last_error(
        event
            .init_error
            .as_ref()
            .map(|error| format!("{}: {}", error.error_type, error.message)),
    );
    live.progress.push_event(event);
    if let PoolSlot::Open(pool) = previous {
        pool.close().await;
    }
    if let Some(old) = old
        && old.revision.id != kept
    {
        discard(app.folder(&live.name).join(old.revision.id)).await;
    }
}

/// Lets a frozen revision serve, unless it was overtaken while it was frozen; answers what served before.
fn serve(record: &mut Version, serving: Serving) -> Option<Option<Serving>> {
    let id = &serving.revision.id;
    let is_target = record.target.id == *id;
    let is_serving = record
        .serving
        .as_ref()
        .is_some_and(|s| s.revision.id == *id);
    if !is_target && !is_serving {
        return None;
    }
    if is_target {
        let is_told =
            record.state == State::Active && record.last_update == Some(LastUpdate::Successful);
        record.state = State::Active;
        record.last_update = Some(LastUpdate::Successful);
        if !is_told {
            record.revise();
        }
    }
    Some(record.serving.replace(serving))
}

/// Commits that the target could not be deployed; an older revision keeps serving, and `state` is for want of one.
async fn fail(app: &Arc<App>, live: &Arc<Live>, state: State) {
    let reason = state.reason().unwrap_or_default().to_owned();
    match state {
        State::InitFailed(_) => {
            tracing::warn!(function = %live.label, %reason, "the function cannot be initialised");
        }
        _ => tracing::error!(function = %live.label, %reason, "deployment failed"),
    }
    let text = reason.clone();
    match app
        .change(live, |record| Some(give_up(record, text, state)))
        .await
    {
        Ok(Some(Some(abandoned))) => discard(app.folder(&live.name).join(abandoned)).await,
        Ok(_) => {}
        Err(error) => {
            tracing::error!(function = %live.label, reason = %chain(&error), "failure is not committed");
        }
    }
    live.set_last_error(Some(reason.clone()));
    failed_event(live, reason);
}

/// Notes that the target cannot be deployed; answers the revision that nothing refers to any more.
fn give_up(record: &mut Version, reason: String, state: State) -> Option<String> {
    record.revise();
    record.last_update = Some(LastUpdate::Failed(reason.clone()));
    match &record.serving {
        Some(serving) => {
            let abandoned = std::mem::replace(&mut record.target, serving.revision.clone());
            (abandoned.id != record.target.id).then_some(abandoned.id)
        }
        None => {
            record.state = state;
            None
        }
    }
}
