//! `thaw snapshot trust`: a snapshot of elsewhere is given this home's tag, because its user says so.

use std::fs::File;

use std::path::Path;

use anyhow::Context as _;
use serde_json::json;
use thaw_snapshot::{Snapshot, tag};
use thaw_snapshot_store::memory_of;

use super::{Found, base_file, key};
use crate::cli::output::{self, Format};

/// Checks every byte of the file against its digests and vouches for it. A base below it must be one of this home already.
pub(super) fn trust(home: &Path, found: &Found, format: Format) -> anyhow::Result<()> {
    let path = &found.path;
    let file = File::options().read(true).write(true).open(path);
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
    let copy = file.try_clone().context("no descriptor left")?;
    let mut snapshot = Snapshot::from_file(copy, &path.display().to_string())?;
    let damaged = || format!("{} is damaged", path.display());
    let key = key(home)?;
    let named = snapshot.base().with_context(damaged)?;
    // A stub's memory is in a store, whose chunks are checked when they are fetched.
    let base = named.filter(|_| memory_of(&snapshot).is_err());
    if let Some(named) = base {
        let base = Snapshot::open(&base_file(home, path, &named)?)?;
        base.authenticate(&key)?;
        snapshot.attach_base(base)?;
        snapshot.verify()
    } else {
        snapshot.verify_own()
    }
    .with_context(damaged)?;
    tag(&file, &key).with_context(|| format!("cannot tag {}", path.display()))?;
    file.sync_all()
        .with_context(|| format!("cannot keep {}", path.display()))?;
    match format {
        Format::Json => output::json(
            &json!({ "name": found.name, "digest": snapshot.digest().to_string(), "authentic": true }),
        ),
        Format::Text => {
            println!("{}: trusted as it is now", found.name);
            Ok(())
        }
    }
}
