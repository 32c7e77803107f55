use proptest::prelude::*;

use super::function::Demand;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const FAR: Time = Duration::from_secs(1000);
const ONE: FunctionId = FunctionId(1);
const TWO: FunctionId = FunctionId(2);

fn rules() -> Rules {
    Rules {
        memory_mib: 1 << 40,
        vcpus: 1 << 40,
        overhead_mib: 10,
        idle_divisor: 10,
        background_max: 8,
        shells_per_class: 0,
        shells_max: 16,
        shell_interval: Duration::ZERO,
        keep_alive: 60 * SECOND,
        recycle: Recycle::Rewind,
    }
}

fn limits(ready_min: usize, concurrency_max: usize, queue_max: usize) -> Limits {
    Limits {
        shape: Shape {
            vcpus: 1,
            memory_mib: 100,
            network: false,
        },
        ready_min,
        concurrency_max,
        queue_max,
    }
}

/// A node whose clock is the test's, and which claims, rewinds and reaps at once unless the test takes that over.
struct Bench {
    schedule: Schedule,
    now: Time,
}

impl Bench {
    fn new(rules: Rules) -> Self {
        Self {
            schedule: Schedule::new(rules),
            now: Time::ZERO,
        }
    }

    fn with(rules: Rules, functions: &[(FunctionId, Limits)]) -> Self {
        let mut bench = Self::new(rules);
        for (id, limits) in functions {
            bench.feed(Input::Add(*id, *limits));
        }
        bench
    }

    /// Feeds one input, and ends whatever is made ahead, rewound or destroyed because of it. Tells all effects.
    fn feed(&mut self, input: Input) -> Vec<Effect> {
        let (mut inputs, mut effects) = (vec![input], Vec::new());
        while let Some(input) = inputs.pop() {
            for effect in self.schedule.step(self.now, input) {
                effects.push(effect);
                match effect {
                    Effect::Prepare(vm, _) => inputs.push(Input::Prepared(vm, SECOND)),
                    Effect::Claim(vm, _) => inputs.push(Input::Claimed(vm, SECOND)),
                    Effect::Rewind(vm, _) => inputs.push(Input::Rewound(vm, SECOND)),
                    Effect::Destroy(vm) => inputs.push(Input::Reaped(vm)),
                    _ => {}
                }
            }
        }
        effects
    }

    fn ask(&mut self, ticket: u64, function: FunctionId) -> Vec<Effect> {
        self.ask_until(ticket, function, FAR)
    }

    fn ask_until(&mut self, ticket: u64, function: FunctionId, deadline: Time) -> Vec<Effect> {
        self.feed(Input::Ask {
            ticket: Ticket(ticket),
            function,
            deadline,
            turn: Turn::Last,
        })
    }

    /// Asks, and tells what was granted.
    fn run(&mut self, ticket: u64, function: FunctionId) -> (VmId, Start) {
        let effects = self.ask(ticket, function);
        let (_, vm, start) = grants(&effects)[0];
        if start == Start::Cold {
            self.feed(Input::Claimed(vm, SECOND));
        }
        (vm, start)
    }

    fn finish(&mut self, vm: VmId) -> Vec<Effect> {
        self.feed(Input::Finished(vm, Verdict::Clean))
    }

    fn wake(&mut self, at: Time) -> Vec<Effect> {
        self.now = at;
        self.feed(Input::Woke)
    }
}

fn grants(effects: &[Effect]) -> Vec<(u64, VmId, Start)> {
    let grant = |effect: &Effect| match effect {
        Effect::Grant { ticket, vm, start } => Some((ticket.0, *vm, *start)),
        _ => None,
    };
    effects.iter().filter_map(grant).collect()
}

fn refusals(effects: &[Effect]) -> Vec<(u64, Refusal)> {
    let refusal = |effect: &Effect| match effect {
        Effect::Refuse(ticket, refusal) => Some((ticket.0, *refusal)),
        _ => None,
    };
    effects.iter().filter_map(refusal).collect()
}

