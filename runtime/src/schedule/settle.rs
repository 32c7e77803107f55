//! After each input: whose turn it is, what must make room, what is made ahead.

use std::collections::BTreeSet;

use super::ledger::{Origin, Phase, Vm};
use super::{Effect, FunctionId, Refusal, Schedule, Shape, Start, Ticket, Time, Timer, VmId};

/// What came of a function's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// Its first caller has a sandbox.
    Yes,
    /// It waits for something of its own: its limit, a sandbox that is coming, the end of a pause.
    Waits,
    /// The machine has no processor free.
    NoProcessor,
    /// The machine has no memory free.
    NoMemory,
}

impl Schedule {
    /// Tells those whose time is over, and notes the ends of pauses and periods.
    pub(super) fn expire(&mut self) {
        while let Some((at, timer)) = self.timers.first().copied()
            && at <= self.now
        {
            self.timers.remove(&(at, timer));
            match timer {
                Timer::Deadline(ticket) => {
                    let refusal = self.why_late(ticket);
                    self.refuse(ticket, refusal);
                }
                Timer::Window(id) => {
                    let Some(function) = self.functions.get_mut(&id) else {
                        continue;
                    };
                    self.touched.insert(id);
                    if let Some(ends) = function.demand.turn_over(function.running, self.now) {
                        self.timers.insert((ends, Timer::Window(id)));
                    }
                }
                Timer::Retry(id) => {
                    self.touched.insert(id);
                }
                Timer::RetryShell(_) | Timer::NextShell => {}
            }
        }
    }

    fn why_late(&self, ticket: Ticket) -> Refusal {
        let function = self.tickets.get(&ticket);
        let function = function.and_then(|id| self.functions.get(id));
        match function {
            Some(function) if self.full && function.free_places() > 0 => Refusal::MachineFull,
            _ => Refusal::DeadlinePassed,
        }
    }

    /// Brings the node as near to its rules as it may be now. Idempotent.
    pub(super) fn settle(&mut self) {
        for id in self.touched.clone() {
            self.refuse_the_hopeless(id);
        }
        let served = self.serve();
        self.full = matches!(served, Served::NoMemory | Served::NoProcessor);
        for id in self.touched.clone() {
            self.trim(id);
        }
        // Memory that a request waits for is not given to what nobody has asked for yet.
        if self.open && served != Served::NoMemory {
            self.make_ahead();
        }
        for id in std::mem::take(&mut self.touched) {
            self.forget(id);
        }
        self.arm();
    }

    /// Nobody waits for what is not coming. The last come is the first to go.
    fn refuse_the_hopeless(&mut self, id: FunctionId) {
        while let Some(function) = self.functions.get(&id)
            && function.backoff.is_paused(self.now)
            && function.queue.len() > function.ready.len() + function.incoming()
            && let Some(last) = function.queue.back()
        {
            self.refuse(last.ticket, Refusal::ClaimsFail);
        }
    }

    /// Gives out what there is, in the order of fairness, until somebody's turn comes who must wait for the machine.
    fn serve(&mut self) -> Served {
        let mut passed = BTreeSet::new();
        while let Some(id) = self.whose_turn(&passed) {
            match self.serve_one(id) {
                Served::Yes => {}
                Served::Waits => {
                    passed.insert(id);
                }
                full => return full,
            }
        }
        Served::Waits
    }

    fn whose_turn(&self, passed: &BTreeSet<FunctionId>) -> Option<FunctionId> {
        let waiting = self.waiting.iter().filter(|id| !passed.contains(id));
        waiting.copied().min_by_key(|id| self.rank(*id))
    }

