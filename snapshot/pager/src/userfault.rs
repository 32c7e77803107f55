//! The userfaultfd and its calls: the one module here that is unsafe.
//!
//! Layouts and numbers: `include/uapi/linux/userfaultfd.h`; behaviour: Documentation/admin-guide/mm/userfaultfd.rst. rustix has
//! the call itself and the frame of an ioctl; the crate that wraps the rest needs libclang to build, for these few structures.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};
use thiserror::Error;

pub(crate) const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == thaw_snapshot::PAGE_BYTES);

const API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const REGISTER_MISSING: u64 = 1;
const REGISTER_WP: u64 = 1 << 1;
const COPY_MODE_WP: u64 = 1 << 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const FAULT_WRITE: u64 = 1;
const FAULT_WP: u64 = 1 << 1;
const MESSAGE_BYTES: usize = 32;
/// Faults read at once.
const MESSAGES: usize = 64;

/// `_IOR(0xaa, number, struct uffdio_range)`.
const fn range_call(number: u8) -> Opcode {
    opcode::read::<Range>(0xaa, number)
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zeropage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
struct Writeprotect {
    range: Range,
    mode: u64,
}

/// Why there is no userfaultfd.
#[derive(Debug, Error)]
pub enum UserfaultError {
    /// Not for this user.
    #[error(
        "userfaultfd for faults of the kernel is not permitted: run as root, set /proc/sys/vm/unprivileged_userfaultfd to 1, or give this user /dev/userfaultfd"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel has none, or none that serves missing pages.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD)")]
    Unsupported(#[source] io::Error),
    /// Anything else.
    #[error("userfaultfd could not be made")]
    Other(#[source] io::Error),
}

/// A userfaultfd of this process that has shaken hands with the kernel. It sees faults of the kernel too (a KVM guest's are such),
/// which is why one for user mode only would not do.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    tells_writes: bool,
}

impl Userfault {
    /// Makes one, by the system call or else by /dev/userfaultfd. A process that gives up its privileges does this before.
    ///
    /// # Errors
    /// See [`UserfaultError`].
    pub fn open() -> Result<Self, UserfaultError> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: the descriptor alone does nothing; what is registered with it is the business of `Region::register`.
        let fd = match unsafe { rustix::mm::userfaultfd(flags) } {
            Ok(fd) => fd,
            Err(error @ (Errno::PERM | Errno::ACCESS)) => {
                by_device(flags).map_err(|_| UserfaultError::NotPermitted(error.into()))?
            }
            Err(error @ Errno::NOSYS) => return Err(UserfaultError::Unsupported(error.into())),
            Err(error) => return Err(UserfaultError::Other(error.into())),
        };
        // A handshake that is refused leaves the descriptor as it was.
        for features in [FEATURE_PAGEFAULT_FLAG_WP, 0] {
            let mut api = Api {
                api: API,
                features,
                ioctls: 0,
            };
            match call::<{ opcode::read_write::<Api>(0xaa, 0x3f) }, _>(fd.as_fd(), &mut api) {
                Ok(()) => {
                    return Ok(Self {
                        fd,
                        tells_writes: features != 0,
                    });
                }
                Err(Errno::INVAL) => {}
                Err(error) => return Err(UserfaultError::Other(error.into())),
            }
        }
        Err(UserfaultError::Unsupported(Errno::INVAL.into()))
    }
}

fn by_device(flags: UserfaultfdFlags) -> rustix::io::Result<OwnedFd> {
    let device = rustix::fs::open(
        "/dev/userfaultfd",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    new_by_device(device.as_fd(), flags)
}

/// `USERFAULTFD_IOC_NEW`: its argument is the flags, its result a descriptor.
struct New(UserfaultfdFlags);

// SAFETY: the opcode is `_IO(0xaa, 0)`, which takes the flags in place of a pointer and returns a new descriptor or an error.
unsafe impl rustix::ioctl::Ioctl for New {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xaa, 0)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        ptr::without_provenance_mut(self.0.bits() as usize)
    }

    unsafe fn output_from_ptr(
        result: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<OwnedFd> {
        use std::os::fd::FromRawFd as _;
        // SAFETY: the call succeeded, so that this is a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(result) })
    }
}

