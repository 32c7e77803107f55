//! The system calls that the standard library does not offer. All unsafe code of the init is here.

use std::{
    ffi::{CString, c_char, c_int, c_long, c_ulong, c_void},
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, RawFd},
};

/// Kill, from signal(7).
pub const SIGKILL: i32 = 9;
/// mount(2): ignore set-user-ID bits.
pub const MS_NOSUID: c_ulong = 2;
/// mount(2): bind mount.
pub const MS_BIND: c_ulong = 4096;
/// mount(2): move a mount.
pub const MS_MOVE: c_ulong = 8192;

const SYS_FINIT_MODULE: c_long = 313; // arch/x86/entry/syscalls/syscall_64.tbl
const RLIMIT_NOFILE: c_int = 7;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    #[link_name = "kill"]
    fn c_kill(pid: c_int, signal: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn clock_settime(clock: c_int, time: *const [i64; 2]) -> c_int;
    fn mmap(
        start: *mut c_void,
        size: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn setrlimit(resource: c_int, limit: *const [u64; 2]) -> c_int;
    #[link_name = "sync"]
    fn c_sync();
}

/// mount(2).
pub fn mount_at(
    source: &str,
    target: &[u8],
    kind: &str,
    flags: c_ulong,
    data: &str,
) -> io::Result<()> {
    mount_bytes(source.as_bytes(), target, kind, flags, data)
}

/// mount(2) with a source that is any path.
pub fn mount_bytes(
    source: &[u8],
    target: &[u8],
    kind: &str,
    flags: c_ulong,
    data: &str,
) -> io::Result<()> {
    let (source, target, kind, data) = (
        CString::new(source)?,
        CString::new(target)?,
        CString::new(kind)?,
        CString::new(data)?,
    );
    // SAFETY: four NUL-terminated strings that outlive the call.
    check(
        unsafe {
            mount(
                source.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                flags,
                data.as_ptr().cast(),
            )
        }
        .into(),
    )
    .map(drop)
}

/// finit_module(2) without parameters.
pub fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: an open file, a NUL-terminated empty string, no flags.
    check(unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) }).map(drop)
}

/// ioctl(2) with a plain number.
pub fn ioctl_number(file: &impl AsRawFd, request: c_ulong, number: c_ulong) -> io::Result<c_int> {
    // SAFETY: callers use requests that take a number, never a pointer.
    check(unsafe { ioctl(file.as_raw_fd(), request, number) }.into())
        .map(|value| c_int::try_from(value).unwrap_or(0))
}

/// ioctl(2) with a buffer that is at least as large as what the request reads or writes.
pub fn ioctl_buffer(file: &impl AsRawFd, request: c_ulong, buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: callers pass a buffer of the request's size; it outlives the call.
    check(unsafe { ioctl(file.as_raw_fd(), request, buffer.as_mut_ptr()) }.into()).map(drop)
}

/// ioctl(2) with a structure that has the layout the request asks for.
pub fn ioctl_struct<T: Copy>(
    file: &impl AsRawFd,
    request: c_ulong,
    value: &mut T,
) -> io::Result<()> {
    // SAFETY: callers pass the request's own structure, plain numbers all through; it outlives the call.
    check(unsafe { ioctl(file.as_raw_fd(), request, &raw mut *value) }.into()).map(drop)
}

/// ioctl(2) with an array of words whose head says how many entries it has room for.
pub fn ioctl_words(file: &impl AsRawFd, request: c_ulong, words: &mut [u32]) -> io::Result<()> {
    // SAFETY: callers write the true room into the head; the array outlives the call.
    check(unsafe { ioctl(file.as_raw_fd(), request, words.as_mut_ptr()) }.into()).map(drop)
}

/// A private mapping shared with the kernel (or a guest), read and written byte by byte, never borrowed.
pub struct Shared {
    start: *mut u8,
    size: usize,
}

