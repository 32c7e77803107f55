//! What a sandbox with extensions still does when its invocation has been answered.

use std::time::Duration;

use thaw_agent_protocol::{AgentMessage, HostMessage};
use tokio::time::Instant;

use super::Sandbox;
use crate::tail::Tail;
use crate::vm::{VmEvent, after};
use crate::{End, INVOCATION_LOG_BYTES_MAX};

/// Time that extensions have once they were told of the end (the agent's `SHUTDOWN_LIMIT`), and some for the way.
const SHUTDOWN_LIMIT: Duration = Duration::from_millis(2500);

/// An invocation that has its outcome, and extensions that may still be at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unsettled {
    until: Instant,
    /// The guest does not know yet that the time is over.
    is_to_be_told: bool,
}

/// How a sandbox was left when nothing more was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Its monitor and its guest go on.
    Running,
    /// The guest has ended, or can no longer be heard.
    Dead,
}

impl Unsettled {
    /// After this end, with `left` of the function's time. None where nobody can be waited for.
    pub(crate) fn after(end: &End, left: Duration) -> Option<Self> {
        let (is_to_be_told, limit) = match end {
            End::Response { .. }
            | End::FunctionError { .. }
            | End::RestoreError { .. }
            | End::RuntimeExit(_) => (false, left.saturating_add(SHUTDOWN_LIMIT)),
            End::TimedOut | End::RestoreTimedOut => (true, SHUTDOWN_LIMIT),
            End::GuestDied { .. } => return None,
        };
        Some(Self {
            until: after(limit),
            is_to_be_told,
        })
    }
}

impl Sandbox {
    /// Whether its last invocation is not over for its guest: [`Self::settle`] is due.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.unsettled.is_some()
    }

    /// Waits until the extensions have done their part, within their limit; what they wrote meanwhile, and what the network
    /// denied to the guest. Cancelling loses that.
    pub(crate) async fn settle(&mut self) -> (Vec<u8>, Left) {
        let (mut log, left) = self.settle_extensions().await;
        if let Some(network) = &self.network {
            log.extend(network.denials().await);
        }
        (log, left)
    }

    async fn settle_extensions(&mut self) -> (Vec<u8>, Left) {
        let Some(unsettled) = self.unsettled.take() else {
            return (Vec::new(), Left::Running);
        };
        let mut log = Tail::new(INVOCATION_LOG_BYTES_MAX);
        if unsettled.is_to_be_told {
            // Fails only for messages over a limit, which this is not; then the time passes.
            let _ = self.vm.channel.queue(HostMessage::Shutdown);
            self.vm.channel.push();
        }
        let left = loop {
            let event = tokio::select! {
                biased;
                // First, so that a guest that never stops talking does not outlive its time.
                () = tokio::time::sleep_until(unsettled.until) => break Left::Running,
                event = self.vm.next() => event,
            };
            match event {
                VmEvent::Agent(AgentMessage::Log { bytes, .. }) => log.push(&bytes),
                VmEvent::Agent(AgentMessage::Settled) => break Left::Running,
                VmEvent::Agent(_) | VmEvent::Reply(_) => {}
                VmEvent::AgentClosed
                | VmEvent::AgentBroken(_)
                | VmEvent::Exited(_)
                | VmEvent::MonitorGone(_) => break Left::Dead,
            }
        };
        (log.take(), left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_have_the_rest_of_the_functions_time_and_are_told_only_of_what_they_cannot_know() {
        let second = Duration::from_secs(1);
        let answered = End::FunctionError {
            error_type: None,
            document: bytes::Bytes::new(),
        };
        let unsettled = Unsettled::after(&answered, second).unwrap();
        assert!(!unsettled.is_to_be_told);
        assert!(unsettled.until > Instant::now() + SHUTDOWN_LIMIT);
        let unsettled = Unsettled::after(&End::TimedOut, second).unwrap();
        assert!(unsettled.is_to_be_told);
        assert!(unsettled.until <= Instant::now() + SHUTDOWN_LIMIT);
    }
}
