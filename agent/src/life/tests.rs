use proptest::prelude::*;
use thaw_agent_protocol::Reply;

use super::*;

fn configured() -> Life {
    let mut life = Life::new();
    let effects = life
        .host(Generation(0), HostMessage::Configure(configure()))
        .unwrap();
    assert_eq!(effects, [Effect::Start(configure())]);
    life
}

fn configure() -> Configure {
    Configure {
        init_limit_ms: 10_000,
        ..Configure::default()
    }
}

fn thaw() -> HostMessage {
    HostMessage::Thaw(Thaw {
        unix_time_ns: 0,
        hostname: "h".into(),
        entropy: vec![0; 64],
    })
}

fn invoke(id: &str) -> HostMessage {
    HostMessage::Invoke(Invoke {
        request_id: id.into(),
        payload: b"{}".to_vec(),
        ..Invoke::default()
    })
}

fn reply(id: &str) -> Call {
    Call::Response(Reply {
        request_id: id.into(),
        ..Reply::default()
    })
}

fn thawed() -> Life {
    let mut life = configured();
    assert_eq!(
        life.call(Call::Next),
        [Effect::Park, Effect::Send(AgentMessage::Ready)]
    );
    life.host(Generation(1), thaw()).unwrap();
    life
}

#[test]
fn the_parked_call_gets_the_invocation() {
    let mut life = thawed();
    let effects = life.host(Generation(1), invoke("a")).unwrap();
    assert!(
        matches!(&effects[..], [Effect::Wake(Answer::Invocation(i))] if i.head.request_id == "a" && i.payload == "{}")
    );
    assert_eq!(life.request_id(), Some("a"));
}

#[test]
fn an_invocation_before_the_runtime_asks_again_waits_and_no_ready_is_sent() {
    let mut life = thawed();
    life.host(Generation(1), invoke("a")).unwrap();
    assert_eq!(life.call(reply("a")).len(), 2);
    assert_eq!(life.host(Generation(1), invoke("b")).unwrap(), []);
    let effects = life.call(Call::Next);
    assert!(
        matches!(&effects[..], [Effect::Answer(Answer::Invocation(i))] if i.head.request_id == "b")
    );
}

#[test]
fn an_invocation_during_another_is_refused() {
    let mut life = thawed();
    life.host(Generation(1), invoke("a")).unwrap();
    assert_eq!(
        life.host(Generation(1), invoke("b")),
        Err(LifeError::OutOfOrder {
            message: "invocation",
            phase: "Running"
        })
    );
}

#[test]
fn a_thaw_during_init_is_refused() {
    let mut life = configured();
    assert!(life.host(Generation(1), thaw()).is_err());
}

#[test]
fn a_thaw_before_the_configuration_makes_no_clone_that_runs_invocations() {
    let mut life = Life::new();
    life.host(Generation(3), thaw()).unwrap();
    life.host(Generation(3), HostMessage::Configure(configure()))
        .unwrap();
    assert!(life.host(Generation(4), thaw()).is_err());
    life.call(Call::Next);
    assert!(life.is_frozen());
    assert_eq!(
        life.host(Generation(3), invoke("a")),
        Err(LifeError::StaleInvocation { got: 3, current: 3 })
    );
    assert!(life.host(Generation(3), thaw()).is_err());
    life.host(Generation(4), thaw()).unwrap();
    assert!(!life.is_frozen());
    assert_eq!(life.host(Generation(4), invoke("a")).unwrap().len(), 1);
}

#[test]
fn an_invocation_after_the_end_is_left_to_the_exit_report() {
    let mut life = thawed();
    let effects = life.runtime_ended(RuntimeExitCause::Code(1), false);
    assert_eq!(effects.len(), 2);
    assert_eq!(life.host(Generation(1), invoke("a")).unwrap(), []);
    assert_eq!(life.runtime_ended(RuntimeExitCause::Code(1), false), []);
}

