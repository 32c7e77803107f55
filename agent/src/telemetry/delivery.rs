//! The way of events to one subscriber: a queue, and a task that delivers what lies in it.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Api, Destination, Event, Kind, Subscription};

/// Events that wait for their delivery; more are dropped.
const QUEUED_MAX: usize = 10_000;

/// Tries of one delivery, and the time between them: who subscribes may not listen quite yet.
const TRIES: u32 = 10;
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Longest time of one try.
const TRY_LIMIT: Duration = Duration::from_secs(2);

/// Somebody who listens.
#[derive(Debug)]
pub(super) struct Subscriber {
    api: Api,
    kinds: Vec<Kind>,
    queue: mpsc::Sender<Item>,
    /// Since the last event that found room: how many did not, and their bytes.
    dropped: (u64, usize),
}

#[derive(Debug)]
enum Item {
    Event(Value),
    /// Deliver what came before this, and say so.
    Flush(Option<oneshot::Sender<()>>),
}

impl Subscriber {
    /// Deliveries go on in a task until the subscriber is dropped.
    pub(super) fn new(subscription: Subscription) -> Self {
        let (queue, items) = mpsc::channel(QUEUED_MAX);
        let (api, kinds) = (subscription.api, subscription.kinds.clone());
        tokio::spawn(deliver(subscription, items));
        Self {
            api,
            kinds,
            queue,
            dropped: (0, 0),
        }
    }

    /// Puts an event into the queue, if it is one that this subscriber wants.
    pub(super) fn tell(&mut self, event: &Event) {
        // The older API knows no phases of initialisation, the newer one no end apart from the report.
        let is_known = match self.api {
            Api::Logs => !event.name.starts_with("platform.init"),
            Api::Telemetry => event.name != "platform.end",
        };
        if !is_known || !self.kinds.contains(&event.kind) {
            return;
        }
        let (records, bytes) = self.dropped;
        if records > 0 {
            let mut lost = event.document.clone();
            lost["type"] = json!("platform.logsDropped");
            lost["record"] = json!({
                "reason": "Consumer seems to have fallen behind as it has not acknowledged receipt of logs.",
                "droppedRecords": records, "droppedBytes": bytes,
            });
            if self.queue.try_send(Item::Event(lost)).is_ok() {
                self.dropped = (0, 0);
            }
        }
        let item = Item::Event(event.document.clone());
        if self.queue.try_send(item).is_err() {
            let size = event.document.to_string().len();
            self.dropped = (self.dropped.0 + 1, self.dropped.1 + size);
        }
    }

    /// What lies in the queue is delivered at once; `done` is told when it is, or is dropped.
    pub(super) fn flush(&self, done: Option<oneshot::Sender<()>>) {
        // A full queue is delivered without being told to.
        let _ = self.queue.try_send(Item::Flush(done));
    }
}

async fn deliver(subscription: Subscription, mut items: mpsc::Receiver<Item>) {
    let mut connection = None;
    while let Some(first) = items.recv().await {
        let until = Instant::now() + Duration::from_millis(subscription.timeout_ms);
        let (mut events, mut bytes, mut next) = (Vec::new(), 0, Some(first));
        let mut flushed = None;
        while let Some(item) = next.take() {
            match item {
                Item::Flush(done) => {
                    flushed = done;
                    break;
                }
                Item::Event(event) => {
                    let text = event.to_string();
                    bytes += text.len();
                    events.push(text);
                }
            }
            if events.len() >= subscription.items_max || bytes >= subscription.bytes_max {
                break;
            }
            next = timeout_at(until, items.recv()).await.ok().flatten();
        }
        if !events.is_empty() {
            post(&subscription.destination, &mut connection, &events).await;
        }
        if let Some(flushed) = flushed {
            let _ = flushed.send(()); // whoever waited may have stopped to
        }
    }
}

/// Tries a few times; events that nobody takes are lost.
async fn post(destination: &Destination, connection: &mut Option<TcpStream>, events: &[String]) {
    for _ in 0..TRIES {
        let delivery = async {
            match destination {
                Destination::Http { put, port, path } => http(*put, *port, path, events).await,
                Destination::Tcp { port } => tcp(connection, *port, events).await,
            }
        };
        match timeout(TRY_LIMIT, delivery).await {
            Ok(Some(())) => return,
            // It listens and has heard: told again it would hear twice.
            Err(_) => return,
            Ok(None) => sleep(RETRY_AFTER).await,
        }
    }
}

/// `None` if nobody listens there or the answer is no success.
async fn http(put: bool, port: u16, path: &str, events: &[String]) -> Option<()> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let io = TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
    tokio::spawn(connection);
    let body = Bytes::from(format!("[{}]", events.join(",")));
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = if put { Method::PUT } else { Method::POST };
    *request.uri_mut() = path.parse().ok()?;
    let host = HeaderValue::from_str(&format!("sandbox.localdomain:{port}")).ok()?;
    request.headers_mut().insert(HOST, host);
    let json = HeaderValue::from_static("application/json");
    request.headers_mut().insert(CONTENT_TYPE, json);
    let response = sender.send_request(request).await.ok()?;
    let is_success = response.status().is_success();
    response.into_body().collect().await.ok()?;
    is_success.then_some(())
}

async fn tcp(connection: &mut Option<TcpStream>, port: u16, events: &[String]) -> Option<()> {
    let mut stream = match connection.take() {
        Some(stream) => stream,
        None => TcpStream::connect(("127.0.0.1", port)).await.ok()?,
    };
    let lines = format!("{}\n", events.join("\n"));
    stream.write_all(lines.as_bytes()).await.ok()?;
    *connection = Some(stream);
    Some(())
}
