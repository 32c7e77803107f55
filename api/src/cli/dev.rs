//! `thaw dev`: a function that follows its source. Each save is deployed; until the new one is frozen the old one answers.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use futures_util::StreamExt as _;
use notify::{Event, EventKind, RecursiveMode, Watcher as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::Global;
use super::client::Client;
use super::deploy::{self, Manner, Outcome};
use super::project::{Project, ProjectArgs};

/// How long nothing must have been saved before it is deployed: editors write in several steps.
const QUIET: Duration = Duration::from_millis(150);
/// Wait before logs are asked for again.
const LOGS_PAUSE: Duration = Duration::from_millis(500);

#[derive(Args)]
pub struct DevArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Deploy again on each save; `thaw dev` does so anyway.
    #[arg(long)]
    watch: bool,
    /// Invoke the function with this event, JSON, after each deployment.
    #[arg(long, value_name = "EVENT")]
    invoke: Option<String>,
}

pub async fn run(global: &Global, args: &DevArgs) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    let project = Project::open(&args.project)?;
    ensure!(
        project.code.is_dir(),
        "{} is no folder: `thaw deploy` deploys a zip",
        project.code.display()
    );
    let (interrupt, terminate) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    let mut interrupt = interrupt.context("cannot catch signals")?;
    let mut terminate = terminate.context("cannot catch signals")?;
    tokio::select! {
        ended = follow_source(&client, args, project) => ended,
        _ = interrupt.recv() => Ok(ExitCode::SUCCESS),
        _ = terminate.recv() => Ok(ExitCode::SUCCESS),
    }
}

async fn follow_source(
    client: &Client,
    args: &DevArgs,
    project: Project,
) -> anyhow::Result<ExitCode> {
    let (sender, mut changes) = mpsc::channel(1);
    let root = project.code.clone();
    let watched = Arc::new(Mutex::new(project.clone()));
    let _watcher = watch(&root, Arc::clone(&watched), sender)?;
    let _logs = Abort(tokio::spawn(follow_logs(
        client.clone(),
        project.name.clone(),
    )));
    let name = project.name;
    loop {
        match once(client, args, &watched, &name).await {
            Ok(()) => {}
            Err(error) => eprintln!("thaw: {error:#}"),
        }
        eprintln!("thaw: watching {}; Ctrl-C ends this", root.display());
        saved(&mut changes).await?;
    }
}

/// Deploys what is there now, and invokes it if asked.
async fn once(
    client: &Client,
    args: &DevArgs,
    watched: &Mutex<Project>,
    name: &str,
) -> anyhow::Result<()> {
    // thaw.toml may be what was saved.
    let project = Project::open(&args.project)?;
    ensure!(
        project.name == name,
        "the function is named {} now: start `thaw dev` again",
        project.name
    );
    watched
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone_from(&project);
    match deploy::bring(client, &project, Manner::Changes, &deploy::show_changes).await? {
        Outcome::Frozen(last) => {
            if !deploy::report(client, name, &last) {
                return Ok(());
            }
        }
        Outcome::Unchanged(_) | Outcome::Settled(_) => println!("{name}: nothing to freeze"),
    }
    if let Some(event) = &args.invoke {
        let began = Instant::now();
        let answer = client
            .invoke(name, event.clone().into_bytes(), false)
            .await?;
        let milliseconds = began.elapsed().as_secs_f64() * 1000.0;
        let body = String::from_utf8_lossy(&answer.payload);
        let failed = if answer.function_error.is_some() {
            ", failed"
        } else {
            ""
        };
        println!("{body}  ({milliseconds:.1} ms{failed})");
    }
    Ok(())
}

/// Waits until something is saved, and then nothing for a while.
async fn saved(changes: &mut Receiver<()>) -> anyhow::Result<()> {
    changes
        .recv()
        .await
        .context("the folder is watched no more")?;
    while let Ok(more) = tokio::time::timeout(QUIET, changes.recv()).await {
        more.context("the folder is watched no more")?;
    }
    Ok(())
}

fn watch(
    root: &Path,
    project: Arc<Mutex<Project>>,
    sender: Sender<()>,
) -> anyhow::Result<notify::RecommendedWatcher> {
    let heard = move |event: notify::Result<Event>| {
        let changed = match event {
            Ok(event) => {
                let project = project.lock().unwrap_or_else(PoisonError::into_inner);
                is_change(&event.kind) && event.paths.iter().any(|path| project.watches(path))
            }
            Err(_) => true, // events were lost
        };
        if changed {
            // A full channel holds a change already.
            let _ = sender.try_send(());
        }
    };
    let mut watcher = notify::recommended_watcher(heard).context("cannot watch files")?;
    watcher
        .watch(root, RecursiveMode::Recursive)
        .with_context(|| {
            format!(
                "cannot watch {}: the kernel's limit fs.inotify.max_user_watches may be too low",
                root.display()
            )
        })?;
    Ok(watcher)
}

fn is_change(kind: &EventKind) -> bool {
    matches!(
        kind,
        EventKind::Create(_) | EventKind::Modify(_) | EventKind::Remove(_)
    )
}

/// Prints what the function writes, from now on, whenever there is one.
async fn follow_logs(client: Client, name: String) {
    loop {
        if let Ok(mut chunks) = client.logs(&name, true, 0).await {
            while let Some(Ok(chunk)) = chunks.next().await {
                let mut out = std::io::stdout();
                if out.write_all(&chunk).and_then(|()| out.flush()).is_err() {
                    return;
                }
            }
        }
        tokio::time::sleep(LOGS_PAUSE).await;
    }
}

/// A task that ends with what started it.
struct Abort(tokio::task::JoinHandle<()>);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}
