//! `thaw deploy`: code to the gateway, then its progress until the function is frozen.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use futures_util::StreamExt as _;
use thaw_api_types::thaw::ProgressEvent;

use super::client::{Client, Deployment};
use super::output::{self, Format};
use super::progress::Steps;
use super::{Global, layers, package};

#[derive(Args)]
pub struct DeployArgs {
    /// Folder or zip with the function's code.
    code: PathBuf,
    /// Function name; the folder's or zip's own name if not given.
    #[arg(long)]
    name: Option<String>,
    /// Layer version that it sees at /opt, NAME:VERSION or an ARN; may be given several times, later ones over earlier ones.
    #[arg(long, value_name = "LAYER")]
    layer: Vec<String>,
    #[command(flatten)]
    settings: Settings,
}

/// What a function is beside its code; the same for a deployment and for a snapshot built by hand.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Base runtime: python3.11, or provided for any executable named bootstrap.
    #[arg(long, default_value = "python3.11")]
    pub runtime: String,
    /// Module and function, for instance app.handler.
    #[arg(long, default_value = "app.handler")]
    pub handler: String,
    /// Longest run of one invocation, seconds.
    #[arg(long, default_value_t = 3)]
    pub timeout: u32,
    /// Memory, MiB.
    #[arg(long, default_value_t = 128)]
    pub memory: u32,
    /// Environment variable NAME=VALUE; may be given several times.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
}

impl Settings {
    /// As the gateway keeps them.
    pub fn record(&self) -> thaw_api::record::Settings {
        thaw_api::record::Settings {
            runtime: self.runtime.clone(),
            handler: self.handler.clone(),
            role: super::client::ROLE.into(),
            description: String::new(),
            timeout_seconds: self.timeout,
            memory_mib: self.memory,
            environment: Some(self.env.iter().cloned().collect()),
            snap_start: false,
            layers: Vec::new(),
            ephemeral_mib: thaw_api::engine::EPHEMERAL_MIB_DEFAULT,
        }
    }
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write it as NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

impl DeployArgs {
    fn name(&self) -> anyhow::Result<String> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => {
                let whole = self
                    .code
                    .canonicalize()
                    .with_context(|| format!("cannot read {}", self.code.display()))?;
                let stem = whole.file_stem().and_then(|stem| stem.to_str());
                stem.map(str::to_owned)
                    .context("this path gives no function name: say --name")
            }
        }
    }
}

pub async fn run(global: &Global, args: &DeployArgs) -> anyhow::Result<ExitCode> {
    let (client, name) = (global.client()?, args.name()?);
    let mut arns = Vec::new();
    for layer in &args.layer {
        arns.push(layers::arn(&client, layer).await?);
    }
    let mut steps = Steps::new();
    steps.begin("pack the code");
    let zip = package::zip_of(&args.code)?;
    steps.begin("send it");
    let deployment = Deployment {
        name: name.clone(),
        zip,
        layers: arns,
        settings: args.settings.record(),
    };
    client.deploy(&deployment).await?;
    let last = follow(&client, &name, &mut steps).await?;
    report(global, &client, &name, &last)
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

fn report(
    global: &Global,
    client: &Client,
    name: &str,
    last: &ProgressEvent,
) -> anyhow::Result<ExitCode> {
    if global.format() == Format::Json {
        output::json(last)?;
    } else if let Some(error) = &last.error {
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
    let good = last.error.is_none() && last.init_error.is_none();
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(super::FAILED)
    })
}
