//! One monitor, from a shell to its end: claims, invocations and rewinds.

pub(crate) mod answer;
#[cfg(test)]
mod hostile;
pub(crate) mod life;
pub(crate) mod settle;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, clock_gettime};
use thaw_agent_protocol::{Generation, HostMessage, Invoke, Thaw};
use thaw_vmm_control::{
    Disk, DiskAccess, DiskShape, DiskSource, Failure, Fault, Paging, Prefetch, PrepareRequest,
    Request, RestoreRequest, Rewound, Timings, WorkingSetRun,
};
use tokio::time::Instant;

use self::answer::{Answer, Taken};
use self::life::{Begin, Input, Life, Step};
use self::settle::Unsettled;
use crate::channel::AgentChannel;
use crate::monitor::{Size, Spawner, socket_pair};
use crate::network::{Plug, Socket};
use crate::node::{Lesson, Watched};
use crate::points::Point;
use crate::schedule::{Shape, Start};
use crate::vm::{Vm, after};
use crate::{
    End, HostError, Invocation, InvocationTimings, InvokeError, Measure, Outcome, RuntimeConfig,
};

/// How long a monitor may take to tell why the agent's channel closed.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);
/// Bytes for the clone's kernel generator, see [`Thaw::entropy`].
const ENTROPY_BYTES: usize = 64;
/// Names of the disks, in the order of /dev/vda, /dev/vdb, /dev/vdc; the same for boot and restore.
pub(crate) const DISK_IDS: [&str; 3] = ["rootfs", "code", "overlay"];

/// What the guest may do with each disk, and where a restore takes its content from.
const DISKS: [(DiskAccess, DiskSource); 3] = [
    (DiskAccess::ReadOnly, DiskSource::Descriptor),
    (DiskAccess::ReadOnly, DiskSource::Descriptor),
    (DiskAccess::CopyOnWrite, DiskSource::Snapshot),
];

/// Whether a restored VM runs at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    AtOnce,
    Later,
}

fn restore(run: Run, files: &SnapshotFiles, tap: Option<&OwnedFd>) -> Request {
    let disks = DISK_IDS.iter().zip(DISKS);
    let disks = disks.map(|(id, (access, source))| Disk {
        id: (*id).into(),
        access,
        source,
    });
    Request::Restore(RestoreRequest {
        disks: disks.collect(),
        resume: run == Run::AtOnce,
        has_base: files.base.is_some() && files.paging != Paging::Store,
        prefetch: Prefetch::WorkingSet,
        paging: files.paging,
        has_tap: tap.is_some(),
    })
}

/// What every VM of a pool is restored from; opened once, handed to each monitor as descriptors.
#[derive(Debug)]
pub(crate) struct SnapshotFiles {
    pub(crate) snapshot: std::fs::File,
    /// What the snapshot is a difference over; or the folder of the store that has its memory.
    pub(crate) base: Option<std::fs::File>,
    /// How guests' memory is brought in.
    pub(crate) paging: Paging,
    /// What a guest can write to its copy-on-write disk.
    pub(crate) disk_bytes: u64,
    pub(crate) rootfs: std::fs::File,
    pub(crate) code: std::fs::File,
}

impl SnapshotFiles {
    /// In the order that [`Request::Restore`] names.
    fn fds<'a>(&'a self, tap: Option<&'a OwnedFd>) -> Vec<BorrowedFd<'a>> {
        let Self {
            snapshot,
            base,
            paging: _,
            disk_bytes: _,
            rootfs,
            code,
        } = self;
        let files = [Some(snapshot), base.as_ref(), Some(rootfs), Some(code)];
        let files = files.into_iter().flatten().map(AsFd::as_fd);
        files.chain(tap.map(AsFd::as_fd)).collect()
    }

    /// The same files under new descriptors.
    pub(crate) fn again(&self) -> std::io::Result<Self> {
        let again = std::fs::File::try_clone;
        Ok(Self {
            snapshot: again(&self.snapshot)?,
            base: self.base.as_ref().map(again).transpose()?,
            paging: self.paging,
            disk_bytes: self.disk_bytes,
            rootfs: again(&self.rootfs)?,
            code: again(&self.code)?,
        })
    }
}

