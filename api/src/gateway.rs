//! The gateway as a whole: its configuration, its start, its end.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use thaw_runtime::{EgressOptions, Jailer, JailerError, Owner, Reach, Runtime, RuntimeConfig};
use thiserror::Error;
use tokio::net::TcpListener;

use crate::auth::{Auth, AuthMode, OpenAuthError, keys};
use crate::budget::Budget;
use crate::connections::{self, ConnectionLimits};
use crate::engine::{Engine, HostEngine};
use crate::events::outcome::Retries;
use crate::s3::S3;
use crate::server;
use crate::snapshot_key;
use crate::state::{App, Health};
use crate::store::{Store, StoreError};
use crate::tls::{Tls, TlsError, Trust};

/// How a gateway is set up.
#[derive(Debug)]
pub struct GatewayConfig {
    /// `THAW_HOME`: all state; made when it is not there.
    pub home: PathBuf,
    /// Where to serve.
    pub listener: TcpListener,
    /// Who can reach the listener.
    pub exposure: Exposure,
    /// The `thaw-vmm` executable.
    pub vmm: PathBuf,
    /// The `thaw-egress` executable; without it functions have no network.
    pub egress: Option<PathBuf>,
    /// What keeps its processes apart from this machine.
    pub confinement: Confinement,
    /// The agent: a static executable, init of every guest.
    pub agent: PathBuf,
    /// Sandboxes kept restored for each function, at least.
    pub ready_count: usize,
    /// How long sandboxes that recent demand explains are kept at least.
    pub keep_alive: Duration,
    /// What of the machine sandboxes may use.
    pub budget: Budget,
    /// Region in ARNs and in functions' environments.
    pub region: String,
    /// Account in ARNs, 12 digits.
    pub account_id: String,
    /// Whether requests must be signed; anywhere but on loopback they must.
    pub auth: AuthMode,
    /// A certificate, to speak TLS with.
    pub tls: Option<Arc<Tls>>,
    /// Where code can come from beside requests.
    pub s3: Option<S3>,
    /// Whom records that are sent to `https://` URLs are entrusted to.
    pub trust: Trust,
    /// Limits.
    pub limits: Limits,
}

impl GatewayConfig {
    /// File of the database, below `home`.
    pub const DATABASE: &str = "thaw.db";

    /// A configuration with the defaults: 2 sandboxes ready, kept for a minute after demand, [`Budget::of_this_machine`],
    /// `us-east-1`, account `000000000000`; nobody is trusted.
    #[must_use]
    pub fn new(home: PathBuf, listener: TcpListener, vmm: PathBuf, agent: PathBuf) -> Self {
        Self {
            home,
            listener,
            exposure: Exposure::Loopback,
            vmm,
            egress: None,
            confinement: Confinement::Jail,
            agent,
            ready_count: 2,
            keep_alive: Duration::from_secs(60),
            budget: Budget::of_this_machine(),
            region: "us-east-1".to_owned(),
            account_id: "000000000000".to_owned(),
            auth: AuthMode::Off,
            tls: None,
            s3: None,
            trust: Trust::default(),
            limits: Limits::default(),
        }
    }
}

/// What keeps monitors apart from this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// A jail, as complete as this machine and its user allow.
    Jail,
    /// Nothing: for a program that plays the monitor and has no guest.
    Nothing,
}

/// Who can reach a listener, as far as its address does not say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposure {
    /// Who can reach its address: with auth off, another than a loopback address is refused.
    Loopback,
    /// The caller vouches that the address is reached only through a forwarding from a loopback address, as in the lab.
    ForwardedLoopback,
}

