//! The real lab, end to end: `thaw-lab` as a user runs it.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as its body does")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// One lab takes two processors for itself: tests take turns.
static TURN: Mutex<()> = Mutex::new(());
/// Marks the processes of one test: QEMU and virtiofsd inherit it.
static MARK: AtomicU32 = AtomicU32::new(0);

struct Runner {
    command: Command,
    mark: String,
}

fn lab(options: &[&str], command: &[&str]) -> Runner {
    let mark = format!(
        "{}-{}",
        std::process::id(),
        MARK.fetch_add(1, Ordering::Relaxed)
    );
    let mut lab = Command::new(env!("CARGO_BIN_EXE_thaw-lab"));
    lab.arg("--cache")
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab"));
    lab.args(options)
        .args(["--time-limit", "90", "--"])
        .args(command);
    lab.env("THAW_LAB_TEST", &mark)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Runner { command: lab, mark }
}

impl Runner {
    fn output(mut self) -> Output {
        let output = self.command.output().unwrap();
        assert_eq!(self.left_behind(), Vec::<String>::new());
        output
    }

    /// Starts it and waits until the command says `ready`.
    fn ready(&mut self) -> (Child, BufReader<std::process::ChildStdout>) {
        let mut child = self.command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        (child, stdout)
    }

    /// Names of this runner's processes that still run.
    fn left_behind(&self) -> Vec<String> {
        let wanted = format!("THAW_LAB_TEST={}", self.mark);
        let processes = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let is_ours = |process: &PathBuf| {
            fs::read(process.join("environ")).is_ok_and(|environment| {
                environment
                    .split(|&byte| byte == 0)
                    .any(|pair| pair == wanted.as_bytes())
            })
        };
        processes
            .filter(is_ours)
            .map(|process| fs::read_to_string(process.join("comm")).unwrap_or_default())
            .collect()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder outside /tmp would do as well; /tmp is the harder case.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Streams, exit code, environment, writable and other folders, with a lab that starts as `options` say.
fn command_runs_as_if_it_were_here(options: &[&str]) {
    let _turn = turn();
    let (writable, other) = (folder(), folder());
    fs::write(other.path().join("seen"), "seen").unwrap();
    let script = "test -c /dev/kvm && cat && cat $OTHER/seen && echo err >&2 && echo kept > kept && echo lost > $OTHER/lost && exit 7";
    let path = writable.path().to_str().unwrap();
    let mut runner = lab(&[options, &["-w", path]].concat(), &["sh", "-c", script]);
    runner
        .command
        .current_dir(writable.path())
        .env("OTHER", other.path())
        .stdin(Stdio::piped());
    let mut child = runner.command.spawn().unwrap();
    let input = "0123456789".repeat(50_000);
    let (mut stdin, sent) = (child.stdin.take().unwrap(), input.clone());
    let writer = std::thread::spawn(move || stdin.write_all(sent.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert!(
        text(&output.stdout) == input + "seen",
        "{} bytes",
        output.stdout.len()
    );
    assert!(
        text(&output.stderr).ends_with("err\n"),
        "{}",
        text(&output.stderr)
    );
    assert!(
        !text(&output.stderr).contains("did not"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(
        fs::read_to_string(writable.path().join("kept")).unwrap(),
        "kept\n"
    );
    assert!(!other.path().join("lost").exists());
    assert_eq!(runner.left_behind(), Vec::<String>::new());
}

#[test]
fn command_in_a_resumed_lab_runs_as_if_it_were_here() {
    command_runs_as_if_it_were_here(&[]);
}

#[test]
fn command_in_a_booted_lab_runs_as_if_it_were_here() {
    command_runs_as_if_it_were_here(&["--boot"]);
}

#[test]
fn damaged_saved_state_costs_a_boot_and_is_replaced() {
    let _turn = turn();
    let run = || {
        let output = lab(&[], &["echo", "hello"]).output();
        assert_eq!(text(&output.stdout), "hello\n", "{}", text(&output.stderr));
        text(&output.stderr)
    };
    run();
    let kernels = fs::read_dir(Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab/kernel")).unwrap();
    let folders =
        kernels.flat_map(|kernel| fs::read_dir(kernel.unwrap().path()).into_iter().flatten());
    for state in folders
        .map(|entry| entry.unwrap().path().join("state"))
        .filter(|path| path.exists())
    {
        let bytes = fs::read(&state).unwrap();
        fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    }
    assert_eq!(run().matches("did not resume, booting").count(), 1);
    assert!(run().contains("booting the lab once"));
    assert_eq!(run(), "");
}

#[test]
fn kvm_in_the_lab_is_judged_native() {
    let _turn = turn();
    let output = lab(&[], &[env!("CARGO_BIN_EXE_thaw-lab"), "--doctor"]).output();
    let report = text(&output.stdout);
    assert!(
        report.contains("\"kvm\": \"native\""),
        "{report} {}",
        text(&output.stderr)
    );
}

#[test]
fn resumed_labs_have_the_right_time_and_randomness_of_their_own() {
    let _turn = turn();
    let ask = || {
        let asked = std::time::SystemTime::now();
        let output = lab(
            &[],
            &[
                "sh",
                "-c",
                "date +%s; cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id",
            ],
        )
        .output();
        let lines: Vec<String> = text(&output.stdout).lines().map(str::to_owned).collect();
        let [time, uuid, boot_id] = lines.as_slice() else {
            panic!("{lines:?} {}", text(&output.stderr))
        };
        let asked = asked
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(
            (asked..asked + 90).contains(&time.parse().unwrap()),
            "{time}, {asked}"
        );
        (uuid.clone(), boot_id.clone())
    };
    let (one, two) = (ask(), ask());
    assert!(one.0 != two.0 && one.1 != two.1, "{one:?} {two:?}");
}

#[test]
fn forwarded_port_leads_into_the_lab() {
    let _turn = turn();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let server = "use IO::Socket::INET; $| = 1; my $s = IO::Socket::INET->new(LocalPort => 8080, Listen => 1) or die; \
                  print \"ready\\n\"; my $c = $s->accept; print $c 'hello'; close $c;";
    let mut runner = lab(&["-p", &format!("{port}:8080")], &["perl", "-e", server]);
    let (mut child, _stdout) = runner.ready();
    let mut answer = String::new();
    TcpStream::connect(("127.0.0.1", port))
        .unwrap()
        .read_to_string(&mut answer)
        .unwrap();
    assert_eq!(answer, "hello");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(runner.left_behind(), Vec::<String>::new());
}

#[test]
fn terminated_command_may_clean_up_and_nothing_is_left() {
    let _turn = turn();
    let script = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut runner = lab(&[], &["sh", "-c", script]);
    let (mut child, mut stdout) = runner.ready();
    signal(&child, rustix::process::Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(3));
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "bye\n");
    assert_eq!(runner.left_behind(), Vec::<String>::new());
}

#[test]
fn command_that_ignores_signals_is_ended_after_the_grace_period() {
    let _turn = turn();
    let mut runner = lab(
        &["--grace", "1"],
        &[
            "sh",
            "-c",
            "trap '' TERM; echo ready; while :; do sleep 0.1; done",
        ],
    );
    let (mut child, _stdout) = runner.ready();
    let start = Instant::now();
    signal(&child, rustix::process::Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(137));
    assert!((Duration::from_secs(1)..Duration::from_secs(10)).contains(&start.elapsed()));
    assert_eq!(runner.left_behind(), Vec::<String>::new());
}

#[test]
fn killed_runner_leaves_nothing_running() {
    let _turn = turn();
    let mut runner = lab(&[], &["sh", "-c", "echo ready; sleep 1000"]);
    let (mut child, _stdout) = runner.ready();
    assert!(
        runner.left_behind().len() >= 3,
        "{:?}",
        runner.left_behind()
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    while !runner.left_behind().is_empty() {
        assert!(Instant::now() < end, "{:?}", runner.left_behind());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn time_limit_ends_the_command() {
    let _turn = turn();
    let mut runner = lab(&[], &["sleep", "1000"]);
    runner.command = {
        let mut lab = Command::new(env!("CARGO_BIN_EXE_thaw-lab"));
        lab.arg("--cache")
            .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab"));
        lab.args(["--time-limit", "1", "--", "sleep", "1000"])
            .env("THAW_LAB_TEST", &runner.mark);
        lab
    };
    let output = runner.output();
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
}

#[test]
fn what_cannot_run_is_named() {
    let _turn = turn();
    let output = lab(&[], &["/no/such/program"]).output();
    assert_eq!(output.status.code(), Some(127));
    assert!(
        text(&output.stderr).contains("/no/such/program"),
        "{}",
        text(&output.stderr)
    );
    let output = lab(&["-w", "/no/such/folder"], &["true"]).output();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("/no/such/folder"),
        "{}",
        text(&output.stderr)
    );
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let output = lab(&["-p", &format!("{port}:80")], &["true"]).output();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains(&format!("127.0.0.1:{port}")),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn two_labs_run_at_once() {
    let _turn = turn();
    let run = |code: &str| {
        let mut runner = lab(&[], &["sh", "-c", &format!("echo ready; cat; exit {code}")]);
        runner.command.stdin(Stdio::piped());
        let (child, _) = runner.ready();
        (runner, child)
    };
    let (mut one, mut two) = (run("11"), run("12"));
    for ((runner, child), code) in [(&mut one, 11), (&mut two, 12)] {
        drop(child.stdin.take()); // both were up at the same time
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert_eq!(runner.left_behind(), Vec::<String>::new());
    }
}