/// One monitor with its agent channel: first a shell, then a VM of one snapshot, in which one invocation runs after another,
/// with a rewind between any two.
#[derive(Debug)]
pub(crate) struct Sandbox {
    vm: Vm,
    /// What it was made for.
    size: Size,
    stage: Stage,
    /// The generation of its newest life.
    generation: Generation,
    /// What its guest has touched is to be asked for before it is rewound or destroyed.
    lesson: Option<Lesson>,
    /// Its last invocation is not over for its guest.
    unsettled: Option<Unsettled>,
    /// The network of its present life.
    network: Option<Socket>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It has no snapshot yet.
    Shell,
    /// Restored or rewound, and paused.
    Pristine,
    /// Something was run in it.
    Used,
}

/// Why a sandbox brought no outcome.
#[derive(Debug)]
pub(crate) enum NotRun {
    /// The monitor refused: not one instruction of the guest was run.
    Surely(Arc<HostError>),
    /// The guest may have run.
    Perhaps(InvokeError),
}

impl From<HostError> for NotRun {
    fn from(error: HostError) -> Self {
        Self::Perhaps(InvokeError::Host(error.into()))
    }
}

/// A moment on `CLOCK_MONOTONIC`, the clock of the monitor's timings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Duration);

impl Moment {
    pub(crate) fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
        Self(Duration::new(seconds, nanoseconds))
    }

    fn from_ns(ns: u64) -> Self {
        Self(Duration::from_nanos(ns))
    }

    fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn elapsed(self) -> Duration {
        Self::now().since(self)
    }
}

/// Longest times of an invocation's parts.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Until the guest runs.
    claim: Duration,
    /// From there until its hooks have run, where there are any.
    hooks: Duration,
    /// From there until it answers.
    function: Duration,
}

/// An invocation's moments on the host's side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moments {
    pub(crate) asked: Moment,
    pub(crate) claimed: Moment,
    pub(crate) answered: Moment,
}

impl Sandbox {
    /// A monitor without a VM.
    pub(crate) async fn spawn(spawner: &Spawner, size: Size) -> Result<Self, HostError> {
        let (monitor, channel) = spawner.spawn(size).await?;
        Ok(Self {
            vm: Vm::new(monitor, channel),
            size,
            stage: Stage::Shell,
            generation: Generation(0),
            lesson: None,
            unsettled: None,
            network: None,
        })
    }

    /// Makes it a shell with everything that needs no snapshot.
    pub(crate) async fn prepare(
        &mut self,
        shape: Shape,
        config: &RuntimeConfig,
    ) -> Result<(), HostError> {
        let request = Request::Prepare(PrepareRequest {
            vcpu_count: shape.vcpus,
            memory_mib: shape.memory_mib,
            disks: DISKS.map(|(access, _)| DiskShape { access }).to_vec(),
            has_network: shape.network,
        });
        let monitor = &mut self.vm.monitor;
        monitor.command(&request, &[], config.restore_limit).await
    }

    /// Gives it a snapshot, and a tap if the snapshot has a network device, and leaves it paused.
    pub(crate) async fn claim(
        &mut self,
        files: &SnapshotFiles,
        plug: Option<Plug>,
        config: &RuntimeConfig,
    ) -> Result<(), HostError> {
        self.fit(files)?;
        let tap = self.connect(plug);
        let monitor = &mut self.vm.monitor;
        monitor
            .command(
                &restore(Run::Later, files, tap.as_ref()),
                &files.fds(tap.as_ref()),
                config.restore_limit,
            )
            .await?;
        self.stage = Stage::Pristine;
        Ok(())
    }

    /// Lets it use what this snapshot's guests may use: a shell is made for the usual disk.
    fn fit(&mut self, files: &SnapshotFiles) -> Result<(), HostError> {
        if files.disk_bytes > self.size.disk_bytes {
            self.size.disk_bytes = files.disk_bytes;
            self.vm.monitor.resize(self.size)?;
        }
        Ok(())
    }

    /// Its network is this one from now on; what its monitor is to be given. The one before is gone, with its connections.
    fn connect(&mut self, plug: Option<Plug>) -> Option<OwnedFd> {
        let (socket, tap) = plug.map(|plug| (plug.socket, plug.tap)).unzip();
        self.network = socket;
        tap
    }

    pub(crate) fn has_network(&self) -> bool {
        self.network.is_some()
    }

