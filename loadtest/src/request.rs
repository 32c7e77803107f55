//! One request and what came of it.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use tokio_rustls::rustls::crypto::ring;

use crate::start::StartKind;

/// Name of the response header that says how the sandbox of an answer was started.
pub const START_HEADER: &str = "x-thaw-start";

/// What every request of a run is like.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where to send.
    pub url: reqwest::Url,
    /// POST this; GET without it.
    pub body: Option<Bytes>,
    /// A good answer contains this.
    pub expect: Option<String>,
    /// Longest wait for one answer.
    pub timeout: Duration,
}

/// What came of a request, and when its last byte was here.
#[derive(Debug)]
pub struct Outcome {
    /// When the answer, or the knowledge that none comes, was complete.
    pub ended: Instant,
    /// Good or bad.
    pub result: Result<StartKind, Failure>,
}

/// A request that did not end well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Short enough to be counted by.
    pub kind: String,
    /// What the server said, or how the connection broke.
    pub said: Bytes,
}

impl Failure {
    fn of_connection(error: &reqwest::Error) -> Self {
        let kind = if error.is_timeout() {
            "time-out"
        } else if error.is_connect() {
            "cannot connect"
        } else {
            "connection broke"
        };
        Self {
            kind: kind.into(),
            said: chain(error).into(),
        }
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Sends requests to one target; cheap to clone, connections are shared.
#[derive(Clone, Debug)]
pub struct Sender {
    http: reqwest::Client,
    target: Target,
}

impl Sender {
    /// A sender without connections.
    ///
    /// # Errors
    /// There is no HTTP client to be had.
    pub fn new(target: Target) -> anyhow::Result<Self> {
        // This workspace's HTTP client can speak TLS, and asks for cryptography though load goes over plain HTTP.
        let _ = ring::default_provider().install_default();
        #[expect(
            clippy::disallowed_methods,
            reason = "it was given its cryptography above"
        )]
        let http = reqwest::Client::builder()
            .tls_certs_only([])
            .timeout(target.timeout)
            .build()
            .context("cannot make an HTTP client")?;
        Ok(Self { http, target })
    }

    /// One request, to the last byte of its answer.
    pub async fn send(&self) -> Outcome {
        let result = self.exchange().await;
        Outcome {
            ended: Instant::now(),
            result,
        }
    }

    async fn exchange(&self) -> Result<StartKind, Failure> {
        let Target { url, body, .. } = &self.target;
        let request = match body {
            Some(body) => self
                .http
                .post(url.clone())
                .header("content-type", "application/json")
                .body(body.clone()),
            None => self.http.get(url.clone()),
        };
        let broke = |error| Failure::of_connection(&error);
        let answer = request.send().await.map_err(broke)?;
        let status = answer.status();
        let function_error = answer.headers().contains_key("x-amz-function-error");
        let start = StartKind::told(answer.headers().get(START_HEADER).map(|v| v.as_bytes()));
        let said = answer.bytes().await.map_err(broke)?;
        let failed = |kind: &str, said| {
            let kind = kind.to_owned();
            Err(Failure { kind, said })
        };
        if !status.is_success() {
            return failed(&format!("status {status}"), said);
        }
        if function_error {
            return failed("function error", said);
        }
        match &self.target.expect {
            Some(expected) if !contains(&said, expected.as_bytes()) => {
                failed("unexpected answer", said)
            }
            _ => Ok(start),
        }
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    part.is_empty() || text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_found_anywhere_and_nowhere() {
        assert!(contains(b"abc", b"bc") && contains(b"abc", b""));
        assert!(!contains(b"abc", b"cb") && !contains(b"", b"a"));
    }
}
