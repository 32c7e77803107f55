//! A request's body on its way in: a client that trickles is given up, and what nobody wants of a body is read and dropped.
//!
//! An answer may come before the end of the body that it is for: too large, not allowed, no such function. A client that is
//! still sending then would see a broken connection instead of it; so the rest is read, within bounds, beside the answer. One
//! that waits to be told to go on (`Expect: 100-continue`) is not told to.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::HttpBody as Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming, SizeHint};
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

use super::pace::{Pace, Patience};
use super::watched::{Busy, expired};

/// Most of an unwanted body that is read.
const REST_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Longest time for it.
const REST_LIMIT: Duration = Duration::from_secs(30);

/// Why a body does not arrive.
#[derive(Debug, Error)]
pub enum ArrivalError {
    /// The connection failed.
    #[error("the body did not arrive in full")]
    Broken(#[source] hyper::Error),
    /// The client kept us waiting for too long.
    #[error("the body came too slowly")]
    Slow,
}

/// A body that arrives.
pub struct Arriving {
    inner: Option<Incoming>,
    pace: Pace,
    timer: Option<Pin<Box<Sleep>>>,
    /// The client was told to send it, or does not wait for that.
    is_sent: bool,
    busy: Arc<Busy>,
    stop: CancellationToken,
}

impl Arriving {
    /// Of a request that is over only when `busy` is dropped; `waits` says that the client wants to be told to go on. `stop`
    /// ends the reading of what nobody wants.
    #[must_use]
    pub fn new(
        inner: Incoming,
        patience: Patience,
        waits: bool,
        busy: Arc<Busy>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            inner: Some(inner),
            pace: Pace::new(patience),
            timer: None,
            is_sent: !waits,
            busy,
            stop,
        }
    }
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = ArrivalError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ArrivalError>>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else {
            return Poll::Ready(None);
        };
        this.is_sent = true;
        let polled = Pin::new(inner).poll_frame(cx);
        let now = Instant::now();
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                this.pace.moved(frame.data_ref().map_or(0, Bytes::len), now);
                this.timer = None;
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.inner = None;
                Poll::Ready(Some(Err(ArrivalError::Broken(error))))
            }
            Poll::Ready(None) => {
                this.inner = None;
                Poll::Ready(None)
            }
            Poll::Pending => {
                let until = this.pace.wait(now);
                if expired(&mut this.timer, until, cx).is_pending() {
                    return Poll::Pending;
                }
                this.inner = None;
                Poll::Ready(Some(Err(ArrivalError::Slow)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let inner = self.inner.as_ref();
        inner.map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let rest = self.inner.take();
        let rest = rest.filter(|rest| self.is_sent && !rest.is_end_stream());
        if let (Some(rest), Ok(runtime)) = (rest, Handle::try_current()) {
            let (busy, stop) = (Arc::clone(&self.busy), self.stop.clone());
            runtime.spawn(async move {
                tokio::select! {
                    () = drop_all(rest) => {}
                    () = tokio::time::sleep(REST_LIMIT) => {}
                    () = stop.cancelled() => {}
                }
                drop(busy);
            });
        }
    }
}

async fn drop_all(mut rest: Incoming) {
    let mut left = REST_BYTES_MAX;
    while let Some(Ok(frame)) = rest.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            break;
        }
    }
}
