//! Which system calls each of a monitor's threads may make, and why.
//!
//! The main thread's filter is set before there is another, and the others inherit it, so it allows what any of them needs;
//! each then sets a tighter one of its own. No table has a call that opens a file by a name from the root (which is
//! empty), or to write, starts a program or a process, makes a namespace, a socket or memory that can be executed, or changes a signal's handler.

use std::sync::OnceLock;

use thaw_jail::seccomp::{self, Filter, Only, Rule, SeccompError, any, only};

/// Requests of KVM, whose letter is `KVMIO` (include/uapi/linux/kvm.h).
const fn kvm(numbers: &'static [u8]) -> Only {
    let driver = 0xae;
    Only::Requests { driver, numbers }
}
/// Requests of userfaultfd (include/uapi/linux/userfaultfd.h).
const fn userfaultfd(numbers: &'static [u8]) -> Only {
    let driver = 0xaa;
    Only::Requests { driver, numbers }
}
const KVM_RUN: u8 = 0x80;
const KVM_GET_REGS: u8 = 0x81;
/// `FIONBIO` (include/uapi/asm-generic/ioctls.h) and `FICLONE` (include/uapi/linux/fs.h).
const OF_FILES: Only = Only::Values(1, &[0x5421, 0x4004_9409]);
const F_DUPFD_CLOEXEC: u32 = libc::F_DUPFD_CLOEXEC.unsigned_abs();
/// Not `F_SETFL`: a file's flags are common to all who were given the same description of it, other monitors included.
const DESCRIPTOR_COMMANDS: Only = Only::Values(
    1,
    &[
        F_DUPFD_CLOEXEC,
        libc::F_GETFD.unsigned_abs(),
        libc::F_SETFD.unsigned_abs(),
        libc::F_GETFL.unsigned_abs(),
    ],
);
/// The signal with which glibc changes the user of all threads (sysdeps/nptl/pthreadP.h).
const SIGSETXID: u32 = 33;
const NAMES: Only = Only::Values(
    0,
    &[
        libc::PR_SET_NAME.unsigned_abs(),
        libc::PR_GET_NAME.unsigned_abs(),
        libc::PR_SET_VMA.unsigned_abs(),
    ],
);

/// What a thread of Rust and of the C library does by itself.
const EVERY: &[Rule] = &[
    any(libc::SYS_futex, "mutexes, condition variables, joining"),
    any(libc::SYS_sched_yield, "locks that spin a moment"),
    only(
        libc::SYS_mmap,
        Only::NOT_EXECUTABLE,
        "heap, stacks, guest memory",
    ),
    only(
        libc::SYS_mprotect,
        Only::NOT_EXECUTABLE,
        "the heap's growth, guard pages",
    ),
    any(libc::SYS_munmap, "heap, stacks"),
    any(libc::SYS_mremap, "large vectors that grow"),
    any(
        libc::SYS_madvise,
        "the heap; pages fetched ahead, given back or never dumped",
    ),
    any(libc::SYS_brk, "the heap"),
    any(libc::SYS_getrandom, "seeds of hash maps"),
    any(
        libc::SYS_clock_gettime,
        "time, where the kernel's page for it is off",
    ),
    any(libc::SYS_clock_nanosleep, "pauses between attempts"),
    any(
        libc::SYS_restart_syscall,
        "a wait that a signal interrupted",
    ),
    any(libc::SYS_rt_sigreturn, "the end of a signal's handler"),
    any(
        libc::SYS_rt_sigprocmask,
        "threads that begin and end; abort(3)",
    ),
    any(
        libc::SYS_sigaltstack,
        "the stack on which overflows are noticed",
    ),
    any(libc::SYS_rseq, "a new thread's registration"),
    any(libc::SYS_set_robust_list, "the same"),
    any(libc::SYS_gettid, "panics and abort(3) name their thread"),
    any(libc::SYS_getpid, "abort(3)"),
    any(
        libc::SYS_tgkill,
        "vCPUs are kicked out of their guest; abort(3)",
    ),
    only(libc::SYS_prctl, NAMES, "names of threads and mappings"),
    any(libc::SYS_write, "wake-ups by eventfd, the log"),
    any(libc::SYS_read, "wake-ups by eventfd"),
    any(libc::SYS_close, "descriptors that are done with"),
    any(libc::SYS_exit, "a thread's end"),
    any(libc::SYS_exit_group, "the process's end"),
];

