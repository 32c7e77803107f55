//! Kernel, initramfs and boot parameters into guest memory (Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{self, Cursor};
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::fault::{Blame, Fault};
use crate::memory::GuestMemoryMmap;

/// Largest kernel file, bytes.
pub const KERNEL_BYTES_MAX: u64 = 512 << 20;
/// Largest initramfs file, bytes.
pub const INITRAMFS_BYTES_MAX: u64 = 1 << 30;

/// Most program headers of an ELF kernel; Linux has five. Each may name all of the file, to be copied once more.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// Where their number stands (`e_phnum`, elf(5)).
const PROGRAM_HEADERS_OFFSET: usize = 56;
/// `type_of_loader`: one without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol version told for a kernel without a header of its own (ELF): 2.15.
const PROTOCOL_VERSION: u16 = 0x020f;
/// `XLF_KERNEL_64`: there is a 64-bit entry, 0x200 bytes after the load address.
const XLOADFLAG_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// Initramfs lies below this address, the default `initrd_addr_max` of the protocol.
const INITRAMFS_END_MAX: u64 = 0x8000_0000;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
const PAGE_BYTES: u64 = 4096;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Why a kernel could not be put into guest memory.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A file is too large.
    #[error("{name} of {bytes} bytes is over the limit of {limit}")]
    TooLarge {
        /// `kernel` or `initramfs`.
        name: &'static str,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A file could not be read.
    #[error("{name} could not be read")]
    Read {
        /// `kernel` or `initramfs`.
        name: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The kernel is neither an ELF vmlinux nor a bzImage, or is a damaged one.
    #[error("kernel is no bootable bzImage or ELF vmlinux")]
    Kernel(#[source] linux_loader::loader::Error),
    /// An ELF kernel of more parts than any has.
    #[error("kernel has {0} program headers, limit is {PROGRAM_HEADERS_MAX}")]
    TooManyParts(u16),
    /// The kernel is 32-bit.
    #[error("kernel has no 64-bit entry")]
    Not64Bit,
    /// Kernel and initramfs do not fit.
    #[error(
        "guest memory of {memory_bytes} bytes is too small: kernel until {kernel_end:#x}, initramfs of {initramfs_bytes} bytes"
    )]
    MemoryTooSmall {
        /// Guest memory below the device hole.
        memory_bytes: u64,
        /// First address after what the kernel needs to start.
        kernel_end: u64,
        /// Length of the initramfs.
        initramfs_bytes: u64,
    },
    /// The command line is over its limit or not printable ASCII.
    #[error(
        "kernel command line of {bytes} bytes is over the limit of {} or not printable ascii",
        layout::COMMAND_LINE_BYTES_MAX
    )]
    CommandLine {
        /// Its length.
        bytes: usize,
    },
    /// Guest memory is not where the layout says.
    #[error("guest memory could not be written")]
    Memory(#[source] GuestMemoryError),
}

impl Blame for LoadError {
    fn fault(&self) -> Fault {
        match self {
            Self::Memory(_) => Fault::Host,
            Self::Read { .. } => Fault::Host,
            _ => Fault::Caller,
        }
    }
}

/// What the boot parameters are made of.
struct Placed {
    entry: GuestAddress,
    end: u64,
    header: setup_header,
}

/// The whole file. Read by position: the descriptor's offset may be shared with other monitors.
fn read_file(file: &File, name: &'static str, limit: u64) -> Result<Vec<u8>, LoadError> {
    let read = |source| LoadError::Read { name, source };
    let bytes = file.metadata().map_err(read)?.len();
    let length = match usize::try_from(bytes) {
        Ok(length) if bytes <= limit => length,
        _ => return Err(LoadError::TooLarge { name, bytes, limit }),
    };
    let mut content = vec![0; length];
    file.read_exact_at(&mut content, 0).map_err(read)?;
    Ok(content)
}

fn load_elf(memory: &GuestMemoryMmap, kernel: &[u8]) -> Result<Placed, LoadError> {
    let parts = kernel
        .get(PROGRAM_HEADERS_OFFSET..)
        .and_then(|rest| rest.first_chunk());
    let parts = parts.map_or(0, |parts| u16::from_le_bytes(*parts));
    if parts > PROGRAM_HEADERS_MAX {
        return Err(LoadError::TooManyParts(parts));
    }
    let loaded = Elf::load(
        memory,
        None,
        &mut Cursor::new(kernel),
        Some(layout::KERNEL_MIN),
    )
    .map_err(LoadError::Kernel)?;
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_VERSION,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    };
    Ok(Placed {
        entry: loaded.kernel_load,
        end: loaded.kernel_end,
        header,
    })
}

