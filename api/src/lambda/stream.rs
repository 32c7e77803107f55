//! InvokeWithResponseStream: an answer in frames of the event stream encoding (`application/vnd.amazon.eventstream`), each sent
//! as soon as the guest has written it. A client that goes away ends the invocation; one that is slow slows the guest.

use std::convert::Infallible;
use std::sync::Arc;

use aws_smithy_eventstream::frame::write_message_to;
use aws_smithy_types::event_stream::{Header, HeaderValue as Value, Message};
use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use bytes::Bytes;
use futures_util::stream;
use serde_json::json;
use thaw_runtime::{Measure, StreamPart};

use super::errors::ApiError;
use super::invoke::{client_context, payload, refused, version, wants_tail};
use super::{Answer, Call};
use crate::invocation::running::{Ended, Running};
use crate::invocation::{FunctionResult, PAYLOAD_BYTES_MAX, Request, RestoreFault, report};
use crate::state::App;
use crate::timing;

pub(super) async fn invoke(app: &Arc<App>, mut call: Call, name: &str) -> Answer {
    let found = version(app, &call, name)?;
    let tail = wants_tail(&call.headers)?;
    let request = Request {
        request_id: call.request_id.clone(),
        function_arn: found.arn(app),
        client_context: client_context(&call.headers)?,
        trace_id: Some(timing::trace_id(&call.headers)),
        measure: Measure::Off,
        payload: payload(app, &mut call, PAYLOAD_BYTES_MAX).await?,
        quota: call.caller.map(|caller| caller.quota),
    };
    let trace = request.trace_id.as_deref().and_then(timing::trace_header);
    let live = found.pick();
    let mut running = Running::start(app, &found.function, &live, request);
    // Until the function answers, a refusal still has a status of its own.
    let body = match running.parts.recv().await {
        Some(_head) => {
            Body::from_stream(stream::unfold(Some(running), move |running| async move {
                frame(running?, tail).await
            }))
        }
        None => {
            let answer = running.end().await;
            let answer = answer.map_err(|refusal| refused(&refusal, &live, &found.arn(app)))?;
            Body::from(complete(&Ok(answer), tail)?)
        }
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/vnd.amazon.eventstream"),
    );
    if let Ok(version) = HeaderValue::from_str(&live.id.to_string()) {
        headers.insert("x-amz-executed-version", version);
    }
    if let Some(trace) = trace {
        headers.insert(timing::TRACE_HEADER, trace);
    }
    Ok(response)
}

type Frame = Result<Bytes, Infallible>;

/// The next frame, and what is left to be sent.
async fn frame(mut running: Running, tail: bool) -> Option<(Frame, Option<Running>)> {
    loop {
        match running.parts.recv().await {
            Some(StreamPart::Chunk(bytes)) if !bytes.is_empty() => {
                let frame = encode("PayloadChunk", "application/octet-stream", bytes).ok()?;
                return Some((Ok(frame), Some(running)));
            }
            Some(_) => {}
            None => {
                let frame = complete(&running.end().await, tail).ok()?;
                return Some((Ok(frame), None));
            }
        }
    }
}

/// The last frame: how it ended.
fn complete(ended: &Ended, tail: bool) -> Result<Bytes, ApiError> {
    let mut document = json!({});
    match ended {
        Ok(answer) => {
            if let FunctionResult::Error { document: why, .. } = &answer.result {
                let code = match answer.restore {
                    Some(RestoreFault::Error) => "SnapStartException",
                    Some(RestoreFault::TimedOut) => "SnapStartTimeoutException",
                    None => "Unhandled",
                };
                document["ErrorCode"] = code.into();
                document["ErrorDetails"] = String::from_utf8_lossy(why).into();
            }
            if tail {
                document["LogResult"] = report::tail(&answer.log).into();
            }
        }
        Err(refusal) => {
            document["ErrorCode"] = "ServiceException".into();
            document["ErrorDetails"] = format!("{refusal:?}").into();
        }
    }
    encode(
        "InvokeComplete",
        "application/json",
        document.to_string().into(),
    )
}

fn encode(kind: &str, content_type: &str, payload: Bytes) -> Result<Bytes, ApiError> {
    let header =
        |name: &'static str, text: &str| Header::new(name, Value::String(text.to_owned().into()));
    let message = Message::new(payload)
        .add_header(header(":message-type", "event"))
        .add_header(header(":event-type", kind))
        .add_header(header(":content-type", content_type));
    let mut frame = Vec::new();
    write_message_to(&message, &mut frame)
        .map_err(|error| ApiError::service(format!("a frame is not encoded: {error}")))?;
    Ok(frame.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invocation::Refusal;

    #[test]
    fn a_frame_is_what_the_encoding_says() {
        let frame = encode(
            "PayloadChunk",
            "application/octet-stream",
            Bytes::from_static(b"hi"),
        );
        let frame = frame.unwrap();
        let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, frame.len());
        let headers = word(4) as usize;
        assert_eq!(frame[12 + headers..][..2], *b"hi");
        assert_eq!(frame.len(), 12 + headers + 2 + 4);
        // u8 length, name, type 7, u16 length, value.
        assert_eq!(frame[12..][..22], *b"\x0d:message-type\x07\x00\x05event");
    }

    #[test]
    fn the_last_frame_says_how_it_ended() {
        let text = |ended: &Ended| {
            let frame = complete(ended, false).unwrap();
            let headers = usize::try_from(u32::from_be_bytes(frame[4..8].try_into().unwrap()));
            let start = 12 + headers.unwrap();
            String::from_utf8(frame[start..frame.len() - 4].to_vec()).unwrap()
        };
        let refused = text(&Err(Refusal::Host("gone".to_owned())));
        assert!(refused.contains("ServiceException"), "{refused}");
    }
}
