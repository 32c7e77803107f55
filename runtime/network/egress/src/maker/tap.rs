//! A tap in this thread's network namespace (`Documentation/networking/tuntap.rst`).

use std::ffi::{c_int, c_short};
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open as open_file};
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};
use thaw_network::VNET_HEADER_BYTES;

/// Values of `linux/if_tun.h`.
const IFF_TAP: c_short = 0x0002;
const IFF_NO_PI: c_short = 0x1000;
const IFF_VNET_HDR: c_short = 0x4000;
/// Longest name of an interface, with its zero.
const NAME_BYTES: usize = 16;

/// `struct ifreq`, with flags: 40 bytes on 64-bit machines.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: c_short,
    padding: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

const TUNSETIFF: Opcode = opcode::write::<c_int>(b'T', 202);
const TUNSETOFFLOAD: Opcode = opcode::write::<std::ffi::c_uint>(b'T', 208);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<c_int>(b'T', 216);

/// A tap that ends with its descriptor, which does not block; each frame has a header of [`VNET_HEADER_BYTES`], and nothing is offloaded.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = open_file("/dev/net/tun", flags, Mode::empty())?;
    let mut request = InterfaceRequest {
        name: [0; NAME_BYTES],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        padding: [0; 22],
    };
    let room = &mut request.name[..NAME_BYTES - 1];
    for (to, from) in room.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let header = c_int::try_from(VNET_HEADER_BYTES).map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which the type is in size and layout (asserted above).
    unsafe { ioctl(&tap, Updater::<TUNSETIFF, _>::new(&mut request))? };
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    unsafe { ioctl(&tap, Setter::<TUNSETVNETHDRSZ, c_int>::new(header))? };
    // SAFETY: TUNSETOFFLOAD takes its flags in place of a pointer; 0 is no offload.
    unsafe { ioctl(&tap, IntegerSetter::<TUNSETOFFLOAD>::new_usize(0))? };
    Ok(tap)
}
