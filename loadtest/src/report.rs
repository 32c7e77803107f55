//! What is told of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// The result of a run; latencies in milliseconds, of good answers only.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Good answers.
    pub good: u64,
    /// Bad ones, by kind.
    pub errors: BTreeMap<String, u64>,
    /// How long the run took, seconds.
    pub seconds: f64,
    /// Good answers a second.
    pub per_second: f64,
    /// Median.
    pub p50_ms: f64,
    /// Of ten, nine were faster.
    pub p90_ms: f64,
    /// Of a hundred, 99 were faster.
    pub p99_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

impl Report {
    /// From latencies in microseconds.
    pub fn new(
        latencies_us: &Histogram<u64>,
        errors: BTreeMap<String, u64>,
        took: Duration,
    ) -> Self {
        let quantile =
            |q: f64| Duration::from_micros(latencies_us.value_at_quantile(q)).as_secs_f64() * 1e3;
        let good = latencies_us.len();
        Self {
            good,
            errors,
            seconds: took.as_secs_f64(),
            per_second: Duration::from_secs(good).as_secs_f64() / took.as_secs_f64(),
            p50_ms: quantile(0.5),
            p90_ms: quantile(0.9),
            p99_ms: quantile(0.99),
            max_ms: Duration::from_micros(latencies_us.max()).as_secs_f64() * 1e3,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} good answers in {:.2} s, {:.1} a second",
            self.good, self.seconds, self.per_second
        )?;
        writeln!(
            f,
            "latency ms: p50 {:.2}  p90 {:.2}  p99 {:.2}  max {:.2}",
            self.p50_ms, self.p90_ms, self.p99_ms, self.max_ms
        )?;
        if self.errors.is_empty() {
            return writeln!(f, "no errors");
        }
        for (error, count) in &self.errors {
            writeln!(f, "{count} × {error}")?;
        }
        Ok(())
    }
}
