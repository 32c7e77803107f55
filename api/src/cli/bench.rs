//! `thaw bench`: what a pristine machine costs, from bare KVM calls to a function's answer over HTTP, in one run.
//!
//! Two parts, and one that is asked for by name. [`hello`] calls examples/hello on claimed, rewound and warm sandboxes through gateways of its own, in turns;
//! [`restore`] lets `thaw-bench` measure the floor, the monitor, and Firecracker if it is named. That one writes the report
//! of both. `--part idle` lets it keep many clones alive at once.

mod hello;
mod restore;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::Global;
use super::installation::Installation;
use super::output::{self, Format};
use super::progress::Steps;
use super::up::prepare_images;
use super::venue::{InLab, LAB_MEMORY_MIB_ASKED, LabChoice, Venue};

#[derive(Args)]
pub struct BenchArgs {
    /// Samples of each side.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Firecracker's program, to be measured beside: same kernel, same memory, same answer.
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Clones alive at once when memory is looked at.
    #[arg(long, default_value_t = 8)]
    clones: u32,
    /// Clones alive at once with `--part idle`.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    idle_clones: u32,
    /// What to measure.
    #[arg(long, value_enum, default_value_t = Part::All)]
    part: Part,
    /// Folder for report.json and report.svg; by default `bench` in the state folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where sandboxes run.
    #[arg(long, value_enum, default_value_t = LabChoice::Auto)]
    lab: LabChoice,
    /// A lab with nested paging instead of shadow page tables: nearer to metal, but QEMU 7.2 does it wrongly now and then.
    #[arg(long)]
    nested_paging: bool,
    /// The lab's memory, MiB; by default half of this machine's, at least 3072 and at most 12288.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(LAB_MEMORY_MIB_ASKED))]
    lab_memory: Option<u32>,
    /// Set when this process was started inside the lab by another one; the reason.
    #[arg(long, hide = true)]
    in_lab: bool,
}

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Function and restore; only so is every ratio there.
    All,
    /// A function over HTTP, and nothing below.
    Function,
    /// Virtual machines, without a gateway.
    Restore,
    /// Many idle clones alive at once: their memory, and that each answers.
    Idle,
}

pub fn run(global: &Global, args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let (home, installation) = (global.home()?, Installation::locate()?);
    let programs = restore::Programs::beside(&installation)?;
    let out = args.out.clone().unwrap_or_else(|| home.join("bench"));
    let mut steps = Steps::new();
    if !args.in_lab {
        fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
        let venue = Venue::choose(args.lab);
        eprintln!("thaw: sandboxes in {}", venue.describe());
        prepare_images(&home, &installation, &mut steps)?;
        programs.prepare(&home, &mut steps)?;
        if let Venue::Lab(_) = venue {
            let mut in_lab = InLab::this_command(&home, &installation);
            in_lab.writable.push(out);
            in_lab.memory_mib = args.lab_memory;
            in_lab.paging = InLab::paging(args.nested_paging);
            return in_lab.run(&mut steps);
        }
    }
    let samples = match args.part {
        Part::Idle => {
            let json = out.join("idle.json");
            return programs.run_idle(&home, args.idle_clones, &json, global.format());
        }
        Part::Restore => None,
        Part::All | Part::Function => {
            Some(function_part(global, &home, &installation, args, &out)?)
        }
    };
    if args.part == Part::Function {
        return Ok(ExitCode::SUCCESS);
    }
    let order = restore::Order {
        rounds: args.rounds,
        clones: args.clones,
        firecracker: args.firecracker.clone(),
        function: samples,
        json: out.join("report.json"),
        svg: out.join("report.svg"),
    };
    programs.run(&home, &order, global.format())
}

/// Measures the function, writes its samples, and tells its parts.
fn function_part(
    global: &Global,
    home: &Path,
    installation: &Installation,
    args: &BenchArgs,
    out: &Path,
) -> anyhow::Result<PathBuf> {
    let folder = tempfile::tempdir_in(home).context("cannot make a folder for the bench")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the I/O runtime")?;
    let stage = hello::Stage {
        home,
        folder: folder.path(),
        installation,
    };
    let samples = runtime.block_on(stage.measure(args.rounds, &mut Steps::new()))?;
    let path = out.join("function.json");
    fs::write(&path, serde_json::to_vec_pretty(&samples.sides())?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    // With --json, standard output is one document.
    if global.format() == Format::Text {
        samples.print()?;
    } else if args.part == Part::Function {
        output::json(&samples.sides())?;
    }
    Ok(path)
}
