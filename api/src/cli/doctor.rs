//! `thaw doctor`: can this machine run sandboxes, how, and what is missing.

use std::process::ExitCode;

use thaw_lab::host::{self, KvmVerdict, Status};

use super::{Global, output, output::Format};

pub fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let report = host::report(&global.home()?);
    if global.format() == Format::Json {
        output::json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    for check in &report.checks {
        let mark = match check.status {
            Status::Ok => "ok  ",
            Status::Warn => "warn",
            Status::Missing => "MISS",
        };
        println!("{mark}  {:<18} {}", check.name, check.detail);
        if let Some(remedy) = &check.remedy {
            println!("      {:<18} → {remedy}", "");
        }
    }
    match &report.kvm {
        KvmVerdict::Native { .. } => println!("\nSandboxes run on this machine's own KVM."),
        KvmVerdict::Lab { reason } => println!(
            "\nSandboxes run in the lab, an emulated KVM host, because {reason}.\n\
             Everything works there, about ten times slower than on real KVM."
        ),
    }
    Ok(ExitCode::SUCCESS)
}
