//! What both monitors' guests have in common: the kernel's command line, and one byte that comes back.

use std::time::Duration;

/// For both sides the same: no console at all, for console output costs a VM exit for each character.
pub const COMMAND_LINE: &str = "8250.nr_uarts=0 quiet loglevel=0 panic=-1 reboot=k pci=off";
/// The guest's first byte on the stream that it opens: it is up.
pub const READY: u8 = b'+';
/// The byte that is sent and comes back.
pub const PROBE: u8 = b'?';
/// Where the guest listens for streams that the host opens.
pub const GUEST_PORT: u32 = 1025;
/// Longest wait for anything: an emulated host is slow.
pub const PATIENCE: Duration = Duration::from_secs(60);
