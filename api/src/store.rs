//! The database: one SQLite file, one thread that owns the connection.
//!
//! **Invariant:** when [`Store::put`] or [`Store::remove`] has answered, the change survives `kill -9` and power loss
//! (write-ahead log, `synchronous = FULL`). One process holds the file (`locking_mode = EXCLUSIVE`), so there is no
//! shared-memory file that a crash could leave in doubt.

use std::path::{Path, PathBuf};
use std::thread;

use rusqlite::{Connection, params};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::auth::keys::AccessKey;
use crate::record::Function;

/// Most operations waiting for the thread; callers beyond wait for a place.
const QUEUE_MAX: usize = 64;

/// Statements that bring the schema from version `index` to `index + 1`.
const MIGRATIONS: [&str; 2] = [
    "CREATE TABLE functions (name TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL) STRICT",
    "CREATE TABLE access_keys (id TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL) STRICT",
];

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// The database.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

/// Why the database did not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// SQLite refused.
    #[error("cannot {act} in database {}", path.display())]
    Sqlite {
        /// "open", "write a function", …
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rusqlite::Error,
    },
    /// A newer gateway wrote the file.
    #[error("database {} has schema version {found}, this gateway knows {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: usize,
        /// Ours.
        known: usize,
    },
    /// A document is not what this gateway writes.
    #[error("function {name} in the database is malformed")]
    Document {
        /// Whose document.
        name: String,
        /// What JSON found.
        #[source]
        source: serde_json::Error,
    },
    /// A key's document is not what this gateway writes.
    #[error("key {name} in the database is malformed")]
    Key {
        /// Whose document.
        name: String,
        /// What JSON found.
        #[source]
        source: serde_json::Error,
    },
    /// The thread is gone.
    #[error("the database thread has ended")]
    Ended,
}

impl StoreError {
    /// The file system has no room.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Sqlite { source, .. }
            if source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
    }
}

impl Store {
    /// Opens the file, or makes it, and brings its schema up to date.
    ///
    /// # Errors
    /// The file is not a database, is newer than this gateway, or cannot be written.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE_MAX);
        let (opened, answer) = oneshot::channel();
        let path = path.to_owned();
        thread::Builder::new()
            .name("thaw-store".to_owned())
            .spawn(move || match connect(&path) {
                Ok(mut connection) => {
                    let _ = opened.send(Ok(()));
                    while let Some(job) = queue.blocking_recv() {
                        job(&mut connection);
                    }
                }
                Err(error) => {
                    let _ = opened.send(Err(error));
                }
            })
            .map_err(|_| StoreError::Ended)?;
        answer.await.map_err(|_| StoreError::Ended)??;
        Ok(Self { jobs })
    }

    /// All functions, ordered by name.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load(&self) -> Result<Vec<Function>, StoreError> {
        let rows = self
            .run("read the functions", |connection| {
                connection
                    .prepare("SELECT name, document FROM functions ORDER BY name")?
                    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect::<Result<Vec<(String, String)>, _>>()
            })
            .await?;
        rows.into_iter()
            .map(|(name, document)| {
                serde_json::from_str(&document)
                    .map_err(|source| StoreError::Document { name, source })
            })
            .collect()
    }

    /// Writes a function, new or changed.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn put(&self, function: &Function) -> Result<(), StoreError> {
        let name = function.name.clone();
        let document = serde_json::to_string(function).map_err(|source| StoreError::Document {
            name: name.clone(),
            source,
        })?;
        self.run("write a function", move |connection| {
            connection
                .execute(
                    "INSERT INTO functions (name, document) VALUES (?1, ?2)
                     ON CONFLICT (name) DO UPDATE SET document = excluded.document",
                    params![name, document],
                )
                .map(|_| ())
        })
        .await
    }

    /// Forgets a function.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove(&self, name: &str) -> Result<(), StoreError> {
        let name = name.to_owned();
        self.run("remove a function", move |connection| {
            connection
                .execute("DELETE FROM functions WHERE name = ?1", params![name])
                .map(|_| ())
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        act: &'static str,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = work(connection).map_err(|source| failed(act, connection, source));
            let _ = answer.send(result);
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Ended)?;
        answered.await.map_err(|_| StoreError::Ended)?
    }

    /// All access keys, ordered by id.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load_keys(&self) -> Result<Vec<AccessKey>, StoreError> {
        let rows = self
            .run("read the keys", |connection| {
                connection
                    .prepare("SELECT id, document FROM access_keys ORDER BY id")?
                    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect::<Result<Vec<(String, String)>, _>>()
            })
            .await?;
        rows.into_iter()
            .map(|(name, document)| {
                serde_json::from_str(&document).map_err(|source| StoreError::Key { name, source })
            })
            .collect()
    }

    /// Writes an access key, new or changed.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn put_key(&self, key: &AccessKey) -> Result<(), StoreError> {
        let name = key.id.clone();
        let document = serde_json::to_string(key).map_err(|source| StoreError::Key {
            name: name.clone(),
            source,
        })?;
        self.run("write a key", move |connection| {
            connection
                .execute(
                    "INSERT INTO access_keys (id, document) VALUES (?1, ?2)
                     ON CONFLICT (id) DO UPDATE SET document = excluded.document",
                    params![name, document],
                )
                .map(|_| ())
        })
        .await
    }

    /// Forgets an access key.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove_key(&self, id: &str) -> Result<(), StoreError> {
        let id = id.to_owned();
        self.run("remove a key", move |connection| {
            connection
                .execute("DELETE FROM access_keys WHERE id = ?1", params![id])
                .map(|_| ())
        })
        .await
    }
}

