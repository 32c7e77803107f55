//! The database: one SQLite file, one thread that owns the connection.
//!
//! **Invariant:** when [`Store::commit`] has answered, the change survives `kill -9` and power loss
//! (write-ahead log, `synchronous = FULL`). One process holds the file (`locking_mode = EXCLUSIVE`), so there is no
//! shared-memory file that a crash could leave in doubt.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, params_from_iter};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::auth::keys::AccessKey;
use crate::events::Event;
use crate::layers::Layer;
use crate::record::{Function, Version, VersionId};

mod whole;

use whole::{check_new, check_whole, in_use};

/// Most operations waiting for the thread; callers beyond wait for a place.
const QUEUE_MAX: usize = 64;

/// Statements that bring the schema from version `index` to `index + 1`.
const MIGRATIONS: [&str; 6] = [
    "CREATE TABLE functions (name TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL) STRICT",
    // What versions share got a document of its own.
    "ALTER TABLE functions RENAME TO latest;
     CREATE TABLE functions (name TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL) STRICT;
     CREATE TABLE versions (name TEXT NOT NULL REFERENCES functions ON DELETE CASCADE, id TEXT NOT NULL, document TEXT NOT NULL, PRIMARY KEY (name, id)) STRICT;
     INSERT INTO functions SELECT name, json_object('name', name, 'tags',
         json(coalesce(json_extract(document, '$.tags'), '{}'))) FROM latest;
     INSERT INTO versions SELECT name, '$LATEST', document FROM latest;
     DROP TABLE latest",
    "CREATE TABLE events (id TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL REFERENCES functions ON DELETE CASCADE,
         document TEXT NOT NULL, payload BLOB NOT NULL) STRICT;
     CREATE INDEX events_of_functions ON events (name)",
    "CREATE TABLE access_keys (id TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL) STRICT",
    "CREATE TABLE layers (name TEXT PRIMARY KEY NOT NULL, document TEXT NOT NULL) STRICT",
    // Keys got limits, which a gateway that knows none must not ignore.
    "UPDATE access_keys SET document = json_set(document, '$.limits', json('{}'))",
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
    /// The file is no database, or not a whole one.
    #[error("database {} is damaged: put a backup of it in its place, or move it away together with functions/ and layers/ beside it \
        to begin anew; nothing was removed", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What SQLite found.
        #[source]
        source: rusqlite::Error,
    },
    /// There are functions or layers, and the file is new or empty.
    #[error("database {} is gone or empty, and {} is not: put a backup of it in its place, or move that away to begin anew; \
        nothing was removed", path.display(), rest.display())]
    Lost {
        /// The file.
        path: PathBuf,
        /// The folder that it should know of, or its log.
        rest: PathBuf,
    },
    /// The last gateway was killed, and its log of writes is not there.
    #[error("{} is gone, and with it the last changes of the database: put it back, or remove {} to go on without them; nothing was \
        removed", log.display(), marker.display())]
    LogLost {
        /// The write-ahead log.
        log: PathBuf,
        /// What says that there must be one.
        marker: PathBuf,
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
    #[error("the document of {name} in the database is malformed")]
    Document {
        /// Whose document.
        name: String,
        /// What JSON found.
        #[source]
        source: serde_json::Error,
    },
    /// A function has no `$LATEST`, which no gateway leaves out.
    #[error("function {0} in the database has no $LATEST")]
    NoLatest(String),
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

/// A function as the database has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// What its versions share.
    pub function: Function,
    /// `$LATEST`.
    pub latest: Version,
    /// Published versions, ordered by number.
    pub published: Vec<Version>,
}

