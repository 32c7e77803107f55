//! Requests that a web page has a browser send. With auth off whoever reaches the gateway may do everything, and every page that
//! somebody on this machine looks at reaches its loopback: by a form or a script of its own origin, which `Origin` tells (Fetch
//! standard, "`Origin` header"), or under a name of its own that resolves to 127.0.0.1 (DNS rebinding), which `Host` tells. Pure.

use std::net::IpAddr;

use axum::http::{HeaderMap, Uri, header};

/// The page's origin, or the name that it calls this machine by, if it is not this machine's own.
#[must_use]
pub fn sent_by_a_page(headers: &HeaderMap) -> Option<String> {
    let origin = headers.get_all(header::ORIGIN).iter().find(|origin| {
        let origin = origin
            .to_str()
            .ok()
            .and_then(|text| text.parse::<Uri>().ok());
        !origin.is_some_and(|origin| origin.host().is_some_and(is_loopback))
    });
    let host = headers.get_all(header::HOST).iter().find(|host| {
        let name = host.to_str().ok().map(without_port);
        // An address is one that no resolver can turn into another.
        !name.is_some_and(|name| is_loopback(name) || address(name).is_some())
    });
    let found = origin.or(host)?;
    Some(String::from_utf8_lossy(found.as_bytes()).into_owned())
}

/// What to tell of it.
#[must_use]
pub fn refusal(page: &str) -> String {
    format!(
        "{page:?} is not this machine: a gateway that asks for no signatures takes no requests from web pages, and none to other names \
         than localhost or an address. Start it with --auth, or call it by its address"
    )
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn address(name: &str) -> Option<IpAddr> {
    let bare = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    bare.unwrap_or(name).parse().ok()
}

/// A loopback address, or a name that is one to every resolver (RFC 6761, 6.3).
fn is_loopback(name: &str) -> bool {
    let low = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let named = low == "localhost" || low.ends_with(".localhost");
    named || address(name).is_some_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: header::HeaderName, value: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, "127.0.0.1:9000".parse().unwrap());
        headers.append(name, value.parse().unwrap());
        sent_by_a_page(&headers)
    }

    #[test]
    fn a_page_is_told_by_its_origin_and_by_its_name_for_this_machine() {
        for own in [
            "localhost",
            "LOCALHOST:9000",
            "x.localhost.:1",
            "127.0.0.1",
            "[::1]:9000",
            "192.168.1.2:80",
        ] {
            assert_eq!(found(header::HOST, own), None, "{own}");
        }
        for own in [
            "http://localhost:3000",
            "https://[::1]",
            "http://127.0.0.1:9000",
        ] {
            assert_eq!(found(header::ORIGIN, own), None, "{own}");
        }
        for name in [
            "evil.example:9000",
            "localhost.evil.example",
            "evillocalhost",
            "127.0.0.1.evil.example",
            "",
            "localhost:x",
        ] {
            assert_eq!(found(header::HOST, name), Some(name.to_owned()));
        }
        for page in [
            "https://evil.example",
            "http://localhost.evil.example:9000",
            "null",
            "http://localhost@evil.example",
            "http://192.168.1.2",
            "",
        ] {
            assert_eq!(found(header::ORIGIN, page), Some(page.to_owned()));
        }
        assert_eq!(sent_by_a_page(&HeaderMap::new()), None);
    }
}
