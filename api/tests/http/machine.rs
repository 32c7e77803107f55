//! The machine below the gateway, played: freezes and answers at once, and fails as the test asks. The uploaded file names
//! choose how a freeze ends, the event chooses how an invocation ends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use thaw_api::engine::{Artifact, Engine, EngineError, EngineStep, FreezeJob, Sandboxes};
use thaw_runtime::{
    End, ExitReason, Failure, Fault, FreezeError, HostError, InitFailure, Invocation,
    InvocationTimings, InvokeError, Measure, OpenPoolError, Outcome, PoolSpec, PoolStats,
    RuntimeExit, RuntimeExitCause, RuntimeStats, Start, StreamPart, ThrottleReason,
};
use thaw_snapshot::AuthenticityError;
use tokio::sync::{mpsc, watch};

pub struct Machine {
    images_held: watch::Sender<bool>,
    held: watch::Sender<bool>,
    answers: watch::Sender<Answers>,
    invoked: Arc<Mutex<Vec<Invocation>>>,
    freezes: AtomicUsize,
    ready: Ready,
    layers: Mutex<Vec<Vec<u8>>>,
}

/// Sandboxes that are ready, by the name of their pool.
type Ready = Arc<Mutex<BTreeMap<String, usize>>>;

/// Invocations with the event "hold".
#[derive(Clone, Copy, Default)]
struct Answers {
    are_held: bool,
    waiting: usize,
    abandoned: usize,
}

impl Machine {
    pub fn new() -> Self {
        Self {
            images_held: watch::Sender::new(false),
            held: watch::Sender::new(false),
            answers: watch::Sender::default(),
            invoked: Arc::default(),
            freezes: AtomicUsize::new(0),
            ready: Ready::default(),
            layers: Mutex::default(),
        }
    }

    /// Freezes begun so far.
    pub fn freezes(&self) -> usize {
        self.freezes.load(Ordering::SeqCst)
    }

    /// The only file of each layer of the newest freeze.
    pub fn layers(&self) -> Vec<Vec<u8>> {
        self.layers.lock().unwrap().clone()
    }

    /// Images are not there until they are released.
    pub fn hold_images(&self) {
        self.images_held.send_replace(true);
    }

    pub fn release_images(&self) {
        self.images_held.send_replace(false);
    }

    /// Freezes stop half-way from now on.
    pub fn hold_freezes(&self) {
        self.held.send_replace(true);
    }

    pub fn release_freezes(&self) {
        self.held.send_replace(false);
    }

    /// Whether invocations with the event "hold" wait.
    pub fn hold_answers(&self, are_held: bool) {
        self.answers
            .send_modify(|answers| answers.are_held = are_held);
    }

    /// Events of all invocations so far, JSON, of this function or one of its versions.
    pub fn events_of(&self, function: &str) -> Vec<serde_json::Value> {
        let invoked = self.invoked.lock().unwrap();
        let of =
            |invocation: &&Invocation| invocation.function_arn.split(':').nth(6) == Some(function);
        invoked
            .iter()
            .filter(of)
            .map(|invocation| serde_json::from_slice(&invocation.payload).unwrap_or_default())
            .collect()
    }

    /// As what functions were called so far.
    pub fn arns(&self) -> Vec<String> {
        let invoked = self.invoked.lock().unwrap();
        invoked.iter().map(|one| one.function_arn.clone()).collect()
    }

    /// Sandboxes that a pool was told to keep ready, `f` or `f:1`: they are at once.
    pub fn ready(&self, pool: &str) -> usize {
        self.ready
            .lock()
            .unwrap()
            .get(pool)
            .copied()
            .unwrap_or_default()
    }

    /// Streams whose readers went away.
    pub fn abandoned(&self) -> usize {
        self.answers.borrow().abandoned
    }

    /// Invocations that wait because they are held.
    pub fn held_answers(&self) -> usize {
        self.answers.borrow().waiting
    }
}

