//! Requests in, replies and events out: the monitor's main thread.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use thaw_vmm_control::wire::{Read, Receiver, WireError};
use thaw_vmm_control::{Event, Exit, Failure, Fault, FromMonitor, Reply, Request, Status};
use thiserror::Error;

use crate::boot::boot;
use crate::fault::{Blame, failure};
use crate::lifecycle::{Act, Life};
use crate::machine::Machine;
use crate::outbox::Outbox;
use crate::restore::restore;
use crate::rewind::rewind;
use crate::save::save;
use crate::shell::{PrepareError, Shape, Shell, prepare};
use crate::vcpu::monotonic_ns;

/// Why the monitor cannot go on.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The socket or what came through it.
    #[error("control socket cannot be used")]
    Wire(#[source] WireError),
    /// Waiting.
    #[error("waiting for requests failed")]
    Poll(#[source] io::Error),
}

/// The agent channel was given to a machine already.
#[derive(Debug, Error)]
#[error("agent channel was used before")]
struct AgentUsed;

impl Blame for AgentUsed {
    fn fault(&self) -> Fault {
        Fault::Caller
    }
}

/// The working set cannot be told.
#[derive(Debug, Error)]
#[error("pages of this process could not be listed")]
struct Pagemap(#[source] io::Error);

impl Blame for Pagemap {
    fn fault(&self) -> Fault {
        Fault::Host
    }
}

/// The monitor of one machine.
#[derive(Debug)]
pub struct Monitor {
    control: Arc<UnixStream>,
    outbox: Arc<Outbox>,
    agent: Option<UnixStream>,
    life: Life,
    shell: Option<Shell>,
    machine: Option<Machine>,
}

/// Whether to go on after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Go,
    Quit,
}

impl Monitor {
    /// A monitor without a machine. Both sockets are blocking.
    pub fn new(control: UnixStream, agent: UnixStream) -> Self {
        let control = Arc::new(control);
        let outbox = Arc::new(Outbox::new(Arc::clone(&control)));
        Self {
            control,
            outbox,
            agent: Some(agent),
            life: Life::Empty,
            shell: None,
            machine: None,
        }
    }

    /// Serves requests until `Quit` or until the runtime closes the control socket.
    ///
    /// # Errors
    /// The control socket is broken.
    pub fn serve(mut self) -> Result<(), ControlError> {
        let result = self.serve_requests();
        let shell = self.shell.take().map(|shell| shell.machine);
        if let Some(machine) = self.machine.take().or(shell) {
            machine.close();
        }
        result
    }

    fn serve_requests(&mut self) -> Result<(), ControlError> {
        let mut receiver = Receiver::new();
        loop {
            if self.wait()? {
                match receiver.read_from(&self.control) {
                    Ok(Read::Some) => {}
                    Ok(Read::Closed) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(ControlError::Wire(WireError::Socket(error))),
                }
            }
            self.report_end()?;
            while let Some((request, fds)) = receiver
                .next_message::<Request>()
                .map_err(ControlError::Wire)?
            {
                if self.answer(request, fds)? == Next::Quit {
                    return Ok(());
                }
            }
        }
    }

    /// Waits for a request or an end; true if the control socket has something.
    fn wait(&self) -> Result<bool, ControlError> {
        let mut waited = vec![PollFd::new(&self.control, PollFlags::IN)];
        if let Some(machine) = &self.machine {
            waited.push(PollFd::new(machine.wake(), PollFlags::IN));
        }
        match poll(&mut waited, None) {
            Ok(_) => Ok(!waited[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(ControlError::Poll(error.into())),
        }
    }

    fn send(&self, message: &FromMonitor) -> Result<(), ControlError> {
        self.outbox.send(message).map_err(ControlError::Wire)
    }

    fn report_end(&mut self) -> Result<(), ControlError> {
        // Always taken, or waiting for what comes next would end at once, for ever.
        let Some(exit) = self.machine.as_mut().and_then(Machine::ended) else {
            return Ok(());
        };
        if self.life == Life::Ended {
            return Ok(());
        }
        self.life = self.life.ended();
        let Exit { reason, detail, .. } = &exit;
        tracing::info!(?reason, detail, "machine ended");
        let sent = self.send(&FromMonitor::Event(Event::Exited(exit)));
        if let Some(machine) = &mut self.machine {
            machine.end_was_reported();
        }
        sent
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Next, ControlError> {
        let act = Act::from(&request);
        let reply = match self.life.admit(act) {
            Err(refused) => Reply::Failed(failure(&refused)),
            Ok(()) => match self.act(request, fds) {
                Ok(reply) => {
                    self.life = self.life.done(act);
                    reply
                }
                Err(failed) => {
                    self.life = self.life.failed(act);
                    Reply::Failed(failed)
                }
            },
        };
        self.send(&FromMonitor::Reply(reply))?;
        Ok(if act == Act::Quit {
            Next::Quit
        } else {
            Next::Go
        })
    }

    fn act(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Reply, Failure> {
        let now = monotonic_ns();
        let files: Vec<File> = fds.into_iter().map(File::from).collect();
        match request {
            Request::Boot(request) => {
                let agent = self.agent.take().ok_or_else(|| failure(&AgentUsed))?;
                let machine = boot(&request, files, agent, now).map_err(|error| failure(&error))?;
                self.machine.insert(machine).start();
            }
            Request::Prepare(request) => {
                let shell = Shape::try_from(&request).and_then(|shape| prepare(shape, now));
                self.shell = Some(shell.map_err(|error: PrepareError| failure(&error))?);
            }
            Request::Restore(request) => {
                let agent = self.agent.take().ok_or_else(|| failure(&AgentUsed))?;
                let streams = (agent, &self.outbox);
                let machine = restore(self.shell.take(), &request, files, streams, now)
                    .map_err(|error| failure(&error))?;
                let machine = self.machine.insert(machine);
                if request.resume {
                    let resumed = machine.resume(monotonic_ns());
                    resumed.map_err(|error| failure(&error))?;
                }
            }
            Request::Status => return Ok(Reply::Status(self.status())),
            Request::Quit => {}
            Request::Resume
            | Request::Pause
            | Request::Save(_)
            | Request::WorkingSet
            | Request::Rewind => {
                return self.act_on_machine(request, files, now);
            }
        }
        Ok(Reply::Done)
    }

    fn act_on_machine(
        &mut self,
        request: Request,
        files: Vec<File>,
        now: u64,
    ) -> Result<Reply, Failure> {
        let machine = self.machine.as_mut().expect("admitted only with a machine");
        match request {
            Request::Resume => machine.resume(now).map_err(|error| failure(&error))?,
            Request::Pause => machine.pause().map_err(|error| failure(&error))?,
            Request::WorkingSet => {
                let set = machine.working_set().map_err(Pagemap);
                return set.map(Reply::WorkingSet).map_err(|error| failure(&error));
            }
            Request::Save(request) => {
                return save(machine, request, files)
                    .map(Reply::Saved)
                    .map_err(|error| failure(&error));
            }
            Request::Rewind => {
                return rewind(machine, files, now)
                    .map(Reply::Rewound)
                    .map_err(|error| failure(&error));
            }
            Request::Boot(_)
            | Request::Prepare(_)
            | Request::Restore(_)
            | Request::Status
            | Request::Quit => {}
        }
        Ok(Reply::Done)
    }

    fn status(&self) -> Status {
        let shell = self.shell.as_ref().map(|shell| &shell.machine);
        let Some(machine) = self.machine.as_ref().or(shell) else {
            return Status::default();
        };
        let console = String::from_utf8_lossy(&machine.console()).into_owned();
        Status {
            console,
            timings: machine.timings(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use thaw_vmm_control::{RestoreRequest, SaveForm, SaveRequest, wire};

    fn ask(socket: &UnixStream, receiver: &mut Receiver, request: &Request) -> Reply {
        wire::send(socket, request, &[]).unwrap();
        loop {
            assert_eq!(receiver.read_from(socket).unwrap(), Read::Some);
            if let Some((FromMonitor::Reply(reply), _)) = receiver.next_message().unwrap() {
                return reply;
            }
        }
    }

    #[test]
    fn requests_at_the_wrong_time_are_the_callers_fault_and_quit_ends() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_agent, agent) = UnixStream::pair().unwrap();
        let monitor = thread::spawn(move || Monitor::new(theirs, agent).serve());
        let mut receiver = Receiver::new();
        let save = Request::Save(SaveRequest {
            metadata: serde_json::Value::Null,
            form: SaveForm::Whole,
        });
        for request in [Request::Resume, Request::Pause, save] {
            let Reply::Failed(failed) = ask(&ours, &mut receiver, &request) else {
                panic!("done without a machine")
            };
            assert_eq!(failed.fault, Fault::Caller);
        }
        assert_eq!(
            ask(&ours, &mut receiver, &Request::Status),
            Reply::Status(Status::default())
        );
        let restore = Request::Restore(RestoreRequest::default());
        assert!(matches!(
            ask(&ours, &mut receiver, &restore),
            Reply::Failed(_)
        ));
        assert_eq!(ask(&ours, &mut receiver, &Request::Quit), Reply::Done);
        monitor.join().unwrap().unwrap();
    }

    #[test]
    fn a_closed_control_socket_ends_the_monitor() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_agent, agent) = UnixStream::pair().unwrap();
        let monitor = thread::spawn(move || Monitor::new(theirs, agent).serve());
        drop(ours);
        monitor.join().unwrap().unwrap();
    }
}
