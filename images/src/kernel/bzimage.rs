//! Takes the ELF `vmlinux` out of a bzImage.
//!
//! The layout is that of the kernel's Documentation/arch/x86/boot.rst ("The Real-Mode Kernel
//! Header") and lib/decompress_unlz4.c (the LZ4 legacy frame).

/// The ELF image is at most this long; Debian's is 53 MiB.
pub const VMLINUX_BYTES_MAX: usize = 512 << 20;

const SETUP_SECTS_AT: usize = 0x1f1;
const BOOT_FLAG_AT: usize = 0x1fe;
const HEADER_AT: usize = 0x202;
const VERSION_AT: usize = 0x206;
const PAYLOAD_OFFSET_AT: usize = 0x248;
const PAYLOAD_LENGTH_AT: usize = 0x24c;

/// `payload_offset` exists from boot protocol 2.08 on.
const VERSION_MIN: u16 = 0x0208;
const SECTOR_BYTES: usize = 512;
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// LZ4_DEFAULT_UNCOMPRESSED_CHUNK_SIZE of lib/decompress_unlz4.c.
const LZ4_CHUNK_BYTES: usize = 8 << 20;

/// A file is not a bzImage whose kernel can be taken out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BzImageError {
    /// The setup header is missing or cut short.
    #[error("no Linux setup header")]
    NoHeader,
    /// The boot protocol does not say where the payload is.
    #[error("boot protocol {major}.{minor:02} is older than 2.08")]
    TooOld {
        /// The high byte of the version field.
        major: u16,
        /// The low byte of the version field.
        minor: u16,
    },
    /// The payload's place lies outside the file.
    #[error("the payload lies outside the file")]
    Payload,
    /// A compression other than LZ4.
    #[error("unsupported compression: {name}")]
    Compression {
        /// Its name, or the payload's first bytes.
        name: String,
    },
    /// The compressed data are damaged.
    #[error("the compressed kernel is damaged at payload byte {at}")]
    Damaged {
        /// Where in the payload.
        at: usize,
    },
    /// The kernel is longer than [`VMLINUX_BYTES_MAX`].
    #[error("the kernel is longer than {VMLINUX_BYTES_MAX} bytes")]
    TooLong,
    /// The payload is no ELF file.
    #[error("the payload is no ELF file")]
    NotElf,
}

/// The ELF kernel within `image`, the bytes of a bzImage.
///
/// # Errors
/// When `image` is no bzImage of protocol 2.08 or later, is not compressed with LZ4, or is damaged.
pub fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let payload = payload(image)?;
    if !payload.starts_with(&LZ4_LEGACY_MAGIC) {
        return Err(BzImageError::Compression {
            name: compression_name(payload),
        });
    }
    let kernel = decompress_lz4_legacy(payload)?;
    if !kernel.starts_with(b"\x7fELF") {
        return Err(BzImageError::NotElf);
    }
    Ok(kernel)
}

fn payload(image: &[u8]) -> Result<&[u8], BzImageError> {
    let boot_flag = u16_at(image, BOOT_FLAG_AT).ok_or(BzImageError::NoHeader)?;
    if boot_flag != 0xaa55 || image.get(HEADER_AT..HEADER_AT + 4) != Some(b"HdrS") {
        return Err(BzImageError::NoHeader);
    }
    let version = u16_at(image, VERSION_AT).ok_or(BzImageError::NoHeader)?;
    if version < VERSION_MIN {
        return Err(BzImageError::TooOld {
            major: version >> 8,
            minor: version & 0xff,
        });
    }
    let setup_sects = match image.get(SETUP_SECTS_AT) {
        None => return Err(BzImageError::NoHeader),
        // "If this field contains 0, the real value is 4."
        Some(0) => 4,
        Some(&sects) => usize::from(sects),
    };
    let offset = u32_at(image, PAYLOAD_OFFSET_AT).ok_or(BzImageError::NoHeader)?;
    let length = u32_at(image, PAYLOAD_LENGTH_AT).ok_or(BzImageError::NoHeader)?;
    // The offset counts from the protected-mode code, which follows boot sector and setup.
    let start = offset
        .checked_add((setup_sects + 1) * SECTOR_BYTES)
        .ok_or(BzImageError::Payload)?;
    let end = start.checked_add(length).ok_or(BzImageError::Payload)?;
    image.get(start..end).ok_or(BzImageError::Payload)
}

