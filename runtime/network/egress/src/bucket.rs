//! How fast something may go: a token bucket without a clock, as the generic cell rate algorithm (ITU-T I.371): one moment says it all.

use std::time::Duration;

/// Lets `rate` units a second pass, and up to a burst at once after a pause.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    rate: u64,
    burst: Duration,
    /// When all that has passed is paid for.
    paid: Duration,
}

impl Bucket {
    /// A bucket, full, of `rate` units a second, at least 1; `burst` units pass at once.
    pub fn new(rate: u64, burst: u64) -> Self {
        let rate = rate.max(1);
        Self {
            rate,
            burst: span(burst, rate),
            paid: Duration::ZERO,
        }
    }

    /// How long from `now` nothing more may pass; zero: something may.
    pub fn wait(&self, now: Duration) -> Duration {
        self.paid.saturating_sub(now + self.burst)
    }

    /// `units` pass at `now`. They were not asked about before, as what a read brings is known afterwards: who comes next waits for them.
    pub fn spend(&mut self, now: Duration, units: u64) {
        self.paid = self.paid.max(now) + span(units, self.rate);
    }

    /// Spends one unit if it may pass.
    pub fn admit(&mut self, now: Duration) -> bool {
        let free = self.wait(now).is_zero();
        if free {
            self.spend(now, 1);
        }
        free
    }
}

fn span(units: u64, rate: u64) -> Duration {
    // Up: what is rounded never adds to the rate.
    let nanoseconds = (u128::from(units) * 1_000_000_000).div_ceil(u128::from(rate));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX / 4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_passes_at_once_and_then_the_rate() {
        let mut bucket = Bucket::new(100, 10);
        let passed = (0..2000)
            .filter(|ms| bucket.admit(Duration::from_millis(*ms)))
            .count();
        // 10 at once, one that begins when these are spent, and 100 a second.
        assert!((209..=212).contains(&passed), "{passed}");
    }

    #[test]
    fn a_pause_saves_up_no_more_than_the_burst() {
        let mut bucket = Bucket::new(1000, 5);
        let hour = Duration::from_secs(3600);
        let passed = (0..100).filter(|_| bucket.admit(hour)).count();
        assert!((5..=6).contains(&passed), "{passed}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        /// Whatever connections read, each a chunk at a time and none before its wait is over, no window of time lets more through than the burst, the
        /// rate, and a chunk for each connection; and who always has something to send gets the rate.
        #[test]
        fn no_window_passes_more_than_burst_and_rate(
            rate in 1024_u64..100_000_000, burst in 1_u64..1_000_000, connections in 1_u64..8, chunk in 1_u64..65_536,
        ) {
            let mut bucket = Bucket::new(rate, burst);
            let (mut now, mut passed) = (Duration::ZERO, 0_u64);
            for _ in 0..200 {
                // All connections have waited, and read at the same moment.
                now += bucket.wait(now);
                for _ in 0..connections {
                    bucket.spend(now, chunk);
                    passed += chunk;
                }
                let paid = u64::try_from(now.as_nanos() * u128::from(rate) / 1_000_000_000).unwrap();
                // The burst is rounded up to a nanosecond, too.
                prop_assert!(passed <= burst + paid + connections * chunk + rate / 1_000_000_000 + 2);
            }
            let paid = u64::try_from(now.as_nanos() * u128::from(rate) / 1_000_000_000).unwrap();
            let rounded = 200 * connections * (rate / 1_000_000_000 + 1);
            prop_assert!(passed + rounded >= paid, "{} of {}", passed, paid);
        }

        #[test]
        fn any_numbers_are_taken(rate: u64, burst: u64, spent in proptest::collection::vec(0_u64..u64::MAX / 4, 0..4)) {
            let mut bucket = Bucket::new(rate, burst % (1 << 40));
            for units in spent {
                bucket.spend(Duration::ZERO, units % (1 << 40));
            }
            let _ = bucket.wait(Duration::ZERO);
        }
    }
}
