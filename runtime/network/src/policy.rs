//! What a guest may reach. Nothing, unless a rule says so.

use std::fmt;
use std::num::NonZeroU64;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::name::{DomainName, DomainPattern, NameError};

/// Most rules of a policy.
pub const RULES_MAX: usize = 256;
/// Most ports of a rule.
pub const PORTS_MAX: usize = 16;
/// Most secrets of a policy.
pub const SECRETS_MAX: usize = 16;
/// Longest value of a secret, bytes.
pub const SECRET_BYTES_MAX: usize = 8192;
/// Longest certificates of a secret, bytes.
const CA_BYTES_MAX: usize = 16 * 1024;
/// Most connections that a guest may have at once, if its policy does not say.
pub const CONNECTIONS_DEFAULT: u32 = 128;
/// Most that a policy may say.
pub const CONNECTIONS_MAX: u32 = 1024;
/// Slowest bandwidth, bytes a second: less stalls every connection.
const BANDWIDTH_MIN: u64 = 1024;

/// Headers that frame a request or are the relay's own to set.
const HEADERS_RESERVED: &[&str] = &[
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What a guest may reach, and how much of it. The default allows nothing.
///
/// Whatever is allowed, these are not: loopback, link-local with its metadata address, other clouds' metadata addresses, this machine's own addresses,
/// multicast, broadcast, 0.0.0.0/8. Private ranges take a rule with a CIDR; a name or `"internet"` never opens them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Any of them allows a connection. At most [`RULES_MAX`].
    pub allow: Vec<Rule>,
    /// Bytes a second, in each direction, of all connections together. None: no limit.
    pub bandwidth_bytes_per_second: Option<NonZeroU64>,
    /// Most connections at once, 1 to [`CONNECTIONS_MAX`]; one more is refused.
    pub connections_max: u32,
    /// Headers that requests get on their way. At most [`SECRETS_MAX`].
    pub secrets: Vec<Secret>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            bandwidth_bytes_per_second: None,
            connections_max: CONNECTIONS_DEFAULT,
            secrets: Vec::new(),
        }
    }
}

/// Something a guest may connect to by TCP. In JSON: `{"cidr": "10.1.0.0/16", "ports": [5432]}`, `{"domain": "*.example.com"}`, or `"internet"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawRule", into = "RawRule")]
pub struct Rule {
    /// Where.
    pub target: Target,
    /// Which ports there; empty: all. At most [`PORTS_MAX`].
    pub ports: Vec<u16>,
}

/// Where a rule leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Addresses, private ones included: `0.0.0.0/0` opens those of this machine's networks, too.
    Cidr(Ipv4Net),
    /// Names: an address counts while the slot's resolver has answered such a name with it. On ports 443 and 80 the name that the guest asks the server for
    /// (SNI, `Host`) must be one of them, too.
    Domain(DomainPattern),
    /// Every public address and every name.
    Internet,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RawRule {
    Word(String),
    Table(RawTable),
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawTable {
    #[serde(skip_serializing_if = "Option::is_none")]
    cidr: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<u16>,
}

impl TryFrom<RawRule> for Rule {
    type Error = PolicyError;

    fn try_from(raw: RawRule) -> Result<Self, PolicyError> {
        let (target, ports) = match raw {
            RawRule::Word(word) if word == "internet" => (Target::Internet, Vec::new()),
            RawRule::Word(word) => return Err(PolicyError::Word(word)),
            RawRule::Table(RawTable {
                cidr: Some(cidr),
                domain: None,
                ports,
            }) => match cidr.parse::<Ipv4Net>() {
                Ok(net) => (Target::Cidr(net.trunc()), ports),
                Err(_) => return Err(PolicyError::Cidr(cidr)),
            },
            RawRule::Table(RawTable {
                cidr: None,
                domain: Some(domain),
                ports,
            }) => (Target::Domain(DomainPattern::parse(&domain)?), ports),
            RawRule::Table(_) => return Err(PolicyError::Table),
        };
        Ok(Self { target, ports })
    }
}

impl From<Rule> for RawRule {
    fn from(rule: Rule) -> Self {
        let ports = rule.ports;
        match rule.target {
            Target::Internet => Self::Word("internet".into()),
            Target::Cidr(net) => Self::Table(RawTable {
                cidr: Some(net.to_string()),
                domain: None,
                ports,
            }),
            Target::Domain(pattern) => Self::Table(RawTable {
                cidr: None,
                domain: Some(pattern.to_string()),
                ports,
            }),
        }
    }
}

impl Rule {
    /// Whether the rule is about `port`.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }
}

/// A header for requests to one host. The guest asks that host over plain HTTP on port 80 and never sees the value; the relay adds the header, or replaces
/// the guest's own, and asks over HTTPS on port 443. A secret makes its host's name known and that one way open: no rule is needed. What the
/// server sends back is passed on: one that echoes headers tells the secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// Whose requests.
    pub host: DomainName,
    /// Which header, in lower case.
    pub header: String,
    /// Its value: printable ASCII, at most [`SECRET_BYTES_MAX`].
    pub value: String,
    /// Certificates (PEM) that the host's is checked by, in place of this machine's authorities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({}, {})", self.host, self.header)
    }
}

