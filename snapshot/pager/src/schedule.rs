//! What is fetched next: a pure core, driven by the threads of [`crate::Pager`].
//!
//! Memory is seen in units: chunks, or pages while a working set is recorded. Faults come before prefetching, in their order; a unit
//! is fetched by one thread at a time; prefetching leaves one thread free for faults.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Absent,
    /// A fault waits in line for it.
    Queued,
    Fetching,
    Present,
}

/// Why a unit is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Somebody waits for it.
    Fault,
    /// Somebody will.
    Prefetch,
}

/// A unit to be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) unit: usize,
    pub(crate) reason: Reason,
}

#[derive(Debug)]
pub(crate) struct Schedule {
    units: Vec<State>,
    faults: VecDeque<usize>,
    prefetch: VecDeque<usize>,
    prefetching: usize,
    prefetching_max: usize,
    /// Units that somebody waits for, and since when.
    waiting: BTreeMap<usize, Instant>,
}

impl Schedule {
    /// `prefetch` names units in the order in which they are to come; those outside of memory are left out.
    pub(crate) fn new(units: usize, prefetch: Vec<usize>, workers: usize) -> Self {
        let prefetch = prefetch.into_iter().filter(|unit| *unit < units).collect();
        Self {
            units: vec![State::Absent; units],
            faults: VecDeque::new(),
            prefetch,
            prefetching: 0,
            prefetching_max: workers.saturating_sub(1).max(1),
            waiting: BTreeMap::new(),
        }
    }

    /// Somebody waits for `unit`. A unit that was brought in before is brought in again: its page was given back since.
    pub(crate) fn fault(&mut self, unit: usize, now: Instant) {
        self.waiting.entry(unit).or_insert(now);
        match self.units[unit] {
            State::Absent | State::Present => {
                self.units[unit] = State::Queued;
                self.faults.push_back(unit);
            }
            State::Queued | State::Fetching => {}
        }
    }

    /// Whether `unit` was brought in. Parts of it may have been given back since.
    pub(crate) fn is_present(&self, unit: usize) -> bool {
        self.units[unit] == State::Present
    }

    /// What a thread that is free should do.
    pub(crate) fn next(&mut self) -> Option<Job> {
        if let Some(unit) = self.faults.pop_front() {
            self.units[unit] = State::Fetching;
            let reason = Reason::Fault;
            return Some(Job { unit, reason });
        }
        while self.prefetching < self.prefetching_max {
            let unit = self.prefetch.pop_front()?;
            if self.units[unit] == State::Absent {
                self.units[unit] = State::Fetching;
                self.prefetching += 1;
                let reason = Reason::Prefetch;
                return Some(Job { unit, reason });
            }
        }
        None
    }

    /// A job ended. Returns whether somebody waited for its unit: whoever does is to be woken and looks again.
    pub(crate) fn done(&mut self, job: Job, is_present: bool) -> bool {
        assert_eq!(
            self.units[job.unit],
            State::Fetching,
            "one thread at a time"
        );
        if job.reason == Reason::Prefetch {
            self.prefetching -= 1;
        }
        let is_waited_for = self.waiting.contains_key(&job.unit);
        if is_present {
            self.units[job.unit] = State::Present;
            self.waiting.remove(&job.unit);
        } else if is_waited_for {
            // A prefetch failed that has become a fault meanwhile: it is tried once more, as one.
            self.units[job.unit] = State::Queued;
            self.faults.push_back(job.unit);
        } else {
            self.units[job.unit] = State::Absent;
        }
        is_waited_for
    }

    /// The unit that somebody has waited for longest, and since when.
    pub(crate) fn longest_waited_for(&self) -> Option<(usize, Instant)> {
        let waiting = self.waiting.iter().map(|(unit, since)| (*unit, *since));
        waiting.min_by_key(|(_, since)| *since)
    }

    /// Whether nothing is left to prefetch.
    pub(crate) fn is_prefetched(&self) -> bool {
        self.prefetching == 0
            && self
                .prefetch
                .iter()
                .all(|unit| self.units[*unit] == State::Present)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn faults_come_before_prefetching_and_one_thread_stays_free_for_them() {
        let now = Instant::now();
        let mut schedule = Schedule::new(10, vec![7, 8, 99, 9], 3);
        let job = |unit, reason| Some(Job { unit, reason });
        assert_eq!(schedule.next(), job(7, Reason::Prefetch));
        schedule.fault(2, now);
        schedule.fault(2, now);
        schedule.fault(7, now);
        assert_eq!(schedule.next(), job(2, Reason::Fault));
        assert_eq!(schedule.next(), job(8, Reason::Prefetch));
        assert_eq!(schedule.next(), None, "two of three threads prefetch");
        let first = Job {
            unit: 7,
            reason: Reason::Prefetch,
        };
        assert!(schedule.done(first, true), "a fault waited for it");
        assert_eq!(schedule.next(), job(9, Reason::Prefetch));
        assert_eq!(schedule.longest_waited_for(), Some((2, now)));
    }

    #[test]
    fn a_page_that_was_given_back_is_brought_in_again() {
        let mut schedule = Schedule::new(1, vec![], 1);
        for _ in 0..3 {
            schedule.fault(0, Instant::now());
            let job = schedule.next().unwrap();
            schedule.done(job, true);
        }
        assert_eq!(schedule.next(), None);
        assert_eq!(schedule.longest_waited_for(), None);
    }

    proptest! {
        #[test]
        fn every_fault_is_served_and_no_unit_is_fetched_twice_at_once(
            steps in prop::collection::vec((0u8..4, 0usize..12), 0..200), prefetch in prop::collection::vec(0usize..14, 0..20), workers in 1usize..5
        ) {
            let now = Instant::now();
            let mut schedule = Schedule::new(12, prefetch, workers);
            let (mut running, mut waited): (Vec<Job>, Vec<bool>) = (Vec::new(), vec![false; 12]);
            for (what, number) in steps {
                match what {
                    0 => { schedule.fault(number, now); waited[number] = true; }
                    1 if running.len() < workers => if let Some(job) = schedule.next() {
                        prop_assert!(running.iter().all(|other| other.unit != job.unit));
                        running.push(job);
                    },
                    2 | 3 if !running.is_empty() => {
                        let job = running.swap_remove(number % running.len());
                        let is_present = what == 2 || job.reason == Reason::Fault;
                        prop_assert_eq!(schedule.done(job, is_present), waited[job.unit]);
                        if is_present { waited[job.unit] = false; }
                    }
                    _ => {}
                }
                let prefetching = running.iter().filter(|job| job.reason == Reason::Prefetch).count();
                prop_assert!(workers == 1 || prefetching < workers);
            }
            // Left to run, it comes to rest with nobody waiting.
            while let Some(job) = running.pop().or_else(|| schedule.next()) {
                schedule.done(job, true);
            }
            prop_assert_eq!(schedule.longest_waited_for(), None);
            prop_assert!(schedule.is_prefetched());
        }
    }
}
