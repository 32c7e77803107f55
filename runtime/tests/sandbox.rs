//! Freeze, pool and invocations with the real monitor, agent and images, in real guests. Needs KVM.
//!
//! Paths come from the environment: `THAW_TEST_VMM`, `THAW_TEST_KERNEL`, `THAW_TEST_INITRAMFS`, `THAW_TEST_ROOTFS` (the
//! image `python3.11`), `THAW_TEST_OVERLAY`, and `THAW_TEST_CODE`: a code image of tests/sandbox/handler.py.
//! `THAW_TEST_SNAPSHOT`, if set, is where the snapshot goes, and is taken from there when it exists already.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "sandbox/faults.rs"]
mod faults;
#[path = "sandbox/jail.rs"]
mod jail;

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use thaw_runtime::{
    BaseRequest, Configure, End, FreezeError, FreezeRequest, FreezeStep, Invocation,
    InvocationTimings, InvokeError, Jailer, Learn, Measure, Outcome, Owner, Pool, PoolSpec, Reach,
    Runtime, RuntimeConfig, RuntimeExitCause, Start,
};
use thaw_snapshot::{Key, Metadata, Snapshot, set_working_set, tag};
use thaw_snapshot_store::{LocalFolder, Store};
use tokio::sync::{Mutex, MutexGuard, OnceCell};

/// A limit that nothing should come near, even emulated.
const AMPLE: Duration = Duration::from_secs(120);

/// One test at a time: they count this process' monitors, and an emulated machine is slow enough.
async fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

fn setting(name: &str) -> PathBuf {
    let value = std::env::var_os(name);
    PathBuf::from(value.unwrap_or_else(|| panic!("{name} is not set")))
}

fn key() -> Key {
    Key::new(&[7; Key::SECRET_BYTES])
}

fn runtime() -> Runtime {
    let config = RuntimeConfig {
        vmm: setting("THAW_TEST_VMM"),
        jailer: Some(jailer().0.clone()),
        restore_limit: AMPLE,
        reply_limit: AMPLE,
        ..RuntimeConfig::default()
    };
    Runtime::new(config, key()).unwrap()
}

/// One for all runtimes, and how far it reaches.
fn jailer() -> &'static (Jailer, Reach) {
    static JAILER: OnceLock<(Jailer, Reach)> = OnceLock::new();
    JAILER.get_or_init(|| {
        let folder = std::env::temp_dir();
        Jailer::survey(&setting("THAW_TEST_VMM"), Owner::Command(&folder)).unwrap()
    })
}

fn request(handler: &str, output: PathBuf) -> FreezeRequest {
    let environment = [
        ("_HANDLER", handler),
        ("LAMBDA_TASK_ROOT", "/var/task"),
        ("LAMBDA_RUNTIME_DIR", "/var/runtime"),
        ("AWS_LAMBDA_FUNCTION_NAME", "test"),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "256"),
        ("AWS_REGION", "us-east-1"),
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("LANG", "C.UTF-8"),
        ("TZ", ":UTC"),
    ];
    let environment: BTreeMap<String, String> = environment
        .iter()
        .map(|(name, value)| ((*name).into(), (*value).into()))
        .collect();
    FreezeRequest {
        kernel: setting("THAW_TEST_KERNEL"),
        initramfs: setting("THAW_TEST_INITRAMFS"),
        rootfs: setting("THAW_TEST_ROOTFS"),
        code: setting("THAW_TEST_CODE"),
        overlay: setting("THAW_TEST_OVERLAY"),
        vcpu_count: 1,
        memory_mib: 256,
        configure: Configure {
            bootstrap: vec!["/var/runtime/bootstrap".into()],
            environment,
            init_limit_ms: 100_000,
            hostname: "thaw".into(),
            account_id: None,
            network: false,
            authority: None,
        },
        network: None,
        metadata: Metadata::default(),
        output,
        base: None,
        boot_limit: AMPLE,
    }
}

