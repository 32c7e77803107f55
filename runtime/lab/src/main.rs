//! `thaw-lab`: runs one command in the lab. `thaw lab` does the same.

#![forbid(unsafe_code)]

use clap::Parser;
use std::{
    ffi::OsString,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};
use thaw_lab::{Lab, LabRun, PortForward, RunError, StartMode, Stream, signals};

/// Run a command on an emulated KVM host: this machine's files, a real /dev/kvm, about ten times slower
#[derive(Debug, Parser)]
#[command(name = "thaw-lab", version)]
struct Arguments {
    /// Memory in MiB
    #[arg(short, long, default_value_t = thaw_lab::MEMORY_MIB_DEFAULT)]
    memory: u32,
    /// Processors
    #[arg(short, long, default_value_t = thaw_lab::CPU_COUNT_DEFAULT)]
    cpus: u8,
    /// Folder that the command may change; all other changes are lost
    #[arg(short, long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// 127.0.0.1:HOST leads to port LAB in the lab
    #[arg(short, long, value_name = "HOST:LAB", value_parser = forward)]
    port: Vec<PortForward>,
    /// End the command after this many seconds
    #[arg(short, long, value_name = "SECONDS")]
    time_limit: Option<u64>,
    /// Seconds between a signal and the end of the lab
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    grace: u64,
    /// Say what this host can do, as JSON, and run nothing
    #[arg(long, exclusive = true)]
    doctor: bool,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Boot instead of resuming a saved state
    #[arg(long)]
    boot: bool,
    /// Folder for the lab's files
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// The command
    #[arg(last = true, required_unless_present = "doctor")]
    command: Vec<OsString>,
}

fn forward(text: &str) -> Result<PortForward, String> {
    let (host, lab) = text.split_once(':').ok_or("expected HOST:LAB")?;
    let port = |text: &str| {
        text.parse::<u16>()
            .map_err(|error| format!("port {text}: {error}"))
    };
    Ok(PortForward {
        host: port(host)?,
        lab: port(lab)?,
    })
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err((code, error)) => {
            eprint!("thaw-lab: {error}");
            let mut cause = error.source();
            while let Some(source) = cause {
                eprint!(": {source}");
                cause = source.source();
            }
            eprintln!();
            ExitCode::from(code)
        }
    }
}

type Failure = (u8, Box<dyn std::error::Error>);

/// Codes of a failure that is not the command's are those of env(1) and timeout(1).
fn run(arguments: Arguments) -> Result<i32, Failure> {
    let failed = |error: Box<dyn std::error::Error>| (125, error);
    if arguments.doctor {
        let report = thaw_lab::host::report(&default_cache());
        let text = serde_json::to_string_pretty(&report).map_err(|error| failed(error.into()))?;
        println!("{text}");
        return Ok(0);
    }
    let lab = Lab::new(arguments.cache.unwrap_or_else(default_cache));
    let mut notice = |text: &str| eprintln!("thaw-lab: {text}");
    lab.build(&mut notice)
        .map_err(|error| failed(error.into()))?;
    if !arguments.boot
        && let Err(error) = lab.save(arguments.memory, arguments.cpus, &mut notice)
    {
        notice(&format!("no saved state, booting instead: {error}"));
    }
    let signals = signals::of_this_process().map_err(|error| failed(error.into()))?;
    let cwd = std::env::current_dir().map_err(|error| failed(error.into()))?;
    let run = LabRun {
        writable: arguments.writable,
        forwards: arguments.port,
        memory_mib: arguments.memory,
        cpu_count: arguments.cpus,
        grace: Duration::from_secs(arguments.grace),
        time_limit: arguments.time_limit.map(Duration::from_secs),
        stdin: if arguments.interactive || !std::io::stdin().is_terminal() {
            Stream::Inherit
        } else {
            Stream::Null
        },
        start: if arguments.boot {
            StartMode::Boot
        } else {
            StartMode::Resume
        },
        signals: Some(signals),
        ..LabRun::new(arguments.command, cwd)
    };
    lab.run(run, &mut notice).map_err(|error| {
        let code = match &error {
            RunError::Command { code, .. } => u8::try_from(*code).unwrap_or(126),
            RunError::TimeLimit(_) => 124,
            _ => 125,
        };
        (code, error.into())
    })
}

fn default_cache() -> PathBuf {
    let home = std::env::var_os("HOME").unwrap_or_else(|| OsString::from("/root"));
    let data = std::env::var_os("THAW_HOME").map(PathBuf::from);
    data.unwrap_or_else(|| Path::new(&home).join(".local/share/thaw"))
        .join("lab")
}
