//! The open loop: requests are sent when the plan says so, whatever became of those before.
//!
//! Latencies count from the moment a request was *meant* to be sent, so that what waits behind a stalled server is
//! measured as it would be felt (free of coordinated omission; Gil Tene, "How NOT to Measure Latency"). Where this
//! program itself is late, that is in the figures too, and told on its own as `lag`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};

use crate::report::{Load, Report};
use crate::request::{Outcome, Sender};
use crate::tally::{Sent, Tally};

/// How requests follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// At equal distances.
    Constant,
    /// Independently of each other: exponential distances, as from many clients that know nothing of each other.
    Poisson,
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Requests a second, above zero.
    pub rate: f64,
    /// How they follow each other.
    pub arrivals: Arrivals,
    /// Equal seeds give equal distances.
    pub seed: u64,
    /// How many.
    pub requests: u64,
    /// Most requests without an answer; the next one waits then, and its waiting counts.
    pub in_flight_max: usize,
}

/// When requests are meant to be sent, from the start of the run; never ends.
#[derive(Clone, Debug)]
pub struct Schedule {
    plan: Plan,
    sent: u32,
    random: u64,
    at: Duration,
}

impl Schedule {
    /// From its beginning.
    pub fn new(plan: Plan) -> Self {
        Self {
            plan,
            sent: 0,
            random: plan.seed,
            at: Duration::ZERO,
        }
    }

    /// Evenly distributed in 0 to 1, 1 excluded: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
    /// generators", OOPSLA 2014), of which 32 bits are plenty for a load.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let high = u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or(u32::MAX); // always fits
        f64::from(high) / (f64::from(u32::MAX) + 1.0)
    }
}

impl Iterator for Schedule {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        match self.plan.arrivals {
            // Multiplied, not added up: errors do not grow.
            Arrivals::Constant => {
                let at = Duration::from_secs_f64(f64::from(self.sent) / self.plan.rate);
                self.sent = self.sent.checked_add(1)?;
                Some(at)
            }
            Arrivals::Poisson => {
                let distance = -(1.0 - self.uniform()).ln() / self.plan.rate;
                self.at += Duration::from_secs_f64(distance);
                Some(self.at)
            }
        }
    }
}

/// Runs the plan to its end, the last answer included.
///
/// # Errors
/// The plan cannot be carried out at all (a task died). A failed request is no error: it is counted.
pub async fn run(plan: Plan, sender: &Sender) -> anyhow::Result<Report> {
    let (outcomes, mut arrived) = mpsc::unbounded_channel();
    let started = Instant::now();
    let sender = sender.clone();
    let tokio = tokio::runtime::Handle::current();
    // A thread of its own: tokio's timer counts whole milliseconds.
    let clock = thread::Builder::new()
        .name("open-loop".into())
        .spawn(move || send_all(plan, started, &sender, &tokio, &outcomes))
        .context("cannot start the sending thread")?;
    let mut tally = Tally::new()?;
    while let Some((sent, outcome)) = arrived.recv().await {
        tally.add(sent, outcome)?;
    }
    let took = started.elapsed();
    clock
        .join()
        .map_err(|_| anyhow::anyhow!("the sending thread died"))?
        .context("requests could not be sent")?;
    let load = Load::Open {
        rate: plan.rate,
        arrivals: plan.arrivals,
        seed: plan.seed,
    };
    Ok(Report::new(load, tally, took))
}

fn send_all(
    plan: Plan,
    started: Instant,
    sender: &Sender,
    tokio: &tokio::runtime::Handle,
    outcomes: &mpsc::UnboundedSender<(Sent, Outcome)>,
) -> anyhow::Result<()> {
    let in_flight = Arc::new(Semaphore::new(plan.in_flight_max));
    let count = usize::try_from(plan.requests).context("too many requests")?;
    for at in Schedule::new(plan).take(count) {
        let intended = started + at;
        if let Some(early) = intended.checked_duration_since(Instant::now()) {
            thread::sleep(early);
        }
        let permit = tokio
            .block_on(Arc::clone(&in_flight).acquire_owned())
            .context("nobody closes the semaphore")?;
        let (sender, outcomes) = (sender.clone(), outcomes.clone());
        tokio.spawn(async move {
            let sent = Sent {
                intended,
                actual: Instant::now(),
            };
            let outcome = sender.send().await;
            drop(permit);
            // Fails only when the run was given up.
            let _ = outcomes.send((sent, outcome));
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(arrivals: Arrivals, seed: u64) -> Plan {
        Plan {
            rate: 200.0,
            arrivals,
            seed,
            requests: 10,
            in_flight_max: 100,
        }
    }

    #[test]
    fn constant_arrivals_keep_their_distance() {
        let times: Vec<_> = Schedule::new(plan(Arrivals::Constant, 1))
            .take(1001)
            .collect();
        assert_eq!(times[0], Duration::ZERO);
        assert_eq!(times[1], Duration::from_millis(5));
        assert_eq!(times[1000], Duration::from_secs(5));
    }

    #[test]
    fn poisson_arrivals_follow_their_seed_their_rate_and_their_law() {
        let times = |seed| -> Vec<Duration> {
            Schedule::new(plan(Arrivals::Poisson, seed))
                .take(20_000)
                .collect()
        };
        let (one, other) = (times(7), times(7));
        assert_eq!(one, other);
        assert_ne!(one, times(8));
        let distances: Vec<f64> = one
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
            .collect();
        let count = f64::from(u32::try_from(distances.len()).unwrap());
        let mean = distances.iter().sum::<f64>() / count;
        assert!((mean * 200.0 - 1.0).abs() < 0.05, "mean distance {mean}");
        // Of an exponential distribution, 1 − 1/e lie below the mean; of a constant or an even one, another share.
        let below = distances
            .iter()
            .filter(|distance| **distance < 1.0 / 200.0)
            .count();
        let share = f64::from(u32::try_from(below).unwrap()) / count;
        assert!((share - 0.632).abs() < 0.02, "share below the mean {share}");
    }
}
