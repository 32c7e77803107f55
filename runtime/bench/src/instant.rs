//! A monitor without a VM that answers at once: what is left of a request's time is the gateway's own.
//!
//! This program plays it when it is started under the name `thaw-vmm`, as the gateway starts monitors. It speaks the
//! control protocol and the agent's with real messages, and its snapshots are real files without a guest in them.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use anyhow::{Context as _, bail, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};
use thaw_agent_protocol::{
    AgentMessage, Decoder, Generation, HostMessage, Message as _, Reply as Answer,
};
use thaw_snapshot::{CpuRecord, Metadata, PageSource, SectionKind, Snapshot, Writer};
use thaw_vmm_control::wire::{self, Read, Receiver};
use thaw_vmm_control::{
    AGENT_FD, CONTROL_FD, Reply, Request, Rewound, SaveForm, SaveRequest, Saved, Status, WorkingSet,
};

/// Name under which the gateway starts its monitors.
pub const PLAYED_NAME: &str = "thaw-vmm";
/// The processor that is left to the gateway; monitors keep off it.
pub const GATEWAY_CPU: usize = 0;

/// Keeps this process, and what it starts, off the gateway's processor, if there is another one.
///
/// # Errors
/// The kernel refuses.
pub fn leave_gateway_cpu() -> io::Result<()> {
    let mut cpus = CpuSet::new();
    for cpu in 0..thread::available_parallelism()
        .map_or(1, usize::from)
        .max(2)
    {
        cpus.set(cpu);
    }
    cpus.unset(GATEWAY_CPU);
    match sched_setaffinity(None, &cpus) {
        // No other processor exists here.
        Err(rustix::io::Errno::INVAL) => Ok(()),
        result => result.map_err(Into::into),
    }
}

struct Monitor {
    control: UnixStream,
    receiver: Receiver,
    agent: UnixStream,
    decoder: Decoder,
    /// What it was restored from: a difference is saved over it.
    origin: Option<File>,
}

/// Plays until the gateway closes the control socket.
///
/// # Errors
/// The gateway breaks a protocol.
pub fn play() -> anyhow::Result<()> {
    leave_gateway_cpu().context("cannot leave the gateway's processor")?;
    // SAFETY: whoever starts a monitor leaves it these two sockets, and nothing else in this process owns them.
    let [control, agent] = [CONTROL_FD, AGENT_FD].map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let mut monitor = Monitor {
        control: control.into(),
        receiver: Receiver::new(),
        agent: agent.into(),
        decoder: Decoder::new(),
        origin: None,
    };
    while let Some((request, fds)) = monitor.request()? {
        monitor.serve(request, fds)?;
    }
    Ok(())
}

impl Monitor {
    fn request(&mut self) -> anyhow::Result<Option<(Request, Vec<OwnedFd>)>> {
        loop {
            if let Some(message) = self.receiver.next_message().context("no request")? {
                return Ok(Some(message));
            }
            if self.receiver.read_from(&self.control)? == Read::Closed {
                return Ok(None);
            }
        }
    }

    fn serve(&mut self, request: Request, fds: Vec<OwnedFd>) -> anyhow::Result<()> {
        match request {
            Request::Boot(_) => self.boot(),
            Request::Prepare(_) | Request::Pause => self.reply(Reply::Done),
            Request::Restore(restore) => {
                self.origin = fds.into_iter().next().map(File::from);
                match restore.resume {
                    true => self.run(),
                    false => self.reply(Reply::Done),
                }
            }
            Request::Resume => self.run(),
            Request::Rewind => {
                let [agent] = <[OwnedFd; 1]>::try_from(fds)
                    .map_err(|fds| anyhow::anyhow!("rewind with {} descriptors", fds.len()))?;
                self.agent = agent.into();
                self.decoder = Decoder::new();
                self.reply(Reply::Rewound(Rewound::default()))
            }
            Request::Save(save) => {
                let [file] = <[OwnedFd; 1]>::try_from(fds)
                    .map_err(|fds| anyhow::anyhow!("save with {} descriptors", fds.len()))?;
                let base = match save.form {
                    SaveForm::Whole => None,
                    SaveForm::Difference => self.origin.take(),
                };
                let saved = write_snapshot(file.into(), base, save)?;
                self.reply(Reply::Saved(saved))
            }
            Request::Status => self.reply(Reply::Status(Status::default())),
            Request::WorkingSet => self.reply(Reply::WorkingSet(WorkingSet::default())),
            Request::Quit => {
                self.reply(Reply::Done)?;
                std::process::exit(0)
            }
        }
    }

