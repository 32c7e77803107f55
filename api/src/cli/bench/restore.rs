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
        let mut command = self.command("restore", home, &order.json)?;
        command.arg("--svg").arg(&order.svg);
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
        self.tell(command, &[&order.json, &order.svg], format)
    }

    /// Keeps that many clones alive at once, and writes what they cost to `json`.
    ///
    /// # Errors
    /// As [`Self::run`]; the machine's memory will not do.
    pub fn run_idle(
        &self,
        home: &Path,
        clones: u32,
        json: &Path,
        format: Format,
    ) -> anyhow::Result<ExitCode> {
        let mut command = self.command("idle", home, json)?;
        command.args(["--clones", &clones.to_string()]);
        self.tell(command, &[json], format)
    }

    /// What every part is told.
    fn command(&self, part: &str, home: &Path, json: &Path) -> anyhow::Result<Command> {
        let (kernel, initramfs) = self.prepare(home, &mut Steps::new())?;
        let mut command = Command::new(&self.bench);
        command.arg(part);
        let named = [
            ("--kernel", kernel.as_path()),
            ("--initramfs", initramfs.as_path()),
            ("--vmm", self.vmm.as_path()),
            ("--json", json),
            ("--work", home),
        ];
        for (name, path) in named {
            command.arg(name).arg(path);
        }
        Ok(command)
    }

    /// Runs it; the first of the files that it writes is JSON.
    fn tell(
        &self,
        mut command: Command,
        written: &[&Path],
        format: Format,
    ) -> anyhow::Result<ExitCode> {
        if format == Format::Json {
            command.stdout(Stdio::null());
        }
        let status = command
            .status()
            .with_context(|| format!("cannot start {}", self.bench.display()))?;
        ensure!(status.success(), "thaw-bench failed, {status}");
        match (format, written.first()) {
            (Format::Json, Some(json)) => {
                let text = fs::read_to_string(json).context("thaw-bench wrote no report")?;
                println!("{text}");
            }
            _ => {
                let names: Vec<String> = written
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect();
                println!("written: {}", names.join(" and "));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
