//! The channel to the host: frames over a stream socket.

use std::io;
use std::os::fd::OwnedFd;

use thaw_agent_protocol::{
    AgentMessage, Decoder, Frame, FrameError, Generation, HostMessage, Message, MessageError,
};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 64 * 1024;

/// Messages read ahead of the driver. The host may write while the driver itself waits to write.
pub(crate) const MESSAGES_MAX: usize = 4;

/// Why the channel cannot be used any more.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// Reading or writing failed.
    #[error("using the agent channel")]
    Io(#[source] io::Error),
    /// The host closed it.
    #[error("the host closed the agent channel")]
    Closed,
    /// The host's bytes are no frame.
    #[error("reading a frame from the host")]
    Frame(#[source] FrameError),
    /// A frame is no message, or a message does not fit a frame.
    #[error("reading or writing a message of the agent channel")]
    Message(#[source] MessageError),
}

/// Both directions of a connected stream socket, for tokio. The socket may be of any family: only recv(2) and send(2)
/// are used on it, so tokio's Unix stream does for vsock, which tokio has no type for.
///
/// # Errors
/// The descriptor cannot be polled.
pub fn split(socket: OwnedFd) -> io::Result<(OwnedReadHalf, OwnedWriteHalf)> {
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.set_nonblocking(true)?;
    Ok(UnixStream::from_std(stream)?.into_split())
}

/// A message with the generation of its frame, or the reason why there are no more.
pub(crate) type Incoming = Result<(Generation, HostMessage), ChannelError>;

/// Hands every message of the host to `messages`, and at last the reason why reading ended.
pub(crate) async fn read_messages(
    stream: impl AsyncRead + Unpin,
    messages: mpsc::Sender<Incoming>,
) {
    let mut reader = Reader {
        stream,
        decoder: Decoder::new(),
        buffer: vec![0; READ_BYTES],
    };
    loop {
        let message = reader.next().await;
        let ended = message.is_err();
        if messages.send(message).await.is_err() || ended {
            return;
        }
    }
}

struct Reader<S> {
    stream: S,
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl<S: AsyncRead + Unpin> Reader<S> {
    async fn next(&mut self) -> Incoming {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(ChannelError::Frame)? {
                return interpret(frame);
            }
            match self.stream.read(&mut self.buffer).await {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(length) => self.decoder.feed(&self.buffer[..length]),
                Err(error) => return Err(ChannelError::Io(error)),
            }
        }
    }
}

fn interpret(frame: Frame) -> Incoming {
    let generation = frame.generation;
    let message = HostMessage::from_frame(frame).map_err(ChannelError::Message)?;
    Ok((generation, message))
}

/// Writes messages in the current generation.
#[derive(Debug)]
pub(crate) struct Writer<S> {
    stream: S,
    generation: Generation,
    buffer: Vec<u8>,
}

impl<S: AsyncWrite + Unpin> Writer<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            generation: Generation::default(),
            buffer: Vec::new(),
        }
    }

    /// Every later message is written in this generation.
    pub(crate) fn adopt(&mut self, generation: Generation) {
        self.generation = generation;
    }

    /// Appends a message to what the next [`Self::flush`] writes.
    pub(crate) fn queue(&mut self, message: AgentMessage) -> Result<(), ChannelError> {
        message
            .encode(self.generation, &mut self.buffer)
            .map_err(ChannelError::Message)
    }

    /// Bytes queued and not written.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Writes everything queued; waits while the host does not read.
    pub(crate) async fn flush(&mut self) -> Result<(), ChannelError> {
        let result = self.stream.write_all(&self.buffer).await;
        self.buffer.clear();
        // One large answer must not stay in the memory that snapshots and clones carry.
        self.buffer.shrink_to(READ_BYTES);
        result.map_err(ChannelError::Io)
    }

    /// Queues and writes.
    pub(crate) async fn send(&mut self, message: AgentMessage) -> Result<(), ChannelError> {
        self.queue(message)?;
        self.flush().await
    }
}
