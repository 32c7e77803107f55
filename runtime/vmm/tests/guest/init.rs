//! PID 1 of the test guests: loads modules, connects to the host's vsock port 1024, and does what each line says.
//! Static, std and libc only. Any failure panics, which the kernel turns into a panic of its own that the test sees.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test's program: its panic is the guest's, and its numbers are the test's own"
)]

mod network;
mod poke;
mod secrets;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{ffi::CString, process, ptr, thread};

const HOST_CID: u32 = 2;
const HOST_PORT: u32 = 1024;
const CPUS_MAX: usize = 4;

/// Ticks of a thread pinned to each CPU: each tick is a timer interrupt that arrived there.
static TICKS: [AtomicU64; CPUS_MAX] = [const { AtomicU64::new(0) }; CPUS_MAX];

fn check(name: &str, result: libc::c_long) -> libc::c_long {
    assert!(result >= 0, "{name}: {}", io::Error::last_os_error());
    result
}

fn mount(source: &str, target: &str, kind: &str) {
    fs::create_dir_all(target).unwrap();
    let text = |text: &str| CString::new(text).unwrap();
    let (source, to, kind_text) = (text(source), text(target), text(kind));
    // SAFETY: three live C strings, no options.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            to.as_ptr(),
            kind_text.as_ptr(),
            0,
            ptr::null(),
        )
    };
    check(&format!("mount {kind} on {target}"), result.into());
}

/// Loads what a list of the initramfs names, in its order.
fn load_modules(list: &str) {
    let Ok(order) = fs::read_to_string(format!("/modules/{list}")) else {
        return;
    };
    for name in order.lines().filter(|line| !line.is_empty()) {
        let file = File::open(format!("/modules/{name}")).unwrap();
        // SAFETY: a live descriptor and a live empty C string.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        check(&format!("module {name}"), result);
    }
}

fn connect() -> File {
    // SAFETY: no pointers.
    let fd = check(
        "socket",
        unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) }.into(),
    );
    // SAFETY: a descriptor that was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // SAFETY: all zeros is a valid address of this family.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    (address.svm_cid, address.svm_port) = (HOST_CID, HOST_PORT);
    let length = size_of::<libc::sockaddr_vm>() as u32;
    // SAFETY: a live address of the length given.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    check("connect", result.into());
    File::from(socket)
}

fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a live timespec.
    check(
        "clock",
        unsafe { libc::clock_gettime(clock, &raw mut time) }.into(),
    );
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has it, and the kernel leaves it to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn cpus() -> usize {
    thread::available_parallelism().unwrap().get()
}

fn tick_on(cpu: usize) {
    // SAFETY: an all-zero set is a valid empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` is below the set's size.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: a live set of the length given; 0 is this thread.
    check(
        "affinity",
        unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }.into(),
    );
    loop {
        thread::sleep(Duration::from_millis(20));
        TICKS[cpu].fetch_add(1, Ordering::SeqCst);
    }
}

fn spin_on_all() {
    for _ in 0..cpus() {
        thread::spawn(|| {
            loop {
                std::hint::spin_loop()
            }
        });
    }
}

/// Byte `index` of the pattern that `bytes` sends.
fn pattern(index: u64) -> u8 {
    (index.wrapping_mul(2_654_435_761) >> 16) as u8
}

fn send_pattern(socket: &mut File, count: u64) {
    let mut sent = 0;
    while sent < count {
        let chunk: Vec<u8> = (sent..count.min(sent + 8192)).map(pattern).collect();
        socket.write_all(&chunk).unwrap();
        sent += chunk.len() as u64;
    }
}

fn reboot(how: libc::c_int) -> ! {
    // SAFETY: no pointers.
    unsafe {
        libc::sync();
        libc::reboot(how);
    }
    process::exit(1)
}

fn write_raw(path: &str, offset: u64, text: &str) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let disk = OpenOptions::new().write(true).open(path)?;
    disk.write_all_at(text.as_bytes(), offset)?;
    disk.sync_all()
}

fn read_raw(path: &str, offset: u64, count: usize) -> io::Result<String> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; count];
    File::open(path)?.read_exact_at(&mut bytes, offset)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn random() -> io::Result<usize> {
    File::open("/dev/hwrng")?.read(&mut [0; 8])
}

struct Guest {
    socket: File,
    counter: u64,
    memory: Vec<u8>,
    network: Option<network::Station>,
}