#[test]
fn a_runtime_that_has_told_why_its_hooks_failed_may_end_before_the_invocation_comes() {
    let mut life = configured();
    life.call(Call::RestoreNext);
    life.host(Generation(1), thaw()).unwrap();
    let told = life.call(Call::RestoreError(InitError::default()));
    assert_eq!(told, [Effect::Answer(Answer::Accepted)]);
    let ended = life.runtime_ended(RuntimeExitCause::Code(1), false);
    assert_eq!(ended, [Effect::Kill]);
    let effects = life.host(Generation(1), invoke("a")).unwrap();
    assert!(
        matches!(&effects[..], [Effect::Send(AgentMessage::RestoreError(error)), ..] if error.request_id == "a"),
        "{effects:?}"
    );
    assert_eq!(life.runtime_ended(RuntimeExitCause::Code(1), false), []);
}

#[test]
fn the_exit_after_an_init_error_is_not_reported_again() {
    let mut life = configured();
    life.call(Call::InitError(InitError::default()));
    assert_eq!(life.runtime_ended(RuntimeExitCause::Code(1), false), []);
}

#[test]
fn a_late_init_limit_is_ignored() {
    let mut life = thawed();
    assert_eq!(life.init_timed_out(), []);
}

#[test]
fn only_the_last_answered_id_is_a_second_answer() {
    let mut life = thawed();
    for id in ["a", "b"] {
        life.call(Call::Next);
        life.host(Generation(1), invoke(id)).unwrap();
        life.call(reply(id));
    }
    assert!(matches!(
        life.call(reply("b"))[..],
        [Effect::Answer(Answer::NotAllowed { .. })]
    ));
    assert_eq!(
        life.call(reply("a")),
        [Effect::Answer(Answer::InvalidRequestId)]
    );
}

#[test]
fn a_streamed_response_is_one_answer_and_nothing_else_fits_between() {
    let mut life = thawed();
    life.host(Generation(1), invoke("a")).unwrap();
    let begin = |id: &str| {
        Call::ResponseBegin(StreamBegin {
            request_id: id.into(),
            content_type: None,
        })
    };
    let chunk = |id: &str| Call::ResponseChunk {
        request_id: id.into(),
        bytes: Bytes::from_static(b"x"),
    };
    let end = |id: &str| {
        Call::ResponseEnd(StreamEnd {
            request_id: id.into(),
            failure: None,
        })
    };
    let is_refused = |effects: Vec<Effect>| {
        matches!(
            effects[..],
            [Effect::Answer(
                Answer::NotAllowed { .. } | Answer::InvalidRequestId
            )]
        )
    };
    assert!(is_refused(life.call(chunk("a"))));
    assert!(is_refused(life.call(begin("b"))));
    assert_eq!(life.call(begin("a")).len(), 2);
    assert!(is_refused(life.call(begin("a"))));
    assert!(is_refused(life.call(reply("a"))));
    assert!(is_refused(life.call(Call::Next)));
    assert!(is_refused(life.call(chunk("b"))));
    assert_eq!(
        life.call(chunk("a")),
        [
            Effect::Send(AgentMessage::ResponseChunk(b"x".to_vec())),
            Effect::Answer(Answer::Accepted)
        ]
    );
    assert_eq!(life.request_id(), Some("a"));
    assert_eq!(life.call(end("a")).len(), 2);
    assert_eq!(life.request_id(), None);
    assert!(is_refused(life.call(end("a"))));
    assert_eq!(life.call(Call::Next).len(), 2);
}

#[test]
fn an_error_posted_while_a_response_streams_ends_it() {
    let mut life = thawed();
    life.host(Generation(1), invoke("a")).unwrap();
    life.call(Call::ResponseBegin(StreamBegin {
        request_id: "a".into(),
        content_type: None,
    }));
    let effects = life.call(Call::Error(InvocationError {
        request_id: "a".into(),
        error_type: Some("E".into()),
        payload: b"{}".to_vec(),
    }));
    let [Effect::Send(AgentMessage::ResponseEnd(end)), _] = &effects[..] else {
        panic!("{effects:?}");
    };
    assert_eq!(end.failure.as_ref().unwrap().error_type, "E");
}

