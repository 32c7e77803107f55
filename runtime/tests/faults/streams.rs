//! Answers that come in pieces, and callers that take them slowly or not at all.

use std::time::Duration;

use thaw_runtime::{End, Invocation, InvokeError, Pool, StreamPart};
use tokio::sync::mpsc;

use crate::stage::{AMPLE, Stage, invocation, is_answer};

fn head() -> StreamPart {
    StreamPart::Head {
        content_type: Some("text/event-stream".into()),
    }
}

async fn taken(pool: &Pool, payload: &[u8]) -> (Vec<StreamPart>, End) {
    let (sink, mut parts) = mpsc::channel(1);
    let take = async {
        let mut all = Vec::new();
        while let Some(part) = parts.recv().await {
            all.push(part);
        }
        all
    };
    let (outcome, all) = tokio::join!(pool.invoke_streaming(invocation(payload), sink), take);
    (all, outcome.unwrap().end)
}

/// Waits until the pool has destroyed what ran.
async fn at_rest(pool: &Pool) {
    let wait = async {
        while pool.stats().running > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(AMPLE, wait).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_answer_comes_piece_by_piece_and_the_vm_is_used_again() {
    let stage = Stage::new("streams");
    let pool = stage.ready_pool().await;
    for _ in 0..2 {
        let (parts, end) = taken(&pool, b"abc").await;
        let chunk = |text: &'static str| StreamPart::Chunk(text.into());
        assert_eq!(parts, [head(), chunk("a"), chunk("b"), chunk("c")]);
        assert!(matches!(end, End::Response { payload, .. } if payload.is_empty()));
    }
    assert_eq!(pool.stats().rewind_failures, 0);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_wants_it_whole_gets_a_streamed_answer_whole() {
    let stage = Stage::new("streams");
    let pool = stage.ready_pool().await;
    let outcome = pool.invoke(invocation(b"abc")).await;
    assert!(is_answer(&outcome, b"abc"));
    assert_eq!(outcome.unwrap().log, b"streamed\n");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_given_whole_is_one_piece() {
    let stage = Stage::new("well");
    let pool = stage.ready_pool().await;
    let (parts, _) = taken(&pool, b"{}").await;
    assert_eq!(parts.len(), 2);
    assert_eq!(parts[1], StreamPart::Chunk("{}".into()));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_is_an_error_for_both_kinds_of_callers() {
    let stage = Stage::new("breaks-off");
    let pool = stage.ready_pool().await;
    let (parts, end) = taken(&pool, b"ab").await;
    assert_eq!(parts.len(), 3);
    let is_broken = |end: End| matches!(end, End::FunctionError { error_type: Some(kind), .. } if kind == "Runtime.StreamError");
    assert!(is_broken(end));
    assert!(is_broken(pool.invoke(invocation(b"ab")).await.unwrap().end));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_midway_ends_the_vm_and_it_is_not_rewound() {
    for script in ["first-streams-forever", "first-begins-and-hangs"] {
        let stage = Stage::new(script);
        let pool = stage.ready_pool().await;
        let (sink, mut parts) = mpsc::channel(1);
        let leave = async {
            assert_eq!(parts.recv().await, Some(head()));
            drop(parts);
        };
        let (outcome, ()) = tokio::join!(pool.invoke_streaming(invocation(b"{}"), sink), leave);
        assert!(matches!(outcome, Err(InvokeError::Abandoned)), "{script}");
        at_rest(&pool).await;
        // Had it been rewound, the same process would stream again.
        let outcome = pool.invoke(invocation(b"{}")).await;
        assert!(is_answer(&outcome, b"{}"));
        assert_eq!(pool.stats().rewound, 0);
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_bounds_what_is_held_and_has_the_functions_time() {
    let stage = Stage::new("streams-forever");
    let pool = stage.ready_pool().await;
    let (sink, mut parts) = mpsc::channel(2);
    let invocation = Invocation {
        timeout: Duration::from_secs(1),
        ..invocation(b"{}")
    };
    let outcome = pool.invoke_streaming(invocation, sink).await.unwrap();
    assert_eq!(outcome.end, End::TimedOut);
    // Nobody read: no more than the caller's own bound was passed on.
    let mut held = 0;
    while parts.try_recv().is_ok() {
        held += 1;
    }
    assert_eq!(held, 2);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_end_is_a_guests_fault_at_the_limit() {
    let stage = Stage::new("streams-forever");
    let pool = stage.ready_pool().await;
    let outcome = pool.invoke(invocation(b"{}")).await.unwrap();
    let End::GuestDied { detail, .. } = outcome.end else {
        panic!("{:?}", outcome.end);
    };
    assert!(
        detail.contains("over the limit of 209715200 bytes"),
        "{detail}"
    );
    stage.strike().await;
}
