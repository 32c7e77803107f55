//! What CPUID tells the guest: what KVM supports on this host, less what we do not save, plus the VM's own topology.
//!
//! Taken away: virtualization (no nested state is saved), performance counters, debug store, processor trace and SGX
//! (state that is not saved), MONITOR (would spin), and KVM's asynchronous page faults (a fault in flight would be frozen
//! with the guest).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const FLAG_INDEX_MATTERS: u32 = 1;

/// One CPUID leaf as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntryV1 {
    /// EAX on input.
    pub function: u32,
    /// ECX on input.
    pub index: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl From<&kvm_cpuid_entry2> for CpuidEntryV1 {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            padding: _,
        } = *entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

impl From<&CpuidEntryV1> for kvm_cpuid_entry2 {
    fn from(entry: &CpuidEntryV1) -> Self {
        let CpuidEntryV1 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = *entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            padding: [0; 3],
        }
    }
}

/// More leaves than KVM takes.
#[derive(Debug, Error)]
#[error("cpuid of {0} entries is over the limit of {KVM_MAX_CPUID_ENTRIES}")]
pub struct TooManyEntries(pub usize);

/// A leaf that no vCPU of this host's machines is told.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("cpuid leaf {function:#x}.{index} is none that a machine of this host has")]
pub struct ForeignLeaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input.
    pub index: u32,
}

/// For `KVM_SET_CPUID2`.
///
/// # Errors
/// More than [`KVM_MAX_CPUID_ENTRIES`].
pub fn to_kvm(entries: &[CpuidEntryV1]) -> Result<CpuId, TooManyEntries> {
    let entries: Vec<kvm_cpuid_entry2> = entries.iter().map(Into::into).collect();
    CpuId::from_entries(&entries).map_err(|_| TooManyEntries(entries.len()))
}

/// One processor of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Its number, which is its APIC id.
    pub vcpu: u8,
    /// Processors of the VM: cores of one package, one thread each.
    pub vcpu_count: u8,
    /// `KVM_CAP_TSC_DEADLINE_TIMER`: the host's KVM emulates the deadline timer, which its CPUID does not tell.
    pub deadline_timer: DeadlineTimer,
}

/// Whether KVM emulates the TSC deadline timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadlineTimer {
    /// It does.
    Present,
    /// It does not.
    Absent,
}

const LEAF1_ECX_MASKED: u32 = (1 << 2) | (1 << 3) | (1 << 4) | (1 << 5) | (1 << 6) | (1 << 15); // DTES64, MONITOR, DS-CPL, VMX, SMX, PDCM
const LEAF1_ECX_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_DEBUG_STORE: u32 = 1 << 21;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF7_EBX_MASKED: u32 = (1 << 2) | (1 << 25); // SGX, processor trace
const LEAF7_ECX_MASKED: u32 = (1 << 5) | (1 << 30); // WAITPKG, SGX launch control
const EXTENDED1_ECX_MASKED: u32 =
    (1 << 2) | (1 << 10) | (1 << 13) | (1 << 23) | (1 << 24) | (1 << 27) | (1 << 28) | (1 << 29); // SVM, IBS, WDT, PERFCTR_*, PERFTSC, MWAITX
/// CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, STEAL_TIME, PV_EOI, PV_UNHALT, PV_TLB_FLUSH, PV_SEND_IPI, POLL_CONTROL,
/// PV_SCHED_YIELD, CLOCKSOURCE_STABLE (Documentation/virt/kvm/x86/cpuid.rst). Not among them: ASYNC_PF and what goes with it.
const KVM_FEATURES_KEPT: u32 = 1
    | (1 << 1)
    | (1 << 3)
    | (1 << 5)
    | (1 << 6)
    | (1 << 7)
    | (1 << 9)
    | (1 << 11)
    | (1 << 12)
    | (1 << 13)
    | (1 << 24);

/// Bits of an APIC id that number the processors of one package.
fn id_bits(vcpu_count: u8) -> u32 {
    u32::from(vcpu_count).next_power_of_two().trailing_zeros()
}