fn failed(act: &'static str, connection: &Connection, source: rusqlite::Error) -> StoreError {
    StoreError::Sqlite {
        act,
        path: connection.path().unwrap_or_default().into(),
        source,
    }
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let refused = |act| {
        move |source| StoreError::Sqlite {
            act,
            path: path.to_owned(),
            source,
        }
    };
    let mut connection = Connection::open(path).map_err(refused("open"))?;
    // The order matters: with the exclusive lock asked for first, the log needs no shared memory.
    connection
        .execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL) STRICT;",
        )
        .map_err(refused("open"))?;
    let version: i64 = connection
        .query_row(
            "SELECT coalesce(max(version), 0) FROM schema_version",
            [],
            |row| row.get(0),
        )
        .map_err(refused("read the schema version"))?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version > MIGRATIONS.len() {
        return Err(StoreError::Newer {
            path: path.to_owned(),
            found: version,
            known: MIGRATIONS.len(),
        });
    }
    let transaction = connection
        .transaction()
        .map_err(refused("migrate the schema"))?;
    for (next, statements) in (1_i64..).zip(MIGRATIONS).skip(version) {
        transaction
            .execute_batch(statements)
            .and_then(|()| {
                transaction.execute(
                    "INSERT INTO schema_version (version) VALUES (?1)",
                    params![next],
                )
            })
            .map_err(refused("migrate the schema"))?;
    }
    transaction
        .commit()
        .map_err(refused("migrate the schema"))?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::function;

    #[tokio::test]
    async fn what_was_written_is_there_after_a_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thaw.db");
        let store = Store::open(&path).await.unwrap();
        store.put(&function("b")).await.unwrap();
        store.put(&function("a")).await.unwrap();
        store.remove("b").await.unwrap();
        assert!(!folder.path().join("thaw.db-shm").exists());
        let (jobs, stopped) = (store.jobs.clone(), store);
        drop(stopped);
        drop(jobs);
        // The old thread ends by itself; SQLite's lock is what a second opening waits for.
        let store = loop {
            match Store::open(&path).await {
                Ok(store) => break store,
                Err(StoreError::Sqlite { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(store.load().await.unwrap(), vec![function("a")]);
    }

    #[tokio::test]
    async fn a_database_of_a_newer_gateway_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thaw.db");
        Connection::open(&path)
            .unwrap()
            .execute_batch(
                "CREATE TABLE schema_version (version INTEGER NOT NULL) STRICT;
                 INSERT INTO schema_version VALUES (99);",
            )
            .unwrap();
        assert!(matches!(
            Store::open(&path).await,
            Err(StoreError::Newer { found: 99, .. })
        ));
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thaw.db");
        std::fs::write(&path, vec![b'x'; 8192]).unwrap();
        assert!(matches!(
            Store::open(&path).await,
            Err(StoreError::Sqlite { act: "open", .. })
        ));
    }
}
