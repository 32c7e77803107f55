//! Against whose quota stored code counts: each version's, and each layer version's, against that of the key that stored it.
//!
//! Nothing is kept apart: the sum is taken over what the database has.

use crate::auth::admission::Caller;
use crate::auth::quota::{Exceeded, Storing};
use crate::record::Revision;
use crate::state::App;

/// Bytes of all zips, or of those that one key stored. What a version has in common with another counts twice, as on AWS.
#[must_use]
pub fn stored(app: &App, key: Option<&str>) -> u64 {
    let fits = |by: Option<&str>| key.is_none_or(|key| by == Some(key));
    let functions = app.all();
    let versions = functions.iter().flat_map(|function| function.all());
    let of_versions = versions.map(|live| live.record()).filter_map(|record| {
        let target = &record.target;
        fits(target.key.as_deref()).then_some(target.code.bytes)
    });
    let layers = app.layers.all();
    let layer_versions = layers.iter().flat_map(|layer| layer.versions.values());
    let of_layers = layer_versions
        .filter(|version| fits(version.key.as_deref()))
        .map(|version| version.code.bytes);
    of_versions.chain(of_layers).sum()
}

/// Counts a zip that a caller is about to store, in place of a revision if there is one; hold the answer until it is stored.
///
/// # Errors
/// The caller's key may not store as much.
pub fn reserve(
    app: &App,
    caller: Option<&Caller>,
    bytes: u64,
    replaced: Option<&Revision>,
) -> Result<Option<Storing>, Exceeded> {
    let Some(caller) = caller else {
        return Ok(None);
    };
    let key = Some(caller.access_key_id.as_str());
    let freed = replaced.filter(|revision| revision.key.as_deref() == key);
    let freed = freed.map_or(0, |revision| revision.code.bytes);
    let stored = || stored(app, key).saturating_sub(freed);
    caller.quota.store(bytes, stored).map(Some)
}

/// The key of a caller.
#[must_use]
pub fn key_of(caller: Option<&Caller>) -> Option<String> {
    caller.map(|caller| caller.access_key_id.clone())
}
