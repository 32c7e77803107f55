//! What a function's first invocation teaches: which pages of its snapshot it touches.
//!
//! Of a function whose snapshot has no working set, the sandbox of the first request that succeeds is looked at, when that has
//! its answer, before it is rewound or destroyed: its monitor reads what is mapped (`/proc/self/pagemap`). That costs the request
//! nothing, needs no privilege, and changes nothing of how it runs. The set is written into a copy of the snapshot, which takes
//! its name and is verified; later claims are made from it, earlier ones keep the file that they have.
//!
//! What was written is known to the page. What was read is not, as the kernel maps up to [`AROUND_PAGES`] pages around one that is
//! touched: of each such window one page is kept, and fetching that brings in the same window. No order is seen; a set is
//! in ascending order, which takes the fewest calls to fetch.

use std::sync::Arc;
use std::time::Duration;

use thaw_snapshot::{
    Access, AmendError, AuthenticityError, OpenError, PageRun, Snapshot, TouchedRun, VerifyError,
    WorkingSet, WorkingSetError, set_working_set,
};
use thaw_vmm_control::{Paging, WorkingSetRun};
use thiserror::Error;
use tokio::sync::watch;

use super::Member;
use crate::HostError;
use crate::vm::chain;

/// Lessons of a function that come to nothing before no more are taken.
const LESSONS_MAX: u32 = 3;
/// Pages that the kernel maps around one that is read: `fault_around_bytes`, mm/memory.c, 64 KiB, aligned.
const AROUND_PAGES: u64 = 16;
/// Longest wait, when a function closes, for a set that is being written.
const STORE_LIMIT: Duration = Duration::from_secs(30);

/// How far a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its snapshot has no working set; so many lessons are left.
    Wanted(u32),
    /// One of its sandboxes is to be looked at.
    Recording(u32),
    /// What was seen is being written.
    Storing(u32),
    /// The snapshot has a set, or is to have none.
    Over,
}

impl Stage {
    fn again(lessons: u32) -> Self {
        match lessons {
            0 => Self::Over,
            lessons => Self::Wanted(lessons),
        }
    }
}

