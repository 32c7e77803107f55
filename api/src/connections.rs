//! Connections: how many, for how long, and what a request's head may weigh.
//!
//! One loop serves plain and TLS. Each connection is a task that waits for its client within limits: for the handshake
//! ([`crate::tls`]), for a request's first byte and for its head ([`watched`]), for its body ([`arriving`]), and for room to write
//! the answer; so a client that stalls or trickles ends, and holds up nobody before. HTTP/1.1 alone is spoken.
//!
//! **Invariant:** what a connection may hold is bounded, and so is their number
//! (`ten_thousand_idle_connections_are_held_while_requests_are_served`, `a_connection_too_many_is_refused_at_once`); one address leaves
//! the others half (`one_address_has_half_of_the_connections_and_this_machine_all`).

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::ConnectInfo;
use axum::http::{HeaderMap, Request, Response, Uri, header};
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::invocation::complaints::{Complaints, Telling};
use crate::lambda::errors::ApiError;
use crate::tls::Tls;

pub mod arriving;
pub mod pace;
pub mod places;
pub mod watched;

use arriving::Arriving;
use pace::Patience;
use places::{Full, Place, Places};
use watched::{Activity, Busy, Watched};

/// Longest path and query of a request, bytes.
pub const URI_BYTES_MAX: usize = 16 * 1024;
/// Most bytes of all header fields of a request. Their number is at most 100, which is hyper's limit.
pub const FIELDS_BYTES_MAX: usize = 32 * 1024;
/// What is read ahead of a connection, bytes: a head beyond that is refused by hyper, with the bare status.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// After an accept that failed for want of something, until the next one.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Of the files that this process may have open, so many, or half if there are fewer, are for all else: monitors, the database,
/// logs.
const OTHER_DESCRIPTORS: u64 = 4096;

/// Limits of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Open connections, of which one address has half at most; one more is refused. Fewer when this process may not have that many files open.
    pub count_max: usize,
    /// Longest time between two requests, and before the first.
    pub idle: Duration,
    /// Longest time for a request's head, from its first byte on.
    pub head: Duration,
    /// With bodies, and with clients that do not take their answers.
    pub patience: Patience,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            count_max: 16_384,
            idle: Duration::from_secs(180),
            head: Duration::from_secs(10),
            patience: Patience {
                longest: Duration::from_secs(30),
                bytes_per_second: 4096,
            },
        }
    }
}

/// Serves until `shutdown` ends, which cancels `stop`, too; then running requests may end within `drain_limit`, and the rest is
/// cut off.
///
/// # Errors
/// The listener cannot be used any more.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    router: Router,
    limits: ConnectionLimits,
    (stop, drain_limit): (CancellationToken, Duration),
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(None) // `Watched` has its own, and one for the time before the first byte
        .max_buf_size(BUFFER_BYTES_MAX);
    let count_max = affordable(limits.count_max, raise_descriptors());
    let door = Arc::new(Door {
        tls,
        router,
        limits,
        http,
        stop: stop.clone(),
        complaints: Mutex::default(),
    });
    let (places, mut connections) = (Places::new(count_max), JoinSet::new());
    let served = tokio::select! {
        error = door.accept_all(&listener, &places, &mut connections) => Err(error),
        () = shutdown => Ok(()),
    };
    // Streams end now; requests that wait for a sandbox are refused.
    stop.cancel();
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(drain_limit, ended).await;
    served
}

/// As many files as this process may come to have open: its soft limit becomes the hard one. The number.
fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(error) => {
            tracing::warn!(%error, "the limit of open files stays as it is");
            limit.current.unwrap_or(u64::MAX)
        }
    }
}

/// How many connections there may be.
fn affordable(wanted: usize, descriptors: u64) -> usize {
    let most = descriptors - OTHER_DESCRIPTORS.min(descriptors / 2);
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    if most < wanted {
        tracing::warn!(
            descriptors,
            wanted,
            connections = most,
            "fewer connections than wanted are let in: raise the hard limit of open files (ulimit -Hn, LimitNOFILE)"
        );
    }
    wanted.min(most).max(1)
}

/// Where clients come in.
struct Door {
    tls: Option<Arc<Tls>>,
    router: Router,
    limits: ConnectionLimits,
    http: http1::Builder,
    stop: CancellationToken,
    complaints: Mutex<Complaints>,
}

