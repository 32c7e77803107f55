//! The Lambda Runtime API on HTTP/1.1: a thin shell that turns requests into [`Call`]s and [`Answer`]s into responses.
//!
//! The server lives in the agent so that its TCP connections are frozen together with the client's end. It runs no
//! timers: a clone may have been asleep for hours, and a keep-alive time-out would then fire at once.

pub(crate) mod body;
pub(crate) mod extension;
pub(crate) mod render;
pub(crate) mod stream;
mod telemetry;

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use thaw_agent_protocol::{InitError, InvocationError, RESPONSE_BYTES_MAX, Reply};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::document;
use crate::life::{Answer, Call, Unfit};
use crate::telemetry::Api;
use body::{Received, receive};
use extension::Registration;

/// Where the runtime finds the API: `AWS_LAMBDA_RUNTIME_API`.
pub const ADDRESS: &str = "127.0.0.1:9001";

/// Connections served at once; more wait to be accepted. Each may hold one body of [`RESPONSE_BYTES_MAX`].
const CONNECTIONS_MAX: usize = 64;

/// Calls that wait for the driver; more wait in their connections.
pub(crate) const CALLS_MAX: usize = 16;

const ERROR_TYPE: &str = "lambda-runtime-function-error-type";

/// The type of an error document that carries a cause for X-Ray, too.
const ERROR_WITH_CAUSE: &str = "application/vnd.aws.lambda.error.cause+json";

/// A call with the way to answer it. Dropping it answers 500.
pub(crate) struct PendingCall {
    pub(crate) call: Call,
    pub(crate) reply: oneshot::Sender<Answer>,
}

/// What a path and method mean.
#[derive(Debug, PartialEq, Eq)]
enum Route<'a> {
    Ping,
    Next,
    RestoreNext,
    Response(&'a str),
    Error(&'a str),
    InitError,
    RestoreError,
    ExtensionRegister,
    ExtensionNext,
    ExtensionInitError,
    ExtensionExitError,
    Subscription(Api),
    WrongMethod,
    Unknown,
}

impl<'a> Route<'a> {
    fn of(method: &Method, path: &'a str) -> Self {
        let (wanted, route) = if path == "/2018-06-01/ping" {
            (Method::GET, Self::Ping)
        } else if path == "/2020-08-15/logs" {
            (Method::PUT, Self::Subscription(Api::Logs))
        } else if path == "/2022-07-01/telemetry" {
            (Method::PUT, Self::Subscription(Api::Telemetry))
        } else if let Some(rest) = path.strip_prefix("/2018-06-01/runtime/") {
            match rest {
                "invocation/next" => (Method::GET, Self::Next),
                "restore/next" => (Method::GET, Self::RestoreNext),
                "init/error" => (Method::POST, Self::InitError),
                "restore/error" => (Method::POST, Self::RestoreError),
                _ => match rest
                    .strip_prefix("invocation/")
                    .and_then(|r| r.split_once('/'))
                {
                    Some((id, "response")) => (Method::POST, Self::Response(id)),
                    Some((id, "error")) => (Method::POST, Self::Error(id)),
                    _ => return Self::Unknown,
                },
            }
        } else {
            match path.strip_prefix("/2020-01-01/extension/") {
                Some("register") => (Method::POST, Self::ExtensionRegister),
                Some("event/next") => (Method::GET, Self::ExtensionNext),
                Some("init/error") => (Method::POST, Self::ExtensionInitError),
                Some("exit/error") => (Method::POST, Self::ExtensionExitError),
                _ => return Self::Unknown,
            }
        };
        if *method == wanted {
            route
        } else {
            Self::WrongMethod
        }
    }
}

/// Serves the API until the driver is gone. Each connection is a task of its own.
/// `registration` is what extensions get to know.
pub(crate) async fn serve(
    listener: TcpListener,
    calls: mpsc::Sender<PendingCall>,
    registration: Arc<Registration>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        // Accepting fails only for a client that has gone again: descriptors do not run out at this limit.
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        // Requests and answers are single small writes; waiting to merge them only delays them.
        let _ = stream.set_nodelay(true);
        let (calls, registration) = (calls.clone(), Arc::clone(&registration));
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                answer(request, calls.clone(), Arc::clone(&registration))
            });
            let _place = place;
            // An error here is the client's: it closed early or did not speak HTTP.
            let _ = hyper::server::conn::http1::Builder::new()
                .auto_date_header(false)
                .header_read_timeout(None)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    calls: mpsc::Sender<PendingCall>,
    registration: Arc<Registration>,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let call = match Route::of(&parts.method, parts.uri.path()) {
        Route::Ping => return Ok(render::text(StatusCode::OK, "pong")),
        Route::Next => Call::Next,
        Route::RestoreNext => Call::RestoreNext,
        Route::Response(id) if stream::is_streamed(&parts.headers) => {
            let forward = stream::forward(id.to_owned(), parts.headers, body, calls);
            // A task of its own outlives the connection. It fails only if it panics.
            let answer = tokio::spawn(forward).await.unwrap_or(Ok(None))?;
            return Ok(rendered(answer));
        }
        Route::Response(id) => response_call(id, &parts.headers, receive(body).await?),
        Route::Error(id) => error_call(id, &parts.headers, receive(body).await?),
        Route::InitError => Call::InitError(init_error(&parts.headers, receive(body).await?)),
        Route::RestoreError => Call::RestoreError(init_error(&parts.headers, receive(body).await?)),
        route @ (Route::ExtensionRegister
        | Route::ExtensionNext
        | Route::ExtensionInitError
        | Route::ExtensionExitError
        | Route::Subscription(_)) => {
            let received = receive(body).await?;
            let call = match route {
                Route::ExtensionRegister => extension::register(&parts.headers, received),
                Route::ExtensionNext => extension::next(&parts.headers),
                Route::ExtensionInitError => extension::init_error(&parts.headers),
                Route::Subscription(api) => extension::subscribe(api, &parts.headers, received),
                _ => extension::exit_error(&parts.headers),
            };
            let call = match call {
                Ok(call) => Call::Extension(call),
                Err(refusal) => return Ok(extension::refused(&refusal)),
            };
            return Ok(match ask(&calls, call).await {
                Some(Answer::Extension(answer)) => {
                    extension::answer(answer, &parts.headers, &registration)
                }
                answer => rendered(answer),
            });
        }
        Route::WrongMethod => return Ok(render::plain(StatusCode::METHOD_NOT_ALLOWED)),
        Route::Unknown => return Ok(render::text(StatusCode::NOT_FOUND, "404 page not found\n")),
    };
    Ok(rendered(ask(&calls, call).await))
}