/// The main thread: requests, and all that makes, saves, restores and rewinds a machine.
const CONTROL: &[Rule] = &[
    any(
        libc::SYS_poll,
        "waits for requests and for the machine's end",
    ),
    any(libc::SYS_ppoll, "the same"),
    any(libc::SYS_recvmsg, "requests with descriptors"),
    any(libc::SYS_sendmsg, "replies"),
    any(
        libc::SYS_recvfrom,
        "bytes of the agent's channel before the guest runs",
    ),
    any(
        libc::SYS_sendto,
        "what the guest had said when it was saved",
    ),
    any(
        libc::SYS_shutdown,
        "an agent's channel that a rewind replaces",
    ),
    any(libc::SYS_socketpair, "the rehearsal's request"),
    any(libc::SYS_memfd_create, "the rehearsal's snapshot"),
    any(
        libc::SYS_getsockopt,
        "what kind of descriptor the agent's channel is",
    ),
    only(
        libc::SYS_rt_sigaction,
        Only::Values(0, &[SIGSETXID]),
        "the C library, with its first thread",
    ),
    any(libc::SYS_clone3, "said not to exist, by a filter before"),
    only(libc::SYS_clone, Only::THREAD, "threads"),
    only(
        libc::SYS_prctl,
        Only::Values(0, &[libc::PR_SET_NO_NEW_PRIVS.unsigned_abs()]),
        "a thread's own filter, for which the library makes sure of it",
    ),
    only(
        libc::SYS_seccomp,
        Only::Values(0, &[libc::SECCOMP_SET_MODE_FILTER]),
        "a thread's own filter, which can only take away",
    ),
    any(libc::SYS_sched_getaffinity, "a new thread's attributes"),
    any(libc::SYS_eventfd2, "doorbells and interrupts"),
    any(libc::SYS_epoll_create1, "the device thread's watch"),
    any(libc::SYS_epoll_ctl, "an agent's channel that is watched"),
    // The first of all, as alternatives are looked at in their order.
    only(libc::SYS_ioctl, kvm(&[KVM_RUN]), "the guest, in its thread"),
    only(
        libc::SYS_ioctl,
        kvm(&[0x01, 0x02, 0x03, 0x04, 0x05]),
        "a machine; MSRs, capabilities, pages and CPUID of this host: CREATE_VM, GET_MSR_INDEX_LIST, CHECK_EXTENSION, \
         GET_VCPU_MMAP_SIZE, GET_SUPPORTED_CPUID",
    ),
    only(
        libc::SYS_ioctl,
        kvm(&[0x41, 0x42, 0x46, 0x47, 0xa3]),
        "its processors and memory: CREATE_VCPU, GET_DIRTY_LOG, SET_USER_MEMORY_REGION, SET_TSS_ADDR, ENABLE_CAP",
    ),
    only(
        libc::SYS_ioctl,
        kvm(&[0x60, 0x62, 0x63, 0x76, 0x79, 0x7b, 0x7c]),
        "its chips, wires and clock: CREATE_IRQCHIP, GET_IRQCHIP, SET_IRQCHIP, IRQFD, IOEVENTFD, SET_CLOCK, GET_CLOCK",
    ),
    only(
        libc::SYS_ioctl,
        kvm(&[
            KVM_GET_REGS,
            0x82,
            0x83,
            0x84,
            0x88,
            0x89,
            0x8e,
            0x8f,
            0x90,
            0x91,
            0x98,
            0x99,
            0x9f,
            0xa0,
            0xa1,
            0xa2,
            0xa3,
            0xa4,
            0xa5,
            0xa6,
            0xa7,
            0xad,
            0xcf,
            0xe1,
            0xe2,
        ]),
        "a processor's state: GET_ and SET_ of REGS, SREGS, MSRS, LAPIC, CPUID2, MP_STATE, VCPU_EVENTS, DEBUGREGS, TSC_KHZ, XSAVE, XCRS, \
         DEVICE_ATTR (its TSC's offset); KVMCLOCK_CTRL, GET_XSAVE2",
    ),
    only(
        libc::SYS_ioctl,
        kvm(&[0xd5]),
        "pages mapped before the guest touches them: PRE_FAULT_MEMORY",
    ),
    only(
        libc::SYS_ioctl,
        userfaultfd(&[0x00, 0x01]),
        "memory that is served as it is touched: REGISTER, UNREGISTER",
    ),
    only(
        libc::SYS_ioctl,
        OF_FILES,
        "streams that do not block; blocks that are shared between files",
    ),
    only(
        libc::SYS_fcntl,
        DESCRIPTOR_COMMANDS,
        "copies of descriptors, close-on-exec",
    ),
    any(libc::SYS_fstat, "lengths of files"),
    any(libc::SYS_statx, "the same"),
    any(libc::SYS_newfstatat, "the same"),
    any(libc::SYS_lseek, "holes in disks and snapshots"),
    any(libc::SYS_pread64, "snapshots, images, pagemap"),
    any(libc::SYS_preadv, "disks"),
    any(libc::SYS_pwrite64, "the snapshot that is written"),
    any(libc::SYS_pwritev, "the same"),
    any(libc::SYS_writev, "the log"),
    any(libc::SYS_copy_file_range, "disks into a snapshot"),
    any(libc::SYS_ftruncate, "a snapshot's length"),
    any(libc::SYS_fallocate, "a snapshot's room"),
    any(libc::SYS_fsync, "a snapshot that is to last"),
    any(libc::SYS_fdatasync, "the same"),
    any(libc::SYS_syncfs, "the same"),
    any(libc::SYS_mincore, "which of a file's pages are there"),
    only(
        libc::SYS_openat,
        Only::TO_READ,
        "chunks below a store's folder; there is no other folder",
    ),
];

