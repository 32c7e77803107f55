//! The network of a guest as it looks from inside: the same in every sandbox, so that a snapshot holds nothing that a clone must
//! change. What tells sandboxes apart lies outside, on the host. Whoever changes a number here makes every snapshot of a guest
//! with a network refuse to be restored.

use std::net::Ipv4Addr;

/// The guest's own address, on its only interface, `eth0`.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 2);
/// Everything but the guest itself: its default route.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 1);
/// The only name server, UDP and TCP port 53.
pub const DNS_ADDRESS: Ipv4Addr = GATEWAY_ADDRESS;
/// Length of the prefix that guest and gateway share.
pub const PREFIX_BITS: u8 = 30;
/// The same as a netmask.
pub const NETMASK: Ipv4Addr = Ipv4Addr::from_bits(u32::MAX << (32 - PREFIX_BITS));
/// Ethernet address of `eth0`: locally administered, unicast, "THAW" in the middle.
pub const GUEST_MAC: [u8; 6] = [0x06, 0x54, 0x48, 0x41, 0x57, 0x02];
/// Ethernet address of the gateway, which the guest has in its ARP table from the start.
pub const GATEWAY_MAC: [u8; 6] = [0x06, 0x54, 0x48, 0x41, 0x57, 0x01];
/// Longest IP packet, bytes, in both directions.
pub const MTU: u16 = 1500;
/// Bytes of `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6) before each frame, on the tap as in the guest's queues.
pub const VNET_HEADER_BYTES: usize = 12;

/// What the guest's programs trust. An authority of [`crate::Configure`] is added to it.
pub const AUTHORITIES_FILE: &str = "/etc/ssl/certs/ca-certificates.crt";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_and_gateway_are_the_two_hosts_of_one_prefix() {
        assert_eq!(NETMASK, Ipv4Addr::new(255, 255, 255, 252));
        let hosts = [GATEWAY_ADDRESS, GUEST_ADDRESS].map(Ipv4Addr::to_bits);
        let network = hosts[0] & NETMASK.to_bits();
        assert_eq!(hosts, [network + 1, network + 2]);
        for mac in [GUEST_MAC, GATEWAY_MAC] {
            assert_eq!(mac[0] & 0b11, 0b10, "locally administered, unicast");
        }
    }
}
