//! What all slots share: this machine's addresses, its resolvers, its authorities, a clock.

use std::collections::HashSet;
use std::fs;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use hickory_resolver::TokioResolver;
use tokio_rustls::rustls::RootCertStore;

use crate::capacity::Capacity;

/// How often addresses and files are looked at anew. Never while somebody waits: asking for addresses takes a lock of the kernel (rtnl) that those who make
/// slots hold.
const REFRESH: Duration = Duration::from_secs(5);
/// Files that say how names are resolved.
const FILES: &[&str] = &["/etc/resolv.conf", "/etc/hosts"];
/// Answers that are kept, for all slots.
const CACHE_ANSWERS: u64 = 4096;
/// Longest time for which an answer is kept.
const CACHE_TTL_MAX: Duration = Duration::from_secs(300);

/// The machine around all slots.
#[derive(Debug)]
pub struct Machine {
    started: Instant,
    /// None until they were listed once.
    own: RwLock<Option<HashSet<Ipv4Addr>>>,
    resolver: RwLock<Option<Arc<Resolver>>>,
    roots: Arc<RootCertStore>,
    /// Connections of all slots.
    pub capacity: Capacity,
}

/// The machine's resolvers, as they were when its files had these dates.
pub struct Resolver {
    resolver: TokioResolver,
    dates: Vec<Option<SystemTime>>,
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Resolver({:?})", self.dates)
    }
}

impl std::ops::Deref for Resolver {
    type Target = TokioResolver;

    fn deref(&self) -> &TokioResolver {
        &self.resolver
    }
}

impl Machine {
    /// Reads what takes rights that are given up later: the authorities' certificates.
    pub fn new() -> Arc<Self> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(Self {
            started: Instant::now(),
            own: RwLock::default(),
            resolver: RwLock::default(),
            roots: Arc::new(roots),
            capacity: Capacity::of_this_process(),
        })
    }

    /// Time since the start.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// This machine's authorities.
    pub fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.roots)
    }

    /// Whether an address is this machine's own; all are as long as these are not known.
    pub fn owns(&self, address: Ipv4Addr) -> bool {
        self.own
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_none_or(|own| own.contains(&address))
    }

    /// The resolvers; none if the machine has none.
    pub fn resolver(&self) -> Option<Arc<Resolver>> {
        self.resolver
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Looks at addresses and files, once.
    pub fn refresh(&self) {
        match addresses() {
            Ok(own) => *self.own.write().unwrap_or_else(PoisonError::into_inner) = Some(own),
            Err(error) => tracing::warn!(%error, "cannot list this machine's addresses"),
        }
        let dates = FILES
            .iter()
            .map(|file| fs::metadata(file).and_then(|file| file.modified()).ok())
            .collect();
        if self
            .resolver()
            .is_none_or(|resolver| resolver.dates != dates)
        {
            let made = resolver().map(|resolver| Arc::new(Resolver { resolver, dates }));
            *self
                .resolver
                .write()
                .unwrap_or_else(PoisonError::into_inner) = made;
        }
    }

    /// Looks again and again, in threads that nobody waits for.
    pub async fn keep_fresh(self: Arc<Self>) {
        loop {
            tokio::time::sleep(REFRESH).await;
            let machine = Arc::clone(&self);
            if let Err(error) = tokio::task::spawn_blocking(move || machine.refresh()).await {
                tracing::error!(%error, "this machine's addresses are not looked at any more");
                return;
            }
        }
    }
}

fn addresses() -> nix::Result<HashSet<Ipv4Addr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    Ok(interfaces
        .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
        .collect())
}

fn resolver() -> Option<TokioResolver> {
    let built = TokioResolver::builder_tokio().and_then(|mut builder| {
        let options = builder.options_mut();
        options.cache_size = CACHE_ANSWERS;
        options.positive_max_ttl = Some(CACHE_TTL_MAX);
        options.negative_max_ttl = Some(CACHE_TTL_MAX);
        options.preserve_intermediates = false;
        builder.build()
    });
    match built {
        Ok(resolver) => Some(resolver),
        Err(error) => {
            tracing::warn!(%error, "no resolver: /etc/resolv.conf names none that can be used");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_machines_own_until_it_is_known_which_are() {
        let machine = Machine::new();
        let elsewhere = Ipv4Addr::new(192, 0, 2, 1);
        assert!(machine.owns(elsewhere));
        machine.refresh();
        assert!(!machine.owns(elsewhere) && machine.owns(Ipv4Addr::LOCALHOST));
    }
}
