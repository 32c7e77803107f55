//! The boot processor's first registers: the 64-bit Linux boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::GuestMemoryMmap;

/// `__BOOT_CS`: 4 GiB flat code segment, execute and read.
const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS`: 4 GiB flat data segment, read and write.
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Descriptors for the selectors above (Intel SDM volume 3, 3.4.5): null, null, 64-bit code, data, busy 64-bit TSS.
const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_NUMERIC_ERROR: u64 = 1 << 5;
const CR0_WRITE_PROTECT: u64 = 1 << 16;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// RFLAGS: bit 1 is always set; interrupts are off.
const RFLAGS: u64 = 2;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const PAGE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// General registers at the kernel's 64-bit entry: RSI points to `struct boot_params`.
pub fn entry_regs(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.raw_value(),
        rsi: layout::BOOT_PARAMS.raw_value(),
        rflags: RFLAGS,
        ..Default::default()
    }
}

fn segment(selector: u16, kind: u8, s: u8, l: u8, db: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s,
        l,
        db,
        g: 1,
        ..Default::default()
    }
}

/// Long mode with paging over [`page_tables`], on top of what KVM gave a fresh vCPU.
pub fn entry_sregs(fresh: &kvm_sregs) -> kvm_sregs {
    let mut sregs = *fresh;
    sregs.cs = segment(CODE_SELECTOR, 0xb, 1, 1, 0);
    let data = segment(DATA_SELECTOR, 0x3, 1, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK_SELECTOR, 0xb, 0, 0, 0);
    sregs.gdt = kvm_dtable {
        base: layout::GDT.raw_value(),
        limit: 8 * 5 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: layout::IDT.raw_value(),
        limit: 7,
        ..Default::default()
    };
    sregs.cr0 =
        CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_NUMERIC_ERROR | CR0_WRITE_PROTECT | CR0_PAGING;
    sregs.cr3 = layout::PAGE_TABLES.raw_value();
    sregs.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
    sregs.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    sregs
}

/// Page tables that map [`layout::IDENTITY_MAPPED_GIB`] one to one in 2 MiB pages, as the bytes of consecutive pages from `base`.
pub fn page_tables(base: GuestAddress) -> Vec<u64> {
    let entries = PAGE_BYTES / 8;
    let pages = 2 + layout::IDENTITY_MAPPED_GIB;
    let page = |number: u64| base.raw_value() + number * PAGE_BYTES;
    (0..pages * entries)
        .map(|word| match (word / entries, word % entries) {
            (0, 0) => page(1) | PAGE_PRESENT_WRITABLE,
            (1, gib) if gib < layout::IDENTITY_MAPPED_GIB => page(2 + gib) | PAGE_PRESENT_WRITABLE,
            (0 | 1, _) => 0,
            (table, entry) => {
                (((table - 2) * entries + entry) * LARGE_PAGE_BYTES)
                    | PAGE_PRESENT_WRITABLE
                    | PAGE_LARGE
            }
        })
        .collect()
}

/// Real-mode code at the reset vector: `mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; hlt; jmp` back to `hlt`.
///
/// Linux on a hardware-reduced platform takes EFI for the only way to restart (`efi_reboot_required`,
/// drivers/firmware/efi/reboot.c), and without EFI falls back on the firmware's entry, where zeros would run for ever.
fn reset_stub() -> [u8; 9] {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    [
        0xba,
        low,
        high,
        0xb0,
        layout::RESET_VALUE,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
}

/// Writes descriptor tables, page tables and what stands for firmware to guest memory.
///
/// # Errors
/// There is no memory at their addresses.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let bytes = |words: &[u64]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    memory.write_slice(&bytes(&GDT), layout::GDT)?;
    memory.write_slice(&reset_stub(), layout::RESET_VECTOR)?;
    memory.write_slice(&[0; 8], layout::IDT)?;
    memory.write_slice(
        &bytes(&page_tables(layout::PAGE_TABLES)),
        layout::PAGE_TABLES,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as a processor would.
    fn translate(tables: &[u64], address: u64) -> Option<u64> {
        let base = layout::PAGE_TABLES.raw_value();
        let at = |table: u64, index: u64| {
            let word = usize::try_from((table - base) / 8 + index).unwrap();
            tables.get(word).copied().filter(|entry| entry & 1 == 1)
        };
        let table = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        let pml4 = at(base, address >> 39 & 511)?;
        let pdpt = at(table(pml4), address >> 30 & 511)?;
        let directory = at(table(pdpt), address >> 21 & 511)?;
        assert_eq!(directory & PAGE_LARGE, PAGE_LARGE);
        Some((directory & 0x000f_ffff_ffe0_0000) | (address & 0x1f_ffff))
    }

    #[test]
    fn page_tables_map_four_gib_one_to_one_and_nothing_else() {
        let tables = page_tables(layout::PAGE_TABLES);
        for address in [
            0,
            0x7123,
            0x10_0200,
            0x3fff_ffff,
            0x4000_0000,
            0xbfff_f000,
            0xffff_ffff,
        ] {
            assert_eq!(translate(&tables, address), Some(address));
        }
        assert_eq!(translate(&tables, 1 << 32), None);
    }

    #[test]
    fn boot_tables_do_not_overlap() {
        let end =
            layout::PAGE_TABLES.raw_value() + 8 * page_tables(layout::PAGE_TABLES).len() as u64;
        assert!(end <= layout::COMMAND_LINE.raw_value());
        assert!(layout::BOOT_PARAMS.raw_value() + PAGE_BYTES <= layout::PAGE_TABLES.raw_value());
        assert!(layout::GDT.raw_value() + 8 * GDT.len() as u64 <= layout::IDT.raw_value());
    }

    #[test]
    fn the_entry_is_in_long_mode_with_interrupts_off() {
        let (regs, sregs) = (
            entry_regs(GuestAddress(0x10_0200)),
            entry_sregs(&kvm_sregs::default()),
        );
        assert_eq!(
            (regs.rip, regs.rsi, regs.rflags & 0x200),
            (0x10_0200, 0x7000, 0)
        );
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!(sregs.efer & EFER_LONG_MODE_ACTIVE, EFER_LONG_MODE_ACTIVE);
    }
}
