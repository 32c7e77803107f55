use super::*;

use crate::life::{Call, Life};
use proptest::prelude::*;
use thaw_agent_protocol::{Configure, Generation, HostMessage, Reply, RuntimeExit, Thaw};

fn register(name: &str, events: &[&str]) -> Call {
    Call::Extension(ExtensionCall::Register {
        name: name.into(),
        identifier: format!("id-{name}"),
        events: events.iter().map(|event| (*event).into()).collect(),
    })
}

fn next(name: &str) -> Call {
    Call::Extension(ExtensionCall::Next {
        identifier: format!("id-{name}"),
    })
}

fn init_error(name: &str) -> Call {
    Call::Extension(ExtensionCall::InitError {
        identifier: format!("id-{name}"),
        error_type: "Mine".into(),
    })
}

fn exit_error(name: &str) -> Call {
    Call::Extension(ExtensionCall::ExitError {
        identifier: format!("id-{name}"),
        error_type: "Mine".into(),
    })
}

fn answer(id: &str) -> Call {
    Call::Response(Reply {
        request_id: id.into(),
        ..Reply::default()
    })
}

/// A life whose programs `names` were started.
fn launched(names: &[&str]) -> (Life, Vec<Effect>) {
    let mut life = Life::new();
    let configure = HostMessage::Configure(Configure::default());
    life.host(Generation(0), configure).unwrap();
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    let effects = life.extensions_launched(names);
    (life, effects)
}

fn thaw(life: &mut Life) {
    let thaw = Thaw {
        unix_time_ns: 0,
        hostname: "h".into(),
        entropy: vec![0; 64],
    };
    life.host(Generation(1), HostMessage::Thaw(thaw)).unwrap();
}

fn invoke(life: &mut Life) -> Vec<Effect> {
    let invoke = Invoke {
        request_id: "r".into(),
        deadline_unix_ms: 7,
        ..Invoke::default()
    };
    life.host(Generation(1), HostMessage::Invoke(invoke))
        .unwrap()
}

/// A clone in which an extension `e` waits for both events, and the runtime for an invocation.
fn ready() -> Life {
    let (mut life, _) = launched(&["e"]);
    life.call(register("e", &["INVOKE", "SHUTDOWN"]));
    life.call(next("e"));
    assert!(
        life.call(Call::Next)
            .contains(&Effect::Send(AgentMessage::Ready))
    );
    thaw(&mut life);
    life
}

fn refusal(effects: &[Effect]) -> &'static str {
    match effects {
        [
            Effect::Answer(Answer::Extension(ExtensionAnswer::Refused(Refusal {
                error_type, ..
            }))),
        ] => error_type,
        other => panic!("not refused: {other:?}"),
    }
}

fn sent(effects: &[Effect]) -> Vec<&AgentMessage> {
    let sent = effects.iter().filter_map(|effect| match effect {
        Effect::Send(AgentMessage::Log { .. }) => None,
        Effect::Send(message) => Some(message),
        _ => None,
    });
    sent.collect()
}

#[test]
fn without_extensions_the_runtime_starts_at_once_and_nothing_is_added() {
    let (mut life, effects) = launched(&[]);
    assert_eq!(effects, [Effect::StartRuntime]);
    assert!(!life.has_extensions());
    // A way to get SIGTERM, as Rust's runtime does it: it wants no events, and nobody waits for it.
    life.call(register("helper", &[]));
    assert!(!life.has_extensions());
    assert_eq!(
        life.call(Call::Next),
        [Effect::Park, Effect::Send(AgentMessage::Ready)]
    );
    assert_eq!(life.call(next("helper")), [Effect::ParkExtension(0)]);
    thaw(&mut life);
    assert_eq!(invoke(&mut life).len(), 1);
    assert_eq!(life.call(answer("r")).len(), 2);
}

