//! `thaw lab -- COMMAND`: any command in the lab.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Global;
use super::progress::Steps;
use super::venue::{InLab, LAB_MEMORY_MIB_ASKED, WhenLost};

#[derive(Args)]
pub struct LabArgs {
    /// Folder that the command may write to; the working folder is always one.
    #[arg(short, long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// Port of this machine's loopback that leads to the same port in the lab.
    #[arg(short, long, value_name = "PORT")]
    port: Vec<u16>,
    /// Nested paging instead of shadow page tables: nearer to metal, but QEMU 7.2 does it wrongly now and then.
    #[arg(long)]
    nested_paging: bool,
    /// The lab's memory, MiB; by default half of this machine's, at least 3072 and at most 12288.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(LAB_MEMORY_MIB_ASKED))]
    memory: Option<u32>,
    /// Program and arguments.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

pub fn run(global: &Global, args: &LabArgs) -> anyhow::Result<ExitCode> {
    let home = global.home()?;
    std::fs::create_dir_all(&home)?;
    let mut writable = args.writable.clone();
    writable.push(std::env::current_dir()?);
    let command = args.command.clone();
    InLab {
        home: &home,
        command,
        writable,
        ports: args.port.clone(),
        paging: InLab::paging(args.nested_paging),
        memory_mib: args.memory,
        when_lost: WhenLost::Fail,
    }
    .run(&mut Steps::new())
}
