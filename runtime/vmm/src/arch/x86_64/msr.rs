//! Which model-specific registers are saved, and how.
//!
//! `KVM_GET_MSR_INDEX_LIST` names what KVM would save; the list is neither complete (memory type ranges are missing) nor
//! all of it ours (what CPUID does not offer the guest). What is left must be readable and writable *at save time*, on the
//! vCPU itself; on restore there is no exception any more.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// `IA32_TSC`.
pub const TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// `IA32_MTRR_DEF_TYPE`.
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: what firmware leaves behind.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
/// `IA32_MISC_ENABLE` with fast strings.
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
/// Most registers in one call (`MAX_IO_MSRS` of KVM).
const BATCH_MAX: usize = 256;

/// Not listed by KVM but part of the guest's state: memory type ranges (arch/x86/kvm/mtrr.c).
const UNLISTED: [RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    MTRR_DEFAULT_TYPE..=MTRR_DEFAULT_TYPE,
];

/// Why registers of a range are not in the plain list.
struct Exception {
    range: RangeInclusive<u32>,
    #[expect(dead_code, reason = "the table documents itself")]
    reason: &'static str,
}

const fn exception(first: u32, last: u32, reason: &'static str) -> Exception {
    Exception {
        range: first..=last,
        reason,
    }
}

/// Listed by KVM, but not saved as plain values.
const NOT_PLAIN: [Exception; 16] = [
    exception(
        TSC,
        TSC,
        "time: saved as counter and offset, set when the guest resumes",
    ),
    exception(
        TSC_DEADLINE,
        TSC_DEADLINE,
        "timer: set after the counter, or KVM arms it for the wrong moment",
    ),
    exception(
        0x4000_0000,
        0x4000_01ff,
        "hyper-v: not offered; a write would make KVM allocate its state",
    ),
    exception(
        0x4b56_4d02,
        0x4b56_4d02,
        "asynchronous page faults: not offered; a write drops those under way (kvm_pv_enable_async_pf, x86.c), and a vCPU that \
         waits for one without the guest's knowledge then waits for ever",
    ),
    exception(
        0x4b56_4d06,
        0x4b56_4d07,
        "interrupt of asynchronous page faults: not offered",
    ),
    exception(0x480, 0x4ff, "vmx and extended machine check: not offered"),
    exception(0xc1, 0xc8, "performance counters: not offered"),
    exception(0x186, 0x18d, "performance events: not offered"),
    exception(0x309, 0x30c, "fixed counters: not offered"),
    exception(0x345, 0x345, "performance capabilities: not offered"),
    exception(0x38d, 0x3f2, "counter control, PEBS: not offered"),
    exception(0x570, 0x58b, "processor trace: not offered"),
    exception(0x600, 0x600, "debug store: not offered"),
    exception(
        0xc000_0300,
        0xc000_0302,
        "amd global counter control: not offered",
    ),
    exception(0xc001_0000, 0xc001_0007, "k7 counters: not offered"),
    exception(
        0xc001_0104,
        0xc001_020b,
        "svm (tsc ratio, vm_cr, hsave) and amd core counters: not offered",
    ),
];

/// One register as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrV1 {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub data: u64,
}

/// Why registers could not be read or written.
#[derive(Debug, Error)]
pub enum MsrError {
    /// KVM refused this one.
    #[error("msr {index:#x} was refused by kvm when {act}")]
    Refused {
        /// Its number.
        index: u32,
        /// `reading` or `writing`.
        act: &'static str,
    },
    /// The call itself failed.
    #[error("msrs could not be accessed when {act}")]
    Call {
        /// `reading` or `writing`.
        act: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// One that this host's monitor would not save, or one out of order.
    #[error(
        "msr {0:#x} is none that a machine of this host is saved with, or stands twice or out of order"
    )]
    Foreign(u32),
    /// More than we ever save.
    #[error("{0} msrs are over the limit of {BATCH_MAX}")]
    TooMany(usize),
}

/// Which registers to save on this host, given KVM's list.
pub fn to_save(listed: &[u32]) -> Vec<u32> {
    let unlisted = UNLISTED.into_iter().flatten();
    let mut indices: Vec<u32> = listed.iter().copied().chain(unlisted).collect();
    indices.retain(|index| {
        !NOT_PLAIN
            .iter()
            .any(|exception| exception.range.contains(index))
    });
    indices.sort_unstable();
    indices.dedup();
    indices
}

/// What firmware would have set before a kernel starts.
pub fn at_boot() -> Vec<MsrV1> {
    vec![
        MsrV1 {
            index: MTRR_DEFAULT_TYPE,
            data: MTRR_ENABLED_WRITE_BACK,
        },
        MsrV1 {
            index: MISC_ENABLE,
            data: MISC_ENABLE_FAST_STRINGS,
        },
    ]
}

fn to_kvm(entries: &[MsrV1]) -> Result<Msrs, MsrError> {
    let entries: Vec<_> = entries
        .iter()
        .map(|msr| kvm_msr_entry {
            index: msr.index,
            data: msr.data,
            reserved: 0,
        })
        .collect();
    if entries.len() > BATCH_MAX {
        return Err(MsrError::TooMany(entries.len()));
    }
    Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(entries.len()))
}

