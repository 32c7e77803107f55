//! The host's end: a tap (Documentation/networking/tuntap.rst) of the form IFF_TAP, IFF_NO_PI, IFF_VNET_HDR with a header of
//! [`HEADER_BYTES`](super::HEADER_BYTES) and no offloads. Who made it is not known here; a descriptor is all there is.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// One try to take a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// Header and frame of so many bytes; a longer one was cut to the room for it.
    Packet(usize),
    /// None is there now, or ever again.
    Nothing,
}

/// A tap that never blocks.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
}

impl Tap {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { file: fd.into() })
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Takes the next packet. An interface that is down or gone (EIO, EBADFD) has none: a network is never what ends a machine.
    pub(super) fn receive(&self, room: &mut [u8]) -> Received {
        loop {
            match (&self.file).read(room) {
                Ok(length) if length > 0 => return Received::Packet(length),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return Received::Nothing,
            }
        }
    }

    /// Gives a packet to the host, which may have no room for it or no interface any more: it is lost then, as on any network.
    pub(super) fn send(&self, packet: &[u8]) {
        while let Err(error) = (&self.file).write(packet)
            && error.kind() == ErrorKind::Interrupted
        {}
    }
}
