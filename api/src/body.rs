//! Request bodies: read within a limit and a time.

use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use thiserror::Error;

/// Of a body over its limit, this much more is read and dropped: a client that is still sending would see a broken
/// connection instead of the error.
const DRAIN_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Longest time for a body to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(300);

/// Longest time to wait for the rest of a body that nobody wants.
const SKIP_LIMIT: Duration = Duration::from_secs(30);

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

/// Reads a body of at most `limit` bytes and drops it, for an answer that comes before it.
///
/// # Errors
/// See [`BodyError`].
pub async fn skip(mut body: Body, limit: usize) -> Result<(), BodyError> {
    let skipping = async {
        let mut dropped = 0_usize;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| BodyError::Broken)?;
            dropped += frame.data_ref().map_or(0, Bytes::len);
            if dropped > limit {
                return Err(BodyError::TooLarge(limit));
            }
        }
        Ok(())
    };
    tokio::time::timeout(SKIP_LIMIT, skipping)
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
        if !over && collected.is_empty() && data.len() <= limit && body.is_end_stream() {
            return Ok(data); // it came whole, or was in memory: nothing as large as code is held twice
        }
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

    #[tokio::test]
    async fn a_body_in_memory_is_not_copied() {
        let bytes = Bytes::from(vec![b'x'; 100]);
        let found = read(&HeaderMap::new(), Body::from(bytes.clone()), 100).await;
        assert_eq!(found.unwrap().as_ptr(), bytes.as_ptr());
    }

    #[tokio::test]
    async fn an_unwanted_body_is_read_up_to_a_limit() {
        let body = || Body::from(vec![b'x'; 100]);
        assert_eq!(skip(body(), 100).await, Ok(()));
        assert_eq!(skip(body(), 99).await, Err(BodyError::TooLarge(99)));
    }
}
