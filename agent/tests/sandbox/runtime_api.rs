//! Statuses, headers and bodies of the Runtime API, byte for byte over a real connection.

use std::time::Duration;

use serde_json::json;
use thaw_agent_protocol::{AgentMessage, RESPONSE_BYTES_MAX};

use crate::support::{CODE_TAKEN, Client, NEXT, Sandbox, response_path};

/// A sandbox in generation 1 whose runtime (this client) waits in `/next`.
fn thawed() -> (Sandbox, Client) {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.hear_thawed();
    (sandbox, client)
}

/// The same, with the invocation `r1` under way.
fn invoked() -> (Sandbox, Client) {
    let (mut sandbox, mut client) = thawed();
    sandbox.invoke(1, "r1", br#"{"n":1}"#);
    assert_eq!(client.finish().status, 200);
    (sandbox, client)
}

#[test]
fn next_carries_every_header_that_the_clients_need() {
    let (mut sandbox, mut client) = thawed();
    sandbox.invoke(1, "r1", br#"{"n":1}"#);
    let reply = client.finish();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.body, br#"{"n":1}"#);
    let header = |name: &str| reply.headers[name].as_str();
    assert_eq!(header("content-type"), "application/json");
    assert_eq!(header("lambda-runtime-aws-request-id"), "r1");
    assert_eq!(header("lambda-runtime-deadline-ms"), "4000000000000");
    assert_eq!(header("lambda-runtime-trace-id"), "Root=1-0");
    assert_eq!(
        header("lambda-runtime-invoked-function-arn"),
        "arn:aws:lambda:us-east-1:000000000000:function:f"
    );
    assert!(!reply.headers.contains_key("lambda-runtime-client-context"));
}

#[test]
fn an_empty_event_becomes_an_empty_object() {
    let (mut sandbox, mut client) = thawed();
    sandbox.invoke(1, "r1", b"");
    assert_eq!(client.finish().body, b"{}");
}

#[test]
fn a_response_is_accepted_once_and_forwarded_with_its_content_type() {
    let (mut sandbox, mut client) = invoked();
    client.start(
        "POST",
        &response_path("r1"),
        "Content-Type: text/plain\r\n",
        b"hello",
    );
    let AgentMessage::Response(answer) = sandbox.message() else {
        panic!("no response");
    };
    assert_eq!(answer.request_id, "r1");
    assert_eq!(answer.payload, b"hello");
    assert_eq!(answer.content_type.as_deref(), Some("text/plain"));
    let reply = client.finish();
    assert_eq!(reply.status, 202);
    assert_eq!(reply.body, b"{\"status\":\"OK\"}\n");
    assert_eq!(reply.headers["content-type"], "application/json");
    let second = client.post(&response_path("r1"), b"again");
    assert_eq!(second.status, 403);
    let message = "State transition from RuntimeResponseSentState to InvocationResponse failed for runtime. Error: State transition is not allowed";
    assert_eq!(
        second.json(),
        json!({"errorType": "InvalidStateTransition", "errorMessage": message})
    );
}

#[test]
fn a_wrong_id_is_refused_and_harms_nothing() {
    let (mut sandbox, mut client) = invoked();
    for path in [
        response_path("r2"),
        "/2018-06-01/runtime/invocation/r2/error".into(),
    ] {
        let reply = client.post(&path, b"{}");
        assert_eq!(reply.status, 400);
        assert_eq!(reply.json()["errorType"], "InvalidRequestID");
    }
    assert_eq!(client.post(&response_path("r1"), b"{}").status, 202);
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
}

#[test]
fn an_invocation_error_carries_type_and_document() {
    let (mut sandbox, mut client) = invoked();
    let document = br#"{"errorMessage":"boom","errorType":"ValueError","stackTrace":[]}"#;
    client.start(
        "POST",
        "/2018-06-01/runtime/invocation/r1/error",
        "Lambda-Runtime-Function-Error-Type: ValueError\r\n",
        document,
    );
    assert_eq!(client.finish().status, 202);
    let AgentMessage::InvocationError(error) = sandbox.message() else {
        panic!("no error");
    };
    assert_eq!(error.request_id, "r1");
    assert_eq!(error.error_type.as_deref(), Some("ValueError"));
    assert_eq!(error.payload, document);
}

#[test]
fn a_cause_for_x_ray_is_not_handed_to_the_client() {
    let (mut sandbox, mut client) = invoked();
    client.start(
        "POST",
        "/2018-06-01/runtime/invocation/r1/error",
        "Content-Type: application/vnd.aws.lambda.error.cause+json\r\n",
        br#"{"errorMessage":"boom","errorType":"E","errorCause":{"working_directory":"/"}}"#,
    );
    assert_eq!(client.finish().status, 202);
    let AgentMessage::InvocationError(error) = sandbox.message() else {
        panic!("no error");
    };
    assert_eq!(error.payload, br#"{"errorMessage":"boom","errorType":"E"}"#);
}

#[test]
fn a_response_mode_that_lambda_does_not_know_fails_the_invocation() {
    let (mut sandbox, mut client) = invoked();
    let mode = "Lambda-Runtime-Function-Response-Mode: Streaming\r\n";
    client.start("POST", &response_path("r2"), mode, b"1");
    assert_eq!(client.finish().json()["errorType"], "InvalidRequestID");
    client.start("POST", &response_path("r1"), mode, b"1");
    let AgentMessage::InvocationError(error) = sandbox.message() else {
        panic!("no error");
    };
    let error_type = "Runtime.InvalidResponseModeHeader";
    assert_eq!(error.error_type.as_deref(), Some(error_type));
    let reply = client.finish();
    assert_eq!(reply.status, 400);
    assert_eq!(
        reply.json(),
        json!({"errorType": "InvalidFunctionResponseMode", "errorMessage": "Invalid function response mode"})
    );
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.invoke(1, "r2", b"{}");
    assert_eq!(client.finish().status, 200);
    let mode = "Lambda-Runtime-Function-Response-Mode: \r\n";
    client.start("POST", &response_path("r2"), mode, b"1");
    assert_eq!(client.finish().status, 202);
}

#[test]
fn the_largest_response_passes_and_one_byte_more_is_413() {
    let (mut sandbox, mut client) = invoked();
    let mut body = vec![b'x'; RESPONSE_BYTES_MAX + 1];
    client.start("POST", &response_path("r1"), "", &body);
    let AgentMessage::InvocationError(error) = sandbox.message() else {
        panic!("no error");
    };
    assert_eq!(
        error.error_type.as_deref(),
        Some("Function.ResponseSizeTooLarge")
    );
    let reply = client.finish();
    assert_eq!(reply.status, 413);
    assert_eq!(reply.json()["errorType"], "RequestEntityTooLarge");

    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.invoke(1, "r2", b"{}");
    assert_eq!(client.finish().status, 200);
    body.pop();
    client.start("POST", &response_path("r2"), "", &body);
    let AgentMessage::Response(answer) = sandbox.message() else {
        panic!("no response");
    };
    assert_eq!(answer.payload.len(), RESPONSE_BYTES_MAX);
    assert_eq!(client.finish().status, 202);
}

#[test]
fn a_warm_sandbox_answers_again_and_says_when_it_is_idle() {
    let (mut sandbox, mut client) = thawed();
    for round in 0..3 {
        let id = format!("r{round}");
        sandbox.invoke(1, &id, b"{}");
        assert_eq!(client.finish().headers["lambda-runtime-aws-request-id"], id);
        assert_eq!(client.post(&response_path(&id), b"1").status, 202);
        assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
        client.start_next();
        assert_eq!(sandbox.message(), AgentMessage::Ready);
    }
}

#[test]
fn an_init_error_is_accepted_once() {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    let path = "/2018-06-01/runtime/init/error";
    client.start(
        "POST",
        path,
        "Lambda-Runtime-Function-Error-Type: Runtime.ImportModuleError\r\n",
        br#"{"errorMessage":"no"}"#,
    );
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error");
    };
    assert_eq!(error.error_type, "Runtime.ImportModuleError");
    assert_eq!(error.payload, br#"{"errorMessage":"no"}"#);
    assert_eq!(client.finish().status, 202);
    assert_eq!(client.post(path, b"{}").status, 403);
    let message = "State transition from InitError to Ready failed for runtime. Error: State transition is not allowed";
    assert_eq!(client.get(NEXT).json()["errorMessage"], message);
}

#[test]
fn an_init_error_after_init_is_refused() {
    let (_sandbox, mut client) = invoked();
    let reply = client.post("/2018-06-01/runtime/init/error", b"{}");
    assert_eq!(reply.status, 403);
}

#[test]
fn a_restored_base_takes_its_code_and_a_booted_guest_has_it() {
    let taken = |sandbox: &Sandbox| std::path::Path::new(&sandbox.path(CODE_TAKEN)).exists();
    let mut booted = Sandbox::idle();
    booted.client().start_next();
    assert_eq!(booted.message(), AgentMessage::Ready);
    assert!(!taken(&booted));
    let mut restored = Sandbox::boot();
    restored.write("bootstrap", "#!/bin/sh\nexec sleep 1000\n");
    restored.thaw(1);
    restored.configure(&["bootstrap"], &[]);
    restored.client().start_next();
    let mut messages = [restored.message(), restored.message()];
    messages.sort_by_key(|message| *message == AgentMessage::Ready);
    assert!(matches!(
        messages,
        [AgentMessage::Thawed { .. }, AgentMessage::Ready]
    ));
    assert!(taken(&restored));
}

#[test]
fn a_rehearsed_answer_is_accepted_while_initialising_and_goes_nowhere() {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    let path = response_path("rehearsal");
    assert_eq!(client.post(&path, b"{}").status, 202);
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.hear_thawed();
    assert_eq!(sandbox.client().post(&path, b"{}").status, 400);
}

#[test]
fn a_snap_start_runtime_is_frozen_in_restore_next() {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    client.start("GET", "/2018-06-01/runtime/restore/next", "", b"");
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(5);
    sandbox.invoke(5, "r1", b"{}");
    let reply = client.finish();
    assert_eq!((reply.status, reply.body.len()), (200, 0));
    sandbox.hear_thawed();
    assert_eq!(sandbox.message(), AgentMessage::Restoring);
    let reply = client.get(NEXT);
    assert_eq!(reply.headers["lambda-runtime-aws-request-id"], "r1");
    assert_eq!(sandbox.message(), AgentMessage::Restored);
}

#[test]
fn a_failing_restore_hook_fails_the_invocation() {
    // Older clients use the second path.
    for path in ["restore/error", "init/error"] {
        let mut sandbox = Sandbox::idle();
        let mut client = sandbox.client();
        client.start("GET", "/2018-06-01/runtime/restore/next", "", b"");
        assert_eq!(sandbox.message(), AgentMessage::Ready);
        sandbox.thaw(5);
        sandbox.hear_thawed();
        assert_eq!(sandbox.message(), AgentMessage::Restoring);
        assert_eq!(client.finish().status, 200);
        let path = format!("/2018-06-01/runtime/{path}");
        let kind = "Lambda-Runtime-Function-Error-Type: Runtime.AfterRestoreError\r\n";
        client.start("POST", &path, kind, b"{}");
        assert_eq!(client.finish().status, 202);
        assert_eq!(client.post(&path, b"{}").status, 403);
        sandbox.invoke(5, "r1", b"{}");
        let AgentMessage::RestoreError(error) = sandbox.message() else {
            panic!("no error");
        };
        assert_eq!(error.request_id, "r1");
        let error_type = error.error_type.as_deref();
        assert_eq!(error_type, Some("Runtime.AfterRestoreError"));
    }
}

#[test]
fn a_restore_hook_may_fail_in_the_first_invocation_of_a_clone_and_not_later() {
    let failed = "/2018-06-01/runtime/restore/error";
    let (mut sandbox, mut client) = invoked();
    assert_eq!(client.post(failed, b"{}").status, 202);
    assert!(matches!(sandbox.message(), AgentMessage::RestoreError(_)));
    let (mut sandbox, mut client) = invoked();
    assert_eq!(client.post(&response_path("r1"), b"1").status, 202);
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.invoke(1, "r2", b"{}");
    assert_eq!(client.finish().status, 200);
    assert_eq!(client.post(failed, b"{}").status, 403);
}

#[test]
fn nothing_is_sent_before_the_answer_of_a_short_invocation() {
    // On a busy machine an invocation is not always short.
    let silent = (0..5).any(|_| {
        let mut sandbox = Sandbox::idle();
        let mut client = sandbox.client();
        client.start_next();
        assert_eq!(sandbox.message(), AgentMessage::Ready);
        sandbox.thaw(1);
        sandbox.invoke(1, "r1", b"{}");
        assert_eq!(client.finish().status, 200);
        let silent = sandbox.is_silent(Duration::from_millis(20));
        assert_eq!(client.post(&response_path("r1"), b"1").status, 202);
        sandbox.hear_thawed();
        assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
        silent
    });
    assert!(silent);
}

#[test]
fn an_invocation_waits_for_a_runtime_that_lost_its_connection() {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    drop(client);
    let mut client = sandbox.client();
    // Answered only after the server has seen the first connection close.
    assert_eq!(client.get("/2018-06-01/ping").body, b"pong");
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    sandbox.hear_thawed();
    for (id, status) in [("r1", 403), ("r2", 400)] {
        assert_eq!(client.post(&response_path(id), b"1").status, status);
    }
    assert_eq!(client.get(NEXT).status, 200);
    // And again, as the first answer could have been lost.
    assert_eq!(client.get(NEXT).status, 200);
    assert_eq!(client.post(&response_path("r1"), b"1").status, 202);
}

#[test]
fn garbage_costs_its_own_connection_only() {
    let (mut sandbox, mut client) = invoked();
    sandbox.client().raw(b"\0\xff\r\n\r\n");
    sandbox
        .client()
        .raw(b"POST /2018-06-01/runtime/invocation/r1/response HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx");
    let nowhere = client.post("/nowhere", b"");
    assert_eq!(
        (nowhere.status, &*nowhere.body),
        (404, &b"404 page not found\n"[..])
    );
    assert_eq!(client.post(NEXT, b"").status, 405);
    assert_eq!(client.post(&response_path("r1"), b"1").status, 202);
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
}
