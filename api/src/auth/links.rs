//! Links that the gateway gives out to its own routes: GetFunction's `Code.Location` and a layer version's `Content.Location`
//! are fetched by clients that sign nothing, so they are presigned, as AWS's own are.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Response, StatusCode, header};
use serde_json::Value;

use super::Auth;
use crate::clock;

/// Actions whose answers have such a link.
pub(super) const GIVEN_BY: [&str; 4] = [
    "lambda:GetFunction",
    "lambda:GetLayerVersion",
    "lambda:GetLayerVersionByArn",
    "lambda:PublishLayerVersion",
];

/// How long a link is good, seconds; AWS's own are good for ten minutes.
const LIFE_SECONDS: i64 = 600;
/// Largest answer that is looked into, bytes; a function's configuration is far smaller.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// An answer with its link presigned for the host that was asked.
pub(super) async fn presigned(
    auth: &Arc<Auth>,
    host: Option<String>,
    response: Response<Body>,
) -> Response<Body> {
    let Some(host) = host.filter(|_| response.status().is_success()) else {
        return response;
    };
    let (mut parts, body) = response.into_parts();
    let Ok(bytes) = to_bytes(body, ANSWER_BYTES_MAX).await else {
        let mut failed = Response::new(Body::empty());
        *failed.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        return failed;
    };
    let body = signed(auth, &host, &bytes).map_or_else(|| Body::from(bytes.clone()), Body::from);
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, body)
}

fn signed(auth: &Auth, host: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut document: Value = serde_json::from_slice(bytes).ok()?;
    let content = match document.get_mut("Content") {
        Some(content) => content,
        None => document.get_mut("Code")?,
    };
    let location = content.get_mut("Location")?;
    let (scheme, rest) = location.as_str()?.split_once("://")?;
    let (origin, target) = (format!("{scheme}://{host}"), rest.strip_prefix(host)?);
    let now = clock::unix_ms().div_euclid(1000);
    let target = auth.signer()?.presign(target, host, LIFE_SECONDS, now)?;
    *location = Value::String(format!("{origin}{target}"));
    serde_json::to_vec(&document).ok()
}

/// The host that a request names.
pub(super) fn host(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(header::HOST)?.to_str().ok()?.to_owned())
}
