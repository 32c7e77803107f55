//! Guest-physical addresses and I/O ports.
//!
//! Below 1 MiB the layout follows what the Linux boot protocol expects of a boot loader
//! (Documentation/arch/x86/boot.rst); the hole under 4 GiB holds what has no memory behind it.

use vm_memory::GuestAddress;

/// Smallest guest memory, MiB.
pub const MEMORY_MIB_MIN: u32 = 64;
/// Largest guest memory, MiB.
pub const MEMORY_MIB_MAX: u32 = 10_240;

/// Start of the hole for devices: no memory from here to [`HIGH_MEMORY`].
pub const DEVICE_HOLE: u64 = 0xc000_0000;
/// Where memory that does not fit below the hole goes on.
pub const HIGH_MEMORY: u64 = 0x1_0000_0000;

/// Global descriptor table of the boot processor.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Interrupt descriptor table: empty, any fault before the kernel's own is a triple fault.
pub const IDT: GuestAddress = GuestAddress(0x540);
/// `struct boot_params`, one page.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// Page tables: one PML4, one PDPT, then a page directory for each GiB.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// GiB that the boot page tables map one to one: the kernel, its parameters and the initramfs lie below.
pub const IDENTITY_MAPPED_GIB: u64 = 4;
/// Kernel command line with its final zero.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line without the final zero, bytes (`COMMAND_LINE_SIZE` of the kernel is 2,048).
pub const COMMAND_LINE_BYTES_MAX: usize = 2047;
/// End of conventional memory; above lies what firmware would own.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables, RSDP first: the area that old firmware puts it in.
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// First byte after the area for ACPI tables.
pub const ACPI_END: u64 = RESET_VECTOR.0;
/// Where a kernel jumps in real mode to have the firmware restart the machine (`ffff:0000`).
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Kernels are loaded at or above.
pub const KERNEL_MIN: GuestAddress = GuestAddress(0x10_0000);

/// I/O interrupt controller registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local interrupt controller registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that Intel hosts without unrestricted guests need (`KVM_SET_TSS_ADDR`).
pub const TSS: usize = 0xfffb_d000;

/// First I/O port of the serial console.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial console.
pub const SERIAL_GSI: u32 = 4;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register (ACPI 6.5, 4.8.3.6).
pub const RESET_PORT: u16 = 0x602;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 0x01;
/// SLP_TYP of the S5 state: our choice, told in `_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Command port of the keyboard controller, which kernels fall back on for a reset.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// Keyboard controller command: pulse the reset line.
pub const KEYBOARD_RESET: u8 = 0xfe;

/// One stretch of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Guest-physical start.
    pub start: GuestAddress,
    /// Bytes.
    pub length: u64,
}

/// How `total` bytes of memory are laid out around the device hole, in order. Their concatenation is the order of bytes in
/// the host's mapping and in a snapshot.
pub fn memory_ranges(total: u64) -> Vec<MemoryRange> {
    let low = total.min(DEVICE_HOLE);
    let mut ranges = vec![MemoryRange {
        start: GuestAddress(0),
        length: low,
    }];
    if total > low {
        ranges.push(MemoryRange {
            start: GuestAddress(HIGH_MEMORY),
            length: total - low,
        });
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_up_to_the_hole_is_one_range() {
        let ranges = memory_ranges(3 << 30);
        assert_eq!(
            ranges,
            [MemoryRange {
                start: GuestAddress(0),
                length: 3 << 30
            }]
        );
    }

    #[test]
    fn what_does_not_fit_below_the_hole_goes_above_it() {
        let ranges = memory_ranges((3 << 30) + (1 << 20));
        assert_eq!(
            ranges[1],
            MemoryRange {
                start: GuestAddress(1 << 32),
                length: 1 << 20
            }
        );
        assert_eq!(
            ranges.iter().map(|range| range.length).sum::<u64>(),
            (3 << 30) + (1 << 20)
        );
    }
}
