//! The closed loop: each client sends, waits, sends again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;

use crate::report::Report;

/// Longest latency that the histogram can tell apart, microseconds: one hour.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where to send.
    pub url: String,
    /// Clients at the same time.
    pub clients: u32,
    /// Requests of each.
    pub requests_per_client: u32,
    /// POST this; GET without it.
    pub body: Option<String>,
    /// A good answer contains this.
    pub expect: Option<String>,
    /// Longest wait for one answer.
    pub timeout: Duration,
}

/// What one client saw.
struct Tally {
    latencies_us: Histogram<u64>,
    errors: BTreeMap<String, u64>,
}

impl Tally {
    fn new() -> anyhow::Result<Self> {
        let latencies_us =
            Histogram::new_with_max(LATENCY_MAX_US, 3).context("cannot make a histogram")?;
        Ok(Self {
            latencies_us,
            errors: BTreeMap::new(),
        })
    }
}

/// Runs the plan to its end.
///
/// # Errors
/// The plan cannot be carried out at all (no HTTP client, a client task died). A failed request is no error: it is counted.
pub async fn run(plan: &Plan) -> anyhow::Result<Report> {
    let http = reqwest::Client::builder()
        .timeout(plan.timeout)
        .build()
        .context("cannot make an HTTP client")?;
    let plan = Arc::new(plan.clone());
    let started = Instant::now();
    let clients: Vec<_> = (0..plan.clients)
        .map(|_| tokio::spawn(client(http.clone(), Arc::clone(&plan))))
        .collect();
    let mut total = Tally::new()?;
    for client in clients {
        let tally = client.await.context("a client task died")??;
        total
            .latencies_us
            .add(&tally.latencies_us)
            .context("cannot add histograms")?;
        for (error, count) in tally.errors {
            *total.errors.entry(error).or_default() += count;
        }
    }
    Ok(Report::new(
        &total.latencies_us,
        total.errors,
        started.elapsed(),
    ))
}

async fn client(http: reqwest::Client, plan: Arc<Plan>) -> anyhow::Result<Tally> {
    let mut tally = Tally::new()?;
    for _ in 0..plan.requests_per_client {
        let sent = Instant::now();
        match request(&http, &plan).await {
            Ok(()) => {
                let micros = u64::try_from(sent.elapsed().as_micros()).unwrap_or(LATENCY_MAX_US);
                tally.latencies_us.saturating_record(micros);
            }
            Err(error) => *tally.errors.entry(error).or_default() += 1,
        }
    }
    Ok(tally)
}

/// One request; the error is its kind, short enough to be counted by.
async fn request(http: &reqwest::Client, plan: &Plan) -> Result<(), String> {
    let request = match &plan.body {
        Some(body) => http
            .post(&plan.url)
            .header("content-type", "application/json")
            .body(body.clone()),
        None => http.get(&plan.url),
    };
    let answer = request.send().await.map_err(|error| kind(&error))?;
    let status = answer.status();
    let function_error = answer.headers().contains_key("x-amz-function-error");
    let body = answer.text().await.map_err(|error| kind(&error))?;
    if !status.is_success() {
        return Err(format!("status {status}"));
    }
    if function_error {
        return Err("function error".into());
    }
    match &plan.expect {
        Some(expected) if !body.contains(expected) => Err("unexpected answer".into()),
        _ => Ok(()),
    }
}

fn kind(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        "time-out".into()
    } else if error.is_connect() {
        "cannot connect".into()
    } else {
        "connection broke".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn plan(url: String) -> Plan {
        Plan {
            url,
            clients: 4,
            requests_per_client: 5,
            body: None,
            expect: None,
            timeout: Duration::from_secs(5),
        }
    }

    async fn serve(router: axum::Router) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("http://{address}/")
    }

    #[tokio::test]
    async fn every_client_sends_all_its_requests() {
        let seen = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&seen);
        let route = axum::routing::get(move || async move {
            counter.fetch_add(1, Ordering::SeqCst);
            "fine"
        });
        let url = serve(axum::Router::new().route("/", route)).await;
        let report = run(&plan(url)).await.unwrap();
        assert_eq!((report.good, seen.load(Ordering::SeqCst)), (20, 20));
        assert!(report.errors.is_empty());
    }

    #[tokio::test]
    async fn failures_are_counted_by_kind_and_not_timed() {
        let route = axum::routing::get(|| async { axum::http::StatusCode::TOO_MANY_REQUESTS });
        let url = serve(axum::Router::new().route("/", route)).await;
        let report = run(&plan(url)).await.unwrap();
        assert_eq!(report.good, 0);
        assert_eq!(
            report.errors,
            BTreeMap::from([("status 429 Too Many Requests".to_owned(), 20)])
        );
    }

    #[tokio::test]
    async fn a_wrong_answer_is_an_error() {
        let url =
            serve(axum::Router::new().route("/", axum::routing::get(|| async { "no" }))).await;
        let report = run(&Plan {
            expect: Some("yes".into()),
            ..plan(url)
        })
        .await
        .unwrap();
        assert_eq!(
            report.errors,
            BTreeMap::from([("unexpected answer".to_owned(), 20)])
        );
    }
}
