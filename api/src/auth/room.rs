//! Room in memory for bodies that are read on the word of somebody who is not known yet.
//!
//! A body has room for all that is announced before its first byte is taken, so that none that has begun waits for room; who announces
//! much and sends little holds it for the body's longest time. So one address has only a part of it, and others go on.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Auth;
use crate::lambda::errors::ApiError;

/// What bodies may weigh together while they are read, and code until its request is done, MiB.
pub const BODIES_MIB_MAX: u16 = 512;
/// Those of one address, MiB: three of code.
const SENDER_MIB_MAX: u16 = 256;
/// Longest wait for room for a body.
const ROOM_LIMIT: Duration = Duration::from_secs(30);
/// A body up to this size does not count, bytes.
const SMALL_BYTES_MAX: usize = 64 * 1024;

/// All room there is.
#[derive(Debug)]
pub(super) struct Rooms {
    all: Arc<Semaphore>,
    /// Of those who hold some, or wait for it.
    senders: Mutex<BTreeMap<IpAddr, Arc<Semaphore>>>,
}

/// Held as long as a body is read, and one of code is in memory.
#[derive(Debug)]
pub(crate) struct Room {
    _share: Option<OwnedSemaphorePermit>,
    _whole: OwnedSemaphorePermit,
}

impl Default for Rooms {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(usize::from(BODIES_MIB_MAX))),
            senders: Mutex::default(),
        }
    }
}

impl Rooms {
    /// What one address has. Addresses that hold nothing are forgotten.
    fn share(&self, sender: IpAddr) -> Arc<Semaphore> {
        let mut senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
        senders.retain(|_, share| Arc::strong_count(share) > 1);
        let share = senders.entry(whose(sender)).or_insert_with(|| {
            let mib = usize::from(SENDER_MIB_MAX);
            Arc::new(Semaphore::new(mib))
        });
        Arc::clone(share)
    }

    async fn take(&self, sender: Option<IpAddr>, mib: u32) -> Option<Room> {
        let share = match sender {
            // Who waits for his own share takes nothing of what others wait for.
            Some(sender) => Some(self.share(sender).acquire_many_owned(mib).await.ok()?),
            None => None,
        };
        let whole = Arc::clone(&self.all).acquire_many_owned(mib).await.ok()?;
        Some(Room {
            _share: share,
            _whole: whole,
        })
    }
}

/// IPv6 is given out in networks of 64 bits, in which everybody has as many addresses as he likes.
pub(crate) fn whose(sender: IpAddr) -> IpAddr {
    match sender.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(network).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

impl Auth {
    /// The right to hold a body of what the client announced, or of the whole limit; nothing for a small one. `sender` is who else is
    /// to be left room by; none where all senders are this machine's own.
    ///
    /// # Errors
    /// There is no room in time.
    pub(crate) async fn room(
        &self,
        sender: Option<IpAddr>,
        headers: &HeaderMap,
        limit: usize,
    ) -> Result<Option<Room>, ApiError> {
        let announced = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse::<usize>().ok())
            .unwrap_or(limit)
            .min(limit);
        if announced <= SMALL_BYTES_MAX {
            return Ok(None);
        }
        let mib = u32::try_from(announced.div_ceil(1024 * 1024)).unwrap_or(u32::MAX);
        let mib = mib.min(u32::from(SENDER_MIB_MAX));
        let room = self.rooms.take(sender, mib);
        let room = tokio::time::timeout(ROOM_LIMIT, room).await;
        room.map_err(|_| {
            ApiError::unavailable(
                "Other requests' bodies take all the memory that there is for bodies. Try again later.",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::auth::AuthMode;
    use crate::lambda::CODE_BODY_BYTES_MAX;
    use crate::store::Store;

    const EVENT_BYTES_MAX: usize = 6 * 1024 * 1024;

    async fn auth() -> (tempfile::TempDir, Arc<Auth>) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("thaw.db")).await.unwrap();
        let auth = Auth::open(AuthMode::Required, home.path(), "us-east-1", "0", store);
        let auth = auth.await.unwrap();
        (home, auth)
    }

    #[tokio::test]
    async fn large_bodies_share_a_budget_by_what_they_may_weigh() {
        let (_home, auth) = auth().await;
        let total = usize::from(BODIES_MIB_MAX);
        let held = async |announced: Option<&'static str>, limit: usize| {
            let mut headers = HeaderMap::new();
            if let Some(length) = announced {
                headers.insert(header::CONTENT_LENGTH, length.parse().unwrap());
            }
            let room = auth.room(None, &headers, limit).await.unwrap();
            let held = total - auth.rooms.all.available_permits();
            drop(room);
            assert_eq!(auth.rooms.all.available_permits(), total);
            held
        };
        assert_eq!(held(Some("65536"), CODE_BODY_BYTES_MAX).await, 0);
        assert_eq!(held(Some("65537"), CODE_BODY_BYTES_MAX).await, 1);
        assert_eq!(held(Some("70000000"), CODE_BODY_BYTES_MAX).await, 67);
        assert_eq!(held(Some("99999999999"), CODE_BODY_BYTES_MAX).await, 67);
        // Who announces nothing, or nonsense, is taken to send the most.
        assert_eq!(held(None, EVENT_BYTES_MAX).await, 6);
        assert_eq!(held(Some("-1"), EVENT_BYTES_MAX).await, 6);
    }

    #[tokio::test]
    async fn one_address_leaves_the_others_room() {
        let (_home, auth) = auth().await;
        let none = HeaderMap::new();
        // The room, or nothing if it has to be waited for.
        let room = |sender: &str| {
            let sender = Some(sender.parse().unwrap());
            let room = auth.room(sender, &none, EVENT_BYTES_MAX).now_or_never();
            room.map(Result::unwrap)
        };
        let mut held = Vec::new();
        while let Some(room) = room("2001:db8::1") {
            held.push(room);
        }
        assert_eq!(held.len(), usize::from(SENDER_MIB_MAX) / 6);
        // The same network's, and others'.
        assert!(room("2001:db8::2:1").is_none());
        assert!(room("2001:db8:0:1::1").is_some());
        assert!(room("192.0.2.1").is_some());
        held.pop();
        assert!(room("2001:db8::2:1").is_some());
        held.clear();
        drop(room("::ffff:192.0.2.1"));
        let senders = auth.rooms.senders.lock().unwrap();
        let known: Vec<_> = senders.keys().map(ToString::to_string).collect();
        assert_eq!(known, ["192.0.2.1"]);
    }
}