/// Limits that are the gateway's own; Lambda's stand beside the code that applies them.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Invocations of one function that run at once.
    pub concurrency_max: usize,
    /// Invocations of one function that wait for a sandbox.
    pub queue_max: usize,
    /// Longest wait for a sandbox.
    pub queue_wait_max: Duration,
    /// Functions.
    pub function_count_max: usize,
    /// Functions frozen at once; each takes a whole VM's memory and a CPU.
    pub freeze_concurrency_max: usize,
    /// Restores at once, over all functions.
    pub restore_concurrency_max: usize,
    /// Longest initialisation of a function. AWS gives 10 s on its own hardware; an emulated host is ten times slower,
    /// and nobody waits for it but the deployment.
    pub init_limit: Duration,
    /// How long an event waits after the function failed.
    pub event_retries: Retries,
    /// How long requests may take to end after the shutdown began.
    pub drain_limit: Duration,
    /// Of connections.
    pub connections: ConnectionLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            concurrency_max: 64,
            queue_max: 256,
            queue_wait_max: Duration::from_secs(30),
            function_count_max: 1000,
            freeze_concurrency_max: 1,
            restore_concurrency_max: 2,
            init_limit: Duration::from_secs(60),
            event_retries: Retries::default(),
            drain_limit: Duration::from_secs(15),
            connections: ConnectionLimits::default(),
        }
    }
}

/// Networks that are kept ready: as many as invocations can begin at once, so that none of a burst waits for one to be made; within these.
const SLOTS_READY: RangeInclusive<usize> = 16..=128;

fn slots_ready(budget: Budget) -> usize {
    let at_once = usize::try_from(budget.at_once()).unwrap_or(usize::MAX);
    at_once.clamp(*SLOTS_READY.start(), *SLOTS_READY.end())
}

