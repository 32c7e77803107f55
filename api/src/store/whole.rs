//! Whether a database is whole, and the one that its home was made with. The start that follows removes what no row refers to,
//! so a database that is lost, cut off or older must not be taken for a home without functions.

use std::fs;
use std::path::{Path, PathBuf};

use super::StoreError;

/// Folders beside the database of whose content it knows.
const STATE_FOLDERS: [&str; 2] = ["functions", "layers"];

/// Beside the database as long as a gateway has it open: the next one knows by it that this one was killed.
pub(super) fn in_use(path: &Path) -> PathBuf {
    path.with_added_extension("in-use")
}

/// Refuses a home whose database is not the one that its folders were made with: what it does not know would be removed.
pub(super) fn check_whole(path: &Path) -> Result<(), StoreError> {
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    let (log, marker) = (PathBuf::from(log), in_use(path));
    let is_empty = |path: &Path| fs::metadata(path).map_or(true, |file| file.len() == 0);
    if is_empty(path) && !is_empty(&log) {
        // SQLite would take the log for a stale one, and remove it.
        return Err(StoreError::Lost {
            path: path.to_owned(),
            rest: log,
        });
    }
    match marker.exists() && !log.exists() {
        true => Err(StoreError::LogLost { log, marker }),
        false => Ok(()),
    }
}

/// The same of one that was made just now.
pub(super) fn check_new(path: &Path) -> Result<(), StoreError> {
    let folders = STATE_FOLDERS.map(|name| path.with_file_name(name));
    let is_full =
        |folder: &PathBuf| fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    match folders.into_iter().find(is_full) {
        Some(folder) => Err(StoreError::Lost {
            path: path.to_owned(),
            rest: folder,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::super::{Store, Write};
    use super::*;
    use crate::testing::{function, version};

    /// A home with a function in its database and in its folder, whose gateway was killed: its files stay as they were.
    async fn killed(home: &Path) -> PathBuf {
        let (path, copy) = (home.join("thaw.db"), home.join("copy"));
        let revision = home.join("functions/f/1");
        fs::create_dir(&copy).unwrap();
        let store = Store::open(&path).await.unwrap();
        fs::create_dir_all(&revision).unwrap();
        fs::write(revision.join("code.zip"), "code").unwrap();
        let writes = [
            Write::Function(&function("f")),
            Write::Version(&version("f")),
        ];
        store.commit(&writes).await.unwrap();
        for name in ["thaw.db", "thaw.db-wal", "thaw.db.in-use"] {
            fs::copy(home.join(name), copy.join(name)).unwrap();
        }
        fs::rename(home.join("functions"), copy.join("functions")).unwrap();
        copy.join("thaw.db")
    }

    async fn refuses(path: &Path) -> StoreError {
        let error = match Store::open(path).await {
            Ok(store) => store.load().await.unwrap_err(),
            Err(error) => error,
        };
        let told = error.to_string();
        assert!(
            told.contains("thaw.db") && told.contains("nothing was removed"),
            "{told}"
        );
        assert!(path.with_file_name("functions/f/1/code.zip").exists());
        error
    }

    #[tokio::test]
    async fn what_is_lost_of_a_database_is_named_with_the_remedy() {
        let home = tempfile::tempdir().unwrap();
        let path = killed(home.path()).await;
        let log = path.with_file_name("thaw.db-wal");
        let (whole, whole_log) = (fs::read(&path).unwrap(), fs::read(&log).unwrap());

        fs::remove_file(&log).unwrap();
        assert!(matches!(refuses(&path).await, StoreError::LogLost { .. }));
        // As the remedy says; here the log held all of it.
        fs::remove_file(path.with_file_name("thaw.db.in-use")).unwrap();
        assert!(matches!(refuses(&path).await, StoreError::Lost { .. }));
        fs::remove_file(&path).unwrap();
        let _ = fs::remove_file(&log);
        assert!(matches!(refuses(&path).await, StoreError::Lost { .. }));

        fs::write(&log, whole_log).unwrap();
        fs::write(&path, "").unwrap();
        assert!(matches!(refuses(&path).await, StoreError::Lost { .. }));
        fs::write(&path, whole).unwrap();
        let store = Store::open(&path).await.unwrap();
        assert_eq!(store.load().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_truncated_database_is_named_with_the_remedy() {
        let home = tempfile::tempdir().unwrap();
        let path = killed(home.path()).await;
        let bare = Connection::open(&path).unwrap();
        bare.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .unwrap();
        drop(bare);
        fs::remove_file(path.with_file_name("thaw.db.in-use")).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in [whole.len() / 2, 4096 + 100, 4096, 100, 50] {
            for name in ["thaw.db-wal", "thaw.db.in-use"] {
                let _ = fs::remove_file(path.with_file_name(name));
            }
            fs::write(&path, &whole[..length]).unwrap();
            assert!(
                matches!(refuses(&path).await, StoreError::Damaged { .. }),
                "{length}"
            );
        }
        fs::write(&path, &whole[..0]).unwrap();
        assert!(matches!(refuses(&path).await, StoreError::Lost { .. }));
    }
}
