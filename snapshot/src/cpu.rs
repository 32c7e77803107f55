//! The CPU features a snapshot was taken with, compared with a host before anything of it runs: a guest that uses an
//! instruction that its host lacks dies in ways nobody can explain.

use serde::{Deserialize, Serialize};

/// One CPUID answer (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry.
    pub index: u32,
    /// KVM's flags of the entry.
    pub flags: u32,
    /// Answer.
    pub eax: u32,
    /// Answer.
    pub ebx: u32,
    /// Answer.
    pub ecx: u32,
    /// Answer.
    pub edx: u32,
}

/// What the guest was told of its CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuRecord {
    /// Vendor string of leaf 0, for instance `AuthenticAMD`.
    pub vendor: String,
    /// Frequency of the time stamp counter, kHz.
    pub tsc_khz: u32,
    /// Every leaf the first vCPU has.
    pub leaves: Vec<Leaf>,
}

/// A feature that the snapshot's guest may use and the host does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingFeature(pub String);

impl std::fmt::Display for MissingFeature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register whose bits are features.
struct FeatureWord {
    function: u32,
    index: u32,
    register: Register,
    /// Bits that say what the system does at the moment, or that the monitor sets itself.
    ignored: u32,
    /// Names of bits, for messages.
    names: &'static [(u32, &'static str)],
}

const fn word(
    function: u32,
    index: u32,
    register: Register,
    names: &'static [(u32, &'static str)],
) -> FeatureWord {
    FeatureWord {
        function,
        index,
        register,
        ignored: 0,
        names,
    }
}

/// Leaf 1 ECX: TSC deadline timer and hypervisor are the monitor's, OSXSAVE mirrors CR4.
const LEAF_1_ECX_IGNORED: u32 = 1 << 24 | 1 << 27 | 1 << 31;
/// Leaf 7 ECX: OSPKE mirrors CR4.
const LEAF_7_ECX_IGNORED: u32 = 1 << 4;
/// Leaf 1 EDX: the APIC bit mirrors the APIC's state.
const LEAF_1_EDX_IGNORED: u32 = 1 << 9;

const WORDS: &[FeatureWord] = &[
    FeatureWord {
        ignored: LEAF_1_ECX_IGNORED,
        ..word(
            1,
            0,
            Register::Ecx,
            &[
                (0, "sse3"),
                (1, "pclmulqdq"),
                (9, "ssse3"),
                (12, "fma"),
                (13, "cmpxchg16b"),
                (17, "pcid"),
                (19, "sse4_1"),
                (20, "sse4_2"),
                (21, "x2apic"),
                (22, "movbe"),
                (23, "popcnt"),
                (25, "aes"),
                (26, "xsave"),
                (28, "avx"),
                (29, "f16c"),
                (30, "rdrand"),
            ],
        )
    },
    FeatureWord {
        ignored: LEAF_1_EDX_IGNORED,
        ..word(
            1,
            0,
            Register::Edx,
            &[
                (4, "tsc"),
                (5, "msr"),
                (8, "cmpxchg8b"),
                (15, "cmov"),
                (19, "clflush"),
                (23, "mmx"),
                (24, "fxsr"),
                (25, "sse"),
                (26, "sse2"),
            ],
        )
    },
    word(
        7,
        0,
        Register::Ebx,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    FeatureWord {
        ignored: LEAF_7_ECX_IGNORED,
        ..word(
            7,
            0,
            Register::Ecx,
            &[
                (1, "avx512vbmi"),
                (2, "umip"),
                (3, "pku"),
                (6, "avx512_vbmi2"),
                (8, "gfni"),
                (9, "vaes"),
                (10, "vpclmulqdq"),
                (11, "avx512_vnni"),
                (16, "la57"),
                (22, "rdpid"),
            ],
        )
    },
    word(
        7,
        0,
        Register::Edx,
        &[
            (4, "fsrm"),
            (14, "serialize"),
            (22, "amx_bf16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
            (26, "spec_ctrl"),
            (31, "ssbd"),
        ],
    ),
    word(7, 1, Register::Eax, &[(4, "avx_vnni"), (5, "avx512_bf16")]),
    word(
        0xd,
        0,
        Register::Eax,
        &[
            (1, "xsave state sse"),
            (2, "xsave state avx"),
            (9, "xsave state pku"),
        ],
    ),
    word(0xd, 0, Register::Edx, &[]),
    word(
        0xd,
        1,
        Register::Eax,
        &[
            (0, "xsaveopt"),
            (1, "xsavec"),
            (2, "xgetbv1"),
            (3, "xsaves"),
        ],
    ),
    word(
        0x4000_0001,
        0,
        Register::Eax,
        &[
            (0, "kvm clocksource"),
            (3, "kvm clocksource2"),
            (4, "kvm async pf"),
            (5, "kvm steal time"),
            (24, "kvm clocksource stable"),
        ],
    ),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (8, "3dnowprefetch"),
            (16, "fma4"),
            (22, "topoext"),
        ],
    ),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        &[
            (11, "syscall"),
            (20, "nx"),
            (26, "1 GiB pages"),
            (27, "rdtscp"),
            (29, "long mode"),
        ],
    ),
    word(
        0x8000_0008,
        0,
        Register::Ebx,
        &[
            (0, "clzero"),
            (9, "wbnoinvd"),
            (12, "ibpb"),
            (14, "ibrs"),
            (15, "stibp"),
        ],
    ),
];

