//! Callers and monitors around a schedule, with an account of their own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use thaw_fuzz::Dice;

use super::Faults;
use crate::schedule::{
    Effect, FunctionId, Input, Limits, Refusal, Rules, Schedule, Start, Ticket, Time, Turn,
    Verdict, VmId,
};

/// Claims that one request goes through before it is told that this machine failed.
const ATTEMPTS_MAX: u32 = 3;
/// Inputs of one schedule; more means that it feeds itself.
const STEPS_MAX: u64 = 20_000;

/// A memory budget that nothing here comes near, MiB.
pub(super) const PLENTY_MIB: u64 = 1 << 40;

/// What is going to happen.
#[derive(Clone, Copy, Debug)]
enum Event {
    Arrives(FunctionId),
    Leaves(Ticket),
    PrepareEnds(VmId),
    ClaimEnds(VmId),
    RunEnds(VmId),
    RewindEnds(VmId),
    IsReaped(VmId),
    IsRemoved,
    Wakes(u64),
}

/// A monitor as the world sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Preparing,
    Shell,
    Claiming,
    Ready,
    Granted(Ticket),
    Rewinding,
    Ending,
}

#[derive(Clone, Copy, Debug)]
struct Monitor {
    stage: Stage,
    shape: super::Shape,
    function: Option<FunctionId>,
    /// Granted before its claim.
    unclaimed: bool,
    /// Something ran in it and was not undone.
    dirty: bool,
    /// Something ran in it, ever.
    has_run: bool,
    was_shell: bool,
    cost_mib: u64,
}

#[derive(Clone, Copy, Debug)]
struct Caller {
    function: FunctionId,
    deadline: Time,
    attempts: u32,
}

struct Place {
    limits: Limits,
    queue: VecDeque<Ticket>,
    is_open: bool,
    is_gone: bool,
    /// Set by claims that failed, cleared by those that went well.
    claims_fail: bool,
}

pub(super) struct World {
    schedule: Schedule,
    rules: Rules,
    faults: Faults,
    is_told: bool,
    now: Time,
    events: BTreeMap<(Time, u64), Event>,
    monitors: BTreeMap<VmId, Monitor>,
    functions: BTreeMap<FunctionId, Place>,
    /// Waiting or running.
    callers: BTreeMap<Ticket, Caller>,
    asked: u64,
    answered: u64,
    refused: u64,
    left: u64,
    number: u64,
    steps: u64,
    wake: Option<(Time, u64)>,
    last_prepare: Option<Time>,
    is_closed: bool,
    /// Naming what happens is slow, so not every world does.
    is_watched: bool,
    /// What of everything that can happen did.
    seen: BTreeSet<String>,
}

impl World {
    pub(super) fn new(rules: Rules, faults: Faults, [is_told, is_watched]: [bool; 2]) -> Self {
        if is_told {
            eprintln!("{rules:?}\n{faults:?}");
        }
        Self {
            schedule: Schedule::new(rules),
            rules,
            faults,
            is_told,
            now: Time::ZERO,
            events: BTreeMap::new(),
            monitors: BTreeMap::new(),
            functions: BTreeMap::new(),
            callers: BTreeMap::new(),
            asked: 0,
            answered: 0,
            refused: 0,
            left: 0,
            number: 0,
            steps: 0,
            wake: None,
            last_prepare: None,
            is_closed: false,
            is_watched,
            seen: BTreeSet::new(),
        }
    }

    pub(super) fn seen(self) -> BTreeSet<String> {
        self.seen
    }

    fn see(&mut self, what: impl std::fmt::Debug) {
        if !self.is_watched {
            return;
        }
        let text = format!("{what:?}");
        let name = text.split(['(', ' ']).next().unwrap_or_default();
        self.seen.insert(name.to_owned());
    }

    pub(super) fn add_function(&mut self, dice: &mut Dice, limits: Limits) {
        let id = FunctionId(self.fresh());
        if self.is_told {
            eprintln!("{id:?} {limits:?}");
        }
        let place = Place {
            limits,
            queue: VecDeque::new(),
            is_open: true,
            is_gone: false,
            claims_fail: false,
        };
        self.functions.insert(id, place);
        self.feed(dice, Input::Add(id, limits));
    }

