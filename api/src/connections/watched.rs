//! The bytes of one connection, with a limit on every wait for its client.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::ConnectionLimits;
use super::pace::Pace;

/// What a connection is about, as its HTTP side knows and its bytes do not.
#[derive(Default)]
pub struct Activity {
    /// Requests begun.
    requests: AtomicU64,
    is_busy: AtomicBool,
    reader: AtomicWaker,
}

/// A request that is not over: its answer is under way, or its body is. Requests of one connection follow each other.
pub struct Busy(Arc<Activity>);

impl Activity {
    /// A request's head has come.
    pub fn begin(self: &Arc<Self>) -> Arc<Busy> {
        self.requests.fetch_add(1, Ordering::AcqRel);
        self.is_busy.store(true, Ordering::Release);
        Arc::new(Busy(Arc::clone(self)))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.is_busy.store(false, Ordering::Release);
        // From now on the reader's wait has a limit.
        self.0.reader.wake();
    }
}

/// A stream whose peer is waited for only so long: for the first byte of a request, for the rest of its head, and for room to
/// write. What a body may take, [`super::arriving`] says.
pub struct Watched<S> {
    inner: S,
    activity: Arc<Activity>,
    limits: ConnectionLimits,
    /// Requests begun when the two below were last looked at.
    requests: u64,
    idle_since: Option<Instant>,
    head_since: Option<Instant>,
    writing: Pace,
    read_timer: Option<Pin<Box<Sleep>>>,
    write_timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Watched<S> {
    /// Over a stream.
    pub fn new(inner: S, activity: Arc<Activity>, limits: ConnectionLimits) -> Self {
        Self {
            inner,
            activity,
            limits,
            requests: 0,
            idle_since: None,
            head_since: None,
            writing: Pace::new(limits.patience),
            read_timer: None,
            write_timer: None,
        }
    }

    /// Until when the next byte is waited for; `None` while a request is under way.
    fn read_until(&mut self, got: usize) -> Option<Instant> {
        let requests = self.activity.requests.load(Ordering::Acquire);
        if requests != self.requests || self.activity.is_busy.load(Ordering::Acquire) {
            (self.requests, self.idle_since, self.head_since) = (requests, None, None);
        }
        if self.activity.is_busy.load(Ordering::Acquire) {
            return None;
        }
        let now = Instant::now();
        if got > 0 {
            self.head_since.get_or_insert(now);
        }
        Some(match self.head_since {
            Some(since) => since + self.limits.head,
            None => *self.idle_since.get_or_insert(now) + self.limits.idle,
        })
    }

    fn wrote<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        let now = Instant::now();
        match polled {
            Poll::Pending => {
                let until = self.writing.wait(now);
                ready!(expired(&mut self.write_timer, until, cx));
                Poll::Ready(Err(late("the client does not take the answer")))
            }
            Poll::Ready(done) => {
                if let Ok(value) = &done {
                    self.writing.moved(bytes(value), now);
                }
                self.write_timer = None;
                Poll::Ready(done)
            }
        }
    }
}

/// Ready when this time has come; keeps the timer until then.
pub fn expired(
    timer: &mut Option<Pin<Box<Sleep>>>,
    until: Instant,
    cx: &mut Context<'_>,
) -> Poll<()> {
    let until = until.into();
    let sleep = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
    if sleep.deadline() != until {
        sleep.as_mut().reset(until);
    }
    sleep.as_mut().poll(cx)
}

fn late(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, text)
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.inner).poll_read(cx, buffer);
        if polled.is_ready() {
            this.read_until(buffer.filled().len() - before);
            return polled;
        }
        // Before the look at what goes on, so that an end of it in between is heard.
        this.activity.reader.register(cx.waker());
        match this.read_until(0) {
            None => {
                this.read_timer = None;
                Poll::Pending
            }
            Some(until) => {
                ready!(expired(&mut this.read_timer, until, cx));
                Poll::Ready(Err(late("no request came in time")))
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.wrote(cx, polled, |count| *count)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.wrote(cx, polled, |count| *count)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.wrote(cx, polled, |()| 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.wrote(cx, polled, |()| 0)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::super::pace::Patience;
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(3600);

    fn limits(idle: Duration, head: Duration) -> ConnectionLimits {
        ConnectionLimits {
            count_max: 1,
            idle,
            head,
            patience: Patience {
                longest: SHORT,
                bytes_per_second: 1,
            },
        }
    }

    async fn is_given_up(stream: &mut Watched<DuplexStream>) {
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_silent_client_has_the_idle_limit_and_one_within_a_head_that_of_heads() {
        let (_client, server) = tokio::io::duplex(64);
        let mut stream = Watched::new(server, Arc::default(), limits(SHORT, LONG));
        is_given_up(&mut stream).await;

        let (mut client, server) = tokio::io::duplex(64);
        let mut stream = Watched::new(server, Arc::default(), limits(LONG, SHORT));
        client.write_all(b"G").await.unwrap();
        stream.read_u8().await.unwrap();
        is_given_up(&mut stream).await;
    }

    #[tokio::test]
    async fn a_request_under_way_is_not_idle_and_its_end_begins_a_new_wait() {
        let (mut client, server) = tokio::io::duplex(64);
        let activity = Arc::new(Activity::default());
        let mut stream = Watched::new(server, Arc::clone(&activity), limits(SHORT, LONG));
        client.write_all(b"G").await.unwrap();
        stream.read_u8().await.unwrap();
        let busy = activity.begin();
        let mut read = pin!(is_given_up(&mut stream));
        assert!(tokio::time::timeout(4 * SHORT, &mut read).await.is_err());
        drop(busy);
        read.await;
    }

    #[tokio::test]
    async fn who_does_not_read_is_given_up() {
        let (_client, server) = tokio::io::duplex(16);
        let mut stream = Watched::new(server, Arc::default(), limits(LONG, LONG));
        stream.write_all(&[0; 16]).await.unwrap();
        let error = stream.write_all(&[0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
