//! Giving a finished file its name: written under a temporary one in the same folder, synced, renamed, the folder synced.
//! After a crash there is the old file or the new one, and perhaps a temporary one that [`remove_stale`] takes away.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MARK: &str = ".thaw-tmp-";

/// A file that has no final name yet. Dropped without [`PendingFile::commit`], it is removed.
#[derive(Debug)]
pub struct PendingFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl PendingFile {
    /// Creates an empty file beside `target`, readable and writable by this user alone.
    ///
    /// # Errors
    /// The folder is missing, full or not writable.
    pub fn create(target: &Path) -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = target
            .file_name()
            .ok_or(io::ErrorKind::InvalidInput)?
            .to_string_lossy();
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let temporary =
                target.with_file_name(format!(".{name}{MARK}{}-{number}", std::process::id()));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&temporary)?;
            // Whoever tidies up leaves alone what is locked; he may have come before this lock.
            file.lock()?;
            if file.metadata()?.nlink() > 0 {
                return Ok(Self {
                    file,
                    temporary,
                    target: target.to_owned(),
                    committed: false,
                });
            }
        }
    }

    /// The file, to be written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes content and name durable; an older file of that name is replaced in the same instant.
    ///
    /// # Errors
    /// The file system's; the target is as it was before.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        self.rename()?;
        let folder = self
            .target
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()
    }

    /// Gives the file its name and leaves it to the caller to make it durable, with others (syncfs(2)). A process that dies
    /// leaves a whole file or none; a machine that dies may leave the name with less than the content, which the
    /// caller must be able to tell.
    ///
    /// # Errors
    /// The file system's; the target is as it was before.
    pub fn commit_without_sync(mut self) -> io::Result<()> {
        self.rename()
    }

    fn rename(&mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.target)?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.temporary); // whatever stays is taken away by remove_stale
        }
    }
}

/// Whether a file of this name was never committed.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.contains(MARK)
}

/// Removes what a crash left in `folder`; returns how many files that were. What somebody is writing stays: it is locked (flock(2)), for as long
/// as anybody holds a descriptor of it.
///
/// # Errors
/// The folder cannot be read, or a file cannot be removed.
pub fn remove_stale(folder: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let is_nobodys = || File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if entry.file_name().to_str().is_some_and(is_temporary) && is_nobodys() {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_committed_file_has_its_name_and_no_temporary_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a.thaw");
        let pending = PendingFile::create(&target).unwrap();
        pending.file().write_all(b"x").unwrap();
        assert!(!target.exists());
        pending.commit().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"x");
        let pending = PendingFile::create(&target).unwrap();
        pending.file().write_all(b"yy").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"x");
        pending.commit_without_sync().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"yy");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_dropped_file_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        drop(PendingFile::create(&folder.path().join("a.thaw")).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_crash_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let mut left = PendingFile::create(&folder.path().join("a.thaw")).unwrap();
        left.committed = true; // it is not removed when its process ends
        let written = PendingFile::create(&folder.path().join("b.thaw")).unwrap();
        assert_eq!(remove_stale(folder.path()).unwrap(), 0);
        drop(left);
        assert_eq!(remove_stale(folder.path()).unwrap(), 1);
        written.commit().unwrap();
        assert!(folder.path().join("b.thaw").exists());
        assert_eq!(remove_stale(folder.path()).unwrap(), 0);
    }
}
