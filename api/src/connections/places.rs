//! How many connections there may be, and how many of one address: half, so that others come in whatever one does. This machine's own
//! have all, as a proxy's on it do. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::auth::room::whose;

/// Places for connections.
#[derive(Debug)]
pub struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// Of those who have some.
    senders: BTreeMap<IpAddr, usize>,
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    sender: Option<IpAddr>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// There are as many as there may be.
    All,
    /// There are as many of this address as there may be.
    Sender,
}

impl Places {
    /// So many, one at least.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: Mutex::default(),
        })
    }

    /// Takes a place.
    ///
    /// # Errors
    /// There is none.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Result<Place, Full> {
        let address = address.to_canonical();
        let sender = (!address.is_loopback()).then(|| whose(address));
        let mut taken = self.taken();
        if taken.all >= self.most {
            return Err(Full::All);
        }
        if let Some(sender) = sender {
            let has = taken.senders.get(&sender).copied().unwrap_or_default();
            if has >= self.most.div_ceil(2) {
                return Err(Full::Sender);
            }
            taken.senders.insert(sender, has + 1);
        }
        taken.all += 1;
        Ok(Place {
            places: Arc::clone(self),
            sender,
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        if let Some(sender) = self.sender
            && let Some(has) = taken.senders.get_mut(&sender)
        {
            *has -= 1;
            if *has == 0 {
                taken.senders.remove(&sender);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_half_of_the_connections_and_this_machine_all() {
        let places = Places::new(8);
        let take = |address: &str| places.take(address.parse().unwrap());
        let mut held: Vec<Place> = (0..4).map(|_| take("192.0.2.1").unwrap()).collect();
        assert_eq!(take("192.0.2.1").unwrap_err(), Full::Sender);
        assert_eq!(take("::ffff:192.0.2.1").unwrap_err(), Full::Sender);
        held.extend(["192.0.2.2", "2001:db8::1"].map(|other| take(other).unwrap()));
        held.extend(["127.0.0.1", "::1"].map(|own| take(own).unwrap()));
        assert_eq!(take("192.0.2.3").unwrap_err(), Full::All);
        held.remove(0);
        held.push(take("192.0.2.1").unwrap());
        held.clear();
        let taken = places.taken();
        assert!(taken.all == 0 && taken.senders.is_empty(), "{taken:?}");
        drop(taken);
        held.extend((0..8).map(|_| take("127.0.0.1").unwrap()));
        assert_eq!(take("127.0.0.1").unwrap_err(), Full::All);
    }
}
