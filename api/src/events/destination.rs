//! Where records of asynchronous invocations go: another function of this gateway, or an HTTP URL.

use std::sync::OnceLock;
use std::time::Duration;

use super::Event;
use super::outcome::Attempt;
use crate::engine::chain;
use crate::lambda;
use crate::lambda::names::FunctionRef;
use crate::state::App;

/// Longest that an HTTP destination may take.
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
    // The gateway's own client speaks no TLS: what it could never deliver is refused here.
    if text.starts_with("http://") {
        return match reqwest::Url::parse(text) {
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
            "{text} is neither the ARN of a function of this gateway nor an http:// URL (https:// is not supported)"
        )),
    }
}

/// Posts a record. Any status of 200 to 299 takes it.
pub(super) async fn deliver(url: &str, event: &Event) -> Attempt {
    static CLIENT: OnceLock<reqwest::Client> = OnceLock::new();
    let client = CLIENT.get_or_init(reqwest::Client::new);
    let sent = client
        .post(url)
        .timeout(DELIVERY_LIMIT)
        .header("content-type", "application/json")
        .body(event.payload.clone())
        .send()
        .await;
    match sent {
        Ok(response) if response.status().is_success() => Attempt::Delivered,
        Ok(response) => Attempt::Unreachable(format!("{url} answered {}", response.status())),
        Err(error) => Attempt::Unreachable(chain(&error)),
    }
}
