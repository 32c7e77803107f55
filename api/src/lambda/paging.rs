//! Pages of lists: `MaxItems` and `Marker`. Pages go by key, not by number: what comes and goes in between shifts nothing.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::Call;
use super::errors::{ApiError, violation};

/// Entries of a page, unless the client wants fewer; Lambda's number.
const PAGE_MAX: usize = 50;

/// Largest `MaxItems`.
const ITEMS_MAX: usize = 10_000;

/// Which page a client wants.
pub(super) struct Page {
    count: usize,
    after: Option<String>,
}

impl Page {
    pub(super) fn of(call: &Call) -> Result<Self, ApiError> {
        Self::of_at_most(call, ITEMS_MAX)
    }

    /// The same where `MaxItems` has another limit.
    pub(super) fn of_at_most(call: &Call, items_max: usize) -> Result<Self, ApiError> {
        let count = match call.query("MaxItems") {
            None => PAGE_MAX,
            Some(text) => match text.parse::<usize>() {
                Ok(count) if (1..=items_max).contains(&count) => count.min(PAGE_MAX),
                _ => {
                    let constraint = format!("Member must have value between 1 and {items_max}");
                    return Err(ApiError::validation(&[violation(
                        &text,
                        "maxItems",
                        &constraint,
                    )]));
                }
            },
        };
        let after = call.query("Marker").filter(|marker| !marker.is_empty());
        let after = after.map(|marker| read_marker(&marker)).transpose()?;
        Ok(Self { count, after })
    }

    /// The entries of this page, of `all` in the order of their keys, and the marker of the next page.
    pub(super) fn cut<T>(
        &self,
        all: impl Iterator<Item = (String, T)>,
    ) -> (Vec<T>, Option<String>) {
        let mut entries = Vec::new();
        let mut last = String::new();
        for (key, entry) in all {
            if self.after.as_ref().is_some_and(|after| key <= *after) {
                continue;
            }
            if entries.len() == self.count {
                return (entries, Some(URL_SAFE_NO_PAD.encode(last)));
            }
            entries.push(entry);
            last = key;
        }
        (entries, None)
    }
}

fn read_marker(marker: &str) -> Result<String, ApiError> {
    URL_SAFE_NO_PAD
        .decode(marker)
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| ApiError::invalid_parameter("Marker is not one that a list gave."))
}