    /// Dominant share of the machine in millionths, then the time of the last service.
    fn rank(&self, id: FunctionId) -> (u128, u64) {
        let Some(function) = self.functions.get(&id) else {
            return (u128::MAX, u64::MAX);
        };
        let (shape, running) = (function.limits.shape, function.running as u128);
        let share = |each: u64, whole: u64| {
            running * u128::from(each) * 1_000_000 / u128::from(whole.max(1))
        };
        let memory = share(self.ledger.full_mib(shape), self.rules.memory_mib);
        let vcpus = share(u64::from(shape.vcpus), self.rules.vcpus);
        (memory.max(vcpus), function.turn)
    }

    fn serve_one(&mut self, id: FunctionId) -> Served {
        let function = &self.functions[&id];
        let shape = function.limits.shape;
        if function.free_places() == 0 {
            return Served::Waits;
        }
        let ready = function.ready.back().copied();
        let may_claim = function.may_claim(self.now);
        if ready.is_none() && (!may_claim || self.is_covered(id)) {
            return Served::Waits;
        }
        if u64::from(shape.vcpus) > self.ledger.free_vcpus() {
            return Served::NoProcessor;
        }
        let shell = self.classes.get(&shape).and_then(|c| c.shells.last());
        let vm = ready.or(shell.copied());
        let extra = match vm {
            Some(vm) => self.ledger.extra_to_run(vm),
            None => self.ledger.full_mib(shape),
        };
        if !self.ledger.fits(extra) {
            self.make_room(extra, vm);
            return Served::NoMemory;
        }
        self.grant(id, vm);
        Served::Yes
    }

    /// Whether all that could run now for this function have a sandbox that is coming without another claim.
    fn is_covered(&self, id: FunctionId) -> bool {
        let function = &self.functions[&id];
        let fit = self.ledger.free_vcpus() / u64::from(function.limits.shape.vcpus).max(1);
        let fit = usize::try_from(fit).unwrap_or(usize::MAX).max(1);
        let places = function.queue.len().min(function.free_places()).min(fit);
        function.incoming() >= places
    }

    fn grant(&mut self, function: FunctionId, vm: Option<VmId>) {
        let (id, mut vm, start) = match vm {
            Some(id) => {
                let mut vm = self.lift(id);
                let start = vm.next;
                vm.phase = match vm.phase {
                    Phase::Shell => Phase::Starting(Origin::Shell),
                    _ => Phase::Running,
                };
                (id, vm, start)
            }
            None => {
                let shape = self.functions[&function].limits.shape;
                let vm = Vm::new(shape, Phase::Starting(Origin::Nothing));
                (self.fresh_vm(), vm, Start::Cold)
            }
        };
        vm.function = Some(function);
        self.place(id, vm);
        self.turn += 1;
        let (now, turn) = (self.now, self.turn);
        let entry = self.functions.get_mut(&function).expect("it was served");
        entry.turn = turn;
        if let Some(ends) = entry.demand.note(entry.running, now) {
            self.timers.insert((ends, Timer::Window(function)));
        }
        let ticket = entry.queue.front().expect("somebody waits").ticket;
        self.unqueue(ticket);
        self.out.push(Effect::Grant {
            ticket,
            vm: id,
            start,
        });
    }

    /// Destroys what is idle until `extra` MiB fit or will: the longest idle sandbox first, shells at last; never `keep`.
    fn make_room(&mut self, extra: u64, keep: Option<VmId>) {
        while !self.ledger.will_fit(extra) {
            let idle = self.ledger.idle().find(|id| Some(*id) != keep);
            let shells = self.classes.values().flat_map(|class| &class.shells);
            let victim = idle.or(shells.copied().find(|id| Some(*id) != keep));
            match victim {
                Some(victim) => self.destroy(victim),
                None => return,
            }
        }
    }

    /// Destroys what demand does not explain any more, and notes whether something is missing.
    fn trim(&mut self, id: FunctionId) {
        while let Some(function) = self.functions.get(&id)
            && function.has_surplus()
            && let Some(oldest) = function.ready.front().copied()
        {
            self.destroy(oldest);
        }
        self.note_short(id);
    }