#[test]
fn callers_are_served_in_the_order_they_came() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(1, 1, 2))]);
    let (vm, start) = bench.run(1, ONE);
    assert_eq!(start, Start::Claimed);
    for ticket in 2..=3 {
        assert_eq!(grants(&bench.ask(ticket, ONE)), []);
    }
    assert_eq!(refusals(&bench.ask(4, ONE)), [(4, Refusal::QueueFull)]);
    let granted = grants(&bench.finish(vm));
    assert_eq!((granted[0].0, granted.len()), (2, 1));
    let granted = grants(&bench.finish(granted[0].1));
    assert_eq!(granted[0].0, 3);
}

#[test]
fn a_used_sandbox_is_rewound_before_it_is_granted_again() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(0, 4, 4))]);
    let (vm, start) = bench.run(1, ONE);
    assert_eq!(start, Start::Cold);
    assert_eq!(bench.finish(vm), [Effect::Rewind(vm, ONE)]);
    assert_eq!(bench.run(2, ONE), (vm, Start::Rewound));
    let effects = bench.feed(Input::Finished(vm, Verdict::Spoilt));
    assert!(effects.contains(&Effect::Destroy(vm)), "{effects:?}");
}

#[test]
fn a_caller_waits_for_a_rewind_rather_than_for_a_new_monitor() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(0, 4, 4))]);
    let (vm, _) = bench.run(1, ONE);
    let now = bench.now;
    let finished = Input::Finished(vm, Verdict::Clean);
    assert_eq!(
        bench.schedule.step(now, finished),
        [Effect::Rewind(vm, ONE)]
    );
    assert_eq!(grants(&bench.ask(2, ONE)), []);
    // A second caller is not covered by the one sandbox that comes.
    assert_eq!(grants(&bench.ask(3, ONE))[0].2, Start::Cold);
    let granted = grants(&bench.feed(Input::Rewound(vm, SECOND)));
    assert_eq!(granted[0].1, vm);
}

#[test]
fn rewinds_that_cost_more_than_claims_are_given_up_and_tried_again_now_and_then() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(0, 1, 4))]);
    let mut rewinds = 0;
    for ticket in 0..100 {
        let (vm, _) = bench.run(ticket, ONE);
        let now = bench.now;
        let effects = bench
            .schedule
            .step(now, Input::Finished(vm, Verdict::Clean));
        for effect in effects {
            match effect {
                Effect::Rewind(vm, _) => {
                    rewinds += 1;
                    bench.feed(Input::Rewound(vm, 10 * SECOND));
                }
                Effect::Destroy(vm) => drop(bench.feed(Input::Reaped(vm))),
                Effect::Claim(vm, _) => drop(bench.feed(Input::Claimed(vm, SECOND))),
                _ => {}
            }
        }
    }
    assert!((4..10).contains(&rewinds), "{rewinds} rewinds of 100");
}

#[test]
fn the_ready_minimum_is_kept_and_what_demand_explains_is_kept_for_a_while() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(2, 8, 0))]);
    let ready = |bench: &Bench| bench.schedule.function(ONE).ready;
    assert_eq!(ready(&bench), 2);
    let vms: Vec<VmId> = (1..=5).map(|ticket| bench.run(ticket, ONE).0).collect();
    assert_eq!(ready(&bench), 2, "refilled as soon as they are granted");
    for vm in vms {
        bench.finish(vm);
    }
    assert_eq!(ready(&bench), 7, "the peak of five, and two");
    bench.wake(60 * SECOND);
    assert_eq!(ready(&bench), 7, "the period before counts");
    bench.wake(120 * SECOND);
    assert_eq!(ready(&bench), 2);
}

#[test]
fn the_ready_minimum_can_be_changed_and_a_function_that_is_gone_has_none() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(0, 8, 0))]);
    let ready = |bench: &Bench| bench.schedule.function(ONE).ready;
    assert_eq!(ready(&bench), 0);
    bench.feed(Input::KeepReady(ONE, 3));
    assert_eq!(ready(&bench), 3);
    bench.feed(Input::KeepReady(ONE, 1));
    assert_eq!(ready(&bench), 1, "nothing explains the others");
    bench.feed(Input::Remove(ONE));
    bench.feed(Input::KeepReady(ONE, 2));
    assert_eq!(bench.schedule.node(), NodeCounts::default());
}

