//! examples/hello over HTTP, through three gateways that differ in what becomes of a used sandbox, in turns.
//!
//! *Rewound* and *warm* are measured by two requests back to back to a gateway with room for one sandbox: the second waits
//! until the first one's sandbox can be had again, so that the rewind is in its time. How a sandbox was really had is what
//! the gateway says (`x-thaw-start`): an answer of another kind than was meant goes to that kind's figures.
//!
//! What of a time made the clone unique (*identity*) are two parts on the guest's own clock: the agent's, which it tells with
//! its word that the clone is unique, and that of the hooks in the function's runtime, which the function tells in its answer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use hdrhistogram::Histogram;
use serde::Deserialize;
use thaw_api::engine::HostEngine;
use thaw_api::gateway::{Gateway, GatewayConfig};
use thaw_runtime::{Recycle, Runtime, RuntimeConfig};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::cli::client::{Client, Deployment};
use crate::cli::confine;
use crate::cli::installation::Installation;
use crate::cli::progress::Steps;
use crate::cli::up::{stop_signal, wait_healthy};
use crate::cli::{deploy, output, package, snapshot};

const HELLO: &str = include_str!("../../../../examples/hello/app.py");
/// Its handler in the bench's, which also tells what the runtime's hooks took in this clone.
const WITH_HOOKS_TIME: &str = r#"
hello = handler


def handler(event, context):
    import __main__

    return {"answer": hello(event, context), "hooks_ns": __main__.Client.hooks_ns}
"#;
const NAME: &str = "bench-hello";
/// Longest latency that is told apart, microseconds: ten minutes.
const LATENCY_MAX_US: u64 = 600_000_000;
/// Of the function, MiB.
const FUNCTION_MIB: u64 = 128;
/// Room for one sandbox of the function and not for two.
const ROOM_MIB: u64 = FUNCTION_MIB + FUNCTION_MIB / 2;

/// Requests that may fail before the bench gives up.
const FAILURES_MAX: u32 = 3;

/// How a sandbox was had that was never cleaned: its monitor's times are of its first invocation.
const WARM: &str = "warm";
/// Parts that the gateway itself times, for each invocation anew.
const GATEWAYS: [&str; 3] = ["queue", "total", "http"];

/// What the agent did to make the clone unique, in `Server-Timing`.
const AGENTS: &str = "identity";
/// What the hooks of the function's runtime did.
const HOOKS: &str = "identity-hooks";
/// Both.
const IDENTITY: &str = "identity-whole";

/// Rows of the table, in the order in which things happen: name in `Server-Timing`, words.
const PARTS: [(&str, &str); 10] = [
    ("queue", "wait for a sandbox"),
    ("claim", "claim → guest's first instruction"),
    ("first-byte", "first instruction → agent's first byte"),
    ("function", "agent's first byte → response"),
    ("restore", "done ahead: restore"),
    (IDENTITY, "identity: the clone made unique"),
    (AGENTS, "… by the agent"),
    (HOOKS, "… by the runtime's hooks"),
    ("total", "whole, in the gateway"),
    ("http", "whole, as the HTTP client sees it"),
];

/// Sides of the report: name before the start's, part.
const SIDES: [(&str, &str); 4] = [
    ("hello", "http"),
    ("identity", IDENTITY),
    ("identity_agent", AGENTS),
    ("identity_hooks", HOOKS),
];

/// What the gateways stand on.
pub struct Stage<'a> {
    /// Images.
    pub home: &'a Path,
    /// Scratch.
    pub folder: &'a Path,
    /// Programs.
    pub installation: &'a Installation,
}

/// A gateway, and what is asked of it in each round.
struct Side {
    recycle: Recycle,
    /// A request that is not counted goes before the one that is.
    primed: bool,
    client: Client,
    stop: oneshot::Sender<()>,
    server: JoinHandle<anyhow::Result<()>>,
}

impl Side {
    async fn call(&self) -> anyhow::Result<Call> {
        if self.primed {
            call(&self.client).await?;
        }
        call(&self.client).await
    }
}

