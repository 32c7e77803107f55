//! How long a peer may keep us waiting: pure.
//!
//! Whoever waits has some patience. Waiting uses it up, each byte that moves gives a little back, never more than there was at
//! first. So a peer that stalls is given up after that time, and one that only trickles not much later; one that keeps to the
//! least rate is never given up, and time in which nobody waits for it costs it nothing.

use std::time::{Duration, Instant};

/// How patient this side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Longest wait without a byte.
    pub longest: Duration,
    /// Bytes a second that cost no patience, at least 1.
    pub bytes_per_second: u32,
}

/// What is left of it with one direction of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    patience: Patience,
    left: Duration,
    since: Option<Instant>,
}

impl Pace {
    /// All of it.
    #[must_use]
    pub fn new(patience: Patience) -> Self {
        Self {
            patience,
            left: patience.longest,
            since: None,
        }
    }

    /// We wait for the peer, from now on unless we did before; until when.
    pub fn wait(&mut self, now: Instant) -> Instant {
        *self.since.get_or_insert(now) + self.left
    }

    /// Bytes have moved: the wait is over.
    pub fn moved(&mut self, bytes: usize, now: Instant) {
        if let Some(since) = self.since.take() {
            let waited = now.saturating_duration_since(since);
            self.left = self.left.saturating_sub(waited);
        }
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let earned = Duration::from_secs(1) * bytes / self.patience.bytes_per_second.max(1);
        self.left = self.left.saturating_add(earned).min(self.patience.longest);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PATIENCE: Patience = Patience {
        longest: Duration::from_secs(10),
        bytes_per_second: 100,
    };

    #[test]
    fn a_peer_that_stalls_is_given_up_after_the_patience_and_one_that_trickles_soon_after() {
        let began = Instant::now();
        let mut pace = Pace::new(PATIENCE);
        assert_eq!(pace.wait(began), began + 10 * SECOND);
        assert_eq!(pace.wait(began + 3 * SECOND), began + 10 * SECOND);
        // A byte every second: 0.99 s of patience are lost with each.
        let mut now = began;
        let mut bytes = 0;
        while pace.wait(now) > now + SECOND {
            now += SECOND;
            pace.moved(1, now);
            bytes += 1;
        }
        assert_eq!(bytes, 10);
    }

    #[test]
    fn what_nobody_waits_for_costs_nothing() {
        let began = Instant::now();
        let mut pace = Pace::new(PATIENCE);
        pace.wait(began);
        pace.moved(1, began + SECOND);
        let later = began + 3600 * SECOND;
        assert_eq!(pace.wait(later), later + 9 * SECOND + SECOND / 100);
    }

    proptest! {
        #[test]
        fn who_keeps_to_the_rate_is_never_given_up(waits in proptest::collection::vec(0_u64..10_000, 1..200)) {
            let (mut now, mut pace) = (Instant::now(), Pace::new(PATIENCE));
            for milliseconds in waits {
                let until = pace.wait(now);
                now += Duration::from_millis(milliseconds);
                prop_assert!(now <= until);
                pace.moved(usize::try_from(milliseconds.div_ceil(10)).unwrap(), now);
            }
        }
    }
}
