//! `thaw-loadtest`: a closed loop of clients against any HTTP URL.
//!
//! Owns: sending requests and counting what came back. Must not know: anything of Thaw but HTTP.
//! A closed loop measures what a client sees when it waits for each answer: it says nothing of an overloaded server's
//! queue, because a slow server slows its own load down.
#![forbid(unsafe_code)]

mod closed_loop;
mod report;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use closed_loop::Plan;

/// Sends requests from a number of clients, each waiting for its answer before the next.
#[derive(Parser)]
#[command(name = "thaw-loadtest", version)]
struct Args {
    /// Where to send requests, for instance http://127.0.0.1:8080/fn/hello/
    url: String,
    /// Clients at work at the same time.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,
    /// Requests of each client.
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    requests: u32,
    /// Body to POST; without it the requests are GETs.
    #[arg(short, long)]
    data: Option<String>,
    /// Text that every good answer contains.
    #[arg(long)]
    expect: Option<String>,
    /// Longest wait for one answer, seconds.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let plan = Plan {
        url: args.url,
        clients: args.clients,
        requests_per_client: args.requests,
        body: args.data,
        expect: args.expect,
        timeout: Duration::from_secs(args.timeout),
    };
    let report = closed_loop::run(&plan).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(if report.errors.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