/// A virtual processor.
const VCPU: &[Rule] = &[
    only(libc::SYS_ioctl, kvm(&[KVM_RUN]), "the guest"),
    only(
        libc::SYS_ioctl,
        kvm(&[KVM_GET_REGS]),
        "where a guest was that ended by a triple fault",
    ),
];

/// The thread of all devices.
const DEVICES: &[Rule] = &[
    only(
        libc::SYS_ioctl,
        OF_FILES,
        "a channel or tap that does not block",
    ),
    any(libc::SYS_epoll_wait, "doorbells and the agent's channel"),
    any(libc::SYS_epoll_pwait, "the same"),
    any(libc::SYS_epoll_ctl, "an agent's channel that is watched"),
    any(libc::SYS_recvfrom, "the agent's channel"),
    any(libc::SYS_sendto, "the same"),
    any(libc::SYS_recvmsg, "the same"),
    any(libc::SYS_sendmsg, "the same"),
    any(libc::SYS_readv, "frames of the network"),
    any(libc::SYS_writev, "the same; the agent's channel"),
    any(
        libc::SYS_shutdown,
        "an agent's channel that the guest has closed",
    ),
    any(libc::SYS_pread64, "disks"),
    any(libc::SYS_preadv, "the same"),
    any(libc::SYS_pwrite64, "what guests write to disks, in memory"),
    any(libc::SYS_fstat, "lengths of disks"),
    any(libc::SYS_statx, "the same"),
];

/// Threads that fetch memory ahead, or as it is touched.
const FETCHING: &[Rule] = &[
    any(libc::SYS_poll, "page faults of the guest"),
    any(libc::SYS_ppoll, "the same"),
    only(
        libc::SYS_ioctl,
        userfaultfd(&[0x03, 0x04, 0x06, 0x02, 0x01]),
        "pages into guest memory: COPY, ZEROPAGE, WRITEPROTECT, WAKE; UNREGISTER",
    ),
    any(libc::SYS_pread64, "a snapshot's pages"),
    any(libc::SYS_mincore, "which pages are there already"),
    any(libc::SYS_fstat, "lengths of chunks"),
    any(libc::SYS_statx, "the same"),
    only(
        libc::SYS_openat,
        Only::TO_READ,
        "chunks below a store's folder; there is no other folder",
    ),
    any(
        libc::SYS_sendmsg,
        "the machine's end, told in the control loop's place",
    ),
];

/// What tells the control loop of a device's fault.
const FAULTS: &[Rule] = &[];

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `vcpu-N`.
    Vcpu,
    /// `devices`.
    Devices,
    /// `device-faults`.
    Faults,
    /// `prefetch`, `pager-…`.
    Fetching,
}

