//! `thaw bench`: what one request costs, part by part, measured inside one process group on one clock.
//!
//! It starts a gateway of its own on a state folder of its own, deploys examples/hello, and calls it over HTTP. Requests are
//! sent when a sandbox is ready, so that the figures are those of the request path; what was done ahead is its own row.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use thaw_api::engine::HostEngine;
use thaw_api::gateway::{Gateway, GatewayConfig};
use thaw_runtime::{Runtime, RuntimeConfig};
use tokio::net::TcpListener;

use super::client::{Client, Deployment};
use super::installation::Installation;
use super::output::{self, Format};
use super::progress::Steps;
use super::up::{prepare_images, stop_signal, wait_healthy};
use super::venue::{InLab, LabChoice, Venue};
use super::{Global, package};

const HELLO: &str = include_str!("../../../examples/hello/app.py");
const NAME: &str = "bench-hello";
/// Longest latency that is told apart, microseconds: ten minutes.
const LATENCY_MAX_US: u64 = 600_000_000;
/// Longest wait for a sandbox to become ready.
const READY_LIMIT: Duration = Duration::from_secs(120);

#[derive(Args)]
pub struct BenchArgs {
    /// Requests of each client.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Clients at the same time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    clients: u32,
    /// Sandboxes kept ready.
    #[arg(long, default_value_t = 2)]
    ready: usize,
    /// Where sandboxes run.
    #[arg(long, value_enum, default_value_t = LabChoice::Auto)]
    lab: LabChoice,
    /// Set when this process was started inside the lab by another one; the reason.
    #[arg(long, hide = true)]
    in_lab: bool,
}

/// Rows of the table, in the order in which things happen: name in `Server-Timing`, words.
const PARTS: [(&str, &str); 5] = [
    ("queue", "wait for a sandbox"),
    ("claim", "claim → guest's first instruction"),
    ("first-byte", "first instruction → agent's first byte"),
    ("function", "agent's first byte → response"),
    ("restore", "done ahead: spawn, restore"),
];