    /// Puts it back to its snapshot, paused, with a new agent channel and a new tap, if one is given: nothing that its last life
    /// said can come any more.
    pub(crate) async fn rewind(
        &mut self,
        plug: Option<Plug>,
        config: &RuntimeConfig,
    ) -> Result<Rewound, HostError> {
        let tap = self.connect(plug);
        let (ours, theirs) = socket_pair().map_err(HostError::Channel)?;
        let monitor = &mut self.vm.monitor;
        let fds = (theirs.as_fd(), tap.as_ref().map(AsFd::as_fd));
        let rewound = monitor.rewind(fds, config.reply_limit).await?;
        if let Some(exit) = monitor.take_exit() {
            // It ended by itself between its answer and the rewind. Whether that is undone, too, need not be found out.
            return Err(HostError::Refused {
                request: "rewind",
                source: Failure {
                    message: format!("the guest has ended: {:?} {}", exit.reason, exit.detail),
                    fault: Fault::Guest,
                },
            });
        }
        self.vm.begin_anew(AgentChannel::new(ours));
        self.stage = Stage::Pristine;
        self.generation = Generation(0);
        Ok(rewound)
    }

    pub(crate) fn learn(&mut self, lesson: Option<Lesson>) {
        self.lesson = lesson;
    }

    /// The lesson, if its first life is to teach one, with what the monitor tells of that.
    pub(crate) async fn taught(
        &mut self,
        config: &RuntimeConfig,
    ) -> Option<(Lesson, Result<Vec<WorkingSetRun>, HostError>)> {
        let lesson = self.lesson.take().filter(Lesson::is_open)?;
        Some((lesson, self.working_set(config).await))
    }

    pub(crate) fn is_shell(&self) -> bool {
        self.stage == Stage::Shell
    }

