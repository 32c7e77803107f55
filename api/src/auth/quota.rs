//! What a key may use: requests a second, invocations at once and their memory, bytes of code.
//!
//! What is counted here lives as long as the gateway: who may not go on now may later. What must outlive it, the bytes of code, is
//! not counted here but read from what is stored; here is only what is about to be.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thaw_api_types::keys::KeyLimits;
use thiserror::Error;

/// Bytes of a MiB.
const MIB: u64 = 1024 * 1024;
/// Most requests a second that a key can be given.
const RATE_MAX: u32 = 1_000_000;

/// What does not fit into a key's quota. Each says what the quota is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Exceeded {
    /// Invocations.
    #[error("this key may run {0} invocations at once")]
    Concurrency(u32),
    /// Memory of functions that run.
    #[error(
        "functions that this key runs at once may have {most} MiB together; {running} MiB run, and this function has {wanted}"
    )]
    Memory {
        /// All it may.
        most: u32,
        /// What runs.
        running: u64,
        /// What would run.
        wanted: u32,
    },
    /// Code.
    #[error(
        "this key may store {most} MiB of code; {stored} bytes are stored, and this is {wanted} more"
    )]
    Storage {
        /// All it may, MiB.
        most: u32,
        /// What is stored, bytes.
        stored: u64,
        /// What would be, bytes.
        wanted: u64,
    },
}

/// Whether limits make sense.
///
/// # Errors
/// Why not.
pub fn check(limits: &KeyLimits) -> Result<(), String> {
    let KeyLimits {
        rate,
        burst,
        concurrency,
        memory_mib,
        storage_mib,
    } = limits;
    for (name, value) in [
        ("rate", rate),
        ("burst", burst),
        ("concurrency", concurrency),
        ("memory", memory_mib),
        ("storage", storage_mib),
    ] {
        if *value == Some(0) {
            return Err(format!(
                "the limit of {name} must be at least 1: a key that may do nothing is disabled"
            ));
        }
    }
    if rate.is_some_and(|rate| rate > RATE_MAX) {
        return Err(format!("the limit of rate must be at most {RATE_MAX}"));
    }
    if burst.is_some() && rate.is_none() {
        return Err("a burst without a rate bounds nothing: give both".to_owned());
    }
    Ok(())
}

/// A token bucket, as the generic cell rate algorithm has it: all that is kept is when it would be full again. Pure.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    full_at: Option<Instant>,
}