impl Shared {
    /// Zeroed memory of this process.
    pub fn anonymous(size: usize) -> io::Result<Self> {
        Self::map(size, 0x22, -1) // MAP_PRIVATE | MAP_ANONYMOUS
    }

    /// The beginning of a device's memory.
    pub fn of(file: &impl AsRawFd, size: usize) -> io::Result<Self> {
        Self::map(size, 1, file.as_raw_fd()) // MAP_SHARED
    }

    fn map(size: usize, flags: c_int, fd: RawFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; PROT_READ | PROT_WRITE is 3.
        let start = unsafe { mmap(std::ptr::null_mut(), size, 3, flags, fd, 0) };
        if start.addr() == usize::MAX {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self {
                start: start.cast(),
                size,
            })
        }
    }

    /// Where it starts in this process.
    pub fn address(&self) -> u64 {
        self.start.addr() as u64
    }

    /// One byte; 0 beyond the end.
    pub fn byte(&self, at: usize) -> u8 {
        if at >= self.size {
            return 0;
        }
        // SAFETY: inside the mapping, which is never unmapped; volatile, because the kernel writes it too.
        unsafe { self.start.add(at).read_volatile() }
    }

    /// Sets one byte; nothing beyond the end.
    pub fn set_byte(&mut self, at: usize, value: u8) {
        if at < self.size {
            // SAFETY: as in `byte`.
            unsafe { self.start.add(at).write_volatile(value) }
        }
    }
}

/// Takes over a descriptor that an ioctl just made.
pub fn own(fd: RawFd) -> File {
    // SAFETY: the caller got `fd` from the kernel a moment ago and nobody else holds it.
    unsafe { File::from_raw_fd(fd) }
}

/// kill(2).
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { c_kill(pid, signal) }.into()).map(drop)
}

/// waitpid(2) for any child: its process id and status; `None` when there are no children.
pub fn wait_any() -> Option<(i32, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for an int.
        match check(unsafe { waitpid(-1, &raw mut status, 0) }.into()) {
            Ok(pid) => return i32::try_from(pid).ok().map(|pid| (pid, status)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// Sets the wall clock to nanoseconds since 1970.
pub fn set_clock(unix_nanos: u64) -> io::Result<()> {
    let part = |value: u64| i64::try_from(value).unwrap_or(0);
    let time = [
        part(unix_nanos / 1_000_000_000),
        part(unix_nanos % 1_000_000_000),
    ];
    // SAFETY: `time` has the layout of struct timespec on 64-bit Linux; CLOCK_REALTIME is 0.
    check(unsafe { clock_settime(0, &raw const time) }.into()).map(drop)
}

/// Raises the limit on open files for every process to come.
pub fn allow_open_files(count: u64) -> io::Result<()> {
    let limit = [count, count];
    // SAFETY: the pair has the layout of struct rlimit on 64-bit Linux.
    check(unsafe { setrlimit(RLIMIT_NOFILE, &raw const limit) }.into()).map(drop)
}

/// Takes CAP_FOWNER from the calling thread (capget(2), capset(2)).
pub fn drop_fowner() -> io::Result<()> {
    const CAP_FOWNER: u32 = 1 << 3; // include/uapi/linux/capability.h
    let header: [u32; 2] = [0x2008_0522, 0]; // version 3, this thread
    let mut sets = [0_u32; 6]; // effective, permitted, inheritable; twice
    // SAFETY: both arrays have the layout of version 3 and outlive the calls; 125 is capget, 126 capset.
    check(unsafe { syscall(125, &raw const header, &raw mut sets) })?;
    sets[0] &= !CAP_FOWNER;
    // SAFETY: as above.
    check(unsafe { syscall(126, &raw const header, &raw const sets) }).map(drop)
}

/// sync(2).
pub fn sync() {
    // SAFETY: takes nothing, returns nothing.
    unsafe { c_sync() }
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
