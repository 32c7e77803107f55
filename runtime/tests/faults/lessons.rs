//! Working sets that a pool learns from its first invocations, and what may go wrong with that.

use std::fs;
use std::time::Instant;

use thaw_runtime::{Learn, Pool, PoolSpec, Recycle, Start};
use thaw_snapshot::{Snapshot, WorkingSet};

use super::lives::{start, until};
use super::stage::{Stage, host, invoke};

impl Stage {
    async fn learning_pool(&self, ready_count: usize) -> Pool {
        let spec = PoolSpec {
            ready_count,
            learn: Learn::WorkingSet,
            ..self.spec()
        };
        let pool = self.runtime.open_pool(spec).await.unwrap();
        until(|| pool.stats().ready == ready_count).await;
        pool
    }

    fn snapshot(&self) -> Snapshot {
        let snapshot = Snapshot::open(&self.path("snapshot.thaw")).unwrap();
        snapshot.authenticate(&super::stage::key()).unwrap();
        snapshot
    }

    fn learned(&self) -> Option<WorkingSet> {
        self.snapshot().working_set().unwrap()
    }

    /// Lines that monitors of the script have written about this.
    fn noted(&self, script: &str, what: &str) -> usize {
        let path = self.path(script).with_extension(what);
        fs::read(path).map_or(0, |lines| lines.len())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_leaves_a_working_set_and_no_other_does() {
    for ready_count in [0, 1, 3] {
        let stage = Stage::new("well");
        let before = stage.snapshot();
        let pool = stage.learning_pool(ready_count).await;
        start(&pool).await;
        until(|| stage.learned().is_some()).await;
        let (set, after) = (stage.learned().unwrap(), stage.snapshot());
        // Of the two pages that were read one.
        assert_eq!((set.pages(), set.written_pages()), (2, 1));
        after.verify().unwrap();
        assert_eq!(after.content_digest(), before.content_digest());
        // What the pool held open at first is as it was.
        assert!(before.working_set().unwrap().is_none() && before.verify().is_ok());
        rewinds(&pool).await;
        let stats = pool.stats();
        assert_eq!((stats.restore_failures, stats.rewind_failures), (0, 0));
        pool.close().await;

        let pool = stage.learning_pool(ready_count).await;
        rewinds(&pool).await;
        assert_eq!(stage.noted("well", "asked"), 1);
        assert_eq!(stage.snapshot().digest(), after.digest());
        stage.strike().await;
    }
}

/// Its sandboxes are used again by now.
async fn rewinds(pool: &Pool) {
    let mut starts = Vec::new();
    while starts.last() != Some(&Start::Rewound) {
        starts.push(start(pool).await);
        assert!(starts.len() < 10, "{starts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_dies_when_it_is_asked_costs_no_answer() {
    let stage = Stage::new("dies-when-asked");
    let before = fs::read(stage.path("snapshot.thaw")).unwrap();
    let pool = stage.learning_pool(1).await;
    for _ in 0..10 {
        start(&pool).await;
    }
    let stats = pool.stats();
    assert_eq!((stats.restore_failures, stats.invocations), (0, 10));
    pool.close().await;
    assert_eq!(fs::read(stage.path("snapshot.thaw")).unwrap(), before);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_fails_teaches_nothing_and_the_next_does() {
    let stage = Stage::new("first-dies-in-run");
    let pool = stage.learning_pool(1).await;
    assert!(host(invoke(&pool).await).contains("monitor died"));
    assert!(stage.learned().is_none());
    start(&pool).await;
    until(|| stage.learned().is_some()).await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn touches_that_are_not_told_cost_no_answer_and_are_asked_for_thrice() {
    let script = "forgets-touches";
    let stage = Stage::with(script, |config| config.recycle = Recycle::Replace);
    let before = fs::read(stage.path("snapshot.thaw")).unwrap();
    let pool = stage.learning_pool(0).await;
    let began = Instant::now();
    while stage.noted(script, "asked") < 3 {
        start(&pool).await;
        assert!(began.elapsed() < super::AMPLE, "nobody asks");
    }
    for _ in 0..10 {
        start(&pool).await;
    }
    assert_eq!(stage.noted(script, "asked"), 3);
    pool.close().await;
    assert_eq!(fs::read(stage.path("snapshot.thaw")).unwrap(), before);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_took_the_snapshots_place_is_left_alone() {
    let stage = Stage::new("well");
    let pool = stage.learning_pool(1).await;
    let path = stage.path("snapshot.thaw");
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"of somebody else").unwrap();
    start(&pool).await;
    rewinds(&pool).await;
    pool.close().await;
    assert_eq!(fs::read(&path).unwrap(), b"of somebody else");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_pool_writes_nothing_any_more() {
    for _ in 0..20 {
        let stage = Stage::new("well");
        let pool = stage.learning_pool(1).await;
        start(&pool).await;
        pool.close().await;
        let files = || {
            let names = fs::read_dir(stage.folder.path()).unwrap();
            let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            (names, stage.snapshot().digest())
        };
        let closed = files();
        stage.runtime.shutdown(super::AMPLE).await;
        assert_eq!(files(), closed);
        stage.strike().await;
    }
}
