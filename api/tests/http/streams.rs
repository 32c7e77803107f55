//! Answers that come as the function writes them.

use aws_smithy_eventstream::frame::{DecodedFrame, MessageFrameDecoder};
use aws_smithy_types::event_stream::Message;
use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};

use super::server::Server;
use super::{FUNCTIONS, good, refused};

const INVOKE: &str = "/2021-11-15/functions/f/response-streaming-invocations";

async fn deployed() -> Server {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let url = json!({"AuthType": "NONE", "InvokeMode": "RESPONSE_STREAM"});
    let made = server.post("/2021-10-31/functions/f/url", &url).await;
    assert_eq!(
        made.json()["InvokeMode"],
        "RESPONSE_STREAM",
        "{}",
        made.text()
    );
    server
}

/// Frames of an event stream, as they come.
struct Frames {
    response: reqwest::Response,
    decoder: MessageFrameDecoder,
    bytes: BytesMut,
}

impl Frames {
    async fn open(server: &Server, event: &Value) -> Self {
        let response = server.open_post(INVOKE, &event.to_string()).await;
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"].to_str().unwrap();
        assert_eq!(kind, "application/vnd.amazon.eventstream");
        Self {
            response,
            decoder: MessageFrameDecoder::new(),
            bytes: BytesMut::new(),
        }
    }

    async fn next(&mut self) -> Option<(String, Bytes)> {
        loop {
            if let DecodedFrame::Complete(message) =
                self.decoder.decode_frame(&mut self.bytes).unwrap()
            {
                return Some((kind(&message), message.payload().clone()));
            }
            let more = self.response.chunk().await.unwrap()?;
            self.bytes.extend_from_slice(&more);
        }
    }
}

fn kind(message: &Message) -> String {
    let mut headers = message.headers().iter();
    let header = headers.find(|header| header.name().as_str() == ":event-type");
    header
        .unwrap()
        .value()
        .as_string()
        .unwrap()
        .as_str()
        .to_owned()
}

#[tokio::test]
async fn each_piece_is_a_frame_and_comes_before_the_next_is_written() {
    let server = deployed().await;
    server.machine.hold_answers(true);
    let mut frames = Frames::open(&server, &json!("stream")).await;
    let chunk = |text: &'static str| Some(("PayloadChunk".to_owned(), Bytes::from(text)));
    assert_eq!(
        frames.next().await,
        chunk("one"),
        "the rest is not written yet"
    );
    server.machine.hold_answers(false);
    assert_eq!(frames.next().await, chunk("two"));
    assert_eq!(frames.next().await, chunk("three"));
    let end = Some(("InvokeComplete".to_owned(), Bytes::from("{}")));
    assert_eq!(frames.next().await, end);
    assert_eq!(frames.next().await, None);
    server.stop().await;
}

#[tokio::test]
async fn a_function_that_answers_whole_or_fails_is_told_in_frames_too() {
    let server = deployed().await;
    let mut whole = Frames::open(&server, &json!(7)).await;
    assert_eq!(whole.next().await.unwrap().1, "7");
    assert_eq!(whole.next().await.unwrap().0, "InvokeComplete");
    for event in ["raise", "break"] {
        let mut failed = Frames::open(&server, &json!(event)).await;
        let last = loop {
            match failed.next().await.unwrap() {
                (kind, payload) if kind == "InvokeComplete" => break payload,
                _ => {}
            }
        };
        let end: Value = serde_json::from_slice(&last).unwrap();
        assert_eq!(end["ErrorCode"], "Unhandled");
        assert!(end["ErrorDetails"].as_str().unwrap().contains("ValueError"));
    }
    let throttled = server.post(INVOKE, &json!("throttle")).await;
    refused(&throttled, 429, "TooManyRequestsException");
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_invocation() {
    let server = deployed().await;
    server.machine.hold_answers(true);
    let mut frames = Frames::open(&server, &json!("stream")).await;
    frames.next().await.unwrap();
    drop(frames);
    server.until(|server| server.machine.abandoned() == 1).await;
    let reader = server.open("/fn/f/stream").await;
    drop(reader);
    server.until(|server| server.machine.abandoned() == 2).await;
    server.machine.hold_answers(false);
    server.stop().await;
}

#[tokio::test]
async fn a_streaming_url_sends_what_the_function_writes_with_its_status_and_headers() {
    let server = deployed().await;
    server.machine.hold_answers(true);
    let mut plain = server.open("/fn/f/stream").await;
    assert_eq!(plain.headers()["content-type"], "text/plain");
    assert_eq!(plain.chunk().await.unwrap().unwrap(), "one");
    server.machine.hold_answers(false);
    assert_eq!(plain.text().await.unwrap(), "twothree");

    let shaped = server.get("/fn/f/prelude").await;
    assert_eq!((shaped.status, shaped.text().as_str()), (201, "onetwo"));
    assert_eq!(shaped.header("x-a"), Some("b"));
    assert_eq!(shaped.header("set-cookie"), Some("a=1"));

    let broken = server.open("/fn/f/break").await;
    assert!(broken.text().await.is_err(), "half an answer is no answer");
    server.stop().await;
}