struct Filters {
    vcpu: Filter,
    devices: Filter,
    faults: Filter,
    fetching: Filter,
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Puts the main thread, and so all that come, behind a filter, and has violations told. Before there is another thread.
///
/// # Errors
/// The kernel refuses the filter.
pub fn process() -> Result<(), SeccompError> {
    let filters = Filters {
        vcpu: Filter::compile(&[EVERY, VCPU])?,
        devices: Filter::compile(&[EVERY, DEVICES])?,
        faults: Filter::compile(&[EVERY, FAULTS])?,
        fetching: Filter::compile(&[EVERY, FETCHING])?,
    };
    let all = Filter::compile(&[EVERY, CONTROL, VCPU, DEVICES, FETCHING, FAULTS])?;
    // Set once: `main` calls this.
    FILTERS.get_or_init(|| filters);
    seccomp::report_violations()?;
    Filter::absent(&[libc::SYS_clone3])?.apply()?;
    all.apply()
}

/// Puts the calling thread behind its own filter; nothing where [`process`] was not called, as in tests of a single part.
///
/// # Panics
/// The kernel refuses a filter after it took the main thread's: this thread must not see a guest then.
pub fn thread(role: Role) {
    let Some(filters) = FILTERS.get() else { return };
    let filter = match role {
        Role::Vcpu => &filters.vcpu,
        Role::Devices => &filters.devices,
        Role::Faults => &filters.faults,
        Role::Fetching => &filters.fetching,
    };
    filter.apply().expect("the kernel took the main thread's");
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::process::Command;

    use super::*;

    /// What a process does behind the main thread's filter: the test runs itself.
    const ATTEMPT: &str = "THAW_TEST_ATTEMPT";

    const TABLES: [&[Rule]; 6] = [EVERY, CONTROL, VCPU, DEVICES, FETCHING, FAULTS];

    #[test]
    fn no_thread_may_start_a_program_make_a_socket_or_change_a_handler() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_open,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_kill,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_keyctl,
            libc::SYS_process_vm_readv,
            libc::SYS_userfaultfd,
        ];
        for rule in TABLES.into_iter().flatten() {
            assert!(!never.contains(&rule.call), "{rule:?}");
            assert!(!rule.reason.is_empty());
            let handler = rule.call == libc::SYS_rt_sigaction;
            assert!(!handler || matches!(rule.only, Only::Values(0, &[SIGSETXID])));
        }
    }

    fn attempt(name: &str) {
        process().expect("a filter");
        match name {
            "what is allowed" => {
                let thread = std::thread::spawn(|| File::open("/dev/null").map(drop));
                thread.join().expect("a thread").expect("to read");
            }
            "a process" => {
                // SAFETY: the child, should there be one, ends at once.
                if unsafe { libc::fork() } == 0 {
                    // SAFETY: as above.
                    unsafe { libc::_exit(0) }
                }
            }
            "a namespace" => {
                let flags = libc::CLONE_THREAD | libc::CLONE_NEWNET;
                // SAFETY: flags that the kernel refuses, as a thread shares memory and handlers.
                unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
            }
            "to write" => drop(OpenOptions::new().write(true).open("/dev/null")),
            "to make" => drop(File::create("/dev/null")),
            "devices of KVM" => {
                // SAFETY: a number that is no descriptor; KVM_CREATE_DEVICE.
                unsafe { libc::ioctl(-1, 0xc00c_aee0) };
            }
            "a processor's run" => {
                // SAFETY: a number that is no descriptor; KVM_RUN.
                unsafe { libc::ioctl(-1, 0xae80) };
            }
            "another's flags" => {
                // SAFETY: a number, and no memory.
                unsafe { libc::fcntl(0, libc::F_SETFL, libc::O_DIRECT) };
            }
            other => unreachable!("{other}"),
        }
        // SAFETY: ends the process before the harness does what no monitor does.
        unsafe { libc::_exit(0) }
    }

    #[test]
    fn a_monitor_makes_threads_and_reads_and_neither_forks_nor_writes_files() {
        if let Ok(name) = std::env::var(ATTEMPT) {
            return attempt(&name);
        }
        let forbidden = Some(seccomp::VIOLATION_EXIT_CODE);
        for (name, expected) in [
            ("what is allowed", Some(0)),
            ("a processor's run", Some(0)),
            ("devices of KVM", forbidden),
            ("a process", forbidden),
            ("a namespace", forbidden),
            ("to write", forbidden),
            ("to make", forbidden),
            ("another's flags", forbidden),
        ] {
            let this = std::env::current_exe().expect("a path");
            let test = "confine::tests::a_monitor_makes_threads_and_reads_and_neither_forks_nor_writes_files";
            let mut command = Command::new(this);
            command.args(["--exact", test, "--nocapture"]);
            let output = command.env(ATTEMPT, name).output().expect("a process");
            assert_eq!(output.status.code(), expected, "{name}: {output:?}");
        }
    }

    #[test]
    fn vcpus_reach_nothing_but_kvm_run() {
        let opens = [libc::SYS_openat, libc::SYS_pread64, libc::SYS_sendmsg];
        for rule in EVERY.iter().chain(VCPU) {
            assert!(!opens.contains(&rule.call));
            let run = [&[KVM_RUN][..], &[KVM_GET_REGS]];
            let is_ioctl = rule.call == libc::SYS_ioctl;
            assert!(
                !is_ioctl
                    || matches!(rule.only, Only::Requests { driver: 0xae, numbers } if run.contains(&numbers))
            );
        }
        Filter::compile(&[EVERY, VCPU]).expect("a filter");
        Filter::compile(&TABLES).expect("a filter");
    }
}
