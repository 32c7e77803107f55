//! Makes slots: a namespace with a tap, addresses, rules, and the relay's sockets in it.
//!
//! A slot has no way out: its one interface is the tap, and every address is *local* to it (one route), so whatever a guest sends arrives and nothing is
//! forwarded. TCP is handed to the relay's listener with its destination kept (TPROXY; `Documentation/networking/tproxy.rst`), which takes no NAT and no
//! connection tracking, and so no table that a guest can fill. What no socket waits for is refused by the kernel: UDP but DNS, and TCP when the relay is gone.

#[expect(
    unsafe_code,
    reason = "a tap is asked for by ioctl, which no library wraps without it"
)]
mod tap;

use std::io::{self, Write as _};
use std::net::{SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket,
    sockopt,
};
use serde::{Deserialize, Serialize};
use thaw_network::{GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, PREFIX_BITS};
use thaw_vmm_control::wire::{self, Read, Receiver, WireError};
use thiserror::Error;

use crate::privilege;

/// Name of the tap in its namespace.
const TAP: &str = "tap0";
/// Where the relay listens in a slot.
const RELAY_PORT: u16 = 1;
/// Port of the resolver.
pub const DNS_PORT: u16 = 53;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// What the kernel keeps of a guest's connection in each direction: the way is short.
const BUFFER_BYTES: usize = 128 * 1024;

/// From the relay: make one. There is nothing else to say.
#[derive(Debug, Serialize, Deserialize)]
pub struct Make;

/// To the relay.
#[derive(Debug, Serialize, Deserialize)]
pub enum Made {
    /// Descriptors: the tap, the relay's listener, the resolver's listener, its UDP socket.
    Slot,
    /// Not made, and why.
    Failed(String),
}

/// Why the maker ended.
#[derive(Debug, Error)]
pub enum MakerError {
    /// A part of the start.
    #[error("cannot {0}")]
    Start(&'static str, #[source] io::Error),
    /// The relay.
    #[error("the relay is lost")]
    Wire(#[from] WireError),
}

/// Why a slot was not made.
#[derive(Debug, Error)]
enum SlotError {
    #[error("cannot make a network namespace: root, or a user namespace, is needed")]
    Namespace(#[source] nix::Error),
    #[error("cannot make a tap: /dev/net/tun must be readable and writable")]
    Tap(#[source] io::Error),
    #[error("cannot run {program}, which is in the package {package}")]
    Run {
        program: &'static str,
        package: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{program} failed: {stderr}")]
    Failed {
        program: &'static str,
        stderr: String,
    },
    #[error("cannot listen in a slot")]
    Listen(#[source] io::Error),
    #[error("the thread that makes a slot panicked")]
    Panicked,
}

/// Makes a slot whenever the relay says so, until it closes.
pub fn serve(control: UnixStream) -> Result<(), MakerError> {
    // Guests go before those that are not there yet.
    let _ = rustix::process::nice(10);
    own_namespace().map_err(|error| MakerError::Start("make a user namespace", error))?;
    // A change of what this process may do can clear it.
    privilege::die_with_parent().map_err(|error| MakerError::Start("be a child", error))?;
    let mut receiver = Receiver::new();
    loop {
        while let Some((Make, _)) = receiver.next_message::<Make>()? {
            // A thread of its own goes into each namespace and ends: none is kept by who made it.
            let made = std::thread::spawn(make)
                .join()
                .unwrap_or(Err(SlotError::Panicked));
            let sent = match made {
                Ok(fds) => wire::send(&control, &Made::Slot, &fds.each_ref().map(|fd| fd.as_fd())),
                Err(error) => wire::send(&control, &Made::Failed(crate::chain(&error)), &[]),
            };
            match sent {
                Err(WireError::Socket(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(());
                }
                sent => sent?,
            }
        }
        match receiver.read_from(&control) {
            Ok(Read::Some) => {}
            Ok(Read::Closed) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(WireError::Socket(error).into()),
        }
    }
}

/// Goes into a user namespace: the rights to configure networks are then rights over those that are made in it, and the machine's own is out of reach.
/// Where that is forbidden, root goes on without.
fn own_namespace() -> io::Result<()> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if let Err(error) = unshare(CloneFlags::CLONE_NEWUSER) {
        return if user.is_root() {
            Ok(())
        } else {
            Err(error.into())
        };
    }
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))
}

/// A slot, made in this thread, which is in its namespace afterwards.
fn make() -> Result<[OwnedFd; 4], SlotError> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(SlotError::Namespace)?;
    let tap = tap::open(TAP).map_err(SlotError::Tap)?;
    run("ip", "iproute2", &["-batch", "-"], &addresses())?;
    run("nft", "nftables", &["-f", "-"], &filter())?;
    let resolver = SocketAddrV4::new(GATEWAY_ADDRESS, DNS_PORT);
    let names = TcpListener::bind(resolver).map_err(SlotError::Listen)?;
    let datagrams = UdpSocket::bind(resolver).map_err(SlotError::Listen)?;
    for result in [names.set_nonblocking(true), datagrams.set_nonblocking(true)] {
        result.map_err(SlotError::Listen)?;
    }
    let relay = listener().map_err(|error| SlotError::Listen(error.into()))?;
    Ok([tap, relay, names.into(), datagrams.into()])
}

/// A listener that takes connections to any address, and keeps which.
fn listener() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::IpTransparent, &true)?;
    // Connections have the listener's.
    setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES)?;
    setsockopt(&socket, sockopt::SndBuf, &BUFFER_BYTES)?;
    let at = SockaddrIn::from(SocketAddrV4::new(GATEWAY_ADDRESS, RELAY_PORT));
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &at)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// For `ip -batch`.
fn addresses() -> String {
    let (gateway, guest) = (mac(GATEWAY_MAC), mac(GUEST_MAC));
    format!(
        "link set {TAP} address {gateway} addrgenmode none\n\
         addr add {GATEWAY_ADDRESS}/{PREFIX_BITS} dev {TAP}\n\
         link set lo up\n\
         link set {TAP} up\n\
         neigh replace {GUEST_ADDRESS} lladdr {guest} dev {TAP} nud permanent\n\
         route add local default dev lo table main\n"
    )
}

/// For `nft -f`. Everything that is not the guest's own IPv4, and all of IPv6, is dropped; forwarding, which the namespace may have inherited, too.
fn filter() -> String {
    let guest = mac(GUEST_MAC);
    format!(
        "table inet thaw {{
           chain guest {{
             ip daddr {GATEWAY_ADDRESS} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept
             meta l4proto tcp tproxy ip to :{RELAY_PORT} accept
             meta l4proto {{ tcp, udp }} accept
           }}
           chain arriving {{
             type filter hook prerouting priority mangle; policy drop;
             iifname \"{TAP}\" ether saddr {guest} ip saddr {GUEST_ADDRESS} jump guest;
           }}
           chain leaving {{
             type filter hook output priority filter; policy drop;
             oifname \"{TAP}\" meta nfproto ipv4 accept;
           }}
           chain passing {{ type filter hook forward priority filter; policy drop; }}
         }}\n"
    )
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// Runs a program in this thread's namespace, with its standard input.
fn run(
    program: &'static str,
    package: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<(), SlotError> {
    let failed = |source| SlotError::Run {
        program,
        package,
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading says why below.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(SlotError::Failed {
            program,
            stderr: stderr.trim().chars().take(2048).collect(),
        });
    }
    Ok(())
}