/// One change of the database.
#[derive(Clone, Copy, Debug)]
pub enum Write<'a> {
    /// A function, new or changed.
    Function(&'a Function),
    /// A version, new or changed.
    Version(&'a Version),
    /// The end of a function and of all its versions.
    RemoveFunction(&'a str),
    /// The end of one version of a function.
    RemoveVersion(&'a str, VersionId),
    /// An event, new or changed. Refused if its function is not there.
    Event(&'a Event),
    /// The end of an event.
    RemoveEvent(&'a str),
    /// An access key, new or changed.
    Key(&'a AccessKey),
    /// The end of an access key.
    RemoveKey(&'a str),
    /// A layer, new or changed.
    Layer(&'a Layer),
}

impl Write<'_> {
    fn statement(&self) -> Result<(&'static str, Vec<Value>), StoreError> {
        let text = |text: &str| Value::Text(text.to_owned());
        Ok(match self {
            Self::Function(function) => (
                "INSERT INTO functions (name, document) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET document = excluded.document",
                vec![text(&function.name), write(&function.name, function)?],
            ),
            Self::Version(version) => (
                "INSERT INTO versions (name, id, document) VALUES (?1, ?2, ?3)
                 ON CONFLICT (name, id) DO UPDATE SET document = excluded.document",
                vec![
                    text(&version.name),
                    text(&version.id.to_string()),
                    write(&version.name, version)?,
                ],
            ),
            Self::RemoveFunction(name) => {
                ("DELETE FROM functions WHERE name = ?1", vec![text(name)])
            }
            Self::RemoveVersion(name, id) => (
                "DELETE FROM versions WHERE name = ?1 AND id = ?2",
                vec![text(name), text(&id.to_string())],
            ),
            Self::Event(event) => (
                "INSERT INTO events (id, name, document, payload) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO UPDATE SET document = excluded.document",
                vec![
                    text(&event.id),
                    text(&event.function),
                    write(&event.function, event)?,
                    Value::Blob(event.payload.to_vec()),
                ],
            ),
            Self::Key(key) => (
                "INSERT INTO access_keys (id, document) VALUES (?1, ?2)
                 ON CONFLICT (id) DO UPDATE SET document = excluded.document",
                vec![text(&key.id), write(&key.id, key)?],
            ),
            Self::Layer(layer) => (
                "INSERT INTO layers (name, document) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET document = excluded.document",
                vec![text(&layer.name), write(&layer.name, layer)?],
            ),
            Self::RemoveKey(id) => ("DELETE FROM access_keys WHERE id = ?1", vec![text(id)]),
            Self::RemoveEvent(id) => ("DELETE FROM events WHERE id = ?1", vec![text(id)]),
        })
    }
}

fn read<T: DeserializeOwned>(name: &str, document: &str) -> Result<T, StoreError> {
    serde_json::from_str(document).map_err(|source| StoreError::Document {
        name: name.to_owned(),
        source,
    })
}

fn write<T: Serialize>(name: &str, document: &T) -> Result<Value, StoreError> {
    let text = serde_json::to_string(document);
    text.map(Value::Text)
        .map_err(|source| StoreError::Document {
            name: name.to_owned(),
            source,
        })
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
                    // Best effort: without it the loss of a log is not noticed.
                    let _ = std::fs::write(in_use(&path), "");
                    let _ = opened.send(Ok(()));
                    while let Some(job) = queue.blocking_recv() {
                        job(&mut connection);
                    }
                    // Before the connection is closed, and the log removed with it.
                    let _ = std::fs::remove_file(in_use(&path));
                }
                Err(error) => {
                    let _ = opened.send(Err(error));
                }
            })
            .map_err(|_| StoreError::Ended)?;
        answer.await.map_err(|_| StoreError::Ended)??;
        Ok(Self { jobs })
    }

    /// All functions with their versions, ordered by name and version.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load(&self) -> Result<Vec<Stored>, StoreError> {
        let (functions, versions) = self
            .run("read the functions", |connection| {
                let rows = |statement: &str| {
                    connection
                        .prepare(statement)?
                        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                        .collect::<Result<Vec<(String, String)>, _>>()
                };
                Ok((
                    rows("SELECT name, document FROM functions ORDER BY name")?,
                    rows("SELECT name, document FROM versions")?,
                ))
            })
            .await?;
        let mut of: BTreeMap<String, Vec<Version>> = BTreeMap::new();
        for (name, text) in versions {
            let version = read(&name, &text)?;
            of.entry(name).or_default().push(version);
        }
        functions
            .into_iter()
            .map(|(name, text)| {
                let function = read(&name, &text)?;
                let mut published = of.remove(&name).unwrap_or_default();
                published.sort_by_key(|version| version.id);
                if published
                    .first()
                    .is_none_or(|first| first.id != VersionId::Latest)
                {
                    return Err(StoreError::NoLatest(name));
                }
                Ok(Stored {
                    function,
                    latest: published.remove(0),
                    published,
                })
            })
            .collect()
    }

    /// All events that wait, without their payloads.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn events(&self) -> Result<Vec<Event>, StoreError> {
        self.documents("read the events", "SELECT name, document FROM events")
            .await
    }

    /// One event, with its payload; `None` once it has ended.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn event(&self, id: &str) -> Result<Option<Event>, StoreError> {
        let id = id.to_owned();
        let row = self
            .run("read an event", move |connection| {
                connection
                    .query_row(
                        "SELECT name, document, payload FROM events WHERE id = ?1",
                        [id],
                        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
                    )
                    .optional()
            })
            .await?;
        let Some((name, text, payload)): Option<(String, String, Vec<u8>)> = row else {
            return Ok(None);
        };
        let event: Event = read(&name, &text)?;
        Ok(Some(Event {
            payload: payload.into(),
            ..event
        }))
    }

    /// Carries out all writes, or none.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn commit(&self, writes: &[Write<'_>]) -> Result<(), StoreError> {
        let statements = writes
            .iter()
            .map(Write::statement)
            .collect::<Result<Vec<_>, _>>()?;
        self.run("write", move |connection| {
            let transaction = connection.transaction()?;
            for (statement, values) in statements {
                transaction.execute(statement, params_from_iter(values))?;
            }
            transaction.commit()
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

    /// All layers, ordered by name.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load_layers(&self) -> Result<Vec<Layer>, StoreError> {
        self.documents(
            "read the layers",
            "SELECT name, document FROM layers ORDER BY name",
        )
        .await
    }

    /// All access keys, ordered by id.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load_keys(&self) -> Result<Vec<AccessKey>, StoreError> {
        self.documents(
            "read the keys",
            "SELECT id, document FROM access_keys ORDER BY id",
        )
        .await
    }

    /// The documents that a statement selects with their names.
    async fn documents<T: DeserializeOwned>(
        &self,
        act: &'static str,
        statement: &'static str,
    ) -> Result<Vec<T>, StoreError> {
        let rows = self
            .run(act, move |connection| {
                connection
                    .prepare(statement)?
                    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect::<Result<Vec<(String, String)>, _>>()
            })
            .await?;
        rows.iter().map(|(name, text)| read(name, text)).collect()
    }
}

