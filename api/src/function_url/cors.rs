//! Cross-origin requests to function URLs, as a configuration allows them (Fetch standard, "HTTP CORS protocol"). Pure.
//!
//! Without a configuration the function's own headers count. With one, the gateway answers preflights itself, and its headers
//! take the place of the function's, as AWS does it.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use thaw_api_types::lambda::Cors;

const OURS: [HeaderName; 6] = [
    header::ACCESS_CONTROL_ALLOW_ORIGIN,
    header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
    header::ACCESS_CONTROL_ALLOW_HEADERS,
    header::ACCESS_CONTROL_ALLOW_METHODS,
    header::ACCESS_CONTROL_EXPOSE_HEADERS,
    header::ACCESS_CONTROL_MAX_AGE,
];

/// The answer to a browser that asks whether it may send a request; `None` for all other requests.
#[must_use]
pub fn preflight(cors: &Cors, method: &Method, headers: &HeaderMap) -> Option<Response<Body>> {
    let wanted = headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
    if method != Method::OPTIONS || !headers.contains_key(header::ORIGIN) {
        return None;
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::OK;
    if origin(cors, headers).is_none() {
        return Some(response);
    }
    allow(cors, headers, &mut response);
    let methods = cors.allow_methods.as_deref().unwrap_or_default();
    let is_allowed = |method: &String| method == "*" || wanted.as_bytes() == method.as_bytes();
    let answer = response.headers_mut();
    if methods.iter().any(is_allowed) {
        answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, wanted.clone());
    }
    if let Some(asked) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        let names = String::from_utf8_lossy(asked.as_bytes()).into_owned();
        let allowed = cors.allow_headers.as_deref().unwrap_or_default();
        let fits = |name: &str| {
            (allowed.iter()).any(|may| may == "*" || may.eq_ignore_ascii_case(name.trim()))
        };
        let granted: Vec<&str> = names.split(',').filter(|name| fits(name)).collect();
        if let Ok(value) = HeaderValue::from_str(&granted.join(","))
            && !granted.is_empty()
        {
            answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, value);
        }
    }
    if let Some(seconds) = cors.max_age {
        answer.insert(header::ACCESS_CONTROL_MAX_AGE, seconds.into());
    }
    Some(response)
}

/// Puts a configuration's headers on the answer to a request with these headers.
pub fn allow(cors: &Cors, request: &HeaderMap, response: &mut Response<Body>) {
    let headers = response.headers_mut();
    for name in OURS {
        headers.remove(name);
    }
    let Some(origin) = origin(cors, request) else {
        return;
    };
    if origin != "*" {
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
    }
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    if cors.allow_credentials == Some(true) {
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
            HeaderValue::from_static("true"),
        );
    }
    let exposed = cors.expose_headers.as_deref().unwrap_or_default();
    if let Ok(value) = HeaderValue::from_str(&exposed.join(","))
        && !exposed.is_empty()
    {
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, value);
    }
}

/// What to answer a request's origin with, if it may read the answer. A browser takes no `*` together with credentials.
fn origin(cors: &Cors, request: &HeaderMap) -> Option<HeaderValue> {
    let origin = request.get(header::ORIGIN)?;
    let allowed = cors.allow_origins.as_deref().unwrap_or_default();
    if allowed.iter().any(|may| may == "*") {
        return Some(match cors.allow_credentials {
            Some(true) => origin.clone(),
            _ => HeaderValue::from_static("*"),
        });
    }
    let is_it = |may: &String| may.as_bytes().eq_ignore_ascii_case(origin.as_bytes());
    allowed.iter().any(is_it).then(|| origin.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors() -> Cors {
        Cors {
            allow_origins: Some(vec!["https://a.example".to_owned()]),
            allow_methods: Some(vec!["PUT".to_owned()]),
            allow_headers: Some(vec!["X-One".to_owned()]),
            expose_headers: Some(vec!["X-Two".to_owned(), "X-Three".to_owned()]),
            max_age: Some(60),
            allow_credentials: Some(true),
        }
    }

    fn request(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| {
                let value = HeaderValue::from_str(value).unwrap();
                (HeaderName::from_static(name), value)
            })
            .collect()
    }

    fn shown(response: &Response<Body>) -> Vec<String> {
        let headers = response.headers().iter();
        let mut lines: Vec<_> = headers
            .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
            .collect();
        lines.sort();
        lines
    }

    #[test]
    fn a_preflight_grants_what_is_configured_and_no_more() {
        let asked = request(&[
            ("origin", "https://a.example"),
            ("access-control-request-method", "PUT"),
            ("access-control-request-headers", "x-one,x-evil"),
        ]);
        let granted = preflight(&cors(), &Method::OPTIONS, &asked).unwrap();
        assert_eq!(
            shown(&granted),
            [
                "access-control-allow-credentials: true",
                "access-control-allow-headers: x-one",
                "access-control-allow-methods: PUT",
                "access-control-allow-origin: https://a.example",
                "access-control-expose-headers: X-Two,X-Three",
                "access-control-max-age: 60",
                "vary: Origin",
            ]
        );
        let mut other = asked.clone();
        other.insert("origin", HeaderValue::from_static("https://b.example"));
        let refused = preflight(&cors(), &Method::OPTIONS, &other).unwrap();
        assert!(refused.headers().is_empty());
        assert!(preflight(&cors(), &Method::GET, &asked).is_none());
        let plain = request(&[("origin", "https://a.example")]);
        assert!(preflight(&cors(), &Method::OPTIONS, &plain).is_none());
    }

    #[test]
    fn the_functions_own_headers_give_way() {
        let mut response = Response::new(Body::empty());
        let name = header::ACCESS_CONTROL_ALLOW_ORIGIN;
        response
            .headers_mut()
            .insert(name.clone(), HeaderValue::from_static("*"));
        allow(
            &cors(),
            &request(&[("origin", "https://b.example")]),
            &mut response,
        );
        assert!(response.headers().is_empty());
        let open = Cors {
            allow_origins: Some(vec!["*".to_owned()]),
            ..Cors::default()
        };
        allow(
            &open,
            &request(&[("origin", "https://b.example")]),
            &mut response,
        );
        assert_eq!(shown(&response), ["access-control-allow-origin: *"]);
    }
}