fn scratch(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// The snapshot that all tests share, taken by the first.
async fn snapshot() -> PathBuf {
    static SNAPSHOT: OnceCell<PathBuf> = OnceCell::const_new();
    let take = async || {
        let given = std::env::var_os("THAW_TEST_SNAPSHOT").map(PathBuf::from);
        if let Some(path) = given.as_ref().filter(|path| path.exists()) {
            return path.clone();
        }
        let output = given.unwrap_or_else(|| scratch("sandbox.thaw"));
        let runtime = runtime();
        let began = Instant::now();
        let mut steps = Vec::new();
        let mut note = |step| {
            eprintln!("{:>8.1?} {step:?}", began.elapsed());
            steps.push(step);
        };
        let frozen = runtime
            .freeze(request("handler.handler", output), &mut note)
            .await
            .unwrap_or_else(|error| panic!("{error:?}"));
        eprintln!(
            "{:?}, init log {:?}",
            frozen.timings,
            String::from_utf8_lossy(&frozen.init_log)
        );
        assert!(matches!(
            steps[..],
            [
                FreezeStep::Booting,
                FreezeStep::AgentUp { .. },
                FreezeStep::RuntimeStarting,
                FreezeStep::Ready,
                FreezeStep::Saving,
                FreezeStep::Saved { .. },
            ]
        ));
        assert!(frozen.stored_bytes <= frozen.file_bytes);
        runtime.shutdown(AMPLE).await;
        frozen.snapshot
    };
    SNAPSHOT.get_or_init(take).await.clone()
}

/// A pool and its runtime; `ready_count` VMs are kept.
async fn pool(ready_count: usize) -> (Runtime, Pool) {
    let snapshot = snapshot().await;
    let runtime = runtime();
    let spec = PoolSpec {
        name: "test".into(),
        snapshot,
        base: None,
        rootfs: setting("THAW_TEST_ROOTFS"),
        code: setting("THAW_TEST_CODE"),
        ready_count,
        concurrency_max: 4,
        queue_max: 64,
        queue_wait_max: AMPLE,
        network: None,
        learn: Learn::Nothing,
    };
    let pool = runtime.open_pool(spec).await.unwrap();
    (runtime, pool)
}

fn invocation(event: &Value) -> Invocation {
    Invocation {
        request_id: "8476a536-e9f4-11e8-9739-2dfe598c3fcd".into(),
        function_arn: "arn:aws:lambda:us-east-1:000000000000:function:test".into(),
        payload: Bytes::from(event.to_string()),
        timeout: AMPLE,
        client_context: None,
        cognito_identity: None,
        trace_id: None,
        measure: Measure::On,
    }
}

async fn invoke(pool: &Pool, event: Value) -> Outcome {
    let outcome = pool.invoke(invocation(&event)).await;
    outcome.unwrap_or_else(|error| panic!("{event}: {error:?}"))
}

async fn answer(pool: &Pool, event: Value) -> Value {
    let outcome = invoke(pool, event).await;
    match &outcome.end {
        End::Response { payload, .. } => serde_json::from_slice(payload).unwrap(),
        other => panic!("{other:?}, log {:?}", String::from_utf8_lossy(&outcome.log)),
    }
}

async fn greets(pool: &Pool) {
    let greeting = answer(pool, json!({"do": "greet", "name": "you"})).await;
    assert_eq!(
        (&greeting["hello"], &greeting["calls"]),
        (&json!("you"), &json!(1))
    );
}

/// Children of this process that run the monitor.
fn monitors() -> Vec<Pid> {
    let ours = format!(" {} ", std::process::id());
    let processes = std::fs::read_dir("/proc").unwrap();
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit(')').next().unwrap_or_default();
        stat.contains("(thaw-vmm)") && rest.get(2..).is_some_and(|rest| rest.starts_with(&ours))
    })
    .filter_map(Pid::from_raw)
    .collect()
}

