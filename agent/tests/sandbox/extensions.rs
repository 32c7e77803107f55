//! External extensions: real programs beside a runtime that the test plays.

use std::time::{Duration, Instant};

use thaw_agent_protocol::{AgentMessage, HostMessage, LogStream, RuntimeExitCause};

use crate::support::{Client, Reply, Sandbox, response_path};

/// Registers under its file's name, tells each event, and leaves at the second, the end.
const EXTENSION: &str = r#"#!/bin/sh
API=http://$AWS_LAMBDA_RUNTIME_API/2020-01-01/extension
ID=$(curl -sS -D - -o registered -H "Lambda-Extension-Name: ${0##*/}" \
  -d '{"events":["INVOKE","SHUTDOWN"]}' $API/register | sed -n 's/^lambda-extension-identifier: //p' | tr -d '\r')
for event in first last; do
  echo "event: $(curl -sS -H "Lambda-Extension-Identifier: $ID" $API/event/next)"
done
echo "handler=${_HANDLER-none} root=${LAMBDA_TASK_ROOT-none} name=$AWS_LAMBDA_FUNCTION_NAME"
"#;

fn with_extension(text: &str) -> Sandbox {
    let sandbox = Sandbox::boot();
    std::fs::create_dir(sandbox.path("extensions")).unwrap();
    sandbox.write("extensions/watcher", text);
    sandbox.write("bootstrap", "#!/bin/sh\necho runtime\nexec sleep 1000\n");
    sandbox
}

fn configure(sandbox: &mut Sandbox) {
    let environment = [("_HANDLER", "app.handler"), ("LAMBDA_TASK_ROOT", "/x")];
    sandbox.configure(&["bootstrap"], &environment);
}

fn ready() -> (Sandbox, Client) {
    let mut sandbox = with_extension(EXTENSION);
    configure(&mut sandbox);
    let mut runtime = sandbox.client();
    runtime.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    (sandbox, runtime)
}

fn hear_thawed_with_extensions(sandbox: &mut Sandbox) {
    let message = sandbox.message();
    assert!(
        matches!(
            message,
            AgentMessage::Thawed {
                extensions: true,
                ..
            }
        ),
        "{message:?}"
    );
}

fn document(payload: &[u8]) -> serde_json::Value {
    serde_json::from_slice(payload).unwrap()
}

#[test]
fn an_extension_sees_the_invocation_and_the_end_and_the_answer_waits_for_neither() {
    let (mut sandbox, mut runtime) = ready();
    assert!(
        sandbox
            .log_text()
            .contains("EXTENSION\tName: watcher\tState: Ready\tEvents: [INVOKE,SHUTDOWN]\n")
    );
    assert_eq!(runtime.finish().status, 200);
    assert_eq!(runtime.post(&response_path("r1"), b"1").status, 202);
    hear_thawed_with_extensions(&mut sandbox);
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
    assert_eq!(sandbox.message(), AgentMessage::Settled);
    let log = sandbox.log_text();
    let events: Vec<serde_json::Value> = log
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert_eq!(events.len(), 2, "{log}");
    assert_eq!(
        events[0],
        serde_json::json!({
            "eventType": "INVOKE", "deadlineMs": 4_000_000_000_000u64, "requestId": "r1",
            "invokedFunctionArn": "arn:aws:lambda:us-east-1:000000000000:function:f",
            "tracing": {"type": "X-Amzn-Trace-Id", "value": "Root=1-0"},
        })
    );
    assert_eq!(events[1]["eventType"], "SHUTDOWN");
    assert_eq!(events[1]["shutdownReason"], "spindown");
    assert!(log.contains("handler=none root=none name=f\n"), "{log}");
    let registered = std::fs::read(sandbox.path("registered")).unwrap();
    assert_eq!(
        document(&registered),
        serde_json::json!({"functionName": "f", "functionVersion": "1", "handler": "app.handler"})
    );
}

#[test]
fn an_extension_that_exits_at_init_is_a_crash_and_the_runtime_is_never_started() {
    let mut sandbox = with_extension("#!/bin/sh\necho no licence >&2\nexit 4\n");
    configure(&mut sandbox);
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error");
    };
    assert_eq!(error.error_type, "Extension.Crash");
    assert_eq!(
        document(&error.payload)["errorMessage"],
        "Error: exit status 4"
    );
    let log = sandbox.log_text();
    assert!(
        log.contains("no licence\n") && !log.contains("runtime"),
        "{log}"
    );
    assert!(
        log.contains("Name: watcher\tState: Exited\tEvents: []\tError Type: Extension.Crash\n")
    );
}

#[test]
fn a_file_that_cannot_be_executed_is_a_launch_error() {
    let sandbox = with_extension(EXTENSION);
    std::fs::write(sandbox.path("extensions/README"), "no program").unwrap();
    let mut sandbox = sandbox;
    configure(&mut sandbox);
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error");
    };
    assert_eq!(error.error_type, "Extension.LaunchError");
    let path = sandbox.path("extensions/README");
    assert_eq!(
        document(&error.payload)["errorMessage"],
        format!("Error: fork/exec {path}: permission denied")
    );
}