#[test]
fn the_runtime_starts_when_all_have_registered_and_ready_is_said_when_all_wait() {
    let (mut life, effects) = launched(&["a", "b"]);
    assert_eq!(effects, []);
    assert_eq!(life.call(register("b", &["INVOKE"])).len(), 1);
    let effects = life.call(register("a", &[]));
    assert_eq!(effects.last(), Some(&Effect::StartRuntime));
    assert_eq!(life.call(Call::Next), [Effect::Park]);
    assert!(life.is_initialising() && !life.is_frozen());
    assert_eq!(life.call(next("a")), [Effect::ParkExtension(0)]);
    let effects = life.call(next("b"));
    assert_eq!(sent(&effects), [&AgentMessage::Ready]);
    assert!(life.is_frozen());
    let Effect::Send(AgentMessage::Log { bytes, .. }) = &effects[1] else {
        panic!("{effects:?}");
    };
    assert_eq!(
        String::from_utf8_lossy(bytes),
        "EXTENSION\tName: a\tState: Ready\tEvents: []\nEXTENSION\tName: b\tState: Ready\tEvents: [INVOKE]\n"
    );
}

#[test]
fn registrations_are_refused_as_lambda_refuses_them() {
    let (mut life, _) = launched(&["e"]);
    let refused = |life: &mut Life, call| refusal(&life.call(call)).to_owned();
    let state = "Extension.InvalidExtensionState";
    let event = "Extension.InvalidEventType";
    assert_eq!(refused(&mut life, register("e", &["START"])), event);
    assert_eq!(
        refused(&mut life, register("not-the-file", &["SHUTDOWN"])),
        event
    );
    assert_eq!(
        refused(&mut life, next("e")),
        "Extension.UnknownExtensionIdentifier"
    );
    life.call(register("e", &["SHUTDOWN"]));
    assert_eq!(refused(&mut life, register("e", &[])), state);
    life.call(register("inside", &["INVOKE"]));
    assert_eq!(refused(&mut life, register("inside", &[])), state);
    for number in 2..EXTENSIONS_MAX {
        life.call(register(&format!("{number}"), &[]));
    }
    assert_eq!(
        refused(&mut life, register("more", &[])),
        "Extension.TooManyExtensions"
    );
    for name in ["e", "inside"] {
        life.call(next(name));
    }
    assert_eq!(refused(&mut life, init_error("e")), state);
    // It waits already; were its connection lost, the driver would have said so.
    assert_eq!(refused(&mut life, next("e")), state);
    life.call(Call::Next);
    assert_eq!(
        refused(&mut life, register("late", &[])),
        "Extension.RegistrationClosed"
    );
}

#[test]
fn an_error_that_is_reported_again_is_accepted_and_changes_nothing() {
    for (report, other) in [
        (
            init_error as fn(&str) -> Call,
            exit_error as fn(&str) -> Call,
        ),
        (exit_error, init_error),
    ] {
        let (mut life, _) = launched(&["e"]);
        life.call(register("e", &[]));
        assert!(life.call(report("e")).len() > 1);
        assert_eq!(
            life.call(report("e")),
            [Effect::Answer(Answer::Extension(ExtensionAnswer::Accepted))]
        );
        assert_eq!(
            refusal(&life.call(other("e"))),
            "Extension.InvalidExtensionState"
        );
    }
}

#[test]
fn an_invocation_is_told_and_the_end_waits_for_who_was_told() {
    let mut life = ready();
    let effects = invoke(&mut life);
    assert!(matches!(&effects[0], Effect::Wake(Answer::Invocation(_))));
    assert!(
        matches!(&effects[1], Effect::WakeExtension(0, Event::Invoke(head)) if head.request_id == "r")
    );
    let effects = life.call(answer("r"));
    assert!(matches!(sent(&effects)[..], [AgentMessage::Response(_)]));
    assert_eq!(effects.last(), Some(&Effect::Within(Limit::Deadline(7))));
    // It has done its part; now it hears of the end.
    let effects = life.call(next("e"));
    assert_eq!(
        effects,
        [
            Effect::ParkExtension(0),
            Effect::Within(Limit::Shutdown),
            Effect::WakeExtension(0, Event::Shutdown(Reason::Spindown)),
        ]
    );
    let effects = life.extension_ended(0, &RuntimeExitCause::Code(0));
    assert_eq!(
        effects,
        [
            Effect::Within(Limit::None),
            Effect::Send(AgentMessage::Settled)
        ]
    );
}