impl Stage<'_> {
    /// Deploys to each gateway, then calls them in turns.
    ///
    /// # Errors
    /// A gateway does not come up, or the function fails.
    pub async fn measure(&self, rounds: u32, steps: &mut Steps) -> anyhow::Result<Samples> {
        let mut sides = Vec::new();
        for (recycle, primed) in [
            (Recycle::Replace, false),
            (Recycle::Rewind, true),
            (Recycle::Reuse, true),
        ] {
            sides.push(self.side(recycle, primed, steps).await?);
        }
        steps.begin(&format!("{rounds} rounds of requests"));
        let measured = rounds_of(&sides, rounds).await;
        steps.end();
        for side in sides {
            let _ = side.stop.send(()); // the server may have ended by a signal already
            side.server.await.context("a gateway died")??;
        }
        measured
    }

    async fn side(
        &self,
        recycle: Recycle,
        primed: bool,
        steps: &mut Steps,
    ) -> anyhow::Result<Side> {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .context("cannot listen on loopback")?;
        let client = Client::new(&format!("http://{}", listener.local_addr()?))?;
        let config = RuntimeConfig {
            vmm: self.installation.vmm.clone(),
            jailer: Some(confine::jailer(self.home, self.installation)?),
            recycle,
            memory_budget_mib: primed.then_some(ROOM_MIB),
            ..RuntimeConfig::default()
        };
        let runtime = Runtime::new(config, snapshot::key(self.home)?)?;
        let agent = self.installation.agent.clone();
        let engine = HostEngine::new(runtime, self.home.to_owned(), agent.clone());
        let folder = self.folder.join(format!("{recycle:?}"));
        let mut config = GatewayConfig::new(folder, listener, self.installation.vmm.clone(), agent);
        config.ready_count = 1;
        let gateway = Gateway::start_on(config, Arc::new(engine))
            .await
            .context("a gateway cannot start")?;
        let (stop, stopped) = oneshot::channel::<()>();
        let signal = stop_signal()?;
        let server = tokio::spawn(async move {
            let end = async move {
                tokio::select! { _ = stopped => {} () = signal => {} }
            };
            gateway.run_until(end).await.context("a gateway failed")
        });
        wait_healthy(&client).await?;
        deploy_hello(&client, steps).await?;
        Ok(Side {
            recycle,
            primed,
            client,
            stop,
            server,
        })
    }
}

async fn deploy_hello(client: &Client, steps: &mut Steps) -> anyhow::Result<()> {
    let source = tempfile::tempdir().context("cannot make a folder")?;
    let code = format!("{HELLO}{WITH_HOOKS_TIME}");
    fs::write(source.path().join("app.py"), code).context("cannot write the example")?;
    let deployment = Deployment::python(NAME, package::zip_of(source.path())?);
    client.deploy(&deployment).await?;
    let last = deploy::follow(client, NAME, steps).await?;
    match (last.error, last.init_error) {
        (Some(error), _) => bail!("examples/hello could not be frozen: {error}"),
        (_, Some(init)) => bail!("examples/hello fails when it starts: {}", init.message),
        _ => Ok(()),
    }
}

async fn rounds_of(sides: &[Side], rounds: u32) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    let mut failures = 0;
    for round in 0..=rounds {
        let turn = usize::try_from(round)? % sides.len();
        for side in sides.iter().cycle().skip(turn).take(sides.len()) {
            let measured = side.call().await;
            match measured.with_context(|| format!("round {round} with {:?}", side.recycle)) {
                // The first round warms caches for all alike.
                Ok(call) if round > 0 => samples.add(call)?,
                Ok(_) => {}
                Err(error) if failures == FAILURES_MAX => return Err(error),
                Err(error) => {
                    failures += 1;
                    eprintln!("thaw: not counted: {error:#}");
                }
            }
        }
    }
    Ok(samples)
}

/// One request's times by part, and how its sandbox was had.
struct Call {
    start: String,
    parts: Vec<(String, Duration)>,
}

async fn call(client: &Client) -> anyhow::Result<Call> {
    let sent = Instant::now();
    let answer = client
        .invoke(NAME, b"{\"bench\":true}".to_vec(), true)
        .await?;
    let http = sent.elapsed();
    ensure!(
        answer.function_error.is_none(),
        "the function failed: {}",
        String::from_utf8_lossy(&answer.payload)
    );
    let timing = answer.timing.context("the gateway sent no Server-Timing")?;
    let mut parts = server_timing(&timing);
    parts.push(("http".to_owned(), http));
    parts.extend(identity(&parts, &answer.payload)?);
    let start = answer
        .start
        .context("the gateway does not say how the sandbox was had")?;
    Ok(Call { start, parts })
}

/// What the bench's function tells.
#[derive(Deserialize)]
struct Told {
    hooks_ns: u64,
}

/// The hooks' part of making the clone unique, and the whole of it.
fn identity(
    parts: &[(String, Duration)],
    payload: &[u8],
) -> anyhow::Result<[(String, Duration); 2]> {
    let told: Told = serde_json::from_slice(payload)
        .context("the function does not tell what the hooks took")?;
    let hooks = Duration::from_nanos(told.hooks_ns);
    let agents = parts.iter().find(|(part, _)| part == AGENTS);
    let (_, agents) = agents.context("the agent does not tell how long it took to be unique")?;
    Ok([
        (HOOKS.to_owned(), hooks),
        (IDENTITY.to_owned(), hooks + *agents),
    ])
}