/// Most leaves of a record: more than KVM takes (`KVM_MAX_CPUID_ENTRIES`, 256) are none's.
const LEAVES_MAX: usize = 256;
/// Length of a vendor's name: three registers.
const VENDOR_BYTES_MAX: usize = 12;

impl CpuRecord {
    /// The record of a section's bytes; what is wrong with others.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (record, rest) =
            postcard::take_from_bytes::<Self>(bytes).map_err(|error| error.to_string())?;
        let is_name = |text: &str| text.len() <= VENDOR_BYTES_MAX && text.bytes().all(is_printable);
        if !rest.is_empty() {
            Err(format!("{} bytes are left over", rest.len()))
        } else if record.leaves.len() > LEAVES_MAX {
            Err(format!("{} leaves are too many", record.leaves.len()))
        } else if !is_name(&record.vendor) {
            Err("its vendor is no vendor's name".into())
        } else {
            Ok(record)
        }
    }

    /// What this snapshot's guest was told and `host` does not have; empty if it can run there. A missing leaf counts as zeros.
    /// A different vendor is a missing feature of its own.
    pub fn missing_on(&self, host: &Self) -> Vec<MissingFeature> {
        let mut missing = Vec::new();
        if self.vendor != host.vendor {
            missing.push(MissingFeature(format!(
                "a CPU of {} (this host has {})",
                self.vendor, host.vendor
            )));
        }
        for word in WORDS {
            let absent = self.bits(word) & !host.bits(word) & !word.ignored;
            for bit in (0..32).filter(|bit| absent >> bit & 1 == 1) {
                let name = word
                    .names
                    .iter()
                    .find(|(named, _)| *named == bit)
                    .map(|(_, name)| (*name).to_owned());
                let place = || {
                    format!(
                        "CPUID {:#x}.{} {:?} bit {bit}",
                        word.function, word.index, word.register
                    )
                };
                missing.push(MissingFeature(name.unwrap_or_else(place)));
            }
        }
        missing
    }

    fn bits(&self, word: &FeatureWord) -> u32 {
        let leaf = self
            .leaves
            .iter()
            .find(|leaf| leaf.function == word.function && leaf.index == word.index);
        leaf.map_or(0, |leaf| match word.register {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        })
    }
}

fn is_printable(byte: u8) -> bool {
    byte == b' ' || byte.is_ascii_graphic()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_other_bytes_than_it_was_made_of_is_refused() {
        let encode = |record: &CpuRecord| postcard::to_stdvec(record).unwrap();
        let good = record(7, 1, 2);
        assert_eq!(CpuRecord::decode(&encode(&good)).unwrap(), good);
        let leftover = [encode(&good), vec![0]].concat();
        let many = vec![good.leaves[0]; LEAVES_MAX + 1];
        let named = |vendor: &str| CpuRecord {
            vendor: vendor.into(),
            ..good.clone()
        };
        for bytes in [
            leftover,
            encode(&CpuRecord {
                leaves: many,
                ..good.clone()
            }),
            encode(&named("AuthenticAMD!")),
            encode(&named("\u{1b}[2J")),
        ] {
            assert!(CpuRecord::decode(&bytes).is_err());
        }
    }

    fn record(function: u32, ebx: u32, ecx: u32) -> CpuRecord {
        let leaf = Leaf {
            function,
            index: 0,
            flags: 0,
            eax: 0,
            ebx,
            ecx,
            edx: 0,
        };
        CpuRecord {
            vendor: "AuthenticAMD".into(),
            tsc_khz: 1,
            leaves: vec![leaf],
        }
    }

    #[test]
    fn a_missing_feature_is_named() {
        let missing = record(7, 1 << 5, 0).missing_on(&record(7, 0, 0));
        assert_eq!(missing, [MissingFeature("avx2".into())]);
    }

    #[test]
    fn a_feature_without_a_name_is_told_by_its_place() {
        let missing = record(7, 1 << 27, 0).missing_on(&record(7, 0, 0));
        assert_eq!(missing[0].0, "CPUID 0x7.0 Ebx bit 27");
    }

    #[test]
    fn a_richer_host_and_state_bits_are_no_obstacle() {
        assert!(
            record(1, 0, 1 << 27 | 1 << 31)
                .missing_on(&record(1, 0, 1))
                .is_empty()
        );
    }

    #[test]
    fn another_vendor_is_refused() {
        let host = CpuRecord {
            vendor: "GenuineIntel".into(),
            ..record(7, 0, 0)
        };
        assert_eq!(record(7, 0, 0).missing_on(&host).len(), 1);
    }

    #[test]
    fn a_leaf_the_host_does_not_have_counts_as_zeros() {
        let host = CpuRecord {
            leaves: vec![],
            ..record(7, 0, 0)
        };
        assert_eq!(
            record(7, 1 << 3, 0).missing_on(&host),
            [MissingFeature("bmi1".into())]
        );
    }
}