    /// Callers in clusters, as they come.
    pub(super) fn plan_callers(&mut self, dice: &mut Dice, count: u64) {
        let ids: Vec<FunctionId> = self.functions.keys().copied().collect();
        let mut at = Duration::ZERO;
        for _ in 0..count {
            if dice.in_thousand(300) {
                at += dice.microseconds(0, 400_000);
            }
            let id = *dice.pick(&ids);
            self.plan(at, Event::Arrives(id));
        }
    }

    pub(super) fn plan_removal(&mut self, at: Time) {
        self.plan(at, Event::IsRemoved);
    }

    pub(super) fn run(&mut self, dice: &mut Dice, close_at: Option<Time>) {
        while let Some(((at, _), event)) = self.events.pop_first() {
            if let Some(close_at) = close_at
                && !self.is_closed
                && close_at <= at
            {
                self.now = self.now.max(close_at);
                self.close_now(dice);
            }
            self.now = self.now.max(at);
            self.happen(dice, event);
        }
        if close_at.is_some() && !self.is_closed {
            self.close(dice);
        }
    }

    pub(super) fn close(&mut self, dice: &mut Dice) {
        self.close_now(dice);
        self.run(dice, None);
    }

    fn close_now(&mut self, dice: &mut Dice) {
        self.is_closed = true;
        for place in self.functions.values_mut() {
            place.is_open = false;
        }
        self.feed(dice, Input::Close);
    }

    /// Without callers and faults: nothing runs, nothing waits, and the pools are at their minimum.
    pub(super) fn check_at_rest(&self) {
        assert!(self.callers.is_empty(), "{:?} wait for ever", self.callers);
        for (id, place) in &self.functions {
            let own = self.monitors.values().filter(|m| m.function == Some(*id));
            let own: Vec<_> = own.collect();
            let ready = own.iter().filter(|m| m.stage == Stage::Ready).count();
            assert_eq!(own.len(), ready, "something of {id:?} is not at rest");
            assert!(ready <= place.limits.ready_min, "{id:?} did not scale down");
            let has_room = self.rules.memory_mib >= PLENTY_MIB;
            if has_room && place.is_open && self.rules.could_run(place.limits.shape) {
                assert_eq!(ready, place.limits.ready_min, "the minimum is not kept");
            }
        }
    }

    pub(super) fn check_ended(&self) {
        assert!(self.monitors.is_empty(), "{:?} are left", self.monitors);
        assert!(self.callers.is_empty(), "{:?} are left", self.callers);
        assert!(self.schedule.is_drained());
        assert!(self.functions.values().all(|place| place.is_gone));
        assert_eq!(
            self.asked,
            self.answered + self.refused + self.left,
            "a request is lost or was answered twice"
        );
    }

