//! The network of sandboxes, as its users see it: what a guest may reach ([`Policy`]), and slots to be had from the process that owns them ([`Egress`]).
//!
//! Owns: policies and their validation, the protocol with `thaw-egress`, its client. Must not know: packets, names' addresses, namespaces,
//! TLS; whatever a guest sends is parsed in that process alone. Start at [`Egress::start`].
//!
//! A *slot* is a network namespace with one tap and no way out. All that a guest sends ends in it: TCP at a relay, names at a resolver, the rest
//! nowhere. So the addresses below are equal in every slot, and nothing of them exists outside.
#![forbid(unsafe_code)]

pub mod channel;
mod client;
mod name;
mod policy;
mod protocol;

use std::net::Ipv4Addr;

pub use client::{Egress, EgressError, EgressOptions, Slot};
pub use name::{DomainName, DomainPattern, NameError};
pub use policy::{
    CONNECTIONS_DEFAULT, CONNECTIONS_MAX, PORTS_MAX, Policy, PolicyError, RULES_MAX, Rule,
    SECRET_BYTES_MAX, SECRETS_MAX, Secret, Target,
};
pub use protocol::{
    DENIALS_MAX, Denial, FromEgress, Reason, Reply, Report, Request, SlotId, Status, ToEgress,
};

/// The guest's address, in every slot.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 2);
/// The guest's gateway and its resolver (UDP and TCP port 53), in every slot.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 1);
/// Length of the prefix that both share.
pub const PREFIX_LENGTH: u8 = 30;
/// The guest's Ethernet address; frames from another are dropped.
pub const GUEST_MAC: [u8; 6] = [0x06, 0x54, 0x48, 0x41, 0x57, 0x02];
/// The Ethernet address of the tap.
pub const GATEWAY_MAC: [u8; 6] = [0x06, 0x54, 0x48, 0x41, 0x57, 0x01];
/// Length of the header before each frame on the tap's descriptor (`struct virtio_net_hdr_v1`, virtio 1.2, 5.1.6), bytes. No offload is on.
pub const TAP_HEADER_BYTES: usize = 12;