    /// Process id of the monitor.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.vm.monitor.pid()
    }

    /// Whether the VM, which is paused, is as we left it.
    pub(crate) fn is_well(&mut self) -> bool {
        self.vm.monitor.is_quiet()
    }

    /// The watchdog's look at an idle VM: whether it is as we left it and has answered what it was asked. Asks it if it is its turn.
    pub(crate) fn gives_signs_of_life(&mut self, turn: Watched, limit: Duration) -> bool {
        let monitor = &mut self.vm.monitor;
        if turn == Watched::Later && !monitor.owes_life() {
            return true;
        }
        monitor.is_quiet() && (monitor.owes_life_for() < limit) && monitor.ask_for_life()
    }

    /// Frames of another generation seen.
    pub(crate) fn stale_frames(&self) -> u64 {
        self.vm.channel.stale_frames()
    }

    /// What its guest has touched of its memory.
    pub(crate) async fn working_set(
        &mut self,
        config: &RuntimeConfig,
    ) -> Result<Vec<WorkingSetRun>, HostError> {
        self.vm.monitor.working_set(config.reply_limit).await
    }

    /// Kills the VM and waits until it is gone.
    pub(crate) async fn end(self) {
        self.vm.monitor.end().await;
    }

    /// Runs one invocation; a shell is claimed in the same breath, with the tap. `begun` is called when the guest is known to run.
    /// Afterwards the sandbox is good for a rewind alone; for nothing if this failed or its future was dropped.
    pub(crate) async fn run(
        &mut self,
        invocation: &Invocation,
        (files, plug): (&SnapshotFiles, Option<Plug>),
        answer: &mut Answer,
        (asked, claimed): (Moment, Moment),
        config: &RuntimeConfig,
        begun: &mut (dyn FnMut() + Send),
    ) -> Result<Outcome, NotRun> {
        let begin = match self.stage {
            Stage::Shell => Begin::Claim,
            Stage::Pristine => Begin::Resume,
            Stage::Used => Begin::Continue,
        };
        self.stage = Stage::Used;
        self.hand_over(invocation).map_err(NotRun::Perhaps)?;
        let mut tap = None;
        if begin == Begin::Claim {
            self.fit(files)?;
            tap = self.connect(plug);
        }
        let monitor = &mut self.vm.monitor;
        match begin {
            Begin::Claim => {
                let request = restore(Run::AtOnce, files, tap.as_ref());
                monitor.send(&request, &files.fds(tap.as_ref())).await?;
            }
            Begin::Resume => monitor.send(&Request::Resume, &[]).await?,
            Begin::Continue => {}
        }
        Point::HandedOver.reached();
        let mut life = Life::new(invocation.request_id.clone(), begin);
        let limits = Limits {
            claim: config.restore_limit,
            hooks: config.hooks_limit,
            function: invocation.timeout,
        };
        let lived = self.live(&mut life, answer, begin, limits, begun).await;
        let (end, duration) = lived.map_err(|error| match error {
            NotRun::Perhaps(InvokeError::Host(error))
                if !life.has_begun() && matches!(*error, HostError::Refused { .. }) =>
            {
                NotRun::Surely(error)
            }
            error => error,
        })?;
        Point::Answered.reached();
        if life.has_extensions() {
            let left = invocation.timeout.saturating_sub(duration);
            self.unsettled = Unsettled::after(&end, left);
        }
        let end = answer.complete(end);
        let answered = Moment::now();
        let end = self.with_console(end, config).await;
        let is_answer = matches!(
            end,
            End::Response { .. } | End::FunctionError { .. } | End::RestoreError { .. }
        );
        let moments = Moments {
            asked,
            claimed,
            answered,
        };
        let timings = if invocation.measure == Measure::On && is_answer {
            let identity = life.unique_after().map(|took| took.min(duration));
            let timings = self.timings(moments, config).await;
            timings.map(|timings| InvocationTimings {
                identity,
                ..timings
            })
        } else {
            None
        };
        Ok(Outcome {
            end,
            log: life.take_log(),
            duration,
            timings,
            start: Start::Cold,
            late_log: None,
        })
    }

    /// Puts identity and request into the channel: they lie in the guest's receive queue before its first instruction.
    fn hand_over(&mut self, invocation: &Invocation) -> Result<(), InvokeError> {
        let (fresh, entropy) = fresh_identity().map_err(host)?;
        let generation = match self.generation {
            Generation(0) => fresh,
            // The same life goes on; its agent takes none but a higher one.
            Generation(used) => Generation(used.saturating_add(1)),
        };
        self.generation = generation;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let thaw = Thaw {
            unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            hostname: hostname(generation),
            entropy,
        };
        let deadline = now.saturating_add(invocation.timeout);
        let invoke = Invoke {
            request_id: invocation.request_id.clone(),
            deadline_unix_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            function_arn: invocation.function_arn.clone(),
            trace_id: invocation.trace_id.clone(),
            client_context: invocation.client_context.clone(),
            cognito_identity: invocation.cognito_identity.clone(),
            payload: invocation.payload.to_vec(),
        };
        let channel = &mut self.vm.channel;
        channel.enter(generation);
        for message in [HostMessage::Thaw(thaw), HostMessage::Invoke(invoke)] {
            channel
                .queue(message)
                .map_err(|error| InvokeError::TooLarge(error.into()))?;
        }
        channel.push();
        Ok(())
    }

    /// The guest's life until the invocation's end, and how long it ran, its hooks not counted.
    async fn live(
        &mut self,
        life: &mut Life,
        answer: &mut Answer,
        begin: Begin,
        limits: Limits,
        begun: &mut (dyn FnMut() + Send),
    ) -> Result<(End, Duration), NotRun> {
        let mut started = Instant::now();
        // A claim has its own time; the function's begins with the guest.
        let mut is_claiming = begin == Begin::Claim;
        let mut deadline = after(if is_claiming {
            limits.claim
        } else {
            limits.function
        });
        let mut grace: Option<Instant> = None;
        loop {
            let until = grace.map_or(deadline, |grace| grace.min(deadline));
            let input = tokio::select! {
                biased;
                // First, so that a guest that never stops talking does not outlive its time.
                () = tokio::time::sleep_until(until) => {
                    if until == deadline { Input::Deadline } else { Input::GraceOver }
                }
                () = answer.abandoned() => return Err(NotRun::Perhaps(InvokeError::Abandoned)),
                event = self.vm.next() => Input::Vm(event),
            };
            if is_claiming && matches!(input, Input::Deadline) {
                return Err(self.vm.monitor.silent("restore", limits.claim).into());
            }
            let step = life.step(input);
            if is_claiming && life.has_begun() {
                is_claiming = false;
                (started, deadline) = (Instant::now(), after(limits.function));
                begun();
            }
            match step {
                Step::Continue => {}
                // The guest is read no faster than the caller takes its answer.
                Step::Part(part) => match answer.take(part, deadline).await {
                    Taken::Yes => {}
                    Taken::TooLate => {
                        life.step(Input::Deadline);
                        return Ok((End::TimedOut, started.elapsed()));
                    }
                    Taken::Abandoned => return Err(NotRun::Perhaps(InvokeError::Abandoned)),
                },
                Step::Restoring => deadline = started + limits.hooks,
                Step::Restored => (started, deadline) = (Instant::now(), after(limits.function)),
                Step::Orphaned => grace = Some(Instant::now() + ORPHAN_LIMIT),
                Step::Ended(result) => return Ok((result?, started.elapsed())),
            }
        }
    }

    /// A guest that broke its protocol still runs: what its console shows may explain it.
    async fn with_console(&mut self, end: End, config: &RuntimeConfig) -> End {
        match end {
            End::GuestDied {
                reason,
                detail,
                console,
            } if console.is_empty() => End::GuestDied {
                reason,
                detail,
                console: self.vm.console(config.reply_limit).await,
            },
            end => end,
        }
    }

    async fn timings(
        &mut self,
        moments: Moments,
        config: &RuntimeConfig,
    ) -> Option<InvocationTimings> {
        match self.vm.monitor.status(config.reply_limit).await {
            Ok(status) => between(moments, &status.timings),
            Err(error) => {
                tracing::warn!(
                    error = crate::vm::chain(&error),
                    "no timings from the monitor"
                );
                None
            }
        }
    }
}

