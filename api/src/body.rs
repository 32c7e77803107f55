//! Request bodies: read within a limit and a time.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use thiserror::Error;

/// Of a body over its limit, this much more is read and dropped: a client that is still sending would see a broken
/// connection instead of the error.
const DRAIN_BYTES_MAX: usize = 256 * 1024 * 1024;

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
    #[error("the body took longer than {BODY_LIMIT:?}")]
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
    let mut collected = BytesMut::with_capacity(announced.unwrap_or(0).min(RESERVE_BYTES_MAX));
    let mut dropped = 0_usize;
    let mut over = announced.is_some_and(|length| length > limit);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| BodyError::Broken)?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if over || collected.len() + data.len() > limit {
            over = true;
            collected.clear();
            dropped += data.len();
            if dropped > DRAIN_BYTES_MAX {
                break;
            }
        } else {
            collected.extend_from_slice(&data);
        }
    }
    if over {
        return Err(BodyError::TooLarge(limit));
    }
    Ok(collected.freeze())
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
}