/// Why a policy is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PolicyError {
    /// A rule of one word that is not known.
    #[error("rule {0:?} is unknown: the one word is \"internet\"")]
    Word(String),
    /// No CIDR, or not IPv4.
    #[error("{0:?} is no IPv4 range like 10.1.0.0/16: guests have IPv4 alone")]
    Cidr(String),
    /// Neither or both of the two kinds.
    #[error("a rule has either a cidr or a domain")]
    Table,
    /// A name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// More of something than is allowed.
    #[error("a policy has {count} {what}, at most {max} are allowed")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// Limit.
        max: usize,
    },
    /// Out of range.
    #[error("connections_max is {0}: 1 to {CONNECTIONS_MAX} are allowed")]
    Connections(u32),
    /// Slower than is of use.
    #[error("a bandwidth of {0} bytes a second is too small: at least {BANDWIDTH_MIN}")]
    Bandwidth(u64),
    /// A header that cannot be a secret's.
    #[error(
        "a secret for {host} cannot be in header {header:?}: a name in lower case that does not frame the request"
    )]
    Header {
        /// The secret's host.
        host: DomainName,
        /// The header.
        header: String,
    },
    /// Certificates that are no text.
    #[error("the ca of the secret for {0} is not PEM")]
    Ca(DomainName),
    /// The value itself is not told.
    #[error(
        "the value of the secret for {0} is no header value: printable ASCII, at most {SECRET_BYTES_MAX} bytes"
    )]
    Value(DomainName),
}

impl Policy {
    /// Checks what the types do not: the limits above.
    ///
    /// # Errors
    /// What is over them.
    pub fn check(&self) -> Result<(), PolicyError> {
        let within = |what, count, max| {
            if count > max {
                return Err(PolicyError::TooMany { what, count, max });
            }
            Ok(())
        };
        within("rules", self.allow.len(), RULES_MAX)?;
        within("secrets", self.secrets.len(), SECRETS_MAX)?;
        for rule in &self.allow {
            within("ports in a rule", rule.ports.len(), PORTS_MAX)?;
        }
        if !(1..=CONNECTIONS_MAX).contains(&self.connections_max) {
            return Err(PolicyError::Connections(self.connections_max));
        }
        if let Some(rate) = self.bandwidth_bytes_per_second
            && rate.get() < BANDWIDTH_MIN
        {
            return Err(PolicyError::Bandwidth(rate.get()));
        }
        for secret in &self.secrets {
            let ca = secret.ca.as_deref().unwrap_or_default();
            within("bytes in a secret's ca", ca.len(), CA_BYTES_MAX)?;
            // PEM is text; what JSON would blow up does not fit a message.
            if !ca
                .bytes()
                .all(|byte| matches!(byte, b' '..=b'~' | b'\n' | b'\r' | b'\t'))
            {
                return Err(PolicyError::Ca(secret.host.clone()));
            }
            check_header(secret)?;
        }
        Ok(())
    }
}

