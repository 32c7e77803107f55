//! `thaw logs`: what a function wrote.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use futures_util::StreamExt as _;

use super::Global;
use super::output::{self, Format};

#[derive(Args)]
pub struct LogsArgs {
    /// Function name.
    name: String,
    /// Go on printing what comes.
    #[arg(short, long)]
    follow: bool,
    /// Lines from the past.
    #[arg(short = 'n', long, default_value_t = 100)]
    tail: u32,
}

pub async fn run(global: &Global, args: &LogsArgs) -> anyhow::Result<ExitCode> {
    let mut chunks = global
        .client()?
        .logs(&args.name, args.follow, args.tail)
        .await?;
    let mut pending = Vec::new();
    while let Some(chunk) = chunks.next().await {
        match global.format() {
            Format::Text => {
                let mut out = std::io::stdout();
                out.write_all(&chunk?)
                    .and_then(|()| out.flush())
                    .context("cannot print")?;
            }
            Format::Json => {
                pending.extend_from_slice(&chunk?);
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    output::json(&String::from_utf8_lossy(&line).trim_end())?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