/// Cache leaves (4 on Intel, 0x8000001D on AMD): first and second level are each processor's own, the third is shared.
fn cache_sharing(eax: u32, vcpu_count: u8) -> u32 {
    let level = eax >> 5 & 7;
    let sharing = if level >= 3 {
        u32::from(vcpu_count) - 1
    } else {
        0
    };
    (eax & !(0xfff << 14)) | (sharing << 14)
}

/// Extended topology (leaf 0xB): threads, cores, end.
fn extended_topology(topology: Topology) -> [CpuidEntryV1; 3] {
    let entry = |index, eax, ebx, ecx| CpuidEntryV1 {
        function: 0xb,
        index,
        flags: FLAG_INDEX_MATTERS,
        eax,
        ebx,
        ecx,
        edx: u32::from(topology.vcpu),
    };
    let count = u32::from(topology.vcpu_count);
    [
        entry(0, 0, 1, 1 << 8),
        entry(1, id_bits(topology.vcpu_count), count, 1 | (2 << 8)),
        entry(2, 0, 0, 2),
    ]
}

fn adapt(entry: &mut CpuidEntryV1, topology: Topology) {
    let (id, count) = (u32::from(topology.vcpu), u32::from(topology.vcpu_count));
    match entry.function {
        0x1 => {
            entry.ecx =
                (entry.ecx & !(LEAF1_ECX_MASKED | LEAF1_ECX_DEADLINE)) | LEAF1_ECX_HYPERVISOR;
            if topology.deadline_timer == DeadlineTimer::Present {
                entry.ecx |= LEAF1_ECX_DEADLINE;
            }
            entry.edx &= !(LEAF1_EDX_DEBUG_STORE | LEAF1_EDX_HTT);
            if count > 1 {
                entry.edx |= LEAF1_EDX_HTT;
            }
            entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (id << 24);
        }
        0x4 if entry.eax & 0x1f != 0 => {
            entry.eax = (cache_sharing(entry.eax, topology.vcpu_count) & !(0x3f << 26))
                | ((count - 1) << 26);
        }
        0x7 if entry.index == 0 => {
            entry.ebx &= !LEAF7_EBX_MASKED;
            entry.ecx &= !LEAF7_ECX_MASKED;
        }
        // Performance counters, SGX, trace, SVM, IBS, SEV, AMD counters.
        0xa | 0x12 | 0x14 | 0x8000_000a | 0x8000_001b | 0x8000_001f | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x4000_0001 => (entry.eax, entry.edx) = (entry.eax & KVM_FEATURES_KEPT, 0),
        0x8000_0001 => entry.ecx &= !EXTENDED1_ECX_MASKED,
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (id_bits(topology.vcpu_count) << 12);
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            entry.eax = cache_sharing(entry.eax, topology.vcpu_count)
        }
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// CPUID of one vCPU from what `KVM_GET_SUPPORTED_CPUID` said.
pub fn guest(supported: &[CpuidEntryV1], topology: Topology) -> Vec<CpuidEntryV1> {
    assert!(
        topology.vcpu < topology.vcpu_count,
        "a vcpu is one of its machine's"
    );
    let has_topology_leaf = supported
        .iter()
        .any(|entry| entry.function == 0 && entry.eax >= 0xb);
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    for entry in &mut entries {
        adapt(entry, topology);
    }
    if has_topology_leaf {
        entries.extend(extended_topology(topology));
    }
    entries
}

/// The leaves that KVM has put into a longer, zeroed buffer: it may not say how many (`kvm_vcpu_ioctl_get_cpuid2`, Linux 6.1).
pub fn written(buffer: &[kvm_cpuid_entry2]) -> Vec<CpuidEntryV1> {
    let nothing = kvm_cpuid_entry2::default();
    let count = buffer.iter().rposition(|entry| *entry != nothing);
    let count = count.map_or(0, |last| last + 1);
    buffer[..count].iter().map(Into::into).collect()
}

/// Whether leaves of a snapshot, which are not those of a `fresh` vCPU of the same number, could be those of one of a lesser host:
/// of functions that there are here, without anything that [`guest`] takes away, of the same topology. Features are compared
/// apart ([`thaw_snapshot::CpuRecord::missing_on`]).
///
/// # Errors
/// The first leaf that could not.
pub fn check(
    saved: &[CpuidEntryV1],
    fresh: &[CpuidEntryV1],
    (vcpu, vcpu_count): (u8, u8),
) -> Result<(), ForeignLeaf> {
    let has_deadline = |entries: &[CpuidEntryV1]| {
        let mut ones = entries.iter().filter(|entry| entry.function == 1);
        ones.any(|entry| entry.ecx & LEAF1_ECX_DEADLINE != 0)
    };
    let deadline_timer = match has_deadline(saved) && has_deadline(fresh) {
        true => DeadlineTimer::Present,
        false => DeadlineTimer::Absent,
    };
    let topology = Topology {
        vcpu,
        vcpu_count,
        deadline_timer,
    };
    let is_possible = |at: usize, entry: &CpuidEntryV1| {
        let Some(ours) = fresh.iter().find(|ours| ours.function == entry.function) else {
            return false;
        };
        let mut adapted = *entry;
        adapt(&mut adapted, topology);
        let address_bits = |entry: &CpuidEntryV1| match entry.function {
            0x8000_0008 => entry.eax & 0xff,
            _ => 0,
        };
        let is_first =
            |other: &CpuidEntryV1| (other.function, other.index) != (entry.function, entry.index);
        adapted == *entry
            && entry.flags == ours.flags
            && (entry.flags & FLAG_INDEX_MATTERS != 0 || entry.index == 0)
            && (entry.function != 0xb || extended_topology(topology).contains(entry))
            && address_bits(entry) <= address_bits(ours)
            // KVM takes the first, and so does whoever looks for features.
            && saved[..at].iter().all(is_first)
    };
    let mut wrong = (saved.iter().enumerate()).filter(|(at, entry)| !is_possible(*at, entry));
    wrong.next().map_or(Ok(()), |(_, entry)| {
        Err(ForeignLeaf {
            function: entry.function,
            index: entry.index,
        })
    })
}

/// Bits that KVM keeps up to date itself while the guest runs (`__kvm_update_cpuid_runtime`, arch/x86/kvm/cpuid.c):
/// (function, index, register 0 to 3 for eax to edx, bits).
const RUNTIME_BITS: [(u32, u32, usize, u32); 5] = [
    // APIC enabled; OSXSAVE; OSPKE; bytes of the enabled XSAVE area, plain and compacted.
    (1, 0, 3, 1 << 9),
    (1, 0, 2, 1 << 27),
    (7, 0, 2, 1 << 4),
    (0xd, 0, 1, u32::MAX),
    (0xd, 1, 1, u32::MAX),
];

/// Whether two sets of entries, as KVM gives them back, are the same but for what KVM changes in them by itself.
pub fn is_same(one: &[CpuidEntryV1], other: &[CpuidEntryV1]) -> bool {
    let fixed = |entry: &CpuidEntryV1| {
        let &CpuidEntryV1 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = entry;
        let mut registers = [eax, ebx, ecx, edx];
        for (_, _, register, bits) in RUNTIME_BITS
            .iter()
            .filter(|bits| (bits.0, bits.1) == (function, index))
        {
            registers[*register] &= !bits;
        }
        (function, index, flags, registers)
    };
    one.iter().map(fixed).eq(other.iter().map(fixed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> CpuidEntryV1 {
        CpuidEntryV1 {
            function,
            index,
            flags: 0,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
        }
    }

    fn find(entries: &[CpuidEntryV1], function: u32, index: u32) -> CpuidEntryV1 {
        *entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .unwrap()
    }

    fn sample(vcpu: u8, vcpu_count: u8) -> Vec<CpuidEntryV1> {
        let all = [
            0,
            1,
            4,
            7,
            0xa,
            0xb,
            0x1f,
            0x4000_0001,
            0x8000_0001,
            0x8000_0008,
            0x8000_000a,
            0x8000_001e,
        ];
        let supported: Vec<_> = all.iter().map(|function| entry(*function, 0)).collect();
        guest(
            &supported,
            Topology {
                vcpu,
                vcpu_count,
                deadline_timer: DeadlineTimer::Present,
            },
        )
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for vcpu in 0..4 {
            let entries = sample(vcpu, 4);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, u32::from(vcpu));
            assert_eq!(find(&entries, 0xb, 1).edx, u32::from(vcpu));
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, u32::from(vcpu));
        }
    }

    #[test]
    fn one_core_each_and_as_many_as_the_machine_has() {
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2)] {
            let entries = sample(0, count);
            let core = find(&entries, 0xb, 1);
            assert_eq!((core.eax, core.ebx), (bits, u32::from(count)));
            assert_eq!(find(&entries, 0xb, 0).ebx, 1);
            assert_eq!(
                find(&entries, 0x8000_0008, 0).ecx & 0xff,
                u32::from(count) - 1
            );
            assert_eq!(find(&entries, 1, 0).edx & LEAF1_EDX_HTT != 0, count > 1);
        }
    }

    #[test]
    fn what_is_not_saved_is_not_offered() {
        let entries = sample(0, 1);
        assert_eq!(find(&entries, 1, 0).ecx & (1 << 5), 0, "vmx");
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & (1 << 2), 0, "svm");
        assert_eq!(find(&entries, 0xa, 0).eax, 0, "counters");
        assert_eq!(
            find(&entries, 0x4000_0001, 0).eax & (1 << 4 | 1 << 14),
            0,
            "async page faults"
        );
        assert!(entries.iter().all(|entry| entry.function != 0x1f));
    }

    #[test]
    fn deadline_timer_follows_kvm_and_hypervisor_is_always_told() {
        let absent = Topology {
            vcpu: 0,
            vcpu_count: 1,
            deadline_timer: DeadlineTimer::Absent,
        };
        let ecx = find(&guest(&[entry(1, 0)], absent), 1, 0).ecx;
        assert_eq!(ecx & LEAF1_ECX_DEADLINE, 0);
        assert_eq!(find(&sample(0, 1), 1, 0).ecx >> 31, 1);
        assert_ne!(find(&sample(0, 1), 1, 0).ecx & LEAF1_ECX_DEADLINE, 0);
    }

    #[test]
    fn only_what_kvm_changes_by_itself_may_differ() {
        let before = sample(0, 1);
        let mut after = before.clone();
        let leaf = |entries: &mut Vec<CpuidEntryV1>, function: u32| {
            let at = entries.iter().position(|entry| entry.function == function);
            at.expect("leaf of the sample")
        };
        let one = leaf(&mut after, 1);
        after[one].ecx ^= 1 << 27;
        assert!(is_same(&before, &after));
        after[one].ecx ^= 1 << 26;
        assert!(!is_same(&before, &after));
        assert!(!is_same(&before, &before[1..]));
    }

    /// Of a guest on a real KVM (the lab's), less those without anything in them.
    const REAL: [[u32; 7]; 15] = [
        [0, 0, 0, 0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
        [1, 0, 0, 0x60fb1, 0x10800, 0xf7f8_3203, 0x0f8b_fbfd],
        [4, 0, 1, 0, 0, 0, 0],
        [7, 0, 1, 0, 0x0198_03ab, 0x10204, 0x2000_0000],
        [0xa, 0, 0, 0, 0, 0, 0],
        [0xd, 0, 1, 0x207, 0x240, 0xa88, 0],
        [0xd, 1, 1, 5, 0, 0, 0],
        [0xd, 2, 1, 0x100, 0x240, 0, 0],
        [0x8000_0001, 0, 0, 0x60fb1, 0, 0x73, 0xedd3_fbfd],
        [0x8000_0008, 0, 0, 0x3928, 0x0400_0000, 0, 0],
        [
            0x4000_0000,
            0,
            0,
            0x4000_0001,
            0x4b4d_564b,
            0x564b_4d56,
            0x4d,
        ],
        [0x4000_0001, 0, 0, 0x0100_3aeb, 0, 0, 0],
        [0xb, 0, 1, 0, 1, 0x100, 0],
        [0xb, 1, 1, 0, 1, 0x201, 0],
        [0xb, 2, 1, 0, 0, 2, 0],
    ];

    #[test]
    fn leaves_of_a_real_guest_are_taken_without_what_is_left_of_the_buffer() {
        let mut buffer = vec![kvm_cpuid_entry2::default(); KVM_MAX_CPUID_ENTRIES];
        for (slot, leaf) in buffer.iter_mut().zip(REAL) {
            [
                slot.function,
                slot.index,
                slot.flags,
                slot.eax,
                slot.ebx,
                slot.ecx,
                slot.edx,
            ] = leaf;
        }
        let real = written(&buffer);
        assert_eq!(real.len(), REAL.len());
        check(&real, &real, (0, 1)).unwrap();
        assert_eq!(written(&[]), []);
    }

    #[test]
    fn leaves_that_no_vcpu_here_is_told_are_refused() {
        let fresh = sample(1, 2);
        check(&fresh, &fresh, (1, 2)).unwrap();
        // A lesser host's: fewer leaves, fewer features.
        let mut lesser = fresh[..4].to_vec();
        lesser[1].ecx &= !LEAF1_ECX_DEADLINE & !1;
        check(&lesser, &fresh, (1, 2)).unwrap();
        let with = |function: u32, index: u32, change: fn(&mut CpuidEntryV1)| {
            let mut saved = fresh.clone();
            let place =
                |entry: &&mut CpuidEntryV1| (entry.function, entry.index) == (function, index);
            change(saved.iter_mut().find(place).unwrap());
            saved
        };
        let mut twice = fresh.clone();
        twice.push(fresh[0]);
        let mut hyper_v = fresh.clone();
        hyper_v.push(entry(0x4000_0003, 0));
        for (what, saved) in [
            ("vmx", with(1, 0, |leaf| leaf.ecx |= 1 << 5)),
            ("svm", with(0x8000_0001, 0, |leaf| leaf.ecx |= 1 << 2)),
            ("counters", with(0xa, 0, |leaf| leaf.eax = 1)),
            ("svm features", with(0x8000_000a, 0, |leaf| leaf.ebx = 1)),
            (
                "asynchronous page faults",
                with(0x4000_0001, 0, |leaf| leaf.eax |= 1 << 4),
            ),
            ("another vcpu", with(1, 0, |leaf| leaf.ebx ^= 1 << 24)),
            ("another vcpu's topology", with(0xb, 1, |leaf| leaf.edx = 0)),
            (
                "address bits",
                with(0x8000_0008, 0, |leaf| leaf.function = 0x8000_0009),
            ),
            ("flags", with(7, 0, |leaf| leaf.flags = 4)),
            (
                "an index that does not matter",
                with(7, 0, |leaf| leaf.index = 9),
            ),
            ("a leaf twice", twice),
            ("hyper-v", hyper_v),
        ] {
            assert!(check(&saved, &fresh, (1, 2)).is_err(), "{what}");
        }
        assert!(check(&fresh, &fresh, (0, 2)).is_err());
        let mut narrow = fresh.clone();
        for leaf in narrow
            .iter_mut()
            .filter(|leaf| leaf.function == 0x8000_0008)
        {
            leaf.eax = 48;
        }
        check(&narrow, &fresh, (1, 2)).unwrap();
        assert!(check(&fresh, &narrow, (1, 2)).is_err());
        let mut without = fresh.clone();
        for leaf in without.iter_mut().filter(|leaf| leaf.function == 1) {
            leaf.ecx &= !LEAF1_ECX_DEADLINE;
        }
        assert!(check(&fresh, &without, (1, 2)).is_err());
    }

    #[test]
    fn too_many_saved_entries_are_an_error() {
        assert!(to_kvm(&vec![entry(0, 0); KVM_MAX_CPUID_ENTRIES + 1]).is_err());
    }
}
