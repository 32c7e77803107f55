//! The Telemetry API: a real program subscribes, and this test listens where it said.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thaw_agent_protocol::AgentMessage;

use crate::support::{Client, Sandbox, response_path};

/// Subscribes, tells each event, and lets the listener know of the last.
const EXTENSION: &str = r#"#!/bin/sh
API=http://$AWS_LAMBDA_RUNTIME_API
ID=$(curl -sS -D - -o /dev/null -H "Lambda-Extension-Name: ${0##*/}" -d '{"events":["INVOKE","SHUTDOWN"]}' \
  $API/2020-01-01/extension/register | sed -n 's/^lambda-extension-identifier: //p' | tr -d '\r')
curl -sS -X PUT -o subscribed -H "Lambda-Extension-Identifier: $ID" -d "{\"schemaVersion\":\"2022-12-13\",
  \"types\":[\"platform\",\"function\",\"extension\"],\"buffering\":{\"timeoutMs\":30000},
  \"destination\":{\"protocol\":\"HTTP\",\"URI\":\"http://sandbox.localdomain:$PORT/telemetry\"}}" $API/2022-07-01/telemetry
for event in first last; do
  echo "$event $(curl -sS -H "Lambda-Extension-Identifier: $ID" $API/2020-01-01/extension/event/next | cut -c1-22)"
done
curl -sS -d '[{"type":"end"}]' http://127.0.0.1:$PORT/end
"#;

/// What is posted to a port, as it comes.
fn listen() -> (u16, mpsc::Receiver<(String, Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (heard_to, heard) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            if heard_to.send(one_post(stream.unwrap())).is_err() {
                break;
            }
        }
    });
    (port, heard)
}

/// Path and body of a request. It is slow to answer: what waits for the answer does so for a reason.
fn one_post(stream: TcpStream) -> (String, Value) {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_lowercase().strip_prefix("content-length: ") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    reader.get_mut().write_all(answer).unwrap();
    let path = first.split(' ').nth(1).unwrap().to_owned();
    (path, serde_json::from_slice(&body).unwrap())
}

/// All that is heard until an event of this type.
fn until(heard: &mpsc::Receiver<(String, Value)>, last: &str) -> Vec<Value> {
    let mut events = Vec::new();
    while !events.iter().any(|event: &Value| event["type"] == last) {
        let (path, batch) = heard
            .recv_timeout(Duration::from_secs(30))
            .unwrap_or_else(|_| panic!("no {last} after {events:?}"));
        assert_eq!(path, if last == "end" { "/end" } else { "/telemetry" });
        events.extend(batch.as_array().unwrap().iter().cloned());
    }
    events
}

fn types(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect()
}

/// A sandbox whose extension subscribes to `port`; its runtime waits for an invocation.
fn subscribed(port: u16) -> (Sandbox, Client) {
    let mut sandbox = Sandbox::boot();
    std::fs::create_dir(sandbox.path("extensions")).unwrap();
    sandbox.write("extensions/watcher", EXTENSION);
    sandbox.write(
        "bootstrap",
        "#!/bin/sh\necho from the runtime\nexec sleep 1000\n",
    );
    let port = port.to_string();
    let environment = [
        ("PORT", port.as_str()),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand"),
    ];
    sandbox.configure(&["bootstrap"], &environment);
    let mut runtime = sandbox.client();
    runtime.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    assert_eq!(runtime.finish().status, 200);
    (sandbox, runtime)
}