/// `name;dur=1.5, …` with milliseconds (W3C Server Timing).
fn server_timing(text: &str) -> Vec<(String, Duration)> {
    let part = |part: &str| {
        let (name, value) = part.trim().split_once(";dur=")?;
        let milliseconds: f64 = value.parse().ok()?;
        let took = Duration::try_from_secs_f64(milliseconds / 1e3).ok()?;
        Some((name.to_owned(), took))
    };
    text.split(',').filter_map(part).collect()
}

/// Microseconds by how the sandbox was had and by part.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<String, BTreeMap<String, Vec<u64>>>);

impl Samples {
    fn add(&mut self, call: Call) -> anyhow::Result<()> {
        let start = self.0.entry(call.start).or_default();
        for (part, took) in call.parts {
            let micros = u64::try_from(took.as_micros())?;
            start.entry(part).or_default().push(micros);
        }
        Ok(())
    }

    /// Whole times as the client saw them, by side: `hello_claimed`, `hello_rewound`, `hello_warm`, …; and what of them made
    /// the clone unique: `identity_claimed`, `identity_agent_claimed`, `identity_hooks_claimed`, …
    pub fn sides(&self) -> BTreeMap<String, Vec<u64>> {
        let mut sides = BTreeMap::new();
        for (start, parts) in &self.0 {
            for (name, part) in SIDES {
                let is_told = start != WARM || GATEWAYS.contains(&part);
                if let Some(samples) = parts.get(part).filter(|_| is_told) {
                    sides.insert(format!("{name}_{start}"), samples.clone());
                }
            }
        }
        sides
    }

    /// For people: a table for each way in which a sandbox was had.
    ///
    /// # Errors
    /// A histogram cannot be made; never with the bounds here.
    pub fn print(&self) -> anyhow::Result<()> {
        for (start, parts) in &self.0 {
            let count = parts.get("http").map_or(0, Vec::len);
            println!("hello on {count} {start} sandbox(es)");
            let mut rows = Vec::new();
            for (part, words) in PARTS {
                let is_told = start != WARM || GATEWAYS.contains(&part);
                if let Some(samples) = parts.get(part).filter(|_| is_told) {
                    rows.push(row(words, samples)?);
                }
            }
            output::table(&["milliseconds", "p50", "p90", "p99"], rows);
        }
        Ok(())
    }
}

fn row(words: &str, samples: &[u64]) -> anyhow::Result<Vec<String>> {
    let mut histogram =
        Histogram::<u64>::new_with_max(LATENCY_MAX_US, 3).context("cannot make a histogram")?;
    for sample in samples {
        histogram.saturating_record(*sample);
    }
    let ms = |quantile: f64| {
        let micros = Duration::from_micros(histogram.value_at_quantile(quantile));
        format!("{:.2}", micros.as_secs_f64() * 1e3)
    };
    Ok(vec![words.to_owned(), ms(0.5), ms(0.9), ms(0.99)])
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

    #[test]
    fn identity_is_the_agents_part_and_the_hooks() {
        let parts = server_timing("identity;dur=0.25");
        let told = identity(&parts, br#"{"answer":1,"hooks_ns":500000}"#).unwrap();
        let expected = [(HOOKS, 500), (IDENTITY, 750)]
            .map(|(part, micros)| (part.to_owned(), Duration::from_micros(micros)));
        assert_eq!(told, expected);
        assert!(identity(&parts, br#"{"hooks_ns":null}"#).is_err());
        assert!(identity(&[], br#"{"hooks_ns":1}"#).is_err());
        let mut samples = Samples::default();
        for start in ["claimed", WARM] {
            let (start, parts) = (start.to_owned(), expected.to_vec());
            samples.add(Call { start, parts }).unwrap();
        }
        let sides = samples.sides();
        assert_eq!(sides["identity_claimed"], [750]);
        assert_eq!(sides["identity_hooks_claimed"], [500]);
        assert_eq!(
            sides.len(),
            2,
            "a sandbox that is used again has its first life's hooks"
        );
    }

    #[test]
    fn answers_go_to_the_kind_that_the_gateway_told() {
        let mut samples = Samples::default();
        for (start, millis) in [("rewound", 3), ("warm", 2), ("rewound", 5)] {
            let parts = vec![("http".to_owned(), Duration::from_millis(millis))];
            let start = start.to_owned();
            samples.add(Call { start, parts }).unwrap();
        }
        let sides = samples.sides();
        assert_eq!(sides["hello_rewound"], [3000, 5000]);
        assert_eq!(sides["hello_warm"], [2000]);
        assert_eq!(sides.len(), 2);
    }
}
