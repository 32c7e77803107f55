//! From an HTTP request to the event of payload format 2.0. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use axum::http::{HeaderMap, Version, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use thaw_api_types::function_url::{Authorizer, HttpContext, HttpEvent, IamCaller, RequestContext};

use crate::auth::admission::Caller;
use crate::clock;
use crate::lambda::query;

/// Characters of the id that stands for a function in events, as in AWS's host names.
const API_ID_CHARS: usize = 32;

/// A request as it came.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// The function's name, with the alias behind a colon if it has one.
    pub function: &'a str,
    /// `GET`, …
    pub method: &'a str,
    /// Below the function's own path.
    pub raw_path: &'a str,
    /// Without `?`.
    pub raw_query: &'a str,
    /// HTTP version.
    pub version: Version,
    /// All headers.
    pub headers: &'a HeaderMap,
    /// The whole body.
    pub body: &'a [u8],
    /// The client.
    pub source: SocketAddr,
    /// Whose signature let it in, if one had to.
    pub caller: Option<&'a Caller>,
    /// The gateway's account.
    pub account_id: &'a str,
    /// The gateway.
    pub local: SocketAddr,
    /// The invocation.
    pub request_id: &'a str,
    /// The invocation's trace.
    pub trace_id: &'a str,
    /// Now.
    pub unix_ms: i64,
}

/// The event of a request.
#[must_use]
pub fn build(incoming: &Incoming<'_>) -> HttpEvent {
    let host = text(incoming.headers, "host").unwrap_or_default();
    let domain_prefix = domain(&host)
        .split('.')
        .next()
        .unwrap_or_default()
        .to_owned();
    let (body, is_base64_encoded) = body(incoming);
    HttpEvent {
        version: "2.0".to_owned(),
        route_key: "$default".to_owned(),
        raw_path: incoming.raw_path.to_owned(),
        raw_query_string: incoming.raw_query.to_owned(),
        cookies: cookies(incoming.headers),
        headers: headers(incoming),
        query_string_parameters: parameters(incoming.raw_query),
        request_context: RequestContext {
            account_id: match incoming.caller {
                Some(_) => incoming.account_id.to_owned(),
                None => "anonymous".to_owned(),
            },
            api_id: id(incoming.function),
            authorizer: incoming
                .caller
                .map(|caller| authorizer(caller, incoming.account_id)),
            domain_name: host,
            domain_prefix,
            http: HttpContext {
                method: incoming.method.to_owned(),
                path: incoming.raw_path.to_owned(),
                protocol: protocol(incoming.version).to_owned(),
                source_ip: incoming.source.ip().to_string(),
                user_agent: text(incoming.headers, "user-agent").unwrap_or_default(),
            },
            request_id: incoming.request_id.to_owned(),
            route_key: "$default".to_owned(),
            stage: "$default".to_owned(),
            time: clock::common_log(incoming.unix_ms),
            time_epoch: incoming.unix_ms,
        },
        body,
        is_base64_encoded,
    }
}

/// The id of a function's URL, or of an alias's: stable for its name.
#[must_use]
pub fn id(name: &str) -> String {
    let digest = Sha256::digest(name.as_bytes());
    let mut id: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    id.truncate(API_ID_CHARS);
    id
}

fn authorizer(caller: &Caller, account_id: &str) -> Authorizer {
    let key = &caller.access_key_id;
    Authorizer {
        iam: IamCaller {
            access_key: key.clone(),
            account_id: account_id.to_owned(),
            caller_id: key.clone(),
            cognito_identity: None,
            principal_org_id: None,
            user_arn: caller.user_arn.clone(),
            user_id: key.clone(),
        },
    }
}

/// A Host header without its port; brackets of an IPv6 address stay.
fn domain(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    }
}

/// Lower-case names, repeated values joined by commas. Cookies have a member of their own.
fn headers(incoming: &Incoming<'_>) -> BTreeMap<String, String> {
    let mut joined: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in incoming.headers {
        if name == header::COOKIE {
            continue;
        }
        let value = String::from_utf8_lossy(value.as_bytes());
        joined
            .entry(name.as_str().to_owned())
            .and_modify(|all| {
                all.push(',');
                all.push_str(&value);
            })
            .or_insert_with(|| value.into_owned());
    }
    let source = incoming.source.ip().to_string();
    let forwarded = match joined.get("x-forwarded-for") {
        Some(before) => format!("{before}, {source}"),
        None => source,
    };
    joined.insert("x-forwarded-for".to_owned(), forwarded);
    let defaults = [
        ("x-forwarded-proto", "http".to_owned()),
        ("x-forwarded-port", incoming.local.port().to_string()),
        ("x-amzn-trace-id", incoming.trace_id.to_owned()),
    ];
    for (name, value) in defaults {
        joined.entry(name.to_owned()).or_insert(value);
    }
    joined
}

fn cookies(headers: &HeaderMap) -> Vec<String> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|value| {
            let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
            text.split(';')
                .map(|cookie| cookie.trim().to_owned())
                .filter(|cookie| !cookie.is_empty())
                .collect::<Vec<_>>()
        })
        .collect()
}