#[test]
fn a_ready_minimum_beyond_the_machine_is_held_back_until_there_is_room() {
    let rules = Rules {
        memory_mib: 250,
        ..rules()
    };
    let mut bench = Bench::with(rules, &[(ONE, limits(0, 8, 0)), (TWO, limits(0, 8, 0))]);
    let count = |bench: &Bench| bench.schedule.function(ONE);
    bench.feed(Input::KeepReady(ONE, 1000));
    let now = count(&bench);
    assert!(now.ready > 0 && now.is_held_back, "{now:?}");
    assert!(
        !bench.schedule.function(TWO).is_held_back,
        "it asked for none"
    );
    let at_most = now.ready;
    bench.feed(Input::KeepReady(ONE, at_most));
    assert!(!count(&bench).is_held_back);
    bench.feed(Input::KeepReady(TWO, 1));
    assert!(bench.schedule.function(TWO).is_held_back);
    bench.feed(Input::Remove(ONE));
    let now = bench.schedule.function(TWO);
    assert_eq!((now.ready, now.is_held_back), (1, false));
}

#[test]
fn without_a_minimum_a_function_scales_to_zero_and_back() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(0, 8, 0))]);
    let (vm, _) = bench.run(1, ONE);
    bench.finish(vm);
    for at in [60, 120] {
        bench.wake(at * SECOND);
    }
    assert_eq!(bench.schedule.node(), NodeCounts::default());
    assert_eq!(bench.run(2, ONE).1, Start::Cold);
}

#[test]
fn shells_are_made_ahead_at_a_bounded_rate_and_claimed_first() {
    let rules = Rules {
        shells_per_class: 2,
        shell_interval: SECOND,
        ..rules()
    };
    let mut bench = Bench::with(rules, &[(ONE, limits(0, 4, 0))]);
    assert_eq!(bench.schedule.node().shells, 1);
    let effects = bench.wake(SECOND);
    assert!(effects.iter().any(|e| matches!(e, Effect::Prepare(..))));
    assert_eq!(bench.schedule.node().shells, 2);
    let granted = grants(&bench.ask(1, ONE));
    assert_eq!(granted[0].2, Start::Claimed);
    // Without functions there are no shells.
    bench.feed(Input::Claimed(granted[0].1, SECOND));
    bench.feed(Input::Remove(ONE));
    assert_eq!(bench.schedule.node().shells, 0);
}

#[test]
fn a_noisy_function_does_not_starve_a_quiet_one() {
    let rules = Rules {
        vcpus: 2,
        ..rules()
    };
    let functions = [(ONE, limits(0, 100, 100)), (TWO, limits(0, 100, 100))];
    let mut bench = Bench::with(rules, &functions);
    let (vm, _) = bench.run(1, ONE);
    bench.run(2, ONE);
    for ticket in 3..50 {
        assert_eq!(grants(&bench.ask(ticket, ONE)), []);
    }
    assert_eq!(grants(&bench.ask(99, TWO)), []);
    let granted = grants(&bench.finish(vm));
    assert_eq!(granted[0].0, 99, "the next place is the quiet one's");
}

#[test]
fn a_large_function_is_not_passed_by_small_ones_for_ever() {
    let rules = Rules {
        memory_mib: 250,
        ..rules()
    };
    let large = Limits {
        shape: Shape {
            vcpus: 1,
            memory_mib: 200,
            network: false,
        },
        ..limits(0, 4, 4)
    };
    let mut bench = Bench::with(rules, &[(ONE, limits(0, 4, 4)), (TWO, large)]);
    let (first, _) = bench.run(1, ONE);
    let (second, _) = bench.run(2, ONE);
    assert_eq!(grants(&bench.ask(3, TWO)), []);
    assert_eq!(grants(&bench.ask(4, ONE)), []);
    // One place is free, and kept free; what is idle makes room.
    assert_eq!(grants(&bench.finish(first)), []);
    let granted = grants(&bench.finish(second));
    assert_eq!(granted[0].0, 3);
    assert!(bench.schedule.node().memory_mib <= 250);
}

