//! Reads and writes between a file and guest memory without a copy in between.
//!
//! The only unsafe code of the devices. The kernel, not we, touches the guest's bytes, so that no reference
//! into memory that the guest changes is ever formed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap as _;

use crate::memory::GuestSlice;

/// Fills `slice` from `offset` of `file`. Guest memory must not be written to by anybody's references.
///
/// # Errors
/// The file ends early or the host failed; part of the slice may be filled.
pub(super) fn read_exact_at(
    file: &File,
    mut slice: GuestSlice<'_>,
    mut offset: u64,
) -> io::Result<()> {
    // The kernel writes past vm-memory's own bookkeeping, and a call that fails may have written too.
    slice.bitmap().mark_dirty(0, slice.len());
    while !slice.is_empty() {
        let position = position(offset)?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: a `VolatileSlice` covers `len` bytes of a mapping that lives as long as the slice and that
        // all parties access as raw memory only; pread writes at most `len` bytes there.
        let count = unsafe {
            libc::pread(
                file.as_raw_fd(),
                guard.as_ptr().cast(),
                guard.len(),
                position,
            )
        };
        let count = transferred(count, io::ErrorKind::UnexpectedEof)?;
        slice = slice.offset(count).map_err(io::Error::other)?;
        offset += count as u64;
    }
    Ok(())
}

/// Writes all of `slice` to `file` at `offset`.
///
/// # Errors
/// The host failed (`StorageFull` included); part of the slice may be written.
pub(super) fn write_all_at(
    file: &File,
    mut slice: GuestSlice<'_>,
    mut offset: u64,
) -> io::Result<()> {
    while !slice.is_empty() {
        let position = position(offset)?;
        let guard = slice.ptr_guard();
        // SAFETY: as in `read_exact_at`; pwrite only reads the memory.
        let count = unsafe {
            libc::pwrite(
                file.as_raw_fd(),
                guard.as_ptr().cast(),
                guard.len(),
                position,
            )
        };
        let count = transferred(count, io::ErrorKind::WriteZero)?;
        slice = slice.offset(count).map_err(io::Error::other)?;
        offset += count as u64;
    }
    Ok(())
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Bytes moved; 0 for an interrupted call, an error for the end of the file.
fn transferred(count: libc::ssize_t, at_end: io::ErrorKind) -> io::Result<usize> {
    match usize::try_from(count) {
        Ok(0) => Err(at_end.into()),
        Ok(count) => Ok(count),
        Err(_) => {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                Ok(0)
            } else {
                Err(error)
            }
        }
    }
}
