//! Streamed responses: forwarded piece by piece, no faster than the host takes them.

use std::io::Write as _;
use std::time::{Duration, Instant};

use thaw_agent_protocol::{AgentMessage, StreamBegin, StreamEnd, StreamFailure};

use crate::support::{Client, NEXT, Sandbox, response_path};

/// A sandbox with the invocation `r1`, the head of whose streamed response was sent.
fn begun(headers: &str) -> (Sandbox, Client) {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.hear_thawed();
    sandbox.invoke(1, "r1", b"{}");
    assert_eq!(client.finish().status, 200);
    client.raw(
        format!(
            "POST {} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
             Lambda-Runtime-Function-Response-Mode: streaming\r\n{headers}\r\n",
            response_path("r1")
        )
        .as_bytes(),
    );
    (sandbox, client)
}

fn begin(content_type: Option<&str>) -> AgentMessage {
    AgentMessage::ResponseBegin(StreamBegin {
        request_id: "r1".into(),
        content_type: content_type.map(str::to_owned),
    })
}

fn chunk(bytes: &[u8]) -> AgentMessage {
    AgentMessage::ResponseChunk(bytes.to_vec())
}

fn end(failure: Option<(&str, &[u8])>) -> AgentMessage {
    AgentMessage::ResponseEnd(StreamEnd {
        request_id: "r1".into(),
        failure: failure.map(|(error_type, document)| StreamFailure {
            error_type: error_type.into(),
            document: document.to_vec(),
        }),
    })
}

#[test]
fn each_piece_is_with_the_host_before_the_next_is_written() {
    let (mut sandbox, mut client) = begun("Content-Type: text/event-stream\r\n");
    assert_eq!(sandbox.message(), begin(Some("text/event-stream")));
    for piece in ["abc", "de"] {
        client.raw(format!("{}\r\n{piece}\r\n", piece.len()).as_bytes());
        assert_eq!(sandbox.message(), chunk(piece.as_bytes()));
    }
    // Nothing else may come between.
    assert_eq!(sandbox.client().get(NEXT).status, 403);
    client.raw(b"0\r\n\r\n");
    assert_eq!(sandbox.message(), end(None));
    assert_eq!(client.finish().status, 202);
    assert_eq!(client.post(&response_path("r1"), b"again").status, 403);
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
}

#[test]
fn a_failure_in_true_trailers_ends_the_stream_with_it() {
    let (mut sandbox, mut client) = begun(
        "Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n",
    );
    client.raw(
        b"3\r\nabc\r\n0\r\nLambda-Runtime-Function-Error-Type: Oops\r\n\
          Lambda-Runtime-Function-Error-Body: eyJlcnJvck1lc3NhZ2UiOiJ4In0=\r\n\r\n",
    );
    assert_eq!(sandbox.message(), begin(None));
    assert_eq!(sandbox.message(), chunk(b"abc"));
    let failure = ("Oops", br#"{"errorMessage":"x"}"#.as_slice());
    assert_eq!(sandbox.message(), end(Some(failure)));
    assert_eq!(client.finish().status, 202);
}

#[test]
fn a_failure_written_into_the_body_ends_the_stream_with_it_and_is_no_part_of_it() {
    let (mut sandbox, mut client) = begun("");
    let lines = "Lambda-Runtime-Function-Error-Type: Runtime.StreamError\r\n\
                 Lambda-Runtime-Function-Error-Body: b29wcw==\r\n";
    let body = format!("3\r\nabc\r\n{:x}\r\n{lines}\r\n0\r\n\r\n", lines.len());
    client.raw(body.as_bytes());
    assert_eq!(sandbox.message(), begin(None));
    assert_eq!(sandbox.message(), chunk(b"abc"));
    let AgentMessage::ResponseEnd(StreamEnd { failure, .. }) = sandbox.message() else {
        panic!("the lines went on");
    };
    assert_eq!(failure.unwrap().error_type, "Runtime.StreamError");
    assert_eq!(client.finish().status, 202);
}

#[test]
fn a_connection_that_breaks_midway_ends_the_stream_as_truncated() {
    let (mut sandbox, mut client) = begun("");
    client.raw(b"3\r\nabc\r\n");
    assert_eq!(sandbox.message(), begin(None));
    assert_eq!(sandbox.message(), chunk(b"abc"));
    drop(client);
    let AgentMessage::ResponseEnd(StreamEnd { failure, .. }) = sandbox.message() else {
        panic!("no end");
    };
    assert_eq!(failure.unwrap().error_type, "Runtime.TruncatedResponse");
}

#[test]
fn a_stream_is_read_only_as_fast_as_the_host_takes_it() {
    let (mut sandbox, client) = begun("");
    let block = vec![b'x'; 64 * 1024];
    let socket = client.writer();
    socket
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut sent = 0usize;
    // Nobody reads the channel: sockets' buffers fill, and then the client cannot write.
    let blocked = loop {
        let piece = [b"10000\r\n".as_slice(), &block, b"\r\n"].concat();
        if let Err(error) = (&socket).write_all(&piece) {
            break error;
        }
        sent += block.len();
        assert!(sent < 64 << 20, "somebody holds 64 MiB");
    };
    assert_eq!(blocked.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(sandbox.message(), begin(None));
    let mut taken = 0;
    while taken < sent {
        let AgentMessage::ResponseChunk(bytes) = sandbox.message() else {
            panic!("no chunk");
        };
        taken += bytes.len();
    }
}

#[test]
fn a_stream_for_another_request_is_refused_and_harms_nothing() {
    let (mut sandbox, mut client) = begun("");
    client.raw(b"0\r\n\r\n");
    assert_eq!(sandbox.message(), begin(None));
    assert_eq!(sandbox.message(), end(None));
    assert_eq!(client.finish().status, 202);
    client.raw(
        format!(
            "POST {} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\
             Lambda-Runtime-Function-Response-Mode: streaming\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            response_path("other")
        )
        .as_bytes(),
    );
    assert_eq!(client.finish().status, 400);
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
}

#[test]
fn ten_pieces_that_curl_sends_a_tenth_of_a_second_apart_arrive_so() {
    let mut sandbox = Sandbox::script(
        "#!/bin/bash
api=http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation
id=$(curl -sD - -o /dev/null $api/next | tr -d '\\r' | sed -n 's/^lambda-runtime-aws-request-id: //Ip')
for i in 0 1 2 3 4 5 6 7 8 9; do echo data: $i; sleep 0.1; done |
  curl -s -X POST -T - -H 'Content-Type: text/event-stream' -H 'Transfer-Encoding: chunked' \\
    -H 'Lambda-Runtime-Function-Response-Mode: streaming' $api/$id/response
exec sleep 1000
",
    );
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.hear_thawed();
    sandbox.invoke(1, "r1", b"{}");
    assert_eq!(sandbox.message(), begin(Some("text/event-stream")));
    let mut arrivals = Vec::new();
    for number in 0..10 {
        assert_eq!(
            sandbox.message(),
            chunk(format!("data: {number}\n").as_bytes())
        );
        arrivals.push(Instant::now());
    }
    assert_eq!(sandbox.message(), end(None));
    for pair in arrivals.windows(2) {
        let gap = pair[1] - pair[0];
        assert!(
            gap > Duration::from_millis(20),
            "two pieces came together: {gap:?}"
        );
    }
    assert!(arrivals[9] - arrivals[0] > Duration::from_millis(850));
}