pub fn run(global: &Global, args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let (home, installation) = (global.home()?, Installation::locate()?);
    let mut steps = Steps::new();
    if !args.in_lab {
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let venue = Venue::choose(args.lab);
        eprintln!("thaw: sandboxes in {}", venue.describe());
        prepare_images(&home, &installation, &mut steps)?;
        if let Venue::Lab(_) = venue {
            return InLab::this_command(&home, &installation).run(&mut steps);
        }
    }
    let folder = tempfile::tempdir_in(&home).context("cannot make a folder for the bench")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the I/O runtime")?;
    let report = runtime.block_on(measure(&home, folder.path(), &installation, args, steps))?;
    match global.format() {
        Format::Json => output::json(&report)?,
        Format::Text => print(&report),
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(
    home: &Path,
    folder: &Path,
    installation: &Installation,
    args: &BenchArgs,
    mut steps: Steps,
) -> anyhow::Result<Value> {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .context("cannot listen on loopback")?;
    let client = Client::new(&format!("http://{}", listener.local_addr()?))?;
    let runtime = Runtime::new(RuntimeConfig {
        vmm: installation.vmm.clone(),
        ..RuntimeConfig::default()
    })?;
    let engine = HostEngine::new(runtime, home.to_owned(), installation.agent.clone());
    let mut config = GatewayConfig::new(
        folder.to_owned(),
        listener,
        installation.vmm.clone(),
        installation.agent.clone(),
    );
    config.ready_count = args.ready;
    let gateway = Gateway::start_on(config, Arc::new(engine))
        .await
        .context("the gateway cannot start")?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let signal = stop_signal()?;
    let server = tokio::spawn(gateway.run_until(async move {
        tokio::select! { _ = stopped => {} () = signal => {} }
    }));
    let result = drive(&client, args, &mut steps).await;
    let _ = stop.send(()); // the server may have ended by a signal already
    server.await.context("the gateway died")??;
    result
}

async fn drive(client: &Client, args: &BenchArgs, steps: &mut Steps) -> anyhow::Result<Value> {
    wait_healthy(client).await?;
    deploy(client, steps).await?;
    steps.begin(&format!("{} × {} requests", args.clients, args.requests));
    let began = Instant::now();
    let tasks: Vec<_> = (0..args.clients)
        .map(|_| tokio::spawn(one_client(client.clone(), args.requests)))
        .collect();
    let mut parts = Parts::default();
    for task in tasks {
        parts.merge(task.await.context("a client died")??)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    steps.end();
    parts.report(args, seconds)
}

async fn deploy(client: &Client, steps: &mut Steps) -> anyhow::Result<()> {
    let source = tempfile::tempdir().context("cannot make a folder")?;
    fs::write(source.path().join("app.py"), HELLO).context("cannot write the example")?;
    let deployment = Deployment::python(NAME, package::zip_of(source.path())?);
    client.deploy(&deployment).await?;
    let last = super::deploy::follow(client, NAME, steps).await?;
    match (last.error, last.init_error) {
        (Some(error), _) => bail!("examples/hello could not be frozen: {error}"),
        (_, Some(init)) => bail!("examples/hello fails when it starts: {}", init.message),
        _ => Ok(()),
    }
}

async fn one_client(client: Client, requests: u32) -> anyhow::Result<Parts> {
    let mut parts = Parts::default();
    for _ in 0..requests {
        wait_ready(&client).await?;
        let sent = Instant::now();
        let answer = client
            .invoke(NAME, b"{\"bench\":true}".to_vec(), true)
            .await?;
        parts.add("http", sent.elapsed())?;
        ensure!(
            answer.function_error.is_none(),
            "the function failed: {}",
            String::from_utf8_lossy(&answer.payload)
        );
        let timing = answer.timing.context("the gateway sent no Server-Timing")?;
        for (name, duration) in server_timing(&timing) {
            parts.add(&name, duration)?;
        }
    }
    Ok(parts)
}

/// A request is sent when its sandbox stands ready: refilling is not the request's cost, and has its own row.
async fn wait_ready(client: &Client) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let list = client.list().await?;
        if list
            .functions
            .iter()
            .any(|function| function.name == NAME && function.pool.ready > 0)
        {
            return Ok(());
        }
        ensure!(
            began.elapsed() < READY_LIMIT,
            "no sandbox became ready: {:?}",
            list.functions
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// `name;dur=1.5, …` with milliseconds (W3C Server Timing).
fn server_timing(text: &str) -> Vec<(String, Duration)> {
    let part = |part: &str| {
        let (name, value) = part.trim().split_once(";dur=")?;
        let milliseconds: f64 = value.parse().ok()?;
        Some((
            name.to_owned(),
            Duration::try_from_secs_f64(milliseconds / 1e3).ok()?,
        ))
    };
    text.split(',').filter_map(part).collect()
}

/// Latencies by part, microseconds.
#[derive(Default)]
struct Parts(BTreeMap<String, Vec<u64>>);

impl Parts {
    fn add(&mut self, name: &str, took: Duration) -> anyhow::Result<()> {
        self.0
            .entry(name.to_owned())
            .or_default()
            .push(u64::try_from(took.as_micros())?);
        Ok(())
    }

    fn merge(&mut self, other: Self) -> anyhow::Result<()> {
        for (name, values) in other.0 {
            self.0.entry(name).or_default().extend(values);
        }
        Ok(())
    }

    fn report(&self, args: &BenchArgs, seconds: f64) -> anyhow::Result<Value> {
        let mut parts = serde_json::Map::new();
        for (name, values) in &self.0 {
            let mut histogram = Histogram::<u64>::new_with_max(LATENCY_MAX_US, 3)
                .context("cannot make a histogram")?;
            values
                .iter()
                .for_each(|value| histogram.saturating_record(*value));
            let ms =
                |q: f64| Duration::from_micros(histogram.value_at_quantile(q)).as_secs_f64() * 1e3;
            parts.insert(
                name.clone(),
                json!({ "p50_ms": ms(0.5), "p90_ms": ms(0.9), "p99_ms": ms(0.99) }),
            );
        }
        Ok(json!({
            "clients": args.clients, "requests": args.clients * args.requests, "seconds": seconds,
            "venue": if args.in_lab { "lab" } else { "native" }, "parts": parts,
        }))
    }
}

fn print(report: &Value) {
    println!(
        "{} requests, {} client(s), in {}",
        report["requests"],
        report["clients"],
        report["venue"].as_str().unwrap_or_default()
    );
    let row = |(key, words): (&str, &str)| {
        let part = &report["parts"][key];
        let ms = |name: &str| {
            part[name]
                .as_f64()
                .map_or_else(|| "-".into(), |value| format!("{value:.2}"))
        };
        vec![words.to_owned(), ms("p50_ms"), ms("p90_ms"), ms("p99_ms")]
    };
    let whole = [
        ("total", "whole, in the gateway"),
        ("http", "whole, as the HTTP client sees it"),
    ];
    output::table(
        &["milliseconds", "p50", "p90", "p99"],
        PARTS.into_iter().chain(whole).map(row),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_timing_is_read_as_milliseconds() {
        let parts = server_timing("queue;dur=0.5, claim;dur=12, odd, total;dur=x");
        assert_eq!(
            parts,
            [
                ("queue".into(), Duration::from_micros(500)),
                ("claim".into(), Duration::from_millis(12))
            ]
        );
    }
}
