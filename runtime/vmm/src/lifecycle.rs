//! Which request is allowed when: the monitor's life cycle as a plain value.
//!
//! ```text
//! Empty --Boot--> Running --Pause--> Paused --Save--> Paused
//!   |                                  ^ |
//!   '--Prepare--> Shell --Restore------' '--Resume--> Running;  Running or Paused --Rewind--> Paused
//!   '-------------------- Restore and run ----------^           any state of a machine --exit by itself--> Ended
//! ```

use thaw_vmm_control::{Fault, Request};
use thiserror::Error;

use crate::fault::Blame;

/// Where the monitor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// No machine yet.
    Empty,
    /// Everything but a guest.
    Shell,
    /// vCPUs run.
    Running,
    /// vCPUs and devices are stopped.
    Paused,
    /// The machine ended by itself.
    Ended,
    /// A request failed half way; what the machine is like is not known.
    Broken,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Make a machine from a kernel and run it.
    Boot,
    /// Make a machine without a guest.
    Prepare,
    /// Give it the guest of a snapshot.
    Restore,
    /// The same, and run it.
    RestoreAndRun,
    /// Put it back to its snapshot.
    Rewind,
    /// Run it.
    Resume,
    /// Stop it.
    Pause,
    /// Write it.
    Save,
    /// Look.
    Status,
    /// Look at its memory.
    WorkingSet,
    /// End.
    Quit,
}

impl From<&Request> for Act {
    fn from(request: &Request) -> Self {
        match request {
            Request::Boot(_) => Self::Boot,
            Request::Prepare(_) => Self::Prepare,
            Request::Restore(restore) if restore.resume => Self::RestoreAndRun,
            Request::Restore(_) => Self::Restore,
            Request::Rewind => Self::Rewind,
            Request::WorkingSet => Self::WorkingSet,
            Request::Resume => Self::Resume,
            Request::Pause => Self::Pause,
            Request::Save(_) => Self::Save,
            Request::Status => Self::Status,
            Request::Quit => Self::Quit,
        }
    }
}

/// A request at the wrong time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{act:?} is not possible while the machine is {life:?}")]
pub struct Refused {
    /// What was asked.
    pub act: Act,
    /// When.
    pub life: Life,
}

impl Blame for Refused {
    fn fault(&self) -> Fault {
        match self.life {
            // The guest ended between two requests; the caller could not know.
            Life::Ended => Fault::Guest,
            Life::Broken => Fault::Host,
            _ => Fault::Caller,
        }
    }
}

impl Life {
    /// Whether `act` may be tried now.
    ///
    /// # Errors
    /// It may not.
    pub fn admit(self, act: Act) -> Result<(), Refused> {
        let admitted = matches!(
            (act, self),
            (Act::Boot | Act::Prepare, Self::Empty)
                | (Act::Restore | Act::RestoreAndRun, Self::Empty | Self::Shell)
                | (Act::Rewind | Act::WorkingSet, Self::Running | Self::Paused)
                | (Act::Resume | Act::Save, Self::Paused)
                | (Act::Pause, Self::Running)
                | (Act::Status | Act::Quit, _)
        );
        if admitted {
            Ok(())
        } else {
            Err(Refused { act, life: self })
        }
    }

    /// The state after an admitted `act` was done.
    pub fn done(self, act: Act) -> Self {
        match act {
            Act::Prepare => Self::Shell,
            Act::Boot | Act::Resume | Act::RestoreAndRun => Self::Running,
            Act::Restore | Act::Pause | Act::Rewind => Self::Paused,
            Act::Save | Act::Status | Act::WorkingSet | Act::Quit => self,
        }
    }

    /// The state after an admitted `act` failed. A save that failed leaves the machine as it was.
    pub fn failed(self, act: Act) -> Self {
        match act {
            Act::Save | Act::Status | Act::WorkingSet | Act::Quit => self,
            Act::Boot
            | Act::Prepare
            | Act::Restore
            | Act::RestoreAndRun
            | Act::Rewind
            | Act::Resume
            | Act::Pause => Self::Broken,
        }
    }

    /// The state after the machine ended by itself.
    pub fn ended(self) -> Self {
        match self {
            Self::Empty | Self::Shell | Self::Broken => self,
            Self::Running | Self::Paused | Self::Ended => Self::Ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTS: [Act; 11] = [
        Act::Boot,
        Act::Prepare,
        Act::Restore,
        Act::RestoreAndRun,
        Act::Rewind,
        Act::WorkingSet,
        Act::Resume,
        Act::Pause,
        Act::Save,
        Act::Status,
        Act::Quit,
    ];
    const LIVES: [Life; 6] = [
        Life::Empty,
        Life::Shell,
        Life::Running,
        Life::Paused,
        Life::Ended,
        Life::Broken,
    ];

    #[test]
    fn status_and_quit_are_always_possible_and_change_nothing() {
        for life in LIVES {
            for act in [Act::Status, Act::Quit] {
                assert_eq!(life.admit(act), Ok(()));
                assert_eq!((life.done(act), life.failed(act)), (life, life));
            }
        }
    }

    #[test]
    fn only_a_paused_machine_is_saved() {
        let admitted: Vec<_> = LIVES
            .into_iter()
            .filter(|life| life.admit(Act::Save).is_ok())
            .collect();
        assert_eq!(admitted, [Life::Paused]);
    }

    #[test]
    fn no_act_brings_an_ended_or_broken_machine_back() {
        for life in [Life::Ended, Life::Broken] {
            for act in ACTS.into_iter().filter(|act| life.admit(*act).is_ok()) {
                assert_eq!(life.done(act), life);
            }
        }
    }

    #[test]
    fn a_machine_is_made_once() {
        let running = Life::Empty.done(Act::Boot);
        for act in [Act::Boot, Act::Prepare, Act::Restore, Act::RestoreAndRun] {
            assert!(running.admit(act).is_err(), "{act:?}");
        }
        assert_eq!(
            running.done(Act::Pause).done(Act::Save).done(Act::Resume),
            Life::Running
        );
    }

    #[test]
    fn a_shell_can_only_be_claimed_once() {
        let shell = Life::Empty.done(Act::Prepare);
        let admitted: Vec<_> = ACTS
            .into_iter()
            .filter(|act| shell.admit(*act).is_ok())
            .collect();
        let looks_and_ends = [Act::Status, Act::Quit];
        assert_eq!(
            admitted,
            [&[Act::Restore, Act::RestoreAndRun], &looks_and_ends[..]].concat()
        );
        assert_eq!(shell.done(Act::Restore), Life::Paused);
        assert_eq!(shell.done(Act::RestoreAndRun), Life::Running);
    }

    #[test]
    fn a_rewound_machine_is_paused_and_one_that_failed_to_is_broken() {
        for life in [Life::Running, Life::Paused] {
            assert_eq!(life.admit(Act::Rewind), Ok(()));
            assert_eq!(life.done(Act::Rewind), Life::Paused);
            assert_eq!(life.failed(Act::Rewind), Life::Broken);
        }
    }
}
