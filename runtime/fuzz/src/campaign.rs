//! A campaign: one seed after another, on all processors, until a promise is broken.

use std::collections::BTreeSet;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::Dice;

/// The seed to play again, alone.
const SEED: &str = "THAW_SEED";
/// How long to play instead of the usual number of times, with seeds that no run had before.
const SECONDS: &str = "THAW_FUZZ_SECONDS";
/// Longest time of one execution. None takes a hundredth of it, however slow the machine: what takes longer hangs.
const EXECUTION_LIMIT: Duration = Duration::from_secs(120);
/// How often the limit is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Plays a function of a [`Dice`] many times, each with its own seed. A failure prints the seed and the command that plays it
/// again.
#[derive(Debug)]
pub struct Campaign<'a> {
    package: &'static str,
    name: &'static str,
    executions: u64,
    must_see: &'a [&'a str],
}

/// What the threads of a campaign share.
struct Shared {
    next: AtomicU64,
    /// The first seed that is not played.
    end: u64,
    until: Option<Instant>,
    is_over: AtomicBool,
    seen: Mutex<BTreeSet<String>>,
}

impl<'a> Campaign<'a> {
    /// A campaign of `executions` in an ordinary test run: the test `name` of the crate `package`.
    pub fn new(package: &'static str, name: &'static str, executions: u64) -> Self {
        Self {
            package,
            name,
            executions,
            must_see: &[],
        }
    }

    /// Fails if one of these never [happened](Dice::saw): a campaign that reaches nothing proves nothing.
    pub fn must_see(self, must_see: &'a [&'a str]) -> Self {
        Self { must_see, ..self }
    }

    /// Plays until all was played or `play` panics.
    ///
    /// # Panics
    /// `play` did, or something that must be seen was not. An execution that does not end within two minutes aborts the process.
    pub fn play(self, play: impl Fn(&mut Dice) + Sync) {
        let number = |name: &str| {
            let text = env::var(name).ok()?;
            Some(
                text.parse::<u64>()
                    .unwrap_or_else(|_| panic!("{name}={text} is no number")),
            )
        };
        if let Some(seed) = number(SEED) {
            play(&mut Dice::new(seed, true));
            return;
        }
        let began = Instant::now();
        let (first, end, until) = match number(SECONDS) {
            Some(seconds) => (
                fresh(),
                u64::MAX,
                Some(began + Duration::from_secs(seconds)),
            ),
            None => (0, self.executions, None),
        };
        let shared = Shared {
            next: AtomicU64::new(first),
            end,
            until,
            is_over: AtomicBool::new(false),
            seen: Mutex::default(),
        };
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| self.watched(&shared, &play));
            }
        });
        let played = shared.next.into_inner().min(end) - first;
        println!(
            "{}: {played} executions in {:.1?}",
            self.name,
            began.elapsed()
        );
        let seen = shared
            .seen
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let missed: Vec<_> = (self.must_see.iter())
            .filter(|what| !seen.contains(**what))
            .collect();
        assert!(
            missed.is_empty(),
            "never happened: {missed:?}; what did: {seen:?}"
        );
    }

    /// One thread's share, and beside it one that ends the process if an execution does not end.
    fn watched(&self, shared: &Shared, play: &(impl Fn(&mut Dice) + Sync)) {
        let (is_done, seed) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut last, mut since) = (u64::MAX, Instant::now());
                while !is_done.load(Ordering::Acquire) {
                    let now = seed.load(Ordering::Relaxed);
                    if now != last {
                        (last, since) = (now, Instant::now());
                    }
                    if since.elapsed() > EXECUTION_LIMIT {
                        eprintln!("{}", self.broken(now, "did not end"));
                        std::process::abort();
                    }
                    std::thread::park_timeout(LOOK);
                }
            });
            let result = catch_unwind(AssertUnwindSafe(|| self.share(shared, &seed, play)));
            is_done.store(true, Ordering::Release);
            if result.is_err() {
                shared.is_over.store(true, Ordering::Relaxed);
                panic!(
                    "{}",
                    self.broken(seed.load(Ordering::Relaxed), "broke a promise")
                );
            }
        });
    }

    fn share(&self, shared: &Shared, playing: &AtomicU64, play: &(impl Fn(&mut Dice) + Sync)) {
        let mut seen = BTreeSet::new();
        while !shared.is_over.load(Ordering::Relaxed)
            && shared.until.is_none_or(|until| Instant::now() < until)
        {
            let seed = shared.next.fetch_add(1, Ordering::Relaxed);
            if seed >= shared.end {
                break;
            }
            playing.store(seed, Ordering::Relaxed);
            let mut dice = Dice::new(seed, false);
            play(&mut dice);
            seen.append(&mut dice.seen());
        }
        let mut all = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
        all.append(&mut seen);
    }

    fn broken(&self, seed: u64, how: &str) -> String {
        let Self { package, name, .. } = self;
        format!(
            "{name}: execution {seed} {how}; replay: {SEED}={seed} cargo test --release -p {package} {name} -- --nocapture"
        )
    }
}

/// A seed to begin with that no earlier run came to.
fn fresh() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    now.as_secs() << 24
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_is_played_once_and_what_was_seen_is_gathered() {
        let played = Mutex::new(Vec::new());
        Campaign::new("thaw-fuzz", "numbers", 100)
            .must_see(&["odd", "even"])
            .play(|dice| {
                let first = dice.any();
                dice.saw(if first % 2 == 0 { "even" } else { "odd" });
                played.lock().unwrap().push(first);
            });
        let mut played = played.into_inner().unwrap();
        played.sort_unstable();
        let mut expected: Vec<u64> = (0..100).map(|seed| Dice::new(seed, false).any()).collect();
        expected.sort_unstable();
        assert_eq!(played, expected);
    }

    #[test]
    fn a_broken_promise_ends_the_campaign() {
        let bad = Dice::new(7, false).any();
        let result = catch_unwind(|| {
            Campaign::new("thaw-fuzz", "broken", u64::MAX).play(|dice| assert_ne!(dice.any(), bad));
        });
        assert!(result.is_err());
    }

    #[test]
    fn a_campaign_that_reaches_nothing_fails() {
        let result = catch_unwind(|| {
            Campaign::new("thaw-fuzz", "empty", 3)
                .must_see(&["something"])
                .play(|_| {});
        });
        assert!(result.is_err());
    }
}
