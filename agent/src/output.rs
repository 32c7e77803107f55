//! Standard output and error of the runtime and, apart from it, of extensions: pipes that the agent reads no faster than the host takes the bytes.

use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid};
use thaw_agent_protocol::LogStream;
use tokio::net::unix::pipe::Receiver;

use crate::sys::User;
use crate::telemetry::Kind;

/// Most bytes in one `Log` message.
pub const LOG_BYTES_MAX: usize = 64 * 1024;

/// What the runtime can write before it waits for the agent to read (pipe(7); a power of two).
const PIPE_BYTES: usize = 256 * 1024;

/// Pipes of a sandbox: two of the runtime's, and two of extensions.
const PIPES_MAX: usize = 4;

/// The reading ends of all pipes.
#[derive(Debug)]
pub(crate) struct Output {
    pipes: Vec<Pipe>,
    /// Which pipe, and what was read.
    first: Option<(usize, Vec<u8>)>,
    buffer: Vec<u8>,
}

/// What was written, and by whom.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) kind: Kind,
    pub(crate) stream: LogStream,
    pub(crate) bytes: Vec<u8>,
}

/// The writing ends, for a process.
#[derive(Debug)]
pub(crate) struct WritingEnds {
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

impl WritingEnds {
    /// The same ends once more, for another process.
    pub(crate) fn again(&self) -> io::Result<Self> {
        Ok(Self {
            stdout: self.stdout.try_clone()?,
            stderr: self.stderr.try_clone()?,
        })
    }
}

#[derive(Debug)]
struct Pipe {
    kind: Kind,
    stream: LogStream,
    receiver: Receiver,
    open: bool,
}

impl Output {
    /// The runtime's pipes. They belong to `user`, so that the runtime can open `/dev/stdout` again.
    pub(crate) fn new(user: Option<User>) -> io::Result<(Self, WritingEnds)> {
        let mut output = Self {
            pipes: Vec::new(),
            first: None,
            buffer: vec![0; LOG_BYTES_MAX],
        };
        let ends = output.add(Kind::Function, user)?;
        Ok((output, ends))
    }

    /// The pipes of extensions.
    pub(crate) fn add_extensions(&mut self, user: Option<User>) -> io::Result<WritingEnds> {
        self.add(Kind::Extension, user)
    }

    fn add(&mut self, kind: Kind, user: Option<User>) -> io::Result<WritingEnds> {
        let (stdout, stdout_end) = Pipe::new(kind, LogStream::Stdout, user)?;
        let (stderr, stderr_end) = Pipe::new(kind, LogStream::Stderr, user)?;
        self.pipes.extend([stdout, stderr]);
        Ok(WritingEnds {
            stdout: stdout_end,
            stderr: stderr_end,
        })
    }

    /// Waits until any pipe has bytes, and reads the first of them; without end when all are closed. Cancelling
    /// loses nothing. What was read is handed out by [`Self::take`], which must be called before this is again.
    pub(crate) async fn readable(&mut self) {
        while self.first.is_none() {
            let at = ready(&self.pipes).await;
            self.first = self.pipes[at]
                .read(&mut self.buffer)
                .map(|bytes| (at, bytes));
        }
    }

    /// How many bytes were written and not read yet: what must go to the host before an answer does.
    pub(crate) fn backlog(&self) -> Backlog {
        let mut backlog = Backlog::default();
        for (left, pipe) in backlog.0.iter_mut().zip(&self.pipes) {
            *left = pipe.waiting();
        }
        backlog
    }

    /// The next piece of a backlog, at most [`LOG_BYTES_MAX`]; `None` when it is used up.
    pub(crate) fn take(&mut self, backlog: &mut Backlog) -> Option<Written> {
        for (at, (pipe, left)) in self.pipes.iter().zip(&mut backlog.0).enumerate() {
            let first = self.first.take_if(|(of, _)| *of == at);
            let mut bytes = first.map(|(_, bytes)| bytes).unwrap_or_default();
            let length = (*left).min(LOG_BYTES_MAX - bytes.len());
            if length > 0 {
                // Straight from the pipe: tokio learns of these bytes only when the event loop turns next.
                match rustix::io::read(&pipe.receiver, &mut self.buffer[..length]) {
                    Ok(read) if read > 0 => {
                        *left -= read;
                        bytes.extend_from_slice(&self.buffer[..read]);
                    }
                    _ => *left = 0,
                }
            }
            if !bytes.is_empty() {
                return Some(Written {
                    kind: pipe.kind,
                    stream: pipe.stream,
                    bytes,
                });
            }
        }
        None
    }
}

/// Bytes that lay in the pipes at one moment; at most what a pipe holds, however fast the runtime writes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backlog([usize; PIPES_MAX]);

/// Waits until one of the pipes has bytes, or is closed; says which.
async fn ready(pipes: &[Pipe]) -> usize {
    let one = async |at: usize| match pipes.get(at) {
        Some(pipe) => pipe.ready().await,
        None => std::future::pending().await,
    };
    tokio::select! {
        () = one(0) => 0,
        () = one(1) => 1,
        () = one(2) => 2,
        () = one(3) => 3,
    }
}

impl Pipe {
    fn new(kind: Kind, stream: LogStream, user: Option<User>) -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // A larger pipe is a favour: the runtime only blocks earlier without it.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        if let Some(user) = user {
            let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
            rustix::fs::fchown(&write, Some(uid), Some(gid))?;
        }
        let pipe = Self {
            kind,
            stream,
            receiver: Receiver::from_owned_fd(read)?,
            open: true,
        };
        Ok((pipe, write))
    }

    async fn ready(&self) {
        if !self.open || self.receiver.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    fn waiting(&self) -> usize {
        let waiting = rustix::io::ioctl_fionread(&self.receiver).unwrap_or(0);
        usize::try_from(waiting).unwrap_or(usize::MAX)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Option<Vec<u8>> {
        match self.receiver.try_read(buffer) {
            Ok(0) => {
                self.open = false;
                None
            }
            Ok(length) => Some(buffer[..length].to_vec()),
            Err(error) => {
                self.open = error.kind() == io::ErrorKind::WouldBlock;
                None
            }
        }
    }
}
