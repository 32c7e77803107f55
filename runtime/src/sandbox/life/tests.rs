use super::*;
use proptest::prelude::*;
use thaw_agent_protocol::{
    InitError, InvocationError, LogStream, Reply as Answer, RuntimeExit, RuntimeExitCause,
    StreamBegin, StreamFailure,
};
use thaw_vmm_control::Status;

fn agent(message: AgentMessage) -> Input {
    Input::Vm(VmEvent::Agent(message))
}

fn answer(request_id: &str, length: usize) -> AgentMessage {
    AgentMessage::Response(Answer {
        request_id: request_id.into(),
        content_type: None,
        payload: vec![b'x'; length],
    })
}

fn exit(reason: ExitReason) -> Input {
    Input::Vm(VmEvent::Exited(Exit {
        reason,
        detail: "why".into(),
        console: "panic".into(),
    }))
}

fn thawed() -> Life {
    let mut life = Life::new("r".into(), Begin::Resume);
    life.step(Input::Vm(VmEvent::Reply(Reply::Done)));
    life.step(agent(AgentMessage::Thawed {
        unique_after_ns: None,
        extensions: false,
    }));
    life
}

fn end(step: Step) -> End {
    match step {
        Step::Ended(Ok(end)) => end,
        other => panic!("not ended by the guest: {other:?}"),
    }
}

fn is_guest_fault(step: Step) -> bool {
    matches!(
        end(step),
        End::GuestDied {
            reason: ExitReason::GuestFault,
            ..
        }
    )
}

#[test]
fn an_answer_after_the_thaw_is_the_end() {
    let mut life = thawed();
    life.step(agent(AgentMessage::Log {
        stream: LogStream::Stdout,
        bytes: b"a".to_vec(),
    }));
    life.step(agent(AgentMessage::Log {
        stream: LogStream::Stderr,
        bytes: b"b".to_vec(),
    }));
    let payload = Bytes::from_static(b"xx");
    assert_eq!(
        end(life.step(agent(answer("r", 2)))),
        End::Response {
            payload,
            content_type: None
        }
    );
    assert_eq!(life.take_log(), b"ab");
    assert!(matches!(life.step(Input::Deadline), Step::Continue));
}

#[test]
fn an_answer_may_overtake_the_reply_to_resume() {
    let mut life = Life::new("r".into(), Begin::Resume);
    life.step(agent(AgentMessage::Thawed {
        unique_after_ns: None,
        extensions: false,
    }));
    life.step(Input::Vm(VmEvent::Reply(Reply::Done)));
    assert!(matches!(
        end(life.step(agent(answer("r", 1)))),
        End::Response { .. }
    ));
}

#[test]
fn an_answer_before_the_thaw_is_a_guest_fault() {
    let mut life = Life::new("r".into(), Begin::Resume);
    life.step(Input::Vm(VmEvent::Reply(Reply::Done)));
    assert!(is_guest_fault(life.step(agent(answer("r", 1)))));
}

#[test]
fn an_answer_to_another_request_is_a_guest_fault() {
    assert!(is_guest_fault(thawed().step(agent(answer("other", 1)))));
}