#[test]
fn the_end_is_bounded_by_the_deadline_and_then_by_two_seconds() {
    let mut life = ready();
    invoke(&mut life);
    life.call(answer("r"));
    // Still at work at the deadline: what comes next is told when it asks.
    assert_eq!(life.end_limit_passed(), [Effect::Within(Limit::Shutdown)]);
    let effects = life.call(next("e"));
    assert_eq!(
        effects,
        [Effect::Answer(Answer::Extension(ExtensionAnswer::Event(
            Event::Shutdown(Reason::Timeout)
        )))]
    );
    let effects = life.end_limit_passed();
    assert_eq!(sent(&effects), [&AgentMessage::Settled]);
    assert_eq!(life.end_limit_passed(), []);
}

#[test]
fn who_asks_again_after_the_shutdown_has_nothing_more_to_do() {
    let mut life = ready();
    invoke(&mut life);
    life.call(next("e"));
    life.call(answer("r"));
    let effects = life.call(next("e"));
    assert_eq!(effects[0], Effect::ParkExtension(0));
    assert_eq!(sent(&effects), [&AgentMessage::Settled]);
}

#[test]
fn an_extension_that_ends_before_it_registers_fails_the_initialisation() {
    let (mut life, _) = launched(&["e"]);
    let effects = life.extension_ended(0, &RuntimeExitCause::Code(3));
    let [AgentMessage::InitError(error)] = sent(&effects)[..] else {
        panic!("{effects:?}");
    };
    assert_eq!(error.error_type, "Extension.Crash");
    let document: serde_json::Value = serde_json::from_slice(&error.payload).unwrap();
    assert_eq!(document["errorMessage"], "Error: exit status 3");
    let Effect::Send(AgentMessage::Log { bytes, .. }) = &effects[1] else {
        panic!("{effects:?}");
    };
    assert_eq!(
        String::from_utf8_lossy(bytes),
        "EXTENSION\tName: e\tState: Exited\tEvents: []\tError Type: Extension.Crash\n"
    );
}

#[test]
fn an_init_error_and_an_exit_error_are_the_failures_that_they_say() {
    let (mut life, _) = launched(&["e"]);
    life.call(register("e", &[]));
    let effects = life.call(init_error("e"));
    assert_eq!(
        effects[0],
        Effect::Answer(Answer::Extension(ExtensionAnswer::Accepted))
    );
    assert!(
        matches!(sent(&effects)[..], [AgentMessage::InitError(error)] if error.error_type == "Extension.InitError")
    );
    assert_eq!(life.extension_ended(0, &RuntimeExitCause::Code(1)), []);

    let mut life = ready();
    invoke(&mut life);
    let effects = life.call(exit_error("e"));
    let [AgentMessage::InvocationError(error), AgentMessage::Settled] = sent(&effects)[..] else {
        panic!("{effects:?}");
    };
    assert_eq!(error.error_type.as_deref(), Some("Extension.ExitError"));
    let document: serde_json::Value = serde_json::from_slice(&error.payload).unwrap();
    assert_eq!(document["errorMessage"], "RequestId: r Error: Mine");
}

#[test]
fn an_extension_that_ends_while_frozen_is_told_to_the_next_invocation_alone() {
    let (mut life, _) = launched(&["e"]);
    life.call(register("e", &["INVOKE"]));
    life.call(next("e"));
    life.call(Call::Next);
    assert!(life.is_frozen());
    assert_eq!(life.extension_ended(0, &RuntimeExitCause::Signal(9)), []);
    thaw(&mut life);
    let effects = invoke(&mut life);
    assert!(
        matches!(sent(&effects)[..], [AgentMessage::InvocationError(error), AgentMessage::Settled] if error.request_id == "r")
    );
}

