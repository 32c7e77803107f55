//! The network of sandboxes, as its users see it: what a guest may reach ([`Policy`]), and slots to be had from the process that owns them ([`Egress`]).
//!
//! Owns: policies and their validation, the protocol with `thaw-egress`, its client, the authority of certificates for secrets' hosts. Must not know: packets, names' addresses, namespaces,
//! TLS; whatever a guest sends is parsed in that process alone. Start at [`Egress::start`].
//!
//! A *slot* is a network namespace with one tap and no way out. All that a guest sends ends in it: TCP at a relay, names at a resolver, the rest
//! nowhere. So the addresses below are equal in every slot, and nothing of them exists outside.
#![forbid(unsafe_code)]

mod authority;
pub mod channel;
mod client;
mod metadata;
mod name;
mod policy;
mod protocol;

pub use authority::{Authority, Identity};
pub use client::{Egress, EgressError, EgressOptions, Slot};
pub use metadata::{METADATA, is_metadata};
pub use name::{DomainName, DomainPattern, NameError};
pub use policy::{
    CONNECTIONS_DEFAULT, CONNECTIONS_MAX, PORTS_MAX, Policy, PolicyError, RULES_MAX, Rule,
    SECRET_BYTES_MAX, SECRETS_MAX, Secret, Target,
};
pub use protocol::{
    DENIALS_MAX, Denial, FromEgress, Reason, Reply, Report, Request, SlotId, Status, ToEgress,
};

/// What is equal in every slot, as guests have it in their snapshots.
pub use thaw_agent_protocol::network::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, PREFIX_BITS, VNET_HEADER_BYTES,
};
