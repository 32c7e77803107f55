//! What a run counts while it runs.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use hdrhistogram::Histogram;

use crate::request::{Failure, Outcome};
use crate::start::StartKind;

/// Longest latency that is told apart, microseconds: one hour. Longer ones count as this.
const LATENCY_MAX_US: u64 = 3_600_000_000;
/// Significant decimal digits of every latency.
const DIGITS: u8 = 3;
/// Most kinds of errors that are told apart; further ones are counted together.
const ERROR_KINDS_MAX: usize = 32;
/// Where errors of further kinds go.
const ERROR_OTHERS: &str = "errors of other kinds";

/// Latencies, microseconds.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

impl Latencies {
    /// None yet.
    ///
    /// # Errors
    /// Never with the bounds above; the histogram's own check.
    pub fn new() -> anyhow::Result<Self> {
        let histogram =
            Histogram::new_with_max(LATENCY_MAX_US, DIGITS).context("cannot make a histogram")?;
        Ok(Self(histogram))
    }

    /// One more.
    pub fn add(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(LATENCY_MAX_US);
        self.0.saturating_record(micros);
    }

    /// All of another.
    ///
    /// # Errors
    /// Never between histograms of equal bounds; the histogram's own check.
    pub fn merge(&mut self, other: &Self) -> anyhow::Result<()> {
        self.0.add(&other.0).context("cannot add histograms")
    }

    /// The histogram itself.
    pub fn histogram(&self) -> &Histogram<u64> {
        &self.0
    }
}

/// Errors of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors {
    /// How many.
    pub count: u64,
    /// What the first of them said.
    pub said: Bytes,
}

/// What came of the requests so far.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Good answers by the start of their sandbox: from when the request was meant to be sent to the answer's last byte.
    pub response: BTreeMap<StartKind, Latencies>,
    /// All good answers: from when the request was really sent.
    pub service: Latencies,
    /// All requests: from when they were meant to be sent to when they were.
    pub lag: Latencies,
    /// Bad ones by kind.
    pub errors: BTreeMap<String, Errors>,
}

/// When a request was meant to be sent, and when it was.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// By the plan.
    pub intended: std::time::Instant,
    /// In fact.
    pub actual: std::time::Instant,
}

impl Tally {
    /// Nothing yet.
    ///
    /// # Errors
    /// See [`Latencies::new`].
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            response: BTreeMap::new(),
            service: Latencies::new()?,
            lag: Latencies::new()?,
            errors: BTreeMap::new(),
        })
    }

    /// Counts one request.
    ///
    /// # Errors
    /// See [`Latencies::new`].
    pub fn add(&mut self, sent: Sent, outcome: Outcome) -> anyhow::Result<()> {
        self.lag.add(sent.actual - sent.intended);
        match outcome.result {
            Ok(start) => {
                let response = match self.response.entry(start) {
                    std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                    std::collections::btree_map::Entry::Vacant(entry) => {
                        entry.insert(Latencies::new()?)
                    }
                };
                response.add(outcome.ended - sent.intended);
                self.service.add(outcome.ended - sent.actual);
            }
            Err(Failure { kind, said }) => self.add_errors(kind, Errors { count: 1, said }),
        }
        Ok(())
    }

    /// Adds all of another.
    ///
    /// # Errors
    /// See [`Latencies::merge`].
    pub fn merge(&mut self, other: Self) -> anyhow::Result<()> {
        for (start, latencies) in other.response {
            match self.response.get_mut(&start) {
                Some(ours) => ours.merge(&latencies)?,
                None => {
                    self.response.insert(start, latencies);
                }
            }
        }
        self.service.merge(&other.service)?;
        self.lag.merge(&other.lag)?;
        for (kind, errors) in other.errors {
            self.add_errors(kind, errors);
        }
        Ok(())
    }

    fn add_errors(&mut self, kind: String, errors: Errors) {
        let known = self.errors.contains_key(&kind) || self.errors.len() < ERROR_KINDS_MAX;
        let kind = if known { kind } else { ERROR_OTHERS.into() };
        self.errors
            .entry(kind)
            .and_modify(|ours| ours.count += errors.count)
            .or_insert(errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn failed(kind: &str, said: &'static [u8]) -> Outcome {
        Outcome {
            ended: Instant::now(),
            result: Err(Failure {
                kind: kind.into(),
                said: Bytes::from_static(said),
            }),
        }
    }

    fn now() -> Sent {
        let now = Instant::now();
        Sent {
            intended: now,
            actual: now,
        }
    }

    #[test]
    fn kinds_of_starts_are_never_mixed() {
        let mut tally = Tally::new().unwrap();
        let sent = now();
        for (start, latency_ms) in [(StartKind::Cold, 90), (StartKind::Warm, 1)] {
            let outcome = Outcome {
                ended: sent.actual + Duration::from_millis(latency_ms),
                result: Ok(start),
            };
            tally.add(sent, outcome).unwrap();
        }
        let mut other = Tally::new().unwrap();
        let outcome = Outcome {
            ended: sent.actual + Duration::from_millis(2),
            result: Ok(StartKind::Warm),
        };
        other.add(sent, outcome).unwrap();
        tally.merge(other).unwrap();
        let max = |kind| tally.response[&kind].histogram().max() / 1000;
        assert_eq!((max(StartKind::Cold), max(StartKind::Warm)), (90, 2));
        assert_eq!(tally.response[&StartKind::Warm].histogram().len(), 2);
        assert_eq!(tally.service.histogram().len(), 3);
    }

    #[test]
    fn errors_keep_the_first_body_and_kinds_have_a_limit() {
        let mut tally = Tally::new().unwrap();
        tally.add(now(), failed("status 500", b"first")).unwrap();
        tally.add(now(), failed("status 500", b"second")).unwrap();
        assert_eq!(
            tally.errors["status 500"],
            Errors {
                count: 2,
                said: Bytes::from_static(b"first")
            }
        );
        for kind in 0..100 {
            tally.add(now(), failed(&kind.to_string(), b"")).unwrap();
        }
        assert_eq!(tally.errors.len(), ERROR_KINDS_MAX + 1);
        assert_eq!(tally.errors[ERROR_OTHERS].count, 101 - 32);
    }
}
