//! Where work that needs KVM runs: on this machine if its KVM is good, in the lab if not. It is said which, always.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::ValueEnum;
use thaw_lab::host::{self, KvmVerdict};
use thaw_lab::{Lab, LabRun, Paging, PortForward, RunError, Stream};

use super::installation::Installation;
use super::progress::Steps;

/// Memory of the lab, MiB: half of this machine's within these bounds. It is taken as it is used; where the lab's kernel has
/// to reclaim memory in the middle of many sandboxes, emulation becomes slow and brittle.
const LAB_MEMORY_MIB: std::ops::RangeInclusive<u64> = 3072..=12288;
/// Memory that a lab can be asked to have, MiB.
pub const LAB_MEMORY_MIB_ASKED: std::ops::RangeInclusive<i64> = 1024..=1_048_576;
/// How often a gateway's lab is started again after it was lost. Its state is on disk, so a restart costs the requests
/// that were running.
const LAB_RESTARTS_MAX: u32 = 3;

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

/// What to do if the lab itself dies under its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenLost {
    /// Say so.
    Fail,
    /// Start it and the command again: for a command whose state is on disk.
    StartAgain,
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
    /// How its guests are paged.
    pub paging: Paging,
    /// Its memory, MiB; by default some of this machine's.
    pub memory_mib: Option<u32>,
    /// What to do if the lab itself dies.
    pub when_lost: WhenLost,
}

impl<'a> InLab<'a> {
    /// The command line of this very process, told by `--in-lab` where it runs.
    pub fn this_command(home: &'a Path, installation: &Installation) -> Self {
        let mut command: Vec<OsString> = vec![installation.thaw.clone().into()];
        command.extend(std::env::args_os().skip(1));
        command.push("--in-lab".into());
        Self {
            home,
            command,
            writable: Vec::new(),
            ports: Vec::new(),
            paging: Paging::default(),
            memory_mib: None,
            when_lost: WhenLost::Fail,
        }
    }

    /// Builds the lab if need be, runs the command in it with our streams and signals, and returns its exit code.
    ///
    /// # Errors
    /// The lab cannot be built or started.
    pub fn run(self, steps: &mut Steps) -> anyhow::Result<ExitCode> {
        let lab = Lab::new(self.home.join("lab")).with_paging(self.paging);
        lab.build(&mut |step| steps.begin(&format!("lab: {step}")))
            .context("cannot build the lab")?;
        let memory_mib = self.memory_mib.unwrap_or_else(lab_memory_mib);
        let saved = lab.save(memory_mib, LAB_CPU_COUNT, &mut |step| {
            steps.begin(&format!("lab: {step}"));
        });
        steps.end();
        if let Err(error) = saved {
            steps.note(&format!(
                "lab: it will boot each time, for its state cannot be saved: {error}"
            ));
        }
        let mut restarts = match self.when_lost {
            WhenLost::Fail => 0,
            WhenLost::StartAgain => LAB_RESTARTS_MAX,
        };
        loop {
            let lost = match lab.run(self.lab_run(memory_mib)?, &mut |notice| {
                eprintln!("lab: {notice}")
            }) {
                Ok(code) => return Ok(ExitCode::from(u8::try_from(code).unwrap_or(super::FAILED))),
                Err(lost @ RunError::Lost { .. }) if restarts > 0 => lost,
                Err(error) => return Err(error).context("the lab failed"),
            };
            restarts -= 1;
            eprintln!("lab: {lost}\nlab: started again");
        }
    }

    /// [`Paging::Nested`] if it is wanted.
    pub fn paging(nested: bool) -> Paging {
        if nested {
            Paging::Nested
        } else {
            Paging::Shadow
        }
    }

    fn lab_run(&self, memory_mib: u32) -> anyhow::Result<LabRun> {
        let cwd = std::env::current_dir().context("the working folder is gone")?;
        let mut run = LabRun::new(self.command.clone(), cwd);
        run.writable.clone_from(&self.writable);
        run.writable.push(self.home.to_owned());
        let forward = |&port| PortForward {
            host: port,
            lab: port,
        };
        run.forwards = self.ports.iter().map(forward).collect();
        run.env.retain(|(name, _)| name != "THAW_HOME");
        run.env.push(("THAW_HOME".into(), self.home.into()));
        run.memory_mib = memory_mib;
        run.cpu_count = LAB_CPU_COUNT;
        run.stdin = Stream::Inherit;
        run.signals = Some(thaw_lab::signals::of_this_process().context("cannot catch signals")?);
        Ok(run)
    }
}

fn lab_memory_mib() -> u32 {
    let half = host::memory_total_mib().unwrap_or(0) / 2;
    u32::try_from(half.clamp(*LAB_MEMORY_MIB.start(), *LAB_MEMORY_MIB.end()))
        .unwrap_or(thaw_lab::MEMORY_MIB_DEFAULT)
}
