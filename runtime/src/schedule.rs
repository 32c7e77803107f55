//! The node's decisions as one plain state machine: which monitor is made, claimed, granted, rewound or destroyed, who waits and
//! who is refused. No clock, no task, no lock, no I/O: the driver (`node`) tells the time and carries out the effects, and
//! the simulation (`schedule::simulation`) does the same with time and faults of its own making.
//!
//! A monitor's way: a *shell* (made ahead, of one size) → claimed for a function, ahead (paused, *ready*) or for a request
//! (*starting*, then *running*) → *rewinding* → ready again, or destroyed. Without a shell a claim makes its monitor first.
//!
//! The rules, each in one sentence:
//! - **Memory:** a monitor that runs or has run costs its function's whole memory and an overhead; a shell costs the overhead;
//!   a sandbox that never ran costs the overhead and a named share of its memory, as it has written next to nothing; the
//!   sum stays below the budget, so the kernel never has to choose a victim.
//! - **Processors:** the virtual CPUs of what runs stay below the budget, which is a multiple of the machine's.
//! - **Fairness:** the next place goes to the waiting function that uses the smallest share of the machine now (the larger
//!   of its shares of memory and of processors); among equals to the one served longest ago. When that one's request
//!   does not fit, nobody else's goes ahead of it, and idle sandboxes are destroyed to make room.
//! - **Pools:** a function keeps its configured number of ready sandboxes and as many as ran at once at the peak of the last
//!   one to two keep-alive periods; what is above goes, oldest first.
//! - **Failures:** claims of a function that fail in a row are tried ever more rarely, and its callers are told.

mod class;
mod function;
mod ledger;
mod settle;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use self::class::Class;
use self::function::{Function, Waiting};
use self::ledger::{Ledger, Origin, Phase, Vm};

/// A moment: time since the node began.
pub(crate) type Time = Duration;

/// One caller's place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ticket(pub(crate) u64);

/// One function, from its pool's opening to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FunctionId(pub(crate) u64);

/// One monitor, from before it is made until it is reaped. The schedule gives the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct VmId(pub(crate) u64);

/// A size class: shells of one shape fit all functions of that shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shape {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    /// There is a network device.
    pub(crate) network: bool,
}

/// The node's limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Memory of all monitors in the worst case.
    pub(crate) memory_mib: u64,
    /// Virtual CPUs that run at once.
    pub(crate) vcpus: u64,
    /// What a monitor costs beside its guest's memory.
    pub(crate) overhead_mib: u32,
    /// A sandbox that never ran counts with this fraction of its memory: 1/`idle_divisor`.
    pub(crate) idle_divisor: u32,
    /// Shells made and claims ahead of demand, at once; at least 1.
    pub(crate) background_max: usize,
    /// Shells kept for each size class.
    pub(crate) shells_per_class: usize,
    /// Shells kept in all.
    pub(crate) shells_max: usize,
    /// Shortest time between two beginnings of shells.
    pub(crate) shell_interval: Duration,
    /// The window over which the peak of demand is remembered.
    pub(crate) keep_alive: Duration,
    /// What becomes of a sandbox after its invocation.
    pub(crate) recycle: Recycle,
}

/// What becomes of a sandbox after an invocation that went well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recycle {
    /// It is rewound, unless that fails or costs more than a claim.
    #[default]
    Rewind,
    /// It is destroyed, and another takes its place.
    Replace,
    /// It is used again as it is. For measurements alone: the next invocation finds what this one left.
    Reuse,
}

/// A function's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) shape: Shape,
    pub(crate) ready_min: usize,
    pub(crate) concurrency_max: usize,
    pub(crate) queue_max: usize,
}