#[test]
fn a_failure_after_the_answer_is_logged_and_ends_the_wait() {
    let mut life = ready();
    invoke(&mut life);
    life.call(answer("r"));
    let effects = life.extension_ended(0, &RuntimeExitCause::Code(1));
    assert!(matches!(
        &effects[0],
        Effect::Send(AgentMessage::Log { .. })
    ));
    assert_eq!(sent(&effects), [&AgentMessage::Settled]);
}

#[test]
fn a_runtime_that_ends_shuts_the_extensions_down_as_a_failure() {
    let mut life = ready();
    invoke(&mut life);
    let effects = life.runtime_ended(RuntimeExitCause::Code(1), false);
    assert!(matches!(
        sent(&effects)[..],
        [AgentMessage::RuntimeExit(RuntimeExit { .. })]
    ));
    // It was told of the invocation, and hears of the end when it asks again.
    let effects = life.call(next("e"));
    assert_eq!(
        effects,
        [Effect::Answer(Answer::Extension(ExtensionAnswer::Event(
            Event::Shutdown(Reason::Failure)
        )))]
    );
}

#[test]
fn a_hosts_shutdown_amid_an_invocation_is_a_timeout_and_waits_for_the_extensions() {
    let mut life = ready();
    invoke(&mut life);
    life.call(next("e"));
    let effects = life.host(Generation(1), HostMessage::Shutdown).unwrap();
    assert_eq!(
        effects,
        [
            Effect::Kill,
            Effect::Within(Limit::Shutdown),
            Effect::WakeExtension(0, Event::Shutdown(Reason::Timeout)),
        ]
    );
    let effects = life.extension_ended(0, &RuntimeExitCause::Code(0));
    assert_eq!(effects.last(), Some(&Effect::PowerOff));
    assert_eq!(life.end_limit_passed(), []);
}

#[test]
fn an_extension_that_lost_its_call_is_told_when_it_asks_again() {
    let mut life = ready();
    life.extension_call_lost(0);
    assert_eq!(invoke(&mut life).len(), 1);
    let effects = life.call(next("e"));
    assert!(matches!(
        effects[..],
        [Effect::Answer(Answer::Extension(ExtensionAnswer::Event(
            Event::Invoke(_)
        )))]
    ));
}

fn step(life: &mut Life, kind: u8) -> Vec<Effect> {
    match kind {
        0 | 1 => life.call(next("a")),
        2 | 3 => life.call(next("b")),
        4 => life.call(Call::Next),
        5 => life.call(answer("r")),
        6 => life.call(exit_error("a")),
        7 => life.extension_ended(0, &RuntimeExitCause::Code(0)),
        8 => life.extension_ended(1, &RuntimeExitCause::Code(1)),
        9 => life.runtime_ended(RuntimeExitCause::Code(1), false),
        10 => {
            life.extension_call_lost(1);
            Vec::new()
        }
        _ => life.end_limit_passed(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_answered_invocation_settles_once_and_within_two_limits(kinds in prop::collection::vec(0u8..12, 0..30)) {
        let (mut life, _) = launched(&["a", "b"]);
        life.call(register("a", &["INVOKE", "SHUTDOWN"]));
        life.call(register("b", &["SHUTDOWN"]));
        life.call(next("a"));
        life.call(next("b"));
        life.call(Call::Next);
        thaw(&mut life);
        invoke(&mut life);
        let (mut answered, mut settled) = (0, 0);
        // At last the function answers, if it has not, and both limits pass.
        for kind in kinds.into_iter().chain([5, 11, 11]) {
            for effect in step(&mut life, kind) {
                match effect {
                    Effect::Send(AgentMessage::Settled) => {
                        prop_assert!(answered > 0, "settled before it was answered");
                        settled += 1;
                    }
                    Effect::Send(
                        AgentMessage::Response(_)
                        | AgentMessage::InvocationError(_)
                        | AgentMessage::RuntimeExit(_),
                    ) => answered += 1,
                    _ => {}
                }
            }
        }
        prop_assert!(answered >= 1);
        prop_assert_eq!(settled, 1);
    }
}
