//! Takes the ELF kernel out of a bzImage, so that QEMU need not have it decompressed in emulation. Layout: Documentation/arch/x86/boot.rst.

/// Largest kernel taken, in bytes.
const KERNEL_BYTES_MAX: usize = 256 << 20;
/// Blocks of the LZ4 legacy format hold up to 8 MiB each.
const BLOCK_BYTES_MAX: usize = 8 << 20;

/// Why a kernel image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No boot sector with a payload.
    #[error("kernel image is not a bzImage with a payload")]
    NotBzImage,
    /// Debian compresses with LZ4; this one is compressed otherwise.
    #[error("kernel payload is not LZ4")]
    NotLz4,
    /// The payload is damaged.
    #[error("kernel payload is damaged")]
    Damaged,
}

/// The ELF file in `image`.
pub fn extract(image: &[u8]) -> Result<Vec<u8>, KernelError> {
    let payload = payload(image).ok_or(KernelError::NotBzImage)?;
    let blocks = payload
        .strip_prefix(&[0x02, 0x21, 0x4c, 0x18])
        .ok_or(KernelError::NotLz4)?;
    decompress(blocks)
        .filter(|kernel| kernel.starts_with(b"\x7fELF"))
        .ok_or(KernelError::Damaged)
}

/// Compressed kernel, followed by its decompressed size (u32).
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = (setup_sectors + 1) * 512 + number(image, 0x248)?;
    image.get(start..start.checked_add(number(image, 0x24c)?)?)
}

fn decompress(blocks: &[u8]) -> Option<Vec<u8>> {
    let (mut rest, size) = blocks.split_at_checked(blocks.len().checked_sub(4)?)?;
    let size = number(size, 0).filter(|&size| size <= KERNEL_BYTES_MAX)?;
    let mut kernel = vec![0; size];
    let mut done = 0;
    while done < size {
        let count = number(rest, 0)?;
        let block = rest.get(4..count.checked_add(4)?)?;
        let room = &mut kernel[done..size.min(done + BLOCK_BYTES_MAX)];
        done += lz4_flex::block::decompress_into(block, room)
            .ok()
            .filter(|&written| written > 0)?;
        rest = &rest[4 + count..];
    }
    Some(kernel)
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> (Vec<u8>, Vec<u8>) {
        let kernel: Vec<u8> = b"\x7fELF"
            .iter()
            .copied()
            .chain((0..3_000_000_u32).flat_map(u32::to_le_bytes))
            .collect();
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        for block in kernel.chunks(BLOCK_BYTES_MAX) {
            let packed = lz4_flex::block::compress(block);
            payload.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            payload.extend(packed);
        }
        payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend(payload);
        (image, kernel)
    }

    #[test]
    fn kernel_of_several_blocks_comes_out() {
        let (image, kernel) = image();
        assert!(extract(&image).unwrap() == kernel);
    }

    #[test]
    fn truncated_and_foreign_images_are_refused() {
        let (image, _) = image();
        for cut in [0, 0x203, 0x24d, 1030, 1044, 2000, image.len() - 5] {
            assert!(extract(&image[..cut]).is_err(), "cut at {cut}");
        }
        let mut gzip = image;
        gzip[1040] = 0x1f;
        assert!(matches!(extract(&gzip), Err(KernelError::NotLz4)));
    }
}
