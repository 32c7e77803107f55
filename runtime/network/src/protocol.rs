//! What the gateway and `thaw-egress` say to each other. Requests are numbered and may overtake each other; the descriptor of a tap travels with its
//! [`Reply::Taken`]. When the socket closes, every slot ends and the process with it.

use serde::{Deserialize, Serialize};
use std::fmt;

use crate::authority::Identity;
use crate::policy::Policy;

/// Most denials that a [`Report`] tells, the newest.
pub const DENIALS_MAX: usize = 16;

/// A slot, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SlotId(pub u64);

/// From the gateway.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ToEgress {
    /// Comes back with the reply.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// What can be asked of `thaw-egress`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// A slot under this policy: one that is ready, else the next that is made.
    Take {
        /// What the guest may reach.
        policy: Policy,
        /// By which the relay is the host of each secret, for the guest.
        identity: Option<Identity>,
    },
    /// The guest of this slot is gone: end its connections, destroy it.
    GiveBack(SlotId),
    /// What has happened in a slot.
    Report(SlotId),
    /// How things stand.
    Status,
}

/// To the gateway.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FromEgress {
    /// The request's.
    pub id: u64,
    /// Its answer.
    pub reply: Reply,
}

/// Answer to a [`Request`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To `Take`; the tap's descriptor comes along.
    Taken(SlotId),
    /// To `GiveBack` and `Report`.
    Report(Report),
    /// To `Status`.
    Status(Status),
    /// Not done: the whole chain of causes, for people.
    Failed(String),
}

/// How things stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Slots that wait to be taken.
    pub ready: usize,
    /// Slots that are taken.
    pub taken: usize,
    /// Slots made since the start.
    pub made: u64,
    /// Why the last attempt to make one failed; none if it did not.
    pub failure: Option<String>,
}

/// What has happened in a slot since it was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Connections that were let out.
    pub connections: u64,
    /// Those that are open now.
    pub open: u64,
    /// Bytes from the guest, over all connections, without headers of packets.
    pub sent_bytes: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// Names asked for.
    pub queries: u64,
    /// What was refused, of all kinds.
    pub denied: u64,
    /// The newest [`DENIALS_MAX`] different ones, oldest first.
    pub denials: Vec<Denial>,
}

/// Something that a guest wanted and did not get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// An address with its port, or a name.
    pub what: String,
    /// Why not.
    pub reason: Reason,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.reason)
    }
}

/// Why a guest did not get what it wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// No rule allows it.
    NotAllowed,
    /// No rule can allow it.
    AlwaysBlocked,
    /// A private address, which only a rule with a CIDR opens.
    Private,
    /// A name that is allowed has a private or blocked address, which the guest is not told.
    Rebinding,
    /// The server was asked for another name than those that lead to its address.
    OtherName,
    /// What came on port 443 is no ClientHello with a name, or on port 80 no HTTP with a host.
    NoName,
    /// Over the policy's or the slot's own limit.
    TooMany,
    /// Allowed, but the server could not be reached.
    Unreachable,
    /// The guest does not take the certificate that the relay has for a secret's host.
    Untrusted,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAllowed => "no rule allows it",
            Self::AlwaysBlocked => "always blocked",
            Self::Private => "a private address, which only a rule with its CIDR opens",
            Self::Rebinding => "the name has a private or blocked address",
            Self::OtherName => "asked for another name than was resolved",
            Self::NoName => "the name that is asked for cannot be seen",
            Self::TooMany => "too many at once",
            Self::Unreachable => "the server cannot be reached",
            Self::Untrusted => {
                "the client does not take the relay's certificate, or no HTTP/1.1: the file that SSL_CERT_FILE names has its authority"
            }
        })
    }
}
