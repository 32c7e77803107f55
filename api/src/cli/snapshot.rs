//! `thaw snapshot …`: snapshots as files. All but `build`, `run` and `record` need no KVM; none needs a gateway.

mod run;
#[cfg(test)]
mod tests;
mod trust;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use thaw_api::engine::{Engine as _, EngineStep, FreezeJob, HostEngine};
use thaw_api::environment;
use thaw_api::record::VersionId;
use thaw_api::snapshot_key;
use thaw_images::{ImageStore, RuntimeName};
use thaw_runtime::{Runtime, RuntimeConfig};
use thaw_snapshot::{BaseRef, Key, Snapshot, WorkingSet};

use super::confine;
use super::deploy::Settings;
use super::installation::Installation;
use super::output::{self, Format};
use super::progress::Steps;
use super::up::prepare_images;
use super::venue::{InLab, LabChoice, Venue};
use super::{Global, package};

#[derive(Subcommand)]
pub enum SnapshotCommand {
    /// Freeze a folder or a zip without a gateway.
    Build(BuildArgs),
    /// List all snapshots: deployed functions' and those built by hand.
    Ls,
    /// Show what is in a snapshot.
    Inspect(Which),
    /// Check who made a snapshot, and every byte of it, and of the base below it, against its digests.
    Verify(Which),
    /// Check every byte of a snapshot that was made or changed elsewhere, and use it from now on as one of your own.
    Trust(Which),
    /// Put a snapshot's memory into a chunk store, which keeps equal chunks of all snapshots once.
    Push(run::PushArgs),
    /// Invoke a snapshot once, in a VM of its own.
    Run(run::RunArgs),
    /// Invoke a snapshot once and record which pages it touches first: its VMs fetch them ahead from then on.
    Record(run::RecordArgs),
    /// Remove a snapshot built by hand.
    Rm(Which),
}

#[derive(Args)]
pub struct BuildArgs {
    /// Folder or zip with the function's code.
    code: PathBuf,
    /// Name of the snapshot.
    #[arg(long)]
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// Where the VM runs while it is built.
    #[arg(long, value_enum, default_value_t = LabChoice::Auto)]
    lab: LabChoice,
    /// Set when this process was started inside the lab by another one.
    #[arg(long, hide = true)]
    in_lab: bool,
}

#[derive(Args)]
pub struct Which {
    /// Name of a snapshot built by hand, name of a function, or path of a file.
    snapshot: String,
}

/// Longest initialisation of a function whose snapshot is built by hand.
const INIT_LIMIT: Duration = Duration::from_secs(60);
/// File name of the snapshot in its folder.
const FILE: &str = "snapshot.thaw";

/// A snapshot file and how it came to be.
struct Found {
    name: String,
    origin: &'static str,
    path: PathBuf,
}

