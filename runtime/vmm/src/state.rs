//! A machine as it lies in a snapshot's machine section, encoded with postcard. Untrusted when read back.

use serde::{Deserialize, Serialize};
use thaw_snapshot::{CpuRecord, Leaf};
use thaw_vmm_control::{DISK_COUNT_MAX, VCPU_COUNT_MAX};
use thiserror::Error;

use crate::arch::x86_64::cpuid::CpuidEntryV1;
use crate::arch::x86_64::interrupts::InterruptChipsV1;
use crate::arch::x86_64::layout::{MEMORY_MIB_MAX, MEMORY_MIB_MIN};
use crate::arch::x86_64::vcpu_state::VcpuStateV1;
use crate::devices::state::DevicesStateV1;

/// Everything but memory and disk content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStateV1 {
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// Time when it was frozen.
    pub time: FrozenTimeV1,
    /// Virtual processors in order.
    pub vcpus: Vec<VcpuStateV1>,
    /// Interrupt chips.
    pub chips: InterruptChipsV1,
    /// Disks in order.
    pub disks: Vec<DiskV1>,
    /// All devices.
    pub devices: DevicesStateV1,
}

/// The guest's clocks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenTimeV1 {
    /// KVM clock, nanoseconds.
    pub clock_ns: u64,
    /// TSC of the first vCPU.
    pub tsc: u64,
}

/// A disk as far as a restore must agree with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskV1 {
    /// Length, bytes.
    pub bytes: u64,
    /// Its content is a section of the snapshot, because the guest could write to it.
    pub is_stored: bool,
}

/// Why a machine section is none.
#[derive(Debug, Error)]
pub enum StateError {
    /// Not postcard of this version.
    #[error("machine state cannot be decoded")]
    Decode(#[source] postcard::Error),
    /// A number is out of limits.
    #[error("machine state has {what} {value}, which is out of limits")]
    Limit {
        /// What.
        what: &'static str,
        /// How much.
        value: u64,
    },
}

/// Longest disk, bytes: far above what a function may have (10 GiB).
const DISK_BYTES_MAX: u64 = 64 << 30;
/// Unit of a disk's length, bytes.
const SECTOR_BYTES: u64 = 512;

/// The section's bytes.
///
/// # Errors
/// Postcard's own; it has none for these types.
pub fn encode(state: &MachineStateV1) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_stdvec(state)
}

/// The machine of a section's bytes, with its numbers within limits. What is inside vCPUs, chips and devices is checked by
/// those who set it.
///
/// # Errors
/// Not decodable, bytes left over, or numbers out of limits.
pub fn decode(bytes: &[u8]) -> Result<MachineStateV1, StateError> {
    let (state, rest) =
        postcard::take_from_bytes::<MachineStateV1>(bytes).map_err(StateError::Decode)?;
    let limit = |what, value: usize| StateError::Limit {
        what,
        value: value as u64,
    };
    if !rest.is_empty() {
        return Err(limit("bytes left over", rest.len()));
    }
    if state.vcpus.is_empty() || state.vcpus.len() > usize::from(VCPU_COUNT_MAX) {
        return Err(limit("vcpu count", state.vcpus.len()));
    }
    if state.disks.len() > DISK_COUNT_MAX {
        return Err(limit("disk count", state.disks.len()));
    }
    // None is empty but a shell's, which rehearses with it.
    let is_disk =
        |disk: &DiskV1| disk.bytes <= DISK_BYTES_MAX && disk.bytes.is_multiple_of(SECTOR_BYTES);
    if let Some(disk) = state.disks.iter().find(|disk| !is_disk(disk)) {
        return Err(StateError::Limit {
            what: "disk bytes",
            value: disk.bytes,
        });
    }
    // The kernel's clocks are signed.
    if i64::try_from(state.time.clock_ns).is_err() {
        return Err(StateError::Limit {
            what: "clock",
            value: state.time.clock_ns,
        });
    }
    let mib = u64::from(MEMORY_MIB_MIN)..=u64::from(MEMORY_MIB_MAX);
    if !state.memory_bytes.is_multiple_of(1 << 20) || !mib.contains(&(state.memory_bytes >> 20)) {
        return Err(StateError::Limit {
            what: "memory bytes",
            value: state.memory_bytes,
        });
    }
    Ok(state)
}