/// What the driver answers; `None` when it is gone.
async fn ask(calls: &mpsc::Sender<PendingCall>, call: Call) -> Option<Answer> {
    let (reply, answer) = oneshot::channel();
    calls.send(PendingCall { call, reply }).await.ok()?;
    answer.await.ok()
}

fn rendered(answer: Option<Answer>) -> Response<Full<Bytes>> {
    match answer {
        Some(answer) => render::answer(answer),
        None => render::internal_error(),
    }
}

fn text(headers: &HeaderMap, name: impl hyper::header::AsHeaderName) -> Option<String> {
    headers
        .get(name)
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

fn response_call(id: &str, headers: &HeaderMap, received: Received) -> Call {
    let request_id = id.to_owned();
    // What is streamed never comes here: any mode that is named is none of Lambda's.
    if text(headers, stream::RESPONSE_MODE).is_some_and(|mode| !mode.is_empty()) {
        return Call::Unfit(request_id, Unfit::ResponseMode);
    }
    match received {
        Received::Whole { payload } => Call::Response(Reply {
            request_id,
            content_type: text(headers, CONTENT_TYPE),
            payload,
        }),
        Received::TooLarge => Call::Unfit(request_id, Unfit::TooLarge),
    }
}

fn error_call(id: &str, headers: &HeaderMap, received: Received) -> Call {
    let request_id = id.to_owned();
    match received {
        Received::Whole { payload } => Call::Error(InvocationError {
            request_id,
            error_type: text(headers, ERROR_TYPE),
            payload: match text(headers, CONTENT_TYPE).as_deref() {
                Some(ERROR_WITH_CAUSE) => document::without_cause(&payload),
                _ => payload,
            },
        }),
        Received::TooLarge => Call::Unfit(request_id, Unfit::TooLarge),
    }
}

fn init_error(headers: &HeaderMap, received: Received) -> InitError {
    let error_type = text(headers, ERROR_TYPE).unwrap_or_else(|| "Runtime.Unknown".into());
    let payload = match received {
        Received::Whole { payload } => payload,
        Received::TooLarge => document::error(
            &error_type,
            &format!("the error document is over {RESPONSE_BYTES_MAX} bytes"),
        ),
    };
    InitError {
        error_type,
        payload,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_the_runtime_api_has_its_route() {
        let get = |path| Route::of(&Method::GET, path);
        let post = |path| Route::of(&Method::POST, path);
        assert_eq!(get("/2018-06-01/ping"), Route::Ping);
        assert_eq!(get("/2018-06-01/runtime/invocation/next"), Route::Next);
        assert_eq!(get("/2018-06-01/runtime/restore/next"), Route::RestoreNext);
        assert_eq!(
            post("/2018-06-01/runtime/invocation/a-1/response"),
            Route::Response("a-1")
        );
        assert_eq!(
            post("/2018-06-01/runtime/invocation/a-1/error"),
            Route::Error("a-1")
        );
        assert_eq!(post("/2018-06-01/runtime/init/error"), Route::InitError);
        assert_eq!(
            post("/2018-06-01/runtime/restore/error"),
            Route::RestoreError
        );
        assert_eq!(
            get("/2018-06-01/runtime/invocation/a-1/response"),
            Route::WrongMethod
        );
        assert_eq!(
            post("/2018-06-01/runtime/invocation/next"),
            Route::WrongMethod
        );
        assert_eq!(get("/2018-06-01/runtime/invocation/a/b/c"), Route::Unknown);
        assert_eq!(get("/"), Route::Unknown);
        assert_eq!(get("/2020-08-15/logs"), Route::WrongMethod);
        assert_eq!(
            Route::of(&Method::PUT, "/2022-07-01/telemetry"),
            Route::Subscription(Api::Telemetry)
        );
    }
}
