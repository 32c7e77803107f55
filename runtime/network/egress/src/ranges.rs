//! What an address is, whoever asks for it.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use thaw_network::{GATEWAY_ADDRESS, METADATA, PREFIX_BITS};

/// What a policy can do with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Allowed by any rule that fits.
    Public,
    /// Allowed by a CIDR alone.
    Private,
    /// Never allowed.
    Blocked,
}

const fn net(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

/// "This network", loopback, multicast, reserved and broadcast (RFC 6890, RFC 5771); a slot's own. Metadata addresses besides.
const BLOCKED: &[Ipv4Net] = &[
    net(0, 0, 0, 0, 8),
    net(127, 0, 0, 0, 8),
    net(224, 0, 0, 0, 4),
    net(240, 0, 0, 0, 4),
    Ipv4Net::new_assert(GATEWAY_ADDRESS, PREFIX_BITS),
];

/// What is not routed in the Internet (RFC 1918, 6598, 6890, 2544, 5737, 7526).
const PRIVATE: &[Ipv4Net] = &[
    net(10, 0, 0, 0, 8),
    net(100, 64, 0, 0, 10),
    net(172, 16, 0, 0, 12),
    net(192, 0, 0, 0, 24),
    net(192, 0, 2, 0, 24),
    net(192, 88, 99, 0, 24),
    net(192, 168, 0, 0, 16),
    net(198, 18, 0, 0, 15),
    net(198, 51, 100, 0, 24),
    net(203, 0, 113, 0, 24),
];

/// What `address` is, without this machine's own addresses.
pub fn class(address: Ipv4Addr) -> Class {
    let is_in = |nets: &[Ipv4Net]| nets.iter().any(|net| net.contains(&address));
    if is_in(BLOCKED) || is_in(METADATA) {
        Class::Blocked
    } else if is_in(PRIVATE) {
        Class::Private
    } else {
        Class::Public
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_the_registries_say() {
        for (address, expected) in [
            ("0.0.0.0", Class::Blocked),
            ("0.1.2.3", Class::Blocked),
            ("127.0.0.1", Class::Blocked),
            ("127.255.255.254", Class::Blocked),
            ("169.254.169.254", Class::Blocked),
            ("169.254.170.2", Class::Blocked),
            ("168.63.129.16", Class::Blocked),
            ("100.100.100.200", Class::Blocked),
            ("224.0.0.251", Class::Blocked),
            ("240.0.0.1", Class::Blocked),
            ("255.255.255.255", Class::Blocked),
            ("172.31.255.1", Class::Blocked),
            ("172.31.255.2", Class::Blocked),
            ("10.0.0.1", Class::Private),
            ("100.100.100.201", Class::Private),
            ("172.16.0.1", Class::Private),
            ("172.31.254.1", Class::Private),
            ("192.168.1.1", Class::Private),
            ("192.0.0.192", Class::Private),
            ("203.0.113.9", Class::Private),
            ("1.1.1.1", Class::Public),
            ("172.32.0.1", Class::Public),
            ("168.63.129.17", Class::Public),
            ("126.255.255.255", Class::Public),
            ("223.255.255.255", Class::Public),
        ] {
            assert_eq!(class(address.parse().unwrap()), expected, "{address}");
        }
    }
}