fn only_file(zip: &std::path::Path) -> Vec<u8> {
    let file = std::fs::File::open(zip).expect("a layer is there before the freeze");
    let mut bytes = Vec::new();
    let mut archive = zip::ZipArchive::new(file).unwrap();
    // The large ones are not looked into.
    let start = archive.by_index(0).unwrap();
    std::io::Read::read_to_end(&mut std::io::Read::take(start, 64), &mut bytes).unwrap();
    bytes
}

impl Engine for Machine {
    fn prepare(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        async {
            let _ = self.images_held.subscribe().wait_for(|held| !held).await;
            Ok(())
        }
        .boxed()
    }

    fn freeze<'a>(
        &'a self,
        job: FreezeJob,
        step: &'a mut (dyn FnMut(EngineStep) + Send),
    ) -> BoxFuture<'a, Result<Artifact, EngineError>> {
        async move {
            self.freezes.fetch_add(1, Ordering::SeqCst);
            step(EngineStep::Images);
            let _ = self.held.subscribe().wait_for(|held| !held).await;
            step(EngineStep::Booting);
            let zip = std::fs::read(&job.zip).expect("the zip is written before the freeze");
            *self.layers.lock().unwrap() = job.layers.iter().map(|path| only_file(path)).collect();
            let has = |name: &str| zip.windows(name.len()).any(|bytes| bytes == name.as_bytes());
            let snapshot = job.folder.join("snapshot.thaw");
            if has("broken-import.py") {
                return Err(EngineError::Freeze(FreezeError::Init(InitFailure {
                    error_type: "Runtime.ImportModuleError".to_owned(),
                    document: br#"{"errorMessage":"no module","errorType":"Runtime.ImportModuleError","stackTrace":[]}"#.to_vec(),
                    log: b"Traceback (most recent call last):\n".to_vec(),
                })));
            }
            if has("disk-full") {
                return Err(EngineError::Freeze(FreezeError::DiskFull { path: snapshot }));
            }
            let foreign =
                has("foreign-for-ever") || has("foreign-at-first") && !snapshot.exists();
            let content = if foreign { FOREIGN } else { OWN };
            std::fs::write(&snapshot, content).expect("the revision's folder is there");
            Ok(Artifact {
                code: job.zip,
                rootfs: snapshot.clone(),
                snapshot,
                base: None,
                digest: String::new(),
                file_bytes: 6,
                stored_bytes: 6,
                rootfs_digest: String::new(),
                init_log: String::new(),
                init_ms: 1,
            })
        }
        .boxed()
    }

    fn usable<'a>(&'a self, artifact: &'a Artifact, _runtime: &'a str) -> BoxFuture<'a, bool> {
        async { artifact.snapshot.is_file() }.boxed()
    }

    fn open_pool(
        &self,
        spec: PoolSpec,
    ) -> BoxFuture<'_, Result<Arc<dyn Sandboxes>, OpenPoolError>> {
        async move {
            let snapshot = std::fs::read(&spec.snapshot).expect("a snapshot that was frozen");
            if ![OWN.as_bytes(), FOREIGN.as_bytes()].contains(&&snapshot[..]) {
                let name = spec.snapshot.display().to_string();
                return Err(OpenPoolError::Snapshot {
                    path: spec.snapshot,
                    source: AuthenticityError::Foreign { name }.into(),
                });
            }
            let mut ready = self.ready.lock().unwrap();
            ready.insert(spec.name.clone(), spec.ready_count);
            drop(ready);
            let pool: Arc<dyn Sandboxes> = match snapshot == FOREIGN.as_bytes() {
                true => Arc::new(Refusing),
                false => Arc::new(Echo {
                    answers: self.answers.clone(),
                    invoked: Arc::clone(&self.invoked),
                    name: spec.name,
                    ready: Arc::clone(&self.ready),
                }),
            };
            Ok(pool)
        }
        .boxed()
    }

    fn stats(&self) -> RuntimeStats {
        RuntimeStats {
            shells: 1,
            memory_mib: 144,
            memory_budget_mib: Some(1024),
            ..RuntimeStats::default()
        }
    }

    fn shutdown(&self, _deadline: Duration) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
}

