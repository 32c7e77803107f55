//! The guest's end of a connection: what passes is counted, waits for the slot's bandwidth, and shows that the connection is alive.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use crate::slot::{Slot, Way};

/// Most bytes that pass at once: what a connection can be ahead of its slot's bandwidth.
const CHUNK_BYTES: usize = 8 * 1024;
/// A connection on which nothing has passed for so long is ended; AWS's NAT gateway does so after 350 s.
const IDLE_MAX: Duration = Duration::from_secs(350);

/// A stream of a guest.
#[derive(Debug)]
pub struct Metered {
    stream: TcpStream,
    slot: Arc<Slot>,
    pulse: Pulse,
    sleeps: [Option<Pin<Box<Sleep>>>; 2],
}

/// When something passed last, milliseconds since the start.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<AtomicU64>);

impl Metered {
    /// `stream` of a guest in `slot`.
    pub fn new(stream: TcpStream, slot: Arc<Slot>) -> Self {
        let pulse = Pulse(Arc::new(AtomicU64::new(0)));
        pulse.beat(&slot);
        Self {
            stream,
            slot,
            pulse,
            sleeps: [None, None],
        }
    }

    /// Whether it lives; outlives the stream.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// The stream itself.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    fn poll_free(&mut self, way: Way, context: &mut Context<'_>) -> Poll<()> {
        let slot = &self.slot;
        let sleeping = &mut self.sleeps[way as usize];
        loop {
            if let Some(sleeping) = sleeping {
                ready!(sleeping.as_mut().poll(context));
            }
            // Others may have spent what this one has waited for.
            let wait = slot.wait(way);
            if wait.is_zero() {
                *sleeping = None;
                return Poll::Ready(());
            }
            *sleeping = Some(Box::pin(sleep(wait)));
        }
    }

    fn passed(&self, way: Way, bytes: usize) {
        self.slot.spend(way, bytes as u64);
        self.pulse.beat(&self.slot);
    }
}

impl Pulse {
    fn beat(&self, slot: &Slot) {
        self.0.store(milliseconds(slot), Relaxed);
    }

    /// Returns when nothing has passed for too long.
    pub async fn stopped(&self, slot: &Slot) {
        loop {
            let idle =
                Duration::from_millis(milliseconds(slot).saturating_sub(self.0.load(Relaxed)));
            match IDLE_MAX.checked_sub(idle) {
                None | Some(Duration::ZERO) => return,
                Some(rest) => sleep(rest).await,
            }
        }
    }
}

fn milliseconds(slot: &Slot) -> u64 {
    u64::try_from(slot.machine.now().as_millis()).unwrap_or(u64::MAX)
}

impl AsyncRead for Metered {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_free(Way::Out, context));
        let room = buffer.remaining().min(CHUNK_BYTES);
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
        ready!(Pin::new(&mut this.stream).poll_read(context, &mut part))?;
        let count = part.filled().len();
        buffer.advance(count);
        this.passed(Way::Out, count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    /// All at once, as TLS says its last words: what has to be said and why it ends are several pieces.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_free(Way::In, context));
        let mut left = CHUNK_BYTES;
        let parts = pieces.iter().map(|piece| {
            let part = &piece[..piece.len().min(left)];
            left -= part.len();
            IoSlice::new(part)
        });
        let parts: Vec<_> = parts.collect();
        let written = Pin::new(&mut this.stream).poll_write_vectored(context, &parts);
        let count = ready!(written)?;
        this.passed(Way::In, count);
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
