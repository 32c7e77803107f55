//! Aliases: names for versions that clients can move.

use std::sync::Arc;

use uuid::Uuid;

use super::{ChangeError, check_revision, claim_found};
use crate::record::{Alias, Canary, VersionId};
use crate::state::{App, LiveFunction};

/// What a client wants of an alias; `None` keeps what is there.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The version that it names.
    pub version: Option<VersionId>,
    /// Free text.
    pub description: Option<String>,
    /// The second version; `Some(None)` for none any more.
    pub canary: Option<Option<Canary>>,
    /// The alias must be at this revision.
    pub revision_id: Option<String>,
}

/// Makes an alias.
///
/// # Errors
/// See [`ChangeError`].
pub async fn create(
    app: &Arc<App>,
    name: &str,
    alias: &str,
    version: VersionId,
    wanted: Wanted,
) -> Result<Alias, ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    if function.record().aliases.contains_key(alias) {
        return Err(ChangeError::AliasExists(name.to_owned(), alias.to_owned()));
    }
    let made = Alias {
        version,
        description: wanted.description.unwrap_or_default(),
        revision_id: Uuid::new_v4().to_string(),
        canary: wanted.canary.flatten(),
    };
    keep(app, &function, alias, made).await
}

/// Changes an alias.
///
/// # Errors
/// See [`ChangeError`]; the alias is as it was.
pub async fn update(
    app: &Arc<App>,
    name: &str,
    alias: &str,
    wanted: Wanted,
) -> Result<Alias, ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    let current = find(&function, alias)?;
    check_revision(name, wanted.revision_id.as_deref(), &current.revision_id)?;
    let changed = Alias {
        version: wanted.version.unwrap_or(current.version),
        description: wanted.description.unwrap_or(current.description),
        revision_id: Uuid::new_v4().to_string(),
        canary: wanted.canary.unwrap_or(current.canary),
    };
    keep(app, &function, alias, changed).await
}

/// Forgets an alias with its URL and how its events are treated; one that is not there is forgotten already.
///
/// # Errors
/// See [`ChangeError`].
pub async fn delete(app: &Arc<App>, name: &str, alias: &str) -> Result<(), ChangeError> {
    let (_claim, function) = claim_found(app, name)?;
    app.change_function(&function, None, |record| {
        // A later alias of this name is another one.
        record.urls.remove(alias);
        record.event_configs.remove(alias);
        record.provisioned.remove(alias);
        record.policies.remove(alias);
        record.aliases.remove(alias).map(|_| ())
    })
    .await?;
    Ok(())
}

/// One alias.
///
/// # Errors
/// There is none of this name.
pub fn find(function: &LiveFunction, alias: &str) -> Result<Alias, ChangeError> {
    let record = function.record();
    let found = record.aliases.get(alias).cloned();
    found.ok_or_else(|| ChangeError::NoAlias(function.name.clone(), alias.to_owned()))
}

async fn keep(
    app: &Arc<App>,
    function: &Arc<LiveFunction>,
    name: &str,
    alias: Alias,
) -> Result<Alias, ChangeError> {
    let canary = alias.canary.map(|canary| canary.version);
    for version in [Some(alias.version), canary].into_iter().flatten() {
        if function.version(version).is_none() {
            return Err(ChangeError::NoVersion(function.name.clone(), version));
        }
    }
    let kept = alias.clone();
    app.change_function(function, None, |record| {
        record.aliases.insert(name.to_owned(), kept);
        Some(())
    })
    .await?
    .ok_or_else(|| ChangeError::Missing(function.name.clone()))?;
    Ok(alias)
}
