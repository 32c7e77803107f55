//! What a slot's resolver has answered: only by this does an address belong to a name.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use thaw_network::DomainName;

/// Most pairs of address and name; beyond it the one that ends first goes.
const PAIRS_MAX: usize = 1024;
/// How long after a record's time its address still counts: clients keep addresses longer than they should.
const GRACE: Duration = Duration::from_secs(300);
/// Longest time of a record that counts.
pub const TTL_MAX: Duration = Duration::from_secs(3600);

/// Addresses and the names that were answered with them.
#[derive(Debug, Default)]
pub struct Answered {
    ends: BTreeMap<(Ipv4Addr, DomainName), Duration>,
}

impl Answered {
    /// `name` was answered with `address`, for `ttl`.
    pub fn add(&mut self, now: Duration, name: &DomainName, address: Ipv4Addr, ttl: Duration) {
        let key = (address, name.clone());
        if self.ends.len() >= PAIRS_MAX && !self.ends.contains_key(&key) {
            self.ends.retain(|_, end| *end > now);
            if self.ends.len() >= PAIRS_MAX
                && let Some(first) = self
                    .ends
                    .iter()
                    .min_by_key(|(_, end)| **end)
                    .map(|(key, _)| key.clone())
            {
                self.ends.remove(&first);
            }
        }
        self.ends.insert(key, now + ttl.min(TTL_MAX) + GRACE);
    }

    /// The names that `address` belongs to.
    pub fn names(&self, now: Duration, address: Ipv4Addr) -> Vec<DomainName> {
        let Ok(first) = DomainName::parse("-") else {
            return Vec::new();
        };
        // "-" sorts before every other name.
        self.ends
            .range((address, first)..)
            .take_while(|((at, _), _)| *at == address)
            .filter(|(_, end)| **end > now)
            .map(|((_, name), _)| name.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).unwrap()
    }

    #[test]
    fn an_address_belongs_to_a_name_for_its_time_and_the_grace() {
        let mut answered = Answered::default();
        let (one, two) = (Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(1, 1, 1, 2));
        let ttl = Duration::from_secs(10);
        answered.add(Duration::ZERO, &name("a.b"), one, ttl);
        answered.add(Duration::ZERO, &name("-"), one, ttl * 2);
        answered.add(Duration::ZERO, &name("c.d"), two, Duration::MAX);
        let last = ttl + GRACE - Duration::from_nanos(1);
        assert_eq!(answered.names(last, one), [name("-"), name("a.b")]);
        assert_eq!(answered.names(ttl + GRACE, one), [name("-")]);
        assert_eq!(answered.names(last, two), [name("c.d")]);
        assert!(answered.names(TTL_MAX + GRACE, two).is_empty());
        assert!(answered.names(last, Ipv4Addr::new(1, 1, 1, 3)).is_empty());
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_ends_last() {
        let mut answered = Answered::default();
        let keep = Ipv4Addr::new(9, 9, 9, 9);
        answered.add(Duration::ZERO, &name("keep.me"), keep, TTL_MAX);
        for number in 0..5000_u32 {
            answered.add(
                Duration::ZERO,
                &name("flood.me"),
                Ipv4Addr::from(number),
                Duration::from_secs(1),
            );
        }
        assert_eq!(answered.ends.len(), PAIRS_MAX);
        assert_eq!(answered.names(Duration::ZERO, keep), [name("keep.me")]);
    }
}