impl Door {
    /// Lets clients in; ends when the listener cannot be used any more.
    async fn accept_all(
        self: &Arc<Self>,
        listener: &TcpListener,
        places: &Arc<Places>,
        connections: &mut JoinSet<()>,
    ) -> io::Error {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, address)) => match places.take(address.ip()) {
                        Ok(place) => {
                            connections.spawn(Arc::clone(self).admit(stream, address, place));
                        }
                        Err(full) => self.refuse(&stream, address, full),
                    },
                    Err(error) if is_final(&error) => return error,
                    Err(error) if is_the_clients(&error) => {}
                    Err(error) => {
                        self.complain(format!("cannot accept: {error}"));
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    /// Says that there are too many, as far as that goes without waiting.
    fn refuse(self: &Arc<Self>, stream: &TcpStream, address: SocketAddr, full: Full) {
        let whose = match full {
            Full::All => "This gateway",
            Full::Sender => "Your address",
        };
        if self.tls.is_none() {
            let body = format!(
                r#"{{"Type":"Service","message":"{whose} has as many connections as it may have. Try again later."}}"#
            );
            let answer = format!(
                "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nx-amzn-errortype: ServiceUnavailableException\r\n\
                 retry-after: 1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            // The buffer of a new connection is empty.
            let _ = stream.try_write(answer.as_bytes());
        }
        self.complain(match full {
            Full::All => "there are as many as there may be".to_owned(),
            Full::Sender => format!("{} has as many as one address may have", address.ip()),
        });
    }

    /// Logs, at most once a second for each reason, that connections are refused.
    fn complain(self: &Arc<Self>, reason: String) {
        let heard = self.complaints().hear(&reason, Instant::now());
        match heard {
            Telling::Now => tracing::warn!(%reason, "a connection is refused"),
            Telling::After(wait, reason) => {
                let door = Arc::clone(self);
                tokio::spawn(async move {
                    tokio::time::sleep(wait).await;
                    let count = door.complaints().take(&reason, Instant::now());
                    tracing::warn!(count, %reason, "more connections are refused");
                });
            }
            Telling::Counted => {}
        }
    }

    fn complaints(&self) -> MutexGuard<'_, Complaints> {
        self.complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn admit(self: Arc<Self>, stream: TcpStream, address: SocketAddr, _place: Place) {
        match &self.tls {
            None => self.speak(stream, address).await,
            Some(tls) => {
                let shaken = tokio::select! {
                    shaken = tls.shake(stream, address) => shaken,
                    () = self.stop.cancelled() => None,
                };
                if let Some(stream) = shaken {
                    self.speak(stream, address).await;
                }
            }
        }
    }

    async fn speak<S>(&self, stream: S, address: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let activity = Arc::new(Activity::default());
        let stream = Watched::new(stream, Arc::clone(&activity), self.limits);
        let service = service_fn(|request| self.answer(&activity, address, request));
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            let reason = crate::engine::chain(&error);
            tracing::debug!(%address, reason, "connection broke");
        }
    }

    async fn answer(
        &self,
        activity: &Arc<Activity>,
        address: SocketAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Leaving>, Infallible> {
        let busy = activity.begin();
        let (mut parts, body) = request.into_parts();
        let waits = parts.headers.contains_key(header::EXPECT);
        let (patience, stop) = (self.limits.patience, self.stop.clone());
        let body = Arriving::new(body, patience, waits, Arc::clone(&busy), stop);
        let response = match fault_of(&parts.uri, &parts.headers) {
            Some(error) => error.into_response(&Uuid::new_v4().to_string()),
            None => {
                parts.extensions.insert(ConnectInfo(address));
                let request = Request::from_parts(parts, Body::new(body));
                self.router.clone().oneshot(request).await?
            }
        };
        Ok(response.map(|body| Leaving { body, _busy: busy }))
    }
}

/// What a head is refused for.
fn fault_of(uri: &Uri, headers: &HeaderMap) -> Option<ApiError> {
    let target = uri.path_and_query().map_or(0, |text| text.as_str().len());
    if target > URI_BYTES_MAX {
        return Some(ApiError::uri_too_long(URI_BYTES_MAX));
    }
    let fields = headers.iter();
    let bytes: usize = fields
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum();
    (bytes > FIELDS_BYTES_MAX).then(|| ApiError::fields_too_large(FIELDS_BYTES_MAX))
}

/// The listener is no usable one: no client's fault, and no shortage (accept(2)).
fn is_final(error: &io::Error) -> bool {
    let fatal = [Errno::BADF, Errno::INVAL, Errno::NOTSOCK, Errno::OPNOTSUPP];
    Errno::from_io_error(error).is_some_and(|errno| fatal.contains(&errno))
}

/// The connection was gone before it was taken.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// An answer's body; its request is over when this is dropped.
struct Leaving {
    body: Body,
    _busy: Arc<Busy>,
}

impl HttpBody for Leaving {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_all_else() {
        assert_eq!(affordable(16_384, u64::MAX), 16_384);
        assert_eq!(affordable(16_384, 16_384 + 4096), 16_384);
        assert_eq!(affordable(16_384, 16_384 + 4095), 16_383);
        assert_eq!(affordable(16_384, 1024), 512);
        assert_eq!(affordable(16_384, 0), 1);
        assert!(raise_descriptors() >= 64);
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }

    #[test]
    fn heads_are_judged_by_their_bytes() {
        let uri = |bytes: usize| -> Uri { format!("/{}", "x".repeat(bytes - 1)).parse().unwrap() };
        let none = HeaderMap::new();
        assert_eq!(fault_of(&uri(URI_BYTES_MAX), &none), None);
        let fault = fault_of(&uri(URI_BYTES_MAX + 1), &none).unwrap();
        assert_eq!(fault.status.as_u16(), 414);
        let fields = |bytes: usize| {
            let mut headers = HeaderMap::new();
            let value = "x".repeat(bytes - "a".len());
            headers.insert("a", value.parse().unwrap());
            headers
        };
        assert_eq!(fault_of(&uri(1), &fields(FIELDS_BYTES_MAX)), None);
        let fault = fault_of(&uri(1), &fields(FIELDS_BYTES_MAX + 1)).unwrap();
        assert_eq!(fault.status.as_u16(), 431);
    }
}
