//! The gateway's state: all functions, and what they share.
//!
//! **Invariant:** memory follows the database: a change is committed first and shown afterwards, one at a time. **Invariant:** of the
//! requests that change one function, one runs at a time ([`App::claim_name`]); the others are refused as Lambda does.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub mod running;

use running::{Entrance, Running};

use crate::auth::Auth;
use crate::clock;
use crate::deploy;
use crate::engine::{Engine, Sandboxes};
use crate::events::destination::Courier;
use crate::events::{Event, Line};
use crate::gateway::{GatewayConfig, Limits, StartError};
use crate::invocation::complaints::Complaints;
use crate::invocation::duplicates::Duplicates;
use crate::layers::Layers;
use crate::logs::Log;
use crate::progress::Progress;
use crate::record::{Function, Version, VersionId};
use crate::s3::S3;
use crate::store::{Store, StoreError, Stored, Write};

/// Bodies of more than a megabyte that are held at once; others wait.
const UPLOADS_MAX: usize = 4;

/// Snapshots that are verified at once when the gateway starts.
const OPENINGS_MAX: usize = 2;

/// How long the end of the machine below may take.
const ENGINE_CLOSE_LIMIT: Duration = Duration::from_secs(15);

/// The gateway's state.
pub struct App {
    /// `THAW_HOME`.
    pub home: PathBuf,
    /// Where the gateway serves.
    pub address: SocketAddr,
    /// Whether it speaks TLS.
    pub is_encrypted: bool,
    /// Where code can come from beside requests.
    pub s3: Option<S3>,
    /// What posts records to URLs.
    pub courier: Courier,
    /// Region in ARNs.
    pub region: String,
    /// Account in ARNs.
    pub account_id: String,
    /// Sandboxes kept restored for each function.
    pub ready_count: usize,
    /// Limits.
    pub limits: Limits,
    /// Keys.
    pub auth: Arc<Auth>,
    /// The database.
    pub store: Store,
    /// The machine below.
    pub engine: Arc<dyn Engine>,
    /// Whether functions can be invoked.
    pub health: watch::Sender<Health>,
    /// Ends streams and background work.
    pub stop: CancellationToken,
    /// Background work.
    pub tasks: TaskTracker,
    /// One permit for each function that is being frozen.
    pub freezes: Semaphore,
    /// One permit for each snapshot that is being verified.
    pub openings: Semaphore,
    /// One permit for each large body in memory.
    pub uploads: Semaphore,
    /// Requests that clients may send again.
    pub duplicates: Arc<Duplicates>,
    /// Layers.
    pub layers: Layers,
    functions: RwLock<BTreeMap<String, Arc<LiveFunction>>>,
    changing: Arc<Mutex<HashSet<String>>>,
    /// Orders commits, so that memory and database change together.
    commits: tokio::sync::Mutex<()>,
}

/// Whether functions can be invoked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not yet, and why.
    NotReady(String),
    /// They can.
    Ready,
    /// Not any more.
    Stopping,
}

/// One function in memory: what its versions share.
pub struct LiveFunction {
    /// The bare name.
    pub name: String,
    /// Its log.
    pub log: Arc<Log>,
    /// `$LATEST`.
    pub latest: Arc<Live>,
    record: RwLock<Arc<Function>>,
    /// Its asynchronous invocations.
    pub events: Line,
    running: Entrance,
    published: RwLock<BTreeMap<VersionId, Arc<Live>>>,
}

/// One version of a function in memory.
pub struct Live {
    /// The function's bare name.
    pub name: String,
    /// Which version.
    pub id: VersionId,
    /// For people: the name, and the number of a published version.
    pub label: String,
    /// Its sandboxes.
    pub pool: watch::Sender<PoolSlot>,
    /// Steps of its newest deployment.
    pub progress: Progress,
    /// The function's log.
    pub log: Arc<Log>,
    record: RwLock<Arc<Version>>,
    last_error: Mutex<Option<String>>,
    complaints: Mutex<Complaints>,
    /// The revision that was frozen again because its snapshot was refused.
    frozen_again: Mutex<Option<String>>,
    job: Mutex<Option<AbortHandle>>,
}

