//! `thaw snapshot push`, `run` and `record`: a snapshot into a chunk store, and one invocation of a snapshot without a gateway.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use thaw_images::{ImageStore, RuntimeName};
use thaw_runtime::{End, Invocation, Learn, Measure, Outcome, PoolSpec, Runtime, RuntimeConfig};
use thaw_snapshot::{Key, PendingFile, Snapshot, WorkingSet, set_working_set, tag};
use thaw_snapshot_store::{LocalFolder, Store};

use super::super::confine;
use super::{Found, describe_working_set, find, key, open_with_base, working_set_line};
use crate::cli::Global;
use crate::cli::installation::Installation;
use crate::cli::output::{self, Format};
use crate::cli::progress::Steps;
use crate::cli::venue::{InLab, LabChoice, Venue};

/// Folder of a store for all of a snapshot but its memory.
const STUBS: &str = "stubs";
/// File name of the code's image beside a snapshot.
const CODE: &str = "code.erofs";
/// Longest wait for a VM: one is made for the request.
const WAIT_LIMIT: Duration = Duration::from_secs(120);
/// How long what is left may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

#[derive(Args)]
pub struct PushArgs {
    /// Name of a snapshot built by hand, name of a function, or path of a file.
    pub(super) snapshot: String,
    /// Folder of the chunk store; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub(super) store: PathBuf,
}

#[derive(Args)]
pub struct RunArgs {
    /// Name of a snapshot built by hand, name of a function, or path of a file.
    snapshot: String,
    /// Take the guest's memory out of this chunk store, as it is touched, instead of mapping the snapshot's file.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    #[command(flatten)]
    event: Event,
}

#[derive(Args)]
pub struct RecordArgs {
    /// Name of a snapshot built by hand, name of a function, or path of a file.
    snapshot: String,
    #[command(flatten)]
    event: Event,
}

/// One invocation.
#[derive(Args)]
struct Event {
    /// The event, JSON.
    #[arg(short, long, default_value = "{}")]
    data: String,
    /// Longest run of the function, seconds.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// Image of the function's code; the one beside the snapshot if not given.
    #[arg(long, value_name = "FILE")]
    code: Option<PathBuf>,
    /// Where the VM runs.
    #[arg(long, value_enum, default_value_t = LabChoice::Auto)]
    lab: LabChoice,
    /// Set when this process was started inside the lab by another one.
    #[arg(long, hide = true)]
    in_lab: bool,
}

/// Name of the file that a store has of a snapshot.
fn stub_of(store: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let stem = Path::new(name).file_stem();
    let stem = stem.with_context(|| format!("{name:?} is no name for a snapshot"))?;
    Ok(store.join(STUBS).join(stem).with_added_extension("thaw"))
}

pub fn push(home: &Path, args: &PushArgs, format: Format) -> anyhow::Result<()> {
    let found = find(home, &args.snapshot)?;
    let began = Instant::now();
    let snapshot = open_with_base(home, &found.path)?;
    snapshot
        .verify()
        .with_context(|| format!("{} is damaged", found.path.display()))?;
    let stub = stub_of(&args.store, &found.name)?;
    let pending = (fs::create_dir_all(args.store.join(STUBS)))
        .and_then(|()| PendingFile::create(&stub))
        .with_context(|| format!("cannot make {}", stub.display()))?;
    let file = (pending.file().try_clone()).context("no descriptor left")?;
    let store = Store::new(Arc::new(LocalFolder::new(&args.store)));
    let pushed = store
        .push(&snapshot, file)
        .with_context(|| format!("cannot push {}", found.name))?;
    tag(pending.file(), &key(home)?).with_context(|| format!("cannot tag {}", stub.display()))?;
    pending
        .commit()
        .with_context(|| format!("cannot keep {}", stub.display()))?;
    let (memory, seconds) = (pushed.memory, began.elapsed().as_secs_f64());
    if format == Format::Json {
        return output::json(&json!({
            "name": found.name, "stub": stub, "manifest": memory.id.to_string(), "chunks": memory.chunks, "zeroChunks": memory.zero_chunks,
            "newChunks": memory.new_chunks, "newBytes": memory.new_bytes, "stubBytes": pushed.stub.stored_bytes, "seconds": seconds,
        }));
    }
    println!(
        "{}: {} of {} chunks are new ({}), {} are zero; {} ({seconds:.1} s)",
        found.name,
        memory.new_chunks,
        memory.chunks,
        output::bytes(memory.new_bytes),
        memory.zero_chunks,
        stub.display()
    );
    Ok(())
}

