//! Subscriptions to the Telemetry API and the Logs API: the schema of their bodies (Lambda's developer guide, "Telemetry API
//! reference").

use hyper::Uri;
use serde::Deserialize;

use crate::telemetry::{Api, Destination, Kind, Subscription};

/// The body of a subscription.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wish {
    schema_version: String,
    types: Vec<String>,
    destination: Target,
    buffering: Option<Buffering>,
}

#[derive(Deserialize)]
struct Target {
    protocol: String,
    #[serde(rename = "URI")]
    uri: Option<String>,
    port: Option<u16>,
    method: Option<String>,
    encoding: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Buffering {
    max_items: Option<u64>,
    max_bytes: Option<u64>,
    timeout_ms: Option<u64>,
}

/// Reads a subscription; or says what is wrong with it.
pub(super) fn subscription(api: Api, body: &[u8]) -> Result<Subscription, String> {
    let wish: Wish = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let versions: &[&str] = match api {
        Api::Logs => &["2020-08-15", "2021-03-18"],
        Api::Telemetry => &["2022-07-01", "2022-12-13", "2025-01-29"],
    };
    if !versions.contains(&wish.schema_version.as_str()) {
        return Err(format!("schemaVersion: {} is unknown", wish.schema_version));
    }
    let all = [Kind::Platform, Kind::Function, Kind::Extension];
    let kind = |name: &String| {
        let found = all.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("types: {name} is unknown"))
    };
    let kinds: Vec<Kind> = wish.types.iter().map(kind).collect::<Result<_, _>>()?;
    if kinds.is_empty() {
        return Err("types: at least one is needed".into());
    }
    let buffering = wish.buffering.unwrap_or_default();
    let items = within("maxItems", buffering.max_items, 1000, 10_000, 10_000)?;
    let bytes = within("maxBytes", buffering.max_bytes, 262_144, 1_048_576, 262_144)?;
    Ok(Subscription {
        api,
        kinds,
        destination: destination(wish.destination)?,
        items_max: usize::try_from(items).unwrap_or(usize::MAX),
        bytes_max: usize::try_from(bytes).unwrap_or(usize::MAX),
        timeout_ms: within("timeoutMs", buffering.timeout_ms, 25, 30_000, 1000)?,
    })
}

fn within(name: &str, value: Option<u64>, min: u64, max: u64, none: u64) -> Result<u64, String> {
    let value = value.unwrap_or(none);
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(format!(
            "buffering.{name}: {value} is not within {min} and {max}"
        ))
    }
}

fn destination(target: Target) -> Result<Destination, String> {
    if target.encoding.is_some_and(|encoding| encoding != "JSON") {
        return Err("destination.encoding: only JSON is known".into());
    }
    match (target.protocol.as_str(), target.uri, target.port) {
        ("HTTP", Some(uri), _) => {
            let parsed: Uri = uri
                .parse()
                .map_err(|error| format!("destination.URI: {error}"))?;
            if !matches!(parsed.host(), Some("sandbox.localdomain" | "sandbox")) {
                return Err("destination.URI: the host must be sandbox.localdomain".into());
            }
            let put = match target.method.as_deref() {
                None | Some("POST") => false,
                Some("PUT") => true,
                Some(other) => return Err(format!("destination.method: {other} is unknown")),
            };
            let path = parsed.path_and_query().map_or("/", |path| path.as_str());
            Ok(Destination::Http {
                put,
                port: parsed.port_u16().unwrap_or(80),
                path: path.to_owned(),
            })
        }
        ("TCP", _, Some(port)) if port > 0 => Ok(Destination::Tcp { port }),
        ("HTTP", None, _) => Err("destination.URI is missing".into()),
        ("TCP", ..) => Err("destination.port is missing".into()),
        (protocol, ..) => Err(format!("destination.protocol: {protocol} is unknown")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn wish() -> Value {
        json!({
            "schemaVersion": "2022-12-13", "types": ["platform", "function"],
            "destination": {"protocol": "HTTP", "URI": "http://sandbox.localdomain:4243/a?b"},
        })
    }

    fn read(wish: &Value) -> Result<Subscription, String> {
        subscription(Api::Telemetry, wish.to_string().as_bytes())
    }

    #[test]
    fn a_subscription_has_lambdas_defaults() {
        let expected = Subscription {
            api: Api::Telemetry,
            kinds: vec![Kind::Platform, Kind::Function],
            destination: Destination::Http {
                put: false,
                port: 4243,
                path: "/a?b".into(),
            },
            items_max: 10_000,
            bytes_max: 262_144,
            timeout_ms: 1000,
        };
        assert_eq!(read(&wish()), Ok(expected));
        let mut wish = wish();
        wish["destination"] = json!({"protocol": "TCP", "port": 9});
        wish["schemaVersion"] = json!("2021-03-18");
        let read = subscription(Api::Logs, wish.to_string().as_bytes()).unwrap();
        assert_eq!(read.destination, Destination::Tcp { port: 9 });
    }

    #[test]
    fn what_is_outside_the_schema_is_named() {
        for (pointer, value, named) in [
            ("/schemaVersion", json!("2021-03-18"), "schemaVersion"),
            ("/types", json!([]), "types"),
            ("/types/0", json!("Platform"), "types"),
            (
                "/destination/protocol",
                json!("UDP"),
                "destination.protocol",
            ),
            ("/destination/protocol", json!("TCP"), "destination.port"),
            (
                "/destination/URI",
                json!("http://example.com/"),
                "destination.URI",
            ),
            ("/destination/URI", json!(null), "destination.URI"),
        ] {
            let mut wish = wish();
            *wish.pointer_mut(pointer).unwrap() = value;
            assert!(read(&wish).unwrap_err().starts_with(named), "{pointer}");
        }
        let mut wish = wish();
        wish["buffering"] = json!({"timeoutMs": 24});
        assert!(read(&wish).unwrap_err().starts_with("buffering.timeoutMs"));
        assert!(subscription(Api::Telemetry, b"").is_err());
    }
}
