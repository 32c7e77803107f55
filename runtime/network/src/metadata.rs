//! Addresses at which clouds tell a machine who it is, credentials included. Nobody's request leads there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// Link-local with the metadata address of most clouds (RFC 3927), Azure's, Alibaba's.
pub const METADATA: &[Ipv4Net] = &[
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(168, 63, 129, 16), 32),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 100, 200), 32),
];

/// Link-local (RFC 4291), AWS's `fd00:ec2::254`, Google's `fd20:ce::254`.
const METADATA_6: &[Ipv6Net] = &[
    Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128),
];

/// Whether an address, also one of IPv4 in IPv6's clothes, is link-local or a cloud's metadata.
#[must_use]
pub fn is_metadata(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => METADATA.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => METADATA_6.iter().any(|net| net.contains(&address)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_known_by_all_its_addresses() {
        for (address, expected) in [
            ("169.254.169.254", true),
            ("169.254.170.2", true),
            ("168.63.129.16", true),
            ("100.100.100.200", true),
            ("::ffff:169.254.169.254", true),
            ("fe80::1", true),
            ("fd00:ec2::254", true),
            ("fd20:ce::254", true),
            ("169.253.255.255", false),
            ("168.63.129.17", false),
            ("127.0.0.1", false),
            ("fd00:ec2::253", false),
            ("::1", false),
        ] {
            assert_eq!(is_metadata(address.parse().unwrap()), expected, "{address}");
        }
    }
}