#[test]
fn a_subscriber_hears_of_a_sandbox_from_its_start_to_its_end() {
    let (port, heard) = listen();
    let (mut sandbox, mut runtime) = subscribed(port);
    let subscribed = std::fs::read(sandbox.path("subscribed")).unwrap();
    assert_eq!(subscribed, b"\"OK\"");
    assert_eq!(runtime.post(&response_path("r1"), b"12").status, 202);
    // Nobody waits for the buffer's half minute.
    let events = until(&heard, "platform.runtimeDone");
    let platform: Vec<&Value> = events
        .iter()
        .filter(|event| event["type"].as_str().unwrap().starts_with("platform."))
        .collect();
    let platform: Vec<(&str, &Value)> = platform
        .iter()
        .map(|event| (event["type"].as_str().unwrap(), &event["record"]))
        .collect();
    let [
        start,
        subscription,
        init,
        extension,
        report,
        invocation,
        done,
    ] = &platform[..]
    else {
        panic!("{:?}", types(&events));
    };
    assert_eq!(
        *start,
        (
            "platform.initStart",
            &json!({"initializationType": "on-demand", "phase": "init", "functionName": "f", "functionVersion": "1"})
        )
    );
    assert_eq!(
        *subscription,
        (
            "platform.telemetrySubscription",
            &json!({"name": "watcher", "state": "Subscribed", "types": ["platform", "function", "extension"]})
        )
    );
    assert_eq!(
        *init,
        (
            "platform.initRuntimeDone",
            &json!({"initializationType": "on-demand", "phase": "init", "status": "success"})
        )
    );
    assert_eq!(
        *extension,
        (
            "platform.extension",
            &json!({"name": "watcher", "state": "Ready", "events": ["INVOKE", "SHUTDOWN"]})
        )
    );
    assert_eq!(report.0, "platform.initReport");
    assert!(report.1["metrics"]["durationMs"].as_f64().unwrap() > 0.0);
    let tracing = json!({"type": "X-Amzn-Trace-Id", "value": "Root=1-0"});
    assert_eq!(
        *invocation,
        (
            "platform.start",
            &json!({"requestId": "r1", "version": "1", "tracing": tracing})
        )
    );
    let (name, record) = *done;
    assert_eq!(
        (name, &record["status"]),
        ("platform.runtimeDone", &json!("success"))
    );
    assert_eq!(record["metrics"]["producedBytes"], 2);
    let said = |kind: &str| events.iter().find(|event| event["type"] == kind).unwrap();
    assert_eq!(said("function")["record"], "from the runtime\n");
    assert!(said("function")["time"].as_str().unwrap().ends_with('Z'));

    // The end is told to the extension when the report was delivered.
    let events = until(&heard, "platform.report");
    let record = &events
        .iter()
        .find(|event| event["type"] == "platform.report")
        .unwrap()["record"];
    assert_eq!(
        (&record["requestId"], &record["status"]),
        (&json!("r1"), &json!("success"))
    );
    assert_eq!(record["metrics"]["memorySizeMB"], 128);
    assert!(record["metrics"]["maxMemoryUsedMB"].as_u64().unwrap() > 0);
    assert!(types(&events).iter().all(|kind| *kind != "platform.end"));
    until(&heard, "end");
    assert!(matches!(sandbox.message(), AgentMessage::Thawed { .. }));
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
    assert_eq!(sandbox.message(), AgentMessage::Settled);
    let log = sandbox.log_text();
    assert!(
        log.contains("first {\"eventType\":\"INVOKE\"") || log.contains("first {\"deadlineMs\""),
        "{log}"
    );
}

#[test]
fn a_subscriber_that_does_not_listen_hears_of_the_end_all_the_same() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let (mut sandbox, mut runtime) = subscribed(port);
    let began = Instant::now();
    assert_eq!(runtime.post(&response_path("r1"), b"12").status, 202);
    assert!(matches!(sandbox.message(), AgentMessage::Thawed { .. }));
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
    assert_eq!(sandbox.message(), AgentMessage::Settled);
    assert!(began.elapsed() < Duration::from_secs(2));
    assert!(
        sandbox.log_text().contains("last "),
        "{}",
        sandbox.log_text()
    );
}

#[test]
fn a_subscription_is_refused_in_lambdas_words() {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    let name = "Lambda-Extension-Name: helper\r\n";
    client.start("POST", "/2020-01-01/extension/register", name, b"{}");
    let own = client.finish().headers["lambda-extension-identifier"].clone();
    let mut subscribe = |path: &str, identifier: &str, body: &str| {
        let header = format!("Lambda-Extension-Identifier: {identifier}\r\n");
        client.start("PUT", path, &header, body.as_bytes());
        let reply = client.finish();
        let error_type = match reply.status {
            200 => String::new(),
            _ => reply.json()["errorType"].as_str().unwrap().to_owned(),
        };
        (reply.status, error_type)
    };
    let refused = |status, error_type: &str| (status, error_type.to_owned());
    let target = r#""destination":{"protocol":"HTTP","URI":"http://sandbox:9"}"#;
    let wish = format!(r#"{{"schemaVersion":"2020-08-15","types":["platform"],{target}}}"#);
    let (logs, telemetry) = ("/2020-08-15/logs", "/2022-07-01/telemetry");
    let stranger = "01234567-89ab-cdef-0123-456789abcdef";
    assert_eq!(
        subscribe(logs, stranger, &wish),
        refused(403, "Extension.UnknownExtensionIdentifier")
    );
    assert_eq!(
        subscribe(logs, "", &wish),
        refused(403, "Extension.MissingExtensionIdentifier")
    );
    assert_eq!(subscribe(logs, &own, "{}"), refused(400, "ValidationError"));
    assert_eq!(
        subscribe(telemetry, &own, &wish),
        refused(400, "ValidationError")
    );
    assert_eq!(subscribe(logs, &own, &wish), refused(200, ""));
    let mut runtime = sandbox.client();
    runtime.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    assert_eq!(
        subscribe(logs, &own, &wish),
        refused(403, "Logs.SubscriptionClosed")
    );
    let wish = wish.replace("2020-08-15", "2022-07-01");
    assert_eq!(
        subscribe(telemetry, &own, &wish),
        refused(403, "Telemetry.SubscriptionClosed")
    );
}
