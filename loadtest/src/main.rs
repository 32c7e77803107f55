//! `thaw-loadtest`: load on any HTTP URL, and what came back.
//!
//! Owns: when requests are sent, and counting what came of them. Must not know: anything of Thaw but HTTP and one
//! response header, `x-thaw-start`.
//! Start at [`open_loop`] (a rate) and [`closed_loop`] (clients that wait).
#![forbid(unsafe_code)]

mod closed_loop;
mod open_loop;
mod report;
mod request;
mod start;
mod tally;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;

use open_loop::Arrivals;
use report::Report;
use request::{Sender, Target};

/// Sends requests: from a number of clients, each waiting for its answer before the next (closed loop), or at a rate
/// that no answer slows down (open loop, with --rate).
#[derive(Parser)]
#[command(name = "thaw-loadtest", version)]
struct Args {
    /// Where to send requests, for instance http://127.0.0.1:8080/fn/hello/
    url: reqwest::Url,
    /// Closed loop: clients at work at the same time.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000), conflicts_with = "rate")]
    clients: u32,
    /// Requests: of each client (closed loop), or of the whole run (open loop).
    #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    requests: u32,
    /// Open loop: requests a second.
    #[arg(short, long)]
    rate: Option<f64>,
    /// Open loop: for so many seconds, instead of -n.
    #[arg(long, requires = "rate", conflicts_with = "requests")]
    seconds: Option<f64>,
    /// Open loop: how requests follow each other.
    #[arg(long, value_enum, default_value_t = Arrivals::Constant, requires = "rate")]
    arrivals: Arrivals,
    /// Open loop: seed of Poisson arrivals.
    #[arg(long, default_value_t = 1, requires = "rate")]
    seed: u64,
    /// Open loop: most requests without an answer; further ones wait, and their waiting counts.
    #[arg(long, default_value_t = 1000, requires = "rate")]
    in_flight_max: usize,
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
    /// Write the whole latency distributions to this file.
    #[arg(long, value_name = "FILE")]
    percentiles: Option<PathBuf>,
}

impl Args {
    fn open_plan(&self, rate: f64) -> anyhow::Result<open_loop::Plan> {
        ensure!(
            rate > 0.0 && rate <= 1e6,
            "--rate must be above 0 and at most 1000000"
        );
        ensure!(self.in_flight_max > 0, "--in-flight-max must be above 0");
        let requests = match self.seconds {
            Some(seconds) => {
                ensure!(
                    seconds > 0.0 && seconds <= 86_400.0,
                    "--seconds must be above 0 and at most a day"
                );
                Duration::from_secs_f64((seconds * rate).ceil())
                    .as_secs()
                    .max(1)
            }
            None => self.requests.into(),
        };
        Ok(open_loop::Plan {
            rate,
            arrivals: self.arrivals,
            seed: self.seed,
            requests,
            in_flight_max: self.in_flight_max,
        })
    }
}

async fn run(args: &Args) -> anyhow::Result<Report> {
    let sender = Sender::new(Target {
        url: args.url.clone(),
        body: args.data.clone().map(Into::into),
        expect: args.expect.clone(),
        timeout: Duration::from_secs(args.timeout),
    })?;
    match args.rate {
        Some(rate) => open_loop::run(args.open_plan(rate)?, &sender).await,
        None => {
            let plan = closed_loop::Plan {
                clients: args.clients,
                requests_per_client: args.requests,
            };
            closed_loop::run(plan, &sender).await
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let report = run(&args).await?;
    if let Some(path) = &args.percentiles {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        report
            .write_percentiles(&mut BufWriter::new(file))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
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
