//! The order and the generations of frames.

use std::time::Duration;

use thaw_agent::driver::DriverError;
use thaw_agent_protocol::{AgentMessage, Generation};

use crate::support::{Sandbox, UNFIT, invoke, thaw_named};

fn frozen() -> (Sandbox, crate::support::Client) {
    let mut sandbox = Sandbox::idle();
    let mut client = sandbox.client();
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    (sandbox, client)
}

fn assert_fatal(mut sandbox: Sandbox, words: &str) {
    let AgentMessage::Fatal { message } = sandbox.message() else {
        panic!("no fatal message");
    };
    assert!(message.contains(words), "{message}");
    assert!(sandbox.end().is_err());
}

#[test]
fn a_thaw_changes_the_generation_of_every_later_frame() {
    let (mut sandbox, _client) = frozen();
    sandbox.thaw(77);
    let (generation, message) = sandbox.receive();
    let AgentMessage::Thawed {
        unique_after_ns, ..
    } = message
    else {
        panic!("not thawed: {message:?}");
    };
    assert_eq!(generation, Generation(77));
    assert!(unique_after_ns.is_some());
    let thaw = sandbox.thaws.try_recv().unwrap();
    assert_eq!(thaw.hostname, "clone-77");
    assert_eq!(thaw.entropy, [7; 64]);
}

#[test]
fn an_invocation_before_any_thaw_ends_the_sandbox() {
    let (mut sandbox, _client) = frozen();
    sandbox.invoke(0, "r1", b"{}");
    assert_fatal(sandbox, "generation 0");
}

#[test]
fn an_invocation_of_another_clone_ends_the_sandbox() {
    let (mut sandbox, _client) = frozen();
    sandbox.thaw(2);
    sandbox.hear_thawed();
    sandbox.invoke(1, "r1", b"{}");
    assert_fatal(sandbox, "generation 1 refused in generation 2");
}

#[test]
fn a_clone_that_cannot_be_made_unique_ends_the_sandbox() {
    let (mut sandbox, mut client) = frozen();
    sandbox.send_at_once(2, [thaw_named(UNFIT.into()), invoke("r1", b"{}")]);
    let cause = std::io::Error::from(std::io::ErrorKind::StorageFull);
    assert_fatal(
        sandbox,
        &format!("making the clone unique: setting the clone's machine-id: {cause}"),
    );
    assert!(client.is_closed_without_an_answer());
}

#[test]
fn a_second_thaw_to_the_same_generation_ends_the_sandbox() {
    let (mut sandbox, _client) = frozen();
    sandbox.thaw(2);
    sandbox.hear_thawed();
    sandbox.thaw(2);
    assert_fatal(sandbox, "thaw to generation 2 refused");
}

#[test]
fn a_frozen_sandbox_writes_nothing_even_if_its_runtime_does() {
    let mut sandbox = Sandbox::boot();
    // The first line is written before the runtime asks for work, the rest while it waits.
    sandbox.write(
        "bootstrap",
        "#!/bin/sh\necho before\n: > started\nwhile :; do echo tick; sleep 0.01; done\n",
    );
    sandbox.configure(&["bootstrap"], &[]);
    sandbox.log_until(thaw_agent_protocol::LogStream::Stdout, "tick");
    let mut client = sandbox.client();
    client.start_next();
    assert_eq!(sandbox.message(), AgentMessage::Ready);
    sandbox.assert_silent(Duration::from_millis(100));
    sandbox.thaw(1);
    sandbox.hear_thawed();
    sandbox.log_until(thaw_agent_protocol::LogStream::Stdout, "tick");
}

#[test]
fn a_closed_channel_ends_the_agent() {
    let (sandbox, _client) = frozen();
    sandbox.close();
    assert!(matches!(sandbox.end(), Err(DriverError::Channel(_))));
}

#[test]
fn shutdown_ends_it_without_an_error() {
    let (sandbox, _client) = frozen();
    sandbox.shutdown().unwrap();
}