fn failed(act: &'static str, connection: &Connection, source: rusqlite::Error) -> StoreError {
    refusal(
        act,
        Path::new(connection.path().unwrap_or_default()),
        source,
    )
}

fn refusal(act: &'static str, path: &Path, source: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            StoreError::Damaged { path, source }
        }
        _ => StoreError::Sqlite { act, path, source },
    }
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let refused = |act| move |source| refusal(act, path, source);
    check_whole(path)?;
    let mut connection = Connection::open(path).map_err(refused("open"))?;
    // The order matters: with the exclusive lock asked for first, the log needs no shared memory.
    connection
        .execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
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
    if version == 0 {
        check_new(path)?;
    }
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
                transaction.execute("INSERT INTO schema_version (version) VALUES (?1)", [next])
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
    use thaw_api_types::keys::KeyLimits;

    use super::*;
    use crate::testing::{function, version};

    #[tokio::test]
    async fn what_was_written_is_there_after_a_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thaw.db");
        let store = Store::open(&path).await.unwrap();
        let (a, b, first) = (function("a"), function("b"), version("a"));
        let published = Version {
            id: VersionId::Number(10),
            ..first.clone()
        };
        let second = Version {
            id: VersionId::Number(2),
            ..first.clone()
        };
        let of_b = version("b");
        store
            .commit(&[Write::Function(&b), Write::Version(&of_b)])
            .await
            .unwrap();
        store
            .commit(&[
                Write::Function(&a),
                Write::Version(&published),
                Write::Version(&first),
                Write::Version(&second),
            ])
            .await
            .unwrap();
        store.commit(&[Write::RemoveFunction("b")]).await.unwrap();
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
        assert_eq!(
            store.load().await.unwrap(),
            vec![Stored {
                function: a.clone(),
                latest: first.clone(),
                published: vec![second, published.clone()]
            }]
        );
        let removed = VersionId::Number(2);
        store
            .commit(&[Write::RemoveVersion("a", removed)])
            .await
            .unwrap();
        assert_eq!(
            store.load().await.unwrap(),
            vec![Stored {
                function: a,
                latest: first,
                published: vec![published]
            }]
        );
    }

    #[tokio::test]
    async fn of_several_writes_all_happen_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("thaw.db")).await.unwrap();
        let orphan = version("orphan");
        let refused = store
            .commit(&[Write::Function(&function("a")), Write::Version(&orphan)])
            .await;
        assert!(matches!(refused, Err(StoreError::Sqlite { .. })));
        assert_eq!(store.load().await.unwrap(), vec![]);
        store
            .commit(&[Write::Function(&function("a"))])
            .await
            .unwrap();
        assert!(matches!(store.load().await, Err(StoreError::NoLatest(name)) if name == "a"));
    }

    #[tokio::test]
    async fn functions_of_the_first_schema_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thaw.db");
        let mut document = serde_json::to_value(version("f")).unwrap();
        let members = document.as_object_mut().unwrap();
        members.remove("id");
        members.insert("tags".to_owned(), serde_json::json!({"team": "ours"}));
        let old = Connection::open(&path).unwrap();
        old.execute_batch(&format!(
            "CREATE TABLE schema_version (version INTEGER NOT NULL) STRICT;
             INSERT INTO schema_version VALUES (1); {}",
            MIGRATIONS[0]
        ))
        .unwrap();
        old.execute(
            "INSERT INTO functions VALUES ('f', ?1)",
            [document.to_string()],
        )
        .unwrap();
        drop(old);
        let store = Store::open(&path).await.unwrap();
        let mut expected = function("f");
        expected.tags.insert("team".to_owned(), "ours".to_owned());
        assert_eq!(
            store.load().await.unwrap(),
            vec![Stored {
                function: expected,
                latest: version("f"),
                published: vec![]
            }]
        );
    }

    #[tokio::test]
    async fn keys_of_a_schema_without_limits_have_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thaw.db");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(&format!(
            "CREATE TABLE schema_version (version INTEGER NOT NULL) STRICT;
             INSERT INTO schema_version VALUES (5); {}",
            MIGRATIONS[..5].join(";")
        ))
        .unwrap();
        let key = r#"{"id":"AKIA","secret":"s","name":"ci","allow":"invoke","functions":"*","enabled":true,"created_unix_ms":1}"#;
        old.execute("INSERT INTO access_keys VALUES ('AKIA', ?1)", [key])
            .unwrap();
        drop(old);
        let keys = Store::open(&path).await.unwrap().load_keys().await.unwrap();
        assert_eq!(keys.len(), 1);
        assert_eq!(
            (keys[0].secret.as_str(), keys[0].limits),
            ("s", KeyLimits::default())
        );
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
            Err(StoreError::Damaged { .. })
        ));
    }
}