/// No more sandboxes of a version than these fit into this machine.
pub const READY_MAX: usize = 12;
/// Content of a snapshot that this machine took.
const OWN: &str = "frozen";
/// Content of a snapshot that another processor took.
const FOREIGN: &str = "foreign";

/// Of such a snapshot.
struct Refusing;

impl Sandboxes for Refusing {
    fn keep_ready(&self, _count: usize) {}

    fn invoke(&self, _invocation: Invocation) -> BoxFuture<'_, Result<Outcome, InvokeError>> {
        let source = Failure {
            message: "this host's cpu lacks what the snapshot was taken with".to_owned(),
            fault: Fault::Caller,
        };
        let request = "restore";
        let refused = InvokeError::Host(Arc::new(HostError::Refused { request, source }));
        async { Err(refused) }.boxed()
    }

    fn stats(&self) -> PoolStats {
        PoolStats::default()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
}

/// Answers with the event, but for a few.
struct Echo {
    answers: watch::Sender<Answers>,
    invoked: Arc<Mutex<Vec<Invocation>>>,
    name: String,
    ready: Ready,
}

impl Sandboxes for Echo {
    fn keep_ready(&self, count: usize) {
        let mut ready = self.ready.lock().unwrap();
        ready.insert(self.name.clone(), count.min(READY_MAX));
    }

    fn invoke(&self, invocation: Invocation) -> BoxFuture<'_, Result<Outcome, InvokeError>> {
        async move {
            self.invoked.lock().unwrap().push(invocation.clone());
            if invocation.payload == "\"hold\"" {
                self.answers.send_modify(|answers| answers.waiting += 1);
                let _ = self
                    .answers
                    .subscribe()
                    .wait_for(|answers| !answers.are_held)
                    .await;
                self.answers.send_modify(|answers| answers.waiting -= 1);
            }
            let measured = invocation.measure == Measure::On;
            Ok(Outcome {
                end: end(invocation.payload)?,
                log: b"said\n".to_vec(),
                duration: Duration::from_micros(1500),
                timings: measured.then(InvocationTimings::default),
                start: Start::Rewound,
                late_log: None,
            })
        }
        .boxed()
    }

    fn invoke_streaming(
        &self,
        invocation: Invocation,
        sink: mpsc::Sender<StreamPart>,
    ) -> BoxFuture<'_, Result<Outcome, InvokeError>> {
        async move {
            let event: serde_json::Value = serde_json::from_slice(&invocation.payload).unwrap();
            let path = event["rawPath"]
                .as_str()
                .map(|path| path.trim_start_matches('/'));
            let word = path.or(event.as_str()).unwrap_or_default();
            let (kind, parts): (_, &[&str]) = match word {
                "stream" | "break" => ("text/plain", &["one", "two", "three"]),
                "prelude" => (
                    "application/vnd.awslambda.http-integration-response",
                    &[
                        "{\"statusCode\":201,\"headers\":{\"X-A\":\"b\"},\"cook",
                        "ies\":[\"a=1\"]}\0\0\0",
                        "\0\0\0\0\0one",
                        "two",
                    ],
                ),
                _ => {
                    let mut outcome = self.invoke(invocation).await?;
                    if let End::Response {
                        payload,
                        content_type,
                    } = &mut outcome.end
                    {
                        let (content_type, payload) =
                            (content_type.take(), std::mem::take(payload));
                        for part in [
                            StreamPart::Head { content_type },
                            StreamPart::Chunk(payload),
                        ] {
                            sink.send(part).await.map_err(|_| InvokeError::Abandoned)?;
                        }
                    }
                    return Ok(outcome);
                }
            };
            let head = StreamPart::Head {
                content_type: Some(kind.to_owned()),
            };
            sink.send(head).await.map_err(|_| InvokeError::Abandoned)?;
            for part in parts {
                let chunk = StreamPart::Chunk(Bytes::from_static(part.as_bytes()));
                let sent = sink.send(chunk).await;
                let mut answers = self.answers.subscribe();
                tokio::select! {
                    _ = answers.wait_for(|answers| !answers.are_held) => {}
                    () = sink.closed() => {}
                }
                if sent.is_err() || sink.is_closed() {
                    self.answers.send_modify(|answers| answers.abandoned += 1);
                    return Err(InvokeError::Abandoned);
                }
            }
            let end = match word {
                "break" => end(Bytes::from_static(b"\"raise\""))?,
                _ => End::Response {
                    payload: Bytes::new(),
                    content_type: None,
                },
            };
            Ok(Outcome {
                end,
                log: b"said\n".to_vec(),
                duration: Duration::from_micros(1500),
                timings: None,
                start: Start::Rewound,
                late_log: None,
            })
        }
        .boxed()
    }

    fn stats(&self) -> PoolStats {
        let ready = self.ready.lock().unwrap()[&self.name];
        PoolStats {
            ready,
            is_held_back: ready == READY_MAX,
            ..PoolStats::default()
        }
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
}

