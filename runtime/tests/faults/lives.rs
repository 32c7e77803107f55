//! Shells, claims, rewinds, and the machine's budgets.

use std::time::Duration;

use thaw_runtime::{Invocation, InvokeError, Pool, PoolSpec, Recycle, Start, ThrottleReason};

use super::stage::{Stage, host, invocation, invoke, is_answer, monitors};

impl Stage {
    /// A pool that keeps nothing ready of its own accord.
    pub async fn lazy_pool(&self) -> Pool {
        let spec = PoolSpec {
            ready_count: 0,
            ..self.spec()
        };
        self.runtime.open_pool(spec).await.unwrap()
    }
}

/// Runs one invocation that must answer, and says how its sandbox was had.
pub async fn start(pool: &Pool) -> Start {
    let result = invoke(pool).await;
    assert!(is_answer(&result, b"{}"), "{result:?}");
    result.unwrap().start
}

pub async fn until(is_so: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !is_so() {
        assert!(began.elapsed() < super::AMPLE, "it never comes");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_vm_is_rewound_and_used_again_on_a_new_channel() {
    let stage = Stage::new("well");
    let pool = stage.lazy_pool().await;
    assert_eq!(start(&pool).await, Start::Cold);
    let only = monitors(stage.folder.path());
    for _ in 0..5 {
        assert_eq!(start(&pool).await, Start::Rewound);
    }
    assert_eq!((only.len(), &monitors(stage.folder.path())), (1, &only));
    let stats = pool.stats();
    assert_eq!((stats.cold, stats.claimed, stats.rewound), (1, 0, 5));
    // The scripted monitor goes on talking on the old one.
    assert_eq!(stats.stale_frames, 0);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_is_claimed_for_a_request_and_another_is_made() {
    let stage = Stage::with("well", |config| config.shells_per_class = 1);
    let pool = stage.lazy_pool().await;
    until(|| stage.runtime.stats().shells == 1).await;
    assert_eq!(start(&pool).await, Start::Claimed);
    until(|| stage.runtime.stats().shells == 1).await;
    let ahead = stage.pool().await;
    until(|| ahead.stats().ready == 1).await;
    assert_eq!(start(&ahead).await, Start::Claimed);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shells_that_cannot_be_made_are_done_without() {
    let stage = Stage::with("refuses-prepare", |config| config.shells_per_class = 2);
    let pool = stage.lazy_pool().await;
    assert_eq!(start(&pool).await, Start::Cold);
    assert_eq!(start(&pool).await, Start::Rewound);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_cannot_be_rewound_is_replaced() {
    for script in [
        "refuses-rewind",
        "dies-in-rewind",
        "hangs-in-rewind",
        "answers-and-powers-off",
    ] {
        let limit = |config: &mut thaw_runtime::RuntimeConfig| {
            config.reply_limit = Duration::from_millis(200);
        };
        let stage = Stage::with(script, limit);
        let pool = stage.lazy_pool().await;
        for _ in 0..4 {
            assert!(start(&pool).await < Start::Rewound, "{script}");
        }
        until(|| pool.stats().rewinding == 0).await;
        let stats = pool.stats();
        assert!(
            stats.rewind_failures > 0 && stats.rewound == 0,
            "{script}: {stats:?}"
        );
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_refused_before_the_guest_runs_is_tried_again() {
    let stage = Stage::new("first-refuses-restore");
    let pool = stage.lazy_pool().await;
    assert!(start(&pool).await < Start::Rewound);
    assert_eq!(pool.stats().restore_failures, 1);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_for_requests_that_go_on_failing_are_told_with_the_monitors_reason() {
    for (script, reason, failures) in [
        (
            "refuses-restore",
            "monitor failed to restore; host lacks avx512",
            2,
        ),
        ("dies-in-restore", "monitor died: cannot open /dev/kvm", 1),
        ("hangs-in-restore", "monitor did not restore within 2s", 1),
    ] {
        let stage = Stage::new(script);
        let pool = stage.lazy_pool().await;
        let told = host(invoke(&pool).await);
        assert!(told.contains(reason), "{script}: {told}");
        assert_eq!(pool.stats().restore_failures, failures, "{script}");
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_refused_is_told_from_a_restore_that_fails() {
    for (script, is_refused) in [("foreign-snapshot", true), ("refuses-restore", false)] {
        let stage = Stage::new(script);
        // Claimed for the request, and ahead of it.
        for pool in [stage.lazy_pool().await, stage.pool().await] {
            let error = invoke(&pool).await.unwrap_err();
            assert_eq!(error.refuses_snapshot(), is_refused, "{script}: {error:?}");
        }
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_measurement_may_use_a_vm_again_as_it_is() {
    let stage = Stage::with("stays-warm", |config| config.recycle = Recycle::Reuse);
    let pool = stage.lazy_pool().await;
    assert_eq!(start(&pool).await, Start::Cold);
    // Before it is back, a request is served by another, and so may be the next.
    let began = std::time::Instant::now();
    while start(&pool).await != Start::Warm {
        assert!(began.elapsed() < super::AMPLE, "nothing is used again");
    }
    stage.strike().await;
    let stage = Stage::with("well", |config| config.recycle = Recycle::Replace);
    let pool = stage.lazy_pool().await;
    for _ in 0..3 {
        assert!(start(&pool).await < Start::Rewound);
    }
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_nobody_calls_any_more_scales_to_zero() {
    let stage = Stage::with("well", |config| {
        config.keep_alive = Duration::from_millis(50)
    });
    let pool = stage.lazy_pool().await;
    start(&pool).await;
    until(|| pool.stats().ready == 1).await;
    until(|| monitors(stage.folder.path()).is_empty()).await;
    assert_eq!(start(&pool).await, Start::Cold);
    stage.strike().await;
}

/// Room for one sandbox that runs, and no more.
fn one_sandbox(config: &mut thaw_runtime::RuntimeConfig) {
    config.memory_budget_mib = Some(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_sandbox_makes_room_for_another_functions_request() {
    let stage = Stage::with("well", one_sandbox);
    let (one, two) = (stage.lazy_pool().await, stage.lazy_pool().await);
    for _ in 0..3 {
        // What the other function used is destroyed each time; its sandboxes never come back rewound.
        for pool in [&one, &two] {
            assert!(start(pool).await < Start::Rewound);
            until(|| pool.stats().ready == 1).await;
            assert!(stage.runtime.stats().memory_mib <= 200);
        }
    }
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_room_says_so_in_time() {
    let stage = Stage::with("hangs-in-run", one_sandbox);
    let (one, two) = (stage.lazy_pool().await, {
        let spec = PoolSpec {
            ready_count: 0,
            queue_wait_max: Duration::from_millis(100),
            ..stage.spec()
        };
        stage.runtime.open_pool(spec).await.unwrap()
    });
    let running = tokio::spawn(async move { one.invoke(long()).await });
    until(|| stage.runtime.stats().vcpus == 1).await;
    let refused = |result, expected| match result {
        Err(InvokeError::Throttled { reason, .. }) => assert_eq!(reason, expected),
        other => panic!("{other:?}"),
    };
    refused(invoke(&two).await, ThrottleReason::MachineFull);
    running.abort();
    stage.strike().await;

    let stage = Stage::with("well", |config| config.memory_budget_mib = Some(100));
    let pool = stage.pool().await;
    refused(invoke(&pool).await, ThrottleReason::TooBig);
    assert!(monitors(stage.folder.path()).is_empty());
    stage.strike().await;
}

fn long() -> Invocation {
    invocation(b"{}")
}
