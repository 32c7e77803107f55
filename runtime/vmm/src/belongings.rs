//! What a monitor takes along from the host's file system: opened once, by name, before the process gives up the right to open
//! anything (`thaw-jail`). Where nothing was taken, as in tests, each is opened when it is first asked for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, OnceLock, PoisonError};

use kvm_ioctls::Kvm;
use thaw_snapshot_pager::{Userfault, UserfaultError};

use crate::host;

/// Bytes of /proc/self/maps that are read: a monitor has some hundred lines.
const MAPS_BYTES_MAX: usize = 64 * 1024;

/// Opens everything now. What cannot be had is an error when it is asked for, and not before: a monitor that only says so is
/// of use.
pub fn take() {
    // rustix asks the kernel for what it told the process at its start, and keeps it: by /proc, before Linux 6.4.
    rustix::param::page_size();
    let _ = kvm();
    let _ = pagemap();
    let _ = maps_file();
    host::shadows_page_tables();
    *lock(&USERFAULT) = Some(Userfault::open());
}

/// /dev/kvm.
///
/// # Errors
/// It cannot be opened.
pub fn kvm() -> Result<&'static Kvm, kvm_ioctls::Error> {
    static KVM: OnceLock<Result<Kvm, kvm_ioctls::Error>> = OnceLock::new();
    KVM.get_or_init(Kvm::new).as_ref().map_err(|error| *error)
}

/// Which of this process's pages are there: `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst).
///
/// # Errors
/// It cannot be opened.
pub fn pagemap() -> io::Result<&'static File> {
    static PAGEMAP: OnceLock<Result<File, io::ErrorKind>> = OnceLock::new();
    let file = PAGEMAP.get_or_init(|| File::open("/proc/self/pagemap").map_err(|e| e.kind()));
    file.as_ref().map_err(|kind| (*kind).into())
}

fn maps_file() -> io::Result<&'static File> {
    static MAPS: OnceLock<Result<File, io::ErrorKind>> = OnceLock::new();
    let file = MAPS.get_or_init(|| File::open("/proc/self/maps").map_err(|e| e.kind()));
    file.as_ref().map_err(|kind| (*kind).into())
}

/// This process's mappings, as they are now: `/proc/self/maps` (proc_pid_maps(5)), its first 64 KiB.
///
/// # Errors
/// It cannot be opened or read.
pub fn maps() -> io::Result<String> {
    let file = maps_file()?;
    let mut text = vec![0; MAPS_BYTES_MAX];
    let mut length = 0;
    while length < text.len() {
        match file.read_at(&mut text[length..], length as u64)? {
            0 => break,
            count => length += count,
        }
    }
    text.truncate(length);
    Ok(String::from_utf8_lossy(&text).into_owned())
}

static USERFAULT: Mutex<Option<Result<Userfault, UserfaultError>>> = Mutex::new(None);

/// The process's userfaultfd, once: a machine's memory is served once.
///
/// # Errors
/// See [`UserfaultError`].
pub fn userfault() -> Result<Userfault, UserfaultError> {
    lock(&USERFAULT).take().unwrap_or_else(Userfault::open)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