#[test]
fn an_extension_that_never_asks_for_an_event_is_named_when_the_init_limit_passes() {
    let mut sandbox = with_extension("#!/bin/sh\nexec sleep 1000\n");
    sandbox.configure_with_limit(&["bootstrap"], &[], Duration::from_millis(300));
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error");
    };
    assert_eq!(error.error_type, "Sandbox.Timedout");
    let log = sandbox.log_text();
    assert!(
        log.contains("Name: watcher\tState: Started\tEvents: []\n"),
        "{log}"
    );
}

#[test]
fn an_extension_that_dies_amid_an_invocation_fails_it() {
    let (mut sandbox, mut runtime) = {
        let mut sandbox = with_extension(
            &EXTENSION
                .replace("for event in first last", "for event in first")
                .replace("echo \"handler", "kill -9 $$; echo \"handler"),
        );
        configure(&mut sandbox);
        let mut runtime = sandbox.client();
        runtime.start_next();
        assert_eq!(sandbox.message(), AgentMessage::Ready);
        sandbox.thaw(1);
        sandbox.invoke(1, "r1", b"{}");
        (sandbox, runtime)
    };
    assert_eq!(runtime.finish().status, 200);
    hear_thawed_with_extensions(&mut sandbox);
    let AgentMessage::InvocationError(error) = sandbox.message() else {
        panic!("no invocation error");
    };
    assert_eq!(error.error_type.as_deref(), Some("Extension.Crash"));
    assert_eq!(
        document(&error.payload)["errorMessage"],
        "RequestId: r1 Error: signal: killed"
    );
    assert_eq!(sandbox.message(), AgentMessage::Settled);
}

