use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

fn limits(ready_count: usize, concurrency_max: usize, queue_max: usize) -> Limits {
    Limits {
        ready_count,
        concurrency_max,
        queue_max,
    }
}

fn starts(effects: &[Effect]) -> usize {
    effects.iter().filter(|e| **e == Effect::Start).count()
}

/// A schedule with `count` VMs restored.
fn filled(limits: Limits, now: Instant) -> Schedule {
    let mut schedule = Schedule::new(limits);
    for id in 0..starts(&schedule.fill()) {
        schedule.step(now, Input::Restored(SandboxId(id as u64)));
    }
    schedule
}

#[test]
fn the_ready_number_is_kept_and_refilled_as_soon_as_a_vm_is_granted() {
    let now = Instant::now();
    let mut schedule = filled(limits(2, 4, 0), now);
    assert_eq!(schedule.ready(), 2);
    let effects = schedule.step(now, Input::Ask(Ticket(1)));
    assert_eq!(
        effects,
        [Effect::Grant(Ticket(1), SandboxId(0)), Effect::Start]
    );
}

#[test]
fn callers_are_served_in_the_order_they_came() {
    let now = Instant::now();
    let mut schedule = filled(limits(1, 1, 2), now);
    schedule.step(now, Input::Ask(Ticket(1)));
    schedule.step(now, Input::Restored(SandboxId(9)));
    schedule.step(now, Input::Ask(Ticket(2)));
    schedule.step(now, Input::Ask(Ticket(3)));
    assert_eq!(
        schedule.step(now, Input::Ask(Ticket(4))),
        [Effect::Refuse(Ticket(4), Refusal::QueueFull)]
    );
    let effects = schedule.step(now, Input::Finished);
    assert!(effects.contains(&Effect::Grant(Ticket(2), SandboxId(9))));
}

#[test]
fn without_ready_vms_each_caller_has_one_restored() {
    let now = Instant::now();
    let mut schedule = filled(limits(0, 2, 0), now);
    assert_eq!(schedule.step(now, Input::Ask(Ticket(1))), [Effect::Start]);
    assert_eq!(
        schedule.step(now, Input::Restored(SandboxId(1))),
        [Effect::Grant(Ticket(1), SandboxId(1))]
    );
    schedule.step(now, Input::Finished);
    assert_eq!(schedule.starting() + schedule.ready(), 0);
}

#[test]
fn a_vm_restored_for_a_caller_that_left_is_destroyed() {
    let now = Instant::now();
    let mut schedule = filled(limits(0, 1, 0), now);
    schedule.step(now, Input::Ask(Ticket(1)));
    schedule.step(now, Input::Leave(Ticket(1)));
    assert_eq!(
        schedule.step(now, Input::Restored(SandboxId(1))),
        [Effect::Destroy(SandboxId(1))]
    );
}

#[test]
fn one_failed_restore_is_tried_again_and_told_to_nobody() {
    let now = Instant::now();
    let mut schedule = filled(limits(0, 1, 0), now);
    schedule.step(now, Input::Ask(Ticket(1)));
    assert_eq!(schedule.step(now, Input::RestoreFailed), [Effect::Start]);
    assert_eq!(schedule.waiting(), 1);
}

#[test]
fn repeated_failures_are_told_and_tried_ever_more_rarely() {
    let mut now = Instant::now();
    let mut schedule = filled(limits(0, 1, 0), now);
    let (mut pause, mut tries) = (Duration::ZERO, 0);
    for number in 0..20 {
        let ticket = Ticket(number);
        assert_eq!(schedule.step(now, Input::Ask(ticket)), [Effect::Start]);
        let mut effects = schedule.step(now, Input::RestoreFailed);
        if number == 0 {
            effects = schedule.step(now, Input::RestoreFailed);
        }
        let [
            Effect::WakeAt(at),
            Effect::Refuse(refused, Refusal::RestoresFail),
        ] = effects[..]
        else {
            panic!("{effects:?}");
        };
        assert_eq!(refused, ticket);
        assert!(at - now >= pause && at - now <= PAUSE_MAX);
        pause = at - now;
        // Until then nobody waits, and nothing is tried.
        let early = schedule.step(at - Duration::from_millis(1), Input::Woke);
        assert_eq!(early, []);
        let asked = schedule.step(now, Input::Ask(Ticket(1000 + number)));
        assert!(matches!(
            asked[..],
            [Effect::Refuse(_, Refusal::RestoresFail)]
        ));
        now = at;
        schedule.step(now, Input::Woke);
        tries += 1;
    }
    assert_eq!((pause, tries), (PAUSE_MAX, 20));
}

#[test]
fn after_a_pause_one_restore_goes_ahead() {
    let now = Instant::now();
    let mut schedule = Schedule::new(limits(4, 4, 0));
    assert_eq!(starts(&schedule.fill()), 4);
    for _ in 0..4 {
        schedule.step(now, Input::RestoreFailed);
    }
    let later = now + PAUSE_MAX;
    assert_eq!(schedule.step(later, Input::Woke), [Effect::Start]);
    let effects = schedule.step(later, Input::Restored(SandboxId(1)));
    assert_eq!(starts(&effects), 3);
}

#[test]
fn a_closed_pool_refuses_and_drains() {
    let now = Instant::now();
    let mut schedule = filled(limits(1, 1, 5), now);
    schedule.step(now, Input::Ask(Ticket(1)));
    schedule.step(now, Input::Ask(Ticket(2)));
    let effects = schedule.step(now, Input::Close);
    assert_eq!(effects, [Effect::Refuse(Ticket(2), Refusal::Closed)]);
    assert_eq!(
        schedule.step(now, Input::Restored(SandboxId(5))),
        [Effect::Destroy(SandboxId(5))]
    );
    schedule.step(now, Input::Finished);
    schedule.step(now, Input::Reaped);
    assert!(!schedule.is_drained());
    schedule.step(now, Input::Reaped);
    assert!(schedule.is_drained());
}

