//! Framing of control messages with descriptors. Blocking or non-blocking is the socket's own setting: a would-block
//! comes back as an error of that kind before anything was sent or taken.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{FDS_MAX, MESSAGE_BYTES_MAX};

/// Why a message could not be sent or understood. The stream is lost afterwards.
#[derive(Debug, Error)]
pub enum WireError {
    /// The message or its descriptors are over the limits.
    #[error(
        "control message of {bytes} bytes with {fds} descriptors is over the limit of {MESSAGE_BYTES_MAX} and {FDS_MAX}"
    )]
    TooLarge {
        /// JSON length.
        bytes: usize,
        /// Descriptor count.
        fds: usize,
    },
    /// Not JSON of the expected kind.
    #[error("control message is malformed")]
    Malformed(#[source] serde_json::Error),
    /// The socket failed.
    #[error("control socket failed")]
    Socket(#[source] io::Error),
}

/// The bytes of a message: length, then JSON.
///
/// # Errors
/// The message is over [`MESSAGE_BYTES_MAX`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let json = serde_json::to_vec(message).map_err(WireError::Malformed)?;
    match u32::try_from(json.len()) {
        Ok(length) if json.len() <= MESSAGE_BYTES_MAX => {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend_from_slice(&json);
            Ok(bytes)
        }
        _ => Err(WireError::TooLarge {
            bytes: json.len(),
            fds: 0,
        }),
    }
}

/// One `sendmsg` of `bytes` with `fds` attached to the first of them; returns how many bytes went out (at least one).
///
/// # Errors
/// The socket's own, would-block included.
pub fn send_some(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    Ok(sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

/// Sends a whole message on a blocking socket.
///
/// # Errors
/// Message over the limits, or the socket's own.
pub fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), WireError> {
    let bytes = encode(message)?;
    if fds.len() > FDS_MAX {
        return Err(WireError::TooLarge {
            bytes: bytes.len(),
            fds: fds.len(),
        });
    }
    let (mut sent, mut fds) = (0, fds);
    while sent < bytes.len() {
        match send_some(&socket, &bytes[sent..], fds) {
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

/// Bytes taken from the socket at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// Puts messages and their descriptors together again from a stream.
#[derive(Debug, Default)]
pub struct Receiver {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// Where bytes land; kept, because a claim should not wait for memory to be cleared.
    chunk: Vec<u8>,
}

/// What one read of the socket brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// Some bytes.
    Some,
    /// The peer closed.
    Closed,
}

impl Receiver {
    /// An empty receiver.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads once from the socket.
    ///
    /// # Errors
    /// The socket's own, would-block included; too many descriptors pending.
    pub fn read_from(&mut self, socket: impl AsFd) -> io::Result<Read> {
        self.chunk.resize(CHUNK_BYTES, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut self.chunk)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > FDS_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "too many descriptors in flight",
            ));
        }
        if received.bytes == 0 {
            return Ok(Read::Closed);
        }
        self.bytes.extend_from_slice(&self.chunk[..received.bytes]);
        Ok(Read::Some)
    }

    /// The next whole message with every descriptor that has come so far. As the protocol is one request at a time, those
    /// are the message's own.
    ///
    /// # Errors
    /// Length over the limit, or not JSON of the expected kind.
    pub fn next_message<T: DeserializeOwned>(
        &mut self,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, WireError> {
        let Some(length) = self.bytes.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MESSAGE_BYTES_MAX {
            return Err(WireError::TooLarge {
                bytes: length,
                fds: self.fds.len(),
            });
        }
        let Some(json) = self.bytes.get(4..4 + length) else {
            return Ok(None);
        };
        let message = serde_json::from_slice(json).map_err(WireError::Malformed)?;
        self.bytes.drain(..4 + length);
        Ok(Some((message, std::mem::take(&mut self.fds))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        BootRequest, Disk, DiskAccess, DiskSource, FromMonitor, Network, Reply, Request, Status,
    };
    use std::fs::File;
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_request_arrives_with_its_descriptors_in_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let request = Request::Boot(BootRequest {
            vcpu_count: 1,
            memory_mib: 128,
            command_line: "quiet".into(),
            has_initramfs: false,
            disks: vec![Disk {
                id: "root".into(),
                access: DiskAccess::ReadOnly,
                source: DiskSource::Descriptor,
            }],
            network: Network::Absent,
        });
        let (one, two) = (
            File::open("/proc/self/comm").unwrap(),
            File::open("/dev/null").unwrap(),
        );
        send(&ours, &request, &[one.as_fd(), two.as_fd()]).unwrap();
        let mut receiver = Receiver::new();
        let (received, fds) = loop {
            assert_eq!(receiver.read_from(&theirs).unwrap(), Read::Some);
            if let Some(message) = receiver.next_message::<Request>().unwrap() {
                break message;
            }
        };
        assert_eq!(received, request);
        let [first, second] = <[OwnedFd; 2]>::try_from(fds).unwrap();
        let (mut a, mut b) = (String::new(), String::new());
        File::from(first).read_to_string(&mut a).unwrap();
        File::from(second).read_to_string(&mut b).unwrap();
        assert!(!a.is_empty() && b.is_empty());
    }

    #[test]
    fn replies_and_events_are_told_apart() {
        let reply = FromMonitor::Reply(Reply::Status(Status::default()));
        let json = serde_json::to_string(&reply).unwrap();
        assert_eq!(serde_json::from_str::<FromMonitor>(&json).unwrap(), reply);
    }

    #[test]
    fn an_oversized_length_is_refused_before_it_is_read() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_some(&ours, &u32::MAX.to_le_bytes(), &[]).unwrap();
        let mut receiver = Receiver::new();
        receiver.read_from(&theirs).unwrap();
        assert!(matches!(
            receiver.next_message::<Request>(),
            Err(WireError::TooLarge { .. })
        ));
    }

    #[test]
    fn a_closed_peer_is_told_from_an_empty_read() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert_eq!(Receiver::new().read_from(&theirs).unwrap(), Read::Closed);
    }
}
