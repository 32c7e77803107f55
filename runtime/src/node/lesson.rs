//! What a function's first invocations teach: which pages of its snapshot they touch, in their order.
//!
//! Of a function whose snapshot has no working set, one sandbox at a time is claimed in such a way that its monitor notes touches
//! (userfaultfd): a *lesson*. The first request goes to it if it can, gets its answer like any other, only later by its page faults,
//! and the sandbox is destroyed. After that, with the request long answered, the set is written beside the old snapshot, takes its
//! name, and is verified; later claims are made from it, earlier ones keep the file that they have. The schedule knows nothing of this.

use std::sync::Arc;
use std::time::Duration;

use thaw_snapshot::{
    Access, AmendError, OpenError, PageRun, Snapshot, TouchedRun, VerifyError, WorkingSet,
    WorkingSetError, set_working_set,
};
use thaw_vmm_control::{Paging, WorkingSetRun};
use thiserror::Error;
use tokio::sync::watch;

use super::Member;
use crate::HostError;
use crate::vm::chain;

/// Lessons of a function that come to nothing, as it fails or times out, before nothing is learned of it: each costs a request
/// some of its time.
const LESSONS_MAX: u32 = 3;
/// Longest wait, when a function closes, for a set that is being written.
const STORE_LIMIT: Duration = Duration::from_secs(30);

/// How far a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its snapshot has no working set; so many lessons are left.
    Wanted(u32),
    /// A sandbox of it notes touches.
    Recording(u32),
    /// What it noted is being written.
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

    pub(crate) fn is_recording(&self) -> bool {
        matches!(*self.stage.borrow(), Stage::Recording(_))
    }

    /// The sandbox is gone without a result. One that ran nothing has cost no request anything.
    fn give_back(&self, progress: Progress) {
        self.change(|stage| match (stage, progress) {
            (Stage::Recording(left), Progress::Idle) => Some(Stage::Wanted(left)),
            (Stage::Recording(left), _) => Some(Stage::again(left - 1)),
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

/// What has become of a lesson's sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nothing ran in it.
    Idle,
    /// A request was put into it, or its claim failed.
    Begun,
    /// The function answered.
    Answered,
}

/// The right, and the duty, of one sandbox to note what is touched. Dropped without a result it is another's turn.
#[derive(Debug)]
pub(crate) struct Lesson {
    member: Arc<Member>,
    progress: Progress,
}

impl Drop for Lesson {
    fn drop(&mut self) {
        self.member.learning.give_back(self.progress);
    }
}

impl Lesson {
    /// One for a sandbox of `member` that is about to be claimed, if one is wanted and no other has it.
    pub(crate) fn of(member: &Arc<Member>) -> Option<Self> {
        member.learning.begin().then(|| Self {
            member: Arc::clone(member),
            progress: Progress::Idle,
        })
    }

    /// From now on it counts.
    pub(crate) fn begin(&mut self) {
        self.progress = Progress::Begun;
    }

    /// The function answered: what was touched is worth keeping.
    pub(crate) fn answer(&mut self) {
        self.progress = Progress::Answered;
    }

    pub(crate) fn is_answered(&self) -> bool {
        self.progress == Progress::Answered
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
    let set = WorkingSet::new(runs.iter().map(touched).collect(), memory_bytes)
        .map_err(LearnError::Pages)?;
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
    set_working_set(path, &set).map_err(LearnError::Store)?;
    let amended = reopen()?;
    // Its base is the one that was verified with the old file.
    amended.verify_own().map_err(LearnError::Damaged)?;
    let mut files = old.again().map_err(LearnError::Descriptor)?;
    files.snapshot = (amended.file().try_clone()).map_err(LearnError::Descriptor)?;
    member.set_files(files);
    Ok(set)
}

pub(crate) fn touched(run: &WorkingSetRun) -> TouchedRun {
    TouchedRun {
        pages: PageRun {
            start: run.start,
            count: run.count,
        },
        access: match run.written {
            true => Access::Write,
            false => Access::Read,
        },
    }
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
    fn one_sandbox_at_a_time_has_the_lesson_and_idle_ones_cost_nothing() {
        let learning = Learning::wanted();
        for _ in 0..10 * LESSONS_MAX {
            assert!(learning.begin());
            assert!(!learning.begin() && learning.is_recording());
            learning.give_back(Progress::Idle);
        }
        assert_eq!(stage(&learning), Stage::Wanted(LESSONS_MAX));
    }

    #[test]
    fn lessons_that_come_to_nothing_are_given_up() {
        let learning = Learning::wanted();
        for lesson in 0..LESSONS_MAX {
            assert!(learning.begin(), "lesson {lesson}");
            match lesson % 2 {
                0 => learning.give_back(Progress::Begun),
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
        learning.give_back(Progress::Answered);
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
        idle.give_back(Progress::Idle);
        assert!(!idle.store() && !idle.begin());
    }
}
