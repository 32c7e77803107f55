//! Scratch folders that an interrupted build cannot leave behind, and the atomic step into place.
//!
//! Each scratch folder has a lock file beside it, held for as long as its owner lives. Whoever
//! makes the next scratch folder removes those whose lock nobody holds.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use crate::fault::FileError;

const LOCK_SUFFIX: &str = ".lock";

/// A scratch folder could not be made, or its result not put into place.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct StagingError(#[from] pub(crate) FileError);

/// A scratch folder on the same file system as the artifacts; removed on drop.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Staging {
    /// Makes a scratch folder in `parent` and sweeps out what dead processes left there.
    pub(crate) fn new(parent: &Path) -> Result<Self, StagingError> {
        make_dir(parent)?;
        // Held while folders appear and disappear, so that no sweep sees a lock file that its
        // owner has made but not locked yet.
        let _guard = lock_file(&parent.join("guard"))?;
        sweep(parent)?;
        let path = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(parent)
            .map_err(FileError::on("making a scratch folder in", parent))?
            .keep();
        let mut lock_path = path.clone().into_os_string();
        lock_path.push(LOCK_SUFFIX);
        let lock_path = PathBuf::from(lock_path);
        let _lock = lock_file(&lock_path)?;
        Ok(Self {
            path,
            lock_path,
            _lock,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next build.
        let _ = remove_tree(&self.path);
        let _ = fs::remove_file(&self.lock_path);
    }
}

fn sweep(parent: &Path) -> Result<(), FileError> {
    let entries = fs::read_dir(parent).map_err(FileError::on("listing", parent))?;
    for entry in entries {
        let path = entry.map_err(FileError::on("listing", parent))?.path();
        if !path.is_dir() {
            continue;
        }
        let mut lock_path = path.clone().into_os_string();
        lock_path.push(LOCK_SUFFIX);
        let lock_path = PathBuf::from(lock_path);
        let alive = match File::open(&lock_path).map(|lock| lock.try_lock()) {
            Ok(Err(TryLockError::WouldBlock)) => true,
            Ok(_) | Err(_) => false,
        };
        if !alive {
            remove_tree(&path).map_err(FileError::on("removing", &path))?;
            let _ = fs::remove_file(&lock_path);
        }
    }
    Ok(())
}

/// Removes a folder with all it holds, folders without write permission included.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fn open_up(path: &Path) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open_up(&entry.path())?;
            }
        }
        Ok(())
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_up(path)?;
            fs::remove_dir_all(path)
        }
        other => other,
    }
}

/// Makes `path` and its parents.
pub(crate) fn make_dir(path: &Path) -> Result<(), FileError> {
    fs::create_dir_all(path).map_err(FileError::on("making", path))
}

/// Opens (making it if need be) and exclusively locks a file; released when it is dropped.
pub(crate) fn lock_file(path: &Path) -> Result<File, FileError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(FileError::on("opening", path))?;
    file.lock().map_err(FileError::on("locking", path))?;
    Ok(file)
}

/// Puts `from` (a file or a folder) at `to` in one step; what was at `to` is removed.
///
/// A folder at `to` is exchanged (renameat2), so that `to` exists at every moment.
pub(crate) fn install(from: &Path, to: &Path) -> Result<(), FileError> {
    sync_tree(from)?;
    let parent = to.parent().unwrap_or(Path::new("/"));
    make_dir(parent)?;
    if from.is_dir() && to.exists() {
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE)
            .map_err(|error| FileError::on("replacing", to)(error.into()))?;
        remove_tree(from).map_err(FileError::on("removing the former", to))?;
    } else {
        fs::rename(from, to).map_err(FileError::on("renaming to", to))?;
    }
    sync(parent)
}

fn sync_tree(path: &Path) -> Result<(), FileError> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(FileError::on("listing", path))? {
            sync_tree(&entry.map_err(FileError::on("listing", path))?.path())?;
        }
    }
    sync(path)
}

fn sync(path: &Path) -> Result<(), FileError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(FileError::on("syncing", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_builds_folder_is_swept_and_a_living_ones_is_kept() {
        let home = tempfile::tempdir().unwrap();
        let living = Staging::new(home.path()).unwrap();
        let dead = home.path().join("build-dead");
        fs::create_dir_all(dead.join("deep")).unwrap();
        fs::write(home.path().join("build-dead.lock"), "").unwrap();
        let _next = Staging::new(home.path()).unwrap();
        assert!(living.path().is_dir());
        assert!(!dead.exists());
        assert!(!home.path().join("build-dead.lock").exists());
    }

    #[test]
    fn a_dropped_folder_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        drop(Staging::new(home.path()).unwrap());
        let left: Vec<_> = fs::read_dir(home.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        assert_eq!(left, [home.path().join("guard")]);
    }

    #[test]
    fn a_folder_replaces_a_folder() {
        let home = tempfile::tempdir().unwrap();
        let (new, old) = (home.path().join("new"), home.path().join("old"));
        fs::create_dir(&new).unwrap();
        fs::write(new.join("a"), "new").unwrap();
        fs::create_dir(&old).unwrap();
        fs::write(old.join("a"), "old").unwrap();
        install(&new, &old).unwrap();
        assert_eq!(fs::read(old.join("a")).unwrap(), b"new");
        assert!(!new.exists());
    }
}
