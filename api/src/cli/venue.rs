//! Where work that needs KVM runs: on this machine if its KVM is good, in the lab if not. It is said which, always.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::ValueEnum;
use thaw_lab::host::{self, KvmVerdict};
use thaw_lab::{Lab, LabRun, PortForward, Stream};

use super::progress::Steps;

/// Memory of the lab, MiB; taken as it is used.
const LAB_MEMORY_MIB: u32 = 6144;

/// Processors of the lab.
const LAB_CPU_COUNT: u8 = thaw_lab::CPU_COUNT_DEFAULT;

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LabChoice {
    /// The lab if this machine's KVM is missing or too slow.
    Auto,
    /// The lab in any case.
    Always,
    /// Never the lab: this machine's KVM or nothing.
    Never,
}

/// Where it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Venue {
    /// On this machine.
    Native,
    /// In the lab, for this reason.
    Lab(String),
}

impl Venue {
    /// Decides.
    pub fn choose(choice: LabChoice) -> Self {
        match choice {
            LabChoice::Never => Self::Native,
            LabChoice::Always => Self::Lab("--lab always was asked for".into()),
            LabChoice::Auto => match host::kvm_verdict() {
                KvmVerdict::Native { .. } => Self::Native,
                KvmVerdict::Lab { reason } => Self::Lab(reason),
            },
        }
    }

    /// For people.
    pub fn describe(&self) -> String {
        match self {
            Self::Native => "this machine's own KVM".into(),
            Self::Lab(reason) => format!("the lab, an emulated KVM host, because {reason}"),
        }
    }
}

/// A command of ours, run again inside the lab.
pub struct InLab<'a> {
    /// THAW_HOME: writable, and the lab's files are below it.
    pub home: &'a Path,
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Other folders it may write to.
    pub writable: Vec<PathBuf>,
    /// Ports of this machine that lead to the same port in the lab.
    pub ports: Vec<u16>,
}

impl InLab<'_> {
    /// Builds the lab if need be, runs the command in it with our streams and signals, and returns its exit code.
    ///
    /// # Errors
    /// The lab cannot be built or started.
    pub fn run(self, steps: &mut Steps) -> anyhow::Result<ExitCode> {
        let lab = Lab::new(self.home.join("lab"));
        lab.build(&mut |step| steps.begin(&format!("lab: {step}")))
            .context("cannot build the lab")?;
        let saved = lab.save(LAB_MEMORY_MIB, LAB_CPU_COUNT, &mut |step| {
            steps.begin(&format!("lab: {step}"));
        });
        steps.end();
        if let Err(error) = saved {
            steps.note(&format!("lab: it will boot each time, for its state cannot be saved: {error}"));
        }
        let cwd = std::env::current_dir().context("the working folder is gone")?;
        let mut run = LabRun::new(self.command, cwd);
        run.writable = self.writable;
        run.writable.push(self.home.to_owned());
        run.forwards = self
            .ports
            .into_iter()
            .map(|port| PortForward {
                host: port,
                lab: port,
            })
            .collect();
        run.memory_mib = LAB_MEMORY_MIB;
        run.cpu_count = LAB_CPU_COUNT;
        run.stdin = Stream::Inherit;
        run.signals = Some(thaw_lab::signals::of_this_process().context("cannot catch signals")?);
        let code = lab
            .run(run, &mut |notice| eprintln!("lab: {notice}"))
            .context("the lab failed")?;
        Ok(ExitCode::from(u8::try_from(code).unwrap_or(super::FAILED)))
    }
}
