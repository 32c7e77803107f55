//! Samples, their percentiles, and ratios of them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// What was measured, by name of the side.
#[derive(Clone, Debug, Default)]
pub struct Series(BTreeMap<String, Vec<Duration>>);

impl Series {
    /// One more sample of a side.
    pub fn add(&mut self, side: &str, took: Duration) {
        self.0.entry(side.to_owned()).or_default().push(took);
    }

    /// The figures of every side.
    pub fn figures(&self) -> BTreeMap<String, Figures> {
        let figures = self
            .0
            .iter()
            .filter_map(|(side, samples)| Some((side.clone(), Figures::of(samples)?)));
        figures.collect()
    }
}

/// Of one side, microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// How many samples.
    pub count: usize,
    /// The fastest.
    pub min_us: f64,
    /// Median.
    pub p50_us: f64,
    /// Of ten, nine were as fast or faster.
    pub p90_us: f64,
    /// Of a hundred, 99; with fewer than a hundred samples this is the slowest.
    pub p99_us: f64,
    /// The slowest.
    pub max_us: f64,
}

impl Figures {
    /// Nothing of no samples.
    pub fn of(samples: &[Duration]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let us = |sample: &Duration| sample.as_secs_f64() * 1e6;
        Some(Self {
            count: sorted.len(),
            min_us: us(sorted.first()?),
            p50_us: us(nearest_rank(&sorted, 50)?),
            p90_us: us(nearest_rank(&sorted, 90)?),
            p99_us: us(nearest_rank(&sorted, 99)?),
            max_us: us(sorted.last()?),
        })
    }
}

/// The smallest sample that at least `percent` of all do not exceed (nearest rank); `percent` is 1 to 100.
fn nearest_rank(sorted: &[Duration], percent: usize) -> Option<&Duration> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.checked_sub(1)?)
}

/// A comparison that people ask for.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Its name.
    pub name: &'static str,
    /// The side above the line.
    pub above: &'static str,
    /// The side below it. Of several the fastest that was measured: the floor has two shapes.
    pub below: &'static [&'static str],
    /// What is hoped for.
    pub at_most: Option<f64>,
}

/// The answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Median by median; none if a side was not measured.
    pub value: Option<f64>,
    /// Why there is no value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What was hoped for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_most: Option<f64>,
}

impl Question {
    /// The ratio of the medians.
    pub fn answer(&self, figures: &BTreeMap<String, Figures>) -> Ratio {
        let median = |side: &str| figures.get(side).map(|figures| figures.p50_us);
        let below = self.below.iter().filter_map(|side| median(side));
        let below = below.min_by(f64::total_cmp);
        let (value, reason) = match (median(self.above), below) {
            (Some(above), Some(below)) if below > 0.0 => (Some(above / below), None),
            (None, _) => (None, Some(format!("{} was not measured", self.above))),
            _ => (
                None,
                Some(format!("{} was not measured", self.below.join(" or "))),
            ),
        };
        Ratio {
            value,
            reason,
            at_most: self.at_most,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(samples: &[(&str, u64)]) -> BTreeMap<String, Figures> {
        let mut series = Series::default();
        for (side, millis) in samples {
            series.add(side, Duration::from_millis(*millis));
        }
        series.figures()
    }

    #[test]
    fn percentiles_are_samples_that_were_seen() {
        let samples: Vec<_> = (1..=200).rev().map(Duration::from_micros).collect();
        let figures = Figures::of(&samples).unwrap();
        assert_eq!(figures.count, 200);
        let all = [
            figures.min_us,
            figures.p50_us,
            figures.p90_us,
            figures.p99_us,
            figures.max_us,
        ];
        assert_eq!(all.map(f64::round), [1.0, 100.0, 180.0, 198.0, 200.0]);
        let one = Figures::of(&samples[..1]).unwrap();
        assert_eq!((one.p50_us.round(), one.p99_us.round()), (200.0, 200.0));
        assert_eq!(Figures::of(&[]), None);
    }

    #[test]
    fn a_ratio_is_median_by_the_fastest_median_or_says_what_is_missing() {
        let question = Question {
            name: "x",
            above: "a",
            below: &["b", "c"],
            at_most: Some(1.5),
        };
        let ratio = question.answer(&series(&[
            ("a", 3),
            ("a", 3),
            ("a", 90),
            ("b", 12),
            ("c", 6),
        ]));
        assert_eq!((ratio.value, ratio.reason), (Some(0.5), None));
        let missing = question.answer(&series(&[("a", 3)]));
        assert_eq!(missing.value, None);
        assert_eq!(missing.reason.unwrap(), "b or c was not measured");
        let missing = question.answer(&series(&[("b", 3)]));
        assert_eq!(missing.reason.unwrap(), "a was not measured");
    }
}
