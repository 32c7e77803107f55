//! Published versions: made from what `$LATEST` is to become, never changed, each with a snapshot of its own.

use std::sync::Arc;

use thaw_runtime::Point;
use uuid::Uuid;

use super::{ChangeError, check_revision, claim_found, retire, share_code, storage};
use crate::auth::admission::Caller;
use crate::deploy;
use crate::record::{LastUpdate, Published, Revision, Settings, State, Version, VersionId};
use crate::state::{App, Live, LiveFunction};

/// What a client says about the version that it wants to be published.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The code must have this SHA-256, base64.
    pub code_sha256: Option<String>,
    /// In place of the description of `$LATEST`.
    pub description: Option<String>,
    /// `$LATEST` must be at this revision.
    pub revision_id: Option<String>,
    /// Who it is.
    pub caller: Option<Caller>,
}

/// Publishes `$LATEST`, which must be Active and gets another `RevisionId`. What has not changed since it was published last is not published again.
///
/// # Errors
/// See [`ChangeError`].
pub async fn publish(
    app: &Arc<App>,
    name: &str,
    wanted: Wanted,
) -> Result<Arc<Version>, ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    let latest = function.latest.record();
    if latest.state != State::Active {
        return Err(ChangeError::Inactive(name.to_owned(), latest.state.clone()));
    }
    if latest.is_deploying() {
        return Err(ChangeError::Busy(name.to_owned()));
    }
    check_revision(name, wanted.revision_id.as_deref(), &latest.revision_id)?;
    let current = &latest.target.code.sha256;
    if let Some(given) = wanted.code_sha256
        && given != *current
    {
        return Err(ChangeError::OtherCode {
            given,
            current: current.clone(),
        });
    }
    let state = at_once(&latest.target.settings);
    let before = function.record().last_number;
    let version = publish_target(
        app,
        &function,
        wanted.description,
        state,
        wanted.caller.as_ref(),
    )
    .await?;
    if function.record().last_number != before {
        let revise = |latest: &mut Version| {
            latest.revise();
            Some(())
        };
        app.change(&function.latest, revise).await?;
    }
    Ok(version)
}

/// Lambda's published versions are Active at once, but for those that it takes a snapshot of.
#[must_use]
pub fn at_once(settings: &Settings) -> State {
    match settings.snap_start {
        true => State::Pending,
        false => State::Active,
    }
}

/// Publishes what a client has just made the target of `$LATEST`, in one request. `state` is what is told of the version until
/// it is frozen.
///
/// # Errors
/// See [`ChangeError`]; `$LATEST` stays changed.
pub async fn publish_at_once(
    app: &Arc<App>,
    name: &str,
    state: State,
    caller: Option<&Caller>,
) -> Result<Arc<Version>, ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    publish_target(app, &function, None, state, caller).await
}

async fn publish_target(
    app: &Arc<App>,
    function: &Arc<LiveFunction>,
    description: Option<String>,
    state: State,
    caller: Option<&Caller>,
) -> Result<Arc<Version>, ChangeError> {
    let latest = function.latest.record();
    let Revision { settings, code, .. } = latest.target.clone();
    let record = function.record();
    let unchanged = record
        .last_published
        .as_ref()
        .filter(|last| last.code == code && last.settings == settings)
        .and_then(|last| function.version(VersionId::Number(last.number)));
    if let Some(version) = unchanged {
        return Ok(version.record());
    }
    let _counted = storage::reserve(app, caller, code.bytes, None)?;
    let number = record.last_number.saturating_add(1);
    let id = share_code(app, &function.name, &latest.target, &settings).await?;
    Point::VersionKept.reached();
    let folder = app.folder(&function.name).join(&id);
    let version = Version {
        name: function.name.clone(),
        id: VersionId::Number(number),
        modified_unix_ms: latest.modified_unix_ms,
        revision_id: Uuid::new_v4().to_string(),
        target: Revision {
            id,
            code: code.clone(),
            key: storage::key_of(caller),
            settings: Settings {
                description: description.unwrap_or_else(|| settings.description.clone()),
                ..settings.clone()
            },
        },
        last_update: (state == State::Active).then_some(LastUpdate::Successful),
        state,
        serving: None,
    };
    let live = Arc::new(Live::new(version, Arc::clone(&function.log)));
    let committed = app
        .change_function(function, Some(Arc::clone(&live)), |record| {
            record.last_number = number;
            record.last_published = Some(Published {
                number,
                code,
                settings,
            });
            Some(())
        })
        .await;
    match committed {
        Ok(Some(())) => {
            Point::VersionCommitted.reached();
            let record = live.record();
            deploy::begin(app, &live);
            Ok(record)
        }
        Ok(None) => {
            deploy::discard(folder).await;
            Err(ChangeError::Missing(function.name.clone()))
        }
        Err(error) => {
            deploy::discard(folder).await;
            Err(error.into())
        }
    }
}

/// Ends a published version. Invocations that run may finish.
///
/// # Errors
/// See [`ChangeError`]; the version is still there.
pub async fn delete(app: &Arc<App>, name: &str, id: VersionId) -> Result<(), ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    let live = function
        .version(id)
        .ok_or_else(|| ChangeError::NoVersion(name.to_owned(), id))?;
    let record = function.record();
    let named: Vec<String> = record
        .aliases
        .iter()
        .filter(|(_, alias)| alias.names(id))
        .map(|(name, _)| name.clone())
        .collect();
    if !named.is_empty() {
        return Err(ChangeError::Named(id, named));
    }
    app.remove_version(&function, id).await?;
    Point::VersionRemoved.reached();
    let folder = app.folder(name).join(&live.record().target.id);
    tracing::info!(function = %live.label, "version is deleted");
    retire(app, &[live], folder);
    Ok(())
}