/// What a VM is made of.
struct Parts {
    name: String,
    /// Of the home whose snapshot it is.
    key: Key,
    snapshot: PathBuf,
    /// Or the store.
    base: Option<PathBuf>,
    rootfs: PathBuf,
    code: PathBuf,
}

impl Parts {
    /// Finds them; images that are missing are made.
    fn find(
        home: &Path,
        name: &str,
        store: Option<&Path>,
        event: &Event,
        steps: &mut Steps,
    ) -> anyhow::Result<Self> {
        // A store's stub needs no snapshot here, if it is said where the code is.
        let (found, code) = match (store, &event.code) {
            (Some(_), Some(code)) => (None, code.clone()),
            (_, Some(code)) => (Some(find(home, name)?), code.clone()),
            (_, None) => {
                let found = find(home, name)?;
                let code = found.path.with_file_name(CODE);
                (Some(found), code)
            }
        };
        ensure!(
            code.is_file(),
            "there is no {}: name the image of the function's code with --code",
            code.display()
        );
        let (snapshot, base) = match (store, found) {
            (Some(store), found) => {
                let name = found.map_or_else(|| name.to_owned(), |found| found.name);
                let stub = stub_of(store, &name)?;
                ensure!(
                    stub.is_file(),
                    "the store has no {name}: `thaw snapshot push {name} --store {}` puts it there",
                    store.display()
                );
                (stub, Some(store.to_owned()))
            }
            (None, Some(Found { path, .. })) => {
                let base = base_of(home, &path)?;
                (path, base)
            }
            (None, None) => bail!("no snapshot was named"),
        };
        let key = key(home)?;
        let opened = Snapshot::open(&snapshot)?;
        opened.authenticate(&key)?;
        let metadata = opened.metadata()?;
        let runtime: RuntimeName = (metadata.runtime.parse())
            .with_context(|| format!("{} is of an unknown runtime", snapshot.display()))?;
        let image = ImageStore::new(home)
            .runtime(runtime, steps)
            .with_context(|| format!("cannot make the image {runtime}"))?;
        steps.end();
        ensure!(
            image.digest == metadata.image_digest,
            "the image {runtime} is another than the one {name} was frozen with: freeze it again"
        );
        Ok(Self {
            name: name.to_owned(),
            key,
            snapshot,
            base,
            rootfs: image.rootfs,
            code,
        })
    }

    fn spec(&self) -> PoolSpec {
        PoolSpec {
            name: self.name.clone(),
            snapshot: self.snapshot.clone(),
            base: self.base.clone(),
            rootfs: self.rootfs.clone(),
            code: self.code.clone(),
            ready_count: 0,
            concurrency_max: 1,
            queue_max: 1,
            queue_wait_max: WAIT_LIMIT,
            network: None,
            learn: Learn::Nothing,
        }
    }

    fn invocation(&self, event: &Event) -> anyhow::Result<Invocation> {
        serde_json::from_str::<serde::de::IgnoredAny>(&event.data)
            .context("the event is no JSON")?;
        Ok(Invocation {
            request_id: uuid::Uuid::new_v4().to_string(),
            function_arn: format!(
                "arn:aws:lambda:us-east-1:000000000000:function:{}",
                self.name
            ),
            payload: event.data.clone().into(),
            timeout: Duration::from_secs(event.timeout),
            client_context: None,
            cognito_identity: None,
            trace_id: None,
            measure: Measure::Off,
        })
    }
}

/// The file of what a snapshot is a difference over.
fn base_of(home: &Path, path: &Path) -> anyhow::Result<Option<PathBuf>> {
    let Some(named) = Snapshot::open(path)?.base()? else {
        return Ok(None);
    };
    super::base_file(home, path, &named).map(Some)
}

fn runtime(home: &Path, installation: &Installation, parts: &Parts) -> anyhow::Result<Runtime> {
    let config = RuntimeConfig {
        vmm: installation.vmm.clone(),
        jailer: Some(confine::jailer(home, installation)?),
        shells_per_class: 0,
        ..RuntimeConfig::default()
    };
    Ok(Runtime::new(config, parts.key.clone())?)
}