fn end(payload: Bytes) -> Result<End, InvokeError> {
    // Records of records are deeper than can be read in the end.
    let event: serde_json::Value = serde_json::from_slice(&payload).unwrap_or_default();
    if event["requestContext"]["condition"].is_string() {
        let answer = End::Response {
            payload: Bytes::from_static(b"\"a record\""),
            content_type: None,
        };
        return Ok(answer);
    }
    let word = event
        .as_str()
        .or_else(|| event["body"].as_str())
        .unwrap_or_default();
    let exit = |cause, out_of_memory| {
        End::RuntimeExit(RuntimeExit {
            cause,
            out_of_memory,
            request_id: None,
        })
    };
    Ok(match word {
        "raise" => End::FunctionError {
            error_type: Some("ValueError".to_owned()),
            document: Bytes::from_static(
                br#"{"errorMessage":"no","errorType":"ValueError","stackTrace":[]}"#,
            ),
        },
        "restore" => End::RestoreError {
            error_type: "Runtime.AfterRestoreError".to_owned(),
            document: Bytes::from_static(
                br#"{"errorMessage":"no network yet","errorType":"Runtime.AfterRestoreError"}"#,
            ),
        },
        "slow restore" => End::RestoreTimedOut,
        "time-out" => End::TimedOut,
        "exit" => exit(RuntimeExitCause::Code(7), false),
        "memory" => exit(RuntimeExitCause::Signal(9), true),
        "panic" => End::GuestDied {
            reason: ExitReason::Panic,
            detail: String::new(),
            console: "[    1.0] Kernel panic - not syncing: test\n".to_owned(),
        },
        "throttle" => {
            return Err(InvokeError::Throttled {
                reason: ThrottleReason::QueueFull,
                running: 1,
                waiting: 1,
            });
        }
        "host" => {
            let stderr = ": bus error".to_owned();
            return Err(InvokeError::Host(Arc::new(HostError::Died { stderr })));
        }
        "full" => {
            return Err(InvokeError::Throttled {
                reason: ThrottleReason::MachineFull,
                running: 1,
                waiting: 1,
            });
        }
        "shape" => End::Response {
            payload: Bytes::from_static(
                br#"{"statusCode":418,"headers":{"X-A":"b"},"cookies":["a=1"],"body":"tea"}"#,
            ),
            content_type: None,
        },
        _ => End::Response {
            payload,
            content_type: None,
        },
    })
}
