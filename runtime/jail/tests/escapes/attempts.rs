//! The attempts, each of which a process of root can carry out, with no effect on the host if it does.

use std::fs;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::PathBuf;
use std::ptr;

use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};

/// What of the world outside an attempt may aim at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outside {
    /// A process, as the host counts.
    pub pid: i32,
    /// A TCP listener on 127.0.0.1.
    pub port: u16,
    /// A Unix listener in the file system.
    pub socket: PathBuf,
    /// An abstract Unix listener.
    pub name: String,
    /// A System V shared memory segment.
    pub segment: i32,
    /// A file that everybody may read.
    pub file: PathBuf,
}

/// Comes through, or says what held it.
pub type Attempt = fn(&Outside) -> io::Result<()>;

/// All of them.
pub const ATTEMPTS: &[(&str, Attempt)] = &[
    ("open a host's file", |o| fs::read(&o.file).map(drop)),
    ("list the host's root", |_| {
        match fs::read_dir("/")?.next() {
            Some(_) => Ok(()),
            None => Err(io::Error::other("the root is empty")),
        }
    }),
    ("write into the root", |_| {
        let path = format!("/escape-{}", std::process::id());
        fs::write(&path, "out")?;
        fs::remove_file(path)
    }),
    ("read another process's environment", |o| {
        fs::read(format!("/proc/{}/environ", o.pid)).map(drop)
    }),
    ("signal another process", |o| {
        // SAFETY: no pointers; signal 0 only asks.
        told(unsafe { libc::kill(o.pid, 0) }.into())
    }),
    ("signal everybody", |_| {
        // SAFETY: as above.
        told(unsafe { libc::kill(-1, 0) }.into())
    }),
    ("trace another process", |o| {
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: no memory is named; a process that is seized goes on, and is let go when this one ends.
        told(unsafe { libc::ptrace(libc::PTRACE_SEIZE, o.pid, none, none) })
    }),
    ("read another process's memory", |o| {
        let mut byte = 0_u8;
        let (here, there) = (part(&raw mut byte), part(ptr::null_mut()));
        // SAFETY: one byte of ours is written at most; at address 0 of the other process nothing is mapped.
        let read =
            unsafe { libc::process_vm_readv(o.pid, &raw const here, 1, &raw const there, 1, 0) };
        or_only(told(read as i64), &[libc::EFAULT])
    }),
    ("connect to the gateway by TCP", |o| {
        TcpStream::connect(("127.0.0.1", o.port)).map(drop)
    }),
    ("connect to a Unix socket", |o| {
        UnixStream::connect(&o.socket).map(drop)
    }),
    ("connect to an abstract Unix socket", |o| {
        UnixStream::connect_addr(&SocketAddr::from_abstract_name(&o.name)?).map(drop)
    }),
    ("attach shared memory of the host", |o| {
        // SAFETY: the kernel chooses the place, and the process ends before it is used.
        let at = unsafe { libc::shmat(o.segment, ptr::null(), libc::SHM_RDONLY) };
        told(if at.addr() == usize::MAX { -1 } else { 0 })
    }),
    ("mount a file system", |_| {
        let covered = if fs::exists("/mnt")? { c"/mnt" } else { c"/" };
        // In a mount namespace of its own, should it be let to.
        // SAFETY: flags and strings alone.
        unsafe {
            told(libc::unshare(libc::CLONE_NEWNS).into())?;
            told(
                libc::mount(
                    c"none".as_ptr(),
                    c"/".as_ptr(),
                    ptr::null(),
                    libc::MS_PRIVATE | libc::MS_REC,
                    ptr::null(),
                )
                .into(),
            )?;
            told(
                libc::mount(
                    c"none".as_ptr(),
                    covered.as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    ptr::null(),
                )
                .into(),
            )
        }
    }),
    ("become root again", |_| {
        // SAFETY: no pointers.
        told(unsafe { libc::setresuid(0, 0, 0) }.into())
    }),
    ("be privileged in a new user namespace", |_| {
        // SAFETY: no pointers.
        told(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into())
    }),
    ("join another process's namespaces", |o| {
        // SAFETY: no pointers; the descriptor is this process's until it ends.
        unsafe {
            let other = libc::syscall(libc::SYS_pidfd_open, o.pid, 0);
            told(other)?;
            told(libc::setns(i32::try_from(other).unwrap_or(-1), libc::CLONE_NEWUTS).into())
        }
    }),
    ("load a kernel module", |_| {
        // SAFETY: an empty image is refused by whom asks for it, but only after the privilege was looked at.
        let refused = told(unsafe {
            libc::syscall(libc::SYS_init_module, ptr::null::<u8>(), 0, c"".as_ptr())
        });
        or_only(refused, &[libc::ENOEXEC, libc::EFAULT])
    }),
    ("load a new kernel", |_| {
        // SAFETY: no segments: this unloads what was loaded, which is nothing.
        told(unsafe { libc::syscall(libc::SYS_kexec_load, 0, 0, ptr::null::<u8>(), 0) })
    }),
    ("set the clock", |_| {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        Ok(rustix::time::clock_settime(
            rustix::time::ClockId::Realtime,
            now,
        )?)
    }),
    ("rename the host", |_| {
        let name = rustix::system::uname().nodename().to_bytes().to_vec();
        Ok(rustix::system::sethostname(&name)?)
    }),
    ("forbid rebooting by keyboard", |_| {
        // SAFETY: no pointers; what this sets is the default.
        told(unsafe { libc::reboot(libc::RB_DISABLE_CAD) }.into())
    }),
    ("make a device", |_| {
        let path = std::env::temp_dir().join(format!("escape-device-{}", std::process::id()));
        let device = rustix::fs::makedev(1, 1); // all of memory
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::RUSR,
            device,
        )?;
        fs::remove_file(path)
    }),
    ("raise its limit of descriptors", |_| {
        let most = Rlimit {
            current: Some(1024),
            maximum: Some(1024),
        };
        Ok(rustix::process::setrlimit(Resource::Nofile, most)?)
    }),
    ("run before everybody else", |_| {
        Ok(rustix::process::setpriority_process(None, -20)?)
    }),
    ("reach hardware", |_| {
        // SAFETY: no pointers; this process does not touch a port.
        told(unsafe { libc::iopl(3) }.into())
    }),
    ("open a file by its handle", |_| {
        let mut handle = [0_u32; 34];
        handle[0] = 8;
        let here = fs::File::open("/")?;
        // SAFETY: a handle's length and type, and room for its bytes; it names nothing, which is found out after the privilege
        // was looked at.
        let refused = told(unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                here.as_raw_fd(),
                handle.as_mut_ptr(),
                0,
            )
        });
        or_only(refused, &[libc::ESTALE, libc::EINVAL])
    }),
    ("see the host's interfaces", |_| {
        let mut beside = fs::read_dir("/sys/class/net")?.filter_map(Result::ok);
        match beside.any(|entry| entry.file_name() != "lo") {
            true => Ok(()),
            false => Err(io::Error::other("nothing but lo")),
        }
    }),
    ("open a raw socket", |_| {
        // SAFETY: no pointers; the descriptor is this process's until it ends.
        told(unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP) }.into())
    }),
    ("start a hundred threads", |_| {
        let sleep = || std::thread::sleep(std::time::Duration::from_secs(600));
        (0..100).try_for_each(|_| std::thread::Builder::new().spawn(sleep).map(drop))
    }),
    ("fill the memory", |_| {
        // Whoever tries this in a jail is killed.
        let filled = vec![1_u8; 160 << 20];
        match std::hint::black_box(&filled).contains(&0) {
            false => Ok(()),
            true => Err(io::Error::other("memory of nothing")),
        }
    }),
];

fn part(base: *mut u8) -> libc::iovec {
    libc::iovec {
        iov_base: base.cast(),
        iov_len: 1,
    }
}

fn told(result: i64) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Comes through, too, if what stops it is one of these, which are found out after the right to it was looked at.
fn or_only(result: io::Result<()>, stopped_by: &[i32]) -> io::Result<()> {
    match result {
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|e| stopped_by.contains(&e)) =>
        {
            Ok(())
        }
        result => result,
    }
}