/// A version's sandboxes.
#[derive(Clone)]
pub enum PoolSlot {
    /// None: it is not deployed yet, failed to initialise, or was deleted.
    Closed,
    /// The snapshot is being verified.
    Opening,
    /// There.
    Open(Arc<dyn Sandboxes>),
    /// The snapshot cannot be used, and why.
    Failed(String),
}

/// The right to change the function of one name; given back on drop.
pub struct NameClaim {
    name: String,
    changing: Arc<Mutex<HashSet<String>>>,
}

impl Drop for NameClaim {
    fn drop(&mut self) {
        self.changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.name);
    }
}

impl App {
    /// Loads all functions and begins to make them ready.
    ///
    /// # Errors
    /// The database cannot be read, or the state folder cannot be cleaned.
    pub async fn open(
        config: GatewayConfig,
        address: SocketAddr,
        store: Store,
        auth: Arc<Auth>,
        engine: Arc<dyn Engine>,
    ) -> Result<(Arc<Self>, TcpListener), StartError> {
        let records = store.load().await?;
        let folder = config.home.join("functions");
        deploy::clean(&folder, &records).map_err(|(path, source)| StartError::Home {
            act: "clean",
            path,
            source,
        })?;
        let layers = Layers::new(&config.home, store.load_layers().await?);
        layers.clean().map_err(|(path, source)| StartError::Home {
            act: "clean",
            path,
            source,
        })?;
        let mut events: BTreeMap<String, Vec<Event>> = BTreeMap::new();
        for event in store.events().await? {
            events
                .entry(event.function.clone())
                .or_default()
                .push(event);
        }
        let functions = records
            .into_iter()
            .map(|stored| {
                let name = stored.function.name.clone();
                let log = Log::new(folder.join(&name).join("log"));
                let events = events.remove(&name).unwrap_or_default();
                (name, Arc::new(LiveFunction::new(stored, &events, log)))
            })
            .collect();
        let app = Arc::new(Self {
            home: config.home,
            address,
            is_encrypted: config.tls.is_some(),
            s3: config.s3,
            courier: Courier::new(config.trust)?,
            region: config.region,
            account_id: config.account_id,
            ready_count: config.ready_count,
            auth,
            store,
            engine,
            health: watch::Sender::new(Health::NotReady("the gateway is starting".to_owned())),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            freezes: Semaphore::new(config.limits.freeze_concurrency_max),
            openings: Semaphore::new(OPENINGS_MAX),
            uploads: Semaphore::new(UPLOADS_MAX),
            limits: config.limits,
            duplicates: Arc::default(),
            layers,
            functions: RwLock::new(functions),
            changing: Arc::default(),
            commits: tokio::sync::Mutex::new(()),
        });
        app.tasks.spawn(deploy::start_all(Arc::clone(&app)));
        Ok((app, config.listener))
    }

    /// The folder of one function.
    #[must_use]
    pub fn folder(&self, name: &str) -> PathBuf {
        self.home.join("functions").join(name)
    }

    /// The unqualified ARN of a function.
    #[must_use]
    pub fn arn(&self, name: &str) -> String {
        format!(
            "arn:aws:lambda:{}:{}:function:{name}",
            self.region, self.account_id
        )
    }

    /// The ARN of a version.
    #[must_use]
    pub fn version_arn(&self, name: &str, id: VersionId) -> String {
        format!("{}:{id}", self.arn(name))
    }