/// The durations between the host's and the monitor's moments; nothing if the monitor lacks one of its own.
fn between(host: Moments, monitor: &Timings) -> Option<InvocationTimings> {
    let first_instruction = Moment::from_ns(monitor.first_instruction_ns?);
    let first_byte = Moment::from_ns(monitor.first_agent_byte_ns?);
    let restore_began = Moment::from_ns(monitor.claimed_ns?);
    let restored = Moment::from_ns(monitor.state_set_ns?);
    Some(InvocationTimings {
        queued: host.claimed.since(host.asked),
        claim_to_first_instruction: first_instruction.since(host.claimed),
        first_instruction_to_agent_byte: first_byte.since(first_instruction),
        agent_byte_to_response: host.answered.since(first_byte),
        restore: restored.since(restore_began),
        identity: None,
        total: host.answered.since(host.asked),
    })
}

fn host(error: HostError) -> InvokeError {
    InvokeError::Host(error.into())
}

/// A number that no other life of any sandbox has (0 is the life before the freeze), and bytes for its generator: drawn at
/// once, as a request waits.
fn fresh_identity() -> Result<(Generation, Vec<u8>), HostError> {
    let drawn: [u8; 8 + ENTROPY_BYTES] = random()?;
    let (number, entropy) = drawn.split_at(8);
    let number = number
        .iter()
        .fold(0, |all, byte| all << 8 | u64::from(*byte));
    Ok((Generation(number.max(1)), entropy.to_vec()))
}

fn hostname(generation: Generation) -> String {
    format!("thaw-{:08x}", generation.0 >> 32)
}

/// Bytes of the kernel's generator, getrandom(2).
pub(crate) fn random<const SIZE: usize>() -> Result<[u8; SIZE], HostError> {
    let mut bytes = [0; SIZE];
    let mut filled = 0;
    while filled < SIZE {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(HostError::Random(error.into())),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timings_are_the_gaps_between_moments() {
        let at = |ms| Moment(Duration::from_millis(ms));
        let ns = |ms: u64| Some(ms * 1_000_000);
        let host = Moments {
            asked: at(100),
            claimed: at(103),
            answered: at(130),
        };
        let monitor = Timings {
            claimed_ns: ns(10),
            state_set_ns: ns(17),
            first_instruction_ns: ns(108),
            first_agent_byte_ns: ns(119),
            ..Timings::default()
        };
        let ms = Duration::from_millis;
        assert_eq!(
            between(host, &monitor),
            Some(InvocationTimings {
                queued: ms(3),
                claim_to_first_instruction: ms(5),
                first_instruction_to_agent_byte: ms(11),
                agent_byte_to_response: ms(11),
                restore: ms(7),
                identity: None,
                total: ms(30),
            })
        );
        assert_eq!(between(host, &Timings::default()), None);
    }

    #[test]
    fn every_life_has_its_own_generation_and_entropy() {
        let (one, two) = (fresh_identity().unwrap(), fresh_identity().unwrap());
        assert!(one.0 != two.0 && one.0.0 != 0);
        assert_ne!(one.1, two.1);
        assert_eq!(one.1.len(), ENTROPY_BYTES);
        let number = one.0.0.to_be_bytes();
        assert!(
            !one.1.windows(8).any(|bytes| bytes == number),
            "the generation is no secret"
        );
        assert_eq!(hostname(Generation(0xabcd_0123_4567_89ef)), "thaw-abcd0123");
    }
}
