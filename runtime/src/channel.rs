//! The agent channel: frames to and from the guest's agent, through the monitor.

use std::io;

use thaw_agent_protocol::{
    AgentMessage, Decoder, Generation, HostMessage, Message as _, MessageError,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Bytes taken from the socket at once.
const READ_BYTES: usize = 64 * 1024;

/// Our end of one monitor's agent channel. Holds at most one frame's bytes each way.
#[derive(Debug)]
pub(crate) struct AgentChannel {
    stream: UnixStream,
    decoder: Decoder,
    generation: Generation,
    outgoing: Vec<u8>,
    sent: usize,
    closed: bool,
    stale_frames: u64,
}

/// What the channel brings.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// A message of the present generation.
    Message(AgentMessage),
    /// The guest, or the monitor, closed the channel.
    Closed,
    /// The agent's bytes are no frames or messages; the channel is lost.
    Broken(MessageError),
}

/// What lies next in the bytes that have come.
enum Decoded {
    Incoming(Incoming),
    /// A frame of another generation.
    Stale,
    /// Not a whole frame.
    Nothing,
}

impl AgentChannel {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
            generation: Generation(0),
            outgoing: Vec::new(),
            sent: 0,
            closed: false,
            stale_frames: 0,
        }
    }

    /// From now on frames are written in this generation, and those of another are dropped.
    pub(crate) fn enter(&mut self, generation: Generation) {
        self.generation = generation;
    }

    /// Frames of another generation dropped so far.
    pub(crate) fn stale_frames(&self) -> u64 {
        self.stale_frames
    }

    /// Adds a message to what is to be sent; [`Self::push`] and [`Self::next`] send it.
    pub(crate) fn queue(&mut self, message: HostMessage) -> Result<(), MessageError> {
        message.encode(self.generation, &mut self.outgoing)
    }

    /// Sends as much of the queued bytes as the socket takes at once.
    pub(crate) fn push(&mut self) {
        while self.sent < self.outgoing.len() {
            match self.stream.try_write(&self.outgoing[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Nobody will read the rest. What the peer wrote before it closed is still to be read.
                Err(_) => self.sent = self.outgoing.len(),
            }
        }
        self.outgoing = Vec::new();
        self.sent = 0;
    }

    /// The next message, sending queued bytes meanwhile. Cancelling loses nothing.
    pub(crate) async fn next(&mut self) -> Incoming {
        loop {
            // What a guest has to say may never end: others have their turn, and clocks are looked at.
            tokio::task::consume_budget().await;
            match self.decode() {
                Decoded::Incoming(incoming) => return incoming,
                Decoded::Stale => continue,
                Decoded::Nothing => {}
            }
            let interest = if self.outgoing.is_empty() {
                Interest::READABLE
            } else {
                Interest::READABLE | Interest::WRITABLE
            };
            match self.stream.ready(interest).await {
                Ok(ready) => {
                    if ready.is_writable() {
                        self.push();
                    }
                    if ready.is_readable() || ready.is_read_closed() {
                        self.pull();
                    }
                }
                Err(_) => self.closed = true,
            }
        }
    }

    /// The next message that has arrived already.
    pub(crate) fn next_now(&mut self) -> Option<Incoming> {
        loop {
            match self.decode() {
                Decoded::Incoming(incoming) => return Some(incoming),
                Decoded::Stale => continue,
                Decoded::Nothing => {}
            }
            // Past tokio's readiness, which may lag behind: the socket does not block, and what is there counts.
            let mut chunk = [0; READ_BYTES];
            let read = rustix::io::read(&self.stream, &mut chunk[..]);
            if !self.took(&chunk, read.map_err(io::Error::from)) && !self.closed {
                return None;
            }
        }
    }

    fn pull(&mut self) {
        let mut chunk = [0; READ_BYTES];
        let read = self.stream.try_read(&mut chunk);
        self.took(&chunk, read);
    }

    /// Takes in what a read brought; tells whether bytes came.
    fn took(&mut self, chunk: &[u8], read: io::Result<usize>) -> bool {
        match read {
            Ok(0) => self.closed = true,
            Ok(count) => {
                self.decoder.feed(&chunk[..count]);
                return true;
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            // A reset is how a killed monitor closes.
            Err(_) => self.closed = true,
        }
        false
    }

    fn decode(&mut self) -> Decoded {
        let frame = match self.decoder.next_frame() {
            Ok(Some(frame)) => frame,
            Ok(None) if self.closed => return Decoded::Incoming(Incoming::Closed),
            Ok(None) => return Decoded::Nothing,
            Err(error) => return Decoded::Incoming(Incoming::Broken(error.into())),
        };
        if frame.generation != self.generation {
            self.stale_frames += 1;
            return Decoded::Stale;
        }
        Decoded::Incoming(match AgentMessage::from_frame(frame) {
            Ok(message) => Incoming::Message(message),
            Err(error) => Incoming::Broken(error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_agent_protocol::{Frame, Invoke};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn bytes(message: AgentMessage, generation: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        message.encode(Generation(generation), &mut bytes).unwrap();
        bytes
    }

    #[tokio::test]
    async fn frames_of_another_generation_are_dropped_and_counted() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut channel = AgentChannel::new(ours);
        channel.enter(Generation(9));
        theirs
            .write_all(&bytes(AgentMessage::Ready, 0))
            .await
            .unwrap();
        theirs
            .write_all(&bytes(AgentMessage::Ready, 8))
            .await
            .unwrap();
        theirs
            .write_all(&bytes(
                AgentMessage::Thawed {
                    unique_after_ns: None,
                    extensions: false,
                },
                9,
            ))
            .await
            .unwrap();
        assert!(matches!(
            channel.next().await,
            Incoming::Message(AgentMessage::Thawed { .. })
        ));
        assert_eq!(channel.stale_frames(), 2);
    }

    #[tokio::test]
    async fn a_payload_larger_than_the_socket_is_sent_while_waiting() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut channel = AgentChannel::new(ours);
        let payload = vec![7; 6 * 1024 * 1024];
        channel
            .queue(HostMessage::Invoke(Invoke {
                payload: payload.clone(),
                ..Invoke::default()
            }))
            .unwrap();
        channel.push();
        let peer = tokio::spawn(async move {
            let (mut decoder, mut chunk) = (Decoder::new(), vec![0; 100_000]);
            loop {
                let count = theirs.read(&mut chunk).await.unwrap();
                decoder.feed(&chunk[..count]);
                if let Some(frame) = decoder.next_frame().unwrap() {
                    theirs
                        .write_all(&bytes(
                            AgentMessage::Thawed {
                                unique_after_ns: None,
                                extensions: false,
                            },
                            0,
                        ))
                        .await
                        .unwrap();
                    return frame;
                }
            }
        });
        assert!(matches!(
            channel.next().await,
            Incoming::Message(AgentMessage::Thawed { .. })
        ));
        assert_eq!(peer.await.unwrap().body, payload);
    }

    #[tokio::test]
    async fn what_was_written_before_the_close_is_read_first() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut channel = AgentChannel::new(ours);
        theirs
            .write_all(&bytes(AgentMessage::Ready, 0))
            .await
            .unwrap();
        drop(theirs);
        assert!(matches!(
            channel.next().await,
            Incoming::Message(AgentMessage::Ready)
        ));
        assert!(matches!(channel.next().await, Incoming::Closed));
        assert!(matches!(channel.next_now(), Some(Incoming::Closed)));
    }

    /// On one thread: a reader that never yields would stop every clock, the one for its own deadline included.
    #[tokio::test]
    async fn a_guest_that_never_stops_talking_leaves_the_others_their_turn() {
        const FRAMES: usize = 5000;
        // Of this life, and of none.
        for generation in [0, 8] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut flood = bytes(AgentMessage::Ready, generation).repeat(FRAMES);
            flood.extend(bytes(AgentMessage::Settled, 0));
            theirs.write_all(&flood).await.unwrap();
            let mut channel = AgentChannel::new(ours);
            let reader = tokio::spawn(async move {
                while !matches!(
                    channel.next().await,
                    Incoming::Message(AgentMessage::Settled)
                ) {}
            });
            let mut turns = 0;
            while !reader.is_finished() {
                turns += 1;
                tokio::task::yield_now().await;
            }
            assert!(
                turns > FRAMES / 1000,
                "{turns} turns beside {FRAMES} frames"
            );
        }
    }

    #[tokio::test]
    async fn bytes_that_are_no_frame_break_the_channel() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(b"this is not a frame at all")
            .await
            .unwrap();
        assert!(matches!(
            AgentChannel::new(ours).next().await,
            Incoming::Broken(_)
        ));
    }

    #[tokio::test]
    async fn a_host_message_from_the_agent_breaks_the_channel() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let frame = HostMessage::Shutdown.into_frame(Generation(0)).unwrap();
        let mut bytes = Vec::new();
        Frame::encode(&frame, &mut bytes).unwrap();
        theirs.write_all(&bytes).await.unwrap();
        assert!(matches!(
            AgentChannel::new(ours).next().await,
            Incoming::Broken(_)
        ));
    }
}