    /// One function.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<LiveFunction>> {
        self.functions().get(name).cloned()
    }

    /// All functions, ordered by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<LiveFunction>> {
        self.functions().values().cloned().collect()
    }

    /// How many functions there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.functions().len()
    }

    fn functions(&self) -> RwLockReadGuard<'_, BTreeMap<String, Arc<LiveFunction>>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits a new function with its versions and shows it.
    ///
    /// # Errors
    /// The database refused; nothing is shown.
    pub async fn insert(&self, function: Arc<LiveFunction>) -> Result<(), StoreError> {
        let _commit = self.commits.lock().await;
        let record = function.record();
        let versions: Vec<Arc<Version>> = function.all().iter().map(|v| v.record()).collect();
        let mut writes = vec![Write::Function(&record)];
        writes.extend(versions.iter().map(|version| Write::Version(version)));
        self.store.commit(&writes).await?;
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        functions.insert(function.name.clone(), function);
        Ok(())
    }

    /// Commits the end of a function and hides it.
    ///
    /// # Errors
    /// The database refused; the function is still there.
    pub async fn remove(&self, function: &Arc<LiveFunction>) -> Result<(), StoreError> {
        let _commit = self.commits.lock().await;
        let name = function.name.as_str();
        self.store.commit(&[Write::RemoveFunction(name)]).await?;
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        functions.remove(name);
        Ok(())
    }

    /// Commits a change of what versions share, together with a new version if there is one, and shows both. `None` when the
    /// function is gone, or `change` says that there is nothing to change.
    ///
    /// # Errors
    /// The database refused; memory still shows the old record.
    pub async fn change_function<T>(
        &self,
        function: &Arc<LiveFunction>,
        new_version: Option<Arc<Live>>,
        change: impl FnOnce(&mut Function) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let _commit = self.commits.lock().await;
        let found = self.find(&function.name);
        if found.is_none_or(|found| !Arc::ptr_eq(&found, function)) {
            return Ok(None);
        }
        let mut record = (*function.record()).clone();
        let Some(value) = change(&mut record) else {
            return Ok(None);
        };
        let version = new_version.as_ref().map(|version| version.record());
        let mut writes = vec![Write::Function(&record)];
        writes.extend(version.iter().map(|version| Write::Version(version)));
        self.store.commit(&writes).await?;
        function.show(record);
        if let Some(version) = new_version {
            function.published_mut().insert(version.id, version);
        }
        let record = function.record();
        for live in function.published().values() {
            live.keep_ready(&record);
        }
        Ok(Some(value))
    }

    /// Has as many of a version's sandboxes ready as are provisioned for it.
    pub fn keep_ready(&self, live: &Live) {
        if let Some(function) = self.find(&live.name) {
            live.keep_ready(&function.record());
        }
    }

    /// Commits the end of a published version, of its settings and policy, and hides it.
    ///
    /// # Errors
    /// The database refused; the version is still there.
    pub async fn remove_version(
        &self,
        function: &LiveFunction,
        id: VersionId,
    ) -> Result<(), StoreError> {
        let _commit = self.commits.lock().await;
        let mut record = (*function.record()).clone();
        record.event_configs.remove(&id.to_string());
        record.provisioned.remove(&id.to_string());
        record.policies.remove(&id.to_string());
        let writes = [
            Write::RemoveVersion(&function.name, id),
            Write::Function(&record),
        ];
        self.store.commit(&writes).await?;
        function.show(record);
        function.published_mut().remove(&id);
        Ok(())
    }

    /// Whether this very version, not one of a function that was created under its name later, is still there.
    #[must_use]
    pub fn is_current(&self, live: &Arc<Live>) -> bool {
        self.find(&live.name)
            .and_then(|function| function.version(live.id))
            .is_some_and(|found| Arc::ptr_eq(&found, live))
    }

    /// The right to change the function of this name; `None` while another request has it.
    #[must_use]
    pub fn claim_name(&self, name: &str) -> Option<NameClaim> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        changing.insert(name.to_owned()).then(|| NameClaim {
            name: name.to_owned(),
            changing: Arc::clone(&self.changing),
        })
    }

    /// Commits a change of a version and shows it. `None` when the version is gone, or `change` says that there is
    /// nothing to change (any more).
    ///
    /// # Errors
    /// The database refused; memory still shows the old record.
    pub async fn change<T>(
        &self,
        live: &Arc<Live>,
        change: impl FnOnce(&mut Version) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let _commit = self.commits.lock().await;
        if !self.is_current(live) {
            return Ok(None);
        }
        let mut record = (*live.record()).clone();
        let Some(value) = change(&mut record) else {
            return Ok(None);
        };
        self.store.commit(&[Write::Version(&record)]).await?;
        live.show(record);
        Ok(Some(value))
    }

    /// Ends background work, pools and monitors. Requests have ended before, or are cut off.
    pub async fn close(&self) {
        self.health.send_replace(Health::Stopping);
        self.stop.cancel();
        for live in self.all().iter().flat_map(|function| function.all()) {
            live.abort_job();
        }
        self.engine.shutdown(ENGINE_CLOSE_LIMIT).await;
        self.tasks.close();
        let _ = tokio::time::timeout(ENGINE_CLOSE_LIMIT, self.tasks.wait()).await;
    }
}