impl Guest {
    fn command(&mut self, line: &str, input: &mut impl Read) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let outcome =
            |result: io::Result<String>| result.unwrap_or_else(|error| format!("error {error}"));
        match words[0] {
            "ping" => format!("pong {}", words[1]),
            "cpus" => cpus().to_string(),
            "count" => {
                self.counter += number(1);
                self.counter.to_string()
            }
            "clocks" => format!(
                "{} {} {}",
                clock_ns(libc::CLOCK_MONOTONIC),
                clock_ns(libc::CLOCK_REALTIME),
                tsc()
            ),
            "clocksource" => fs::read_to_string(
                "/sys/devices/system/clocksource/clocksource0/current_clocksource",
            )
            .unwrap()
            .trim()
            .into(),
            "ticks" => TICKS
                .iter()
                .take(cpus())
                .map(|ticks| ticks.load(Ordering::SeqCst).to_string())
                .collect::<Vec<_>>()
                .join(" "),
            "fill" => {
                self.memory = (0..number(1) << 20).map(pattern).collect();
                self.memory.len().to_string()
            }
            "sum" => (self
                .memory
                .iter()
                .enumerate()
                .filter(|(at, byte)| **byte != pattern(*at as u64))
                .count())
            .to_string(),
            "mount" => {
                mount(words[1], "/disk", "ext4");
                "mounted".into()
            }
            "put" => {
                outcome(fs::write(format!("/disk/{}", words[1]), words[2]).map(|()| "put".into()))
            }
            "get" => outcome(fs::read_to_string(format!("/disk/{}", words[1]))),
            "list" => outcome(fs::read_dir("/disk").map(|list| list.count().to_string())),
            "write" => outcome(write_raw(words[1], number(2), words[3]).map(|()| "written".into())),
            "read" => outcome(read_raw(words[1], number(2), number(3) as usize)),
            "random" => outcome(random().map(|count| count.to_string())),
            "devices" => outcome(
                fs::read_dir("/sys/bus/virtio/devices").map(|list| list.count().to_string()),
            ),
            "bytes" => {
                send_pattern(&mut self.socket, number(1));
                String::new()
            }
            "echo" => {
                let mut bytes = vec![0; number(1) as usize];
                input.read_exact(&mut bytes).unwrap();
                self.socket.write_all(&bytes).unwrap();
                String::new()
            }
            "network" => {
                load_modules("network-order");
                let station = self
                    .network
                    .insert(network::Station::new(words[1], words[2]));
                station.describe()
            }
            "datagram" | "stream" | "heard" => {
                let station = self.network.as_mut().unwrap();
                outcome(match words[0] {
                    "datagram" => station.exchange_datagram(words[1]),
                    "stream" => station.exchange_stream(number(1)),
                    _ => station.heard(words[1]),
                })
            }
            "hide" => outcome(secrets::hide(words[1])),
            "churn" => {
                secrets::churn();
                "churning".into()
            }
            "spin" => {
                spin_on_all();
                "spinning".into()
            }
            "poke" => poke::poke(words[1], number(2), number(3)),
            "poweroff" => reboot(libc::RB_POWER_OFF),
            "reboot" => reboot(libc::RB_AUTOBOOT),
            "panic" => {
                fs::write("/proc/sysrq-trigger", "c").unwrap();
                String::new()
            }
            unknown => format!("unknown {unknown}"),
        }
    }
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("hold") {
        loop {
            thread::park();
        }
    }
    mount("dev", "/dev", "devtmpfs");
    mount("proc", "/proc", "proc");
    mount("sys", "/sys", "sysfs");
    load_modules("order");
    for cpu in 0..cpus() {
        thread::spawn(move || tick_on(cpu));
    }
    let socket = connect();
    let mut input = BufReader::new(socket.try_clone().unwrap());
    let mut guest = Guest {
        socket,
        counter: 0,
        memory: Vec::new(),
        network: None,
    };
    guest.socket.write_all(b"hello\n").unwrap();
    let mut line = String::new();
    while input.read_line(&mut line).unwrap() > 0 {
        let answer = guest.command(line.trim_end(), &mut input);
        guest
            .socket
            .write_all(format!("{answer}\n").as_bytes())
            .unwrap();
        line.clear();
    }
    panic!("the host closed the channel");
}
