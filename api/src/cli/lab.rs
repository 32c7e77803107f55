//! `thaw lab -- COMMAND`: any command in the lab.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Global;
use super::progress::Steps;
use super::venue::{InLab, WhenLost};

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
        when_lost: WhenLost::Fail,
    }
    .run(&mut Steps::new())
}
