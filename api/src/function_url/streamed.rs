//! Function URLs that hand on an answer as the function writes it.
//!
//! What the function sends with the type `application/vnd.awslambda.http-integration-response` begins with a prelude: JSON with
//! status, headers and cookies, then eight NUL bytes, then the body. Anything else is the body of a 200.

use std::io;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use thaw_runtime::StreamPart;

use super::result;
use crate::invocation::FunctionResult;
use crate::invocation::running::{Ended, Running};

const WITH_PRELUDE: &str = "application/vnd.awslambda.http-integration-response";
const PRELUDE_END: [u8; 8] = [0; 8];
/// Longest prelude: headers of more than this no client takes.
const PRELUDE_BYTES_MAX: usize = 1024 * 1024;

/// What came of a streamed invocation's beginning.
pub(super) enum Begun {
    /// Its body goes on.
    Response(Response<Body>),
    /// It ended before it answered.
    Ended(Ended),
    /// Its beginning is no HTTP response, and why.
    Malformed(String),
}

/// Waits until the response's status and headers are known.
pub(super) async fn begin(mut running: Running) -> Begun {
    let content_type = match running.parts.recv().await {
        Some(StreamPart::Head { content_type }) => content_type,
        Some(StreamPart::Chunk(_)) => None,
        None => return Begun::Ended(running.end().await),
    };
    if content_type.as_deref() != Some(WITH_PRELUDE) {
        let kind = content_type.and_then(|text| HeaderValue::from_str(&text).ok());
        let kind = kind.unwrap_or(HeaderValue::from_static("application/octet-stream"));
        let mut response = Response::new(body(Bytes::new(), running));
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        return Begun::Response(response);
    }
    let mut begun = BytesMut::new();
    let end = loop {
        if let Some(end) = find(&begun, &PRELUDE_END) {
            break end;
        }
        if begun.len() > PRELUDE_BYTES_MAX {
            return Begun::Malformed("its prelude does not end".to_owned());
        }
        match running.parts.recv().await {
            Some(StreamPart::Chunk(bytes)) => begun.extend_from_slice(&bytes),
            Some(StreamPart::Head { .. }) => {}
            None => return Begun::Malformed("it ended within its prelude".to_owned()),
        }
    };
    let prelude = begun.split_to(end);
    let rest = begun.split_off(PRELUDE_END.len()).freeze();
    match result::streamed(&prelude, body(rest, running)) {
        Ok(response) => Begun::Response(response),
        Err(fault) => Begun::Malformed(fault.to_string()),
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes
        .windows(wanted.len())
        .position(|window| window == wanted)
}

/// What is left of the answer. A function that fails within it breaks the connection off: its client must not take it for whole.
fn body(first: Bytes, running: Running) -> Body {
    let parts = stream::unfold(Some((first, running)), |state| async move {
        let (first, mut running) = state?;
        if !first.is_empty() {
            return Some((Ok(first), Some((Bytes::new(), running))));
        }
        loop {
            match running.parts.recv().await {
                Some(StreamPart::Chunk(bytes)) if !bytes.is_empty() => {
                    return Some((Ok(bytes), Some((Bytes::new(), running))));
                }
                Some(_) => {}
                None => {
                    return match running.end().await {
                        Ok(answer) if matches!(answer.result, FunctionResult::Response(_)) => None,
                        _ => {
                            let broken = io::Error::other("the function failed while it answered");
                            Some((Err(broken), None))
                        }
                    };
                }
            }
        }
    });
    Body::from_stream(parts)
}
