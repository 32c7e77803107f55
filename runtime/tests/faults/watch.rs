//! Idle monitors that hang, or end, are found and replaced.

use std::fs;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use thaw_runtime::{RuntimeConfig, Start};

use super::lives::{start, until};
use super::stage::{Stage, invoke, is_answer, monitors};

fn often(config: &mut RuntimeConfig) {
    config.watch_interval = Duration::from_millis(90);
    config.reply_limit = Duration::from_millis(500);
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_monitor_that_hangs_or_ends_is_replaced() {
    for fault in [Signal::STOP, Signal::KILL] {
        let stage = Stage::with("well", often);
        let pool = stage.ready_pool().await;
        let ready = pool.ready_pids();
        signal(ready[0], fault);
        until(|| pool.stats().ready == 1 && pool.ready_pids() != ready).await;
        until(|| !monitors(stage.folder.path()).contains(&ready[0])).await;
        assert!(is_answer(&invoke(&pool).await, b"{}"));
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_that_hangs_is_replaced_before_anybody_wants_it() {
    let stage = Stage::with("well", |config| {
        often(config);
        config.shells_per_class = 1;
    });
    let pool = stage.lazy_pool().await;
    until(|| stage.runtime.stats().shells == 1).await;
    let [shell] = monitors(stage.folder.path())[..] else {
        panic!("another monitor is there");
    };
    signal(shell, Signal::STOP);
    until(|| !monitors(stage.folder.path()).contains(&shell)).await;
    until(|| stage.runtime.stats().shells == 1).await;
    assert_eq!(start(&pool).await, Start::Claimed);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_hears_nothing_is_replaced_and_one_that_answers_stays() {
    let stage = Stage::with("deaf", often);
    let pool = stage.ready_pool().await;
    let ready = pool.ready_pids();
    until(|| !monitors(stage.folder.path()).contains(&ready[0])).await;
    stage.strike().await;

    let stage = Stage::with("tells-its-status", often);
    let pool = stage.ready_pool().await;
    let ready = pool.ready_pids();
    let asked = stage.path("tells-its-status").with_extension("asked");
    until(|| fs::read(&asked).is_ok_and(|lines| lines.len() >= 10)).await;
    assert_eq!(pool.ready_pids(), ready);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_is_asked_for_its_status_is_granted_all_the_same() {
    let stage = Stage::with("well", |config| {
        // In each millisecond.
        config.watch_interval = Duration::from_millis(1);
    });
    let pool = stage.lazy_pool().await;
    assert_eq!(start(&pool).await, Start::Cold);
    let only = monitors(stage.folder.path());
    for _ in 0..300 {
        assert_eq!(start(&pool).await, Start::Rewound);
    }
    assert_eq!(monitors(stage.folder.path()), only);
    stage.strike().await;
}