#[test]
fn what_can_never_fit_is_refused_at_once_and_the_rest_when_its_time_is_over() {
    let rules = Rules {
        memory_mib: 150,
        ..rules()
    };
    let large = Limits {
        shape: Shape {
            vcpus: 1,
            memory_mib: 141,
            network: false,
        },
        ..limits(2, 4, 4)
    };
    let functions = [
        (ONE, limits(0, 1, 4)),
        (TWO, large),
        (FunctionId(3), limits(0, 1, 4)),
    ];
    let mut bench = Bench::with(rules, &functions);
    assert_eq!(refusals(&bench.ask(1, TWO)), [(1, Refusal::TooBig)]);
    bench.run(2, ONE);
    bench.ask_until(3, ONE, SECOND);
    bench.ask_until(4, FunctionId(3), SECOND);
    let effects = bench.wake(SECOND);
    assert_eq!(
        refusals(&effects),
        [(3, Refusal::DeadlinePassed), (4, Refusal::MachineFull)]
    );
    assert_eq!(
        refusals(&bench.ask_until(5, ONE, SECOND)),
        [(5, Refusal::DeadlinePassed)]
    );
}

#[test]
fn repeated_failures_are_told_and_tried_ever_more_rarely() {
    let mut schedule = Schedule::new(rules());
    let mut now = Time::ZERO;
    let mut effects = schedule.step(now, Input::Add(ONE, limits(1, 1, 4)));
    let mut pauses = Vec::new();
    for number in 0..20 {
        let [Effect::Claim(vm, ONE), ..] = effects[..] else {
            panic!("no try: {effects:?}");
        };
        let mut after = schedule.step(now, Input::ClaimFailed(vm));
        after.extend(schedule.step(now, Input::Reaped(vm)));
        if number == 0 {
            // One failure is an accident, tried again at once and told to nobody.
            effects = after.split_off(after.len() - 1);
            continue;
        }
        let ask = Input::Ask {
            ticket: Ticket(number),
            function: ONE,
            deadline: FAR,
            turn: Turn::Last,
        };
        let refused = refusals(&schedule.step(now, ask));
        assert_eq!(refused, [(number, Refusal::ClaimsFail)]);
        let wake = after.iter().find_map(|effect| match effect {
            Effect::WakeAt(at) => Some(*at),
            _ => None,
        });
        let at = wake.expect("it will be tried again");
        pauses.push(at - now);
        now = at;
        effects = schedule.step(now, Input::Woke);
    }
    assert!(pauses.is_sorted() && pauses[0] < pauses[1], "{pauses:?}");
    assert_eq!(pauses.last(), Some(&class::PAUSE_MAX));
}

#[test]
fn a_closed_node_refuses_and_drains() {
    let mut bench = Bench::with(rules(), &[(ONE, limits(1, 1, 5))]);
    let (vm, _) = bench.run(1, ONE);
    bench.ask(2, ONE);
    let effects = bench.feed(Input::Close);
    assert_eq!(refusals(&effects), [(2, Refusal::Closed)]);
    assert!(!bench.schedule.is_drained());
    let effects = bench.finish(vm);
    assert!(effects.contains(&Effect::Gone(ONE)), "{effects:?}");
    assert!(bench.schedule.is_drained());
    assert_eq!(refusals(&bench.ask(3, ONE)), [(3, Refusal::Closed)]);
}

proptest! {
    #[test]
    fn demand_is_the_peak_of_the_last_one_to_two_periods(
        changes in prop::collection::vec((0usize..9, 0u64..40), 1..60),
    ) {
        let period = Duration::from_secs(30);
        let mut demand = Demand::new(period);
        let (mut now, mut next) = (Time::ZERO, None);
        // What ran, and until when.
        let mut past: Vec<(usize, Time)> = Vec::new();
        for (running, wait) in changes {
            next = demand.note(running, now).or(next);
            let until = now + Duration::from_secs(wait);
            while let Some(at) = next.filter(|at| *at <= until) {
                next = demand.turn_over(running, at);
            }
            now = until;
            past.push((running, now));
            let peak_since = |since: Time| {
                past.iter().filter(|(_, until)| *until >= since).map(|(count, _)| *count).max()
            };
            let least = peak_since(now.saturating_sub(period) + Duration::from_millis(1));
            let most = peak_since(now.saturating_sub(2 * period));
            prop_assert!(demand.peak() >= running);
            prop_assert!(demand.peak() <= most.unwrap_or(0));
            prop_assert!(demand.peak() >= least.unwrap_or(0));
        }
    }
}
