//! `thaw deploy`: what changes, code to the gateway, then its progress until the function is frozen.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::json;
use thaw_api_types::lambda::FunctionConfiguration;
use thaw_api_types::thaw::ProgressEvent;

use super::client::Client;
use super::manifest::Manifest;
use super::output::{self, Format};
use super::plan::{self, Current, Plan, Wanted};
use super::progress::Steps;
use super::project::{Project, ProjectArgs};
use super::{Global, layers, package, url, versions};

/// What Lambda calls reserved concurrency.
const CONCURRENCY: &str = "/2017-10-31/functions";

#[derive(Args)]
pub struct DeployArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// Show what would change, and change nothing; `build` runs.
    #[arg(long)]
    dry_run: bool,
    /// Freeze the function again even if nothing changes.
    #[arg(long, conflicts_with = "dry_run")]
    force: bool,
}

/// What a function is beside its code; the same for a deployment and for a snapshot built by hand. What is not said here
/// is as thaw.toml says, or else the default.
#[derive(Args, Clone, Debug, Default)]
pub struct Settings {
    /// Base runtime: python3.13, nodejs22.x, … (a wrong one is answered with all there are), or provided for any executable
    /// named bootstrap; by default nodejs22.x where the code has an index.mjs, index.js or index.cjs, and python3.11 elsewhere.
    #[arg(long)]
    pub runtime: Option<String>,
    /// Module and function; by default app.handler, or index.handler for Node.js.
    #[arg(long)]
    pub handler: Option<String>,
    /// Longest run of one invocation, seconds; by default 3.
    #[arg(long)]
    pub timeout: Option<u32>,
    /// Memory, MiB; by default 128.
    #[arg(long)]
    pub memory: Option<u32>,
    /// Environment variable NAME=VALUE; may be given several times.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
}

impl Settings {
    /// As the gateway keeps them for this code, without a thaw.toml.
    pub fn record(&self, code: &Path) -> thaw_api::record::Settings {
        self.over(&Manifest::default(), code)
    }

    /// As the gateway keeps them for this code, laid over what thaw.toml says.
    pub fn over(&self, manifest: &Manifest, code: &Path) -> thaw_api::record::Settings {
        let text = |own: &Option<String>, manifest: &Option<String>, default: &str| {
            let said = own.clone().or_else(|| manifest.clone());
            said.unwrap_or_else(|| default.to_owned())
        };
        let runtime = text(&self.runtime, &manifest.runtime, package::runtime_of(code));
        let handler = match runtime.starts_with("nodejs") {
            true => "index.handler",
            false => "app.handler",
        };
        let mut environment = manifest.environment.clone();
        environment.extend(self.env.iter().cloned());
        thaw_api::record::Settings {
            handler: text(&self.handler, &manifest.handler, handler),
            runtime,
            role: super::client::ROLE.into(),
            description: String::new(),
            timeout_seconds: self.timeout.or(manifest.timeout).unwrap_or(3),
            memory_mib: self.memory.or(manifest.memory).unwrap_or(128),
            environment: Some(environment),
            snap_start: manifest.snap_start,
            layers: Vec::new(),
            ephemeral_mib: manifest
                .ephemeral_storage
                .unwrap_or(thaw_api::engine::EPHEMERAL_MIB_DEFAULT),
            logging: thaw_api::record::Logging::default(),
            tracing: thaw_api::record::Tracing::default(),
            network: None,
        }
    }
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write it as NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// How far a deployment goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It says what would change.
    DryRun,
    /// It does what has to be done.
    Changes,
    /// It freezes the function in any case.
    Force,
}

/// What came of a deployment.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing was done: nothing changes, or nothing should.
    Unchanged(Plan),
    /// What needs no snapshot was changed.
    Settled(Plan),
    /// The function was frozen, or could not be: the last event tells.
    Frozen(ProgressEvent),
}

