//! `thaw invoke`: one call, its answer on standard output.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::Global;
use super::output::{self, Format};

#[derive(Args)]
pub struct InvokeArgs {
    /// Function name; a version or an alias may follow behind a colon.
    name: String,
    /// The event, JSON; `-` reads it from standard input.
    #[arg(short, long, default_value = "{}")]
    data: String,
    /// Print what the function wrote, on standard error.
    #[arg(long)]
    tail: bool,
    /// Do not wait for the answer: the gateway keeps the event and tries again when the function fails.
    #[arg(long, conflicts_with = "tail")]
    event: bool,
}

pub async fn run(global: &Global, args: &InvokeArgs) -> anyhow::Result<ExitCode> {
    let mut payload = args.data.clone().into_bytes();
    if args.data == "-" {
        payload.clear();
        std::io::stdin()
            .read_to_end(&mut payload)
            .context("cannot read standard input")?;
    }
    if args.event {
        let id = global.client()?.send_event(&args.name, payload).await?;
        match global.format() {
            Format::Json => output::json(&json!({ "requestId": id }))?,
            Format::Text => println!(
                "accepted as {id}: `thaw logs {}` shows what becomes of it",
                function_of(&args.name)
            ),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let answer = global.client()?.invoke(&args.name, payload, false).await?;
    if global.format() == Format::Json {
        let body = serde_json::from_slice(&answer.payload)
            .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&answer.payload).into_owned()));
        output::json(
            &json!({ "payload": body, "functionError": answer.function_error, "log": answer.log }),
        )?;
    } else {
        let mut out = std::io::stdout();
        out.write_all(&answer.payload)
            .and_then(|()| out.write_all(b"\n"))
            .context("cannot print the answer")?;
    }
    if args.tail || answer.function_error.is_some() {
        eprint!("{}", answer.log);
    }
    Ok(if answer.function_error.is_some() {
        ExitCode::from(super::FAILED)
    } else {
        ExitCode::SUCCESS
    })
}

fn function_of(name: &str) -> &str {
    name.split(':').next().unwrap_or(name)
}
