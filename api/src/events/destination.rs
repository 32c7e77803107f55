//! Where records of asynchronous invocations go: another function of this gateway, or an HTTP URL.
//!
//! **Invariant:** no record leads to a link-local address or to a cloud's metadata, by whatever name: `no_record_is_sent_to_metadata`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Client, Url};
use thaw_runtime::is_metadata;
use tokio::net::lookup_host;

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
            Ok(url) if leads_to_metadata(&url) => Err(format!("{text} {METADATA}")),
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

/// What is wrong with such an address.
const METADATA: &str =
    "is at a link-local address or one of a cloud's metadata, to which no record is sent";

/// Whether a URL names such an address itself; a name's are looked at when they are known.
fn leads_to_metadata(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.parse::<IpAddr>().is_ok_and(is_metadata)
}

/// This machine's resolver, without what no record may be sent to.
struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = lookup_host((name.as_str(), 0)).await?;
            let usable: Vec<_> = found.filter(|found| !is_metadata(found.ip())).collect();
            if usable.is_empty() {
                return Err(format!("{} {METADATA}", name.as_str()).into());
            }
            let usable: Addrs = Box::new(usable.into_iter());
            Ok(usable)
        })
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
                .dns_resolver(Arc::new(Resolver))
        })?;
        Ok(Self { trust, client })
    }
}

/// Posts a record. Any status of 200 to 299 takes it.
pub(super) async fn deliver(courier: &Courier, url: &str, event: &Event) -> Attempt {
    let Ok(address) = Url::parse(url) else {
        return Attempt::Unreachable(format!("{url} is no URL"));
    };
    if leads_to_metadata(&address) {
        return Attempt::Unreachable(format!("{url} {METADATA}"));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_record_is_sent_to_metadata() {
        for (url, expected) in [
            ("http://169.254.169.254/latest", true),
            // As the URL standard reads it: a number is an address.
            ("http://2852039166/", true),
            ("http://[fd00:ec2::254]/", true),
            ("http://[::ffff:a9fe:a9fe]/", true),
            ("http://127.0.0.1/", false),
            ("http://metadata.example/", false),
        ] {
            assert_eq!(
                leads_to_metadata(&Url::parse(url).unwrap()),
                expected,
                "{url}"
            );
        }
        // As a name, an address is resolved to itself.
        let resolved = |name: &str| Resolver.resolve(name.parse().unwrap());
        let refused = resolved("169.254.169.254").await.err().unwrap();
        assert!(refused.to_string().contains(METADATA), "{refused}");
        assert!(resolved("localhost").await.is_ok());
    }
}