fn new_by_device(device: BorrowedFd<'_>, flags: UserfaultfdFlags) -> rustix::io::Result<OwnedFd> {
    // SAFETY: `New` is the call that this device has under this number.
    unsafe { rustix::ioctl::ioctl(device, New(flags)) }
}

fn call<const OPCODE: Opcode, T>(fd: BorrowedFd<'_>, value: &mut T) -> rustix::io::Result<()> {
    // SAFETY: every use below pairs the opcode with the structure that userfaultfd.h gives it, laid out by `repr(C)`. What a
    // call does to memory is limited to ranges that were registered: see `Region`.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<OPCODE, T>::new(value)) }
}

/// A fault, told in bytes from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) offset: u64,
    pub(crate) kind: FaultKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// A page that is not there was read.
    MissingRead,
    /// A page that is not there was written.
    MissingWrite,
    /// A page that was brought in for reading was written.
    Protected,
}

/// Whether a page that is brought in may be written at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Writable,
    /// The first write is a [`FaultKind::Protected`].
    Watched,
}

/// A range of memory registered with a userfaultfd.
///
/// Invariant: `start..start + bytes` is one private anonymous mapping of this process that nobody else unmaps or replaces until
/// [`Region::revoke`] was called; whoever called [`Region::register`] has promised it. Pages are put only where the kernel still
/// knows the range as registered, so a thread that is late does nothing, whatever lies there by then.
#[derive(Debug)]
pub(crate) struct Region {
    /// Closed only after the range was revoked: until then, closing it would turn what is missing into zeros.
    userfault: ManuallyDrop<Userfault>,
    start: usize,
    bytes: u64,
    is_revoked: AtomicBool,
}

impl Region {
    /// From now on, a touch of a page that is not there waits for [`Region::put`]. Pages that are there already stay.
    ///
    /// # Safety
    /// The type's invariant.
    pub(crate) unsafe fn register(
        userfault: Userfault,
        start: *mut u8,
        bytes: u64,
    ) -> io::Result<Self> {
        let region = Self {
            start: start.expose_provenance(),
            bytes,
            userfault: ManuallyDrop::new(userfault),
            is_revoked: AtomicBool::new(false),
        };
        let mode = if region.tells_writes() {
            REGISTER_MISSING | REGISTER_WP
        } else {
            REGISTER_MISSING
        };
        let mut register = Register {
            range: region.range(0, bytes),
            mode,
            ioctls: 0,
        };
        let result = call::<{ opcode::read_write::<Register>(0xaa, 0) }, _>(
            region.userfault.fd.as_fd(),
            &mut register,
        );
        match result {
            Ok(()) => Ok(region),
            Err(error) => {
                // Nothing was registered: nothing becomes zeros.
                region.is_revoked.store(true, Ordering::Relaxed);
                Err(error.into())
            }
        }
    }

    /// Whether the first write to a watched page is told.
    pub(crate) fn tells_writes(&self) -> bool {
        self.userfault.tells_writes
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.userfault.fd.as_fd()
    }

