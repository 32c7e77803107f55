//! The runtime's standard output and error: pipes that the agent reads no faster than the host takes the bytes.

use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid};
use thaw_agent_protocol::LogStream;
use tokio::net::unix::pipe::Receiver;

use crate::sys::User;

/// Most bytes in one `Log` message.
pub const LOG_BYTES_MAX: usize = 64 * 1024;

/// What the runtime can write before it waits for the agent to read (pipe(7); a power of two).
const PIPE_BYTES: usize = 256 * 1024;

/// The reading ends of both pipes.
#[derive(Debug)]
pub(crate) struct Output {
    stdout: Pipe,
    stderr: Pipe,
    first: Option<(LogStream, Vec<u8>)>,
    buffer: Vec<u8>,
}

/// The writing ends, for the runtime.
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
    stream: LogStream,
    receiver: Receiver,
    open: bool,
}

impl Output {
    /// Makes both pipes. They belong to `user`, so that the runtime can open `/dev/stdout` again.
    pub(crate) fn new(user: Option<User>) -> io::Result<(Self, WritingEnds)> {
        let (stdout, stdout_end) = Pipe::new(LogStream::Stdout, user)?;
        let (stderr, stderr_end) = Pipe::new(LogStream::Stderr, user)?;
        let output = Self {
            stdout,
            stderr,
            first: None,
            buffer: vec![0; LOG_BYTES_MAX],
        };
        let ends = WritingEnds {
            stdout: stdout_end,
            stderr: stderr_end,
        };
        Ok((output, ends))
    }

    /// Waits until either stream has bytes, and reads the first of them; without end when both are closed. Cancelling
    /// loses nothing. What was read is handed out by [`Self::take`], which must be called before this is again.
    pub(crate) async fn readable(&mut self) {
        while self.first.is_none() {
            let pipe = tokio::select! {
                () = self.stdout.ready() => &mut self.stdout,
                () = self.stderr.ready() => &mut self.stderr,
            };
            self.first = pipe
                .read(&mut self.buffer)
                .map(|bytes| (pipe.stream, bytes));
        }
    }

    /// How many bytes were written and not read yet: what must go to the host before an answer does.
    pub(crate) fn backlog(&self) -> Backlog {
        Backlog {
            stdout: self.stdout.waiting(),
            stderr: self.stderr.waiting(),
        }
    }

    /// The next piece of a backlog, at most [`LOG_BYTES_MAX`]; `None` when it is used up.
    pub(crate) fn take(&mut self, backlog: &mut Backlog) -> Option<(LogStream, Vec<u8>)> {
        for (pipe, left) in [
            (&mut self.stdout, &mut backlog.stdout),
            (&mut self.stderr, &mut backlog.stderr),
        ] {
            let first = self.first.take_if(|(stream, _)| *stream == pipe.stream);
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
                return Some((pipe.stream, bytes));
            }
        }
        None
    }
}

/// Bytes that lay in the pipes at one moment; at most what a pipe holds, however fast the runtime writes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backlog {
    stdout: usize,
    stderr: usize,
}

impl Pipe {
    fn new(stream: LogStream, user: Option<User>) -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        // A larger pipe is a favour: the runtime only blocks earlier without it.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        if let Some(user) = user {
            let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
            rustix::fs::fchown(&write, Some(uid), Some(gid))?;
        }
        let pipe = Self {
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
