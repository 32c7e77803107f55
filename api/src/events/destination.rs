//! Where records of asynchronous invocations go: another function of this gateway, or an HTTP URL.

use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, Url};

use super::Event;
use super::outcome::Attempt;
use crate::engine::chain;
use crate::lambda;
use crate::lambda::names::FunctionRef;
use crate::state::App;
use crate::tls::{self, TlsError, Trust};

/// Longest that a connection to an HTTP destination, its handshake included, and the whole exchange may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const DELIVERY_LIMIT: Duration = Duration::from_secs(30);

/// What a destination names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A function, by ARN.
    Function(FunctionRef),
    /// A URL that gets the record as the body of a POST.
    Url(String),
}

/// Reads a destination.
///
/// # Errors
/// It names nothing that this gateway can reach; the text says what it could.
pub fn parse(app: &App, text: &str) -> Result<Target, String> {
    if text.starts_with("http://") || text.starts_with("https://") {
        return match Url::parse(text) {
            Ok(url) if url.has_host() => Ok(Target::Url(text.to_owned())),
            _ => Err(format!("{text} is no URL")),
        };
    }
    let reference = text
        .starts_with("arn:")
        .then(|| FunctionRef::parse(text, None).ok())
        .flatten();
    match reference {
        Some(reference) if lambda::find(app, reference.clone()).is_ok() => {
            Ok(Target::Function(reference))
        }
        Some(_) => Err(format!("there is no function {text} here")),
        None => Err(format!(
            "{text} is neither the ARN of a function of this gateway nor an http:// or https:// URL"
        )),
    }
}

/// What posts records to URLs.
#[derive(Clone, Debug)]
pub struct Courier {
    trust: Trust,
    client: Client,
}

impl Courier {
    /// One that trusts these.
    ///
    /// # Errors
    /// There is no HTTP client to be had.
    pub fn new(trust: Trust) -> Result<Self, TlsError> {
        let client = trust.client(|http| {
            // A POST that is sent elsewhere becomes a GET, which takes no record.
            let http = http.redirect(Policy::none()).timeout(DELIVERY_LIMIT);
            http.connect_timeout(CONNECT_LIMIT)
        })?;
        Ok(Self { trust, client })
    }
}

/// Posts a record. Any status of 200 to 299 takes it.
pub(super) async fn deliver(courier: &Courier, url: &str, event: &Event) -> Attempt {
    let Ok(address) = Url::parse(url) else {
        return Attempt::Unreachable(format!("{url} is no URL"));
    };
    let sent = courier
        .client
        .post(courier.trust.reach(address))
        .header("content-type", "application/json")
        .body(event.payload.clone())
        .send()
        .await;
    match sent {
        Ok(response) if response.status().is_success() => Attempt::Delivered,
        Ok(response) => Attempt::Unreachable(format!("{url} answered {}", response.status())),
        Err(error) => Attempt::Unreachable(match tls::failure(&error) {
            Some(why) => format!("no TLS with {url}: {why}"),
            None => chain(&error),
        }),
    }
}