/// The world around a schedule, which carries out its effects at random times.
struct World {
    schedule: Schedule,
    limits: Limits,
    now: Instant,
    number: u64,
    starting: usize,
    shelf: HashSet<SandboxId>,
    waiting: Vec<Ticket>,
    running: HashMap<Ticket, SandboxId>,
    ending: usize,
    wake_at: Vec<Instant>,
    closed: bool,
}

impl World {
    fn new(limits: Limits) -> Self {
        let mut schedule = Schedule::new(limits);
        let effects = schedule.fill();
        let mut world = Self {
            schedule,
            limits,
            now: Instant::now(),
            number: 0,
            starting: 0,
            shelf: HashSet::new(),
            waiting: Vec::new(),
            running: HashMap::new(),
            ending: 0,
            wake_at: Vec::new(),
            closed: false,
        };
        world.obey(effects);
        world
    }

    fn feed(&mut self, input: Input) {
        let effects = self.schedule.step(self.now, input);
        self.obey(effects);
    }

    fn obey(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Start => self.starting += 1,
                Effect::Grant(ticket, id) => {
                    assert!(self.shelf.remove(&id), "granted what is not there");
                    assert_eq!(self.waiting.remove(0), ticket, "granted out of turn");
                    self.running.insert(ticket, id);
                }
                Effect::Refuse(ticket, _) => self.waiting.retain(|t| *t != ticket),
                Effect::Destroy(id) => {
                    assert!(self.shelf.remove(&id), "destroyed what is not there");
                    self.ending += 1;
                }
                Effect::WakeAt(at) => self.wake_at.push(at),
            }
        }
        self.check();
    }

    fn check(&self) {
        let (schedule, limits) = (&self.schedule, &self.limits);
        assert_eq!(schedule.starting(), self.starting);
        assert_eq!(schedule.ready(), self.shelf.len());
        assert_eq!(schedule.running(), self.running.len());
        assert_eq!(schedule.waiting(), self.waiting.len());
        assert!(self.running.len() <= limits.concurrency_max);
        assert!(self.waiting.len() <= limits.concurrency_max + limits.queue_max);
        let alive = self.starting + self.shelf.len() + self.running.len() + self.ending;
        assert!(alive <= limits.alive_max());
        let free = self.running.len() < limits.concurrency_max;
        assert!(
            !(free && !self.shelf.is_empty() && !self.waiting.is_empty()),
            "a VM, a place and a caller, and no grant"
        );
        if self.closed {
            assert!(self.waiting.is_empty() && self.shelf.is_empty());
        }
    }

    fn fresh(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn act(&mut self, action: u8, pick: usize) {
        match action {
            0..=2 => {
                let ticket = Ticket(self.fresh());
                self.waiting.push(ticket);
                self.feed(Input::Ask(ticket));
            }
            3 if !self.waiting.is_empty() => {
                let ticket = self.waiting.remove(pick % self.waiting.len());
                self.feed(Input::Leave(ticket));
            }
            4 | 5 if self.starting > 0 => {
                self.starting -= 1;
                let id = SandboxId(self.fresh());
                self.shelf.insert(id);
                self.feed(Input::Restored(id));
            }
            6 if self.starting > 0 => {
                self.starting -= 1;
                self.feed(Input::RestoreFailed);
            }
            7 | 8 if !self.running.is_empty() => {
                let ticket = *self.running.keys().min_by_key(|t| t.0).unwrap();
                let id = self.running.remove(&ticket).unwrap();
                if action == 7 && pick.is_multiple_of(3) {
                    self.shelf.insert(id);
                    self.feed(Input::GaveBack(id));
                } else {
                    self.ending += 1;
                    self.feed(Input::Finished);
                }
            }
            9 if self.ending > 0 => {
                self.ending -= 1;
                self.feed(Input::Reaped);
            }
            10 => {
                self.now += Duration::from_millis(pick as u64);
                self.wake();
            }
            11 if pick.is_multiple_of(7) => {
                self.closed = true;
                self.feed(Input::Close);
            }
            _ => {}
        }
    }

    fn wake(&mut self) {
        let due = self.wake_at.iter().filter(|at| **at <= self.now).count();
        self.wake_at.retain(|at| *at > self.now);
        for _ in 0..due {
            self.feed(Input::Woke);
        }
    }

    /// Everything goes well from now on.
    fn calm_down(&mut self) {
        for _ in 0..1000 {
            self.now += PAUSE_MAX;
            self.wake();
            for action in [4, 8, 9] {
                self.act(action, 1);
            }
        }
    }
}

proptest! {
    #[test]
    fn limits_hold_and_nobody_is_forgotten(
        ready in 0usize..4, running in 1usize..4, queue in 0usize..4,
        actions in prop::collection::vec((0u8..12, 0usize..1000), 0..200),
    ) {
        let mut world = World::new(limits(ready, running, queue));
        for (action, pick) in actions {
            world.act(action, pick);
        }
        world.calm_down();
        prop_assert!(world.waiting.is_empty(), "somebody waits for ever");
        prop_assert_eq!((world.running.len(), world.ending, world.starting), (0, 0, 0));
        prop_assert_eq!(world.shelf.len(), if world.closed { 0 } else { ready });
        prop_assert_eq!(world.schedule.is_drained(), world.closed);
    }
}
