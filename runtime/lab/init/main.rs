//! The lab's init (process 1): prepares an emulated KVM host, waits for a command on the control port, runs it, reports how it ended.
//!
//! It uses the standard library alone (see build.rs). Where to start: [`main`]. What always holds: between `Booted` and `Start` nothing
//! runs and nothing is shared with the machine, so that the whole lab can be saved there; a command is started at most once.

mod boot;
mod probe;
#[path = "../src/protocol.rs"]
#[cfg_attr(
    not(test),
    expect(
        dead_code,
        reason = "shared with the host, which sends what the init receives"
    )
)]
mod protocol;
mod root;
mod sys;

use protocol::{HostMessage, InitMessage, Start};
use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

/// How often the host hears that the lab runs.
const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// Looks at the number of remembered files: in this time the lab meets a few hundred new ones.
const FILES_LOOK_EVERY: Duration = Duration::from_millis(200);
/// Open files that processes of the lab may have.
const OPEN_FILES_MAX: u64 = 1 << 20;

/// Writing half of the control port; whole messages under the lock.
#[derive(Clone)]
struct Control(Arc<Mutex<File>>);

impl Control {
    fn send(&self, message: &InitMessage) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = message.write(&mut *file) {
            eprintln!("thaw-lab-init: control port: {error}");
        }
    }
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("probe") {
        std::process::exit(i32::from(!probe::run()));
    }
    if std::process::id() != 1 {
        eprintln!("thaw-lab-init is the init of Thaw's lab, or with `probe` a test of /dev/kvm");
        std::process::exit(2);
    }
    if let Err(error) = serve() {
        eprintln!("thaw-lab-init: {error}");
    }
    // An init that ends panics the kernel; the host ends QEMU once it has heard the result.
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn serve() -> io::Result<()> {
    let _held = boot::boot()?;
    let mut incoming = File::options()
        .read(true)
        .write(true)
        .open(boot::port(protocol::CONTROL_PORT)?)?;
    let control = Control(Arc::new(Mutex::new(incoming.try_clone()?)));
    let ports = Ports::open()?;
    control.send(&InitMessage::Booted);
    let start = loop {
        if let HostMessage::Start(start) = HostMessage::read(&mut incoming)? {
            break start;
        }
    };
    if let Err(why) = prepare(&start) {
        control.send(&InitMessage::Failed(126, why));
        return Ok(());
    }
    let files_max = start.shared_files_max;
    thread::spawn(move || limit_remembered_files(files_max));
    control.send(&InitMessage::Started);
    match spawn(&start) {
        Ok(child) => run(child, ports, incoming, &control),
        Err(error) => {
            let code = if error.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            };
            let shown = start
                .command
                .first()
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .unwrap_or_default();
            control.send(&InitMessage::Failed(code, format!("{shown}: {error}")));
        }
    }
    Ok(())
}

/// Makes the kernel forget files before the daemon that serves them runs out of descriptors: it holds one for each remembered file, and
/// may be limited to a few thousand.
fn limit_remembered_files(files_max: u64) {
    let wanted = files_max / 2;
    let mut floor = 0; // in use, whatever is dropped
    loop {
        thread::sleep(FILES_LOOK_EVERY);
        let all = fs::read_to_string("/proc/sys/fs/inode-nr").unwrap_or_default();
        if number_in(&all, 0) < wanted {
            continue; // the usual case, and cheap
        }
        // Documentation/admin-guide/sysctl/vm.rst: 2 drops what nothing uses, 3 also cached contents, which keep files remembered.
        for drop in ["2", "3"] {
            if remembered_files() > wanted.max(floor + files_max / 10) {
                let _ = fs::write("/proc/sys/vm/drop_caches", drop);
                floor = remembered_files();
            }
        }
    }
}

/// Files of the shared file system that the kernel remembers (slabinfo(5)).
fn remembered_files() -> u64 {
    let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    slabs
        .lines()
        .find(|line| line.starts_with("fuse_inode "))
        .map_or(0, |line| number_in(line, 1))
}

fn number_in(line: &str, at: usize) -> u64 {
    line.split_whitespace()
        .nth(at)
        .and_then(|word| word.parse().ok())
        .unwrap_or_default()
}

/// The stream ports. Opened before the state is saved: nothing is left to do on resume.
struct Ports {
    stdin: File,
    stdout: File,
    stderr: File,
}

