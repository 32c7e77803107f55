//! Changes of functions that clients ask for: create, update, delete. What they start, [`crate::deploy`] carries out.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;
use uuid::Uuid;

use crate::clock;
use crate::code::{self, CodeError, WriteError};
use crate::deploy::{self, CODE_ZIP};
use crate::logs::Log;
use crate::record::{Code, Function, LastUpdate, Revision, Settings, State};
use crate::state::{App, Live, PoolSlot};
use crate::store::StoreError;

/// Why a function was not changed.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// There is one of this name.
    #[error("function {0} exists already")]
    Exists(String),
    /// There is none.
    #[error("function {0} does not exist")]
    Missing(String),
    /// Another change is under way.
    #[error("function {0} is being changed")]
    Busy(String),
    /// The client's `RevisionId` is not the function's.
    #[error("function {0} is at another revision")]
    OtherRevision(String),
    /// There are as many functions as may be.
    #[error("there are {0} functions already")]
    TooMany(usize),
    /// The zip cannot be used.
    #[error("the code cannot be used")]
    Code(#[from] CodeError),
    /// The zip cannot be written.
    #[error("the code cannot be kept")]
    Write(#[from] WriteError),
    /// The database refused.
    #[error("the change cannot be committed")]
    Store(#[from] StoreError),
    /// A worker thread died.
    #[error("a worker thread died")]
    Worker,
}

/// What a client wants to be different.
#[derive(Clone, Debug)]
pub enum Change {
    /// Other code.
    Code(Bytes),
    /// Other settings.
    Settings(Box<Settings>),
}

/// Creates a function, Pending, and begins to deploy it.
///
/// # Errors
/// See [`ChangeError`]; nothing is left behind.
pub async fn create(
    app: &Arc<App>,
    name: &str,
    settings: Settings,
    tags: BTreeMap<String, String>,
    zip: Bytes,
) -> Result<Arc<Function>, ChangeError> {
    let _claim = app
        .claim_name(name)
        .ok_or_else(|| ChangeError::Busy(name.to_owned()))?;
    if app.find(name).is_some() {
        return Err(ChangeError::Exists(name.to_owned()));
    }
    if app.count() >= app.limits.function_count_max {
        return Err(ChangeError::TooMany(app.count()));
    }
    let (id, code) = keep_code(app, name, zip).await?;
    let folder = app.folder(name);
    let record = Function {
        name: name.to_owned(),
        modified_unix_ms: clock::unix_ms(),
        revision_id: Uuid::new_v4().to_string(),
        tags,
        target: Revision { id, settings, code },
        state: State::Pending,
        last_update: None,
        serving: None,
    };
    let live = Arc::new(Live::new(record, Log::new(folder.join("log"))));
    if let Err(error) = app.insert(Arc::clone(&live)).await {
        deploy::discard(folder).await;
        return Err(error.into());
    }
    let record = live.record();
    deploy::begin(app, &live);
    Ok(record)
}

/// Gives a function another target and begins to deploy it; the old revision serves until then.
///
/// # Errors
/// See [`ChangeError`]; the function is as it was.
pub async fn update(
    app: &Arc<App>,
    name: &str,
    revision_id: Option<&str>,
    change: Change,
) -> Result<Arc<Function>, ChangeError> {
    let _claim = app
        .claim_name(name)
        .ok_or_else(|| ChangeError::Busy(name.to_owned()))?;
    let live = app
        .find(name)
        .ok_or_else(|| ChangeError::Missing(name.to_owned()))?;
    let current = live.record();
    if current.state == State::Pending || current.last_update == Some(LastUpdate::InProgress) {
        return Err(ChangeError::Busy(name.to_owned()));
    }
    if revision_id.is_some_and(|id| id != current.revision_id) {
        return Err(ChangeError::OtherRevision(name.to_owned()));
    }
    let target = match change {
        Change::Code(zip) => {
            let (id, code) = keep_code(app, name, zip).await?;
            Revision {
                id,
                code,
                settings: current.target.settings.clone(),
            }
        }
        Change::Settings(settings) => {
            let id = Uuid::new_v4().simple().to_string();
            let from = app.folder(name).join(&current.target.id).join(CODE_ZIP);
            let folder = app.folder(name).join(&id);
            tokio::task::spawn_blocking(move || code::link(&from, &folder, CODE_ZIP))
                .await
                .map_err(|_| ChangeError::Worker)??;
            Revision {
                id,
                code: current.target.code.clone(),
                settings: *settings,
            }
        }
    };
    let folder = app.folder(name).join(&target.id);
    let changed = app
        .change(&live, |record| {
            // A target that never served is nobody's any more.
            let serves = record.serving.as_ref().map(|s| s.revision.id.clone());
            let old = std::mem::replace(&mut record.target, target);
            record.modified_unix_ms = clock::unix_ms();
            record.revision_id = Uuid::new_v4().to_string();
            if record.serving.is_some() {
                record.last_update = Some(LastUpdate::InProgress);
            } else {
                record.state = State::Pending;
                record.last_update = None;
            }
            Some((serves.as_deref() != Some(old.id.as_str())).then_some(old.id))
        })
        .await;
    match changed {
        Ok(Some(abandoned)) => {
            if let Some(id) = abandoned {
                deploy::discard(app.folder(name).join(id)).await;
            }
            let record = live.record();
            deploy::begin(app, &live);
            Ok(record)
        }
        Ok(None) => {
            deploy::discard(folder).await;
            Err(ChangeError::Missing(name.to_owned()))
        }
        Err(error) => {
            deploy::discard(folder).await;
            Err(error.into())
        }
    }
}

/// Ends a function. Invocations that run may finish; its files go in the background.
///
/// # Errors
/// See [`ChangeError`]; the function is still there.
pub async fn delete(app: &Arc<App>, name: &str) -> Result<(), ChangeError> {
    let _claim = app
        .claim_name(name)
        .ok_or_else(|| ChangeError::Busy(name.to_owned()))?;
    let live = app
        .find(name)
        .ok_or_else(|| ChangeError::Missing(name.to_owned()))?;
    app.remove(&live).await?;
    live.abort_job();
    let pool = live.pool.send_replace(PoolSlot::Closed);
    // Out of the way at once, so that a successor of the same name finds nothing. A crash here or later leaves a folder
    // without a function, which the next start removes.
    let folder = app.folder(name);
    let away = app
        .home
        .join("functions")
        .join(format!(".deleted-{}", Uuid::new_v4().simple()));
    let removed = match fs::rename(&folder, &away) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(function = %name, %error, "folder of a deleted function is not moved");
            folder
        }
        _ => away,
    };
    app.tasks.spawn(async move {
        if let PoolSlot::Open(pool) = pool {
            pool.close().await;
        }
        deploy::discard(removed).await;
    });
    tracing::info!(function = %name, "function is deleted");
    Ok(())
}

/// Checks a zip and writes it into the folder of a new revision.
async fn keep_code(app: &App, name: &str, zip: Bytes) -> Result<(String, Code), ChangeError> {
    let id = Uuid::new_v4().simple().to_string();
    let folder = app.folder(name).join(&id);
    tokio::task::spawn_blocking(move || {
        let code = code::check(&zip)?;
        code::write(&folder, CODE_ZIP, &zip)?;
        Ok((id, code))
    })
    .await
    .map_err(|_| ChangeError::Worker)?
}
