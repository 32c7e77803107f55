//! Real guests: a stock kernel on real KVM, in a real monitor process. Without a usable KVM these tests fail.

#[cfg(test)]
#[path = "harness/guest.rs"]
mod guest;
#[cfg(test)]
#[path = "harness/monitor.rs"]
mod monitor;

#[cfg(test)]
#[path = "harness/boot.rs"]
mod boot;
#[cfg(test)]
#[path = "harness/claim.rs"]
mod claim;
#[cfg(test)]
#[path = "harness/difference.rs"]
mod difference;
#[cfg(test)]
#[path = "harness/freeze.rs"]
mod freeze;
#[cfg(test)]
#[path = "harness/hostile.rs"]
mod hostile;
#[cfg(test)]
#[path = "harness/lazily.rs"]
mod lazily;
#[cfg(test)]
#[path = "harness/mutated.rs"]
mod mutated;
#[cfg(test)]
#[path = "harness/mutation.rs"]
#[expect(dead_code, reason = "the rest is for tests without KVM")]
mod mutation;
#[cfg(test)]
#[path = "harness/net.rs"]
mod net;
#[cfg(test)]
#[path = "harness/prefault.rs"]
mod prefault;
#[cfg(test)]
#[path = "harness/rewind.rs"]
mod rewind;