    fn fresh(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn plan(&mut self, at: Time, event: Event) {
        let number = self.fresh();
        self.events.insert((at, number), event);
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.plan(self.now + delay, event);
    }

    fn happen(&mut self, dice: &mut Dice, event: Event) {
        match event {
            Event::Arrives(id) => self.arrive(dice, id),
            Event::Leaves(ticket) => self.leave(dice, ticket),
            Event::PrepareEnds(vm) if dice.in_thousand(self.faults.shell_fails) => {
                self.feed(dice, Input::PrepareFailed(vm));
            }
            Event::PrepareEnds(vm) => {
                self.monitor(vm).stage = Stage::Shell;
                self.feed(dice, Input::Prepared(vm, Duration::from_millis(5)));
            }
            Event::ClaimEnds(vm) => self.end_claim(dice, vm),
            Event::RunEnds(vm) => self.end_run(dice, vm),
            Event::RewindEnds(vm) if dice.in_thousand(self.faults.rewind_fails) => {
                self.feed(dice, Input::RewindFailed(vm));
            }
            Event::RewindEnds(vm) => {
                let monitor = self.monitor(vm);
                monitor.stage = Stage::Ready;
                monitor.dirty = false;
                let took = dice.microseconds(100, 8_000);
                self.feed(dice, Input::Rewound(vm, took));
            }
            Event::IsReaped(vm) => {
                self.monitors.remove(&vm);
                self.feed(dice, Input::Reaped(vm));
            }
            Event::IsRemoved => {
                let id = *self.functions.keys().next().expect("there is a function");
                self.functions.get_mut(&id).expect("just found").is_open = false;
                self.feed(dice, Input::Remove(id));
            }
            Event::Wakes(number) => {
                if self.wake.is_some_and(|(_, newest)| newest == number) {
                    self.wake = None;
                    self.feed(dice, Input::Woke);
                }
            }
        }
    }

    fn arrive(&mut self, dice: &mut Dice, function: FunctionId) {
        let ticket = Ticket(self.fresh());
        let patience = *dice.pick(&[5, 500, 30_000]);
        let deadline = self.now + Duration::from_millis(patience);
        let caller = Caller {
            function,
            deadline,
            attempts: 1,
        };
        self.asked += 1;
        if dice.in_thousand(self.faults.caller_leaves) {
            let delay = dice.microseconds(0, 100_000);
            self.after(delay, Event::Leaves(ticket));
        }
        self.ask(dice, ticket, caller, Turn::Last);
    }

    fn ask(&mut self, dice: &mut Dice, ticket: Ticket, caller: Caller, turn: Turn) {
        self.callers.insert(ticket, caller);
        let queue = &mut self.place(caller.function).queue;
        match turn {
            Turn::Last => queue.push_back(ticket),
            Turn::Again => queue.push_front(ticket),
        }
        let (function, deadline) = (caller.function, caller.deadline);
        let input = Input::Ask {
            ticket,
            function,
            deadline,
            turn,
        };
        self.feed(dice, input);
    }

    fn leave(&mut self, dice: &mut Dice, ticket: Ticket) {
        let Some(caller) = self.callers.get(&ticket).copied() else {
            return;
        };
        let queue = &mut self.place(caller.function).queue;
        let waits = queue.contains(&ticket);
        queue.retain(|waiting| *waiting != ticket);
        if waits {
            self.callers.remove(&ticket);
            self.left += 1;
        }
        self.feed(dice, Input::Leave(ticket));
    }

    /// A caller has a monitor: it may be dead, the caller may be gone, the claim may fail, the run may go wrong.
    fn begin(&mut self, dice: &mut Dice, vm: VmId, ticket: Ticket) {
        let monitor = *self.monitor(vm);
        let was_idle = monitor.was_shell || !monitor.unclaimed;
        if was_idle && dice.in_thousand(self.faults.idle_monitor_dies) {
            self.feed(dice, Input::Lost(vm));
            return self.ask_again(dice, ticket);
        }
        if dice.in_thousand(self.faults.caller_leaves / 2) {
            self.callers.remove(&ticket);
            self.left += 1;
            self.give_back(vm);
            return self.feed(dice, Input::GaveBack(vm));
        }
        if monitor.unclaimed {
            let delay = self.claim_time(dice);
            return self.after(delay, Event::ClaimEnds(vm));
        }
        self.monitor(vm).dirty = true;
        let delay = self.run_time(dice);
        self.after(delay, Event::RunEnds(vm));
    }

    fn give_back(&mut self, vm: VmId) {
        let rules = self.rules;
        let monitor = self.monitor(vm);
        if !monitor.unclaimed {
            monitor.stage = Stage::Ready;
        } else if monitor.was_shell {
            monitor.stage = Stage::Shell;
            monitor.function = None;
        } else {
            self.monitors.remove(&vm);
            return;
        }
        monitor.note_cost(&rules);
    }

    fn end_claim(&mut self, dice: &mut Dice, vm: VmId) {
        let monitor = *self.monitor(vm);
        let function = monitor.function.expect("claimed for a function");
        let failed = dice.in_thousand(self.faults.claim_fails);
        self.place(function).claims_fail = failed;
        if failed {
            self.feed(dice, Input::ClaimFailed(vm));
            if let Stage::Granted(ticket) = monitor.stage {
                self.ask_again(dice, ticket);
            }
            return;
        }
        if monitor.stage == Stage::Claiming {
            self.monitor(vm).stage = Stage::Ready;
        } else {
            let monitor = self.monitor(vm);
            monitor.unclaimed = false;
            monitor.dirty = true;
            let delay = self.run_time(dice);
            self.after(delay, Event::RunEnds(vm));
        }
        let took = dice.microseconds(500, 4_000);
        self.feed(dice, Input::Claimed(vm, took));
    }

    fn end_run(&mut self, dice: &mut Dice, vm: VmId) {
        let Stage::Granted(ticket) = self.monitor(vm).stage else {
            panic!("{vm:?} ran ungranted");
        };
        let caller = self.callers.remove(&ticket);
        assert!(caller.is_some(), "{ticket:?} is answered twice");
        self.answered += 1;
        let spoilt = dice.in_thousand(self.faults.run_is_spoilt);
        let verdict = if spoilt {
            Verdict::Spoilt
        } else {
            Verdict::Clean
        };
        self.monitor(vm).has_run = true;
        self.monitor(vm).stage = Stage::Rewinding;
        self.feed(dice, Input::Finished(vm, verdict));
    }

    fn ask_again(&mut self, dice: &mut Dice, ticket: Ticket) {
        let caller = self.callers.remove(&ticket).expect("it was granted");
        if caller.attempts == ATTEMPTS_MAX {
            self.answered += 1; // with an error
            return;
        }
        let caller = Caller {
            attempts: caller.attempts + 1,
            ..caller
        };
        let ticket = Ticket(self.fresh());
        self.ask(dice, ticket, caller, Turn::Again);
    }

    fn claim_time(&self, dice: &mut Dice) -> Duration {
        if dice.in_thousand(self.faults.claim_is_slow) {
            dice.microseconds(500_000, 5_000_000)
        } else {
            dice.microseconds(500, 10_000)
        }
    }

    fn run_time(&self, dice: &mut Dice) -> Duration {
        let longest = *dice.pick(&[1_000, 50_000, 2_000_000]);
        dice.microseconds(100, longest)
    }

    fn feed(&mut self, dice: &mut Dice, input: Input) {
        self.steps += 1;
        assert!(self.steps < STEPS_MAX, "the schedule feeds itself");
        self.see(input);
        let effects = self.schedule.step(self.now, input);
        if self.is_told {
            eprintln!("{:?} {input:?}\n    {effects:?}", self.now);
        }
        let mut granted = Vec::new();
        for effect in effects {
            self.see(effect);
            self.obey(dice, effect, &mut granted);
        }
        self.account();
        for (vm, ticket) in granted {
            self.begin(dice, vm, ticket);
        }
    }

    fn obey(&mut self, dice: &mut Dice, effect: Effect, granted: &mut Vec<(VmId, Ticket)>) {
        match effect {
            Effect::Prepare(vm, shape) => {
                assert!(
                    self.last_prepare
                        .is_none_or(|last| self.now >= last + self.rules.shell_interval),
                    "shells are made too fast"
                );
                self.last_prepare = Some(self.now);
                self.make(vm, shape, Stage::Preparing);
                let delay = dice.microseconds(500, 20_000);
                self.after(delay, Event::PrepareEnds(vm));
            }
            Effect::Claim(vm, function) => {
                let shape = self.place(function).limits.shape;
                self.take_shell_or_make(vm, shape, Stage::Claiming);
                self.monitor(vm).function = Some(function);
                let delay = self.claim_time(dice);
                self.after(delay, Event::ClaimEnds(vm));
            }
            Effect::Grant { ticket, vm, start } => {
                self.grant(ticket, vm, start);
                granted.push((vm, ticket));
            }
            Effect::Refuse(ticket, refusal) => self.refuse(ticket, refusal),
            Effect::Rewind(vm, function) => {
                let monitor = self.monitor(vm);
                let is = (monitor.stage, monitor.function);
                assert_eq!(is, (Stage::Rewinding, Some(function)), "{vm:?}");
                let delay = dice.microseconds(100, 10_000);
                self.after(delay, Event::RewindEnds(vm));
            }
            Effect::Destroy(vm) => {
                let monitor = self.monitor(vm);
                assert_ne!(monitor.stage, Stage::Ending, "{vm:?} is destroyed twice");
                monitor.stage = Stage::Ending;
                let delay = dice.microseconds(100, 50_000);
                self.after(delay, Event::IsReaped(vm));
            }
            Effect::Gone(function) => {
                let alive = self.monitors.values().any(|m| m.function == Some(function));
                assert!(!alive, "{function:?} is not gone");
                self.place(function).is_gone = true;
            }
            Effect::WakeAt(at) => {
                assert!(at > self.now, "a wake-up in the past");
                let number = self.fresh();
                self.wake = Some((at, number));
                self.plan(at, Event::Wakes(number));
            }
        }
    }

    fn make(&mut self, vm: VmId, shape: super::Shape, stage: Stage) {
        let monitor = Monitor {
            stage,
            shape,
            function: None,
            unclaimed: true,
            dirty: false,
            has_run: false,
            was_shell: false,
            cost_mib: 0,
        };
        let old = self.monitors.insert(vm, monitor);
        assert!(old.is_none(), "{vm:?} is made twice");
    }

    fn take_shell_or_make(&mut self, vm: VmId, shape: super::Shape, stage: Stage) {
        match self.monitors.get_mut(&vm) {
            None => self.make(vm, shape, stage),
            Some(monitor) => {
                assert_eq!((monitor.stage, monitor.shape), (Stage::Shell, shape));
                monitor.stage = stage;
                monitor.was_shell = true;
            }
        }
    }

    fn grant(&mut self, ticket: Ticket, vm: VmId, start: Start) {
        let caller = *self.callers.get(&ticket).expect("granted to nobody");
        let first = self.place(caller.function).queue.pop_front();
        assert_eq!(first, Some(ticket), "granted out of turn");
        self.see(start);
        self.check_fair(caller.function);
        let shape = self.place(caller.function).limits.shape;
        let old = self.monitors.get(&vm).copied();
        match (start, old.map(|monitor| monitor.stage)) {
            (Start::Cold, None) => self.make(vm, shape, Stage::Granted(ticket)),
            (Start::Claimed, Some(Stage::Shell)) => {
                self.take_shell_or_make(vm, shape, Stage::Granted(ticket));
            }
            (Start::Claimed | Start::Rewound, Some(Stage::Ready)) => {
                let old = old.expect("it has a stage");
                assert_eq!(old.function, Some(caller.function), "of another function");
                assert_eq!(old.has_run, start == Start::Rewound, "{start:?} is untrue");
                assert!(!old.dirty, "{vm:?} is used again without a rewind");
                let monitor = self.monitor(vm);
                monitor.stage = Stage::Granted(ticket);
                monitor.unclaimed = false;
            }
            other => panic!("{vm:?} granted as {other:?}"),
        }
        self.monitor(vm).function = Some(caller.function);
    }

    /// A function that runs nothing, and could, is served before one that runs something.
    fn check_fair(&self, served: FunctionId) {
        let runs = |id| {
            let own = self.monitors.values().filter(|m| m.function == Some(id));
            own.filter(|m| matches!(m.stage, Stage::Granted(_))).count()
        };
        if runs(served) == 0 {
            return;
        }
        for (id, place) in &self.functions {
            let own = self.monitors.values().filter(|m| m.function == Some(*id));
            let comes = own
                .clone()
                .any(|m| matches!(m.stage, Stage::Claiming | Stage::Rewinding));
            let waits = !place.queue.is_empty() && !comes && !place.claims_fail;
            assert!(
                !waits || runs(*id) > 0,
                "{served:?} is served again while {id:?} starves"
            );
        }
    }

    fn refuse(&mut self, ticket: Ticket, refusal: Refusal) {
        self.see(refusal);
        let caller = self.callers.remove(&ticket).expect("refused twice");
        let now = self.now;
        let place = self.place(caller.function);
        let before = place.queue.len();
        place.queue.retain(|waiting| *waiting != ticket);
        assert_eq!(place.queue.len() + 1, before, "refused what was granted");
        match refusal {
            Refusal::QueueFull => assert!(place.queue.len() >= place.limits.queue_max),
            Refusal::DeadlinePassed | Refusal::MachineFull => assert!(caller.deadline <= now),
            Refusal::ClaimsFail => assert!(place.claims_fail),
            Refusal::Closed => assert!(!place.is_open),
            Refusal::TooBig => {
                let shape = place.limits.shape;
                assert!(!self.rules.could_run(shape));
            }
        }
        self.refused += 1;
    }

    /// What must hold between any two steps.
    fn account(&mut self) {
        let rules = self.rules;
        let (mut memory, mut vcpus, mut ahead) = (0, 0, 0);
        for monitor in self.monitors.values_mut() {
            monitor.note_cost(&rules);
            memory += monitor.cost_mib;
            match monitor.stage {
                Stage::Granted(_) => vcpus += u64::from(monitor.shape.vcpus),
                Stage::Preparing | Stage::Claiming => ahead += 1,
                _ => {}
            }
        }
        assert!(memory <= rules.memory_mib, "memory is over its budget");
        assert!(vcpus <= rules.vcpus, "processors are over their budget");
        assert!(ahead <= rules.background_max, "too much is made ahead");
        let node = self.schedule.node();
        assert_eq!((node.memory_mib, node.vcpus), (memory, vcpus));
        for (id, place) in &self.functions {
            let runs = self.monitors.values().filter(|monitor| {
                monitor.function == Some(*id) && matches!(monitor.stage, Stage::Granted(_))
            });
            let limits = &place.limits;
            assert!(
                runs.count() <= limits.concurrency_max,
                "{id:?} runs too much"
            );
            // Those whose claim failed stand in front, beyond the bound: they had a place before.
            let again = |t: &&Ticket| self.callers.get(t).is_some_and(|c| c.attempts > 1);
            let waits = place.queue.len() - place.queue.iter().filter(again).count();
            assert!(waits <= limits.concurrency_max + limits.queue_max);
        }
        let now = self.now;
        let waiting = self.functions.values().flat_map(|place| &place.queue);
        if let Some(first) = waiting.map(|ticket| self.callers[ticket].deadline).min() {
            assert!(first > now, "a deadline passed in the queue unnoticed");
            let wake = self.wake.map(|(at, _)| at);
            assert!(
                wake.is_some_and(|at| at <= first),
                "nobody wakes for a deadline"
            );
        }
    }

    fn monitor(&mut self, vm: VmId) -> &mut Monitor {
        self.monitors
            .get_mut(&vm)
            .expect("there is no such monitor")
    }

    fn place(&mut self, id: FunctionId) -> &mut Place {
        self.functions
            .get_mut(&id)
            .expect("there is no such function")
    }
}

impl Monitor {
    /// What it costs, MiB; until it is reaped what it had.
    fn note_cost(&mut self, rules: &Rules) {
        let idle = self.shape.memory_mib.div_ceil(rules.idle_divisor);
        let share = match self.stage {
            Stage::Preparing | Stage::Shell => 0,
            Stage::Claiming => idle,
            Stage::Ready if !self.has_run => idle,
            Stage::Ready | Stage::Granted(_) | Stage::Rewinding => self.shape.memory_mib,
            Stage::Ending => return,
        };
        self.cost_mib = u64::from(rules.overhead_mib + share);
    }
}

impl Rules {
    fn could_run(&self, shape: super::Shape) -> bool {
        u64::from(self.overhead_mib + shape.memory_mib) <= self.memory_mib
            && u64::from(shape.vcpus) <= self.vcpus
    }
}
