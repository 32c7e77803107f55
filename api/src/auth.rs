//! Who may do what: signatures, keys and their permissions.
//!
//! Owns: signature version 4 ([`sigv4`]), access keys ([`keys`]), what they may use ([`quota`]), which action a request is
//! ([`action`]), and the way in ([`admission`]). Must not know: what an operation does.
//!
//! With auth required, every request is signed but those for `/healthz` and for function URLs that say otherwise. The
//! gateway's owner has the *root key*, a file in `THAW_HOME` for his user alone that the command line finds by itself: who can
//! read the home could change the database, too, so the file gives away nothing. All other keys are made with it, over the
//! gateway's own routes, and are stored in the database.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError, RwLock};

use thaw_api_types::keys::{ChangeKeyRequest, CreateKeyRequest, KeySummary};
use thaw_runtime::Point;
use thiserror::Error;
use tokio::sync::Mutex;

pub mod action;
pub mod admission;
pub mod keys;
mod links;
mod pages;
pub mod quota;
pub(crate) mod room;
pub mod routes;
pub mod signer;
pub mod sigv4;

pub use admission::authorize_function_url;
pub use thaw_api_types::keys::Allow;

use crate::clock;
use crate::store::{Store, StoreError, Write};
use admission::Caller;
use keys::{AccessKey, KeyError};
use quota::{Meter, Quota};
use room::Rooms;
use signer::Signer;

/// Most keys.
const KEYS_MAX: usize = 1000;

/// Whether requests must be signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuthMode {
    /// Anyone who reaches the gateway may do everything: for loopback alone.
    #[default]
    Off,
    /// They must.
    Required,
}

/// Keys, and whether they are asked for.
pub struct Auth {
    mode: AuthMode,
    region: String,
    account_id: String,
    root: Option<Arc<AccessKey>>,
    keys: RwLock<BTreeMap<String, Arc<AccessKey>>>,
    /// What keys use now, by id.
    meters: std::sync::Mutex<BTreeMap<String, Arc<Meter>>>,
    store: Store,
    /// Orders changes, so that memory and database change together.
    changes: Mutex<()>,
    rooms: Rooms,
}