fn decompress_lz4_legacy(payload: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let mut kernel = Vec::new();
    let mut at = LZ4_LEGACY_MAGIC.len();
    // The kernel's build appends the decompressed length; it ends the last chunk.
    let length_at = payload.len().saturating_sub(4);
    while at < length_at {
        let chunk_length = u32_at(payload, at).ok_or(BzImageError::Damaged { at })?;
        let start = at + 4;
        let chunk = start
            .checked_add(chunk_length)
            .filter(|&end| end <= length_at)
            .and_then(|end| payload.get(start..end))
            .ok_or(BzImageError::Damaged { at })?;
        let filled = kernel.len();
        if filled + LZ4_CHUNK_BYTES > VMLINUX_BYTES_MAX {
            return Err(BzImageError::TooLong);
        }
        kernel.resize(filled + LZ4_CHUNK_BYTES, 0);
        let written = lz4_flex::block::decompress_into(chunk, &mut kernel[filled..])
            .map_err(|_| BzImageError::Damaged { at: start })?;
        kernel.truncate(filled + written);
        at = start + chunk_length;
    }
    if u32_at(payload, length_at) != Some(kernel.len()) {
        return Err(BzImageError::Damaged { at: length_at });
    }
    Ok(kernel)
}

/// Magic numbers of scripts/extract-vmlinux.
fn compression_name(payload: &[u8]) -> String {
    let known: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh", "bzip2"),
        (b"\x5d\0\0\0", "lzma"),
        (b"\x89LZO", "lzo"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ];
    match known.iter().find(|(magic, _)| payload.starts_with(magic)) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("{:02x?}", &payload[..payload.len().min(4)]),
    }
}

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<usize> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0_u8; 5 * SECTOR_BYTES];
        image[BOOT_FLAG_AT..BOOT_FLAG_AT + 2].copy_from_slice(&[0x55, 0xaa]);
        image[HEADER_AT..HEADER_AT + 4].copy_from_slice(b"HdrS");
        image[VERSION_AT..VERSION_AT + 2].copy_from_slice(&0x020f_u16.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH_AT..PAYLOAD_LENGTH_AT + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn lz4(kernel: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY_MAGIC.to_vec();
        for chunk in kernel.chunks(LZ4_CHUNK_BYTES) {
            let packed = lz4_flex::block::compress(chunk);
            payload.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            payload.extend(packed);
        }
        payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
        payload
    }

    #[test]
    fn a_kernel_of_several_chunks_comes_out_whole() {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.resize(LZ4_CHUNK_BYTES + 12345, 7);
        assert_eq!(extract_vmlinux(&image(&lz4(&kernel))), Ok(kernel));
    }

    #[test]
    fn another_compression_is_named() {
        let error = extract_vmlinux(&image(b"\xfd7zXZ\0....")).unwrap_err();
        assert_eq!(error.to_string(), "unsupported compression: xz");
    }

    #[test]
    fn a_truncated_image_is_refused_at_every_length() {
        let whole = image(&lz4(b"\x7fELF and more"));
        for length in 0..whole.len() {
            assert!(extract_vmlinux(&whole[..length]).is_err(), "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_damage_panics(at in 0_usize..2700, byte: u8) {
            let mut damaged = image(&lz4(b"\x7fELF and more and more and more and more"));
            let length = damaged.len();
            damaged[at % length] = byte;
            let _ = extract_vmlinux(&damaged);
        }
    }
}
