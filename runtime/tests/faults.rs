//! What a monitor or a guest may do wrong, played by a scripted monitor (tests/faults/monitor.rs): each fault costs its
//! own invocation at most. The real monitor and real guests are in tests/sandbox.rs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "faults/lessons.rs"]
mod lessons;
#[path = "faults/lives.rs"]
mod lives;
#[path = "faults/settling.rs"]
mod settling;
#[path = "faults/stage.rs"]
mod stage;
#[path = "faults/streams.rs"]
mod streams;
#[path = "faults/watch.rs"]
mod watch;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use thaw_runtime::{
    End, ExitReason, FreezeError, FreezeStep, HostError, INVOCATION_LOG_BYTES_MAX, Invocation,
    InvokeError, Measure, OpenPoolError, PoolSpec, ThrottleReason,
};

use thaw_snapshot::{Key, Snapshot, tag};

use stage::{AMPLE, Stage, host, invocation, invoke, is_answer, key, monitors};

#[tokio::test(flavor = "multi_thread")]
async fn invocations_are_answered_each_by_a_monitor_of_its_own() {
    let stage = Stage::new("well");
    let pool = stage.pool().await;
    let payload = vec![b'x'; 6 * 1024 * 1024];
    let outcome = pool.invoke(invocation(&payload)).await;
    assert!(is_answer(&outcome, &payload));
    assert_eq!(outcome.unwrap().log, b"hello from the function\n");
    let over = pool
        .invoke(invocation(&vec![b'x'; payload.len() + 1]))
        .await;
    assert!(matches!(over, Err(InvokeError::TooLarge(_))));
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..9 {
        let pool = pool.clone();
        calls.spawn(async move { invoke(&pool).await });
    }
    while let Some(result) = calls.join_next().await {
        assert!(is_answer(&result.unwrap(), b"{}"));
    }
    assert_eq!(pool.stats().invocations, 10);
    stage.strike().await;
    assert!(matches!(invoke(&pool).await, Err(InvokeError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_ready_vms_restores_on_demand() {
    let stage = Stage::new("well");
    let spec = PoolSpec {
        ready_count: 0,
        queue_max: 0,
        ..stage.spec()
    };
    let pool = stage.runtime.open_pool(spec).await.unwrap();
    assert_eq!(pool.stats().starting, 0);
    assert!(is_answer(&invoke(&pool).await, b"{}"));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_dies_in_a_run_costs_that_run_alone() {
    let stage = Stage::new("first-dies-in-run");
    let pool = stage.ready_pool().await;
    assert!(host(invoke(&pool).await).contains("monitor died: thread panicked at vcpu.rs"));
    assert!(is_answer(&invoke(&pool).await, b"{}"));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_ready_monitor_costs_no_run() {
    let stage = Stage::new("well");
    let pool = stage.ready_pool().await;
    for pid in pool.ready_pids() {
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        // A caller sees closed sockets; they are closed for sure once the process is a zombie.
        let is_zombie = |stat: String| stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z"));
        while !fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))
            .is_ok_and(is_zombie)
        {
            tokio::task::yield_now().await;
        }
    }
    assert!(is_answer(&invoke(&pool).await, b"{}"));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_failed_restore_is_tried_again() {
    let stage = Stage::new("first-dies-in-restore");
    let pool = stage.ready_pool().await;
    assert!(is_answer(&invoke(&pool).await, b"{}"));
    assert_eq!(pool.stats().restore_failures, 1);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_restores_are_told_with_the_monitors_reason_and_do_not_spin() {
    for (script, reason) in [
        (
            "refuses-restore",
            "monitor failed to restore; host lacks avx512",
        ),
        ("dies-in-restore", "monitor died: cannot open /dev/kvm"),
        ("garbage-in-restore", "monitor broke its control protocol"),
        ("hangs-in-restore", "monitor did not restore within 2s"),
    ] {
        let stage = Stage::new(script);
        let pool = stage.pool().await;
        let told = host(invoke(&pool).await);
        assert!(told.contains(reason), "{script}: {told}");
        let failures = pool.stats().restore_failures;
        assert!((2..5).contains(&failures), "{script}: {failures} failures");
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_over_its_time_is_ended_even_while_the_guest_talks() {
    for script in ["hangs-in-run", "babbles-in-run"] {
        let stage = Stage::new(script);
        let pool = stage.pool().await;
        let mut invocation = invocation(b"{}");
        invocation.timeout = Duration::from_millis(300);
        let began = Instant::now();
        let outcome = pool.invoke(invocation).await.unwrap();
        assert_eq!(outcome.end, End::TimedOut, "{script}");
        assert!(outcome.log.len() < INVOCATION_LOG_BYTES_MAX + 100);
        assert!(began.elapsed() < Duration::from_secs(20), "{script}");
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_have_their_own_time_and_leave_the_function_its_whole() {
    let stage = Stage::new("runs-hooks");
    let pool = stage.pool().await;
    let mut invocation = invocation(b"{}");
    invocation.timeout = Duration::from_secs(1);
    let go = stage.path("runs-hooks").with_extension("go");
    let hooks = async {
        tokio::time::sleep(2 * invocation.timeout).await;
        std::fs::write(go, "").unwrap();
    };
    let (outcome, ()) = tokio::join!(pool.invoke(invocation.clone()), hooks);
    let outcome = outcome.unwrap();
    assert!(matches!(outcome.end, End::Response { .. }), "{outcome:?}");
    assert!(outcome.duration < invocation.timeout, "{outcome:?}");
    stage.strike().await;

    let limit = Duration::from_millis(200);
    let stage = Stage::with("hangs-in-hooks", |config| config.hooks_limit = limit);
    let pool = stage.pool().await;
    let outcome = pool.invoke(self::invocation(b"{}")).await.unwrap();
    assert_eq!(outcome.end, End::RestoreTimedOut);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_end_is_told_with_its_reason_and_console() {
    for (script, expected, shown) in [
        ("panics-in-run", ExitReason::Panic, "Kernel panic"),
        (
            "garbage-from-agent",
            ExitReason::GuestFault,
            "console of the guest",
        ),
        (
            "closes-agent",
            ExitReason::GuestFault,
            "console of the guest",
        ),
    ] {
        let stage = Stage::new(script);
        let pool = stage.pool().await;
        let outcome = invoke(&pool).await.unwrap();
        let End::GuestDied {
            reason, console, ..
        } = outcome.end
        else {
            panic!("{script}: {:?}", outcome.end);
        };
        assert_eq!((reason, console.as_str()), (expected, shown), "{script}");
        stage.strike().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_the_end_of_the_guest_counts() {
    let stage = Stage::new("answers-and-powers-off");
    let pool = stage.pool().await;
    for _ in 0..10 {
        let result = invoke(&pool).await;
        assert!(is_answer(&result, b"{}"), "{result:?}");
    }
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_another_generation_is_never_taken() {
    let stage = Stage::new("old-answers");
    let pool = stage.pool().await;
    assert!(is_answer(&invoke(&pool).await, b"{}"));
    // Thawed, a line of output, and the answer.
    assert_eq!(pool.stats().stale_frames, 3);
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_say_that_it_took_longer_than_it_ran() {
    let stage = Stage::new("well");
    let pool = stage.pool().await;
    let outcome = pool.invoke(Invocation {
        measure: Measure::On,
        ..invocation(b"{}")
    });
    let outcome = outcome.await.unwrap();
    // It says 2^64 - 1 nanoseconds.
    assert_eq!(outcome.timings.unwrap().identity, Some(outcome.duration));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_and_an_impatient_caller_leaves_it() {
    let stage = Stage::new("hangs-in-run");
    let spec = PoolSpec {
        concurrency_max: 1,
        queue_max: 1,
        queue_wait_max: Duration::from_millis(300),
        ..stage.spec()
    };
    let pool = stage.runtime.open_pool(spec).await.unwrap();
    let call = |pool: &thaw_runtime::Pool| {
        let pool = pool.clone();
        tokio::spawn(async move { invoke(&pool).await })
    };
    let running = call(&pool);
    while pool.stats().running == 0 {
        tokio::task::yield_now().await;
    }
    let waiting = call(&pool);
    while pool.stats().waiting == 0 {
        tokio::task::yield_now().await;
    }
    let refused = |result, expected| match result {
        Err(InvokeError::Throttled {
            reason, running, ..
        }) => {
            assert_eq!((reason, running), (expected, 1));
        }
        other => panic!("{other:?}"),
    };
    refused(invoke(&pool).await, ThrottleReason::QueueFull);
    refused(waiting.await.unwrap(), ThrottleReason::WaitedTooLong);
    assert_eq!((pool.stats().throttled, pool.stats().waiting), (2, 0));

    // The caller goes away: its VM is destroyed, its place is free.
    running.abort();
    while pool.stats().running > 0 {
        tokio::task::yield_now().await;
    }
    let next = call(&pool);
    while pool.stats().running == 0 {
        tokio::task::yield_now().await;
    }
    next.abort();
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_ends_what_does_not_end_itself() {
    let stage = Stage::new("hangs-in-run");
    let pool = stage.pool().await;
    let running = {
        let pool = pool.clone();
        tokio::spawn(async move { invoke(&pool).await })
    };
    while pool.stats().running == 0 {
        tokio::task::yield_now().await;
    }
    stage.runtime.shutdown(Duration::from_millis(200)).await;
    assert!(matches!(running.await.unwrap(), Err(InvokeError::Closed)));
    assert!(monitors(stage.folder.path()).is_empty());
    let again = stage.runtime.open_pool(stage.spec()).await;
    assert!(matches!(
        again,
        Err(OpenPoolError::Host(HostError::ShutDown))
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_runtime_leaves_no_monitor() {
    let stage = Stage::new("well");
    let pool = stage.ready_pool().await;
    let Stage { folder, runtime } = stage;
    drop((pool, runtime));
    let began = Instant::now();
    while !monitors(folder.path()).is_empty() {
        assert!(began.elapsed() < AMPLE, "a monitor is left");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_snapshot_is_refused_before_any_vm_is_made() {
    let stage = Stage::new("well");
    let path = stage.path("snapshot.thaw");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = stage.runtime.open_pool(stage.spec()).await.unwrap_err();
    assert!(matches!(error, OpenPoolError::Snapshot { .. }), "{error:?}");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_was_not_made_here_is_refused_and_told_what_helps() {
    let stage = Stage::new("well");
    let path = stage.path("snapshot.thaw");
    let refused = async || {
        let error = stage.runtime.open_pool(stage.spec()).await.unwrap_err();
        let OpenPoolError::Snapshot { source, .. } = error else {
            panic!("{error:?}");
        };
        source.to_string()
    };
    let remedy = format!("thaw snapshot trust {}", path.display());
    let file = fs::OpenOptions::new().read(true).write(true).open(&path);
    let file = file.unwrap();
    let other = Key::new(&[8; Key::SECRET_BYTES]);
    tag(&file, &other).unwrap();
    let reason = refused().await;
    assert!(
        reason.contains("another machine") && reason.contains(&remedy),
        "{reason}"
    );
    file.write_all_at(&[0; 32], 4096 - 32).unwrap();
    let reason = refused().await;
    assert!(
        reason.contains("no authentication tag") && reason.contains(&remedy),
        "{reason}"
    );
    assert!(monitors(stage.folder.path()).is_empty());
    tag(&file, &key()).unwrap();
    assert!(is_answer(&invoke(&stage.pool().await).await, b"{}"));
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_another_size_than_it_tells_the_schedule_is_refused() {
    let stage = Stage::new("well");
    for (vcpu_count, memory_mib) in [(0, 128), (5, 128), (1, 64), (1, 0), (1, u32::MAX)] {
        fs::remove_file(stage.path("snapshot.thaw")).unwrap();
        stage::write_snapshot(&stage.path("snapshot.thaw"), vcpu_count, memory_mib);
        let error = stage.runtime.open_pool(stage.spec()).await.unwrap_err();
        assert!(matches!(error, OpenPoolError::Snapshot { .. }), "{error:?}");
    }
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_writes_its_file_and_tells_each_step() {
    let stage = Stage::new("well");
    let (result, steps) = stage.freeze().await;
    let frozen = result.unwrap();
    let snapshot = Snapshot::open(&frozen.snapshot).unwrap();
    snapshot.authenticate(&key()).unwrap();
    snapshot.verify().unwrap();
    assert_eq!(frozen.init_log, b"starting\n");
    let agent_version = "7".to_owned();
    assert_eq!(
        steps,
        [
            FreezeStep::Booting,
            FreezeStep::AgentUp { agent_version },
            FreezeStep::RuntimeStarting,
            FreezeStep::Ready,
            FreezeStep::Saving,
            FreezeStep::Saved {
                file_bytes: 6,
                stored_bytes: 6
            },
        ]
    );
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_freeze_says_why_and_leaves_no_file() {
    type Check = fn(&FreezeError) -> bool;
    let cases: [(&str, Check); 5] = [
        ("fails-in-init", |error| {
            matches!(error, FreezeError::Init(init)
                if init.error_type == "Runtime.ImportModuleError" && init.log == b"starting\n")
        }),
        ("no-space", |error| {
            matches!(error, FreezeError::DiskFull { .. })
        }),
        ("never-says-hello", |error| {
            matches!(error, FreezeError::TimedOut { waiting_for: "the guest's boot", console, .. }
                if console == "console of the guest")
        }),
        (
            "never-ready",
            |error| matches!(error, FreezeError::TimedOut { log, .. } if log == b"starting\n"),
        ),
        ("panics-in-boot", |error| {
            matches!(error, FreezeError::Host(HostError::Refused { source, .. })
                if source.message.contains("died 3 times") && source.message.contains("Kernel panic"))
        }),
    ];
    for (script, is_expected) in cases {
        let stage = Stage::new(script);
        let error = stage.freeze().await.0.unwrap_err();
        assert!(is_expected(&error), "{script}: {error:?}");
        assert!(!stage.path("out.thaw").exists());
        stage.strike().await;
    }
}