pub async fn run(global: &Global, args: &DeployArgs) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    let project = Project::open(&args.project)?;
    let manner = match (args.dry_run, args.force) {
        (true, _) => Manner::DryRun,
        (_, true) => Manner::Force,
        _ => Manner::Changes,
    };
    let text = global.format() == Format::Text;
    let quiet = |_: &str, _: &Plan| {};
    let show: &dyn Fn(&str, &Plan) = if text { &show_changes } else { &quiet };
    let name = &project.name;
    let outcome = bring(&client, &project, manner, show).await?;
    let good = match &outcome {
        Outcome::Unchanged(plan) | Outcome::Settled(plan) => {
            if text && plan.changes().next().is_none() {
                println!("{name}: nothing changes; --force freezes it again");
            } else if !text {
                let changes: Vec<_> = plan.changes().collect();
                output::json(&json!({ "name": name, "changes": changes }))?;
            }
            true
        }
        Outcome::Frozen(last) if text => report(&client, name, last),
        Outcome::Frozen(last) => {
            output::json(last)?;
            succeeded(last)
        }
    };
    if !good {
        return Ok(ExitCode::from(super::FAILED));
    }
    let manifest = &project.manifest;
    let alias = manifest.alias.as_deref();
    if manner != Manner::DryRun && (manifest.publish || alias.is_some()) {
        // Where the newest version is the same already it stays the newest, so this may be done each time.
        let made = versions::publish_version(&client, name, None, alias).await?;
        let named = alias.map(|alias| format!(", and {name}:{alias} names it"));
        eprintln!(
            "{name}:{} is published{}",
            made.version,
            named.unwrap_or_default()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what a deployment changes, a line each.
pub fn show_changes(name: &str, plan: &Plan) {
    if plan.create {
        println!("{name} is new:");
    } else if plan.changes().next().is_some() {
        println!("{name} changes:");
    }
    for line in plan.lines() {
        println!("{line}");
    }
}

/// Makes the gateway's function what the project says, and waits until it is. `show` is called before anything is done.
///
/// # Errors
/// The project cannot be built or packed, or the gateway refuses. A function that cannot be frozen is no error: see
/// [`Outcome::Frozen`].
pub async fn bring(
    client: &Client,
    project: &Project,
    manner: Manner,
    show: &dyn Fn(&str, &Plan),
) -> anyhow::Result<Outcome> {
    let (name, manifest) = (&project.name, &project.manifest);
    project.build().await?;
    let mut steps = Steps::new();
    steps.begin("pack the code");
    let (mut deployment, code) = project.pack()?;
    for layer in &project.layers {
        deployment.layers.push(layers::arn(client, layer).await?);
    }
    let url = manifest.url.as_ref().map(|url| url.request());
    let wanted = Wanted {
        settings: &deployment.settings,
        layers: &deployment.layers,
        code: &code,
        reserved: manifest.reserved_concurrency,
        url: url.as_ref(),
    };
    let current = current(client, name, url.is_some()).await?;
    let plan = plan::compare(current.as_ref(), &wanted);
    steps.end();
    show(name, &plan);
    let freezes = plan.freezes() || manner == Manner::Force;
    if manner == Manner::DryRun || (!freezes && plan.changes().next().is_none()) {
        return Ok(Outcome::Unchanged(plan));
    }
    let mut last = None;
    if freezes {
        steps.begin("send it");
        if plan.create {
            client.deploy(&deployment).await?;
        } else {
            if !plan.settings.is_empty() {
                client.configure(&deployment).await?;
                last = Some(follow(client, name, &mut steps).await?);
            }
            if !plan.code.is_empty() || last.is_none() {
                client.upload(name, &deployment.zip).await?;
                last = None;
            }
        }
        if last.is_none() {
            last = Some(follow(client, name, &mut steps).await?);
        }
    }
    if last.as_ref().is_none_or(|last| last.error.is_none()) {
        settle(client, name, &wanted, &plan).await?;
    }
    Ok(match last {
        Some(last) => Outcome::Frozen(last),
        None => Outcome::Settled(plan),
    })
}

/// Changes what needs no snapshot.
async fn settle(
    client: &Client,
    name: &str,
    wanted: &Wanted<'_>,
    plan: &Plan,
) -> anyhow::Result<()> {
    if let (Some(reserved), false) = (wanted.reserved, plan.reserved.is_empty()) {
        let path = format!("{CONCURRENCY}/{name}/concurrency");
        let body = json!({ "ReservedConcurrentExecutions": reserved });
        let _: serde_json::Value = client.call(Method::PUT, &path, Some(&body)).await?;
    }
    if let (Some(url), false) = (wanted.url, plan.url.is_empty()) {
        url::put(client, name, &json!(url)).await?;
    }
    Ok(())
}

/// The function as the gateway has it, once no update of it is in progress.
async fn current(client: &Client, name: &str, with_url: bool) -> anyhow::Result<Option<Current>> {
    let Some(mut found) = client.function(name).await? else {
        return Ok(None);
    };
    if busy(&found.configuration) {
        client.settled(name).await?;
        let Some(again) = client.function(name).await? else {
            return Ok(None);
        };
        found = again;
    }
    let concurrency = found.concurrency;
    let url = match with_url {
        true => url::get(client, name).await?,
        false => None,
    };
    Ok(Some(Current {
        configuration: found.configuration,
        reserved: concurrency.and_then(|reserved| reserved.reserved_concurrent_executions),
        url,
    }))
}

fn busy(function: &FunctionConfiguration) -> bool {
    function.state.as_deref() == Some("Pending")
        || function.last_update_status.as_deref() == Some("InProgress")
}

/// Shows a deployment's steps until it ends; returns the last event.
pub async fn follow(
    client: &Client,
    name: &str,
    steps: &mut Steps,
) -> anyhow::Result<ProgressEvent> {
    let mut events = client.progress(name).await?;
    while let Some(event) = events.next().await {
        let event = event?;
        if event.done {
            steps.end();
            return Ok(event);
        }
        steps.begin(&event.message);
    }
    bail!("the gateway ended before the deployment did; see `thaw ls` once it runs again")
}

fn succeeded(last: &ProgressEvent) -> bool {
    last.error.is_none() && last.init_error.is_none()
}

/// Tells a person how a deployment ended; answers whether the function works.
pub fn report(client: &Client, name: &str, last: &ProgressEvent) -> bool {
    if let Some(error) = &last.error {
        eprintln!("{name} could not be deployed: {error}");
    } else if let Some(init) = &last.init_error {
        eprintln!(
            "{name} is deployed, but fails when it starts: {}: {}",
            init.error_type, init.message
        );
        eprint!("{}", init.log);
    } else {
        let size = last
            .snapshot
            .map(|snapshot| output::bytes(snapshot.stored_bytes))
            .unwrap_or_default();
        println!(
            "{name} is frozen ({size}) and ready:\n  curl {}/fn/{name}/",
            client.endpoint()
        );
    }
    succeeded(last)
}
