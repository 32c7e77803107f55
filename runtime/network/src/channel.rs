//! Messages with descriptors over a Unix stream, for tokio. The frames are those of [`thaw_vmm_control::wire`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};
use thaw_vmm_control::FDS_MAX;
use thaw_vmm_control::wire::{self, Read, Receiver, WireError};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// The half that sends.
#[derive(Debug)]
pub struct Sender(Arc<UnixStream>);

/// The half that receives.
#[derive(Debug)]
pub struct Incoming {
    socket: Arc<UnixStream>,
    receiver: Receiver,
    /// In the order in which they came. A descriptor never comes later than its message, but may come with the one before it.
    fds: VecDeque<OwnedFd>,
}

/// Both halves of `socket`.
pub fn halves(socket: UnixStream) -> (Sender, Incoming) {
    let socket = Arc::new(socket);
    let incoming = Incoming {
        socket: Arc::clone(&socket),
        receiver: Receiver::new(),
        fds: VecDeque::new(),
    };
    (Sender(socket), incoming)
}

impl Sender {
    /// Sends a whole message. A future that is dropped half-way leaves the stream out of step.
    ///
    /// # Errors
    /// Over the limits of a message, or the socket's own.
    pub async fn send<T: Serialize>(
        &mut self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), WireError> {
        let bytes = wire::encode(message)?;
        let (mut sent, mut fds) = (0, fds);
        while sent < bytes.len() {
            let rest = &bytes[sent..];
            let result = self
                .0
                .async_io(Interest::WRITABLE, || wire::send_some(&*self.0, rest, fds));
            match result.await {
                Ok(count) => {
                    sent += count;
                    fds = &[];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WireError::Socket(error)),
            }
        }
        Ok(())
    }
}

impl Incoming {
    /// The next message; none when the peer closed. A future that is dropped has lost nothing.
    ///
    /// # Errors
    /// No message of the expected kind, more descriptors than [`FDS_MAX`] that nobody took, or the socket's own.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, WireError> {
        loop {
            if let Some((message, fds)) = self.receiver.next_message()? {
                self.fds.extend(fds);
                // Who takes none of them, because none was to come, would be without descriptors one day.
                if self.fds.len() > FDS_MAX {
                    return Err(WireError::TooLarge {
                        bytes: 0,
                        fds: self.fds.len(),
                    });
                }
                return Ok(Some(message));
            }
            let receiver = &mut self.receiver;
            let read = self
                .socket
                .async_io(Interest::READABLE, || receiver.read_from(&*self.socket));
            match read.await {
                Ok(Read::Some) => {}
                Ok(Read::Closed) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WireError::Socket(error)),
            }
        }
    }

    /// The oldest descriptor that nobody took yet: who has a message that brings one takes it before the next message.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        self.fds.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    #[tokio::test]
    async fn descriptors_that_nobody_asked_for_end_the_channel_and_do_not_gather() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut sender, _other) = halves(theirs);
        let (_sender, mut incoming) = halves(ours);
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut taken = 0;
        let ended = loop {
            sender.send(&taken, &[file.as_fd(); 3]).await.unwrap();
            match incoming.next::<usize>().await {
                Ok(message) => assert_eq!(message, Some(taken)),
                Err(error) => break error,
            }
            taken += 1;
        };
        assert!(matches!(ended, WireError::TooLarge { .. }), "{ended}");
        assert_eq!(taken, FDS_MAX / 3);
    }
}
