//! Requests that a client sends again: an SDK that waited too long for an answer tries once more with the same
//! `amz-sdk-invocation-id`, and must not run the function twice.
//!
//! **Invariant:** of requests with one id, one runs; the others get its answer, while it runs and for some time after:
//! `a_request_that_is_sent_again_runs_once`. What was refused did not run, so it is tried anew.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::{Answer, FunctionResult, Refusal};

/// How long an answer is kept. SDKs try again within seconds.
const KEPT: Duration = Duration::from_secs(300);
/// Most bytes of answers that are kept.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// Most answers that are kept.
const KEPT_MAX: usize = 4096;
/// Longest id that is looked at; SDKs send UUIDs.
const ID_BYTES_MAX: usize = 128;

type Outcome = Result<Answer, Refusal>;

/// What makes two requests the same: function, id and event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// Of a request with an id; `None` for an id that no SDK sends.
    #[must_use]
    pub fn new(id: &str, arn: &str, payload: &[u8]) -> Option<Self> {
        if id.is_empty() || id.len() > ID_BYTES_MAX {
            return None;
        }
        let mut digest = Sha256::new();
        for part in [id.as_bytes(), b"\0", arn.as_bytes(), b"\0", payload] {
            digest.update(part);
        }
        Some(Self(digest.finalize().into()))
    }
}

/// Requests that run or ran lately.
#[derive(Debug, Default)]
pub struct Duplicates {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    outcomes: HashMap<Key, watch::Receiver<Option<Outcome>>>,
    /// What has ended: key, bytes, when; the oldest first.
    ended: VecDeque<(Key, usize, Instant)>,
    bytes: usize,
}

impl Known {
    fn end(&mut self, key: Key, outcome: &Outcome, now: Instant) {
        match outcome {
            Ok(answer) => {
                let bytes = size(answer);
                self.bytes += bytes;
                self.ended.push_back((key, bytes, now));
            }
            Err(_) => {
                self.outcomes.remove(&key);
            }
        }
        self.forget(now);
    }

    fn forget(&mut self, now: Instant) {
        while let Some((key, bytes, since)) = self.ended.front().copied() {
            let is_young = now.duration_since(since) < KEPT;
            if is_young && self.bytes <= KEPT_BYTES_MAX && self.ended.len() <= KEPT_MAX {
                break;
            }
            self.ended.pop_front();
            self.bytes -= bytes;
            self.outcomes.remove(&key);
        }
    }
}

fn size(answer: &Answer) -> usize {
    let (FunctionResult::Response(body) | FunctionResult::Error { document: body, .. }) =
        &answer.result;
    body.len() + answer.log.len()
}

impl Duplicates {
    /// The outcome of the request with this key: of the one that runs or ran, or else of `run`, which goes on when the caller
    /// goes away.
    ///
    /// # Errors
    /// Those of `run`.
    pub async fn once(
        self: &Arc<Self>,
        key: Key,
        run: impl Future<Output = Outcome> + Send + 'static,
    ) -> Outcome {
        let (sender, mut outcome) = {
            let mut known = self.lock();
            known.forget(Instant::now());
            match known.outcomes.get(&key) {
                Some(outcome) => (None, outcome.clone()),
                None => {
                    let (sender, outcome) = watch::channel(None);
                    known.outcomes.insert(key, outcome.clone());
                    (Some(sender), outcome)
                }
            }
        };
        if let Some(sender) = sender {
            let duplicates = Arc::clone(self);
            tokio::spawn(async move {
                let outcome = run.await;
                duplicates.lock().end(key, &outcome, Instant::now());
                sender.send_replace(Some(outcome));
            });
        }
        let ended = outcome.wait_for(Option::is_some).await;
        match ended.as_deref() {
            Ok(Some(outcome)) => outcome.clone(),
            _ => Err(Refusal::Host("the invocation's task died".to_owned())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::record::VersionId;

    fn answer(bytes: usize) -> Answer {
        Answer {
            version: VersionId::Latest,
            result: FunctionResult::Response(Bytes::from(vec![0; bytes])),
            restore: None,
            log: Bytes::new(),
            timings: None,
            start: None,
        }
    }

    #[tokio::test]
    async fn a_refusal_is_not_kept_and_an_answer_is() {
        let duplicates = Arc::new(Duplicates::default());
        let key = Key::new("i", "arn", b"1").unwrap();
        let refused = duplicates.once(key, async { Err(Refusal::Gone) }).await;
        assert_eq!(refused.unwrap_err(), Refusal::Gone);
        let first = duplicates.once(key, async { Ok(answer(3)) }).await;
        assert_eq!(size(&first.unwrap()), 3);
        let again = duplicates.once(key, async { panic!("it ran twice") }).await;
        assert_eq!(size(&again.unwrap()), 3);
        let other = Key::new("i", "arn", b"2").unwrap();
        let other = duplicates.once(other, async { Ok(answer(4)) }).await;
        assert_eq!(size(&other.unwrap()), 4);
    }

    #[test]
    fn answers_are_kept_within_limits_of_time_and_memory() {
        let mut known = Known::default();
        let now = Instant::now();
        let key = |number: usize| Key::new("i", "arn", &number.to_ne_bytes()).unwrap();
        let keep = |known: &mut Known, number, bytes, at| {
            let (_, outcome) = watch::channel(None);
            known.outcomes.insert(key(number), outcome);
            known.end(key(number), &Ok(answer(bytes)), at);
        };
        keep(&mut known, 0, KEPT_BYTES_MAX / 2, now);
        keep(&mut known, 1, KEPT_BYTES_MAX / 2, now);
        assert_eq!(known.outcomes.len(), 2);
        keep(&mut known, 2, 1, now);
        assert!(!known.outcomes.contains_key(&key(0)) && known.outcomes.len() == 2);
        known.forget(now + KEPT);
        assert!(known.outcomes.is_empty() && known.ended.is_empty());
        assert_eq!(known.bytes, 0);
        for number in 0..=KEPT_MAX {
            keep(&mut known, number, 0, now);
        }
        assert_eq!(known.outcomes.len(), KEPT_MAX);
        assert!(Key::new("", "arn", b"").is_none());
        assert!(Key::new(&"x".repeat(ID_BYTES_MAX + 1), "arn", b"").is_none());
    }
}