#[derive(Clone, Debug)]
enum Input {
    Host(u64, HostMessage),
    Call(Call),
    Lost,
    Ended,
    InitLimit,
    StartFailed,
}

fn input() -> impl Strategy<Value = Input> {
    let id = || prop::sample::select(vec!["a", "b", "c"]).prop_map(str::to_owned);
    let error = InitError::default();
    prop_oneof![
        1 => Just(Input::Host(0, HostMessage::Configure(configure()))),
        3 => (0u64..4).prop_map(|g| Input::Host(g, thaw())),
        6 => (0u64..4, id()).prop_map(|(g, id)| Input::Host(g, invoke(&id))),
        8 => Just(Input::Call(Call::Next)),
        2 => Just(Input::Call(Call::RestoreNext)),
        6 => id().prop_map(|id| Input::Call(reply(&id))),
        4 => id().prop_map(|request_id| Input::Call(Call::ResponseBegin(StreamBegin { request_id, content_type: None }))),
        4 => id().prop_map(|request_id| Input::Call(Call::ResponseChunk { request_id, bytes: Bytes::from_static(b"x") })),
        4 => id().prop_map(|request_id| Input::Call(Call::ResponseEnd(StreamEnd { request_id, failure: None }))),
        2 => id().prop_map(|request_id| Input::Call(Call::Unfit(request_id, Unfit::TooLarge))),
        1 => id().prop_map(|request_id| Input::Call(Call::Unfit(request_id, Unfit::ResponseMode))),
        2 => id().prop_map(|request_id| Input::Call(Call::Error(InvocationError { request_id, ..Default::default() }))),
        1 => Just(Input::Call(Call::InitError(error.clone()))),
        1 => Just(Input::Call(Call::RestoreError(error))),
        2 => Just(Input::Lost),
        1 => Just(Input::Ended),
        1 => Just(Input::InitLimit),
        1 => Just(Input::StartFailed),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_order_of_events_keeps_the_promises(first in 0u64..2, inputs in prop::collection::vec(input(), 0..40)) {
        let mut life = Life::new();
        if first > 0 {
            life.host(Generation(first), thaw()).unwrap();
        }
        life.host(Generation(first), HostMessage::Configure(configure())).unwrap();
        let mut generation = first;
        let mut open: Option<String> = None;
        let mut streaming = false;
        let mut hooks = 0;
        for input in inputs {
            let was_frozen = life.is_frozen();
            let ended = matches!(input, Input::Ended);
            let is_call = matches!(input, Input::Call(_));
            let parked = life.parked.is_some();
            let effects = match input.clone() {
                Input::Host(g, message) => {
                    let invoked = match &message {
                        HostMessage::Invoke(invoke) => Some(invoke.request_id.clone()),
                        _ => None,
                    };
                    // The driver ends the sandbox on an error; here later events show that nothing was changed by it.
                    let Ok(effects) = life.host(Generation(g), message) else { continue };
                    if let Some(id) = invoked {
                        prop_assert!(g > first && g == generation, "ran in the wrong life");
                        prop_assert_eq!(&open, &None);
                        if !matches!(life.phase, Phase::Ended) {
                            open = Some(id);
                        } else if !effects.is_empty() {
                            open = Some(id); // a failed restore answers at once
                        }
                    }
                    effects
                }
                Input::Call(call) => {
                    let mut effects = match call {
                        Call::Next => life.hooks_done(Duration::from_millis(1)),
                        _ => Vec::new(),
                    };
                    effects.extend(life.call(call));
                    effects
                }
                Input::Lost => { life.parked_call_lost(); Vec::new() }
                Input::Ended => life.runtime_ended(RuntimeExitCause::Code(1), false),
                Input::InitLimit => life.init_timed_out(),
                Input::StartFailed if life.is_initialising() => life.start_failed("x"),
                Input::StartFailed => Vec::new(),
            };
            let mut answers = 0;
            for effect in &effects {
                match effect {
                    Effect::Adopt(g, _) => {
                        prop_assert!(g.0 > generation);
                        generation = g.0;
                    }
                    Effect::Park => answers += 1,
                    Effect::Answer(answer) | Effect::Wake(answer) => {
                        if matches!(effect, Effect::Wake(_)) {
                            prop_assert!(parked, "woke nobody");
                        } else {
                            answers += 1;
                        }
                        if let Answer::Invocation(invocation) = answer {
                            prop_assert!(generation > first);
                            prop_assert_eq!(Some(&invocation.head.request_id), open.as_ref());
                        }
                        prop_assert!(*answer != Answer::Restored || generation > first);
                    }
                    Effect::Send(message) => {
                        prop_assert!(!was_frozen || ended, "wrote while frozen: {message:?}");
                        match message {
                            AgentMessage::ResponseBegin(begin) => {
                                prop_assert!(!streaming);
                                prop_assert_eq!(Some(&begin.request_id), open.as_ref());
                                streaming = true;
                            }
                            AgentMessage::ResponseChunk(_) | AgentMessage::ResponseEnd(_) => prop_assert!(streaming),
                            AgentMessage::Response(_) | AgentMessage::InvocationError(_) => prop_assert!(!streaming),
                            _ => {}
                        }
                        let answered = match message {
                            AgentMessage::ResponseEnd(end) => Some(end.request_id.clone()),
                            AgentMessage::Response(reply) => Some(reply.request_id.clone()),
                            AgentMessage::InvocationError(error)
                            | AgentMessage::RestoreError(error) => Some(error.request_id.clone()),
                            AgentMessage::RuntimeExit(exit) => exit.request_id.clone(),
                            _ => None,
                        };
                        if answered.is_some() {
                            prop_assert_eq!(&answered, &open, "answered what was not asked");
                            open = None;
                            streaming = false;
                        }
                    }
                    Effect::Queue(message) => {
                        prop_assert!(generation > first);
                        hooks += 1;
                        let expected = match hooks {
                            1 => AgentMessage::Restoring,
                            _ => AgentMessage::Restored,
                        };
                        prop_assert!(hooks <= 2 && *message == expected, "{message:?}");
                    }
                    Effect::Start(_) | Effect::Kill | Effect::PowerOff => {}
                    Effect::StartRuntime | Effect::ParkExtension(_) | Effect::WakeExtension(..) | Effect::Subscribe(..) | Effect::Within(_) => {
                        prop_assert!(false, "without extensions: {effect:?}");
                    }
                }
            }
            prop_assert_eq!(answers, usize::from(is_call), "a call is answered or parked exactly once: {:?}", input);
        }
    }
}

#[test]
fn hooks_are_told_to_the_host_and_their_time_is_not_the_functions() {
    let mut life = configured();
    life.call(Call::RestoreNext);
    let effects = life.host(Generation(1), thaw()).unwrap();
    let (restoring, restored) = (AgentMessage::Restoring, AgentMessage::Restored);
    assert_eq!(
        effects.get(1..).unwrap(),
        [Effect::Queue(restoring), Effect::Wake(Answer::Restored)]
    );
    life.host(Generation(1), invoke("a")).unwrap();
    let took = Duration::from_millis(1500);
    assert_eq!(life.hooks_done(took), [Effect::Queue(restored)]);
    assert!(matches!(
        &life.call(Call::Next)[..],
        [Effect::Answer(Answer::Invocation(i))] if i.head.deadline_unix_ms == 1500
    ));
    assert_eq!(life.hooks_done(took), [], "once");
    let mut without = thawed();
    assert_eq!(without.hooks_done(took), []);
}
