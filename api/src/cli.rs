//! The command line: what a person types, turned into calls of the gateway (over HTTP), of the lab, or of the libraries.
//!
//! One file a command. `venue` decides where work that needs KVM runs; `client` speaks to a gateway; `output` prints.

mod bench;
mod client;
mod confine;
mod credentials;
mod deploy;
mod dev;
mod doctor;
mod init;
mod installation;
mod invoke;
mod keys;
mod lab;
mod layers;
mod list;
mod logs;
mod manifest;
mod near;
mod network;
mod output;
mod package;
mod plan;
mod progress;
mod project;
mod snapshot;
mod up;
mod url;
mod venue;
mod versions;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Parser, Subcommand};

use client::Client;
use output::Format;

/// Exit code of a command that failed.
const FAILED: u8 = 1;

#[derive(Parser)]
#[command(
    name = "thaw",
    version,
    about = "Freeze a function once, thaw it for every request."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Args, Clone, Debug)]
struct Global {
    /// Folder that holds all state.
    #[arg(long, global = true, env = "THAW_HOME", value_name = "DIR")]
    home: Option<PathBuf>,
    /// The gateway to speak to.
    #[arg(
        long,
        global = true,
        env = "THAW_ENDPOINT",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    endpoint: String,
    /// Certificates to trust besides this machine's, in PEM: the gateway's own or its authority's; for `thaw up`, those of an S3
    /// endpoint and of https destinations.
    #[arg(long, global = true, env = "THAW_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Serve functions until SIGINT or SIGTERM.
    Up(up::UpArgs),
    /// Say whether this machine can run sandboxes, and what is missing.
    Doctor,
    /// Write a first function into a folder.
    Init(init::InitArgs),
    /// Deploy a folder or a zip as a function, and freeze it.
    Deploy(deploy::DeployArgs),
    /// Deploy a folder, print what the function writes, and deploy again on each save, until Ctrl-C.
    Dev(dev::DevArgs),
    /// Call a function and print its answer.
    Invoke(invoke::InvokeArgs),
    /// Print what a function wrote.
    Logs(logs::LogsArgs),
    /// List functions.
    Ls,
    /// Remove functions.
    Rm(list::RmArgs),
    /// Publish, list and remove versions of a function.
    #[command(subcommand)]
    Versions(versions::VersionsCommand),
    /// Name versions of a function, and divide invocations between two.
    #[command(subcommand)]
    Alias(versions::AliasCommand),
    /// Publish, list and remove layers: folders that functions share.
    #[command(subcommand)]
    Layers(layers::LayersCommand),
    /// Configure where functions answer HTTP.
    #[command(subcommand)]
    Url(url::UrlCommand),
    /// Make, list, disable and remove access keys.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Build, list, inspect, verify and remove snapshots.
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Measure what a request costs, part by part.
    Bench(bench::BenchArgs),
    /// Run a command in the lab, the emulated KVM host.
    Lab(lab::LabArgs),
    /// Print completions for a shell: `source <(thaw completions bash)`.
    Completions {
        /// bash, zsh, fish, …
        shell: clap_complete::Shell,
    },
}

impl Command {
    /// It has no processes or files of its own that its sudden end would leave behind.
    fn only_prints(&self) -> bool {
        match self {
            Self::Doctor
            | Self::Invoke(_)
            | Self::Logs(_)
            | Self::Ls
            | Self::Versions(_)
            | Self::Alias(_)
            | Self::Layers(_)
            | Self::Url(_)
            | Self::Keys(_)
            | Self::Completions { .. } => true,
            Self::Up(_)
            | Self::Init(_)
            | Self::Deploy(_)
            | Self::Dev(_)
            | Self::Rm(_)
            | Self::Snapshot(_)
            | Self::Bench(_)
            | Self::Lab(_) => false,
        }
    }
}

impl Global {
    /// The folder that holds all state, absolute.
    fn home(&self) -> anyhow::Result<PathBuf> {
        let home = match &self.home {
            Some(home) => home.clone(),
            None => {
                let user =
                    std::env::home_dir().context("this user has no home folder: set THAW_HOME")?;
                user.join(".local/share/thaw")
            }
        };
        std::path::absolute(&home).with_context(|| format!("{} is no usable path", home.display()))
    }

    fn client(&self) -> anyhow::Result<Client> {
        let client = Client::trusting(&self.endpoint, self.ca.as_deref())?;
        Ok(client.signed_by(credentials::signer(&self.home()?)?))
    }

    fn format(&self) -> Format {
        if self.json {
            Format::Json
        } else {
            Format::Text
        }
    }
}

/// Parses, runs, and prints the one error there can be, with its causes.
pub fn main() -> ExitCode {
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("THAW_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("thaw: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let global = &cli.global;
    if cli.command.only_prints() {
        end_with_the_reader()?;
    }
    match &cli.command {
        Command::Up(args) => up::run(global, args),
        Command::Doctor => doctor::run(global),
        Command::Init(args) => init::run(args),
        Command::Dev(args) => wait(dev::run(global, args)),
        Command::Deploy(args) => wait(deploy::run(global, args)),
        Command::Invoke(args) => wait(invoke::run(global, args)),
        Command::Logs(args) => wait(logs::run(global, args)),
        Command::Ls => wait(list::ls(global)),
        Command::Rm(args) => wait(list::rm(global, args)),
        Command::Versions(command) => wait(versions::run(global, command)),
        Command::Alias(command) => wait(versions::alias(global, command)),
        Command::Layers(command) => wait(layers::run(global, command)),
        Command::Url(command) => wait(url::run(global, command)),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "thaw", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Keys(command) => wait(keys::run(global, command)),
        Command::Snapshot(command) => snapshot::run(global, command),
        Command::Bench(args) => bench::run(global, args),
        Command::Lab(args) => lab::run(global, args),
    }
}

/// Whoever reads what a command prints may have had enough (`thaw ls | head`): the command ends as others do, by SIGPIPE. Rust
/// ignores that signal, for which printing then panics.
fn end_with_the_reader() -> anyhow::Result<()> {
    let always = Arc::new(AtomicBool::new(true));
    signal_hook::flag::register_conditional_default(signal_hook::consts::SIGPIPE, always)
        .context("cannot prepare for a reader that leaves")?;
    Ok(())
}

/// Runs a command that speaks to a gateway.
fn wait<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .context("cannot start the I/O runtime")?
        .block_on(command)
}