fn load_bzimage(memory: &GuestMemoryMmap, kernel: &[u8]) -> Result<Placed, LoadError> {
    let loaded: KernelLoaderResult = BzImage::load(
        memory,
        None,
        &mut Cursor::new(kernel),
        Some(layout::KERNEL_MIN),
    )
    .map_err(LoadError::Kernel)?;
    let header = loaded.setup_header.unwrap_or_default();
    if header.xloadflags & XLOADFLAG_KERNEL_64 == 0 {
        return Err(LoadError::Not64Bit);
    }
    // The kernel unpacks itself to its preferred address and needs init_size bytes there before it reads the E820 map.
    let unpacked = header
        .pref_address
        .saturating_add(u64::from(header.init_size));
    let entry = GuestAddress(
        loaded
            .kernel_load
            .raw_value()
            .saturating_add(ENTRY_64_OFFSET),
    );
    Ok(Placed {
        entry,
        end: loaded.kernel_end.max(unpacked),
        header,
    })
}

/// Loads kernel and initramfs and writes command line and boot parameters. Returns the kernel's 64-bit entry.
///
/// # Errors
/// A file that cannot be read, is too large or no kernel; memory too small; a bad command line.
pub fn load(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    kernel: &File,
    initramfs: Option<&File>,
    command_line: &str,
    acpi: GuestAddress,
) -> Result<GuestAddress, LoadError> {
    let printable = command_line
        .bytes()
        .all(|byte| (b' '..=b'~').contains(&byte));
    if command_line.len() > layout::COMMAND_LINE_BYTES_MAX || !printable {
        return Err(LoadError::CommandLine {
            bytes: command_line.len(),
        });
    }
    let mut text = command_line.as_bytes().to_vec();
    text.push(0);
    memory
        .write_slice(&text, layout::COMMAND_LINE)
        .map_err(LoadError::Memory)?;

    let kernel = read_file(kernel, "kernel", KERNEL_BYTES_MAX)?;
    let placed = if kernel.starts_with(ELF_MAGIC) {
        load_elf(memory, &kernel)?
    } else {
        load_bzimage(memory, &kernel)?
    };
    drop(kernel);
    let low_bytes = memory_bytes.min(layout::DEVICE_HOLE);
    let too_small = |initramfs_bytes| LoadError::MemoryTooSmall {
        memory_bytes: low_bytes,
        kernel_end: placed.end,
        initramfs_bytes,
    };
    if placed.end > low_bytes {
        return Err(too_small(0));
    }

    let mut params = boot_params {
        hdr: placed.header,
        ..Default::default()
    };
    if let Some(file) = initramfs {
        let content = read_file(file, "initramfs", INITRAMFS_BYTES_MAX)?;
        let bytes = content.len() as u64;
        let start = low_bytes
            .min(INITRAMFS_END_MAX)
            .checked_sub(bytes)
            .map(|start| start & !(PAGE_BYTES - 1));
        let start = start
            .filter(|start| *start >= placed.end.max(layout::KERNEL_MIN.raw_value()))
            .ok_or_else(|| too_small(bytes))?;
        memory
            .write_slice(&content, GuestAddress(start))
            .map_err(LoadError::Memory)?;
        // Both fit: below 2 GiB by the limits above.
        params.hdr.ramdisk_image = u32::try_from(start).map_err(|_| too_small(bytes))?;
        params.hdr.ramdisk_size = u32::try_from(bytes).map_err(|_| too_small(bytes))?;
    }
    complete(&mut params, memory_bytes, command_line.len(), acpi);
    memory
        .write_obj(params, layout::BOOT_PARAMS)
        .map_err(LoadError::Memory)?;
    Ok(placed.entry)
}

/// Fills in what does not depend on the kernel.
fn complete(
    params: &mut boot_params,
    memory_bytes: u64,
    command_line_bytes: usize,
    acpi: GuestAddress,
) {
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr =
        u32::try_from(layout::COMMAND_LINE.raw_value()).expect("our layout is below 4 GiB");
    params.hdr.cmdline_size = u32::try_from(command_line_bytes).expect("checked against the limit");
    params.acpi_rsdp_addr = acpi.raw_value();
    let map = e820(memory_bytes);
    params.e820_entries = u8::try_from(map.len()).expect("a handful of entries");
    for (slot, (addr, size, kind)) in map.into_iter().enumerate() {
        params.e820_table[slot] = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
    }
}

