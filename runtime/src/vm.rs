//! One VM as the runtime sees it: a monitor and the agent channel behind it, and what they say, in an order that loses
//! no word of the agent.

use std::time::Duration;

use thaw_agent_protocol::AgentMessage;
use thaw_vmm_control::{Event, Exit, FromMonitor, Reply};
use tokio::time::Instant;

use crate::HostError;
use crate::channel::{AgentChannel, Incoming};
use crate::monitor::Monitor;

/// A monitor with its agent channel. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) monitor: Monitor,
    pub(crate) channel: AgentChannel,
    agent_closed: bool,
    /// News of the VM's end, held back until the agent's last words are read.
    held_back: Option<VmEvent>,
}

/// What a VM says.
#[derive(Debug)]
pub(crate) enum VmEvent {
    /// The agent spoke, in the present generation.
    Agent(AgentMessage),
    /// The agent's channel closed. Comes once.
    AgentClosed,
    /// The agent broke its protocol: how. Nothing more comes from it.
    AgentBroken(String),
    /// The monitor answered a request sent with [`Monitor::send`].
    Reply(Reply),
    /// The guest ended by itself.
    Exited(Exit),
    /// The monitor is lost.
    MonitorGone(HostError),
}

impl Vm {
    pub(crate) fn new(monitor: Monitor, channel: AgentChannel) -> Self {
        Self {
            monitor,
            channel,
            agent_closed: false,
            held_back: None,
        }
    }

    /// The VM was rewound onto this channel: what it said before is of a life that is over.
    pub(crate) fn begin_anew(&mut self, channel: AgentChannel) {
        self.channel = channel;
        self.agent_closed = false;
        self.held_back = None;
    }

    /// The next thing that the VM says. Cancelling loses nothing.
    pub(crate) async fn next(&mut self) -> VmEvent {
        loop {
            if let Some(exit) = self.monitor.take_exit() {
                self.held_back = Some(VmEvent::Exited(exit));
            }
            if self.held_back.is_some() {
                if let Some(event) = self.last_words() {
                    return event;
                }
                if let Some(event) = self.held_back.take() {
                    return event;
                }
            }
            let news = tokio::select! {
                biased;
                incoming = self.channel.next(), if !self.agent_closed => return self.heard(incoming),
                news = self.monitor.next() => news,
            };
            match news {
                Ok(FromMonitor::Reply(reply)) => return VmEvent::Reply(reply),
                Ok(FromMonitor::Event(Event::Exited(exit))) => {
                    self.held_back = Some(VmEvent::Exited(exit));
                }
                Err(error) => self.held_back = Some(VmEvent::MonitorGone(error)),
            }
        }
    }

    /// The console's tail: `Status`, bounded by `limit`.
    pub(crate) async fn console(&mut self, limit: Duration) -> String {
        self.monitor.console(limit).await
    }

    fn last_words(&mut self) -> Option<VmEvent> {
        if self.agent_closed {
            return None;
        }
        match self.channel.next_now()? {
            // Told by the end itself.
            Incoming::Closed => {
                self.agent_closed = true;
                None
            }
            incoming => Some(self.heard(incoming)),
        }
    }

    fn heard(&mut self, incoming: Incoming) -> VmEvent {
        match incoming {
            Incoming::Message(message) => VmEvent::Agent(message),
            Incoming::Closed => {
                self.agent_closed = true;
                VmEvent::AgentClosed
            }
            Incoming::Broken(error) => {
                self.agent_closed = true;
                VmEvent::AgentBroken(chain(&error))
            }
        }
    }
}

/// Most bytes of a guest's own words that are kept as the reason for its end: they go into answers and logs.
pub(crate) const REASON_BYTES_MAX: usize = 4096;

/// The beginning of what a guest says of itself, at most [`REASON_BYTES_MAX`] bytes.
pub(crate) fn brief(mut words: String) -> String {
    words.truncate(words.floor_char_boundary(REASON_BYTES_MAX));
    words
}

/// Longest deadline; what is longer would overflow the clock.
const DEADLINE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// The moment `limit` from now.
pub(crate) fn after(limit: Duration) -> Instant {
    Instant::now() + limit.min(DEADLINE_MAX)
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
