//! Sandboxes whose extensions are at work when the function has answered.

use std::time::{Duration, Instant};

use thaw_runtime::{End, Invocation, LateLog, Outcome, Pool, Start};

use super::lives::until;
use super::stage::{Stage, invocation};

/// One invocation with a second's time.
async fn invoke(pool: &Pool) -> (Outcome, LateLog) {
    let invocation = Invocation {
        timeout: Duration::from_secs(1),
        ..invocation(b"{}")
    };
    let mut outcome = pool.invoke(invocation).await.unwrap();
    let late_log = outcome.late_log.take().expect("it has extensions");
    (outcome, late_log)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_does_not_wait_for_extensions_and_the_rewind_does() {
    let stage = Stage::new("settles-when-told");
    let pool = stage.lazy_pool().await;
    let (outcome, late_log) = invoke(&pool).await;
    assert!(matches!(outcome.end, End::Response { .. }), "{outcome:?}");
    let stats = pool.stats();
    assert_eq!((stats.running, stats.rewinding), (1, 0));
    std::fs::write(stage.path("settles-when-told").with_extension("go"), "").unwrap();
    assert_eq!(late_log.whole().await, b"late words\n");
    until(|| pool.stats().running == 0).await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn extensions_that_never_end_have_their_limit_and_the_sandbox_is_rewound() {
    let stage = Stage::new("never-settles");
    let pool = stage.lazy_pool().await;
    let (began, (outcome, late_log)) = (Instant::now(), invoke(&pool).await);
    assert!(matches!(outcome.end, End::Response { .. }), "{outcome:?}");
    assert_eq!(late_log.whole().await, b"");
    let took = began.elapsed();
    assert!(
        took >= Duration::from_secs(3) && took < Duration::from_secs(20),
        "{took:?}"
    );
    until(|| pool.stats().rewinding == 0 && pool.stats().running == 0).await;
    assert_eq!(invoke(&pool).await.0.start, Start::Rewound);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn extensions_hear_that_the_time_is_over_after_the_caller_did() {
    let stage = Stage::new("hears-of-its-time-out");
    let pool = stage.lazy_pool().await;
    let (outcome, late_log) = invoke(&pool).await;
    assert_eq!(outcome.end, End::TimedOut);
    assert_eq!(late_log.whole().await, b"told\n");
    stage.strike().await;
}
