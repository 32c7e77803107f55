//! ACPI tables (ACPI 6.5): the only way in which a stock kernel learns of virtio-mmio devices, processors and power.
//!
//! The platform is *hardware-reduced* (ACPI 6.5, 4.1): no PM timer, no SCI, no legacy interrupt controller, no interval
//! timer. Linux then neither probes nor calibrates against any of them (`acpi_generic_reduced_hw_init`).

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, PackageBuilder, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress};

use super::layout;
use crate::memory::GuestMemoryMmap;

const OEM_ID: [u8; 6] = *b"THAW  ";
const OEM_TABLE_ID: [u8; 8] = *b"THAWVMM ";
const OEM_REVISION: u32 = 1;
/// DSDT revision 2: 64-bit integers in AML.
const DSDT_REVISION: u8 = 2;
/// Length of a table that is nothing but its header.
const HEADER_BYTES: u32 = 36;
/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.10): no VGA to probe, no MSI, no CMOS clock. The bits for legacy devices and for a
/// keyboard controller stay clear: there are none.
const BOOT_ARCHITECTURE: u16 = (1 << 2) | (1 << 3) | (1 << 5);

/// A virtio-mmio device as the guest is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioWindow {
    /// Guest-physical start of its registers.
    pub base: u32,
    /// Bytes.
    pub length: u32,
    /// Its interrupt, edge triggered.
    pub gsi: u32,
}

/// Why the tables could not be put into guest memory.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// They do not fit into the area for them.
    #[error(
        "acpi tables of {bytes} bytes do not fit below {:#x}",
        layout::ACPI_END
    )]
    TooLarge {
        /// Length of all tables.
        bytes: usize,
    },
    /// Guest memory is not there.
    #[error("acpi tables could not be written to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Tables ready to be copied to [`layout::ACPI`].
#[derive(Debug)]
pub struct Tables {
    /// Everything, RSDP first.
    pub bytes: Vec<u8>,
}

/// Appends a table at the next multiple of 16 and returns its guest-physical address.
fn place(bytes: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let address = layout::ACPI.raw_value() + bytes.len() as u64;
    table.to_aml_bytes(bytes);
    address
}

fn io_register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn serial_device() -> Vec<u8> {
    let mut bytes = Vec::new();
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

fn virtio_device(number: u8, window: &VirtioWindow) -> Vec<u8> {
    let mut bytes = Vec::new();
    Device::new(
        Path::new(&format!("VR{number:02}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            &Name::new(Path::new("_CCA"), &aml::ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window.base, window.length),
                    &Interrupt::new(true, true, false, false, window.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

fn dsdt(windows: &[VirtioWindow]) -> Sdt {
    let mut children = serial_device();
    for (number, window) in (0u8..).zip(windows) {
        children.extend(virtio_device(number, window));
    }
    let mut sleep = PackageBuilder::new();
    sleep.add_element(&layout::SLEEP_TYPE_S5);
    let mut body = Scope::raw(Path::new("_SB_"), children);
    Name::new(Path::new("_S5_"), &sleep).to_aml_bytes(&mut body);

    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&body);
    table.update_checksum();
    table
}

fn madt(vcpu_count: u8) -> MADT {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for vcpu in 0..vcpu_count {
        table.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    // The I/O APIC keeps the id 0 that KVM gives it; it is only compared, never routed by.
    table.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    table
}

/// The tables of a machine with `vcpu_count` processors and the virtio devices in `windows`, in order of number.
pub fn tables(vcpu_count: u8, windows: &[VirtioWindow]) -> Tables {
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = place(&mut bytes, &dsdt(windows));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = io_register(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = io_register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = io_register(layout::SLEEP_STATUS_PORT);
    let fadt = place(&mut bytes, &fadt.finalize());
    let madt = place(&mut bytes, &madt(vcpu_count));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&mut bytes, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    Tables { bytes }
}

/// Writes the tables to guest memory and returns where the RSDP lies.
///
/// # Errors
/// Guest memory is smaller than the area, or the tables are larger.
pub fn write(
    memory: &GuestMemoryMmap,
    vcpu_count: u8,
    windows: &[VirtioWindow],
) -> Result<GuestAddress, AcpiError> {
    let tables = tables(vcpu_count, windows);
    if layout::ACPI.raw_value() + tables.bytes.len() as u64 > layout::ACPI_END {
        return Err(AcpiError::TooLarge {
            bytes: tables.bytes.len(),
        });
    }
    memory
        .write_slice(&tables.bytes, layout::ACPI)
        .map_err(AcpiError::Memory)?;
    Ok(layout::ACPI)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn pointer(bytes: &[u8], at: usize) -> usize {
        let address = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        usize::try_from(address - layout::ACPI.raw_value()).unwrap()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn sample() -> Tables {
        let window = |n: u32| VirtioWindow {
            base: 0xd000_0000 + n * 0x1000,
            length: 0x1000,
            gsi: 5 + n,
        };
        tables(4, &[window(0), window(1), window(2)])
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        let Tables { bytes } = sample();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = pointer(&bytes, 24);
        let mut found = Vec::new();
        let end = xsdt + word(&bytes, xsdt + 4);
        for entry in (xsdt + 36..end).step_by(8) {
            found.push(pointer(&bytes, entry));
        }
        let fadt = found[0];
        found.extend([xsdt, pointer(&bytes, fadt + 140)]);
        let mut names = Vec::new();
        for table in found {
            let length = word(&bytes, table + 4);
            assert_eq!(sum(&bytes[table..table + length]), 0);
            names.push(bytes[table..table + 4].to_vec());
        }
        assert_eq!(names, [b"FACP", b"APIC", b"XSDT", b"DSDT"]);
    }

    #[test]
    fn fadt_says_hardware_reduced_and_names_our_ports() {
        let Tables { bytes } = sample();
        let fadt = pointer(&bytes, pointer(&bytes, 24) + 36);
        let flags = word(&bytes, fadt + 112);
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        let register = |at: usize| {
            (
                bytes[fadt + at],
                bytes[fadt + at + 1],
                word(&bytes, fadt + at + 4),
            )
        };
        assert_eq!(register(116), (1, 8, usize::from(layout::RESET_PORT)));
        assert_eq!(bytes[fadt + 128], layout::RESET_VALUE);
        assert_eq!(
            register(244),
            (1, 8, usize::from(layout::SLEEP_CONTROL_PORT))
        );
        assert_eq!(
            register(256),
            (1, 8, usize::from(layout::SLEEP_STATUS_PORT))
        );
    }

    #[test]
    fn madt_lists_each_processor_and_one_io_apic() {
        let Tables { bytes } = sample();
        let madt = pointer(&bytes, pointer(&bytes, 24) + 44);
        let end = madt + word(&bytes, madt + 4);
        assert_eq!(word(&bytes, madt + 40), 0, "no 8259 pair");
        let (mut at, mut kinds) = (madt + 44, Vec::new());
        while at < end {
            kinds.push((bytes[at], bytes[at + 3]));
            at += usize::from(bytes[at + 1]);
        }
        assert_eq!(kinds, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]);
    }

    #[test]
    fn eight_disks_and_the_rest_fit_the_area() {
        let window = |n: u32| VirtioWindow {
            base: 0xd000_0000 + n * 0x1000,
            length: 0x1000,
            gsi: 5 + n,
        };
        let windows: Vec<_> = (0..11).map(window).collect();
        assert!(tables(4, &windows).bytes.len() < 0x1_0000);
    }
}