/// Why nothing came of a lesson whose request was answered.
#[derive(Debug, Error)]
enum LearnError {
    #[error("monitor did not tell what was touched")]
    Untold(#[source] HostError),
    #[error("monitor told pages outside of memory")]
    Pages(#[source] WorkingSetError),
    #[error("monitor told of no page")]
    Nothing,
    #[error("snapshot's descriptor could not be kept")]
    Descriptor(#[source] std::io::Error),
    #[error("snapshot could not be opened")]
    Open(#[source] OpenError),
    #[error("snapshot's file was replaced by another snapshot")]
    Replaced,
    #[error("snapshot with its working set is not authentic")]
    Untrusted(#[source] AuthenticityError),
    #[error("working set could not be stored")]
    Store(#[source] AmendError),
    #[error("snapshot with its working set is damaged")]
    Damaged(#[source] VerifyError),
    #[error("thread that stored it died")]
    Thread,
}

/// Whether a function still has something to learn. One lesson at a time.
#[derive(Debug)]
pub(crate) struct Learning {
    stage: watch::Sender<Stage>,
}

impl Learning {
    pub(crate) fn wanted() -> Self {
        let stage = watch::Sender::new(Stage::Wanted(LESSONS_MAX));
        Self { stage }
    }

    pub(crate) fn over() -> Self {
        let stage = watch::Sender::new(Stage::Over);
        Self { stage }
    }

    fn change(&self, next: impl Fn(Stage) -> Option<Stage>) -> bool {
        let change = |stage: &mut Stage| next(*stage).map(|next| *stage = next).is_some();
        self.stage.send_if_modified(change)
    }

    fn begin(&self) -> bool {
        self.change(|stage| match stage {
            Stage::Wanted(left) => Some(Stage::Recording(left)),
            _ => None,
        })
    }

    /// The sandbox is gone without a result.
    fn give_back(&self) {
        self.change(|stage| match stage {
            Stage::Recording(left) => Some(Stage::again(left - 1)),
            _ => None,
        });
    }

    fn store(&self) -> bool {
        self.change(|stage| match stage {
            Stage::Recording(left) => Some(Stage::Storing(left)),
            _ => None,
        })
    }

    fn stored(&self, is_done: bool) {
        self.change(|stage| match stage {
            Stage::Storing(left) if !is_done => Some(Stage::again(left - 1)),
            _ => Some(Stage::Over),
        });
    }

    /// Ends it: returns when nobody writes to the snapshot's folder, and nobody will.
    pub(crate) async fn close(&self) {
        let end = async {
            let end = |stage| (!matches!(stage, Stage::Storing(_))).then_some(Stage::Over);
            while !self.change(end) {
                let mut stages = self.stage.subscribe();
                // Fails only without the sender, which is ours.
                let _ = stages.wait_for(|s| !matches!(s, Stage::Storing(_))).await;
            }
        };
        if tokio::time::timeout(STORE_LIMIT, end).await.is_err() {
            tracing::error!("a working set is still being written");
        }
    }
}

/// The right, and the duty, to tell what one sandbox has touched. Dropped without a result it is another's turn.
#[derive(Debug)]
pub(crate) struct Lesson {
    member: Arc<Member>,
}

impl Drop for Lesson {
    fn drop(&mut self) {
        self.member.learning.give_back();
    }
}

impl Lesson {
    /// One for a sandbox of `member` that has answered, if one is wanted and no other has it.
    pub(crate) fn of(member: &Arc<Member>) -> Option<Self> {
        member.learning.begin().then(|| Self {
            member: Arc::clone(member),
        })
    }

    /// Whether the function is still there to make use of it.
    pub(crate) fn is_open(&self) -> bool {
        !self.member.stop_claims.is_cancelled()
    }

    /// Stores what the sandbox's monitor told, and lets later claims use it. A failure is told on the log: it harms nobody.
    pub(crate) async fn keep(self, told: Result<Vec<WorkingSetRun>, HostError>) {
        let member = Arc::clone(&self.member);
        if !member.learning.store() {
            return;
        }
        let kept = match told {
            Ok(runs) => {
                let member = Arc::clone(&member);
                let work = tokio::task::spawn_blocking(move || store(&member, &runs));
                work.await.unwrap_or(Err(LearnError::Thread))
            }
            Err(error) => Err(LearnError::Untold(error)),
        };
        let pool = &member.spec.name;
        match &kept {
            Ok(set) => tracing::info!(
                pool,
                pages = set.pages(),
                written = set.written_pages(),
                "working set is learned"
            ),
            // The function was deleted, or the gateway stops.
            Err(error) if !self.is_open() || !member.spec.snapshot.exists() => {
                tracing::debug!(pool, error = chain(error), "working set is not learned");
            }
            Err(error) => {
                tracing::warn!(pool, error = chain(error), "working set is not learned");
            }
        }
        member.learning.stored(kept.is_ok());
    }
}

/// Writes the set into a new file that takes the snapshot's name, and verifies that as one is verified when its pool is opened.
fn store(member: &Member, runs: &[WorkingSetRun]) -> Result<WorkingSet, LearnError> {
    let memory_bytes = u64::from(member.shape.memory_mib) << 20;
    let all = WorkingSet::new(runs.iter().map(touched).collect(), memory_bytes);
    let all = all.map_err(LearnError::Pages)?;
    let runs = all.runs().iter().copied().flat_map(thinned).collect();
    let set = WorkingSet::new(runs, memory_bytes).map_err(LearnError::Pages)?;
    if set.runs().is_empty() {
        return Err(LearnError::Nothing);
    }
    let (old, path) = (member.files(), &member.spec.snapshot);
    let kept = old.snapshot.try_clone().map_err(LearnError::Descriptor)?;
    let kept = Snapshot::from_file(kept, "kept open").map_err(LearnError::Open)?;
    let reopen = || {
        let named = Snapshot::open(path).map_err(LearnError::Open)?;
        let is_same = named.content_digest() == kept.content_digest();
        is_same.then_some(named).ok_or(LearnError::Replaced)
    };
    reopen()?;
    set_working_set(path, &set, Some(&member.key)).map_err(LearnError::Store)?;
    let amended = reopen()?;
    amended
        .authenticate(&member.key)
        .map_err(LearnError::Untrusted)?;
    // Its base is the one that was verified with the old file.
    amended.verify_own().map_err(LearnError::Damaged)?;
    let mut files = old.again().map_err(LearnError::Descriptor)?;
    files.snapshot = (amended.file().try_clone()).map_err(LearnError::Descriptor)?;
    member.set_files(files);
    Ok(set)
}

/// Of what was read one page for each window that is mapped at once; all of what was written.
fn thinned(TouchedRun { pages, access }: TouchedRun) -> Vec<TouchedRun> {
    if access == Access::Write {
        return vec![TouchedRun { pages, access }];
    }
    let end = pages.start.saturating_add(pages.count);
    let next = |page: &u64| Some((page / AROUND_PAGES + 1) * AROUND_PAGES);
    let windows = std::iter::successors(Some(pages.start), next).take_while(|page| *page < end);
    let one = |start| TouchedRun {
        pages: PageRun { start, count: 1 },
        access,
    };
    windows.map(one).collect()
}

pub(crate) fn touched(run: &WorkingSetRun) -> TouchedRun {
    TouchedRun::new(run.start, run.count, run.written)
}

/// Whether there is something to learn about a snapshot that is opened.
pub(crate) fn learning(snapshot: &Snapshot, paging: Paging) -> Result<Learning, VerifyError> {
    let has_set = snapshot.working_set()?.is_some();
    // A store's memory comes in chunks: touches of single pages are not seen.
    Ok(match has_set || paging != Paging::Mapped {
        true => Learning::over(),
        false => Learning::wanted(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(learning: &Learning) -> Stage {
        *learning.stage.borrow()
    }

    #[test]
    fn of_what_was_read_one_page_a_window_is_kept_and_all_of_what_was_written() {
        let thin = |start, count, written| {
            let run = WorkingSetRun {
                start,
                count,
                written,
            };
            let runs = thinned(touched(&run));
            assert!(
                runs.iter()
                    .all(|run| (run.access == Access::Write) == written)
            );
            let pages = runs.iter().map(|run| (run.pages.start, run.pages.count));
            pages.collect::<Vec<_>>()
        };
        assert_eq!(thin(5, 40, true), [(5, 40)]);
        assert_eq!(thin(5, 1, false), [(5, 1)]);
        assert_eq!(thin(5, 11, false), [(5, 1)]);
        assert_eq!(thin(5, 12, false), [(5, 1), (16, 1)]);
        assert_eq!(thin(16, 33, false), [(16, 1), (32, 1), (48, 1)]);
    }

    #[test]
    fn lessons_that_come_to_nothing_are_given_up() {
        let learning = Learning::wanted();
        for lesson in 0..LESSONS_MAX {
            assert!(learning.begin(), "lesson {lesson}");
            match lesson % 2 {
                0 => learning.give_back(),
                _ => {
                    assert!(learning.store());
                    learning.stored(false);
                }
            }
        }
        assert_eq!(stage(&learning), Stage::Over);
        assert!(!learning.begin());
    }

    #[test]
    fn what_was_learned_is_not_learned_again() {
        let learning = Learning::wanted();
        assert!(!learning.store(), "nobody recorded");
        assert!(learning.begin() && learning.store());
        // The sandbox's own end, which comes after.
        learning.give_back();
        assert!(!learning.begin());
        learning.stored(true);
        assert!(!learning.begin() && !learning.store());
        assert!(!Learning::over().begin());
    }

    #[tokio::test]
    async fn closing_waits_for_a_set_that_is_written_and_begins_nothing_new() {
        let learning = Arc::new(Learning::wanted());
        assert!(learning.begin() && learning.store());
        let closing = tokio::spawn({
            let learning = Arc::clone(&learning);
            async move { learning.close().await }
        });
        tokio::task::yield_now().await;
        assert!(!closing.is_finished());
        // It failed, and would be tried again.
        learning.stored(false);
        closing.await.unwrap();
        assert_eq!(stage(&learning), Stage::Over);

        let idle = Learning::wanted();
        assert!(idle.begin());
        idle.close().await;
        idle.give_back();
        assert!(!idle.store() && !idle.begin());
    }
}
