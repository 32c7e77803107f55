//! Connections and their limits, over sockets that hide nothing.

use std::time::Duration;

use thaw_api::GatewayConfig;
use thaw_api::connections::pace::Patience;
use thaw_api::connections::{FIELDS_BYTES_MAX, URI_BYTES_MAX};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::server::{LIMIT, Server, zip};
use super::{FUNCTIONS, create, good, refused};

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(3600);

/// Limits that no test meets but for those that it shortens.
fn patient(config: &mut GatewayConfig) {
    let limits = &mut config.limits.connections;
    (limits.idle, limits.head) = (LONG, LONG);
    limits.patience = Patience {
        longest: LONG,
        bytes_per_second: 1,
    };
}

async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.address).await.unwrap()
}

/// Reads one answer, as long as its head says.
async fn answer(stream: &mut TcpStream) -> String {
    let reading = async {
        let mut text = Vec::new();
        while !text.ends_with(b"\r\n\r\n") {
            text.push(stream.read_u8().await.expect("an answer"));
        }
        let head = String::from_utf8(text).unwrap().to_lowercase();
        let length = head.split("content-length: ").nth(1).unwrap();
        let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.expect("its body");
        head + &String::from_utf8(body).unwrap()
    };
    tokio::time::timeout(LIMIT, reading)
        .await
        .expect("an answer in time")
}

/// Sends a request and reads its answer.
async fn ask(stream: &mut TcpStream, request: &[u8]) -> String {
    // A request that is refused half-way need not be taken in full.
    let _ = stream.write_all(request).await;
    answer(stream).await
}

/// Reads until the gateway has closed the connection.
async fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut read = Vec::new();
    let closed = tokio::time::timeout(LIMIT, stream.read_to_end(&mut read));
    let _ = closed.await.expect("the gateway closes the connection");
    read
}

fn status(answer: &str) -> u16 {
    let code = answer.strip_prefix("http/1.1 ").unwrap_or(answer).get(..3);
    code.unwrap().parse().unwrap()
}

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";

async fn deployed(shape: impl FnOnce(&mut GatewayConfig)) -> Server {
    let server = Server::shaped(shape).await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    server
}

#[tokio::test]
async fn a_head_that_trickles_ends_its_connection_and_holds_up_nobody() {
    let server = Server::shaped(|config| {
        patient(config);
        config.limits.connections.head = SHORT;
    })
    .await;
    let mut idle = connect(&server).await;
    assert_eq!(status(&ask(&mut idle, HEALTH).await), 200);
    let (mut reader, mut writer) = connect(&server).await.into_split();
    writer
        .write_all(b"GET /healthz HTTP/1.1\r\nHost: ")
        .await
        .unwrap();
    // Each byte comes in time for a limit that began anew with it.
    let trickle = tokio::spawn(async move {
        while writer.write_all(b"h").await.is_ok() {
            tokio::time::sleep(SHORT / 20).await;
        }
    });
    assert_eq!(server.get("/healthz").await.status, 200);
    let mut read = Vec::new();
    let ended = tokio::time::timeout(LIMIT, reader.read_to_end(&mut read));
    let _ = ended.await.expect("the gateway ends it");
    assert_eq!(read, b"");
    trickle.await.unwrap();
    assert_eq!(
        status(&ask(&mut idle, HEALTH).await),
        200,
        "the idle one is there"
    );
    server.stop().await;
}

#[tokio::test]
async fn an_idle_connection_ends_whether_it_was_used_or_not() {
    let server = Server::shaped(|config| {
        patient(config);
        config.limits.connections.idle = SHORT;
    })
    .await;
    let mut silent = connect(&server).await;
    let mut used = connect(&server).await;
    assert_eq!(status(&ask(&mut used, HEALTH).await), 200);
    assert_eq!(until_closed(&mut silent).await, b"");
    assert_eq!(until_closed(&mut used).await, b"");
    server.stop().await;
}