/// Does `work` where KVM is: here, or in the lab by this very command again.
fn where_kvm_is(
    home: &Path,
    event: &Event,
    steps: &mut Steps,
    installation: &Installation,
) -> anyhow::Result<Option<ExitCode>> {
    match Venue::choose(event.lab) {
        Venue::Lab(_) if !event.in_lab => {
            let code = InLab::this_command(home, installation).run(steps);
            code.map(Some)
        }
        _ => {
            confine::enter_own_namespace();
            Ok(None)
        }
    }
}

pub fn run(global: &Global, home: &Path, args: &RunArgs) -> anyhow::Result<ExitCode> {
    let installation = Installation::locate()?;
    let (mut steps, event) = (Steps::new(), &args.event);
    let parts = Parts::find(
        home,
        &args.snapshot,
        args.store.as_deref(),
        event,
        &mut steps,
    )?;
    let invocation = parts.invocation(event)?;
    if let Some(code) = where_kvm_is(home, event, &mut steps, &installation)? {
        return Ok(code);
    }
    let outcome = crate::cli::wait(async {
        let runtime = runtime(home, &installation, &parts)?;
        let pool = runtime.open_pool(parts.spec()).await?;
        let outcome = pool.invoke(invocation).await;
        runtime.shutdown(END_LIMIT).await;
        Ok(outcome?)
    })?;
    print(global.format(), &outcome)
}

pub fn record(global: &Global, home: &Path, args: &RecordArgs) -> anyhow::Result<ExitCode> {
    let installation = Installation::locate()?;
    let (mut steps, event) = (Steps::new(), &args.event);
    let parts = Parts::find(home, &args.snapshot, None, event, &mut steps)?;
    let invocation = parts.invocation(event)?;
    if let Some(code) = where_kvm_is(home, event, &mut steps, &installation)? {
        return Ok(code);
    }
    let (outcome, set) = crate::cli::wait(async {
        let runtime = runtime(home, &installation, &parts)?;
        let pool = runtime.open_pool(parts.spec()).await?;
        let recorded = pool.record(&invocation).await;
        runtime.shutdown(END_LIMIT).await;
        Ok(recorded?)
    })?;
    if !matches!(outcome.end, End::Response { .. }) {
        eprintln!("nothing was recorded, as the function did not answer:");
        return print(global.format(), &outcome);
    }
    keep(&parts, &set, global.format())?;
    Ok(ExitCode::SUCCESS)
}

fn keep(parts: &Parts, set: &WorkingSet, format: Format) -> anyhow::Result<()> {
    set_working_set(&parts.snapshot, set, Some(&parts.key))
        .with_context(|| format!("cannot amend {}", parts.snapshot.display()))?;
    let bytes = Snapshot::open(&parts.snapshot)?.memory_bytes()?;
    let value = describe_working_set(set, bytes);
    match format {
        Format::Json => output::json(&json!({ "name": parts.name, "workingSet": value })),
        Format::Text => {
            println!("{}: {}", parts.name, working_set_line(&value));
            Ok(())
        }
    }
}

/// The answer on standard output, what the function wrote on standard error.
fn print(format: Format, outcome: &Outcome) -> anyhow::Result<ExitCode> {
    let log = String::from_utf8_lossy(&outcome.log);
    let (payload, error) = match &outcome.end {
        End::Response { payload, .. } => (payload, None),
        End::FunctionError {
            error_type,
            document,
        } => {
            let kind = error_type.clone().unwrap_or_else(|| "Unhandled".into());
            (document, Some(kind))
        }
        End::RestoreError {
            error_type,
            document,
        } => (document, Some(error_type.clone())),
        End::RestoreTimedOut => bail!("the function's hooks were not done in time\n{log}"),
        End::TimedOut => bail!("the function did not answer in time\n{log}"),
        End::RuntimeExit(exit) => bail!("the function's process ended: {:?}\n{log}", exit.cause),
        End::GuestDied { reason, detail, .. } => bail!("the VM ended: {reason:?} {detail}\n{log}"),
    };
    if format == Format::Json {
        let body = serde_json::from_slice(payload)
            .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(payload).into_owned()));
        let seconds = outcome.duration.as_secs_f64();
        output::json(
            &json!({ "payload": body, "functionError": error, "log": log, "seconds": seconds }),
        )?;
    } else {
        let mut out = std::io::stdout();
        out.write_all(payload)
            .and_then(|()| out.write_all(b"\n"))
            .context("cannot print the answer")?;
        eprint!("{log}");
    }
    Ok(match error {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::from(crate::cli::FAILED),
    })
}
