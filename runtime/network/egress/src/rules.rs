//! A policy's answers: may this name be resolved, may this address be told, where may this connection go. Pure.

use std::net::{Ipv4Addr, SocketAddrV4};

use thaw_network::{DomainName, Policy, Reason, Rule, Secret, Target};

use crate::ranges::{Class, class};

/// The port on which a secret's host is asked by the guest, and names are looked at in HTTP.
const HTTP: u16 = 80;
/// The port on which names are looked at in TLS.
const HTTPS: u16 = 443;

/// What becomes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to its address, whatever it says.
    Direct,
    /// Its ClientHello is looked at. What asks for a name with secrets ends here, and each request is looked at.
    Tls(Web),
    /// It is HTTP, and each request is looked at.
    Web(Web),
    /// It is refused.
    Denied(Reason),
}

/// What a connection that is looked at may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Web {
    /// Names for which it goes on as it is.
    pub names: Vec<DomainName>,
    /// So do all others: the address itself is allowed.
    pub open: bool,
    /// Names with secrets.
    pub secret: Vec<DomainName>,
}

/// A policy, asked.
#[derive(Debug)]
pub struct Rules(Policy);

impl Rules {
    /// Of a checked policy.
    pub fn new(policy: Policy) -> Self {
        Self(policy)
    }

    /// Whether `name` may be resolved.
    pub fn permits_name(&self, name: &DomainName) -> bool {
        self.has_secret(name)
            || self.0.allow.iter().any(|rule| match &rule.target {
                Target::Internet => true,
                Target::Domain(pattern) => pattern.matches(name),
                Target::Cidr(_) => false,
            })
    }

    /// Whether the guest may be told that a name has `address`.
    pub fn permits_answer(&self, address: Ipv4Addr, is_own: bool) -> bool {
        match class_of(address, is_own) {
            Class::Blocked => false,
            Class::Private => self.0.allow.iter().any(|rule| holds(rule, address)),
            Class::Public => true,
        }
    }

    /// What becomes of a connection to `to`, which the resolver has answered these `names` with.
    pub fn decide(&self, to: SocketAddrV4, names: &[DomainName], is_own: bool) -> Verdict {
        let (address, port) = (*to.ip(), to.port());
        let class = class_of(address, is_own);
        if class == Class::Blocked {
            return Verdict::Denied(Reason::AlwaysBlocked);
        }
        let open = self.0.allow.iter().any(|rule| {
            rule.has_port(port)
                && (holds(rule, address)
                    || (class == Class::Public && rule.target == Target::Internet))
        });
        if class == Class::Private && !open {
            return Verdict::Denied(Reason::Private);
        }
        let by_name = |name: &&DomainName| {
            self.0.allow.iter().any(|rule| match &rule.target {
                Target::Domain(pattern) => rule.has_port(port) && pattern.matches(name),
                _ => false,
            })
        };
        let secret: Vec<_> = names
            .iter()
            .filter(|name| matches!(port, HTTP | HTTPS) && self.has_secret(name))
            .cloned()
            .collect();
        let names: Vec<_> = names.iter().filter(by_name).cloned().collect();
        match port {
            HTTP | HTTPS if !secret.is_empty() || (!open && !names.is_empty()) => {
                let web = Web {
                    names,
                    open,
                    secret,
                };
                if port == HTTP {
                    Verdict::Web(web)
                } else {
                    Verdict::Tls(web)
                }
            }
            _ if open => Verdict::Direct,
            _ if names.is_empty() => Verdict::Denied(Reason::NotAllowed),
            _ => Verdict::Direct,
        }
    }

    /// The secrets of `host`.
    pub fn secrets<'a>(&'a self, host: &DomainName) -> impl Iterator<Item = &'a Secret> {
        let host = host.clone();
        self.0
            .secrets
            .iter()
            .filter(move |secret| secret.host == host)
    }

    fn has_secret(&self, name: &DomainName) -> bool {
        self.secrets(name).next().is_some()
    }
}

/// Whether a rule is a CIDR that holds an address.
fn holds(rule: &Rule, address: Ipv4Addr) -> bool {
    matches!(&rule.target, Target::Cidr(net) if net.contains(&address))
}

