//! Network interfaces, through the ioctls of netdevice(7), arp(7) and rtnetlink's elder `SIOCADDRT`: IPv4 and one interface need no more.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd as _;

use super::check;

/// Constants of libc in the types of the structures that take them.
const AF_INET: libc::sa_family_t = 2;
const _: () = assert!(AF_INET as libc::c_int == libc::AF_INET);
const ARPHRD_ETHER: libc::sa_family_t = 1;
const _: () = assert!(ARPHRD_ETHER == libc::ARPHRD_ETHER);
const IFF_UP: libc::c_short = 1;
const _: () = assert!(IFF_UP as libc::c_int == libc::IFF_UP);
const RTF_UP: libc::c_ushort = 1;
const _: () = assert!(RTF_UP == libc::RTF_UP);
const RTF_GATEWAY: libc::c_ushort = 2;
const _: () = assert!(RTF_GATEWAY == libc::RTF_GATEWAY);

/// A socket of any kind: the ioctls ask only for its network namespace.
fn socket() -> io::Result<UdpSocket> {
    UdpSocket::bind("0.0.0.0:0")
}

fn named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain integers and a union of them, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    copy_name(&mut request.ifr_name, name)?;
    Ok(request)
}

/// Leaves a final zero.
fn copy_name(room: &mut [libc::c_char], name: &str) -> io::Result<()> {
    if name.len() >= room.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in room.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(())
}

/// An IPv4 address as a `sockaddr_in` under its generic type, which has the same size.
fn internet(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: sockaddr is plain integers, for which all zeroes is a value.
    let mut generic: libc::sockaddr = unsafe { std::mem::zeroed() };
    generic.sa_family = AF_INET;
    // `sin_port` and then `sin_addr`, in network order (ip(7)).
    for (to, from) in generic.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    generic
}

/// Brings an interface up.
///
/// # Errors
/// No such interface, or no privilege.
pub fn up(name: &str) -> io::Result<()> {
    let mut request = named(name)?;
    let socket = socket()?;
    // SAFETY: SIOCGIFFLAGS reads the name and writes the flags of the ifreq it is given, which outlives the call.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS as _,
            &raw mut request,
        )
    })?;
    // SAFETY: SIOCGIFFLAGS has set this member of the union; every bit pattern of it is a value.
    unsafe { request.ifr_ifru.ifru_flags |= IFF_UP };
    // SAFETY: SIOCSIFFLAGS reads the ifreq it is given, which outlives the call.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    })?;
    Ok(())
}

/// Gives an interface its address and netmask.
///
/// # Errors
/// No such interface, or no privilege.
pub fn set_address(name: &str, address: Ipv4Addr, netmask: Ipv4Addr) -> io::Result<()> {
    let socket = socket()?;
    let mut request = named(name)?;
    request.ifr_ifru.ifru_addr = internet(address);
    // SAFETY: SIOCSIFADDR reads the name and this member of the ifreq it is given, which outlives the call.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFADDR as _,
            &raw const request,
        )
    })?;
    request.ifr_ifru.ifru_netmask = internet(netmask);
    // SAFETY: SIOCSIFNETMASK does the same with this member.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFNETMASK as _,
            &raw const request,
        )
    })?;
    Ok(())
}

/// Sends what no other route is for to `gateway`, which an interface that is up reaches.
///
/// # Errors
/// No way to the gateway, or no privilege.
pub fn add_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let socket = socket()?;
    // SAFETY: rtentry is plain integers and pointers, for which all zeroes is a value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = internet(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = internet(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = internet(gateway);
    route.rt_flags = RTF_UP | RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads the rtentry it is given, which outlives the call; its pointer to a device name is null.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &raw const route) })?;
    Ok(())
}

/// Enters a neighbour for good, so that nobody has to be asked for its Ethernet address, and nobody else can claim it.
///
/// # Errors
/// No such interface or an address that it does not reach; no privilege.
pub fn add_neighbour(name: &str, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
    let socket = socket()?;
    // SAFETY: arpreq is plain integers, for which all zeroes is a value.
    let mut entry: libc::arpreq = unsafe { std::mem::zeroed() };
    entry.arp_pa = internet(address);
    entry.arp_ha.sa_family = ARPHRD_ETHER;
    for (to, from) in entry.arp_ha.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    entry.arp_flags = libc::ATF_PERM | libc::ATF_COM;
    copy_name(&mut entry.arp_dev, name)?;
    // SAFETY: SIOCSARP reads the arpreq it is given, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSARP as _, &raw const entry) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_lies_where_the_kernel_looks_for_it() {
        let generic = internet(Ipv4Addr::new(172, 31, 255, 2));
        // SAFETY: both are plain integers, and sockaddr_in is not longer.
        let address: libc::sockaddr_in = unsafe { std::mem::transmute_copy(&generic) };
        assert_eq!(size_of_val(&generic), size_of_val(&address));
        assert_eq!(address.sin_family, AF_INET);
        assert_eq!(address.sin_port, 0);
        assert_eq!(address.sin_addr.s_addr.to_ne_bytes(), [172, 31, 255, 2]);
    }

    #[test]
    fn a_name_over_the_kernels_limit_is_refused() {
        let error = up("a-name-of-sixteen").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