/// Why a gateway did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The state folder cannot be made or used.
    #[error("cannot {act} {}", path.display())]
    Home {
        /// "make", "open", …
        act: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another gateway serves this state folder.
    #[error("another gateway uses {}", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The address is reachable from other machines, and requests need not be signed.
    #[error(
        "{address} is not a loopback address, and with auth off the gateway serves loopback only"
    )]
    NotLoopback {
        /// The listener's address.
        address: SocketAddr,
    },
    /// The listener has no address.
    #[error("cannot read the listener's address")]
    Listener(#[source] io::Error),
    /// The database.
    #[error("cannot open the database")]
    Store(#[from] StoreError),
    /// The keys.
    #[error("cannot have the keys")]
    Auth(#[from] OpenAuthError),
    /// The client for destinations of events.
    #[error("cannot deliver to URLs")]
    Courier(#[from] TlsError),
    /// The runtime.
    #[error("cannot start the runtime")]
    Runtime(#[from] thaw_runtime::StartError),
    /// What keeps sandboxes apart from this machine.
    #[error("cannot find out how sandboxes can be kept apart here")]
    Jail(#[from] JailerError),
}

/// Why a gateway stopped serving before it was told to.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The listener failed.
    #[error("cannot accept connections on {address}")]
    Accept {
        /// The listener's address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A running gateway: functions are being made ready in the background, nothing is served before [`Gateway::run_until`].
pub struct Gateway {
    address: SocketAddr,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    app: Arc<App>,
    router: Router,
    reach: Option<Reach>,
    /// Held until the end: one gateway for a state folder.
    _lock: File,
}

impl Gateway {
    /// Opens the state folder on this machine's runtime and begins to make its functions ready.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: GatewayConfig) -> Result<Self, StartError> {
        let lock = lock(&config)?;
        let (jailer, reach) = match config.confinement {
            Confinement::Nothing => (None, None),
            // Under the lock: what an earlier gateway's monitors left is removed.
            Confinement::Jail => {
                let owner = Owner::Gateway(&config.home);
                let (jailer, reach) = Jailer::survey(&config.vmm, owner)?;
                (Some(jailer), Some(reach))
            }
        };
        let key = snapshot_key::of(&config.home).map_err(|source| StartError::Home {
            act: "have",
            path: config.home.join(snapshot_key::FILE),
            source,
        })?;
        let runtime_config = RuntimeConfig {
            vmm: config.vmm.clone(),
            jailer,
            egress: config.egress.clone().map(|program| EgressOptions {
                program,
                ready: slots_ready(config.budget),
                authority: None,
            }),
            memory_budget_mib: Some(config.budget.memory_mib),
            vcpu_budget: Some(config.budget.vcpus),
            keep_alive: config.keep_alive,
            restore_concurrency_max: config.limits.restore_concurrency_max,
            ..RuntimeConfig::default()
        };
        let runtime = Runtime::new(runtime_config, key)?;
        let mut engine = HostEngine::new(runtime, config.home.clone(), config.agent.clone());
        if config.exposure == Exposure::ForwardedLoopback {
            // In the lab, whose processor is emulated and whose changes outside the home are lost.
            engine = engine.ordering_images();
        }
        let started = Self::start_locked(config, lock, Arc::new(engine)).await;
        started.map(|gateway| Self { reach, ..gateway })
    }

    /// The same on an engine of the caller's.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start_on(
        config: GatewayConfig,
        engine: Arc<dyn Engine>,
    ) -> Result<Self, StartError> {
        let lock = lock(&config)?;
        Self::start_locked(config, lock, engine).await
    }

    async fn start_locked(
        config: GatewayConfig,
        lock: File,
        engine: Arc<dyn Engine>,
    ) -> Result<Self, StartError> {
        let address = config.listener.local_addr().map_err(StartError::Listener)?;
        let is_guarded = config.auth == AuthMode::Required
            || config.exposure == Exposure::ForwardedLoopback
            || address.ip().is_loopback();
        if !is_guarded {
            return Err(StartError::NotLoopback { address });
        }
        let database = config.home.join(GatewayConfig::DATABASE);
        keys::make_private(&database).map_err(|source| StartError::Home {
            act: "make private",
            path: database.clone(),
            source,
        })?;
        let store = Store::open(&database).await?;
        let (region, account) = (&config.region, &config.account_id);
        let auth = Auth::open(config.auth, &config.home, region, account, store.clone()).await?;
        let tls = config.tls.clone();
        let (app, listener) = App::open(config, address, store, Arc::clone(&auth), engine).await?;
        let router = server::router(Arc::clone(&app), auth);
        Ok(Self {
            address,
            listener,
            tls,
            app,
            router,
            reach: None,
            _lock: lock,
        })
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How far the jail of each sandbox's monitor reaches here; `None` without one.
    #[must_use]
    pub fn reach(&self) -> Option<&Reach> {
        self.reach.as_ref()
    }

    /// Ends when functions can be invoked, or the gateway stops.
    pub fn until_ready(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut health = self.app.health.subscribe();
        async move {
            let starts = |health: &Health| matches!(health, Health::NotReady(_));
            let _ = health.wait_for(|health| !starts(health)).await;
        }
    }

    /// Serves until `shutdown` ends, then refuses new requests, lets running ones end within the drain limit, and ends
    /// every monitor.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn run_until(
        self,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ServeError> {
        let Self {
            address,
            listener,
            tls,
            app,
            router,
            reach: _,
            _lock,
        } = self;
        let limits = &app.limits;
        let end = (app.stop.clone(), limits.drain_limit);
        let served =
            connections::serve(listener, tls, router, limits.connections, end, shutdown).await;
        app.close().await;
        served.map_err(|source| ServeError::Accept { address, source })
    }
}

/// Makes the state folder and takes its lock; the kernel gives it back at any death.
fn lock(config: &GatewayConfig) -> Result<File, StartError> {
    fs::create_dir_all(&config.home).map_err(|source| StartError::Home {
        act: "make",
        path: config.home.clone(),
        source,
    })?;
    let path = config.home.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| StartError::Home {
            act: "open",
            path: path.clone(),
            source,
        })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::Locked { path }),
        Err(TryLockError::Error(source)) => Err(StartError::Home {
            act: "lock",
            path,
            source,
        }),
    }
}
