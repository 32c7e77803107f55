//! What befalls a real monitor from outside, and what is said of it.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use thaw_runtime::{FreezeError, FreezeStep, InvokeError, Learn, Pool, PoolSpec};

use super::{
    AMPLE, alone, eventually, greets, invocation, monitors, pool, request, runtime, scratch,
    setting, snapshot,
};

/// The one sandbox of a pool without spares sleeps while `strike` does something to its monitor; what its caller is told.
async fn told_of(pool: &Pool, strike: impl Fn(Pid)) -> String {
    let call = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.invoke(invocation(&json!({"do": "sleep"}))).await })
    };
    // One that dies before its guest has run costs nothing: the request is tried again. So, until one has run.
    while !call.is_finished() {
        monitors().into_iter().for_each(&strike);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    match call.await.unwrap() {
        Err(error @ InvokeError::Host(_)) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            text
        }
        other => panic!("{other:?}"),
    }
}

fn cgroup(pid: Pid) -> Option<PathBuf> {
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero())).ok()?;
    let path = cgroup.trim().rsplit(':').next()?;
    path.contains("/vm-")
        .then(|| PathBuf::from(format!("/sys/fs/cgroup{path}")))
}

/// A guest cannot write more than its memory, its disk and what the monitor is allowed beside: the limit is lowered to be met.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_meets_its_limit_of_memory_is_told_with_the_remedy() {
    let _turn = alone().await;
    let (runtime, pool) = pool(0).await;
    let said = told_of(&pool, |pid| {
        if let Some(folder) = cgroup(pid) {
            // It may be gone this moment.
            let _ = fs::write(folder.join("memory.max"), "4096");
        }
    })
    .await;
    assert!(said.contains("has used all of the memory"), "{said}");
    assert!(said.contains("give the function more memory"), "{said}");
    greets(&pool).await;
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

/// The signal of a forbidden call, without the call: no monitor makes one. It comes from outside, so that the number is 0.
#[tokio::test(flavor = "multi_thread")]
async fn a_forbidden_call_of_a_monitor_is_told_to_the_caller() {
    let _turn = alone().await;
    let (runtime, pool) = pool(0).await;
    let said = told_of(&pool, |pid| {
        let _ = kill_process(pid, Signal::SYS);
    })
    .await;
    assert!(
        said.contains("system call 0 is forbidden to thread"),
        "{said}"
    );
    greets(&pool).await;
    runtime.shutdown(AMPLE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_cut_off_under_its_monitors_harms_its_own_function_alone() {
    let _turn = alone().await;
    let (runtime, other) = pool(0).await;
    let path = scratch("cut-off.thaw");
    fs::copy(snapshot().await, &path).unwrap();
    let spec = PoolSpec {
        name: "cut-off".into(),
        snapshot: path.clone(),
        base: None,
        rootfs: setting("THAW_TEST_ROOTFS"),
        code: setting("THAW_TEST_CODE"),
        ready_count: 1,
        concurrency_max: 1,
        queue_max: 1,
        queue_wait_max: AMPLE,
        network: None,
        learn: Learn::Nothing,
    };
    let harmed = runtime.open_pool(spec).await.unwrap();
    eventually("a VM is ready", || harmed.stats().ready == 1).await;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(8192).unwrap();
    let result = harmed
        .invoke(invocation(&json!({"do": "greet", "name": "you"})))
        .await;
    match result {
        Err(InvokeError::Host(error)) => {
            let said = error.to_string();
            assert!(
                said.contains("cut off or cannot be read (SIGBUS)"),
                "{said}"
            );
        }
        other => panic!("{other:?}"),
    }
    greets(&other).await;
    harmed.close().await;
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
    fs::remove_file(path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_is_killed_while_freezing_is_told_and_leaves_no_file() {
    let _turn = alone().await;
    let runtime = runtime();
    let output = scratch("killed.thaw");
    let mut strike = |step| {
        if step == FreezeStep::Ready {
            for monitor in monitors() {
                kill_process(monitor, Signal::KILL).unwrap();
            }
        }
    };
    let frozen = runtime
        .freeze(request("handler.handler", output.clone()), &mut strike)
        .await;
    match frozen {
        Err(FreezeError::Host(error)) => {
            assert_eq!(error.to_string(), "monitor died: it was killed by signal 9");
        }
        other => panic!("{other:?}"),
    }
    eventually("it is gone", || monitors().is_empty()).await;
    let name = output.file_name().unwrap().to_string_lossy().into_owned();
    let beside = fs::read_dir(output.parent().unwrap()).unwrap();
    let left = beside.filter(|entry| {
        let found = entry.as_ref().unwrap().file_name();
        found.to_string_lossy().contains(&name)
    });
    assert_eq!(left.count(), 0);
    runtime.shutdown(AMPLE).await;
}
