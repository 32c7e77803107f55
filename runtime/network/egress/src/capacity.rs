//! How many connections there may be in all slots together, by the descriptors that this process may have. Pure, but for the look at that limit.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::process::{Resource, getrlimit};

/// Descriptors of a connection: the guest's end and the server's.
const PER_CONNECTION: u64 = 2;
/// Descriptors that are kept for all else: the tap and the three sockets of each of 4,096 slots, and what names are looked up with. At least half
/// is for connections.
const OTHER_DESCRIPTORS: u64 = 4096 * 4 + 4096;

/// Room for connections.
#[derive(Debug)]
pub struct Capacity {
    most: u64,
    taken: AtomicU64,
}

impl Capacity {
    /// Of this process, once it has all the descriptors that it may have.
    pub fn of_this_process() -> Self {
        Self::of(getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX))
    }

    fn of(descriptors: u64) -> Self {
        let others = OTHER_DESCRIPTORS.min(descriptors / 2);
        Self {
            most: (descriptors - others) / PER_CONNECTION,
            taken: AtomicU64::new(0),
        }
    }

    /// Takes one, if a slot that has so many may have one more: it may have as many as are free. So a slot that is alone has half at most, each of
    /// two a third, and there is always some for the next (Choudhury and Hahne, "Dynamic queue length thresholds", 1998).
    pub fn take(&self, has: u64) -> bool {
        let admits = |taken: u64| (has < self.most.saturating_sub(taken)).then_some(taken + 1);
        self.taken.fetch_update(Relaxed, Relaxed, admits).is_ok()
    }

    /// Gives one back.
    pub fn give_back(&self) {
        self.taken.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_slot_takes_what_the_others_need() {
        let capacity = Capacity::of(240);
        assert_eq!(capacity.most, 60);
        let fill = |has: &mut u64| {
            while capacity.take(*has) {
                *has += 1;
            }
            *has
        };
        let mut slots = [0; 3];
        assert_eq!(slots.each_mut().map(fill), [30, 15, 8]);
        // The first comes down to what the others leave.
        while slots[0] > 0 {
            capacity.give_back();
            slots[0] -= 1;
        }
        for _ in 0..60 {
            for has in &mut slots {
                if capacity.take(*has) {
                    *has += 1;
                }
            }
        }
        // It has its part again, nobody more than half, and there is some for the next.
        assert!(slots.iter().all(|has| (10..=30).contains(has)), "{slots:?}");
        assert!(capacity.take(0));
        assert!(Capacity::of(1_048_576).most > 500_000);
        assert_eq!(
            Capacity::of(u64::MAX).most,
            (u64::MAX - OTHER_DESCRIPTORS) / 2
        );
    }
}
