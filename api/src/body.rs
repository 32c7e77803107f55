//! Request bodies: read within a limit and a time.

use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use thiserror::Error;

use crate::connections::arriving::ArrivalError;

/// Longest time for a body to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(300);

/// Most bytes that are reserved on a client's word.
const RESERVE_BYTES_MAX: usize = 1024 * 1024;

/// Why a body was not read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BodyError {
    /// It is over its limit.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// The connection failed.
    #[error("the body did not arrive in full")]
    Broken,
    /// It took too long.
    #[error("the body came too slowly")]
    Slow,
}

/// The whole body, at most `limit` bytes.
///
/// # Errors
/// See [`BodyError`].
pub async fn read(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, BodyError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    tokio::time::timeout(BODY_LIMIT, collect(announced, body, limit))
        .await
        .unwrap_or(Err(BodyError::Slow))
}

async fn collect(
    announced: Option<usize>,
    mut body: Body,
    limit: usize,
) -> Result<Bytes, BodyError> {
    // Of one over its limit no more is read than shows that; what becomes of the rest, `connections::arriving` says.
    if announced.is_some_and(|length| length > limit) {
        return Err(BodyError::TooLarge(limit));
    }
    let mut collected = BytesMut::with_capacity(announced.unwrap_or(0).min(RESERVE_BYTES_MAX));
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(broken)?.into_data() else {
            continue;
        };
        if collected.len() + data.len() > limit {
            return Err(BodyError::TooLarge(limit));
        }
        if collected.is_empty() && body.is_end_stream() {
            return Ok(data); // it came whole, or was in memory: nothing as large as code is held twice
        }
        collected.extend_from_slice(&data);
    }
    Ok(collected.freeze())
}

fn broken(error: axum::Error) -> BodyError {
    match error.into_inner().downcast_ref() {
        Some(ArrivalError::Slow) => BodyError::Slow,
        _ => BodyError::Broken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_limit_is_exact() {
        let headers = HeaderMap::new();
        let body = || Body::from(vec![b'x'; 100]);
        assert_eq!(read(&headers, body(), 100).await.unwrap().len(), 100);
        assert_eq!(
            read(&headers, body(), 99).await,
            Err(BodyError::TooLarge(99))
        );
    }

    #[tokio::test]
    async fn a_body_in_memory_is_not_copied() {
        let bytes = Bytes::from(vec![b'x'; 100]);
        let found = read(&HeaderMap::new(), Body::from(bytes.clone()), 100).await;
        assert_eq!(found.unwrap().as_ptr(), bytes.as_ptr());
    }
}