#[tokio::test]
async fn a_head_over_its_limits_is_refused_by_name() {
    let server = Server::start().await;
    let with = |path: String, fields: String| {
        format!("GET {path} HTTP/1.1\r\nHost: h\r\n{fields}\r\n").into_bytes()
    };
    let long = |bytes: usize| format!("/healthz?{}", "x".repeat(bytes - "/healthz?".len()));
    let large = |bytes: usize| format!("X: {}\r\n", "x".repeat(bytes - "xhosth".len()));
    let mut stream = connect(&server).await;
    for (path, fields, code) in [
        (long(URI_BYTES_MAX), String::new(), 200),
        (long(URI_BYTES_MAX + 1), String::new(), 414),
        ("/healthz".to_owned(), large(FIELDS_BYTES_MAX), 200),
        ("/healthz".to_owned(), large(FIELDS_BYTES_MAX + 1), 431),
        ("/healthz".to_owned(), "X: x\r\n".repeat(99), 200),
    ] {
        let text = ask(&mut stream, &with(path, fields)).await;
        assert_eq!(status(&text), code, "{text}");
        assert_eq!(text.contains("\"message\":"), code > 200, "{text}");
    }
    // What is not even read in full has the bare status, and the connection ends.
    for fields in ["X: x\r\n".repeat(100), large(1 << 20)] {
        let mut stream = connect(&server).await;
        let text = ask(&mut stream, &with("/healthz".to_owned(), fields)).await;
        assert_eq!(status(&text), 431, "{text}");
        until_closed(&mut stream).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_body_over_its_limit_is_refused_before_it_has_come_and_is_no_request() {
    let server = deployed(patient).await;
    let head = |length: &str| {
        format!("POST {FUNCTIONS}/f/invocations HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n")
    };
    let size = 6 * 1024 * 1024 + 1_usize;
    let mut declared = connect(&server).await;
    let text = ask(
        &mut declared,
        head("Content-Length: 10737418240").as_bytes(),
    )
    .await;
    assert_eq!(status(&text), 413, "{text}");
    assert!(text.contains("requesttoolargeexception"), "{text}");

    // Chunks that nobody ended.
    let mut chunked = connect(&server).await;
    let head_of_chunks = head("Transfer-Encoding: chunked");
    chunked.write_all(head_of_chunks.as_bytes()).await.unwrap();
    for _ in 0..size.div_ceil(1024) {
        let chunk = format!("400\r\n{}\r\n", "x".repeat(1024));
        chunked.write_all(chunk.as_bytes()).await.unwrap();
    }
    let text = answer(&mut chunked).await;
    assert_eq!(status(&text), 413, "{text}");

    // The rest of a refused body is dropped; what follows it is the next request.
    let mut sending = connect(&server).await;
    let text = ask(
        &mut sending,
        head(&format!("Content-Length: {size}")).as_bytes(),
    )
    .await;
    assert_eq!(status(&text), 413, "{text}");
    let mut rest = HEALTH.repeat(size / HEALTH.len() + 1);
    rest.truncate(size);
    sending.write_all(&rest).await.unwrap();
    let text = ask(
        &mut sending,
        b"GET /fn/nobody/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    )
    .await;
    assert_eq!(status(&text), 404, "{text}");
    server.stop().await;
}

#[tokio::test]
async fn limits_are_lambdas() {
    let server = Server::start().await;
    let large = vec![b'x'; 70_167_212];
    let answer = server.send("POST", FUNCTIONS, &[], &large).await;
    let text = refused(&answer, 413, "RequestEntityTooLargeException");
    assert_eq!(
        text,
        "Request must be smaller than 70167211 bytes for the CreateFunction operation"
    );
    let stored = create("f", &vec![0; 52_428_801]);
    refused(
        &server.post(FUNCTIONS, &stored).await,
        413,
        "RequestEntityTooLargeException",
    );
    let bomb = zip(&[("zeros", &vec![0; 262_144_001])]);
    let answer = server.post(FUNCTIONS, &create("f", &bomb)).await;
    let text = refused(&answer, 400, "InvalidParameterValueException");
    assert_eq!(text, "Unzipped size must be smaller than 262144000 bytes");

    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let path = format!("{FUNCTIONS}/f/invocations");
    let mut event = vec![b'x'; 6 * 1024 * 1024];
    event[0] = b'"';
    *event.last_mut().unwrap() = b'"';
    assert_eq!(server.send("POST", &path, &[], &event).await.status, 200);
    event.push(b' ');
    let answer = server.send("POST", &path, &[], &event).await;
    refused(&answer, 413, "RequestTooLargeException");
    assert_eq!(server.send("POST", "/fn/f/", &[], &event).await.status, 413);
    server.stop().await;
}

#[tokio::test]
async fn requests_in_one_piece_are_answered_in_their_order() {
    let server = deployed(patient).await;
    let mut stream = connect(&server).await;
    let invoke = |event: &str| {
        let length = event.len();
        format!(
            "POST {FUNCTIONS}/f/invocations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{event}"
        )
    };
    let requests: String = (0..50).map(|number| invoke(&number.to_string())).collect();
    stream.write_all(requests.as_bytes()).await.unwrap();
    for number in 0..50 {
        let text = answer(&mut stream).await;
        assert!(text.ends_with(&format!("\r\n\r\n{number}")), "{text}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_body_that_trickles_is_given_up() {
    let server = deployed(|config| {
        patient(config);
        config.limits.connections.patience.longest = SHORT;
    })
    .await;
    let head = format!(
        "POST {FUNCTIONS}/f/invocations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n[1,"
    );
    let mut stream = connect(&server).await;
    let text = ask(&mut stream, head.as_bytes()).await;
    assert_eq!(status(&text), 400, "{text}");
    assert!(text.contains("the body came too slowly"), "{text}");
    until_closed(&mut stream).await;
    server.stop().await;
}

/// A connection that has a place, once there is one.
async fn let_in(connect: impl AsyncFn() -> TcpStream) -> TcpStream {
    let waiting = async {
        loop {
            let mut stream = connect().await;
            let text = ask(&mut stream, HEALTH).await;
            assert!([200, 503].contains(&status(&text)), "{text}");
            if status(&text) == 200 {
                return stream;
            }
        }
    };
    tokio::time::timeout(LIMIT, waiting)
        .await
        .expect("a place becomes free")
}

#[tokio::test]
async fn a_connection_too_many_is_refused_at_once() {
    let server = Server::shaped(|config| {
        patient(config);
        // One is the test's own, which is kept.
        config.limits.connections.count_max = 2;
    })
    .await;
    let held = let_in(async || connect(&server).await).await;
    let mut other = connect(&server).await;
    let text = answer(&mut other).await;
    assert_eq!(status(&text), 503, "{text}");
    assert!(text.contains("retry-after: 1\r\n"), "{text}");
    assert!(text.contains("\"message\":\"This gateway has as many connections"));
    assert_eq!(server.get("/healthz").await.status, 200);
    drop(held);
    let_in(async || connect(&server).await).await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_take_its_answer_is_given_up() {
    let server = deployed(|config| {
        patient(config);
        config.limits.connections.count_max = 2;
        config.limits.connections.patience.longest = SHORT;
    })
    .await;
    let mut stream = let_in(async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(server.address).await.unwrap()
    })
    .await;
    // More than both ends' buffers hold.
    let event = format!("\"{}\"", "x".repeat(6 * 1024 * 1024 - 2));
    let head = format!(
        "POST {FUNCTIONS}/f/invocations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
        event.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(event.as_bytes()).await.unwrap();
    let_in(async || connect(&server).await).await;
    let taken = until_closed(&mut stream).await;
    assert!(taken.len() < event.len(), "{}", taken.len());
    server.stop().await;
}