    fn range(&self, offset: u64, length: u64) -> Range {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.bytes),
            "a range of the region"
        );
        Range {
            start: self.start as u64 + offset,
            length,
        }
    }

    /// Waiting faults; empty if there are none.
    pub(crate) fn faults(&self) -> io::Result<Vec<Fault>> {
        let mut buffer = [0; MESSAGE_BYTES * MESSAGES];
        let length = match rustix::io::read(self.fd(), &mut buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let mut faults = Vec::new();
        for message in buffer[..length].as_chunks::<MESSAGE_BYTES>().0 {
            let word = |at: usize| {
                message[at..]
                    .first_chunk()
                    .map_or(0, |word| u64::from_ne_bytes(*word))
            };
            // No other event was asked for.
            if message[0] != EVENT_PAGEFAULT {
                continue;
            }
            let (flags, address) = (word(8), word(16));
            let kind = if flags & FAULT_WP != 0 {
                FaultKind::Protected
            } else if flags & FAULT_WRITE != 0 {
                FaultKind::MissingWrite
            } else {
                FaultKind::MissingRead
            };
            let offset = address.checked_sub(self.start as u64);
            if let Some(offset) = offset.filter(|offset| *offset < self.bytes) {
                let offset = offset - offset % PAGE_BYTES as u64;
                faults.push(Fault { offset, kind });
            }
        }
        Ok(faults)
    }

    /// Puts `content` (whole pages) at `offset` where nothing is yet, and wakes whoever waits there.
    pub(crate) fn put(
        &self,
        offset: u64,
        content: &[u8],
        protection: Protection,
    ) -> io::Result<()> {
        let mode = match protection {
            Protection::Watched if self.tells_writes() => COPY_MODE_WP,
            _ => 0,
        };
        self.fill(offset, content.len() as u64, |at, range| {
            let done = usize::try_from(at - offset).map_err(io::Error::other)?;
            let mut copy = Copy {
                to: range.start,
                from: content[done..].as_ptr().addr() as u64,
                length: range.length,
                mode,
                copied: 0,
            };
            let code = call::<{ opcode::read_write::<Copy>(0xaa, 3) }, _>(self.fd(), &mut copy);
            Ok((code, copy.copied))
        })
    }

    /// The same with zeros, which cost no memory until they are written.
    pub(crate) fn put_zeros(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.fill(offset, bytes, |_, range| {
            let mut zero = Zeropage {
                range,
                mode: 0,
                zeroed: 0,
            };
            let code = call::<{ opcode::read_write::<Zeropage>(0xaa, 4) }, _>(self.fd(), &mut zero);
            Ok((code, zero.zeroed))
        })
    }

    /// Repeats a call that fills a part until all is filled, passing over pages that are there.
    fn fill(
        &self,
        offset: u64,
        bytes: u64,
        mut part: impl FnMut(u64, Range) -> io::Result<(rustix::io::Result<()>, i64)>,
    ) -> io::Result<()> {
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let (result, done) = part(at, self.range(at, end - at))?;
            match result {
                Ok(()) => return Ok(()),
                // A part was done, or the mappings just change.
                Err(Errno::AGAIN) => at += u64::try_from(done).unwrap_or(0),
                Err(Errno::EXIST) => {
                    self.wake(at, PAGE_BYTES as u64)?;
                    at += PAGE_BYTES as u64;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether the page at `offset` is in memory now; one that is swapped out is told as absent (mincore(2)).
    pub(crate) fn is_resident(&self, offset: u64) -> bool {
        let page = self.range(offset, PAGE_BYTES as u64);
        let start = usize::try_from(page.start).expect("it is mapped");
        let mut answer = 0u8;
        // SAFETY: one page is asked for, and its answer is one byte. The call reads and writes no memory of the page.
        let code = unsafe {
            libc::mincore(
                ptr::without_provenance_mut(start),
                PAGE_BYTES,
                &raw mut answer,
            )
        };
        code == 0 && answer & 1 == 1
    }

    /// Lets a watched page be written, and wakes who waits for it.
    pub(crate) fn unwatch(&self, offset: u64) -> io::Result<()> {
        let mut protect = Writeprotect {
            range: self.range(offset, PAGE_BYTES as u64),
            mode: 0,
        };
        loop {
            let result =
                call::<{ opcode::read_write::<Writeprotect>(0xaa, 6) }, _>(self.fd(), &mut protect);
            match result {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Lets threads that wait here look again.
    pub(crate) fn wake(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut range = self.range(offset, bytes);
        call::<{ range_call(2) }, _>(self.fd(), &mut range).map_err(io::Error::from)
    }

    /// Puts nothing where the memory was: whoever touches it from now on, and whoever waits there, gets SIGSEGV, or EFAULT from a
    /// system call. Zeros are what they would get if the userfaultfd were just closed.
    pub(crate) fn revoke(&self) {
        if self.is_revoked.load(Ordering::Acquire) {
            return;
        }
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let length = usize::try_from(self.bytes).expect("it is mapped");
        // SAFETY: by the type's invariant the range is a mapping given to this value alone, as it was not revoked before.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::with_exposed_provenance_mut(self.start),
                length,
                ProtFlags::empty(),
                flags,
            )
        };
        // Without memory for the kernel's own records nothing can be revoked; then waiting is what is left, not zeros.
        if mapped.is_ok() {
            self.is_revoked.store(true, Ordering::Release);
            let _ = self.wake(0, self.bytes);
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if *self.is_revoked.get_mut() {
            // SAFETY: this value is being dropped, so that nobody uses the field after this.
            unsafe { ManuallyDrop::drop(&mut self.userfault) };
        }
    }
}
