//! Pages mapped for the guest before it touches them: `KVM_PRE_FAULT_MEMORY` (Documentation/virt/kvm/api.rst, 4.143; Linux 6.11).
//!
//! A page that lies in this process's memory still costs the guest an exit when it is touched first, as KVM's own tables do not have
//! it yet; one call fills these for a run of pages. The call resolves a fault for reading: a page that this process has written
//! already is mapped writable and counts as written in KVM's log from then on, one that is a file's is mapped for reading alone, and
//! its first write is a fault as ever. So the log has all that is written, and perhaps more
//! ([`GuestMemory::take_written`](crate::memory::GuestMemory::take_written)).
//!
//! It is a hint: an older kernel does not know the call and one that shadows page tables does not carry it out, and then the guest
//! runs as it would without.

use std::ops::Range;

use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use vm_memory::Address;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use crate::memory::{GuestMemory, PAGE_BYTES};

/// The call's number, which kvm-ioctls does not have (include/uapi/linux/kvm.h).
mod ioctls {
    use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
    vmm_sys_util::ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);
}

/// Maps `runs` of pages, counted over the concatenated ranges of `memory`, into the tables of the vCPU's machine, until one is
/// refused; returns how many pages were mapped. The vCPU must not run and must have the state that it will run with: the tables
/// depend on that. No content changes. A page of a file that is not in the page cache is waited for.
pub fn map_ahead(fd: &VcpuFd, memory: &GuestMemory, runs: &[Range<u64>]) -> u64 {
    let mut mapped = 0;
    for run in runs {
        let (mut at, end) = (run.start * PAGE_BYTES, run.end * PAGE_BYTES);
        while at < end {
            let Some((address, room)) = memory.address_of(at) else {
                return mapped;
            };
            let piece = room.min(end - at);
            let done = advance(address.raw_value(), piece, |left| {
                // SAFETY: the argument is a live struct of the call's own layout, which is all that the kernel reads and writes;
                // what it maps is guest memory by the vCPU's own slots, and no content changes. Why a call failed does not
                // matter: what it did is seen in `left`.
                let _ = unsafe { ioctl_with_mut_ref(fd, ioctls::KVM_PRE_FAULT_MEMORY(), left) };
            });
            mapped += done / PAGE_BYTES;
            if done < piece {
                return mapped;
            }
            at += piece;
        }
    }
    mapped
}

/// Repeats `call` on what is left of `bytes` at guest-physical `address` while that gets smaller: the kernel stops early, with or
/// without an error, when a signal comes or a page cannot be mapped, and says what it left. Returns the bytes done.
fn advance(address: u64, bytes: u64, mut call: impl FnMut(&mut kvm_pre_fault_memory)) -> u64 {
    let mut done = 0;
    while done < bytes {
        let mut left = kvm_pre_fault_memory {
            gpa: address + done,
            size: bytes - done,
            ..Default::default()
        };
        call(&mut left);
        match (bytes - done).checked_sub(left.size) {
            None | Some(0) => break,
            Some(more) => done += more,
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that maps at most `most` pages a call and none from page `refused` on; with the pages it was asked to begin at.
    fn mapped_by(most: u64, refused: u64) -> (u64, Vec<u64>) {
        let mut asked = Vec::new();
        let done = advance(16 * PAGE_BYTES, 8 * PAGE_BYTES, |left| {
            let page = left.gpa / PAGE_BYTES;
            asked.push(page);
            assert_eq!(left.gpa + left.size, 24 * PAGE_BYTES);
            assert_eq!((left.flags, left.padding), (0, [0; 5]));
            let pages = most.min(refused.saturating_sub(page));
            let bytes = (pages * PAGE_BYTES).min(left.size);
            left.gpa += bytes;
            left.size -= bytes;
        });
        (done / PAGE_BYTES, asked)
    }

    #[test]
    fn what_is_left_is_asked_for_until_nothing_more_is_done() {
        assert_eq!(mapped_by(8, 100), (8, vec![16]));
        assert_eq!(mapped_by(3, 100), (8, vec![16, 19, 22]));
        assert_eq!(mapped_by(3, 20), (4, vec![16, 19, 20]));
        // A kernel that does not know the call.
        assert_eq!(mapped_by(0, 100), (0, vec![16]));
    }

    #[test]
    fn a_kernel_that_leaves_more_than_it_was_given_is_not_asked_again() {
        let mut calls = 0;
        let done = advance(0, PAGE_BYTES, |left| {
            calls += 1;
            left.size = u64::MAX;
        });
        assert_eq!((done, calls), (0, 1));
    }
}
