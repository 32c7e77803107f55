//! The part below the gateway: `thaw-bench`, a process of its own, because it makes virtual machines itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, ensure};
use thaw_images::ImageStore;

use crate::cli::installation::Installation;
use crate::cli::output::Format;
use crate::cli::progress::Steps;

/// What the part needs beside an ordinary installation.
pub struct Programs {
    bench: PathBuf,
    guest: PathBuf,
    vmm: PathBuf,
}

/// What to measure, and where to write it.
pub struct Order {
    /// Samples of each side.
    pub rounds: u32,
    /// Clones alive at once when memory is looked at.
    pub clones: u32,
    /// Firecracker's program.
    pub firecracker: Option<PathBuf>,
    /// Samples of the other part.
    pub function: Option<PathBuf>,
    /// The report.
    pub json: PathBuf,
    /// Its picture.
    pub svg: PathBuf,
}

impl Programs {
    /// Finds them.
    ///
    /// # Errors
    /// One is missing; the message says how to build it.
    pub fn beside(installation: &Installation) -> anyhow::Result<Self> {
        let programs = Self {
            bench: installation.thaw.with_file_name("thaw-bench"),
            guest: installation.agent.with_file_name("thaw-bench-guest"),
            vmm: installation.vmm.clone(),
        };
        for program in [&programs.bench, &programs.guest] {
            ensure!(
                program.is_file(),
                "{} is missing: run `make build`",
                program.display()
            );
        }
        Ok(programs)
    }

    /// Makes what the bench's guest boots from; the kernel is everybody's.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn prepare(&self, home: &Path, steps: &mut Steps) -> anyhow::Result<(PathBuf, PathBuf)> {
        let store = ImageStore::new(home);
        let kernel = store
            .kernel(steps)
            .context("cannot make the guest kernel")?;
        let initramfs = store
            .initramfs(&kernel, &self.guest)
            .context("cannot make the bench's initramfs")?;
        steps.end();
        Ok((kernel.vmlinux, initramfs.path))
    }

    /// Measures. Its text goes to our standard output, or the JSON that it wrote.
    ///
    /// # Errors
    /// It cannot be started or failed.
    pub fn run(&self, home: &Path, order: &Order, format: Format) -> anyhow::Result<ExitCode> {
        let (kernel, initramfs) = self.prepare(home, &mut Steps::new())?;
        let mut command = Command::new(&self.bench);
        command.arg("restore");
        let named = [
            ("--kernel", &kernel),
            ("--initramfs", &initramfs),
            ("--vmm", &self.vmm),
            ("--json", &order.json),
            ("--svg", &order.svg),
        ];
        for (name, path) in named {
            command.arg(name).arg(path);
        }
        command.arg("--work").arg(home);
        command.args(["--rounds", &order.rounds.to_string()]);
        command.args(["--clones", &order.clones.to_string()]);
        let optional = [
            ("--firecracker", &order.firecracker),
            ("--function", &order.function),
        ];
        for (name, path) in optional {
            if let Some(path) = path {
                command.arg(name).arg(path);
            }
        }
        if format == Format::Json {
            command.stdout(Stdio::null());
        }
        let status = command
            .status()
            .with_context(|| format!("cannot start {}", self.bench.display()))?;
        ensure!(status.success(), "thaw-bench failed, {status}");
        match format {
            Format::Json => {
                let text = fs::read_to_string(&order.json).context("thaw-bench wrote no report")?;
                println!("{text}");
            }
            Format::Text => println!(
                "written: {} and {}",
                order.json.display(),
                order.svg.display()
            ),
        }
        Ok(ExitCode::SUCCESS)
    }
}
