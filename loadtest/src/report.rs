//! What is told of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::open_loop::Arrivals;
use crate::start::StartKind;
use crate::tally::{Latencies, Tally};

/// Bytes of the sample that is told of each kind of error.
const SAMPLE_BYTES_MAX: usize = 500;
/// Steps to each half of the remaining distance to 100 %, in the percentile log.
const LOG_TICKS_PER_HALF: u32 = 5;

/// What was sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "loop", rename_all = "snake_case")]
pub enum Load {
    /// Clients that wait for their answers.
    Closed {
        /// How many.
        clients: u32,
    },
    /// A rate that nothing slows down.
    Open {
        /// Requests a second.
        rate: f64,
        /// How they followed each other.
        arrivals: Arrivals,
        /// Of the distances.
        seed: u64,
    },
}

/// Figures of one histogram, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// How many.
    pub count: u64,
    /// All, divided by how many.
    pub mean_ms: f64,
    /// Median.
    pub p50_ms: f64,
    /// Of ten, nine were faster.
    pub p90_ms: f64,
    /// Of a hundred, 99 were faster.
    pub p99_ms: f64,
    /// Of a thousand, 999 were faster.
    pub p999_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

impl Figures {
    fn of(latencies_us: &Histogram<u64>) -> Self {
        let ms = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1e3;
        let quantile = |q: f64| ms(latencies_us.value_at_quantile(q));
        Self {
            count: latencies_us.len(),
            mean_ms: latencies_us.mean() / 1e3,
            p50_ms: quantile(0.5),
            p90_ms: quantile(0.9),
            p99_ms: quantile(0.99),
            p999_ms: quantile(0.999),
            max_ms: ms(latencies_us.max()),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "p50 {:.2}  p90 {:.2}  p99 {:.2}  p99.9 {:.2}  max {:.2}",
            self.p50_ms, self.p90_ms, self.p99_ms, self.p999_ms, self.max_ms
        )
    }
}

/// Errors of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorReport {
    /// How many.
    pub count: u64,
    /// The beginning of what the first said, at most 500 bytes.
    pub sample: String,
}

/// The result of a run; latencies are of good answers only.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was sent.
    pub load: Load,
    /// Good answers.
    pub good: u64,
    /// Bad ones, all kinds together.
    pub bad: u64,
    /// Bad ones, by kind.
    pub errors: BTreeMap<String, ErrorReport>,
    /// How long the run took, from the first request to the last answer, seconds.
    pub seconds: f64,
    /// Good answers a second.
    pub per_second: f64,
    /// By how the sandbox that answered was started: from the moment the request was meant to be sent.
    pub starts: BTreeMap<&'static str, Figures>,
    /// From the moment the request was really sent, whatever the start. In a closed loop the same as `starts`.
    pub service: Figures,
    /// How late this program sent its requests: where it is large, the generator was too weak or its limit was reached.
    pub lag: Figures,
    #[serde(skip)]
    histograms: BTreeMap<StartKind, Latencies>,
}

impl Report {
    /// From what was counted.
    pub fn new(load: Load, tally: Tally, took: Duration) -> Self {
        let starts = tally.response.iter();
        let starts =
            starts.map(|(start, latencies)| (start.name(), Figures::of(latencies.histogram())));
        let errors = tally.errors.into_iter().map(|(kind, errors)| {
            let sample = &errors.said[..errors.said.len().min(SAMPLE_BYTES_MAX)];
            let sample = String::from_utf8_lossy(sample).into_owned();
            let count = errors.count;
            (kind, ErrorReport { count, sample })
        });
        let errors: BTreeMap<_, _> = errors.collect();
        let good = tally.service.histogram().len();
        Self {
            load,
            good,
            bad: errors.values().map(|error| error.count).sum(),
            errors,
            seconds: took.as_secs_f64(),
            per_second: Duration::from_secs(good).as_secs_f64() / took.as_secs_f64(),
            starts: starts.collect(),
            service: Figures::of(tally.service.histogram()),
            lag: Figures::of(tally.lag.histogram()),
            histograms: tally.response,
        }
    }

    /// Writes the whole distributions, one after another, as HdrHistogram's own plotters read them.
    ///
    /// # Errors
    /// `to` cannot be written.
    pub fn write_percentiles(&self, to: &mut impl Write) -> io::Result<()> {
        for (start, latencies) in &self.histograms {
            writeln!(to, "# start: {}, milliseconds", start.name())?;
            writeln!(
                to,
                "{:>12} {:>14} {:>10} {:>14}",
                "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
            )?;
            let histogram = latencies.histogram();
            let mut total = 0;
            for step in histogram.iter_quantiles(LOG_TICKS_PER_HALF) {
                total += step.count_since_last_iteration();
                let value = Duration::from_micros(step.value_iterated_to()).as_secs_f64() * 1e3;
                let quantile = step.quantile_iterated_to();
                write!(to, "{value:12.3} {quantile:14.12} {total:10}")?;
                if quantile < 1.0 {
                    writeln!(to, " {:14.2}", 1.0 / (1.0 - quantile))?;
                } else {
                    writeln!(to)?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.load {
            Load::Closed { clients } => writeln!(f, "closed loop, {clients} client(s)")?,
            Load::Open {
                rate,
                arrivals: Arrivals::Constant,
                ..
            } => {
                writeln!(f, "open loop, {rate} requests a second, constant")?;
            }
            Load::Open {
                rate,
                arrivals: Arrivals::Poisson,
                seed,
            } => {
                writeln!(
                    f,
                    "open loop, {rate} requests a second, Poisson with seed {seed}"
                )?;
            }
        }
        writeln!(
            f,
            "{} good answers in {:.2} s, {:.1} a second",
            self.good, self.seconds, self.per_second
        )?;
        for (start, figures) in &self.starts {
            writeln!(f, "{start:>8} ×{}: latency ms: {figures}", figures.count)?;
        }
        if let Load::Open { .. } = self.load {
            writeln!(f, "from the real sending: {}", self.service)?;
            writeln!(f, "sent late by: {}", self.lag)?;
        }
        if self.errors.is_empty() {
            return writeln!(f, "no errors");
        }
        for (kind, ErrorReport { count, sample }) in &self.errors {
            writeln!(f, "{count} × {kind}: {}", sample.escape_debug())?;
        }
        Ok(())
    }
}
