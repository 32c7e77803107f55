//! What is logged when the same thing goes wrong for one request after another: the first at once, then at most one line a
//! second for each reason, with the number of those that were not told.
//!
//! A plain value: who calls brings the time, and comes back when a line is due.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time between two lines of one reason.
const INTERVAL: Duration = Duration::from_secs(1);

/// Reasons told apart within [`INTERVAL`]; more are told together.
const REASONS_MAX: usize = 16;

/// Stands for those.
const OTHERS: &str = "other reasons";

/// Of one function.
#[derive(Debug, Default)]
pub struct Complaints(BTreeMap<String, Told>);

#[derive(Debug)]
struct Told {
    last: Instant,
    untold: u64,
    is_due: bool,
}

/// What is to be done about a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Telling {
    /// Log it: the first of its reason.
    Now,
    /// Wait so long, then log what [`Complaints::take`] answers for this reason.
    After(Duration, String),
    /// Nothing: a line is due that will count it.
    Counted,
}

impl Complaints {
    /// A request failed for this reason.
    pub fn hear(&mut self, reason: &str, now: Instant) -> Telling {
        let reason = self.name(reason, now);
        match self.0.get_mut(reason) {
            None => {
                let told = Told {
                    last: now,
                    untold: 0,
                    is_due: false,
                };
                self.0.insert(reason.to_owned(), told);
                Telling::Now
            }
            Some(told) => {
                told.untold = told.untold.saturating_add(1);
                if std::mem::replace(&mut told.is_due, true) {
                    return Telling::Counted;
                }
                let wait = INTERVAL.saturating_sub(now.saturating_duration_since(told.last));
                Telling::After(wait, reason.to_owned())
            }
        }
    }

    /// How many failed for this reason and were not told; they are now.
    pub fn take(&mut self, reason: &str, now: Instant) -> u64 {
        let Some(told) = self.0.get_mut(reason) else {
            return 0;
        };
        (told.last, told.is_due) = (now, false);
        std::mem::take(&mut told.untold)
    }

    /// Under which reason it is counted. Reasons may differ from request to request; what was told a while ago makes room.
    fn name<'a>(&mut self, reason: &'a str, now: Instant) -> &'a str {
        if self.0.contains_key(reason) {
            return reason;
        }
        if self.0.len() >= REASONS_MAX {
            let recent = |told: &Told| now.saturating_duration_since(told.last) < INTERVAL;
            self.0.retain(|_, told| told.is_due || recent(told));
        }
        if self.0.len() >= REASONS_MAX {
            OTHERS
        } else {
            reason
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn after(wait: Duration, reason: &str) -> Telling {
        Telling::After(wait, reason.to_owned())
    }

    #[test]
    fn a_thousand_equal_failures_are_a_line_and_a_count() {
        let (mut complaints, began) = (Complaints::default(), Instant::now());
        assert_eq!(complaints.hear("refused", began), Telling::Now);
        let second = complaints.hear("refused", began + 300 * MS);
        assert_eq!(second, after(700 * MS, "refused"));
        for _ in 2..1000 {
            let more = complaints.hear("refused", began + 400 * MS);
            assert_eq!(more, Telling::Counted);
        }
        let due = began + 1000 * MS;
        assert_eq!(complaints.take("refused", due), 999);
        assert_eq!(complaints.take("refused", due), 0);
        // The next line comes a second after that one; after a pause there is nothing to wait for.
        let next = complaints.hear("refused", due + 10 * MS);
        assert_eq!(next, after(990 * MS, "refused"));
        assert_eq!(complaints.take("refused", due + 1000 * MS), 1);
        let late = complaints.hear("refused", due + 60_000 * MS);
        assert_eq!(late, after(Duration::ZERO, "refused"));
    }

    #[test]
    fn each_reason_is_told_by_itself() {
        let (mut complaints, now) = (Complaints::default(), Instant::now());
        assert_eq!(complaints.hear("one", now), Telling::Now);
        assert_eq!(complaints.hear("two", now), Telling::Now);
        complaints.hear("two", now);
        assert_eq!(complaints.take("one", now), 0);
        assert_eq!(complaints.take("two", now), 1);
        assert_eq!(complaints.take("three", now), 0);
    }

    #[test]
    fn reasons_that_always_differ_make_a_bounded_number_of_lines_and_entries() {
        let (mut complaints, began) = (Complaints::default(), Instant::now());
        let told = |complaints: &mut Complaints, now| {
            let all = (0..1000).map(|number| complaints.hear(&format!("{now:?} {number}"), now));
            all.filter(|telling| *telling != Telling::Counted).count()
        };
        assert!(told(&mut complaints, began) <= REASONS_MAX + 2);
        assert!(complaints.0.len() <= REASONS_MAX + 1);
        assert!(complaints.take(OTHERS, began) > 900);
        // Later they are told by name again.
        let later = began + INTERVAL;
        assert_eq!(complaints.hear("new", later), Telling::Now);
        assert!(told(&mut complaints, later) <= REASONS_MAX + 2);
        assert!(complaints.0.len() <= REASONS_MAX + 1);
    }
}
