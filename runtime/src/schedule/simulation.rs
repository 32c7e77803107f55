//! The node simulated: callers, monitors, faults and time are made from a seed, the schedule is the real one. After each step
//! the world, which keeps its own account, is compared with what must always hold.
//!
//! A failure prints its seed. `THAW_SEED=<seed> cargo test -p thaw-runtime simulated -- --nocapture` plays it again,
//! alone, and prints every input and effect.

mod world;

use std::time::Duration;

use thaw_fuzz::{Campaign, Dice};

use self::world::{PLENTY_MIB, World};
use super::{Recycle, Rules, Shape};

/// Schedules that an ordinary test run plays.
const SEEDS: u64 = 10_000;

/// How often things go wrong, in a thousand.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    claim_fails: u64,
    claim_is_slow: u64,
    shell_fails: u64,
    idle_monitor_dies: u64,
    run_is_spoilt: u64,
    rewind_fails: u64,
    caller_leaves: u64,
}

impl Faults {
    fn roll(dice: &mut Dice) -> Self {
        let mut rate = || *dice.pick(&[0, 0, 20, 100, 500]);
        Self {
            claim_fails: rate(),
            claim_is_slow: rate(),
            shell_fails: rate(),
            idle_monitor_dies: rate(),
            run_is_spoilt: rate(),
            rewind_fails: rate(),
            caller_leaves: rate(),
        }
    }
}

fn rules(dice: &mut Dice) -> Rules {
    Rules {
        memory_mib: *dice.pick(&[300, 700, 1500, PLENTY_MIB]),
        vcpus: *dice.pick(&[1, 2, 5, 64]),
        overhead_mib: 10,
        idle_divisor: *dice.pick(&[1, 8]),
        background_max: *dice.pick(&[1, 2, 4]),
        shells_per_class: *dice.pick(&[0, 1, 3]),
        shells_max: *dice.pick(&[1, 6]),
        shell_interval: *dice.pick(&[Duration::ZERO, Duration::from_millis(50)]),
        keep_alive: *dice.pick(&[Duration::from_millis(100), Duration::from_secs(10)]),
        recycle: *dice.pick(&[Recycle::Rewind, Recycle::Rewind, Recycle::Replace]),
    }
}

fn shape(dice: &mut Dice) -> Shape {
    Shape {
        vcpus: *dice.pick(&[1, 1, 1, 2]),
        memory_mib: *dice.pick(&[64, 128, 256]),
        network: *dice.pick(&[false, false, true]),
    }
}

/// One schedule, from its first caller to the end of its last monitor.
fn play(dice: &mut Dice) {
    let options = [dice.is_told(), dice.seed().is_multiple_of(16)];
    let mut world = World::new(rules(dice), Faults::roll(dice), options);
    for _ in 0..dice.range(1, 4) {
        let limits = super::Limits {
            shape: shape(dice),
            ready_min: *dice.pick(&[0, 0, 1, 3]),
            concurrency_max: *dice.pick(&[1, 2, 8]),
            queue_max: *dice.pick(&[0, 2, 20]),
        };
        world.add_function(dice, limits);
    }
    let callers = dice.range(5, 40);
    world.plan_callers(dice, callers);
    let closes = dice.in_thousand(300);
    let close_at = Duration::from_millis(dice.range(0, 2000));
    if dice.in_thousand(200) {
        world.plan_removal(Duration::from_millis(dice.range(0, 2000)));
    }
    world.run(dice, closes.then_some(close_at));
    if !closes {
        world.check_at_rest();
        world.close(dice);
    }
    world.check_ended();
    world.seen().into_iter().for_each(|what| dice.saw(what));
}

/// Inputs, effects, starts and refusals that the schedules must have gone through, lest the simulation be an empty one.
const EVERYTHING: [&str; 31] = [
    "Add",
    "Ask",
    "Claim",
    "ClaimFailed",
    "Claimed",
    "ClaimsFail",
    "Close",
    "Closed",
    "Cold",
    "DeadlinePassed",
    "Destroy",
    "Finished",
    "GaveBack",
    "Gone",
    "Grant",
    "Leave",
    "Lost",
    "MachineFull",
    "Prepare",
    "PrepareFailed",
    "Prepared",
    "QueueFull",
    "Reaped",
    "Refuse",
    "Remove",
    "RewindFailed",
    "Rewind",
    "Rewound",
    "TooBig",
    "WakeAt",
    "Woke",
];

#[test]
fn simulated_schedules_keep_every_promise() {
    let name = "simulated_schedules_keep_every_promise";
    Campaign::new(env!("CARGO_PKG_NAME"), name, SEEDS)
        .must_see(&EVERYTHING)
        .play(play);
}
