//! The steps of a function's deployment, kept for subscribers that come late.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use thaw_api_types::thaw::{ProgressEvent, Step};
use tokio::sync::watch;

/// Most events of one deployment; it has fewer steps than this.
const EVENTS_MAX: usize = 64;

/// History of the newest deployment.
#[derive(Debug)]
pub struct Progress {
    history: Mutex<History>,
    /// Counts changes; subscribers wait on it.
    changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct History {
    /// Counts deployments, so that a subscriber notices that another one began.
    deployment: u64,
    began: Instant,
    events: Vec<ProgressEvent>,
}

/// One reader's place in the history.
#[derive(Debug)]
pub struct Cursor {
    deployment: u64,
    next: usize,
    changed: watch::Receiver<u64>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            history: Mutex::new(History {
                deployment: 0,
                began: Instant::now(),
                events: Vec::new(),
            }),
            changed: watch::Sender::new(0),
        }
    }
}

impl Progress {
    /// Forgets the history; a deployment begins.
    pub fn begin(&self) {
        {
            let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            history.deployment += 1;
            history.began = Instant::now();
            history.events.clear();
        }
        self.push(Step::Queued, "code accepted");
    }

    /// A step begins.
    pub fn push(&self, step: Step, message: &str) {
        self.push_event(ProgressEvent {
            step,
            message: message.to_owned(),
            ..ProgressEvent::default()
        });
    }

    /// Any event; its `elapsed_ms` is set here.
    pub fn push_event(&self, mut event: ProgressEvent) {
        {
            let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            if history.events.len() >= EVENTS_MAX && !event.done {
                return;
            }
            event.elapsed_ms =
                u64::try_from(history.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            history.events.push(event);
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// A reader at the beginning of the newest deployment.
    #[must_use]
    pub fn subscribe(&self) -> Cursor {
        let changed = self.changed.subscribe();
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        Cursor {
            deployment: history.deployment,
            next: 0,
            changed,
        }
    }

    /// The next event; waits for it. `None` when another deployment began or the function is gone.
    pub async fn next(&self, cursor: &mut Cursor) -> Option<ProgressEvent> {
        loop {
            {
                let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
                if history.deployment != cursor.deployment {
                    if cursor.next > 0 {
                        return None;
                    }
                    // Nothing heard yet: this is the deployment it waited for.
                    cursor.deployment = history.deployment;
                }
                if let Some(event) = history.events.get(cursor.next) {
                    cursor.next += 1;
                    return Some(event.clone());
                }
            }
            cursor.changed.changed().await.ok()?;
        }
    }

    /// No deployment was seen since the gateway started.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.events.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_late_subscriber_hears_the_whole_deployment() {
        let progress = Progress::default();
        assert!(progress.is_empty());
        progress.begin();
        progress.push(Step::Booting, "boot");
        let mut cursor = progress.subscribe();
        assert_eq!(progress.next(&mut cursor).await.unwrap().step, Step::Queued);
        assert_eq!(
            progress.next(&mut cursor).await.unwrap().step,
            Step::Booting
        );
        progress.push(Step::Saving, "save");
        assert_eq!(progress.next(&mut cursor).await.unwrap().step, Step::Saving);
        progress.begin();
        assert!(progress.next(&mut cursor).await.is_none());
    }

    #[tokio::test]
    async fn an_early_subscriber_waits_for_the_deployment_to_begin() {
        let progress = Progress::default();
        let mut cursor = progress.subscribe();
        progress.begin();
        assert_eq!(progress.next(&mut cursor).await.unwrap().step, Step::Queued);
    }
}