/// The record of a vCPU's CPUID that a restore compares with its host.
pub fn cpu_record(cpuid: &[CpuidEntryV1], tsc_khz: u32) -> CpuRecord {
    let vendor = cpuid.iter().find(|entry| entry.function == 0).map(|entry| {
        let bytes: Vec<u8> = [entry.ebx, entry.edx, entry.ecx]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let leaves = cpuid.iter().map(|entry| {
        let CpuidEntryV1 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = *entry;
        Leaf {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    });
    CpuRecord {
        vendor: vendor.unwrap_or_default(),
        tsc_khz,
        leaves: leaves.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::state::SerialStateV1;

    fn vcpu() -> VcpuStateV1 {
        VcpuStateV1 {
            cpuid: Vec::new(),
            sregs: vec![1],
            xcrs: vec![],
            xsave: vec![],
            regs: vec![2; 144],
            debugregs: vec![],
            msrs: Vec::new(),
            lapic: vec![],
            mp_state: 0,
            events: vec![],
            tsc_deadline: 5,
            tsc_ahead: u64::MAX,
        }
    }

    fn machine(vcpu_count: usize, memory_bytes: u64) -> MachineStateV1 {
        let serial = SerialStateV1 {
            baud_divisor: 12,
            interrupt_enable: 0,
            interrupt_identification: 1,
            line_control: 3,
            line_status: 0x60,
            modem_control: 8,
            modem_status: 0xb0,
            scratch: 0,
            in_buffer: Vec::new(),
        };
        MachineStateV1 {
            memory_bytes,
            time: FrozenTimeV1 {
                clock_ns: 1,
                tsc: 2,
            },
            vcpus: vec![vcpu(); vcpu_count],
            chips: InterruptChipsV1 {
                pic_master: vec![],
                pic_slave: vec![],
                ioapic: vec![],
            },
            disks: vec![DiskV1 {
                bytes: 512,
                is_stored: true,
            }],
            devices: DevicesStateV1 {
                serial,
                slots: Vec::new(),
            },
        }
    }

    #[test]
    fn a_machine_survives_its_section() {
        let state = machine(4, 128 << 20);
        assert_eq!(decode(&encode(&state).unwrap()).unwrap(), state);
    }

    #[test]
    fn numbers_out_of_limits_are_refused() {
        let good = || machine(1, 128 << 20);
        let disk = |bytes| MachineStateV1 {
            disks: vec![DiskV1 {
                bytes,
                is_stored: true,
            }],
            ..good()
        };
        let late = MachineStateV1 {
            time: FrozenTimeV1 {
                clock_ns: u64::MAX,
                tsc: 0,
            },
            ..good()
        };
        for state in [
            disk(513),
            disk(DISK_BYTES_MAX + 512),
            disk(u64::MAX),
            late,
            machine(0, 128 << 20),
            machine(5, 128 << 20),
            machine(1, 0),
            machine(1, (64 << 20) + 4096),
        ] {
            assert!(matches!(
                decode(&encode(&state).unwrap()),
                Err(StateError::Limit { .. })
            ));
        }
    }

    #[test]
    fn a_section_cut_short_or_too_long_is_refused() {
        let mut bytes = encode(&machine(1, 128 << 20)).unwrap();
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err());
        }
        bytes.push(0);
        assert!(decode(&bytes).is_err());
    }

    #[test]
    fn the_vendor_is_spelled_as_the_processor_spells_it() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let leaf = CpuidEntryV1 {
            function: 0,
            index: 0,
            flags: 0,
            eax: 16,
            ebx: word(b"Auth"),
            ecx: word(b"cAMD"),
            edx: word(b"enti"),
        };
        let record = cpu_record(&[leaf], 2_596_146);
        assert_eq!(
            (record.vendor.as_str(), record.tsc_khz, record.leaves.len()),
            ("AuthenticAMD", 2_596_146, 1)
        );
    }
}