/// Reads registers.
///
/// # Errors
/// Names the first register that KVM refuses to read.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrV1>, MsrError> {
    const ACT: &str = "reading";
    let entries: Vec<_> = indices
        .iter()
        .map(|index| MsrV1 {
            index: *index,
            data: 0,
        })
        .collect();
    let mut msrs = to_kvm(&entries)?;
    let count = vcpu
        .get_msrs(&mut msrs)
        .map_err(|source| MsrError::Call { act: ACT, source })?;
    if let Some(index) = indices.get(count) {
        return Err(MsrError::Refused {
            index: *index,
            act: ACT,
        });
    }
    Ok(msrs
        .as_slice()
        .iter()
        .map(|entry| MsrV1 {
            index: entry.index,
            data: entry.data,
        })
        .collect())
}

/// Writes registers.
///
/// # Errors
/// Names the first register that KVM refuses to write.
pub fn write(vcpu: &VcpuFd, entries: &[MsrV1]) -> Result<(), MsrError> {
    const ACT: &str = "writing";
    if entries.is_empty() {
        return Ok(());
    }
    let msrs = to_kvm(entries)?;
    let count = vcpu
        .set_msrs(&msrs)
        .map_err(|source| MsrError::Call { act: ACT, source })?;
    match entries.get(count) {
        Some(refused) => Err(MsrError::Refused {
            index: refused.index,
            act: ACT,
        }),
        None => Ok(()),
    }
}

/// Whether registers of a snapshot are some of `ours` ([`to_save`]'s), in ascending order: whatever else KVM would take is not a
/// file's to set.
///
/// # Errors
/// [`MsrError::Foreign`] with the first that is not.
pub fn check(saved: &[MsrV1], ours: &[u32]) -> Result<(), MsrError> {
    let mut ours = ours.iter();
    let foreign = saved
        .iter()
        .find(|msr| !ours.by_ref().any(|index| *index == msr.index));
    foreign.map_or(Ok(()), |msr| Err(MsrError::Foreign(msr.index)))
}

/// All of `present`, with the values of `saved` where that has one: a rewind must leave no register of a life, although the host that
/// saved knew fewer of them.
pub fn completed(saved: &[MsrV1], present: &[MsrV1]) -> Vec<MsrV1> {
    let mut saved = saved.iter().peekable();
    let value = |fresh: &MsrV1| match saved.next_if(|msr| msr.index == fresh.index) {
        Some(msr) => *msr,
        None => *fresh,
    };
    present.iter().map(value).collect()
}

/// Those of `wanted` that do not have their value already. Both are sorted by number, as [`to_save`] sorts them; one that
/// `present` does not name is wanted.
pub fn changed(present: &[MsrV1], wanted: &[MsrV1]) -> Vec<MsrV1> {
    let has = |msr: &&MsrV1| {
        present
            .binary_search_by_key(&msr.index, |other| other.index)
            .is_ok_and(|at| present[at].data == msr.data)
    };
    wanted.iter().filter(|msr| !has(msr)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_and_what_is_not_offered_is_left_out() {
        let mut kept = to_save(&[
            TSC,
            TSC_DEADLINE,
            0x4000_0001,
            0x480,
            0xc1,
            0xc001_0200,
            0x174,
            0x4b56_4d01,
            0x4b56_4d02,
            0x4b56_4d06,
            0x4b56_4d07,
        ]);
        kept.retain(|index| !to_save(&[]).contains(index));
        assert_eq!(kept, [0x174, 0x4b56_4d01]);
    }

    #[test]
    fn memory_type_ranges_are_saved_though_not_listed() {
        let kept = to_save(&[]);
        assert_eq!(kept.len(), 16 + 1 + 2 + 8 + 1);
        assert!(kept.contains(&MTRR_DEFAULT_TYPE));
    }

    #[test]
    fn a_register_listed_twice_is_saved_once() {
        assert_eq!(
            to_save(&[0x200, 0x174, 0x174])
                .iter()
                .filter(|index| **index == 0x174)
                .count(),
            1
        );
    }

    #[test]
    fn a_register_is_left_alone_only_if_it_has_the_wanted_value() {
        let msr = |index, data| MsrV1 { index, data };
        let present = [msr(1, 5), msr(2, 6), msr(9, 0)];
        let wanted = [msr(1, 5), msr(2, 7), msr(4, 0), msr(9, 0)];
        assert_eq!(changed(&present, &wanted), [msr(2, 7), msr(4, 0)]);
    }

    #[test]
    fn a_file_sets_no_register_that_is_not_saved_here() {
        let msr = |index| MsrV1 { index, data: 1 };
        let ours = to_save(&[0x174, 0x4000_0001, TSC]);
        let all: Vec<MsrV1> = ours.iter().copied().map(msr).collect();
        check(&all, &ours).unwrap();
        check(&all[3..7], &ours).unwrap();
        check(&[], &ours).unwrap();
        let twice = [&all[..1], &all[..]].concat();
        let backwards = [all[1], all[0]];
        for wrong in [&[msr(0x4000_0001)][..], &[msr(TSC)], &twice, &backwards] {
            assert!(matches!(check(wrong, &ours), Err(MsrError::Foreign(_))));
        }
    }

    #[test]
    fn registers_that_the_saving_host_did_not_know_are_as_new() {
        let msr = |index, data| MsrV1 { index, data };
        let fresh = [msr(1, 0), msr(2, 7), msr(9, 0)];
        assert_eq!(
            completed(&[msr(2, 5)], &fresh),
            [msr(1, 0), msr(2, 5), msr(9, 0)]
        );
        assert_eq!(completed(&[], &fresh), fresh);
    }

    #[test]
    fn more_registers_than_one_call_takes_are_an_error() {
        let msrs = vec![MsrV1 { index: 1, data: 0 }; BATCH_MAX + 1];
        assert!(matches!(to_kvm(&msrs), Err(MsrError::TooMany(_))));
    }
}