#[test]
fn a_streamed_answer_comes_in_parts_and_ends_once() {
    let begin = |id: &str| {
        agent(AgentMessage::ResponseBegin(StreamBegin {
            request_id: id.into(),
            content_type: Some("t".into()),
        }))
    };
    let chunk = |length| agent(AgentMessage::ResponseChunk(vec![b'x'; length]));
    let over = |id: &str, failure| {
        agent(AgentMessage::ResponseEnd(StreamEnd {
            request_id: id.into(),
            failure,
        }))
    };
    let streaming = || {
        let mut life = thawed();
        assert!(matches!(
            life.step(begin("r")),
            Step::Part(StreamPart::Head { .. })
        ));
        assert!(
            matches!(life.step(chunk(2)), Step::Part(StreamPart::Chunk(bytes)) if bytes == "xx")
        );
        life
    };
    let content_type = Some("t".into());
    let payload = Bytes::new();
    assert_eq!(
        end(streaming().step(over("r", None))),
        End::Response {
            payload,
            content_type
        }
    );
    let failure = StreamFailure {
        error_type: "E".into(),
        document: b"{}".to_vec(),
    };
    assert!(matches!(
        end(streaming().step(over("r", Some(failure)))),
        End::FunctionError { error_type: Some(kind), .. } if kind == "E"
    ));
    assert!(is_guest_fault(streaming().step(begin("r"))));
    assert!(is_guest_fault(streaming().step(agent(answer("r", 1)))));
    assert!(is_guest_fault(streaming().step(over("q", None))));
    assert!(is_guest_fault(thawed().step(begin("q"))));
    assert!(is_guest_fault(thawed().step(chunk(1))));
    assert!(is_guest_fault(thawed().step(over("r", None))));
    let mut unthawed = Life::new("r".into(), Begin::Resume);
    assert!(is_guest_fault(unthawed.step(begin("r"))));
    let mut life = streaming();
    // Two bytes have come already.
    for _ in 1..STREAM_BYTES_MAX / STREAM_CHUNK_BYTES_MAX {
        let step = life.step(chunk(STREAM_CHUNK_BYTES_MAX));
        assert!(matches!(step, Step::Part(_)));
    }
    let step = life.step(chunk(STREAM_CHUNK_BYTES_MAX - 2));
    assert!(matches!(step, Step::Part(_)));
    assert!(is_guest_fault(life.step(chunk(1))));
    for length in [0, STREAM_CHUNK_BYTES_MAX + 1] {
        assert!(is_guest_fault(streaming().step(chunk(length))), "{length}");
    }
}

#[test]
fn a_failed_restore_hook_is_an_end_of_its_own_and_only_after_the_thaw() {
    let failed = |request_id: &str| {
        agent(AgentMessage::RestoreError(InvocationError {
            request_id: request_id.into(),
            error_type: None,
            payload: b"{}".to_vec(),
        }))
    };
    assert_eq!(
        end(thawed().step(failed("r"))),
        End::RestoreError {
            error_type: AFTER_RESTORE.into(),
            document: Bytes::from_static(b"{}"),
        }
    );
    assert!(is_guest_fault(thawed().step(failed("other"))));
    let mut life = Life::new("r".into(), Begin::Resume);
    assert!(is_guest_fault(life.step(failed("r"))));
}

#[test]
fn hooks_have_a_time_of_their_own_once() {
    let restoring = || {
        let mut life = thawed();
        let step = life.step(agent(AgentMessage::Restoring));
        assert!(matches!(step, Step::Restoring));
        life
    };
    assert_eq!(end(restoring().step(Input::Deadline)), End::RestoreTimedOut);
    let mut life = restoring();
    let step = life.step(agent(AgentMessage::Restored));
    assert!(matches!(step, Step::Restored));
    assert_eq!(end(life.step(Input::Deadline)), End::TimedOut);
    assert!(is_guest_fault(
        restoring().step(agent(AgentMessage::Restoring))
    ));
    assert!(is_guest_fault(thawed().step(agent(AgentMessage::Restored))));
    for again in [AgentMessage::Restoring, AgentMessage::Restored] {
        let mut life = restoring();
        life.step(agent(AgentMessage::Restored));
        assert!(is_guest_fault(life.step(agent(again))));
    }
    let mut life = Life::new("r".into(), Begin::Resume);
    assert!(is_guest_fault(life.step(agent(AgentMessage::Restoring))));
}

#[test]
fn an_answer_over_the_limit_is_a_guest_fault() {
    assert!(is_guest_fault(
        thawed().step(agent(answer("r", RESPONSE_BYTES_MAX + 1)))
    ));
    assert!(matches!(
        end(thawed().step(agent(answer("r", RESPONSE_BYTES_MAX)))),
        End::Response { .. }
    ));
}