    fn note_short(&mut self, id: FunctionId) {
        let function = self.functions.get(&id);
        if function.is_some_and(|function| function.is_short(self.now)) {
            self.short.insert(id);
        } else {
            self.short.remove(&id);
        }
    }

    /// Sandboxes and shells ahead of demand, a few at a time.
    fn make_ahead(&mut self) {
        while self.ledger.background() < self.rules.background_max {
            if let Some(id) = self.shortest() {
                self.claim_ahead(id);
            } else if let Some(shape) = self.class_without_shells() {
                let id = self.fresh_vm();
                self.place(id, Vm::new(shape, Phase::Preparing));
                self.next_shell_at = self.now.saturating_add(self.rules.shell_interval);
                self.out.push(Effect::Prepare(id, shape));
            } else {
                return;
            }
        }
    }

    /// Whether one more idle sandbox of a function fits beside all that is there.
    pub(super) fn has_room_ahead(&self, id: FunctionId) -> bool {
        let shape = self.functions[&id].limits.shape;
        let idle = self.ledger.idle_mib(shape);
        let has_shell = self.classes.get(&shape).is_some_and(|c| c.ready() > 0);
        let there = if has_shell {
            self.ledger.shell_mib()
        } else {
            0
        };
        self.ledger.could_ever_run(shape) && self.ledger.fits(idle - there)
    }

    /// Of the functions that are short and fit, the one with the fewest sandboxes to come.
    fn shortest(&self) -> Option<FunctionId> {
        let fits = |id: &&FunctionId| self.has_room_ahead(**id);
        let supply = |id: &&FunctionId| {
            let function = &self.functions[*id];
            (function.ready.len() + function.incoming(), **id)
        };
        self.short.iter().filter(fits).min_by_key(supply).copied()
    }

    fn claim_ahead(&mut self, function: FunctionId) {
        let shape = self.functions[&function].limits.shape;
        let shell = self.classes.get(&shape).and_then(|c| c.shells.last());
        let (id, mut vm) = match shell.copied() {
            Some(shell) => (shell, self.lift(shell)),
            None => (self.fresh_vm(), Vm::new(shape, Phase::Claiming)),
        };
        vm.function = Some(function);
        vm.phase = Phase::Claiming;
        self.place(id, vm);
        self.note_short(function);
        self.out.push(Effect::Claim(id, function));
    }

    /// A class that wants a shell and may have one now. When only time stands in the way, the timer is set.
    fn class_without_shells(&mut self) -> Option<Shape> {
        let made: usize = self.classes.values().map(|c| c.ready() + c.preparing).sum();
        if made >= self.rules.shells_max || !self.ledger.fits(self.ledger.shell_mib()) {
            return None;
        }
        let (now, wanted) = (self.now, self.rules.shells_per_class);
        let classes = self.classes.iter().filter(|(_, class)| {
            class.functions > 0
                && class.ready() + class.preparing < wanted
                && class.backoff.allows(class.preparing, now)
        });
        let fewest = classes.min_by_key(|(_, class)| class.ready() + class.preparing);
        let shape = *fewest?.0;
        if now < self.next_shell_at {
            self.timers.insert((self.next_shell_at, Timer::NextShell));
            return None;
        }
        Some(shape)
    }

    fn forget(&mut self, id: FunctionId) {
        let function = self.functions.get(&id);
        if function.is_some_and(|function| !function.open && function.alive == 0) {
            self.functions.remove(&id);
            self.short.remove(&id);
            self.out.push(Effect::Gone(id));
        }
    }

    fn fresh_vm(&mut self) -> VmId {
        self.next_vm += 1;
        VmId(self.next_vm)
    }

    fn arm(&mut self) {
        self.classes.retain(|_, class| !class.is_unused());
        let Some((at, _)) = self.timers.first() else {
            return;
        };
        if self
            .armed
            .is_none_or(|armed: Time| *at < armed || armed <= self.now)
        {
            self.armed = Some(*at);
            self.out.push(Effect::WakeAt(*at));
        }
    }
}