impl Bucket {
    /// Takes a token of `rate` a second, of which `burst` are there after a pause; or how long it is until there is one.
    fn take(&mut self, rate: u32, burst: u32, now: Instant) -> Result<(), Duration> {
        let interval = Duration::from_secs(1) / rate.max(1);
        let most = interval * burst.max(1).saturating_sub(1);
        let full_at = self.full_at.unwrap_or(now).max(now);
        let missing = full_at - now;
        if missing > most {
            return Err(missing - most);
        }
        self.full_at = Some(full_at + interval);
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Counts {
    bucket: Bucket,
    running: u32,
    running_mib: u64,
    /// Bytes that are about to be stored.
    storing: u64,
}

/// What a key uses now.
#[derive(Debug, Default)]
pub struct Meter(Mutex<Counts>);

impl Meter {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a key may use, and what it does.
#[derive(Clone)]
pub struct Quota {
    limits: KeyLimits,
    meter: Arc<Meter>,
}

impl fmt::Debug for Quota {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.limits.fmt(formatter)
    }
}

impl Quota {
    /// Of limits and what is counted against them.
    #[must_use]
    pub fn new(limits: KeyLimits, meter: Arc<Meter>) -> Self {
        Self { limits, meter }
    }

    /// What may be used.
    #[must_use]
    pub fn limits(&self) -> &KeyLimits {
        &self.limits
    }

    /// Bytes of code that may be stored.
    #[must_use]
    pub fn storage_bytes(&self) -> Option<u64> {
        self.limits.storage_mib.map(|mib| u64::from(mib) * MIB)
    }

    /// Counts a request.
    ///
    /// # Errors
    /// It comes too soon: after so long there is room for one.
    pub fn pace(&self, now: Instant) -> Result<(), Duration> {
        let Some(rate) = self.limits.rate else {
            return Ok(());
        };
        let burst = self.limits.burst.unwrap_or(rate);
        self.meter.counts().bucket.take(rate, burst, now)
    }

    /// Counts an invocation of a function with this much memory, until the answer is dropped.
    ///
    /// # Errors
    /// Too much runs.
    pub fn enter(&self, memory_mib: u32) -> Result<Entered, Exceeded> {
        let mut counts = self.meter.counts();
        match self.limits.concurrency {
            Some(most) if counts.running >= most => return Err(Exceeded::Concurrency(most)),
            _ => {}
        }
        match self.limits.memory_mib {
            Some(most) if counts.running_mib + u64::from(memory_mib) > u64::from(most) => {
                return Err(Exceeded::Memory {
                    most,
                    running: counts.running_mib,
                    wanted: memory_mib,
                });
            }
            _ => {}
        }
        counts.running += 1;
        counts.running_mib += u64::from(memory_mib);
        Ok(Entered {
            meter: Arc::clone(&self.meter),
            memory_mib,
        })
    }

    /// Counts bytes that are about to be stored, beside those of `stored`, until the answer is dropped: by then they are
    /// stored, or will not be.
    ///
    /// # Errors
    /// They do not fit.
    pub fn store(&self, bytes: u64, stored: impl FnOnce() -> u64) -> Result<Storing, Exceeded> {
        let mut counts = self.meter.counts();
        if let (Some(most), Some(mib)) = (self.storage_bytes(), self.limits.storage_mib) {
            let stored = stored().saturating_add(counts.storing);
            if stored.saturating_add(bytes) > most {
                return Err(Exceeded::Storage {
                    most: mib,
                    stored,
                    wanted: bytes,
                });
            }
        }
        counts.storing = counts.storing.saturating_add(bytes);
        Ok(Storing {
            meter: Arc::clone(&self.meter),
            bytes,
        })
    }
}

/// An invocation that is counted.
#[derive(Debug)]
pub struct Entered {
    meter: Arc<Meter>,
    memory_mib: u32,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut counts = self.meter.counts();
        counts.running -= 1;
        counts.running_mib -= u64::from(self.memory_mib);
    }
}

/// Bytes that are counted.
#[derive(Debug)]
pub struct Storing {
    meter: Arc<Meter>,
    bytes: u64,
}

impl Drop for Storing {
    fn drop(&mut self) {
        let mut counts = self.meter.counts();
        counts.storing = counts.storing.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn quota(limits: KeyLimits) -> Quota {
        Quota::new(limits, Arc::default())
    }

    #[test]
    fn after_a_burst_requests_come_at_the_rate() {
        let limits = KeyLimits {
            rate: Some(10),
            burst: Some(3),
            ..KeyLimits::default()
        };
        let (quota, began) = (quota(limits), Instant::now());
        for _ in 0..3 {
            assert_eq!(quota.pace(began), Ok(()));
        }
        assert_eq!(quota.pace(began), Err(100 * MS));
        assert_eq!(quota.pace(began + 99 * MS), Err(MS));
        assert_eq!(quota.pace(began + 100 * MS), Ok(()));
        assert_eq!(quota.pace(began + 100 * MS), Err(100 * MS));
        // However long the pause, no more than the burst is there after it.
        let later = began + Duration::from_secs(3600);
        let taken = (0..10).filter(|_| quota.pace(later).is_ok()).count();
        assert_eq!(taken, 3);
        let unlimited = super::Quota::new(KeyLimits::default(), Arc::clone(&quota.meter));
        assert!((0..1000).all(|_| unlimited.pace(later).is_ok()));
    }

    #[test]
    fn invocations_and_their_memory_are_counted_to_the_boundary_and_given_back() {
        let limits = KeyLimits {
            concurrency: Some(3),
            memory_mib: Some(512),
            ..KeyLimits::default()
        };
        let quota = quota(limits);
        let first = quota.enter(256).unwrap();
        let second = quota.enter(256).unwrap();
        let refused = quota.enter(1).unwrap_err();
        let memory = |running, wanted| Exceeded::Memory {
            most: 512,
            running,
            wanted,
        };
        assert_eq!(refused, memory(512, 1));
        drop(first);
        let _small = [quota.enter(128).unwrap(), quota.enter(128).unwrap()];
        assert_eq!(quota.enter(0).unwrap_err(), Exceeded::Concurrency(3));
        drop(second);
        assert_eq!(quota.enter(257).unwrap_err(), memory(256, 257));
    }

    #[test]
    fn what_is_about_to_be_stored_counts_as_what_is() {
        let limits = KeyLimits {
            storage_mib: Some(1),
            ..KeyLimits::default()
        };
        let quota = quota(limits);
        let first = quota.store(MIB / 2, || MIB / 2).unwrap();
        let one_more = quota.store(1, || MIB / 2).unwrap_err();
        let refused = |stored, wanted| Exceeded::Storage {
            most: 1,
            stored,
            wanted,
        };
        assert_eq!(one_more, refused(MIB, 1));
        drop(first);
        drop(quota.store(MIB / 2, || MIB / 2).unwrap());
        let whole = quota.store(u64::MAX, || MIB).unwrap_err();
        assert_eq!(whole, refused(MIB, u64::MAX));
    }

    #[test]
    fn limits_that_make_no_sense_are_named() {
        let none = KeyLimits::default();
        assert_eq!(check(&none), Ok(()));
        let zero = KeyLimits {
            memory_mib: Some(0),
            ..none
        };
        assert!(check(&zero).unwrap_err().contains("memory"));
        let burst = KeyLimits {
            burst: Some(1),
            ..none
        };
        assert!(check(&burst).unwrap_err().contains("rate"));
        let fast = KeyLimits {
            rate: Some(RATE_MAX + 1),
            ..none
        };
        assert!(check(&fast).is_err());
    }

    proptest! {
        #[test]
        fn in_no_time_come_more_than_the_burst_and_the_rate_allow(
            rate in 1_u32..1000, burst in 1_u32..50, pauses in proptest::collection::vec(0_u64..20_000, 1..300),
        ) {
            let began = Instant::now();
            let (mut now, mut bucket, mut taken) = (began, Bucket::default(), 0_u32);
            for microseconds in pauses {
                now += Duration::from_micros(microseconds);
                if let Err(wait) = bucket.take(rate, burst, now) {
                    // Who waits as long as it says is let in.
                    prop_assert_eq!(bucket.clone().take(rate, burst, now + wait), Ok(()));
                } else {
                    taken += 1;
                }
            }
            // An interval is whole nanoseconds, so rather a little shorter than longer.
            let earned = (now - began).as_secs_f64() * f64::from(rate) * (1.0 + 1e-3);
            prop_assert!(f64::from(taken) <= f64::from(burst) + earned + 1.0);
        }
    }
}
