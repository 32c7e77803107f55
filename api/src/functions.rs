//! Changes of functions that clients ask for: create, update, publish, delete. What they start, [`crate::deploy`] carries out.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use thaw_runtime::Point;
use thiserror::Error;
use uuid::Uuid;

use crate::auth::admission::Caller;
use crate::auth::quota::Exceeded;
use crate::clock;
use crate::code::{self, CodeError, UNZIPPED_BYTES_MAX, WriteError};
use crate::deploy::{self, CODE_ZIP, layer_zip};
use crate::logs::Log;
use crate::record::{
    Code, Function, LastUpdate, LayerUse, Revision, Settings, State, Version, VersionId,
};
use crate::state::{App, Live, LiveFunction, NameClaim, PoolSlot};
use crate::store::{StoreError, Stored};

pub mod aliases;
pub mod storage;
pub mod versions;

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
    /// It is not Active, so that it cannot be published.
    #[error("function {0} is {word}", word = .1.word())]
    Inactive(String, State),
    /// What would be published is not what the client has seen.
    #[error("the code's SHA-256 is {current}, not {given}")]
    OtherCode {
        /// The client's, base64.
        given: String,
        /// That of `$LATEST`.
        current: String,
    },
    /// There is no such version.
    #[error("function {0} has no version {1}")]
    NoVersion(String, VersionId),
    /// Aliases name the version.
    #[error("version {0} is named by aliases {aliases}", aliases = .1.join(", "))]
    Named(VersionId, Vec<String>),
    /// There is an alias of this name.
    #[error("function {0} has an alias {1} already")]
    AliasExists(String, String),
    /// There is none.
    #[error("function {0} has no alias {1}")]
    NoAlias(String, String),
    /// There is no such layer version; its ARN.
    #[error("layer version {0} does not exist")]
    NoLayer(String),
    /// Code and layers are too large together, unpacked, bytes.
    #[error("code and layers have {0} bytes")]
    TooLargeTogether(u64),
    /// There are as many functions as may be.
    #[error("there are {0} functions already")]
    TooMany(usize),
    /// The caller's key may not store as much.
    #[error("the code is too much for the key")]
    Storage(#[from] Exceeded),
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
    caller: Option<&Caller>,
) -> Result<Arc<LiveFunction>, ChangeError> {
    let _claim = claim(app, name)?;
    if app.find(name).is_some() {
        return Err(ChangeError::Exists(name.to_owned()));
    }
    if app.count() >= app.limits.function_count_max {
        return Err(ChangeError::TooMany(app.count()));
    }
    let _counted = storage::reserve(app, caller, size(&zip), None)?;
    let (id, code) = keep_code(app, name, zip, &settings, None).await?;
    Point::CodeKept.reached();
    let folder = app.folder(name);
    let function = Function {
        name: name.to_owned(),
        tags,
        ..Function::default()
    };
    let latest = Version {
        name: name.to_owned(),
        id: VersionId::Latest,
        modified_unix_ms: clock::unix_ms(),
        revision_id: Uuid::new_v4().to_string(),
        target: Revision {
            id,
            settings,
            code,
            key: storage::key_of(caller),
        },
        state: State::Pending,
        last_update: None,
        serving: None,
    };
    let stored = Stored {
        function,
        latest,
        published: Vec::new(),
    };
    let function = Arc::new(LiveFunction::new(stored, &[], Log::new(folder.join("log"))));
    if let Err(error) = app.insert(Arc::clone(&function)).await {
        deploy::discard(folder).await;
        return Err(error.into());
    }
    Point::FunctionCommitted.reached();
    deploy::begin(app, &function.latest);
    Ok(function)
}

/// The right to change a function.
fn claim(app: &App, name: &str) -> Result<NameClaim, ChangeError> {
    app.claim_name(name)
        .ok_or_else(|| ChangeError::Busy(name.to_owned()))
}

/// The right to change a function that is there.
fn claim_found(app: &App, name: &str) -> Result<(NameClaim, Arc<LiveFunction>), ChangeError> {
    let claim = claim(app, name)?;
    let function = app
        .find(name)
        .ok_or_else(|| ChangeError::Missing(name.to_owned()))?;
    Ok((claim, function))
}