    /// A base is frozen at the agent's first word.
    fn boot(&mut self) -> anyhow::Result<()> {
        self.reply(Reply::Done)?;
        let hello = AgentMessage::Hello {
            agent_version: env!("CARGO_PKG_VERSION").into(),
        };
        self.say(vec![(hello, Generation(0))])
    }

    /// What is to be done lies in the channel or comes at once: a function is ready, an invocation answered with its own
    /// payload, all in one write as the agent does.
    fn run(&mut self) -> anyhow::Result<()> {
        self.reply(Reply::Done)?;
        let mut words = Vec::new();
        loop {
            match self.hear()? {
                (generation, HostMessage::Thaw(_)) => {
                    words.push((
                        AgentMessage::Thawed {
                            unique_after_ns: None,
                            extensions: false,
                        },
                        generation,
                    ));
                }
                (generation, HostMessage::Configure(_)) => {
                    words.push((AgentMessage::Ready, generation));
                    return self.say(words);
                }
                (generation, HostMessage::Invoke(invoke)) => {
                    let answer = Answer {
                        request_id: invoke.request_id,
                        content_type: Some("application/json".into()),
                        payload: invoke.payload,
                    };
                    words.push((AgentMessage::Response(answer), generation));
                    return self.say(words);
                }
                (_, other) => bail!("{other:?} while an invocation is waited for"),
            }
        }
    }

    fn reply(&self, reply: Reply) -> anyhow::Result<()> {
        wire::send(&self.control, &reply, &[]).context("the gateway is gone")
    }

    fn say(&mut self, words: Vec<(AgentMessage, Generation)>) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        for (message, generation) in words {
            message.encode(generation, &mut bytes)?;
        }
        self.agent
            .write_all(&bytes)
            .context("the agent channel is closed")
    }

    fn hear(&mut self) -> anyhow::Result<(Generation, HostMessage)> {
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok((frame.generation, HostMessage::from_frame(frame)?));
            }
            let count = self.agent.read(&mut chunk)?;
            ensure!(count > 0, "the agent channel is closed");
            self.decoder.feed(&chunk[..count]);
        }
    }
}

/// Memory that nothing was written to.
struct NoMemory;

impl PageSource for NoMemory {
    fn read_at(&mut self, _offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn next_data(&mut self, _offset: u64) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

fn write_snapshot(file: File, base: Option<File>, save: SaveRequest) -> anyhow::Result<Saved> {
    let mut writer = Writer::new(file);
    let metadata: Metadata = serde_json::from_value(save.metadata)?;
    writer.metadata(&metadata)?;
    let cpu = CpuRecord {
        vendor: "none".into(),
        tsc_khz: 1_000_000,
        leaves: Vec::new(),
    };
    writer.cpu(&cpu)?;
    writer.section(SectionKind::Machine, b"none")?;
    match base {
        Some(base) => {
            let base = Snapshot::from_file(base, "base")?;
            writer.memory_difference(&mut NoMemory, &base, 1)?;
        }
        None => {
            let bytes = u64::from(metadata.memory_mib) << 20;
            writer.sparse_section(SectionKind::Memory, bytes, &mut NoMemory)?;
        }
    }
    let summary = writer.finish()?;
    Ok(Saved {
        file_bytes: summary.file_bytes,
        stored_bytes: summary.stored_bytes,
        digest: summary.digest.to_string(),
    })
}