fn check_header(secret: &Secret) -> Result<(), PolicyError> {
    let header = &secret.header;
    let token =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
    if !(1..=256).contains(&header.len())
        || !header.bytes().all(token)
        || HEADERS_RESERVED.contains(&header.as_str())
    {
        return Err(PolicyError::Header {
            host: secret.host.clone(),
            header: header.chars().take(256).collect(),
        });
    }
    let printable = |byte| matches!(byte, b' '..=b'~');
    if secret.value.len() > SECRET_BYTES_MAX || !secret.value.bytes().all(printable) {
        return Err(PolicyError::Value(secret.host.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Policy, String> {
        let policy: Policy = serde_json::from_str(json).map_err(|error| error.to_string())?;
        policy.check().map_err(|error| error.to_string())?;
        Ok(policy)
    }

    #[test]
    fn a_policy_is_read_as_documented_and_comes_back_the_same() {
        let policy = read(
            r#"{"allow": [{"cidr": "10.1.2.3/16", "ports": [5432]}, {"domain": "*.Example.com"}, "internet"],
                "bandwidth_bytes_per_second": 1000000, "connections_max": 7,
                "secrets": [{"host": "api.example.com", "header": "authorization", "value": "Bearer x"}]}"#,
        )
        .unwrap();
        assert_eq!(
            policy.allow[0].target,
            Target::Cidr("10.1.0.0/16".parse().unwrap())
        );
        assert!(policy.allow[0].has_port(5432) && !policy.allow[0].has_port(5433));
        assert!(policy.allow[1].has_port(1));
        assert_eq!(policy.allow[2].target, Target::Internet);
        let again = serde_json::to_string(&policy).unwrap();
        assert_eq!(read(&again).unwrap(), policy);
        assert_eq!(read("{}").unwrap(), Policy::default());
        assert_eq!(Policy::default().allow, []);
    }

    #[test]
    fn what_is_no_policy_is_refused_with_what_is_wrong() {
        for (json, told) in [
            (r#"{"allow": ["all"]}"#, "the one word is"),
            (r#"{"allow": [{}]}"#, "either a cidr or a domain"),
            (
                r#"{"allow": [{"cidr": "10.0.0.0/8", "domain": "a.b"}]}"#,
                "either",
            ),
            (r#"{"allow": [{"cidr": "fd00::/8"}]}"#, "IPv4"),
            (r#"{"allow": [{"cidr": "10.0.0.0/33"}]}"#, "IPv4"),
            (r#"{"allow": [{"domain": "a b"}]}"#, "no host name"),
            (r#"{"allow": [{"domain": "1.2.3.4"}]}"#, "no host name"),
            (r#"{"connections_max": 0}"#, "1 to"),
            (r#"{"connections_max": 1025}"#, "1 to"),
            (r#"{"bandwidth_bytes_per_second": 1}"#, "too small"),
            (r#"{"typo": 1}"#, "unknown field"),
            (
                r#"{"secrets": [{"host": "a.b", "header": "host", "value": "x"}]}"#,
                "header",
            ),
            (
                r#"{"secrets": [{"host": "a.b", "header": "X", "value": "x"}]}"#,
                "header",
            ),
            (
                r#"{"secrets": [{"host": "a.b", "header": "x", "value": "a\r\nb: c"}]}"#,
                "header value",
            ),
            (
                r#"{"secrets": [{"host": "a.b", "header": "x", "value": "x", "ca": "\u0000"}]}"#,
                "PEM",
            ),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(told), "{json}: {error}");
        }
        let many = Policy {
            allow: vec![
                Rule {
                    target: Target::Internet,
                    ports: vec![]
                };
                RULES_MAX + 1
            ],
            ..Policy::default()
        };
        assert!(many.check().unwrap_err().to_string().contains("257 rules"));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let policy =
            read(r#"{"secrets": [{"host": "a.b", "header": "x", "value": "hush"}]}"#).unwrap();
        assert!(!format!("{policy:?}").contains("hush"));
        let bad = read(r#"{"secrets": [{"host": "a.b", "header": "x", "value": "hush\n"}]}"#)
            .unwrap_err();
        assert!(!bad.contains("hush"));
    }
}
