//! `thaw-bench`: what restoring a VM costs, beside the bare KVM calls and beside Firecracker, in one run.
//!
//! Owns: measuring. Must not know: functions, the pool; what it is given of those (`--function`) it only prints.
//! Start at [`restore::run`]; `thaw bench` calls it and [`idle::run`], in the lab where this machine's own KVM is no good. [`gateway::run`]
//! measures the gateway without any guest, on the machine itself.
//!
//! Always holds: sides are interleaved, never one after the other; cold, claimed, rewound and warm are never in one figure;
//! a side that was not measured is null with a reason, not left out.

mod bare;
mod echo;
mod firecracker;
mod floor;
mod gateway;
mod idle;
mod instant;
mod memory;
mod ours;
mod report;
mod restore;
mod stats;
mod svg;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};

use report::{Host, Report};
use restore::{Findings, Plan};

#[derive(Parser)]
#[command(name = "thaw-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Floor, claim, rewind, warm, and Firecracker if it is named, interleaved.
    Restore(RestoreArgs),
    /// Many clones of one snapshot alive at once: their memory, and that each answers.
    Idle(IdleArgs),
    /// The gateway's own share of a request: `thaw up` on one processor, over monitors that answer at once.
    Gateway(GatewayArgs),
}

#[derive(Args)]
struct GatewayArgs {
    /// THAW_HOME with images in it (after a first `thaw up`); nothing of it is changed.
    #[arg(long, value_name = "DIR")]
    home: PathBuf,
    /// Folder of the example function `hello`.
    #[arg(long, value_name = "DIR")]
    example: PathBuf,
    /// Requests of each step.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Clients at the same time, step by step.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16, 32], value_parser = clap::value_parser!(u32).range(1..=1000))]
    clients: Vec<u32>,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct IdleArgs {
    /// Guest kernel, ELF vmlinux.
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs with thaw-bench-guest as /init.
    #[arg(long)]
    initramfs: PathBuf,
    /// Thaw's monitor.
    #[arg(long)]
    vmm: PathBuf,
    /// Existing folder for the snapshot.
    #[arg(long, value_name = "DIR")]
    work: PathBuf,
    /// Clones alive at once.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clones: u32,
    /// Memory of a guest, MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(64..=2048))]
    memory_mib: u32,
    /// Write JSON here.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct RestoreArgs {
    /// Guest kernel, ELF vmlinux.
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs with thaw-bench-guest as /init.
    #[arg(long)]
    initramfs: PathBuf,
    /// Thaw's monitor; by default the one beside this program.
    #[arg(long)]
    vmm: Option<PathBuf>,
    /// Firecracker's program, to be measured too.
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Existing folder for snapshots; what they need is a few times the guest's memory.
    #[arg(long, value_name = "DIR")]
    work: PathBuf,
    /// Samples of each side.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Clones alive at once when memory is looked at.
    #[arg(long, default_value_t = 8)]
    clones: usize,
    /// Memory of a guest, MiB.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(64..=2048))]
    memory_mib: u32,
    /// Figures of a function to be told with the others: JSON, name of a side to samples in microseconds.
    #[arg(long, value_name = "FILE")]
    function: Option<PathBuf>,
    /// Write JSON here.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a picture here.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    fs::canonicalize(path).with_context(|| format!("there is no {}", path.display()))
}

fn idle_command(args: IdleArgs) -> anyhow::Result<ExitCode> {
    let work = tempfile::tempdir_in(absolute(&args.work)?).context("cannot make a folder")?;
    let report = idle::run(&idle::Plan {
        kernel: absolute(&args.kernel)?,
        initramfs: absolute(&args.initramfs)?,
        vmm: absolute(&args.vmm)?,
        work: work.path().to_owned(),
        clones: args.clones,
        memory_mib: args.memory_mib,
    })?;
    if let Some(path) = &args.json {
        write(path, &serde_json::to_string_pretty(&report)?)?;
    }
    print!("{}", report.text());
    Ok(ExitCode::SUCCESS)
}

fn restore_command(args: RestoreArgs) -> anyhow::Result<ExitCode> {
    let vmm = match &args.vmm {
        Some(vmm) => vmm.clone(),
        None => std::env::current_exe()?.with_file_name("thaw-vmm"),
    };
    let work = tempfile::tempdir_in(absolute(&args.work)?).context("cannot make a folder")?;
    let plan = Plan {
        kernel: absolute(&args.kernel)?,
        initramfs: absolute(&args.initramfs)?,
        vmm: absolute(&vmm)?,
        firecracker: args.firecracker.as_deref().map(absolute).transpose()?,
        work: work.path().to_owned(),
        rounds: args.rounds,
        clones: args.clones,
        memory_mib: args.memory_mib,
    };
    let tell = |findings: &Findings| -> anyhow::Result<Report> {
        let mut findings = findings.clone();
        if let Some(path) = &args.function {
            add_function(path, &mut findings)?;
        }
        let report = Report::new(&plan, findings, Host::this());
        if let Some(path) = &args.svg {
            let (rounds, memory) = (report.rounds, report.memory_mib);
            let title = format!("{rounds} rounds, {memory} MiB, {}", report.host.processor);
            write(path, &svg::draw(&title, &report.sides))?;
        }
        if let Some(path) = &args.json {
            write(path, &serde_json::to_string_pretty(&report)?)?;
        }
        Ok(report)
    };
    let findings = restore::run(&plan, &mut |findings| tell(findings).map(drop))?;
    let report = tell(&findings)?;
    print!("{}", report.text());
    Ok(ExitCode::SUCCESS)
}

fn gateway_command(args: GatewayArgs) -> anyhow::Result<ExitCode> {
    let this = std::env::current_exe().context("cannot tell where this program is")?;
    let plan = gateway::Plan {
        installation: this
            .parent()
            .context("this program is in no folder")?
            .to_owned(),
        home: absolute(&args.home)?,
        example: absolute(&args.example)?,
        requests: args.requests,
        clients: args.clients,
    };
    let findings = gateway::run(&plan)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print!("{}", findings.text());
    }
    Ok(ExitCode::SUCCESS)
}

fn add_function(path: &Path, findings: &mut Findings) -> anyhow::Result<()> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let sides: BTreeMap<String, Vec<u64>> = serde_json::from_str(&text)
        .with_context(|| format!("cannot understand {}", path.display()))?;
    for (side, samples) in sides {
        for sample in samples {
            findings.series.add(&side, Duration::from_micros(sample));
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn main() -> anyhow::Result<ExitCode> {
    let name = std::env::args_os().next().map(PathBuf::from);
    if name.is_some_and(|name| name.ends_with(instant::PLAYED_NAME)) {
        instant::play()?;
        return Ok(ExitCode::SUCCESS);
    }
    match Cli::parse().command {
        Command::Restore(args) => restore_command(args),
        Command::Idle(args) => idle_command(args),
        Command::Gateway(args) => gateway_command(args),
    }
}
