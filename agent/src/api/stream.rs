//! A response in pieces: each goes to the host as it is read, and the next is read when the host has taken that one.

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap};
use thaw_agent_protocol::{
    STREAM_BYTES_MAX, STREAM_CHUNK_BYTES_MAX, StreamBegin, StreamEnd, StreamFailure,
};
use tokio::sync::mpsc;

use super::{PendingCall, ask, body, text};
use crate::document;
use crate::life::{Answer, Call, Unfit};

pub(crate) const RESPONSE_MODE: &str = "lambda-runtime-function-response-mode";

/// Whether a response is to be forwarded piece by piece.
pub(crate) fn is_streamed(headers: &HeaderMap) -> bool {
    text(headers, RESPONSE_MODE).as_deref() == Some("streaming")
}

/// Forwards a response; `None` when the driver is gone. It runs to its end even when its connection is lost midway, so that
/// the host hears of that: spawn it.
///
/// # Errors
/// The client's connection broke; the host was told.
pub(crate) async fn forward(
    request_id: String,
    headers: HeaderMap,
    mut body: Incoming,
    calls: mpsc::Sender<PendingCall>,
) -> Result<Option<Answer>, hyper::Error> {
    let begin = Call::ResponseBegin(StreamBegin {
        request_id: request_id.clone(),
        content_type: text(&headers, CONTENT_TYPE),
    });
    let end = |failure| {
        Call::ResponseEnd(StreamEnd {
            request_id: request_id.clone(),
            failure,
        })
    };
    let mut answer = ask(&calls, begin).await;
    let mut tail = body::Tail::default();
    let (mut total, mut trailers) = (0usize, HeaderMap::new());
    while answer == Some(Answer::Accepted) {
        let frame = match body.frame().await {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                ask(&calls, end(Some(truncated()))).await;
                return Err(error);
            }
            None => {
                let found = body::trailer_failure(&trailers).map_or_else(|| tail.end(), Err);
                let (rest, failure) = match found {
                    Ok(rest) => (rest, None),
                    Err(failure) => (Bytes::new(), Some(failure)),
                };
                answer = pieces(&calls, &request_id, rest).await;
                return match answer {
                    Some(Answer::Accepted) => Ok(ask(&calls, end(failure)).await),
                    refused => Ok(refused),
                };
            }
        };
        match frame.into_data() {
            Ok(data) => {
                total = total.saturating_add(data.len());
                if total > STREAM_BYTES_MAX {
                    let answer = ask(&calls, end(Some(too_large()))).await;
                    body::receive(body).await?;
                    return Ok(answer.map(|_| Answer::Unfit(Unfit::TooLarge)));
                }
                answer = pieces(&calls, &request_id, tail.push(data)).await;
            }
            Err(frame) => {
                if let Ok(read) = frame.into_trailers() {
                    trailers = read;
                }
            }
        }
    }
    // Refused. The client reads the answer only when it has got rid of its body.
    body::receive(body).await?;
    Ok(answer)
}

/// Hands over bytes in messages of the size that fits; [`Answer::Accepted`] if all were taken.
async fn pieces(
    calls: &mpsc::Sender<PendingCall>,
    request_id: &str,
    mut bytes: Bytes,
) -> Option<Answer> {
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(STREAM_CHUNK_BYTES_MAX));
        let chunk = Call::ResponseChunk {
            request_id: request_id.to_owned(),
            bytes: piece,
        };
        match ask(calls, chunk).await {
            Some(Answer::Accepted) => {}
            other => return other,
        }
    }
    Some(Answer::Accepted)
}

fn truncated() -> StreamFailure {
    let message = "the connection closed before the response was whole";
    StreamFailure {
        error_type: document::TRUNCATED.to_owned(),
        document: document::error(document::TRUNCATED, message),
    }
}

fn too_large() -> StreamFailure {
    let message = format!(
        "Response payload size exceeded maximum allowed payload size ({STREAM_BYTES_MAX} bytes)."
    );
    StreamFailure {
        error_type: document::RESPONSE_TOO_LARGE.to_owned(),
        document: document::error(document::RESPONSE_TOO_LARGE, &message),
    }
}
