//! When the agent sets up the network: before anything of the function runs, and only if it is told to.

use thaw_agent_protocol::{AgentMessage, Configure, HostMessage};

use crate::support::{NETWORK_UP, NO_NETWORK, Sandbox};

/// A runtime that ends with 3 if it finds the network set up, and with 4 if not.
const LOOK: &str = "#!/bin/sh\ncd \"${0%/*}\"; [ -d network-up ] && exit 3; exit 4\n";

fn configured(network: bool) -> Sandbox {
    let mut sandbox = Sandbox::boot();
    sandbox.write("bootstrap", LOOK);
    let configure = Configure {
        bootstrap: vec![sandbox.path("bootstrap")],
        init_limit_ms: 60_000,
        hostname: "snapshot".into(),
        network,
        ..Configure::default()
    };
    sandbox.send(0, HostMessage::Configure(configure));
    sandbox
}

fn exit_code(sandbox: &mut Sandbox) -> i32 {
    match sandbox.message() {
        AgentMessage::RuntimeExit(exit) => match exit.cause {
            thaw_agent_protocol::RuntimeExitCause::Code(code) => code,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_network_is_up_before_the_runtime_starts_if_there_is_one() {
    assert_eq!(exit_code(&mut configured(true)), 3);
    let mut without = configured(false);
    assert_eq!(exit_code(&mut without), 4);
    assert!(!std::path::Path::new(&without.path(NETWORK_UP)).exists());
}

#[test]
fn a_network_that_cannot_be_set_up_ends_the_sandbox_and_is_named() {
    let mut sandbox = Sandbox::boot();
    sandbox.write(NO_NETWORK, "");
    sandbox.write("bootstrap", LOOK);
    let configure = Configure {
        bootstrap: vec![sandbox.path("bootstrap")],
        hostname: "snapshot".into(),
        network: true,
        ..Configure::default()
    };
    sandbox.send(0, HostMessage::Configure(configure));
    match sandbox.message() {
        AgentMessage::Fatal { message } => {
            assert!(
                message.starts_with("setting up the network: giving its address to eth0: "),
                "{message}"
            );
        }
        other => panic!("{other:?}"),
    }
}
