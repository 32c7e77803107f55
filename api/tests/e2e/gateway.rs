//! A gateway for tests that have it killed: the real one, on real files, without the command line around it. A file tells at
//! which of its points it is to die. `--points` lists the points.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use thaw_api::gateway::{Confinement, Exposure, Gateway, GatewayConfig};
use thaw_runtime::{Point, arm};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
struct Args {
    /// List all points, and do nothing else.
    #[arg(long)]
    points: bool,
    #[arg(long, required_unless_present = "points")]
    home: Option<PathBuf>,
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// What plays the monitor.
    #[arg(long, default_value = "thaw-vmm")]
    vmm: PathBuf,
    #[arg(long, default_value = "thaw-agent")]
    agent: PathBuf,
    /// What makes networks. With it monitors are real ones: in their jails, with guests. Serves whom the lab forwards, too.
    #[arg(long)]
    egress: Option<PathBuf>,
    /// The file that names the point at which it is to die, when there is one.
    #[arg(long, default_value = "never")]
    trigger: PathBuf,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if args.points {
        for point in Point::ALL {
            println!("{}", point.name());
        }
        return Ok(ExitCode::SUCCESS);
    }
    arm(args.trigger.clone());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<ExitCode> {
    let address = match args.egress {
        Some(_) => "0.0.0.0",
        None => "127.0.0.1",
    };
    let listener = TcpListener::bind((address, args.port)).await?;
    let home = args.home.context("no home")?;
    let mut config = GatewayConfig::new(home, listener, args.vmm, args.agent);
    match args.egress {
        Some(_) => config.exposure = Exposure::ForwardedLoopback,
        None => config.confinement = Confinement::Nothing,
    }
    config.egress = args.egress;
    config.ready_count = 1;
    let gateway = Gateway::start(config).await?;
    let mut told = signal(SignalKind::terminate())?;
    gateway
        .run_until(async move {
            told.recv().await;
        })
        .await?;
    Ok(ExitCode::SUCCESS)
}