fn class_of(address: Ipv4Addr, is_own: bool) -> Class {
    if is_own {
        Class::Blocked
    } else {
        class(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use thaw_network::DomainPattern;

    fn rule(text: &str, ports: &[u16]) -> Rule {
        let target = match (text, text.parse()) {
            ("internet", _) => Target::Internet,
            (_, Ok(net)) => Target::Cidr(net),
            _ => Target::Domain(DomainPattern::parse(text).unwrap()),
        };
        Rule {
            target,
            ports: ports.to_vec(),
        }
    }

    fn rules(allow: &[Rule], secrets: &[&str]) -> Rules {
        let secrets = secrets.iter().map(|host| Secret {
            host: name(host),
            header: "authorization".into(),
            value: "x".into(),
            ca: None,
        });
        Rules::new(Policy {
            allow: allow.to_vec(),
            secrets: secrets.collect(),
            ..Policy::default()
        })
    }

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).unwrap()
    }

    fn to(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    const DENIED: Verdict = Verdict::Denied(Reason::NotAllowed);

    #[test]
    fn nothing_is_allowed_by_default() {
        let rules = rules(&[], &[]);
        assert_eq!(rules.decide(to("1.1.1.1:443"), &[], false), DENIED);
        assert_eq!(
            rules.decide(to("1.1.1.1:443"), &[name("a.b")], false),
            DENIED
        );
        assert!(!rules.permits_name(&name("a.b")));
    }

    #[test]
    fn a_cidr_opens_its_addresses_and_ports_private_ones_too() {
        let rules = rules(
            &[rule("10.1.0.0/16", &[5432]), rule("1.1.1.0/24", &[])],
            &[],
        );
        assert_eq!(
            rules.decide(to("10.1.2.3:5432"), &[], false),
            Verdict::Direct
        );
        assert_eq!(
            rules.decide(to("10.1.2.3:80"), &[], false),
            Verdict::Denied(Reason::Private)
        );
        assert_eq!(rules.decide(to("1.1.1.1:443"), &[], false), Verdict::Direct);
        assert_eq!(rules.decide(to("1.1.2.1:443"), &[], false), DENIED);
        assert!(!rules.permits_name(&name("a.b")));
    }

    #[test]
    fn what_is_blocked_stays_blocked_whatever_is_allowed() {
        let rules = rules(
            &[
                rule("0.0.0.0/0", &[]),
                rule("internet", &[]),
                rule("*.b", &[]),
            ],
            &["a.b"],
        );
        for address in [
            "169.254.169.254:80",
            "127.0.0.1:80",
            "172.31.255.1:80",
            "100.100.100.200:80",
        ] {
            assert_eq!(
                rules.decide(to(address), &[name("a.b")], false),
                Verdict::Denied(Reason::AlwaysBlocked),
                "{address}"
            );
        }
        assert_eq!(
            rules.decide(to("93.184.216.34:22"), &[], true),
            Verdict::Denied(Reason::AlwaysBlocked),
            "the machine's own"
        );
    }

    #[test]
    fn a_name_opens_no_private_address() {
        let rules = rules(&[rule("*.b", &[]), rule("internet", &[])], &[]);
        assert_eq!(
            rules.decide(to("192.168.1.1:443"), &[name("a.b")], false),
            Verdict::Denied(Reason::Private)
        );
        assert!(!rules.permits_answer(Ipv4Addr::new(192, 168, 1, 1), false));
        assert!(rules.permits_answer(Ipv4Addr::new(1, 1, 1, 1), false));
        assert!(!rules.permits_answer(Ipv4Addr::new(1, 1, 1, 1), true));
    }

    #[test]
    fn a_name_opens_the_address_it_was_answered_with_and_is_looked_at() {
        let rules = rules(&[rule("*.b", &[443, 80, 5432])], &[]);
        let names = [name("a.b"), name("other.org")];
        assert_eq!(
            rules.decide(to("1.1.1.1:443"), &names, false),
            Verdict::Tls(Web {
                names: vec![name("a.b")],
                open: false,
                secret: vec![]
            })
        );
        assert_eq!(
            rules.decide(to("1.1.1.1:80"), &names, false),
            Verdict::Web(Web {
                names: vec![name("a.b")],
                open: false,
                secret: vec![]
            })
        );
        assert_eq!(
            rules.decide(to("1.1.1.1:5432"), &names, false),
            Verdict::Direct
        );
        assert_eq!(rules.decide(to("1.1.1.1:25"), &names, false), DENIED);
        assert_eq!(
            rules.decide(to("1.1.1.1:443"), &[name("other.org")], false),
            DENIED
        );
    }

    #[test]
    fn a_secret_opens_its_host_for_http_alone() {
        let host = name("api.b");
        let one = rules(&[], &["api.b"]);
        assert!(one.permits_name(&host));
        let web = |open| Web {
            names: vec![],
            open,
            secret: vec![name("api.b")],
        };
        let (plain, tls) = (
            |open| Verdict::Web(web(open)),
            |open| Verdict::Tls(web(open)),
        );
        let names = std::slice::from_ref(&host);
        assert_eq!(one.decide(to("1.1.1.1:80"), names, false), plain(false));
        assert_eq!(one.decide(to("1.1.1.1:443"), names, false), tls(false));
        assert_eq!(one.decide(to("1.1.1.1:8080"), names, false), DENIED);
        assert_eq!(one.decide(to("1.1.1.1:80"), &[], false), DENIED);
        let open = rules(&[rule("internet", &[])], &["api.b"]);
        assert_eq!(open.decide(to("1.1.1.1:80"), names, false), plain(true));
        assert_eq!(open.decide(to("1.1.1.1:80"), &[], false), Verdict::Direct);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]
        /// No policy made of the strongest rules opens what is blocked, and without a CIDR nothing private.
        #[test]
        fn no_address_that_is_blocked_is_ever_reached(bits: u32, port: u16, cidr: bool, own: bool) {
            let address = Ipv4Addr::from(bits);
            let mut allow = vec![rule("internet", &[]), rule("*.b", &[])];
            if cidr {
                allow.push(rule("0.0.0.0/0", &[]));
            }
            let verdict = rules(&allow, &["a.b"]).decide(SocketAddrV4::new(address, port), &[name("a.b")], own);
            let let_out = !matches!(verdict, Verdict::Denied(_));
            let expected = match class(address) {
                _ if own => false,
                Class::Blocked => false,
                Class::Private => cidr,
                Class::Public => true,
            };
            prop_assert_eq!(let_out, expected);
        }
    }
}
