//! One restored VM, from the monitor's start to the end of its only invocation.

pub(crate) mod life;

use std::os::fd::AsFd as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, clock_gettime};
use thaw_agent_protocol::{Generation, HostMessage, Invoke, Thaw};
use thaw_vmm_control::{Disk, DiskAccess, DiskSource, Request, RestoreRequest, Timings};
use tokio::time::Instant;

use self::life::{Input, Life, Step};
use crate::monitor::Spawner;
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

/// What every VM of a pool is restored from; opened once, handed to each monitor as descriptors.
#[derive(Debug)]
pub(crate) struct SnapshotFiles {
    pub(crate) snapshot: std::fs::File,
    pub(crate) rootfs: std::fs::File,
    pub(crate) code: std::fs::File,
}

/// A restored, paused VM that nobody has run.
#[derive(Debug)]
pub(crate) struct Sandbox {
    vm: Vm,
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
}

/// An invocation's moments on the host's side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moments {
    pub(crate) asked: Moment,
    pub(crate) claimed: Moment,
    pub(crate) answered: Moment,
}

impl Sandbox {
    pub(crate) async fn restore(
        spawner: &Spawner,
        files: &SnapshotFiles,
        config: &RuntimeConfig,
    ) -> Result<Self, HostError> {
        let (mut monitor, channel) = spawner.spawn().await?;
        let disk = |id: &str, access, source| Disk {
            id: id.into(),
            access,
            source,
        };
        let [rootfs, code, overlay] = DISK_IDS;
        let request = Request::Restore(RestoreRequest {
            disks: vec![
                disk(rootfs, DiskAccess::ReadOnly, DiskSource::Descriptor),
                disk(code, DiskAccess::ReadOnly, DiskSource::Descriptor),
                disk(overlay, DiskAccess::CopyOnWrite, DiskSource::Snapshot),
            ],
            ..Default::default()
        });
        let fds = [
            files.snapshot.as_fd(),
            files.rootfs.as_fd(),
            files.code.as_fd(),
        ];
        monitor
            .command(&request, &fds, config.restore_limit)
            .await?;
        Ok(Self {
            vm: Vm::new(monitor, channel),
        })
    }

    /// Process id of the monitor.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.vm.monitor.pid()
    }

    /// Whether the VM, which is paused, is as we left it.
    pub(crate) fn is_well(&mut self) -> bool {
        self.vm.monitor.is_quiet()
    }

    /// Frames of another generation seen.
    pub(crate) fn stale_frames(&self) -> u64 {
        self.vm.channel.stale_frames()
    }

    /// Kills the VM and waits until it is gone.
    pub(crate) async fn end(self) {
        self.vm.monitor.end().await;
    }

    /// Runs the one invocation. The VM is good for nothing afterwards; nor is it if the future is dropped.
    pub(crate) async fn run(
        &mut self,
        invocation: Invocation,
        asked: Moment,
        config: &RuntimeConfig,
    ) -> Result<Outcome, InvokeError> {
        let claimed = Moment::now();
        let (timeout, measure) = (invocation.timeout, invocation.measure);
        let request_id = invocation.request_id.clone();
        self.hand_over(invocation)?;
        let (started, deadline) = (Instant::now(), after(timeout));
        self.vm
            .monitor
            .send(&Request::Resume, &[])
            .await
            .map_err(host)?;
        let mut life = Life::new(request_id);
        let end = self.live(&mut life, deadline).await.map_err(host)?;
        let answered = Moment::now();
        let duration = started.elapsed();
        let end = self.with_console(end, config).await;
        let answer = matches!(end, End::Response { .. } | End::FunctionError { .. });
        let timings = if measure == Measure::On && answer {
            self.timings(
                Moments {
                    asked,
                    claimed,
                    answered,
                },
                config,
            )
            .await
        } else {
            None
        };
        Ok(Outcome {
            end,
            log: life.take_log(),
            duration,
            timings,
        })
    }

    /// Puts identity and request into the channel: they lie in the guest's receive queue before its first instruction.
    fn hand_over(&mut self, invocation: Invocation) -> Result<(), InvokeError> {
        let generation = fresh_generation().map_err(host)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let thaw = Thaw {
            unix_time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            hostname: hostname(generation),
            entropy: random::<ENTROPY_BYTES>().map_err(host)?.to_vec(),
        };
        let deadline = now.saturating_add(invocation.timeout);
        let invoke = Invoke {
            request_id: invocation.request_id,
            deadline_unix_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            function_arn: invocation.function_arn,
            trace_id: invocation.trace_id,
            client_context: invocation.client_context,
            cognito_identity: invocation.cognito_identity,
            payload: invocation.payload.into(),
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

    async fn live(&mut self, life: &mut Life, deadline: Instant) -> Result<End, HostError> {
        let mut grace: Option<Instant> = None;
        loop {
            let until = grace.map_or(deadline, |grace| grace.min(deadline));
            let input = tokio::select! {
                biased;
                // First, so that a guest that never stops talking does not outlive its time.
                () = tokio::time::sleep_until(until) => {
                    if until == deadline { Input::Deadline } else { Input::GraceOver }
                }
                event = self.vm.next() => Input::Vm(event),
            };
            match life.step(input) {
                Step::Continue => {}
                Step::Orphaned => grace = Some(Instant::now() + ORPHAN_LIMIT),
                Step::Ended(result) => return result,
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
        total: host.answered.since(host.asked),
    })
}

fn host(error: HostError) -> InvokeError {
    InvokeError::Host(error.into())
}

/// A number that no other life of any sandbox has; 0 is the life before the freeze.
fn fresh_generation() -> Result<Generation, HostError> {
    let number = u64::from_le_bytes(random()?);
    Ok(Generation(number.max(1)))
}

fn hostname(generation: Generation) -> String {
    format!("thaw-{:08x}", generation.0 >> 32)
}

/// Bytes of the kernel's generator, getrandom(2).
fn random<const SIZE: usize>() -> Result<[u8; SIZE], HostError> {
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
                total: ms(30),
            })
        );
        assert_eq!(between(host, &Timings::default()), None);
    }

    #[test]
    fn every_life_has_its_own_generation_and_entropy() {
        let (one, two) = (fresh_generation().unwrap(), fresh_generation().unwrap());
        assert!(one != two && one.0 != 0);
        assert_ne!(random::<64>().unwrap(), random::<64>().unwrap());
        assert_eq!(hostname(Generation(0xabcd_0123_4567_89ef)), "thaw-abcd0123");
    }
}
