//! The runtime process: its environment, its output, its end.

use std::time::Duration;

use thaw_agent_protocol::{AgentMessage, InitError, LogStream, RuntimeExit, RuntimeExitCause};

use crate::support::{Sandbox, response_path};

/// A runtime that answers one invocation with `answer`, a piece of shell.
fn one_shot(answer: &str) -> String {
    format!(
        "#!/bin/sh\nAPI=http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime\n\
         curl -sS -D headers -o event $API/invocation/next\n\
         ID=$(sed -n 's/^lambda-runtime-aws-request-id: //p' headers | tr -d '\\r')\n{answer}\n"
    )
}

fn init_error(sandbox: &mut Sandbox) -> (InitError, serde_json::Value) {
    let AgentMessage::InitError(error) = sandbox.message() else {
        panic!("no init error");
    };
    let document = serde_json::from_slice(&error.payload).unwrap();
    (error, document)
}

#[test]
fn the_runtime_gets_exactly_the_configured_environment() {
    let mut sandbox = Sandbox::boot();
    sandbox.write("bootstrap", "#!/bin/sh\nenv; pwd; echo done\n");
    sandbox.configure(&["absent", "bootstrap"], &[("_HANDLER", "app.handler")]);
    let text = sandbox.log_until(LogStream::Stdout, "done\n");
    assert!(text.contains("_HANDLER=app.handler\n"));
    assert!(text.contains(&format!("AWS_LAMBDA_RUNTIME_API={}\n", sandbox.api)));
    assert!(text.contains("THAW_GENERATION_FILE=/run/thaw/generation\n"));
    assert!(text.contains(&format!("{}\n", sandbox.path("").trim_end_matches('/'))));
    assert!(!text.contains("CARGO"), "{text}");
}

#[test]
fn output_written_before_an_answer_arrives_before_it() {
    let mut sandbox = Sandbox::script(&one_shot(
        "for i in $(seq 1 5000); do echo \"line $i of this invocation\"; done\necho late >&2\n\
         curl -sS -d '{}' $API/invocation/$ID/response\nexec sleep 1000",
    ));
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    assert_eq!(sandbox.log_text(), "");
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    sandbox.hear_thawed();
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
    let log = sandbox.log_text();
    assert!(log.contains("line 1 of"));
    assert!(log.contains("line 5000 of this invocation\n"));
    assert!(log.contains("late\n"));
}

#[test]
fn a_runtime_that_exits_during_an_invocation_is_reported_with_its_code() {
    let mut sandbox = Sandbox::script(&one_shot("echo dying; exit 7"));
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    sandbox.hear_thawed();
    assert_eq!(
        sandbox.message(),
        AgentMessage::RuntimeExit(RuntimeExit {
            cause: RuntimeExitCause::Code(7),
            out_of_memory: false,
            request_id: Some("r1".into()),
        })
    );
    assert_eq!(sandbox.log_text(), "dying\n");
}

#[test]
fn a_runtime_that_kills_itself_in_init_is_reported_with_its_signal() {
    let mut sandbox = Sandbox::script("#!/bin/sh\necho oh no >&2\nkill -SEGV $$\n");
    assert_eq!(
        sandbox.message(),
        AgentMessage::RuntimeExit(RuntimeExit {
            cause: RuntimeExitCause::Signal(11),
            out_of_memory: false,
            request_id: None,
        })
    );
    assert_eq!(sandbox.log_text(), "oh no\n");
}

#[test]
fn a_missing_bootstrap_is_an_invalid_entrypoint() {
    let mut sandbox = Sandbox::boot();
    sandbox.configure(&["a", "b"], &[]);
    let (error, document) = init_error(&mut sandbox);
    assert_eq!(error.error_type, "Runtime.InvalidEntrypoint");
    assert_eq!(document["errorType"], "Runtime.InvalidEntrypoint");
    let (a, b) = (sandbox.path("a"), sandbox.path("b"));
    assert_eq!(
        document["errorMessage"],
        format!("Error: Couldn't find valid bootstrap(s): [{a} {b}]")
    );
}

#[test]
fn a_bootstrap_that_cannot_be_executed_is_named() {
    for (text, reason) in [
        ("no program at all", "exec format error"),
        ("#!/nowhere/interpreter\n", "no such file or directory"),
    ] {
        let mut sandbox = Sandbox::script(text);
        let (error, document) = init_error(&mut sandbox);
        assert_eq!(error.error_type, "Runtime.InvalidEntrypoint");
        let path = sandbox.path("bootstrap");
        assert_eq!(
            document["errorMessage"],
            format!("Error: fork/exec {path}: {reason}")
        );
    }
}

#[test]
fn an_init_over_its_limit_is_ended() {
    let mut sandbox = Sandbox::boot();
    sandbox.write("bootstrap", "#!/bin/sh\nexec sleep 1000\n");
    sandbox.configure_with_limit(&["bootstrap"], &[], Duration::from_millis(120));
    let (error, document) = init_error(&mut sandbox);
    assert_eq!(error.error_type, "Sandbox.Timedout");
    assert_eq!(
        document["errorMessage"],
        "Error: Task timed out after 0.12 seconds"
    );
    sandbox.shutdown().unwrap();
}

#[test]
fn the_init_limit_does_not_reach_past_ready() {
    let mut sandbox = Sandbox::boot();
    sandbox.write("bootstrap", "#!/bin/sh\nexec sleep 1000\n");
    let limit = Duration::from_millis(1500);
    sandbox.configure_with_limit(&["bootstrap"], &[], limit);
    let mut client = sandbox.client();
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.assert_silent(limit);
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    assert_eq!(client.finish().status, 200);
    assert_eq!(client.post(&response_path("r1"), b"{}").status, 202);
}

#[test]
fn a_runtime_writing_without_end_neither_fills_memory_nor_blocks_answers() {
    // Nobody reads the channel until the runtime has written much more than pipes and sockets hold.
    let mut sandbox =
        Sandbox::script("#!/bin/sh\nexec yes 0123456789012345678901234567890123456789\n");
    let mut client = sandbox.client();
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.thaw(1);
    sandbox.invoke(1, "r1", b"{}");
    sandbox.hear_thawed();
    assert_eq!(client.finish().status, 200);
    client.start("POST", &response_path("r1"), "", b"{}");
    assert!(matches!(sandbox.message(), AgentMessage::Response(_)));
    assert_eq!(client.finish().status, 202);
    assert!(
        sandbox
            .log
            .iter()
            .all(|byte| b"0123456789\n".contains(byte))
    );
    drop(client);
}

#[test]
fn shutdown_after_the_runtime_ended_does_not_wait_for_it() {
    let mut sandbox = Sandbox::script("#!/bin/sh\n");
    assert!(matches!(sandbox.message(), AgentMessage::RuntimeExit(_)));
    let start = std::time::Instant::now();
    sandbox.shutdown().unwrap();
    assert!(start.elapsed() < Duration::from_millis(1500));
}

#[test]
fn shutdown_lets_the_runtime_say_goodbye() {
    let mut sandbox = Sandbox::script(
        "#!/bin/sh\ntrap 'echo goodbye; exit 0' TERM\necho ready\nwhile :; do sleep 0.05; done\n",
    );
    sandbox.log_until(LogStream::Stdout, "ready");
    sandbox.send(0, thaw_agent_protocol::HostMessage::Shutdown);
    sandbox.log_until(LogStream::Stdout, "goodbye");
    sandbox.end().unwrap();
}