#[test]
fn a_runtime_that_ends_is_told_and_the_extensions_hear_of_the_failure() {
    let mut sandbox = with_extension(EXTENSION);
    sandbox.write(
        "bootstrap",
        "#!/bin/sh\ncurl -sS -o /dev/null http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation/next\nexit 3\n",
    );
    configure(&mut sandbox);
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    hear_thawed_with_extensions(&mut sandbox);
    let AgentMessage::RuntimeExit(exit) = sandbox.message() else {
        panic!("no exit");
    };
    assert_eq!(exit.cause, RuntimeExitCause::Code(3));
    assert_eq!(sandbox.message(), AgentMessage::Settled);
    assert!(sandbox.log_text().contains(r#""shutdownReason":"failure""#));
}

#[test]
fn a_shutdown_amid_an_invocation_is_told_as_a_timeout_and_its_output_still_comes() {
    let (mut sandbox, mut runtime) = ready();
    assert_eq!(runtime.finish().status, 200);
    sandbox.log_until(LogStream::Stdout, "INVOKE");
    let began = Instant::now();
    sandbox.send(1, HostMessage::Shutdown);
    let log = sandbox.log_until(LogStream::Stdout, "handler=none");
    assert!(log.contains(r#""shutdownReason":"timeout""#), "{log}");
    sandbox.end().unwrap();
    // It left when it was told; nobody waited for the limit.
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn malformed_calls_are_refused_in_lambdas_words() {
    let mut sandbox = with_extension(EXTENSION);
    configure(&mut sandbox);
    let mut client = sandbox.client();
    let mut call = |method: &str, path: &str, headers: &str, body: &[u8]| -> Reply {
        client.start(
            method,
            &format!("/2020-01-01/extension/{path}"),
            headers,
            body,
        );
        client.finish()
    };
    let id = "Lambda-Extension-Identifier: 01234567-89ab-cdef-0123-456789abcdef\r\n";
    let (name, empty): (&str, &[u8]) = ("Lambda-Extension-Name: inside\r\n", b"");
    let error = "Extension.InvalidEventType";
    let not_internal = "SHUTDOWN: ShutdownEventNotSupportedForInternalExtension";
    let format = "InvalidRequestFormat";
    let keys: &[u8] = br#"{"events":["INVOKE"],"configurationKeys":["A"]}"#;
    let cases = [
        (
            "POST",
            "register",
            "",
            empty,
            "Extension.InvalidExtensionName",
            "Empty extension name",
        ),
        ("POST", "register", name, b"{".as_slice(), format, ""),
        ("POST", "register", name, empty, format, ""),
        (
            "POST",
            "register",
            name,
            br#"{"events":"INVOKE"}"#,
            format,
            "",
        ),
        (
            "POST",
            "register",
            name,
            keys,
            format,
            "configurationKeys are deprecated; use environment variables instead",
        ),
        (
            "POST",
            "register",
            name,
            br#"{"events":["SHUTDOWN"]}"#,
            error,
            not_internal,
        ),
        (
            "POST",
            "register",
            name,
            br#"{"events":["invoke"]}"#,
            error,
            "invoke: ErrorInvalidEventType",
        ),
        (
            "GET",
            "event/next",
            "",
            empty,
            "Extension.MissingExtensionIdentifier",
            "Missing Lambda-Extension-Identifier header",
        ),
        (
            "GET",
            "event/next",
            "Lambda-Extension-Identifier: x\r\n",
            empty,
            "Extension.InvalidExtensionIdentifier",
            "Invalid Lambda-Extension-Identifier",
        ),
        (
            "GET",
            "event/next",
            id,
            empty,
            "Extension.UnknownExtensionIdentifier",
            "Unknown extension 01234567-89ab-cdef-0123-456789abcdef",
        ),
        (
            "POST",
            "init/error",
            id,
            empty,
            "Extension.MissingHeader",
            "Lambda-Extension-Function-Error-Type not found",
        ),
        (
            "POST",
            "exit/error",
            &format!("{id}Lambda-Extension-Function-Error-Type: Extension.X\r\n"),
            empty,
            "Extension.UnknownExtensionIdentifier",
            "Unknown Lambda-Extension-Identifier",
        ),
    ];
    for (method, path, headers, body, error_type, message) in cases {
        let reply = call(method, path, headers, body);
        assert_eq!(
            (reply.status, reply.json()["errorType"].as_str()),
            (403, Some(error_type))
        );
        // What is wrong with JSON is said in the parser's words.
        if !message.is_empty() {
            assert_eq!(reply.json()["errorMessage"], message);
        }
        assert_eq!(reply.headers["content-type"], "application/json");
    }
    let headers = format!("{name}Lambda-Extension-Accept-Feature: accountId\r\n");
    let reply = call("POST", "register", &headers, b"{}");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.headers["lambda-extension-identifier"].len(), 36);
    assert_eq!(reply.json()["accountId"], "123456789012");
    let id = &reply.headers["lambda-extension-identifier"];
    let again = call("POST", "register", name, b"{}");
    assert_eq!(again.status, 403);
    assert_eq!(
        again.json()["errorMessage"],
        "Extension with this name already registered"
    );
    let own = format!("Lambda-Extension-Identifier: {id}\r\n");
    let error = format!("{own}Lambda-Extension-Function-Error-Type: Extension.X\r\n");
    for _ in 0..2 {
        let reply = call("POST", "init/error", &error, b"");
        assert_eq!(
            (reply.status, &*reply.body),
            (202, &b"{\"status\":\"OK\"}\n"[..])
        );
    }
    let reply = call("GET", "event/next", &own, b"");
    assert_eq!(
        reply.json()["errorMessage"],
        format!(
            "State transition from InitError to Ready failed for extension {id}. Error: State transition is not allowed"
        )
    );
    assert_eq!(sandbox.log_text(), "");
}

#[test]
fn an_extension_that_lost_its_connection_may_ask_again_and_one_that_waits_may_not() {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    client.start(
        "POST",
        "/2020-01-01/extension/register",
        "Lambda-Extension-Name: helper\r\n",
        br#"{"events":["INVOKE"]}"#,
    );
    let identifier = client.finish().headers["lambda-extension-identifier"].clone();
    let headers = format!("Lambda-Extension-Identifier: {identifier}\r\n");
    let ask = |client: &mut Client| {
        client.start("GET", "/2020-01-01/extension/event/next", &headers, b"");
    };
    ask(&mut client);
    let mut second = sandbox.client();
    ask(&mut second);
    assert_eq!(
        second.finish().json()["errorMessage"],
        format!(
            "State transition from Ready to Ready failed for extension {identifier}. Error: State transition is not allowed"
        )
    );
    drop(client);
    // Answered only after the server has seen the first connection close.
    assert_eq!(second.get("/2018-06-01/ping").body, b"pong");
    ask(&mut second);
    let mut runtime = sandbox.client();
    runtime.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    assert_eq!(second.finish().json()["requestId"], "r1");
}

#[test]
fn an_internal_extension_without_events_registers_and_waits_and_changes_nothing() {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    let headers = "Lambda-Extension-Name: helper\r\n";
    client.start(
        "POST",
        "/2020-01-01/extension/register",
        headers,
        br#"{"events":[]}"#,
    );
    let reply = client.finish();
    assert_eq!(
        (reply.status, reply.json()["functionName"].as_str()),
        (200, Some("f"))
    );
    let identifier = &reply.headers["lambda-extension-identifier"];
    let headers = format!("Lambda-Extension-Identifier: {identifier}\r\n");
    client.start("GET", "/2020-01-01/extension/event/next", &headers, b"");
    sandbox.assert_silent(Duration::from_millis(50));
    let mut runtime = sandbox.client();
    runtime.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    assert_eq!(sandbox.log_text(), "");
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    assert_eq!(runtime.finish().status, 200);
    assert_eq!(runtime.post(&response_path("r1"), b"1").status, 202);
    let message = sandbox.message();
    assert!(
        matches!(
            message,
            AgentMessage::Thawed {
                extensions: false,
                ..
            }
        ),
        "{message:?}"
    );
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
    sandbox.assert_silent(Duration::from_millis(50));
}