impl Ports {
    fn open() -> io::Result<Self> {
        let open = |name| {
            boot::port(name).and_then(|path| File::options().read(true).write(true).open(path))
        };
        Ok(Self {
            stdin: open(protocol::STDIN_PORT)?,
            stdout: open(protocol::STDOUT_PORT)?,
            stderr: open(protocol::STDERR_PORT)?,
        })
    }
}

fn prepare(start: &Start) -> Result<(), String> {
    sys::set_clock(start.unix_nanos).map_err(|error| format!("clock: {error}"))?;
    reseed(&start.entropy).map_err(|error| format!("entropy: {error}"))?;
    sys::allow_open_files(OPEN_FILES_MAX).map_err(|error| format!("open files: {error}"))?;
    root::enter(start)?;
    let cwd = Path::new(OsStr::from_bytes(&start.cwd));
    if fs::metadata(cwd).is_ok_and(|found| found.is_dir()) {
        Ok(())
    } else {
        Err(format!("no folder {}", cwd.display()))
    }
}

/// Credits fresh entropy and makes the kernel's generator start over from it (random(4)).
fn reseed(entropy: &[u8]) -> io::Result<()> {
    let random = File::options().write(true).open("/dev/urandom")?;
    let count = i32::try_from(entropy.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut request = (count * 8).to_le_bytes().to_vec(); // struct rand_pool_info: bits, bytes, data
    request.extend(count.to_le_bytes());
    request.extend(entropy);
    sys::ioctl_buffer(&random, 0x4008_5203, &mut request)?; // RNDADDENTROPY
    sys::ioctl_number(&random, 0x5207, 0).map(drop) // RNDRESEEDCRNG
}

fn spawn(start: &Start) -> io::Result<Child> {
    let (program, arguments) = start
        .command
        .split_first()
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .args(arguments.iter().map(|word| OsStr::from_bytes(word)))
        .env_clear();
    for pair in &start.env {
        let at = pair
            .iter()
            .position(|&byte| byte == b'=')
            .unwrap_or(pair.len());
        let value = pair.get(at + 1..).unwrap_or_default();
        command.env(OsStr::from_bytes(&pair[..at]), OsStr::from_bytes(value));
    }
    command
        .current_dir(OsStr::from_bytes(&start.cwd))
        .process_group(0);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Passes streams and signals until the command ends, then ends whatever it left behind.
fn run(mut child: Child, ports: Ports, incoming: File, control: &Control) {
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    let outputs = [
        child
            .stdout
            .take()
            .map(|pipe| send_stream(pipe, ports.stdout)),
        child
            .stderr
            .take()
            .map(|pipe| send_stream(pipe, ports.stderr)),
    ];
    if let Some(mut pipe) = child.stdin.take() {
        let mut port = ports.stdin;
        thread::spawn(move || protocol::copy_from_chunks(&mut port, &mut pipe));
    }
    thread::spawn(move || pass_signals(incoming, pid));
    let alive = control.clone();
    thread::spawn(move || {
        loop {
            alive.send(&InitMessage::Alive);
            thread::sleep(ALIVE_EVERY);
        }
    });
    let mut code = 125;
    while let Some((ended, status)) = sys::wait_any() {
        if ended == pid {
            code = exit_code(status);
            let _ = sys::kill(-1, sys::SIGKILL); // every process but this one; fails when there is none
        }
    }
    for output in outputs.into_iter().flatten() {
        let _ = output.join(); // the streams end with the last process
    }
    sys::sync();
    control.send(&InitMessage::Exited(code));
}

fn send_stream(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
) -> JoinHandle<()> {
    thread::spawn(move || {
        if let Err(error) = protocol::copy_into_chunks(&mut from, &mut to) {
            eprintln!("thaw-lab-init: stream: {error}");
        }
    })
}

fn pass_signals(mut incoming: File, group: i32) {
    while let Ok(message) = HostMessage::read(&mut incoming) {
        if let HostMessage::Signal(signal) = message {
            let _ = sys::kill(-group, signal); // the command may just have ended
        }
    }
}

/// Exit code as a shell gives it. Layout of the status: wait(2).
fn exit_code(status: i32) -> i32 {
    if status & 0x7f == 0 {
        (status >> 8) & 0xff
    } else {
        128 + (status & 0x7f)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exit_codes_are_those_of_a_shell() {
        assert_eq!(super::exit_code(3 << 8), 3);
        assert_eq!(super::exit_code(15), 143);
        assert_eq!(super::exit_code(9 | 0x80), 137);
    }
}