async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < AMPLE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_answers_and_its_time_is_accounted_for() {
    let _turn = alone().await;
    let (runtime, pool) = pool(1).await;
    eventually("a VM is ready", || pool.stats().ready == 1).await;
    for _ in 0..3 {
        let outcome = invoke(&pool, json!({"do": "greet", "name": "you"})).await;
        assert!(matches!(&outcome.end, End::Response { .. }), "{outcome:?}");
        assert_eq!(outcome.log, b"doing greet\n");
        let timings = outcome.timings.unwrap();
        eprintln!("{:?} {timings:?}", outcome.duration);
        let InvocationTimings {
            queued,
            claim_to_first_instruction,
            total,
            restore,
            ..
        } = timings;
        let parts = queued
            + claim_to_first_instruction
            + timings.first_instruction_to_agent_byte
            + timings.agent_byte_to_response;
        assert_eq!(parts, total);
        assert!(restore > Duration::ZERO);
        let identity = timings.identity.unwrap();
        assert!(identity > Duration::ZERO && identity < outcome.duration);
    }
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_of_megabytes_comes_back_whole() {
    let _turn = alone().await;
    let (runtime, pool) = pool(1).await;
    let event = json!({"do": "echo", "bulk": "x".repeat(5 * 1024 * 1024)});
    assert_eq!(answer(&pool, event.clone()).await, event);
    runtime.shutdown(AMPLE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_invocation_sees_a_pristine_and_unique_vm() {
    let _turn = alone().await;
    let (runtime, pool) = pool(2).await;
    for _ in 0..2 {
        greets(&pool).await;
        assert_eq!(answer(&pool, json!({"do": "write"})).await, json!(["mark"]));
    }
    let mut seen = HashSet::new();
    for _ in 0..3 {
        let identity = answer(&pool, json!({"do": "identify"})).await;
        for part in ["host", "uuid", "urandom"] {
            let value = identity[part].as_str().unwrap().to_owned();
            assert!(seen.insert(value), "{part} came twice: {identity}");
        }
        let here = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs_f64();
        let there = identity["time"].as_f64().unwrap();
        assert!(
            (here - there).abs() < 5.0,
            "the guest's clock is off: {here} {there}"
        );
        assert!(identity["remaining_ms"].as_u64().unwrap() <= 120_000);
    }
    runtime.shutdown(AMPLE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewound_vm_is_pristine_and_unique() {
    let _turn = alone().await;
    let (runtime, pool) = pool(0).await;
    let mut seen = HashSet::new();
    for round in 0..6 {
        assert_eq!(answer(&pool, json!({"do": "write"})).await, json!(["mark"]));
        let outcome = invoke(&pool, json!({"do": "identify"})).await;
        eprintln!(
            "{:?} {:?} {:?}",
            outcome.start,
            outcome.duration,
            pool.stats()
        );
        assert_eq!(outcome.start, Start::Rewound, "round {round}");
        let End::Response { payload, .. } = &outcome.end else {
            panic!("{outcome:?}");
        };
        let identity: Value = serde_json::from_slice(payload).unwrap();
        for part in ["host", "uuid", "urandom"] {
            let value = identity[part].as_str().unwrap().to_owned();
            assert!(seen.insert(value), "{part} came twice: {identity}");
        }
        greets(&pool).await;
    }
    let stats = pool.stats();
    assert_eq!((stats.rewound, stats.rewind_failures), (17, 0), "{stats:?}");
    eventually("it was one VM all along", || {
        monitors().len() == 1 + runtime.stats().shells
    })
    .await;
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_claims_a_shell_that_was_made_ahead() {
    let _turn = alone().await;
    let (runtime, pool) = pool(0).await;
    eventually("a shell is made", || runtime.stats().shells > 0).await;
    let outcome = invoke(&pool, json!({"do": "greet", "name": "you"})).await;
    assert_eq!(outcome.start, Start::Claimed);
    eprintln!("{:?}", outcome.timings);
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_lazily_served_from_a_store_after_it_was_recorded_answers() {
    let _turn = alone().await;
    let path = scratch("recorded.thaw");
    std::fs::copy(snapshot().await, &path).unwrap();
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    let runtime = runtime();
    let spec = |snapshot: &Path, base: Option<&Path>| PoolSpec {
        name: "stored".into(),
        snapshot: snapshot.to_owned(),
        base: base.map(Path::to_owned),
        rootfs: setting("THAW_TEST_ROOTFS"),
        code: setting("THAW_TEST_CODE"),
        ready_count: 0,
        concurrency_max: 4,
        queue_max: 64,
        queue_wait_max: AMPLE,
        network: None,
        learn: Learn::Nothing,
    };
    let pool = runtime.open_pool(spec(&path, None)).await.unwrap();
    let event = invocation(&json!({"do": "greet", "name": "you"}));
    let (outcome, set) = pool.record(&event).await.unwrap();
    assert!(matches!(&outcome.end, End::Response { .. }), "{outcome:?}");
    eprintln!(
        "answered after {:?}: {} pages, {} written, {} runs",
        outcome.duration,
        set.pages(),
        set.written_pages(),
        set.runs().len()
    );
    assert!(set.pages() > set.written_pages() && set.written_pages() > 10);
    pool.close().await;
    set_working_set(&path, &set, Some(&key())).unwrap();

    let stub = folder.path().join("stub.thaw");
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let file = options.open(&stub).unwrap();
    let written = file.try_clone().unwrap();
    let store = Store::new(Arc::new(LocalFolder::new(folder.path())));
    let pushed = store.push(&Snapshot::open(&path).unwrap(), file).unwrap();
    tag(&written, &key()).unwrap();
    eprintln!("{pushed:?}");
    let spec = spec(&stub, Some(folder.path()));
    let pool = runtime.open_pool(spec).await.unwrap();
    for _ in 0..3 {
        greets(&pool).await;
        assert_eq!(answer(&pool, json!({"do": "write"})).await, json!(["mark"]));
    }
    eprintln!("{:?}", pool.stats());

    // What was rewound needs its pages again, and those that are gone end it, by name.
    std::fs::remove_dir_all(folder.path().join("chunks")).unwrap();
    let event = json!({"do": "greet", "name": "you"});
    let outcome = pool.invoke(invocation(&event)).await;
    let told = format!("{outcome:?}");
    assert!(told.contains("is not in the store"), "{told}");
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_learns_its_working_set_from_its_first_request_and_no_more() {
    let _turn = alone().await;
    let path = scratch("learned.thaw");
    std::fs::copy(snapshot().await, &path).unwrap();
    let frozen = Snapshot::open(&path).unwrap();
    let runtime = runtime();
    let open = async || {
        let spec = PoolSpec {
            name: "learned".into(),
            snapshot: path.clone(),
            base: None,
            rootfs: setting("THAW_TEST_ROOTFS"),
            code: setting("THAW_TEST_CODE"),
            ready_count: 1,
            concurrency_max: 4,
            queue_max: 64,
            queue_wait_max: AMPLE,
            network: None,
            learn: Learn::WorkingSet,
        };
        let pool = runtime.open_pool(spec).await.unwrap();
        eventually("a VM is ready", || pool.stats().ready == 1).await;
        pool
    };
    let pool = open().await;
    // What fails teaches nothing, and its successor learns.
    let raised = invoke(&pool, json!({"do": "raise"})).await;
    assert!(
        matches!(raised.end, End::FunctionError { .. }),
        "{raised:?}"
    );
    let learned = || Snapshot::open(&path).unwrap().working_set().unwrap();
    assert!(learned().is_none());
    let began = Instant::now();
    while learned().is_none() {
        let one = Instant::now();
        greets(&pool).await;
        eprintln!("answered after {:?}", one.elapsed());
        assert!(
            began.elapsed() < AMPLE,
            "nothing is learned: {:?}",
            pool.stats()
        );
    }
    let (set, after) = (learned().unwrap(), Snapshot::open(&path).unwrap());
    eprintln!("{} pages, {} written", set.pages(), set.written_pages());
    assert!(set.pages() > set.written_pages() && set.written_pages() > 10);
    after.verify().unwrap();
    assert_eq!(after.content_digest(), frozen.content_digest());
    // Sandboxes of the old file and of the new one.
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let pool = pool.clone();
        calls.spawn(async move { greets(&pool).await });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    assert_eq!(answer(&pool, json!({"do": "write"})).await, json!(["mark"]));
    assert_eq!(pool.stats().restore_failures, 0);
    pool.close().await;

    let pool = open().await;
    greets(&pool).await;
    eventually("the first VM is rewound: it was not to learn", || {
        pool.stats().ready == 2
    })
    .await;
    assert_eq!(
        invoke(&pool, json!({"do": "greet", "name": "you"}))
            .await
            .start,
        Start::Rewound
    );
    assert_eq!(Snapshot::open(&path).unwrap().digest(), after.digest());
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_callers_at_once_are_all_answered() {
    let _turn = alone().await;
    let (runtime, pool) = pool(2).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let pool = pool.clone();
        calls.spawn(async move { greets(&pool).await });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    assert_eq!(pool.stats().invocations, 20);
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_function_does_wrong_harms_no_other_invocation() {
    let _turn = alone().await;
    let (runtime, pool) = pool(1).await;
    let raised = invoke(&pool, json!({"do": "raise"})).await;
    let End::FunctionError { document, .. } = &raised.end else {
        panic!("{raised:?}");
    };
    let document: Value = serde_json::from_slice(document).unwrap();
    assert_eq!(document["errorType"], "ValueError");
    assert_eq!(document["errorMessage"], "as asked");
    greets(&pool).await;

    let exited = invoke(&pool, json!({"do": "exit"})).await;
    let End::RuntimeExit(exit) = &exited.end else {
        panic!("{exited:?}");
    };
    assert_eq!(exit.cause, RuntimeExitCause::Code(3));
    assert_eq!(exited.log, b"doing exit\n");
    greets(&pool).await;

    let mut sleep = invocation(&json!({"do": "sleep"}));
    sleep.timeout = Duration::from_secs(2);
    let outcome = pool.invoke(sleep).await.unwrap();
    assert_eq!(outcome.end, End::TimedOut);
    assert!(outcome.duration >= Duration::from_secs(2));
    greets(&pool).await;

    let eaten = invoke(&pool, json!({"do": "eat"})).await;
    match &eaten.end {
        End::RuntimeExit(exit) => assert!(exit.out_of_memory, "{exit:?}"),
        other => panic!("{other:?}"),
    }
    greets(&pool).await;
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_takes_its_vm_along() {
    let _turn = alone().await;
    let (runtime, pool) = pool(0).await;
    let call = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.invoke(invocation(&json!({"do": "sleep"}))).await })
    };
    eventually("it runs", || pool.stats().running == 1).await;
    call.abort();
    eventually("its VM is gone", || pool.stats().running == 0).await;
    greets(&pool).await;
    runtime.shutdown(AMPLE).await;
    assert!(monitors().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_monitor_costs_its_invocation_alone() {
    let _turn = alone().await;
    let (runtime, pool) = pool(0).await;
    let call = {
        let pool = pool.clone();
        tokio::spawn(async move { pool.invoke(invocation(&json!({"do": "sleep"}))).await })
    };
    eventually("it runs", || pool.stats().running == 1).await;
    // A monitor that dies before its guest has run costs nothing: the request is tried again. So, until one has run.
    while !call.is_finished() {
        for monitor in monitors() {
            let _ = kill_process(monitor, Signal::KILL);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let result = call.await.unwrap();
    assert!(matches!(result, Err(InvokeError::Host(_))), "{result:?}");
    greets(&pool).await;
    runtime.shutdown(AMPLE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_does_not_exist_fails_the_freeze_with_its_reason() {
    let _turn = alone().await;
    let runtime = runtime();
    let output = scratch("never.thaw");
    let request = request("absent.handler", output.clone());
    let error = runtime.freeze(request, &mut |_| {}).await.unwrap_err();
    match &error {
        FreezeError::Init(failure) => {
            let document: Value = serde_json::from_slice(&failure.document).unwrap();
            assert_eq!(document["errorType"], "Runtime.ImportModuleError");
        }
        other => panic!("{other:?}"),
    }
    assert!(!output.exists());
    runtime.shutdown(AMPLE).await;
}

/// The pages that two snapshots of one runtime have in common are stored once, and the kernel boots once; a base that is no good is
/// made again. Base and functions have a network, which each function finds set up.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_function_over_a_base_takes_less_than_half_of_the_time_and_disk() {
    let _alone = alone().await;
    let folder = scratch("over-a-base");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let base = folder.join("base.thaw");
    std::fs::write(&base, b"no snapshot").unwrap();
    let runtime = runtime();
    let mut took = Vec::new();
    for name in ["first", "second"] {
        let mut request = request("handler.handler", folder.join(name));
        request.configure.network = true;
        request.base = Some(BaseRequest {
            file: base.clone(),
            code: setting("THAW_TEST_NO_CODE"),
        });
        let began = Instant::now();
        let frozen = runtime.freeze(request, &mut |_| {}).await;
        let frozen = frozen.unwrap_or_else(|error| panic!("{error:?}"));
        took.push(began.elapsed());
        let mut snapshot = Snapshot::open(&frozen.snapshot).unwrap();
        snapshot
            .attach_base(Snapshot::open(&base).unwrap())
            .unwrap();
        snapshot.verify().unwrap();
        let own = snapshot.own_memory().unwrap();
        let below = Snapshot::open(&base).unwrap().memory().unwrap();
        eprintln!(
            "{name}: {:?} ({:?}), {} KiB in {} runs over {} KiB of the base",
            took[took.len() - 1],
            frozen.timings,
            own.stored_bytes() >> 10,
            own.runs.len(),
            below.stored_bytes() >> 10
        );
        // Had it been frozen alone, it would have stored the base's pages too.
        assert!(own.stored_bytes() < (own.stored_bytes() + below.stored_bytes()) / 2);
    }
    assert!(took[1] < took[0] / 2, "{took:?}");
    let spec = PoolSpec {
        name: "network".into(),
        snapshot: folder.join("second"),
        base: Some(base),
        rootfs: setting("THAW_TEST_ROOTFS"),
        code: setting("THAW_TEST_CODE"),
        ready_count: 0,
        concurrency_max: 1,
        queue_max: 1,
        queue_wait_max: AMPLE,
        network: None,
        learn: Learn::Nothing,
    };
    let pool = runtime.open_pool(spec).await.unwrap();
    let mut found = answer(&pool, json!({"do": "network"})).await;
    let neighbours = found["neighbours"].take();
    let neighbour: Vec<&str> = neighbours[0].as_str().unwrap().split_whitespace().collect();
    // Known for good (ATF_PERM and ATF_COM), so that nobody has to be asked.
    assert_eq!(
        (neighbour[0], neighbour[2], neighbour[3], neighbour[5]),
        ("172.31.255.1", "0x6", "06:54:48:41:57:01", "eth0")
    );
    assert_eq!(
        found,
        json!({
            "interfaces": ["eth0", "lo"],
            "mac": "06:54:48:41:57:02",
            "mtu": "1500",
            "neighbours": null,
            "ipv6": ["lo"],
            "resolver": "nameserver 172.31.255.1\n",
            "source": {"172.31.255.1": "172.31.255.2", "192.0.2.1": "172.31.255.2"},
        })
    );
    runtime.shutdown(AMPLE).await;
}