fn parameters(raw_query: &str) -> BTreeMap<String, String> {
    let mut joined: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in query(raw_query) {
        joined
            .entry(name)
            .and_modify(|all| {
                all.push(',');
                all.push_str(&value);
            })
            .or_insert(value);
    }
    joined
}

/// The body as text, or as base64 when its type says that it is none, or its bytes do.
fn body(incoming: &Incoming<'_>) -> (Option<String>, bool) {
    if incoming.body.is_empty() {
        return (None, false);
    }
    let encoded = || (Some(STANDARD.encode(incoming.body)), true);
    let is_text = text(incoming.headers, "content-type").is_none_or(|kind| is_text(&kind))
        && !incoming.headers.contains_key(header::CONTENT_ENCODING);
    match std::str::from_utf8(incoming.body) {
        Ok(text) if is_text => (Some(text.to_owned()), false),
        _ => encoded(),
    }
}

/// Content types that AWS hands on as text.
fn is_text(content_type: &str) -> bool {
    let kind = content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    kind.starts_with("text/")
        || matches!(
            kind.as_str(),
            "application/json" | "application/xml" | "application/javascript"
        )
        || (kind.starts_with("application/") && (kind.ends_with("+json") || kind.ends_with("+xml")))
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?;
    Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn event(pairs: &[(&str, &str)], query: &str, body: &[u8]) -> HttpEvent {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        build(&Incoming {
            function: "hello",
            method: "POST",
            raw_path: "/a%20b",
            raw_query: query,
            version: Version::HTTP_11,
            headers: &headers,
            body,
            source: "127.0.0.1:4000".parse().unwrap(),
            caller: None,
            account_id: "000000000000",
            local: "127.0.0.1:8080".parse().unwrap(),
            request_id: "id",
            trace_id: "Root=1",
            unix_ms: 1_795_440_429_007,
        })
    }

    #[test]
    fn a_request_becomes_the_event_of_format_2() {
        let event = event(
            &[
                ("Host", "localhost:8080"),
                ("X-A", "1"),
                ("x-a", "2"),
                ("Cookie", "a=b; c=d"),
                ("User-Agent", "curl"),
                ("Content-Type", "application/json; charset=utf-8"),
            ],
            "q=1&q=2&e=%C3%A9&flag",
            b"{}",
        );
        let value = serde_json::to_value(&event).unwrap();
        assert_eq!(value["version"], "2.0");
        assert_eq!(value["routeKey"], "$default");
        assert_eq!(value["rawPath"], "/a%20b");
        assert_eq!(value["rawQueryString"], "q=1&q=2&e=%C3%A9&flag");
        assert_eq!(value["cookies"], serde_json::json!(["a=b", "c=d"]));
        assert_eq!(value["headers"]["x-a"], "1,2");
        assert!(value["headers"].get("cookie").is_none());
        assert_eq!(
            value["queryStringParameters"],
            serde_json::json!({"q": "1,2", "e": "é", "flag": ""})
        );
        let context = &value["requestContext"];
        assert_eq!(context["accountId"], "anonymous");
        assert!(context.get("authorizer").is_none());
        assert_eq!(context["domainName"], "localhost:8080");
        assert_eq!(context["domainPrefix"], "localhost");
        assert_eq!(context["http"]["sourceIp"], "127.0.0.1");
        assert_eq!(context["http"]["userAgent"], "curl");
        assert_eq!(context["http"]["protocol"], "HTTP/1.1");
        assert_eq!(context["time"], "23/Nov/2026:13:27:09 +0000");
        assert_eq!(context["timeEpoch"], 1_795_440_429_007_i64);
        assert_eq!(value["body"], "{}");
        assert_eq!(value["isBase64Encoded"], false);
    }

    #[test]
    fn what_is_absent_is_left_out() {
        let value = serde_json::to_value(event(&[], "", b"")).unwrap();
        for member in ["queryStringParameters", "cookies", "body"] {
            assert!(value.get(member).is_none(), "{member}");
        }
        assert_eq!(value["rawQueryString"], "");
    }

    #[test]
    fn binary_bodies_are_base64() {
        let form = event(
            &[("content-type", "application/x-www-form-urlencoded")],
            "",
            b"a=b",
        );
        assert_eq!(
            (form.body.as_deref(), form.is_base64_encoded),
            (Some("YT1i"), true)
        );
        let bytes = event(&[("content-type", "text/plain")], "", &[0xff]);
        assert!(bytes.is_base64_encoded);
        let zipped = event(
            &[("content-type", "text/plain"), ("content-encoding", "gzip")],
            "",
            b"x",
        );
        assert!(zipped.is_base64_encoded);
    }

    proptest! {
        #[test]
        fn every_body_can_be_had_back(body in proptest::collection::vec(any::<u8>(), 1..200), kind in "(text/plain|image/png|application/json)") {
            let event = event(&[("content-type", &kind)], "", &body);
            let text = event.body.unwrap();
            let back = if event.is_base64_encoded { STANDARD.decode(text).unwrap() } else { text.into_bytes() };
            prop_assert_eq!(back, body);
        }

        #[test]
        fn no_query_panics(query in ".{0,100}") {
            let _ = parameters(&query);
        }
    }
}