/// How a sandbox was had for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Start {
    /// There was no shell: the monitor was started for this request.
    Cold,
    /// It was claimed from a shell, for this request or ahead of it, and has run nothing else.
    Claimed,
    /// It had run before and was rewound.
    Rewound,
    /// It had run before and was not cleaned (measurements only).
    Warm,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// A function can be invoked from now on.
    Add(FunctionId, Limits),
    /// So many of a function's sandboxes are to be ready from now on, at least. Nothing if the function is gone.
    KeepReady(FunctionId, usize),
    /// A function takes no more callers; its sandboxes are to go. Ends with [`Effect::Gone`].
    Remove(FunctionId),
    /// A caller wants a sandbox until `deadline`.
    Ask {
        ticket: Ticket,
        function: FunctionId,
        deadline: Time,
        turn: Turn,
    },
    /// A caller went away. Nothing if it does not wait.
    Leave(Ticket),
    /// A shell is ready; it took so long.
    Prepared(VmId, Duration),
    /// A shell could not be made.
    PrepareFailed(VmId),
    /// A claim, ahead or for a request, has come to its end; it took so long.
    Claimed(VmId, Duration),
    /// A claim has failed. If it was for a request, nothing of the request ran, and its caller may ask again.
    ClaimFailed(VmId),
    /// A caller returns what it was granted, untouched.
    GaveBack(VmId),
    /// A caller is done with its sandbox.
    Finished(VmId, Verdict),
    /// A rewind has come to its end; it took so long.
    Rewound(VmId, Duration),
    /// A rewind has failed.
    RewindFailed(VmId),
    /// A monitor that was idle, or granted and not yet used, is found dead.
    Lost(VmId),
    /// A destroyed monitor is gone.
    Reaped(VmId),
    /// The time of an [`Effect::WakeAt`] has come.
    Woke,
    /// No more functions; everything is to go.
    Close,
}

/// Where in its function's queue a caller stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// At the end, if there is a place.
    Last,
    /// In front: it had its turn, and what it was granted failed before anything ran.
    Again,
}

/// Whether a sandbox may be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The function answered.
    Clean,
    /// The guest died or was cut off, or the monitor failed.
    Spoilt,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Make a shell.
    Prepare(VmId, Shape),
    /// Give this monitor, a shell or one that is still to be made, the function's snapshot, and leave it paused.
    Claim(VmId, FunctionId),
    /// This caller has this monitor: a ready sandbox, a shell to be claimed, or one that is still to be made.
    Grant {
        ticket: Ticket,
        vm: VmId,
        start: Start,
    },
    /// This caller gets none.
    Refuse(Ticket, Refusal),
    /// Put this sandbox of this function back to its snapshot.
    Rewind(VmId, FunctionId),
    /// Tear this monitor down, if there is one.
    Destroy(VmId),
    /// Nothing of this function is left.
    Gone(FunctionId),
    /// Say [`Input::Woke`] at this time; replaces the one before.
    WakeAt(Time),
}

/// Why a caller gets no sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many wait for the function as may.
    QueueFull,
    /// Its deadline passed while the function ran as much as it may, or none of its sandboxes came free.
    DeadlinePassed,
    /// Its deadline passed while the machine had no room.
    MachineFull,
    /// The function is larger than the machine's budget.
    TooBig,
    /// Claims of the function fail, again and again.
    ClaimsFail,
    /// The function takes no more callers.
    Closed,
}

/// What a moment was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Deadline(Ticket),
    Window(FunctionId),
    Retry(FunctionId),
    RetryShell(Shape),
    NextShell,
}

/// The state of the node.
#[derive(Debug)]
pub(crate) struct Schedule {
    rules: Rules,
    now: Time,
    open: bool,
    ledger: Ledger,
    functions: BTreeMap<FunctionId, Function>,
    classes: BTreeMap<Shape, Class>,
    /// Every waiting ticket's function.
    tickets: BTreeMap<Ticket, FunctionId>,
    /// Functions for which somebody waits.
    waiting: BTreeSet<FunctionId>,
    /// Functions that want a sandbox ahead of demand.
    short: BTreeSet<FunctionId>,
    /// Functions whose state changed in this step.
    touched: BTreeSet<FunctionId>,
    timers: BTreeSet<(Time, Timer)>,
    armed: Option<Time>,
    next_shell_at: Time,
    next_vm: u64,
    turn: u64,
    /// The machine had no room for the request whose turn it was.
    full: bool,
    out: Vec<Effect>,
}

/// The node at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeCounts {
    pub(crate) shells: usize,
    pub(crate) memory_mib: u64,
    pub(crate) vcpus: u64,
}

