//! A process in a cell tries to get out, as root and as an ordinary user.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::ptr;

use serde::Deserialize;

/// A user without a name, as which an ordinary user's gateway is played.
const SOMEBODY: u32 = 61_234;
/// What a kernel may refuse root, too: lockdown, `kernel.kexec_load_disabled`, another architecture.
const PERHAPS_REFUSED_TO_ROOT: [&str; 3] = [
    "load a new kernel",
    "reach hardware",
    "load a kernel module",
];

#[derive(Debug, Deserialize)]
struct Report {
    reduced: Vec<String>,
    in_the_open: BTreeMap<String, Option<String>>,
    jailed: BTreeMap<String, Option<String>>,
    left: Vec<String>,
}

/// What there is to be reached.
struct World {
    folder: tempfile::TempDir,
    bystander: Child,
    segment: i32,
    _listeners: (TcpListener, UnixListener, UnixListener),
    outside: serde_json::Value,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let public =
            |path: &PathBuf, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        public(&folder.path().to_owned(), 0o755);
        let (file, socket) = (folder.path().join("file"), folder.path().join("socket"));
        fs::write(&file, "the host's").unwrap();
        public(&file, 0o644);
        let name = format!("{}", folder.path().display());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = UnixListener::bind(&socket).unwrap();
        public(&socket, 0o777);
        // SAFETY: a new segment of one page, which is removed with this.
        let segment = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, 0o666) };
        assert!(segment >= 0, "{}", io::Error::last_os_error());
        // With no stream of the test's, or a bystander that was left would hold up who reads them.
        let bystander = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let outside = serde_json::json!({
            "pid": bystander.id(), "port": tcp.local_addr().unwrap().port(), "socket": socket,
            "name": name, "segment": segment, "file": file,
        });
        let listeners = (tcp, unix, UnixListener::bind_addr(&abstract_name).unwrap());
        Self {
            folder,
            bystander,
            segment,
            _listeners: listeners,
            outside,
        }
    }

    /// The program where everybody may run it: the folder that it was built in may be closed to others.
    fn artist(&self) -> PathBuf {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().unwrap().parent().unwrap();
        let built = profile.join("examples/escape-artist");
        let copy = self.folder.path().join("artist");
        // By another process: one that this one starts elsewhere would inherit the descriptor that writes it, and nobody could run it.
        let copied = Command::new("cp").arg(built).arg(&copy).status().unwrap();
        assert!(copied.success());
        copy
    }

    fn report(&self, user: Option<u32>) -> Report {
        let mut command = Command::new(self.artist());
        command.args(["warden", &self.outside.to_string()]);
        command.args(user.map(|user| user.to_string()));
        command.env("TMPDIR", "/tmp");
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().unwrap();
        assert!(
            status.success(),
            "{status}: {}",
            String::from_utf8_lossy(&stderr)
        );
        serde_json::from_slice(&stdout).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.bystander.kill();
        let _ = self.bystander.wait();
        // SAFETY: the segment is ours.
        unsafe { libc::shmctl(self.segment, libc::IPC_RMID, ptr::null_mut()) };
    }
}

/// Those that came through.
fn through(outcomes: &BTreeMap<String, Option<String>>) -> Vec<&str> {
    let through = outcomes.iter().filter(|(_, held)| held.is_none());
    through.map(|(name, _)| name.as_str()).collect()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What comes through where there are no cgroups, which a user has from a service manager, if at all.
fn expected(report: &Report) -> &'static [&'static str] {
    match report
        .reduced
        .iter()
        .any(|line| line.starts_with("cgroup:"))
    {
        true => &["fill the memory"],
        false => &[],
    }
}

#[test]
fn nothing_gets_out_of_a_complete_jail() {
    // Root's is; somebody else's is as complete as it can be.
    let report = World::new().report(Some(SOMEBODY).filter(|_| !is_root()));
    if is_root() {
        // Else the attempts would prove nothing.
        let stopped = report.in_the_open.iter().filter(|(_, held)| held.is_some());
        let stopped: Vec<_> = stopped
            .filter(|(name, _)| !PERHAPS_REFUSED_TO_ROOT.contains(&name.as_str()))
            .collect();
        assert!(stopped.is_empty(), "{stopped:?}");
        assert_eq!(through(&report.jailed), [""; 0], "{report:?}");
    }
    assert!(report.jailed.len() >= 20);
    assert_eq!(through(&report.jailed), expected(&report), "{report:?}");
    assert!(report.left.is_empty(), "{report:?}");
}

#[test]
fn nothing_gets_out_of_an_ordinary_users_jail() {
    let report = World::new().report(Some(SOMEBODY));
    assert_eq!(through(&report.jailed), expected(&report), "{report:?}");
    // It has no second user, and says so.
    let said = report
        .reduced
        .iter()
        .any(|line| line.starts_with("user of its own"));
    assert!(said, "{:?}", report.reduced);
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_told() {
    let output = Command::new(World::new().artist())
        .arg("filtered")
        .output()
        .unwrap();
    assert_eq!(
        output.status.code(),
        Some(thaw_jail::seccomp::VIOLATION_EXIT_CODE)
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    let told = format!(
        "system call {} is forbidden to thread artist\n",
        libc::SYS_getppid
    );
    assert_eq!(String::from_utf8_lossy(&output.stderr), told);
}