#[test]
fn a_closed_channel_waits_for_the_guests_end_but_not_for_ever() {
    let mut life = thawed();
    assert!(matches!(
        life.step(Input::Vm(VmEvent::AgentClosed)),
        Step::Orphaned
    ));
    assert!(matches!(
        end(life.step(exit(ExitReason::Panic))),
        End::GuestDied {
            reason: ExitReason::Panic,
            ..
        }
    ));
    let mut life = thawed();
    life.step(Input::Vm(VmEvent::AgentClosed));
    assert!(is_guest_fault(life.step(Input::GraceOver)));
}

#[test]
fn a_host_fault_and_a_dead_monitor_are_not_the_guests() {
    assert!(matches!(
        thawed().step(exit(ExitReason::HostFault)),
        Step::Ended(Err(HostError::Refused { .. }))
    ));
    let gone = Input::Vm(VmEvent::MonitorGone(HostError::Died {
        stderr: String::new(),
    }));
    assert!(matches!(
        thawed().step(gone),
        Step::Ended(Err(HostError::Died { .. }))
    ));
}

fn input() -> impl Strategy<Value = u8> {
    0u8..23
}

fn make(kind: u8) -> Input {
    let text = String::new;
    match kind {
        0 => agent(AgentMessage::Thawed {
            unique_after_ns: None,
            extensions: false,
        }),
        1 => agent(AgentMessage::Ready),
        2 => agent(answer("r", 3)),
        3 => agent(answer("q", 3)),
        4 => agent(AgentMessage::InvocationError(InvocationError {
            request_id: "r".into(),
            ..InvocationError::default()
        })),
        5 => agent(AgentMessage::RuntimeExit(RuntimeExit {
            cause: RuntimeExitCause::Code(1),
            out_of_memory: false,
            request_id: None,
        })),
        6 => agent(AgentMessage::InitError(InitError::default())),
        7 => agent(AgentMessage::Fatal { message: text() }),
        8 => agent(AgentMessage::Hello {
            agent_version: text(),
        }),
        9 => agent(AgentMessage::Log {
            stream: LogStream::Stdout,
            bytes: vec![1; 1000],
        }),
        10 => Input::Vm(VmEvent::AgentClosed),
        11 => Input::Vm(VmEvent::AgentBroken(text())),
        12 => Input::Vm(VmEvent::Reply(Reply::Status(Status::default()))),
        13 => Input::Vm(VmEvent::Reply(Reply::Done)),
        14 => Input::GraceOver,
        15 => agent(AgentMessage::ResponseBegin(StreamBegin {
            request_id: "r".into(),
            content_type: None,
        })),
        16 => agent(AgentMessage::ResponseChunk(b"x".to_vec())),
        17 => agent(AgentMessage::ResponseEnd(StreamEnd {
            request_id: "r".into(),
            failure: None,
        })),
        18 => agent(AgentMessage::ResponseEnd(StreamEnd::default())),
        19 => agent(AgentMessage::Settled),
        20 => agent(AgentMessage::Restoring),
        21 => agent(AgentMessage::Restored),
        _ => Input::Deadline,
    }
}

proptest! {
    #[test]
    fn every_life_ends_once_and_never_answers_unthawed(inputs in prop::collection::vec(input(), 0..30)) {
        let mut life = Life::new("r".into(), Begin::Resume);
        let (mut ends, mut thawed) = (0, false);
        for kind in inputs {
            thawed |= kind == 0;
            match life.step(make(kind)) {
                Step::Ended(Ok(End::Response { .. } | End::FunctionError { .. })) => {
                    prop_assert!(thawed);
                    ends += 1;
                }
                Step::Ended(_) => ends += 1,
                Step::Part(_) | Step::Restoring | Step::Restored => prop_assert!(thawed),
                Step::Continue | Step::Orphaned => {}
            }
        }
        life.step(Input::Deadline);
        prop_assert!(ends <= 1);
        prop_assert_eq!(life.state, State::Ended);
    }
}