pub fn run(global: &Global, command: &SnapshotCommand) -> anyhow::Result<ExitCode> {
    let (home, format) = (global.home()?, global.format());
    match command {
        SnapshotCommand::Build(args) => return build(global, &home, args),
        SnapshotCommand::Ls => ls(&home, format)?,
        SnapshotCommand::Inspect(which) => inspect(&home, &find(&home, &which.snapshot)?, format)?,
        SnapshotCommand::Verify(which) => {
            verify(&home, &find(&home, &which.snapshot)?, format)?;
        }
        SnapshotCommand::Trust(which) => {
            trust::trust(&home, &find(&home, &which.snapshot)?, format)?;
        }
        SnapshotCommand::Push(args) => run::push(&home, args, format)?,
        SnapshotCommand::Run(args) => return run::run(global, &home, args),
        SnapshotCommand::Record(args) => return run::record(global, &home, args),
        SnapshotCommand::Rm(which) => rm(&home, &which.snapshot)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn build(global: &Global, home: &Path, args: &BuildArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        is_plain_name(&args.name),
        "{:?} is no name for a snapshot: use letters, digits, - and _",
        args.name
    );
    let installation = Installation::locate()?;
    let mut steps = Steps::new();
    if !args.in_lab {
        fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
        prepare_images(home, &installation, &mut steps)?;
        let folder = home.join("snapshots").join(&args.name);
        ensure!(
            !folder.join(FILE).exists(),
            "there is a snapshot {} already: `thaw snapshot rm {0}` removes it",
            args.name
        );
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let code = folder.join("code.zip");
        fs::write(&code, package::zip_of(&args.code)?).context("cannot store the code")?;
        // Here, as nothing can be made in the lab.
        let runtime: RuntimeName = args.settings.record(&code).runtime.parse()?;
        ImageStore::new(home)
            .runtime(runtime, &mut steps)
            .with_context(|| format!("cannot make the image {runtime}"))?;
        steps.end();
        if let Venue::Lab(_) = Venue::choose(args.lab) {
            return InLab::this_command(home, &installation).run(&mut steps);
        }
    }
    confine::enter_own_namespace();
    let path = super::wait(freeze(home, &installation, args, steps))?;
    if global.format() == Format::Json {
        let found = Found {
            name: args.name.clone(),
            origin: "built",
            path,
        };
        output::json(&describe(&found, &key(home)?)?)?;
    } else {
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

async fn freeze(
    home: &Path,
    installation: &Installation,
    args: &BuildArgs,
    mut steps: Steps,
) -> anyhow::Result<PathBuf> {
    let folder = home.join("snapshots").join(&args.name);
    let config = RuntimeConfig {
        vmm: installation.vmm.clone(),
        jailer: Some(confine::jailer(home, installation)?),
        ..RuntimeConfig::default()
    };
    let runtime = Runtime::new(config, key(home)?)?;
    let engine = HostEngine::new(runtime, home.to_owned(), installation.agent.clone());
    let code = folder.join("code.zip");
    let settings = args.settings.record(&code);
    let job = FreezeJob {
        function: args.name.clone(),
        revision: "built".into(),
        zip: code,
        layers: Vec::new(),
        folder: folder.clone(),
        memory_mib: settings.memory_mib,
        vcpu_count: environment::vcpu_count(settings.memory_mib),
        ephemeral_mib: thaw_api::engine::EPHEMERAL_MIB_DEFAULT,
        bootstrap: environment::bootstrap(&settings.runtime),
        environment: environment::variables(&args.name, VersionId::Latest, "us-east-1", &settings),
        account_id: None,
        network: None,
        init_limit: INIT_LIMIT,
        runtime: settings.runtime,
    };
    let artifact = engine
        .freeze(job, &mut |step| steps.begin(words(&step)))
        .await;
    engine.shutdown(Duration::from_secs(10)).await;
    artifact
        .map(|artifact| artifact.snapshot)
        .with_context(|| format!("cannot freeze {}", args.name))
}

/// The key of what was made in `home`.
pub fn key(home: &Path) -> anyhow::Result<Key> {
    let file = home.join(snapshot_key::FILE);
    snapshot_key::of(home).with_context(|| format!("cannot have {}", file.display()))
}

fn words(step: &EngineStep) -> &'static str {
    match step {
        EngineStep::Images => "check the images",
        EngineStep::Image(_) => "make the runtime's image",
        EngineStep::Code => "make the code image",
        EngineStep::Booting => "boot the guest",
        EngineStep::AgentUp => "start the runtime",
        EngineStep::Initializing => "initialise the function",
        EngineStep::Ready => "freeze",
        EngineStep::Saving => "write the snapshot",
        EngineStep::Saved { .. } => "finish",
    }
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// Every snapshot file below `home`: functions/NAME/REVISION/FILE and snapshots/NAME/FILE.
fn all(home: &Path) -> Vec<Found> {
    let folders = |path: PathBuf| {
        let entries = fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
        folders.sort();
        folders
    };
    let name = |folder: &Path| {
        folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let mut found = Vec::new();
    for function in folders(home.join("functions")) {
        for revision in folders(function.clone()) {
            found.push(Found {
                name: name(&function),
                origin: "deployed",
                path: revision.join(FILE),
            });
        }
    }
    for folder in folders(home.join("snapshots")) {
        found.push(Found {
            name: name(&folder),
            origin: "built",
            path: folder.join(FILE),
        });
    }
    found.retain(|snapshot| snapshot.path.is_file());
    found
}

fn find(home: &Path, text: &str) -> anyhow::Result<Found> {
    if let Some(found) = all(home).into_iter().find(|snapshot| snapshot.name == text) {
        return Ok(found);
    }
    let path = PathBuf::from(text);
    ensure!(
        path.is_file(),
        "there is no snapshot, function or file {text}: `thaw snapshot ls` lists them"
    );
    Ok(Found {
        name: text.to_owned(),
        origin: "file",
        path,
    })
}

fn ls(home: &Path, format: Format) -> anyhow::Result<()> {
    let (found, key) = (all(home), key(home)?);
    if format == Format::Json {
        return output::json(
            &found
                .iter()
                .map(|snapshot| {
                    describe(snapshot, &key).unwrap_or_else(|error| damaged(snapshot, &error))
                })
                .collect::<Vec<_>>(),
        );
    }
    if found.is_empty() {
        println!("no snapshots yet: `thaw deploy` and `thaw snapshot build` make some");
        return Ok(());
    }
    let rows = found.iter().map(|snapshot| {
        let value = describe(snapshot, &key).unwrap_or_else(|error| damaged(snapshot, &error));
        let text = |key: &str| shown(value[key].as_str().unwrap_or("-"));
        let stored = value["storedBytes"]
            .as_u64()
            .map_or_else(|| "damaged".into(), output::bytes);
        vec![
            snapshot.name.clone(),
            snapshot.origin.into(),
            text("runtime"),
            value["memoryMiB"].to_string(),
            stored,
            text("digest").chars().take(12).collect(),
        ]
    });
    output::table(
        &["name", "origin", "runtime", "mib", "stored", "digest"],
        rows,
    );
    Ok(())
}

fn damaged(found: &Found, error: &anyhow::Error) -> Value {
    json!({ "name": found.name, "origin": found.origin, "path": found.path, "error": format!("{error:#}") })
}

/// What a file says of itself, for a terminal: a hostile one must not steer that.
fn shown(text: &str) -> String {
    let escaped = |letter: char| match letter.is_control() {
        true => letter.escape_default().to_string(),
        false => letter.to_string(),
    };
    text.chars().map(escaped).collect()
}

fn describe(found: &Found, key: &Key) -> anyhow::Result<Value> {
    let snapshot = Snapshot::open(&found.path)?;
    let (metadata, cpu, memory) = (
        snapshot.metadata()?,
        snapshot.cpu()?,
        snapshot.own_memory()?,
    );
    let working_set = snapshot
        .working_set()?
        .map(|set| describe_working_set(&set, memory.length));
    let sections: Vec<_> = snapshot
        .sections()
        .map(|(kind, length)| json!({ "section": kind.to_string(), "bytes": length }))
        .collect();
    let disks = (0..u8::MAX)
        .filter_map(|index| snapshot.disk(index).ok())
        .map(|disk| disk.stored_bytes())
        .sum::<u64>();
    Ok(json!({
        "name": found.name, "origin": found.origin, "path": found.path, "digest": snapshot.digest().to_string(),
        "authentic": snapshot.authenticate(key).is_ok(),
        "function": metadata.function, "revision": metadata.revision, "runtime": metadata.runtime, "handler": metadata.handler,
        "createdUnixMs": metadata.created_unix_ms, "thawVersion": metadata.thaw_version, "agentVersion": metadata.agent_version,
        "kernelVersion": metadata.kernel_version, "vcpus": metadata.vcpu_count, "memoryMiB": memory.length >> 20,
        "fileBytes": snapshot.file_bytes(), "storedBytes": memory.stored_bytes() + disks, "memoryStoredBytes": memory.stored_bytes(),
        "memoryRuns": memory.runs.len(), "diskStoredBytes": disks, "cpuVendor": cpu.vendor, "tscKHz": cpu.tsc_khz, "sections": sections,
        "contentDigest": snapshot.content_digest().to_string(), "baseDigest": snapshot.base()?.map(|base| base.digest.to_string()),
        "workingSet": working_set,
    }))
}

fn describe_working_set(set: &WorkingSet, memory_bytes: u64) -> Value {
    let percent = |part: u64| (1000.0 * part as f64 / memory_bytes.max(1) as f64).round() / 10.0;
    json!({
        "pages": set.pages(), "mib": (set.bytes() as f64 / 104_857.6).round() / 10.0, "runs": set.runs().len(),
        "writtenPages": set.written_pages(), "percentOfMemory": percent(set.bytes()),
    })
}

/// The working set in words.
fn working_set_line(set: &Value) -> String {
    if set.is_null() {
        return "not recorded".into();
    }
    format!(
        "{} pages ({} written), {} MiB, {} runs, {} % of memory",
        set["pages"], set["writtenPages"], set["mib"], set["runs"], set["percentOfMemory"]
    )
}

/// Opens a snapshot that was made in `home` and, if it is a difference, attaches the base that `home` has for it.
fn open_with_base(home: &Path, path: &Path) -> anyhow::Result<Snapshot> {
    let (mut snapshot, key) = (Snapshot::open(path)?, key(home)?);
    snapshot.authenticate(&key)?;
    if let Some(named) = snapshot.base()? {
        let base = base_file(home, path, &named)?;
        snapshot.attach_base(Snapshot::open(&base)?)?;
        snapshot.authenticate(&key)?;
    }
    Ok(snapshot)
}

/// The file that `home` has of the base that the snapshot at `path` names.
fn base_file(home: &Path, path: &Path, named: &BaseRef) -> anyhow::Result<PathBuf> {
    let is_base = |path: &PathBuf| {
        Snapshot::open(path).is_ok_and(|base| base.content_digest() == named.digest)
    };
    let mut candidates = files_below(&home.join("bases"), 2).into_iter();
    candidates.find(is_base).with_context(|| {
        format!(
            "{} is a difference to base {}, which {} does not have: deploy its function again",
            path.display(),
            named.digest,
            home.join("bases").display()
        )
    })
}

/// Files of `folder` and of its folders, `depth` levels of them.
fn files_below(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_file() {
            files.push(path);
        } else if depth > 0 {
            files.extend(files_below(&path, depth - 1));
        }
    }
    files.sort();
    files
}

fn inspect(home: &Path, found: &Found, format: Format) -> anyhow::Result<()> {
    let value = describe(found, &key(home)?)?;
    if format == Format::Json {
        return output::json(&value);
    }
    for (key, value) in value
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| *key != "sections" && !(*key == "baseDigest" && value.is_null()))
    {
        if key == "workingSet" {
            println!("{key:<18} {}", working_set_line(value));
            continue;
        }
        println!(
            "{key:<18} {}",
            value.as_str().map_or_else(|| value.to_string(), shown)
        );
    }
    println!();
    let rows = value["sections"].as_array().into_iter().flatten();
    output::table(
        &["section", "size"],
        rows.map(|row| {
            vec![
                row["section"].as_str().unwrap_or_default().to_owned(),
                output::bytes(row["bytes"].as_u64().unwrap_or_default()),
            ]
        }),
    );
    Ok(())
}

fn verify(home: &Path, found: &Found, format: Format) -> anyhow::Result<()> {
    let began = Instant::now();
    let snapshot = open_with_base(home, &found.path)?;
    snapshot
        .verify()
        .with_context(|| format!("{} is damaged", found.path.display()))?;
    let seconds = began.elapsed().as_secs_f64();
    match format {
        Format::Json => output::json(
            &json!({ "name": found.name, "digest": snapshot.digest().to_string(), "ok": true, "baseDigest": snapshot.base()?.map(|base| base.digest.to_string()), "seconds": seconds }),
        ),
        Format::Text => {
            println!(
                "{}: made here, and every byte is as it was written ({seconds:.2} s)",
                found.name
            );
            Ok(())
        }
    }
}

fn rm(home: &Path, name: &str) -> anyhow::Result<()> {
    let folder = home.join("snapshots").join(name);
    if !is_plain_name(name) || !folder.is_dir() {
        if all(home).iter().any(|snapshot| snapshot.name == name) {
            bail!("{name} is the snapshot of a deployed function: `thaw rm {name}` removes both");
        }
        bail!("there is no snapshot {name} built by hand: `thaw snapshot ls` lists them");
    }
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    println!("removed {name}");
    Ok(())
}
