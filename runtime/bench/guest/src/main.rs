//! PID 1 of the guests that `thaw-bench` restores: answers every byte with the same byte, over vsock. Static, std and libc only.
//!
//! It answers in both ways that monitors know: on one stream that it opens to the host and that lives through a snapshot
//! (port 1024; Thaw), and on streams that the host opens to it (port 1025; Firecracker, which cuts streams at a restore).
//! A failure panics, which the kernel turns into a panic of its own that the host sees.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::{ffi::CString, ptr, thread};

const HOST_CID: u32 = 2;
const HOST_PORT: u32 = 1024;
const GUEST_PORT: u32 = 1025;
/// First byte on the stream to the host: the guest is up.
const READY: u8 = b'+';

fn check(name: &str, result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("{name}: {error}")));
    }
    Ok(result)
}

fn mount(kind: &str, target: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let text = |text: &str| CString::new(text).map_err(io::Error::other);
    let (kind, target) = (text(kind)?, text(target)?);
    // SAFETY: live C strings, no options.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            ptr::null(),
        )
    };
    check("mount", result).map(drop)
}

/// In the order that the initramfs gives; none if the kernel has everything built in.
fn load_modules() -> io::Result<()> {
    let Ok(order) = fs::read_to_string("/modules/order") else {
        return Ok(());
    };
    for name in order.lines().filter(|line| !line.is_empty()) {
        let file = File::open(format!("/modules/{name}"))?;
        // SAFETY: a live descriptor and a live empty C string.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        check(name, if result < 0 { -1 } else { 0 })?;
    }
    Ok(())
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check("socket", unsafe {
        libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0)
    })?;
    // SAFETY: a descriptor that was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: all zeros is a valid address of this family.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or(0);
    (address.svm_cid, address.svm_port) = (cid, port);
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or(0);
    (address, length)
}

fn connect() -> io::Result<File> {
    let socket = socket()?;
    let (address, length) = address(HOST_CID, HOST_PORT);
    // SAFETY: a live address of the length given.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    check("connect", result)?;
    Ok(File::from(socket))
}

fn listen() -> io::Result<OwnedFd> {
    let socket = socket()?;
    let (address, length) = address(libc::VMADDR_CID_ANY, GUEST_PORT);
    // SAFETY: a live address of the length given.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    check("bind", result)?;
    // SAFETY: no pointers.
    check("listen", unsafe { libc::listen(socket.as_raw_fd(), 8) })?;
    Ok(socket)
}

fn accept(socket: &OwnedFd) -> io::Result<File> {
    // SAFETY: nobody wants the peer's address.
    let fd = check("accept", unsafe {
        libc::accept(socket.as_raw_fd(), ptr::null_mut(), ptr::null_mut())
    })?;
    // SAFETY: a descriptor that was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Until the other side is gone, in whatever way.
fn echo(mut stream: File) {
    let mut byte = [0];
    while matches!(stream.read(&mut byte), Ok(1)) && stream.write_all(&byte).is_ok() {}
}

fn run() -> io::Result<()> {
    mount("devtmpfs", "/dev")?;
    mount("proc", "/proc")?;
    load_modules()?;
    let listener = listen()?;
    // Where nobody listens on the host, the host's way is the other one.
    if let Ok(mut stream) = connect() {
        stream.write_all(&[READY])?;
        thread::spawn(move || echo(stream));
    }
    loop {
        echo(accept(&listener)?);
    }
}

fn main() {
    panic!("{:?}", run());
}