/// Why keys cannot be had.
#[derive(Debug, Error)]
pub enum OpenAuthError {
    /// The root key's file.
    #[error("cannot read or make the root key {ROOT} in {home}", ROOT = keys::ROOT_FILE)]
    Root {
        /// `THAW_HOME`.
        home: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The database.
    #[error("cannot read the keys")]
    Store(#[from] StoreError),
}

/// Why a key was not changed.
#[derive(Debug, Error)]
pub enum ChangeKeyError {
    /// There is none of this id.
    #[error("there is no key {0:?} here")]
    Unknown(String),
    /// There are too many.
    #[error("there are {KEYS_MAX} keys, and no more are kept: remove some")]
    TooMany,
    /// It cannot be as it was asked for.
    #[error("cannot make or change the key")]
    Key(#[from] KeyError),
    /// The database.
    #[error("cannot store the key")]
    Store(#[from] StoreError),
}

impl Auth {
    /// Reads the keys, and makes the root key when keys are asked for.
    ///
    /// # Errors
    /// See [`OpenAuthError`].
    pub async fn open(
        mode: AuthMode,
        home: &Path,
        region: &str,
        account_id: &str,
        store: Store,
    ) -> Result<Arc<Self>, OpenAuthError> {
        let root = match mode {
            AuthMode::Off => None,
            AuthMode::Required => {
                let key = keys::root(home, region, clock::unix_ms());
                Some(Arc::new(key.map_err(|source| OpenAuthError::Root {
                    home: home.display().to_string(),
                    source,
                })?))
            }
        };
        let stored = store.load_keys().await?;
        let keys = stored
            .into_iter()
            .map(|key| (key.id.clone(), Arc::new(key)));
        Ok(Arc::new(Self {
            mode,
            region: region.to_owned(),
            account_id: account_id.to_owned(),
            root,
            keys: RwLock::new(keys.collect()),
            meters: std::sync::Mutex::default(),
            store,
            changes: Mutex::new(()),
            rooms: Rooms::default(),
        }))
    }

    /// Whether requests must be signed.
    #[must_use]
    pub fn is_required(&self) -> bool {
        self.mode == AuthMode::Required
    }

    /// Signs for the gateway itself; `None` while nobody asks for signatures.
    #[must_use]
    pub fn signer(&self) -> Option<Signer> {
        let root = self.root.as_ref()?;
        Some(Signer {
            access_key_id: root.id.clone(),
            secret: root.secret.clone(),
            region: self.region.clone(),
        })
    }

    /// All keys but the root key, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<KeySummary> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<KeySummary> = keys.values().map(|key| key.summary()).collect();
        all.sort_by(|a, b| {
            (a.created_unix_ms, &a.access_key_id).cmp(&(b.created_unix_ms, &b.access_key_id))
        });
        all
    }

    /// Makes a key.
    ///
    /// # Errors
    /// See [`ChangeKeyError`].
    pub async fn create(
        &self,
        request: CreateKeyRequest,
    ) -> Result<Arc<AccessKey>, ChangeKeyError> {
        let _change = self.changes.lock().await;
        if self.list().len() >= KEYS_MAX {
            return Err(ChangeKeyError::TooMany);
        }
        let key = Arc::new(AccessKey::draw(request, clock::unix_ms())?);
        self.store.commit(&[Write::Key(&key)]).await?;
        Point::KeyCommitted.reached();
        self.show(Arc::clone(&key));
        Ok(key)
    }

    /// Lets a key in, or not any more, or gives it other limits. What runs goes on.
    ///
    /// # Errors
    /// See [`ChangeKeyError`].
    pub async fn change(
        &self,
        id: &str,
        change: ChangeKeyRequest,
    ) -> Result<Arc<AccessKey>, ChangeKeyError> {
        let _change = self.changes.lock().await;
        let key = self.stored(id)?.changed(change)?;
        self.store.commit(&[Write::Key(&key)]).await?;
        let key = Arc::new(key);
        self.show(Arc::clone(&key));
        Ok(key)
    }

    /// Forgets a key.
    ///
    /// # Errors
    /// See [`ChangeKeyError`].
    pub async fn remove(&self, id: &str) -> Result<(), ChangeKeyError> {
        let _change = self.changes.lock().await;
        self.stored(id)?;
        self.store.commit(&[Write::RemoveKey(id)]).await?;
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        keys.remove(id);
        self.meters().remove(id);
        Ok(())
    }

    /// What a key may use and does; `None` when there is none of this id any more.
    #[must_use]
    pub fn quota_of(&self, id: &str) -> Option<Quota> {
        self.stored(id).ok().map(|key| self.quota(&key))
    }

    /// Whether a caller's key is for this function, or, with none, for all.
    #[must_use]
    pub fn reaches(&self, caller: &Caller, function: Option<&str>) -> bool {
        let key = self.find(&caller.access_key_id);
        key.is_some_and(|key| function.map_or_else(|| key.covers_all(), |name| key.covers(name)))
    }

    fn quota(&self, key: &AccessKey) -> Quota {
        let mut meters = self.meters();
        let meter = meters.entry(key.id.clone()).or_default();
        Quota::new(key.limits, Arc::clone(meter))
    }

    fn meters(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Meter>>> {
        self.meters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A key that is let in.
    fn find(&self, id: &str) -> Option<Arc<AccessKey>> {
        if let Some(root) = self.root.as_ref().filter(|root| root.id == id) {
            return Some(Arc::clone(root));
        }
        self.stored(id).ok().filter(|key| key.enabled)
    }

    fn stored(&self, id: &str) -> Result<Arc<AccessKey>, ChangeKeyError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let found = keys.get(id).cloned();
        found.ok_or_else(|| ChangeKeyError::Unknown(id.to_owned()))
    }

    fn show(&self, key: Arc<AccessKey>) {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        keys.insert(key.id.clone(), key);
    }
}
