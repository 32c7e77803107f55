//! From a function's result to an HTTP response. Pure.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Response, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::Value;
use thaw_api_types::function_url::HttpResult;
use thiserror::Error;

/// Why a result is no HTTP response; the function is at fault.
#[derive(Debug, Error)]
pub enum ResultFault {
    /// It is no JSON.
    #[error("it is not JSON")]
    NotJson(#[source] serde_json::Error),
    /// A member has the wrong type.
    #[error("it is malformed: {0}")]
    Shape(serde_json::Error),
    /// Its status is no final HTTP status.
    #[error("statusCode {0} is not between 200 and 599")]
    Status(u16),
    /// A header's name or value has characters that headers cannot have.
    #[error("header {0:?} cannot be sent")]
    Header(String),
    /// Its body says that it is base64, and is not.
    #[error("its body is not base64")]
    Base64(#[source] base64::DecodeError),
}

/// Headers that belong to the connection, which is the gateway's.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The response that a function's result describes. Without `statusCode` the result is the body: a string its characters, anything
/// else its JSON without white space, as AWS sends it.
///
/// # Errors
/// See [`ResultFault`].
pub fn response(payload: Bytes) -> Result<Response<Body>, ResultFault> {
    let value: Value = serde_json::from_slice(&payload).map_err(ResultFault::NotJson)?;
    if value.get("statusCode").is_none() {
        let body = match value {
            Value::String(text) => text.into_bytes(),
            _ => compact(&payload),
        };
        let mut response = Response::new(Body::from(body));
        json_type(&mut response);
        return Ok(response);
    }
    drop(payload);
    let mut result: HttpResult = serde_json::from_value(value).map_err(ResultFault::Shape)?;
    let body = match result.body.take() {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(text)) if result.is_base64_encoded == Some(true) => {
            STANDARD.decode(text).map_err(ResultFault::Base64)?
        }
        Some(Value::String(text)) => text.into_bytes(),
        Some(other) => other.to_string().into_bytes(),
    };
    head(result, Body::from(body))
}

/// The response of a stream whose prelude this is (status, headers and cookies as JSON, as AWS's streaming runtimes write it).
///
/// # Errors
/// See [`ResultFault`].
pub fn streamed(prelude: &[u8], body: Body) -> Result<Response<Body>, ResultFault> {
    let mut value: Value = serde_json::from_slice(prelude).map_err(ResultFault::NotJson)?;
    if let Some(members) = value.as_object_mut() {
        members.entry("statusCode").or_insert_with(|| 200.into());
    }
    head(
        serde_json::from_value(value).map_err(ResultFault::Shape)?,
        body,
    )
}

fn head(result: HttpResult, body: Body) -> Result<Response<Body>, ResultFault> {
    let status = StatusCode::from_u16(result.status_code)
        .ok()
        .filter(|status| (200..=599).contains(&status.as_u16()))
        .ok_or(ResultFault::Status(result.status_code))?;
    let mut response = Response::new(body);
    *response.status_mut() = status;
    json_type(&mut response);
    for (name, value) in result.headers.unwrap_or_default() {
        let text = match value {
            Value::Null => continue,
            Value::String(text) => text,
            other => other.to_string(),
        };
        let refused = || ResultFault::Header(name.chars().take(64).collect());
        let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| refused())?;
        let value = HeaderValue::from_str(&text).map_err(|_| refused())?;
        if !HOP_BY_HOP.contains(&key) {
            response.headers_mut().insert(key, value);
        }
    }
    for cookie in result.cookies.unwrap_or_default() {
        let value = HeaderValue::from_str(&cookie)
            .map_err(|_| ResultFault::Header("set-cookie".to_owned()))?;
        response.headers_mut().append(header::SET_COOKIE, value);
    }
    Ok(response)
}

/// JSON without the white space between its tokens. Not written anew, which would order members and round numbers.
fn compact(json: &[u8]) -> Vec<u8> {
    let (mut is_text, mut is_escaped) = (false, false);
    let mut kept = |byte: &u8| {
        let keeps = is_text || !byte.is_ascii_whitespace();
        match byte {
            b'"' if !is_escaped => is_text = !is_text,
            _ => {}
        }
        is_escaped = is_text && *byte == b'\\' && !is_escaped;
        keeps
    };
    json.iter().filter(|byte| kept(byte)).copied().collect()
}

fn json_type(response: &mut Response<Body>) {
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use proptest::prelude::*;

    use super::*;

    async fn of(text: &str) -> Result<(StatusCode, axum::http::HeaderMap, Bytes), ResultFault> {
        let (parts, body) = response(Bytes::from(text.to_owned()))?.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Ok((parts.status, parts.headers, body))
    }

    #[tokio::test]
    async fn a_result_without_a_status_is_the_body() {
        for (text, sent) in [
            (r#"{"b": 1, "a": 1.50}"#, r#"{"b":1,"a":1.50}"#),
            (r#""hello \"you\"""#, r#"hello "you""#),
            ("null", "null"),
            (
                "[\"a \\\\\", \"\\\" b\",\n true]",
                r#"["a \\","\" b",true]"#,
            ),
        ] {
            let (status, headers, body) = of(text).await.unwrap();
            assert_eq!(status, StatusCode::OK);
            assert_eq!(headers["content-type"], "application/json");
            assert_eq!(body, sent);
        }
    }

    #[tokio::test]
    async fn a_structured_result_is_obeyed() {
        let (status, headers, body) = of(
            r#"{"statusCode":201,"headers":{"Content-Type":"text/html","X-N":7,"Content-Length":"99"},
                "cookies":["a=1","b=2"],"body":"aGk=","isBase64Encoded":true}"#,
        )
        .await
        .unwrap();
        assert_eq!(status, StatusCode::CREATED);
        assert_eq!(headers["content-type"], "text/html");
        assert_eq!(headers["x-n"], "7");
        assert!(headers.get("content-length").is_none());
        let cookies: Vec<_> = headers.get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1", "b=2"]);
        assert_eq!(body, "hi");
    }

    #[tokio::test]
    async fn a_status_may_be_written_as_text() {
        let (status, _, body) = of(r#"{"statusCode":"418","body":"tea"}"#).await.unwrap();
        assert_eq!((status.as_u16(), body.as_ref()), (418, b"tea".as_slice()));
    }

    #[tokio::test]
    async fn nonsense_is_the_functions_fault() {
        for text in [
            "not json",
            r#"{"statusCode":"abc"}"#,
            r#"{"statusCode":99}"#,
            r#"{"statusCode":101}"#,
            r#"{"statusCode":200,"headers":{"a b":"c"}}"#,
            r#"{"statusCode":200,"headers":{"a":"c\n"}}"#,
            r#"{"statusCode":200,"body":"%","isBase64Encoded":true}"#,
            r#"{"statusCode":null}"#,
        ] {
            assert!(of(text).await.is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_result_panics(text in ".{0,200}", status: u16) {
            let _ = response(Bytes::from(text.clone()));
            let structured = serde_json::json!({"statusCode": status, "headers": {"x": text}}).to_string();
            let _ = response(Bytes::from(structured));
        }
    }
}