/// Gives `$LATEST` another target and begins to deploy it; the old revision serves until then.
///
/// # Errors
/// See [`ChangeError`]; the function is as it was.
pub async fn update(
    app: &Arc<App>,
    name: &str,
    revision_id: Option<&str>,
    change: Change,
    caller: Option<&Caller>,
) -> Result<Arc<Version>, ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    let live = &function.latest;
    let current = live.record();
    if current.is_deploying() {
        return Err(ChangeError::Busy(name.to_owned()));
    }
    check_revision(name, revision_id, &current.revision_id)?;
    let mut _counted = None;
    let target = match change {
        Change::Code(zip) => {
            _counted = storage::reserve(app, caller, size(&zip), Some(&current.target))?;
            let settings = current.target.settings.clone();
            let (id, code) = keep_code(app, name, zip, &settings, Some(&current.target)).await?;
            Revision {
                id,
                settings,
                code,
                key: storage::key_of(caller),
            }
        }
        Change::Settings(settings) => Revision {
            id: share_code(app, name, &current.target, &settings).await?,
            code: current.target.code.clone(),
            key: current.target.key.clone(),
            settings: *settings,
        },
    };
    let folder = app.folder(name).join(&target.id);
    let changed = app
        .change(live, |record| {
            // A target that never served is nobody's any more.
            let serves = record.serving.as_ref().map(|s| s.revision.id.clone());
            let old = std::mem::replace(&mut record.target, target);
            record.modified_unix_ms = clock::unix_ms();
            record.revise();
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
            Point::TargetCommitted.reached();
            if let Some(id) = abandoned {
                deploy::discard(app.folder(name).join(id)).await;
            }
            let record = live.record();
            deploy::begin(app, live);
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

fn size(zip: &Bytes) -> u64 {
    u64::try_from(zip.len()).unwrap_or(u64::MAX)
}

fn check_revision(name: &str, wanted: Option<&str>, current: &str) -> Result<(), ChangeError> {
    match wanted {
        Some(id) if id != current => Err(ChangeError::OtherRevision(name.to_owned())),
        _ => Ok(()),
    }
}

/// Ends a function with all its versions. Invocations that run may finish; its files go in the background.
///
/// # Errors
/// See [`ChangeError`]; the function is still there.
pub async fn delete(app: &Arc<App>, name: &str) -> Result<(), ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    app.remove(&function).await?;
    Point::FunctionRemoved.reached();
    function.events.close();
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
    Point::FolderMoved.reached();
    retire(app, &function.all(), removed);
    tracing::info!(function = %name, "function is deleted");
    Ok(())
}

/// Ends what versions run, and removes their folder, in the background.
fn retire(app: &Arc<App>, versions: &[Arc<Live>], folder: PathBuf) {
    let end = |live: &Arc<Live>| {
        live.abort_job();
        live.pool.send_replace(PoolSlot::Closed)
    };
    let pools: Vec<PoolSlot> = versions.iter().map(end).collect();
    app.tasks.spawn(async move {
        for pool in pools {
            if let PoolSlot::Open(pool) = pool {
                pool.close().await;
            }
        }
        deploy::discard(folder).await;
    });
}

/// Puts the code of a revision and the layers of `settings` into the folder of a new revision; answers the new one's id.
async fn share_code(
    app: &App,
    name: &str,
    from: &Revision,
    settings: &Settings,
) -> Result<String, ChangeError> {
    check_sizes(&from.code, settings)?;
    let layers = layer_zips(app, name, settings, Some(from))?;
    let id = Uuid::new_v4().simple().to_string();
    let code = app.folder(name).join(&from.id).join(CODE_ZIP);
    let folder = app.folder(name).join(&id);
    tokio::task::spawn_blocking(move || {
        code::link(&code, &folder, CODE_ZIP)?;
        link_layers(&layers, &folder)?;
        Ok(id)
    })
    .await
    .map_err(|_| ChangeError::Worker)?
}

/// Checks a zip and writes it, with the layers of `settings`, into the folder of a new revision.
async fn keep_code(
    app: &App,
    name: &str,
    zip: Bytes,
    settings: &Settings,
    current: Option<&Revision>,
) -> Result<(String, Code), ChangeError> {
    let layers = layer_zips(app, name, settings, current)?;
    let id = Uuid::new_v4().simple().to_string();
    let folder = app.folder(name).join(&id);
    let settings = settings.clone();
    tokio::task::spawn_blocking(move || {
        let code = code::check(&zip)?;
        check_sizes(&code, &settings)?;
        code::write(&folder, CODE_ZIP, &zip)?;
        link_layers(&layers, &folder)?;
        Ok((id, code))
    })
    .await
    .map_err(|_| ChangeError::Worker)?
}

/// Lambda's limit is one for code and layers together.
fn check_sizes(code: &Code, settings: &Settings) -> Result<(), ChangeError> {
    let parts = settings.layers.iter().map(|layer| &layer.code);
    let sum = parts.fold(code.unzipped_bytes, |sum, part| {
        sum.saturating_add(part.unzipped_bytes)
    });
    match sum > UNZIPPED_BYTES_MAX {
        true => Err(ChangeError::TooLargeTogether(sum)),
        false => Ok(()),
    }
}

/// Where the zips of the layers of `settings` are: with a revision that has the same, which may have been deleted meanwhile, or
/// with the layers.
fn layer_zips(
    app: &App,
    name: &str,
    settings: &Settings,
    current: Option<&Revision>,
) -> Result<Vec<(LayerUse, PathBuf)>, ChangeError> {
    let current = current.filter(|current| current.settings.layers == settings.layers);
    let path = |(place, layer): (usize, &LayerUse)| {
        let path = match current {
            Some(current) => Some(app.folder(name).join(&current.id).join(layer_zip(place))),
            None => app.layers.zip(&layer.name, layer.number),
        };
        let path = path.ok_or_else(|| ChangeError::NoLayer(layer.arn.clone()))?;
        Ok((layer.clone(), path))
    };
    settings.layers.iter().enumerate().map(path).collect()
}

/// Links layers' zips into a revision's folder, which is removed if that fails.
fn link_layers(layers: &[(LayerUse, PathBuf)], folder: &Path) -> Result<(), ChangeError> {
    for (place, (layer, zip)) in layers.iter().enumerate() {
        if let Err(error) = code::link(zip, folder, &layer_zip(place)) {
            // What cannot be removed now, the next start removes.
            let _ = fs::remove_dir_all(folder);
            return Err(match error.source.kind() {
                // Deleted since it was looked up.
                io::ErrorKind::NotFound => ChangeError::NoLayer(layer.arn.clone()),
                _ => error.into(),
            });
        }
    }
    Ok(())
}
