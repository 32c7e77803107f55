//! One slot that is taken: its policy, what it has been told, what it has used.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thaw_network::{DENIALS_MAX, Denial, DomainName, Identity, Policy, Reason, Report};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::answered::Answered;
use crate::bucket::Bucket;
use crate::machine::Machine;
use crate::rules::{Rules, Verdict};
use crate::web::{TrustError, Trusts};

/// Connections that may begin, a second, and at once after a pause.
const BEGINNINGS: (u64, u64) = (200, 400);
/// Names that may be asked for, a second, and at once after a pause.
const QUERIES: (u64, u64) = (100, 200);
/// Names that are looked up at once.
const LOOKUPS_MAX: usize = 32;
/// Connections to servers that are being opened at once.
const OPENINGS_MAX: usize = 32;
/// Burst of the bandwidth: what passes in this part of a second, at least a few packets.
const BURST_PART: u64 = 10;
/// Smallest burst, bytes.
const BURST_MIN: u64 = 16 * 1024;

/// What all tasks of a slot share.
#[derive(Debug)]
pub struct Slot {
    /// What is around it.
    pub machine: Arc<Machine>,
    /// What it may do.
    pub rules: Rules,
    /// Whom its secrets are told.
    pub trusts: Trusts,
    /// Ends every task of it.
    pub ended: CancellationToken,
    /// A permit for each connection.
    connections: Arc<Semaphore>,
    connections_max: usize,
    /// A permit for each connection to a server that is being opened.
    pub openings: Semaphore,
    /// A permit for each name that is looked up.
    pub lookups: Arc<Semaphore>,
    /// When the next connection may begin.
    pub beginnings: Mutex<Bucket>,
    queries: Mutex<Bucket>,
    /// From the guest, to the guest.
    bandwidth: Option<[Mutex<Bucket>; 2]>,
    answered: Mutex<Answered>,
    counters: Counters,
    denials: Mutex<VecDeque<Denial>>,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    open: AtomicU64,
    bytes: [AtomicU64; 2],
    queries: AtomicU64,
    denied: AtomicU64,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// From the guest.
    Out = 0,
    /// To the guest.
    In = 1,
}

/// Locks, whoever panicked before.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    /// A slot under a checked policy; with an identity, its secrets' hosts can be asked over TLS.
    pub fn new(
        machine: Arc<Machine>,
        policy: Policy,
        identity: Option<&Identity>,
    ) -> Result<Self, TrustError> {
        let bandwidth = policy.bandwidth_bytes_per_second.map(|rate| {
            let rate = rate.get();
            [(); 2].map(|()| Mutex::new(Bucket::new(rate, (rate / BURST_PART).max(BURST_MIN))))
        });
        let trusts = Trusts::new(&policy, &machine, identity)?;
        let connections_max = usize::try_from(policy.connections_max).unwrap_or(usize::MAX >> 4);
        Ok(Self {
            rules: Rules::new(policy),
            trusts,
            ended: CancellationToken::new(),
            connections: Arc::new(Semaphore::new(connections_max)),
            connections_max,
            openings: Semaphore::new(OPENINGS_MAX),
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
            beginnings: Mutex::new(Bucket::new(BEGINNINGS.0, BEGINNINGS.1)),
            queries: Mutex::new(Bucket::new(QUERIES.0, QUERIES.1)),
            bandwidth,
            answered: Mutex::default(),
            counters: Counters::default(),
            denials: Mutex::default(),
            machine,
        })
    }

    /// What becomes of a connection to `to`.
    pub fn decide(&self, to: SocketAddrV4) -> Verdict {
        let names = lock(&self.answered).names(self.machine.now(), *to.ip());
        self.rules.decide(to, &names, self.machine.owns(*to.ip()))
    }

    /// Whether one more name may be asked for now; counts it.
    pub fn admits_query(&self) -> bool {
        self.counters.queries.fetch_add(1, Relaxed);
        lock(&self.queries).admit(self.machine.now())
    }

    /// Whether the guest may be told this answer; if so, it is remembered.
    pub fn tells(&self, name: &DomainName, address: Ipv4Addr, ttl: Duration) -> bool {
        let tells = self
            .rules
            .permits_answer(address, self.machine.owns(address));
        if tells {
            lock(&self.answered).add(self.machine.now(), name, address, ttl);
        }
        tells
    }

    /// Lets a connection begin, if neither the policy nor what is left to all slots is against it; it counts until the guard goes.
    pub fn admit(&self) -> Option<Admitted> {
        let permit = Arc::clone(&self.connections).try_acquire_owned().ok()?;
        let others = self.connections_max - self.connections.available_permits() - 1;
        let others = u64::try_from(others).unwrap_or(u64::MAX);
        let machine = Arc::clone(&self.machine);
        machine.capacity.take(others).then_some(Admitted {
            _permit: permit,
            machine,
        })
    }

    /// How long nothing may pass that way.
    pub fn wait(&self, way: Way) -> Duration {
        match &self.bandwidth {
            Some(buckets) => lock(&buckets[way as usize]).wait(self.machine.now()),
            None => Duration::ZERO,
        }
    }

    /// Bytes pass.
    pub fn spend(&self, way: Way, bytes: u64) {
        self.counters.bytes[way as usize].fetch_add(bytes, Relaxed);
        if let Some(buckets) = &self.bandwidth {
            lock(&buckets[way as usize]).spend(self.machine.now(), bytes);
        }
    }

    /// A connection is let out; it is open until the guard goes.
    pub fn let_out(self: &Arc<Self>) -> Open {
        self.counters.connections.fetch_add(1, Relaxed);
        self.counters.open.fetch_add(1, Relaxed);
        Open(Arc::clone(self))
    }

    /// Something is refused. Of equal ones the first is kept.
    pub fn denied(&self, what: &dyn ToString, reason: Reason) {
        self.counters.denied.fetch_add(1, Relaxed);
        let denial = Denial {
            what: what.to_string(),
            reason,
        };
        let mut denials = lock(&self.denials);
        if denials.contains(&denial) {
            return;
        }
        if denials.len() == DENIALS_MAX {
            denials.pop_front();
        }
        denials.push_back(denial);
    }

    /// What has happened.
    pub fn report(&self) -> Report {
        let counters = &self.counters;
        Report {
            connections: counters.connections.load(Relaxed),
            open: counters.open.load(Relaxed),
            sent_bytes: counters.bytes[Way::Out as usize].load(Relaxed),
            received_bytes: counters.bytes[Way::In as usize].load(Relaxed),
            queries: counters.queries.load(Relaxed),
            denied: counters.denied.load(Relaxed),
            denials: lock(&self.denials).iter().cloned().collect(),
        }
    }
}

/// A connection that may be.
#[derive(Debug)]
pub struct Admitted {
    _permit: OwnedSemaphorePermit,
    machine: Arc<Machine>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.machine.capacity.give_back();
    }
}

/// An open connection.
#[derive(Debug)]
pub struct Open(Arc<Slot>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counters.open.fetch_sub(1, Relaxed);
    }
}
