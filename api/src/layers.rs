//! Layers: folders that functions share. A layer is published in versions, which nobody changes.
//!
//! A function's revision links the zips of its layers into its own folder, so that a layer version can be deleted while
//! functions have it: what they have stays, and only new uses are refused.
//!
//! **Invariant:** memory follows the database: a change is committed first and shown afterwards, one at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thaw_runtime::Point;
use uuid::Uuid;

use crate::clock;
use crate::code;
use crate::deploy;
use crate::functions::ChangeError;
use crate::policy::Policy;
use crate::record::Code;
use crate::store::{Store, StoreError, Write};

/// Name of the zip in a layer version's folder.
const LAYER_ZIP: &str = "layer.zip";

/// A layer. It stays when its last version is deleted, as numbers are not given twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// The newest version ever published.
    pub last_number: u64,
    /// Its versions.
    pub versions: BTreeMap<u64, LayerVersion>,
}

/// One version of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerVersion {
    /// Name of its folder.
    pub id: String,
    /// Its zip.
    pub code: Code,
    /// Milliseconds since the Unix epoch.
    pub created_unix_ms: i64,
    /// What its publisher says of it.
    pub about: About,
    /// Who else may use it; recorded only.
    #[serde(default)]
    pub policy: Policy,
    /// The key that stored it; `None` for the owner's, and while nobody is asked for one.
    pub key: Option<String>,
}

/// What the publisher of a layer version says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Free text.
    pub description: String,
    /// Runtimes that it is for.
    pub runtimes: Option<Vec<String>>,
    /// Instruction sets that it is for.
    pub architectures: Option<Vec<String>>,
    /// Its licence.
    pub license: Option<String>,
}

/// All layers.
pub struct Layers {
    /// Where zips are.
    folder: PathBuf,
    layers: RwLock<BTreeMap<String, Arc<Layer>>>,
    /// Orders commits, so that memory and database change together.
    commits: tokio::sync::Mutex<()>,
}

impl Layers {
    /// The layers of a database, with zips below `home`.
    #[must_use]
    pub fn new(home: &Path, layers: Vec<Layer>) -> Self {
        let layers = layers.into_iter();
        Self {
            folder: home.join("layers"),
            layers: RwLock::new(layers.map(|l| (l.name.clone(), Arc::new(l))).collect()),
            commits: tokio::sync::Mutex::default(),
        }
    }

    /// Removes what a crash left behind: folders that no version refers to, half-written files.
    ///
    /// # Errors
    /// The path that could not be read or removed, and why.
    pub fn clean(&self) -> Result<(), (PathBuf, io::Error)> {
        for (name, path) in deploy::entries(&self.folder)? {
            let Some(layer) = self.find(&name) else {
                deploy::remove(&path)?;
                continue;
            };
            let known: BTreeSet<&str> = layer.versions.values().map(|v| v.id.as_str()).collect();
            for (id, path) in deploy::entries(&path)? {
                if !known.contains(id.as_str()) {
                    deploy::remove(&path)?;
                    continue;
                }
                for (file, path) in deploy::entries(&path)? {
                    if file != LAYER_ZIP {
                        deploy::remove(&path)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// One layer, with versions or without.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<Layer>> {
        self.read().get(name).cloned()
    }

    /// One version.
    #[must_use]
    pub fn version(&self, name: &str, number: u64) -> Option<LayerVersion> {
        self.find(name)?.versions.get(&number).cloned()
    }

    /// All layers, ordered by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Layer>> {
        self.read().values().cloned().collect()
    }

    /// Where the zip of a version is.
    #[must_use]
    pub fn zip(&self, name: &str, number: u64) -> Option<PathBuf> {
        let version = self.version(name, number)?;
        Some(self.folder.join(name).join(version.id).join(LAYER_ZIP))
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Arc<Layer>>> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a version under the next number, and makes the layer if there is none. `name` is a valid one.
    ///
    /// # Errors
    /// The zip cannot be used or kept, or the database refused; nothing is left behind.
    pub async fn publish(
        &self,
        store: &Store,
        name: &str,
        about: About,
        zip: Bytes,
        key: Option<String>,
    ) -> Result<(u64, LayerVersion), ChangeError> {
        let id = Uuid::new_v4().simple().to_string();
        let folder = self.folder.join(name).join(&id);
        let into = folder.clone();
        let kept = tokio::task::spawn_blocking(move || {
            let code = code::check(&zip)?;
            code::write(&into, LAYER_ZIP, &zip)?;
            Ok::<_, ChangeError>(code)
        });
        let version = LayerVersion {
            id,
            code: kept.await.map_err(|_| ChangeError::Worker)??,
            created_unix_ms: clock::unix_ms(),
            about,
            policy: Policy::default(),
            key,
        };
        Point::LayerKept.reached();
        let published = version.clone();
        let committed = self
            .change(store, name, |layer| {
                layer.last_number += 1;
                layer.versions.insert(layer.last_number, published);
                Some(layer.last_number)
            })
            .await;
        match committed {
            Ok(number) => {
                Point::LayerCommitted.reached();
                Ok((number.unwrap_or_default(), version))
            }
            Err(error) => {
                deploy::discard(folder).await;
                Err(error.into())
            }
        }
    }

    /// Ends a version; functions that have it keep it. `false` if there is none.
    ///
    /// # Errors
    /// The database refused; the version is still there.
    pub async fn delete(&self, store: &Store, name: &str, number: u64) -> Result<bool, StoreError> {
        let removed = self
            .change(store, name, |layer| layer.versions.remove(&number))
            .await?;
        let Some(version) = removed else {
            return Ok(false);
        };
        Point::LayerRemoved.reached();
        // What cannot be removed now, the next start removes.
        deploy::discard(self.folder.join(name).join(version.id)).await;
        Ok(true)
    }

    /// Commits a change of a version's policy and shows it; answers the policy's new revision. `None` if there is no such
    /// version.
    ///
    /// # Errors
    /// The database refused; inner: `change` did. Nothing is changed.
    pub async fn change_policy<E>(
        &self,
        store: &Store,
        name: &str,
        number: u64,
        change: impl FnOnce(&mut Policy) -> Result<(), E>,
    ) -> Result<Option<Result<String, E>>, StoreError> {
        let mut refused = None;
        let changed = self
            .change(store, name, |layer| {
                let policy = &mut layer.versions.get_mut(&number)?.policy;
                refused = change(policy).err();
                refused.is_none().then(|| policy.revision_id.clone())
            })
            .await?;
        Ok(changed.map(Ok).or(refused.map(Err)))
    }

    /// Commits a change of a layer, which is a new one if there is none, and shows it. `None` if `change` says that there is
    /// nothing to change.
    async fn change<T>(
        &self,
        store: &Store,
        name: &str,
        change: impl FnOnce(&mut Layer) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let _commit = self.commits.lock().await;
        let mut layer = self.find(name).map_or_else(
            || Layer {
                name: name.to_owned(),
                ..Layer::default()
            },
            |layer| (*layer).clone(),
        );
        let Some(value) = change(&mut layer) else {
            return Ok(None);
        };
        store.commit(&[Write::Layer(&layer)]).await?;
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.insert(layer.name.clone(), Arc::new(layer));
        Ok(Some(value))
    }
}
