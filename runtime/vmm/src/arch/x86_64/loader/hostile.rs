//! Files that are kernels, nearly: they load or are refused, within what their length justifies.

use std::io::Write as _;

use linux_loader::bootparam::boot_params;
use thaw_fuzz::{Campaign, Dice, measured};
use vm_memory::{Address as _, Bytes as _, GuestAddress};

use super::{LoadError, PROGRAM_HEADERS_MAX, layout, load};
use crate::memory::GuestMemoryMmap;

const MEMORY_BYTES: u64 = 4 << 20;

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    file.resize(file.len().max(at + bytes.len()), 0);
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An ELF file (elf(5)) of a few segments.
fn elf(dice: &mut Dice) -> Vec<u8> {
    let parts = *dice.pick(&[
        0u16,
        1,
        1,
        2,
        5,
        PROGRAM_HEADERS_MAX,
        PROGRAM_HEADERS_MAX + 1,
        u16::MAX,
    ]);
    let mut file = Vec::new();
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(
        &mut file,
        24,
        &(0x10_0000 + dice.range(0, 0x1000)).to_le_bytes(),
    );
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &parts.to_le_bytes());
    for part in 0..usize::from(parts.min(PROGRAM_HEADERS_MAX + 1)) {
        let at = 64 + 56 * part;
        let length = dice.range(0, 4000);
        put(
            &mut file,
            at,
            &(*dice.pick(&[1u32, 1, 1, 4, 7])).to_le_bytes(),
        );
        put(&mut file, at + 8, &dice.range(0, 200).to_le_bytes());
        put(
            &mut file,
            at + 24,
            &(0x10_0000 + 0x1000 * dice.range(0, 700)).to_le_bytes(),
        );
        put(&mut file, at + 32, &length.to_le_bytes());
        put(
            &mut file,
            at + 40,
            &(length + dice.range(0, 9000)).to_le_bytes(),
        );
    }
    let content = dice.bytes(5000);
    file.extend(content);
    file
}

/// A bzImage (Documentation/arch/x86/boot.rst).
fn bzimage(dice: &mut Dice) -> Vec<u8> {
    let sectors = dice.range(0, 8) as u8;
    let mut file = vec![0; 512 * (usize::from(sectors).max(4) + 1)];
    put(&mut file, 0x1f1, &[sectors]);
    put(&mut file, 0x202, b"HdrS\x0f\x02");
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x214, &0x10_0000u32.to_le_bytes());
    put(
        &mut file,
        0x236,
        &(*dice.pick(&[0u16, 1, 1, 1])).to_le_bytes(),
    );
    put(&mut file, 0x258, &0x10_0000u64.to_le_bytes());
    put(
        &mut file,
        0x260,
        &(dice.range(0, 3 << 20) as u32).to_le_bytes(),
    );
    let length = dice.index(9000);
    file.extend(dice.bytes(length));
    file
}

fn play(dice: &mut Dice) {
    let mut kernel = match dice.in_thousand(500) {
        true => elf(dice),
        false => bzimage(dice),
    };
    while dice.in_thousand(400) {
        dice.spoil(&mut kernel);
    }
    let open = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    };
    let initramfs_bytes = *dice.pick(&[0, 1, 5000, 1 << 20, 4 << 20]);
    let initramfs = dice
        .in_thousand(700)
        .then(|| open(&vec![7; initramfs_bytes]));
    let memory = [(GuestAddress(0), MEMORY_BYTES as usize)];
    let memory = GuestMemoryMmap::from_ranges(&memory).unwrap();
    let file = open(&kernel);
    let (loaded, grown) = measured(|| {
        load(
            &memory,
            MEMORY_BYTES,
            &file,
            initramfs.as_ref(),
            "console=ttyS0",
            layout::ACPI,
        )
    });
    let most = kernel.len().max(initramfs_bytes) + 64 * 1024;
    assert!(
        grown.peak <= most as i64,
        "{} bytes for a file of {}",
        grown.peak,
        kernel.len()
    );
    match loaded {
        Ok(entry) => {
            assert!(entry >= layout::KERNEL_MIN);
            let params: boot_params = memory.read_obj(layout::BOOT_PARAMS).unwrap();
            let (start, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
            assert!(u64::from(start) + u64::from(size) <= MEMORY_BYTES);
            if initramfs.is_some() {
                assert_eq!(size as usize, initramfs_bytes);
                let mut found = vec![0; initramfs_bytes];
                memory
                    .read_slice(&mut found, GuestAddress(start.into()))
                    .unwrap();
                assert!(
                    found.iter().all(|&byte| byte == 7),
                    "the initramfs is whole"
                );
            }
            dice.saw(if kernel.starts_with(b"\x7fELF") {
                "elf"
            } else {
                "bzimage"
            });
        }
        Err(LoadError::Memory(error)) => panic!("what fits is written: {error}"),
        Err(error) => {
            let text = format!("{error:?}");
            let kind = text.split(|mark: char| !mark.is_alphanumeric()).next();
            dice.saw(kind.unwrap_or_default());
        }
    }
}

#[test]
fn no_file_is_taken_for_a_kernel_beyond_memory_or_at_a_price_beyond_its_length() {
    let name = "no_file_is_taken_for_a_kernel_beyond_memory_or_at_a_price_beyond_its_length";
    Campaign::new(env!("CARGO_PKG_NAME"), name, 1500)
        .must_see(&[
            "elf",
            "bzimage",
            "Kernel",
            "TooManyParts",
            "Not64Bit",
            "MemoryTooSmall",
        ])
        .play(play);
    assert!(layout::KERNEL_MIN.raw_value() < MEMORY_BYTES);
}