impl LiveFunction {
    /// A function in memory, without sandboxes.
    #[must_use]
    pub fn new(stored: Stored, events: &[Event], log: Log) -> Self {
        let log = Arc::new(log);
        let live = |version| Arc::new(Live::new(version, Arc::clone(&log)));
        let published = stored.published.into_iter();
        Self {
            name: stored.function.name.clone(),
            latest: live(stored.latest),
            record: RwLock::new(Arc::new(stored.function)),
            events: Line::new(events, clock::steady_unix_ms()),
            running: Entrance::default(),
            published: RwLock::new(published.map(|v| (v.id, live(v))).collect()),
            log,
        }
    }

    /// What its versions share, as committed.
    #[must_use]
    pub fn record(&self) -> Arc<Function> {
        let record = self.record.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&record)
    }

    fn show(&self, record: Function) {
        let mut slot = self.record.write().unwrap_or_else(PoisonError::into_inner);
        *slot = Arc::new(record);
    }

    /// Counts an invocation of a version, until the answer is dropped; `None` when as many run as are reserved for it.
    #[must_use]
    pub fn enter(&self, id: VersionId) -> Option<Running> {
        self.running.enter(&self.record(), id)
    }

    /// One version.
    #[must_use]
    pub fn version(&self, id: VersionId) -> Option<Arc<Live>> {
        match id {
            VersionId::Latest => Some(Arc::clone(&self.latest)),
            VersionId::Number(_) => self.published().get(&id).cloned(),
        }
    }

    /// All versions, `$LATEST` first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Live>> {
        let published = self.published();
        std::iter::once(&self.latest)
            .chain(published.values())
            .cloned()
            .collect()
    }

    fn published(&self) -> RwLockReadGuard<'_, BTreeMap<VersionId, Arc<Live>>> {
        self.published
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn published_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<VersionId, Arc<Live>>> {
        self.published
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    /// Has as many of its sandboxes ready as are provisioned for it, once it has sandboxes. Of `$LATEST`, for which none can be
    /// provisioned, the gateway's own number stays.
    pub fn keep_ready(&self, function: &Function) {
        if let (VersionId::Number(_), PoolSlot::Open(pool)) = (self.id, &*self.pool.borrow()) {
            let count = function.provisioned_for(self.id);
            pool.keep_ready(usize::try_from(count).unwrap_or(usize::MAX));
        }
    }

    /// A version in memory, without sandboxes.
    #[must_use]
    pub fn new(record: Version, log: Arc<Log>) -> Self {
        let label = match record.id {
            VersionId::Latest => record.name.clone(),
            VersionId::Number(number) => format!("{}:{number}", record.name),
        };
        Self {
            name: record.name.clone(),
            id: record.id,
            label,
            pool: watch::Sender::new(PoolSlot::Closed),
            progress: Progress::default(),
            log,
            record: RwLock::new(Arc::new(record)),
            last_error: Mutex::new(None),
            complaints: Mutex::default(),
            frozen_again: Mutex::new(None),
            job: Mutex::new(None),
        }
    }

    /// The version as committed.
    #[must_use]
    pub fn record(&self) -> Arc<Version> {
        let record = self.record.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&record)
    }

    fn show(&self, record: Version) {
        let mut slot = self.record.write().unwrap_or_else(PoisonError::into_inner);
        *slot = Arc::new(record);
    }

    /// Notes that this revision is frozen again as its snapshot was refused; `false` if it was before.
    #[must_use]
    pub fn freezes_again(&self, revision: &str) -> bool {
        let mut last = (self.frozen_again.lock()).unwrap_or_else(PoisonError::into_inner);
        let is_new = last.as_deref() != Some(revision);
        if is_new {
            *last = Some(revision.to_owned());
        }
        is_new
    }

    /// What was logged of this machine's failures.
    pub fn complaints(&self) -> MutexGuard<'_, Complaints> {
        self.complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest failure since the gateway started.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        let slot = self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    }

    /// Remembers a failure.
    pub fn set_last_error(&self, text: Option<String>) {
        let mut slot = self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *slot = text;
    }

    /// Remembers the deployment that runs.
    pub fn set_job(&self, job: AbortHandle) {
        let mut slot = self.job.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = slot.replace(job) {
            old.abort();
        }
    }

    /// Ends the deployment that runs; its VM ends with it.
    pub fn abort_job(&self) {
        let mut slot = self.job.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = slot.take() {
            job.abort();
        }
    }
}
