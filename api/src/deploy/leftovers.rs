//! Folders that nothing refers to any more.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thaw_runtime::Point;

use crate::store::Stored;

/// Removes what a crash left behind: folders without a function, revisions that nothing refers to, half-written files.
///
/// # Errors
/// The path that could not be read or removed, and why.
pub fn clean(folder: &Path, records: &[Stored]) -> Result<(), (PathBuf, io::Error)> {
    Point::CleanBegun.reached();
    let known: BTreeMap<&str, BTreeSet<&str>> = records
        .iter()
        .map(|stored| {
            let versions = stored.published.iter().chain([&stored.latest]);
            let revisions = versions.flat_map(|version| {
                let serves = version.serving.as_ref().map(|s| s.revision.id.as_str());
                serves.into_iter().chain([version.target.id.as_str()])
            });
            (stored.function.name.as_str(), revisions.collect())
        })
        .collect();
    for (name, path) in entries(folder)? {
        let Some(revisions) = known.get(name.as_str()) else {
            remove(&path)?;
            Point::CleanRemoved.reached();
            continue;
        };
        for (name, path) in entries(&path)? {
            if revisions.contains(name.as_str()) {
                clean_revision(&path)?;
            } else if name != "log" && name != "log.1" {
                remove(&path)?;
            }
        }
    }
    Ok(())
}

fn clean_revision(folder: &Path) -> Result<(), (PathBuf, io::Error)> {
    match thaw_snapshot::commit::remove_stale(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err((folder.to_owned(), error));
        }
        _ => {}
    }
    for (name, path) in entries(folder)? {
        if name.ends_with(".tmp") || name.ends_with(".partial") {
            remove(&path)?;
        }
    }
    Ok(())
}

/// What is in a folder, name and path; nothing if there is no folder.
pub(crate) fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, (PathBuf, io::Error)> {
    let failed = |source| (folder.to_owned(), source);
    let listing = match fs::read_dir(folder) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    listing
        .map(|entry| {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Ok((name, entry.path()))
        })
        .collect()
}

/// Removes a file or a folder, if it is there.
pub(crate) fn remove(path: &Path) -> Result<(), (PathBuf, io::Error)> {
    let result = if path.is_dir() && !path.is_symlink() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err((path.to_owned(), error)),
        _ => Ok(()),
    }
}

/// Removes a folder that nothing refers to; what cannot be removed now is removed at the next start.
pub async fn discard(folder: PathBuf) {
    let removed = tokio::task::spawn_blocking(move || remove(&folder)).await;
    if let Ok(Err((path, error))) = removed {
        tracing::warn!(path = %path.display(), %error, "folder is left for the next start");
    }
}