/// A function at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FunctionCounts {
    pub(crate) ready: usize,
    pub(crate) claiming: usize,
    pub(crate) running: usize,
    pub(crate) rewinding: usize,
    pub(crate) waiting: usize,
    /// A sandbox should be made ahead, and the machine has no room for it.
    pub(crate) is_held_back: bool,
}

impl Schedule {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            now: Time::ZERO,
            open: true,
            ledger: Ledger::new(rules),
            functions: BTreeMap::new(),
            classes: BTreeMap::new(),
            tickets: BTreeMap::new(),
            waiting: BTreeSet::new(),
            short: BTreeSet::new(),
            touched: BTreeSet::new(),
            timers: BTreeSet::new(),
            armed: None,
            next_shell_at: Time::ZERO,
            next_vm: 0,
            turn: 0,
            full: false,
            out: Vec::new(),
        }
    }

    /// Closed, and no monitor is left.
    #[cfg(test)]
    pub(crate) fn is_drained(&self) -> bool {
        !self.open && self.ledger.is_empty()
    }

    pub(crate) fn node(&self) -> NodeCounts {
        NodeCounts {
            shells: self.classes.values().map(Class::ready).sum(),
            memory_mib: self.ledger.used_mib(),
            vcpus: self.ledger.vcpus(),
        }
    }

    /// Nothing of a function that is gone.
    pub(crate) fn function(&self, id: FunctionId) -> FunctionCounts {
        let Some(function) = self.functions.get(&id) else {
            return FunctionCounts::default();
        };
        FunctionCounts {
            is_held_back: function.is_short(self.now) && !self.has_room_ahead(id),
            ..function.counts()
        }
    }

    /// A function's ready sandboxes, the one that is used next at the end.
    pub(crate) fn ready(&self, id: FunctionId) -> Vec<VmId> {
        let function = self.functions.get(&id);
        function.map_or_else(Vec::new, |function| {
            function.ready.iter().copied().collect()
        })
    }

    /// Takes in what happened at `now`, and says what is to be done.
    pub(crate) fn step(&mut self, now: Time, input: Input) -> Vec<Effect> {
        self.now = self.now.max(now);
        if input == Input::Woke {
            self.armed = None;
        }
        self.expire();
        self.take(input);
        self.settle();
        std::mem::take(&mut self.out)
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Add(id, limits) => self.add(id, limits),
            Input::KeepReady(id, count) => {
                if let Some(function) = self.functions.get_mut(&id) {
                    function.limits.ready_min = count;
                    self.touched.insert(id);
                }
            }
            Input::Remove(id) => self.remove(id),
            Input::Ask {
                ticket,
                function,
                deadline,
                turn,
            } => self.ask(ticket, function, deadline, turn),
            Input::Leave(ticket) => {
                self.unqueue(ticket);
            }
            Input::Prepared(id, took) => self.prepared(id, took),
            Input::PrepareFailed(id) => self.prepare_failed(id),
            Input::Claimed(id, took) => self.claimed(id, took),
            Input::ClaimFailed(id) => self.claim_failed(id),
            Input::GaveBack(id) => self.gave_back(id),
            Input::Finished(id, verdict) => self.finished(id, verdict),
            Input::Rewound(id, took) => self.rewound(id, took),
            Input::RewindFailed(id) => {
                let function = self.function_of(id);
                function.rewind_failed();
                self.destroy(id);
            }
            Input::Lost(id) => self.destroy(id),
            Input::Reaped(id) => {
                let vm = self.lift(id);
                assert_eq!(vm.phase, Phase::Ending, "reaped what was not destroyed");
            }
            Input::Woke => {}
            Input::Close => {
                self.open = false;
                let functions: Vec<FunctionId> = self.functions.keys().copied().collect();
                for id in functions {
                    self.remove(id);
                }
            }
        }
    }

    fn add(&mut self, id: FunctionId, limits: Limits) {
        let function = Function::new(limits, self.open, self.rules.keep_alive);
        let class = self.classes.entry(limits.shape).or_default();
        if self.open {
            class.functions += 1;
        }
        let old = self.functions.insert(id, function);
        assert!(old.is_none(), "a function was added twice");
        self.touched.insert(id);
    }

    fn remove(&mut self, id: FunctionId) {
        let Some(function) = self.functions.get_mut(&id) else {
            return;
        };
        if !std::mem::replace(&mut function.open, false) {
            return;
        }
        let shape = function.limits.shape;
        let tickets: Vec<Ticket> = function.queue.iter().map(|w| w.ticket).collect();
        let ready: Vec<VmId> = function.ready.iter().copied().collect();
        for ticket in tickets {
            self.refuse(ticket, Refusal::Closed);
        }
        for vm in ready {
            self.destroy(vm);
        }
        self.touched.insert(id);
        let class = self.classes.entry(shape).or_default();
        class.functions -= 1;
        if class.functions == 0 {
            for vm in class.shells.clone() {
                self.destroy(vm);
            }
        }
    }

    fn ask(&mut self, ticket: Ticket, id: FunctionId, deadline: Time, turn: Turn) {
        let refusal = match self.functions.get(&id) {
            None => Some(Refusal::Closed),
            Some(function) if !function.open => Some(Refusal::Closed),
            Some(function) if !self.ledger.could_ever_run(function.limits.shape) => {
                Some(Refusal::TooBig)
            }
            Some(_) if deadline <= self.now => Some(Refusal::DeadlinePassed),
            Some(function) if turn == Turn::Last && function.is_full() => Some(Refusal::QueueFull),
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            self.out.push(Effect::Refuse(ticket, refusal));
            return;
        }
        let queue = &mut self.functions.get_mut(&id).expect("found above").queue;
        let waiting = Waiting { ticket, deadline };
        match turn {
            Turn::Last => queue.push_back(waiting),
            Turn::Again => queue.push_front(waiting),
        }
        self.tickets.insert(ticket, id);
        self.waiting.insert(id);
        self.timers.insert((deadline, Timer::Deadline(ticket)));
        self.touched.insert(id);
    }

    /// Takes a caller out of the queue; tells whose it was.
    fn unqueue(&mut self, ticket: Ticket) -> Option<FunctionId> {
        let id = self.tickets.remove(&ticket)?;
        let function = self
            .functions
            .get_mut(&id)
            .expect("a function outlives its queue");
        let place = function.queue.iter().position(|w| w.ticket == ticket);
        let waiting = place.and_then(|place| function.queue.remove(place));
        let deadline = waiting.expect("a ticket stands in a queue").deadline;
        if function.queue.is_empty() {
            self.waiting.remove(&id);
        }
        self.timers.remove(&(deadline, Timer::Deadline(ticket)));
        self.touched.insert(id);
        Some(id)
    }

    fn refuse(&mut self, ticket: Ticket, refusal: Refusal) {
        if self.unqueue(ticket).is_some() {
            self.out.push(Effect::Refuse(ticket, refusal));
        }
    }

    fn prepared(&mut self, id: VmId, took: Duration) {
        let mut vm = self.lift(id);
        assert_eq!(vm.phase, Phase::Preparing, "a shell was made unasked");
        vm.phase = Phase::Shell;
        vm.spent = took;
        let shape = vm.shape;
        self.place(id, vm);
        let class = self.classes.entry(shape).or_default();
        class.backoff.succeeded();
        if class.functions == 0 || !self.open {
            self.destroy(id);
        }
    }

    fn prepare_failed(&mut self, id: VmId) {
        let shape = self.ledger.get(id).shape;
        self.destroy(id);
        let class = self.classes.entry(shape).or_default();
        if let Some(until) = class.backoff.failed(self.now) {
            self.timers.insert((until, Timer::RetryShell(shape)));
        }
    }

    fn claimed(&mut self, id: VmId, took: Duration) {
        let mut vm = self.lift(id);
        vm.phase = match vm.phase {
            Phase::Claiming => Phase::Ready,
            Phase::Starting(_) => Phase::Running,
            other => unreachable!("a claim ended in {other:?}"),
        };
        let (cost, ready) = (vm.spent + took, vm.phase == Phase::Ready);
        self.place(id, vm);
        let function = self.function_of(id);
        function.backoff.succeeded();
        function.claim_cost.note(cost);
        if ready && !function.open {
            self.destroy(id);
        }
    }

    fn claim_failed(&mut self, id: VmId) {
        let phase = self.ledger.get(id).phase;
        assert!(
            matches!(phase, Phase::Claiming | Phase::Starting(_)),
            "a claim failed in {phase:?}"
        );
        let now = self.now;
        let until = self.function_of(id).backoff.failed(now);
        let function = self.ledger.get(id).function;
        if let (Some(until), Some(function)) = (until, function) {
            self.timers.insert((until, Timer::Retry(function)));
        }
        self.destroy(id);
    }

    fn gave_back(&mut self, id: VmId) {
        let mut vm = self.lift(id);
        match vm.phase {
            // Its channel was not touched: it is as it was granted.
            Phase::Running => vm.phase = Phase::Ready,
            Phase::Starting(Origin::Shell) => {
                vm.phase = Phase::Shell;
                vm.function = None;
            }
            // There is nothing yet.
            Phase::Starting(Origin::Nothing) => return,
            other => unreachable!("a sandbox was given back in {other:?}"),
        }
        let (phase, shape) = (vm.phase, vm.shape);
        self.place(id, vm);
        let wanted = match phase {
            Phase::Shell => self.open && self.classes.entry(shape).or_default().functions > 0,
            _ => self.function_of(id).open,
        };
        if !wanted {
            self.destroy(id);
        }
    }

    fn finished(&mut self, id: VmId, verdict: Verdict) {
        let mut vm = self.lift(id);
        assert!(
            matches!(vm.phase, Phase::Running | Phase::Starting(_)),
            "a sandbox finished in {:?}",
            vm.phase
        );
        vm.has_run = true;
        vm.phase = Phase::Rewinding;
        let of = vm.function.expect("what runs runs a function");
        self.place(id, vm);
        let recycle = self.rules.recycle;
        let function = self.function_of(id);
        if verdict == Verdict::Spoilt || !function.open || function.has_surplus() {
            return self.destroy(id);
        }
        match recycle {
            Recycle::Replace => self.destroy(id),
            Recycle::Rewind if function.should_rewind() => {
                self.out.push(Effect::Rewind(id, of));
            }
            Recycle::Rewind => self.destroy(id),
            Recycle::Reuse => self.make_ready(id, Start::Warm),
        }
    }

    fn rewound(&mut self, id: VmId, took: Duration) {
        let phase = self.ledger.get(id).phase;
        assert_eq!(phase, Phase::Rewinding, "a rewind ended that was not begun");
        let function = self.function_of(id);
        function.rewound(took);
        if function.open {
            self.make_ready(id, Start::Rewound);
        } else {
            self.destroy(id);
        }
    }

    fn make_ready(&mut self, id: VmId, next: Start) {
        let mut vm = self.lift(id);
        vm.phase = Phase::Ready;
        vm.next = next;
        self.place(id, vm);
    }

    fn destroy(&mut self, id: VmId) {
        let mut vm = self.lift(id);
        assert_ne!(vm.phase, Phase::Ending, "a monitor was destroyed twice");
        vm.phase = Phase::Ending;
        self.place(id, vm);
        self.out.push(Effect::Destroy(id));
    }

    fn function_of(&mut self, id: VmId) -> &mut Function {
        let function = self.ledger.get(id).function;
        let function = function.and_then(|function| self.functions.get_mut(&function));
        function.expect("a function outlives its sandboxes")
    }

    /// A monitor taken out of every account, to be changed and placed again.
    fn lift(&mut self, id: VmId) -> Vm {
        let vm = self.ledger.lift(id);
        let class = self.classes.entry(vm.shape).or_default();
        class.lift(id, &vm);
        if let Some(function) = vm.function {
            self.touched.insert(function);
            let function = self.functions.get_mut(&function);
            function
                .expect("a function outlives its sandboxes")
                .lift(id, &vm);
        }
        vm
    }

    fn place(&mut self, id: VmId, vm: Vm) {
        let class = self.classes.entry(vm.shape).or_default();
        class.place(id, &vm);
        if let Some(function) = vm.function {
            self.touched.insert(function);
            let function = self.functions.get_mut(&function);
            function
                .expect("a function outlives its sandboxes")
                .place(id, &vm);
        }
        self.ledger.place(id, vm);
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