/// The memory map as (start, length, type): conventional memory, the firmware's area, and what lies above 1 MiB.
fn e820(memory_bytes: u64) -> Vec<(u64, u64, u32)> {
    let first_mib = layout::KERNEL_MIN.raw_value();
    let mut map = vec![
        (0, layout::CONVENTIONAL_END, E820_RAM),
        (
            layout::CONVENTIONAL_END,
            first_mib - layout::CONVENTIONAL_END,
            E820_RESERVED,
        ),
    ];
    for range in layout::memory_ranges(memory_bytes) {
        let start = range.start.raw_value().max(first_mib);
        map.push((
            start,
            range.start.raw_value() + range.length - start,
            E820_RAM,
        ));
    }
    map
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "tests cut their own small numbers"
)]
mod hostile;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn memory(bytes: usize) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// An ELF file of one segment at 1 MiB whose memory is larger than its content.
    fn small_elf(memory_bytes: u64) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
        elf[32..40].copy_from_slice(&64u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1u16.to_le_bytes());
        elf[64..68].copy_from_slice(&1u32.to_le_bytes());
        elf[72..80].copy_from_slice(&120u64.to_le_bytes());
        elf[88..96].copy_from_slice(&0x10_0000u64.to_le_bytes());
        elf[96..104].copy_from_slice(&4u64.to_le_bytes());
        elf[104..112].copy_from_slice(&memory_bytes.to_le_bytes());
        elf.extend_from_slice(b"\xf4\xf4\xf4\xf4");
        elf
    }

    #[test]
    fn elf_kernel_initramfs_and_parameters_land_where_the_protocol_wants_them() {
        let memory = memory(64 << 20);
        let (kernel, initramfs) = (file(&small_elf(0x2000)), file(&[7; 5000]));
        let entry = load(
            &memory,
            64 << 20,
            &kernel,
            Some(&initramfs),
            "console=ttyS0",
            layout::ACPI,
        )
        .unwrap();
        assert_eq!(entry, GuestAddress(0x10_0000));
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(0x10_0003)).unwrap(),
            0xf4
        );
        let params: boot_params = memory.read_obj(layout::BOOT_PARAMS).unwrap();
        let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((image % 4096, size), (0, 5000));
        assert_eq!(
            memory
                .read_obj::<u8>(GuestAddress(u64::from(image) + 4999))
                .unwrap(),
            7
        );
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI.raw_value());
        let mut text = [0; 14];
        memory.read_slice(&mut text, layout::COMMAND_LINE).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        for content in [&b""[..], b"\x7fELF", &[0; 4096]] {
            let error = load(
                &memory(64 << 20),
                64 << 20,
                &file(content),
                None,
                "",
                layout::ACPI,
            )
            .unwrap_err();
            assert!(matches!(error, LoadError::Kernel(_)), "{error}");
        }
    }

    #[test]
    fn an_initramfs_over_the_kernel_is_refused() {
        let (kernel, initramfs) = (file(&small_elf(62 << 20)), file(&vec![0; 2 << 20]));
        let error = load(
            &memory(64 << 20),
            64 << 20,
            &kernel,
            Some(&initramfs),
            "",
            layout::ACPI,
        )
        .unwrap_err();
        assert!(matches!(error, LoadError::MemoryTooSmall { .. }));
    }

    #[test]
    fn a_command_line_with_a_newline_or_too_long_is_refused() {
        for text in ["a\nb".to_owned(), "x".repeat(2048)] {
            let error = load(
                &memory(64 << 20),
                64 << 20,
                &file(b""),
                None,
                &text,
                layout::ACPI,
            )
            .unwrap_err();
            assert!(matches!(error, LoadError::CommandLine { .. }));
        }
    }

    #[test]
    fn the_memory_map_covers_all_memory_but_the_firmware_area() {
        let total: u64 = (3 << 30) + (512 << 20);
        let map = e820(total);
        assert_eq!(map.iter().map(|entry| entry.1).sum::<u64>(), total);
        assert!(
            map.windows(2)
                .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
        );
        assert_eq!(map.last(), Some(&(1 << 32, 512 << 20, E820_RAM)));
    }
}
