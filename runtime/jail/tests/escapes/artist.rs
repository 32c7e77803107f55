//! A process that tries to get out, and the warden that puts it into cells: what `tests/escapes.rs` runs.
//!
//! `escape-artist warden OUTSIDE [USER]` surveys, as USER (if root starts it) in a user namespace of its own if that is given, and runs every attempt
//! twice: in the open and in a cell. It prints what became of each as JSON.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

mod attempts;

use std::collections::BTreeMap;
use std::process::{Command, ExitCode, Stdio};

use attempts::{ATTEMPTS, Outside};
use serde::{Deserialize, Serialize};
use thaw_jail::seccomp::{Filter, any, report_violations};
use thaw_jail::{JAIL_ARGUMENT, Jailer, Limits, Orders, Owner, SURVEY_ARGUMENT};

const LIMITS: Limits = Limits {
    memory_bytes: 64 << 20,
    tasks: 16,
    cpu_thousandths: 1000,
    io_bytes_per_second: 1 << 30,
};

/// What the warden saw.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// What the jail is without here.
    pub reduced: Vec<String>,
    /// By attempt: why it failed in the open, or nothing if it came through.
    pub in_the_open: BTreeMap<String, Option<String>>,
    /// The same in a cell.
    pub jailed: BTreeMap<String, Option<String>>,
    /// Cgroups that are left when all cells are closed.
    pub left: Vec<String>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [SURVEY_ARGUMENT, orders] => {
            let missing = thaw_jail::survey(&Orders::from_argument(orders).unwrap());
            println!("{}", serde_json::to_string(&missing).unwrap());
        }
        ["warden", outside] => warden(outside),
        ["warden", outside, user] => {
            become_user(user.parse().unwrap());
            thaw_jail::become_root_of_own_namespace().unwrap();
            warden(outside);
        }
        ["filtered"] => filtered(),
        ["try", name, outside] => return attempt(name, outside),
        [JAIL_ARGUMENT, orders, "try", name, outside] => {
            thaw_jail::enter(&Orders::from_argument(orders).unwrap()).unwrap();
            return attempt(name, outside);
        }
        _ => panic!("see the head of this file"),
    }
    ExitCode::SUCCESS
}

fn become_user(user: u32) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    rustix::thread::set_thread_groups(&[]).unwrap();
    let (uid, gid) = (
        rustix::process::Uid::from_raw(user),
        rustix::process::Gid::from_raw(user),
    );
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    // The kernel took it for a set-user-ID program, whose files in /proc are root's.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable).unwrap();
}

fn attempt(name: &str, outside: &str) -> ExitCode {
    let outside: Outside = serde_json::from_str(outside).unwrap();
    let (_, attempt) = ATTEMPTS.iter().find(|(known, _)| *known == name).unwrap();
    match attempt(&outside) {
        Ok(()) => println!("out"),
        Err(error) => println!("held: {error}"),
    }
    ExitCode::SUCCESS
}

/// Makes a call that its filter forbids.
fn filtered() {
    report_violations().unwrap();
    rustix::thread::set_no_new_privs(true).unwrap();
    let allowed = [
        any(libc::SYS_write, "tells of the violation"),
        any(libc::SYS_prctl, "tells its thread's name"),
        any(libc::SYS_exit_group, "ends"),
        any(libc::SYS_sigaltstack, "the standard library's end"),
    ];
    Filter::compile(&[&allowed]).unwrap().apply().unwrap();
    let _ = rustix::process::getppid();
    println!("it was let through");
}

/// What an attempt said: nothing if it came through.
fn outcome(mut command: Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match said.as_str() {
        "out" => None,
        "" => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            Some(format!("{}: {stderr}", output.status))
        }
        held => Some(held.to_owned()),
    }
}

fn warden(outside: &str) {
    let program = std::env::current_exe().unwrap();
    let folder = std::env::temp_dir().join(format!("escapes-{}", std::process::id()));
    let (jailer, reach) = Jailer::survey(&program, Owner::Gateway(&folder)).unwrap();
    let mut report = Report {
        reduced: reach
            .reduced
            .iter()
            .map(|r| format!("{}: {}", r.what, r.reason))
            .collect(),
        ..Report::default()
    };
    for (name, _) in ATTEMPTS {
        let mut command = Command::new(&program);
        command.args(["try", name, outside]);
        let open = outcome(command);
        report.in_the_open.insert((*name).to_owned(), open);
        let cell = jailer.cell(&LIMITS).unwrap();
        let mut command = Command::new(&program);
        command.args([
            JAIL_ARGUMENT,
            &cell.orders.to_argument(),
            "try",
            name,
            outside,
        ]);
        let jailed = std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                jailer.turn_thread();
                outcome(command)
            });
            run.join().unwrap()
        });
        report.jailed.insert((*name).to_owned(), jailed);
        let cgroups = cell.orders.cgroups.clone();
        cell.close().unwrap();
        let left = cgroups.iter().filter(|folder| folder.exists());
        report
            .left
            .extend(left.map(|folder| folder.display().to_string()));
    }
    println!("{}", serde_json::to_string(&report).unwrap());
}
