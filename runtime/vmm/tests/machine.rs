//! Real guests: a stock kernel on real KVM, in a real monitor process. Without a usable KVM these tests fail.

#[path = "harness/guest.rs"]
mod guest;
#[path = "harness/monitor.rs"]
mod monitor;

#[path = "harness/boot.rs"]
mod boot;
#[path = "harness/freeze.rs"]
mod freeze;
