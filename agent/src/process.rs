//! The runtime process: found, started unprivileged, reaped.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use thaw_agent_protocol::RuntimeExitCause;

use crate::output::WritingEnds;
use crate::sys::{self, Program, User};

/// How the agent runs processes here.
#[derive(Clone, Debug)]
pub struct Host {
    /// The user that the runtime becomes; `None` leaves it the agent's own (tests without privilege).
    pub user: Option<User>,
    /// The runtime's working directory.
    pub task_root: PathBuf,
    /// Whose children the agent waits for.
    pub reap: Reap,
}

/// Whose children the agent waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reap {
    /// Every process that loses its parent: the agent is PID 1.
    Everyone,
    /// Only the runtime.
    Runtime,
}

/// The running runtime.
#[derive(Debug)]
pub(crate) struct Runtime {
    pid: Pid,
    oom_kills_at_start: u64,
    ended: bool,
}

/// Chooses the program to run: the first that exists and may be executed.
///
/// # Errors
/// What the function's owner is told.
pub(crate) fn find_bootstrap(candidates: &[String]) -> Result<&str, String> {
    let mut unfit = None;
    for path in candidates {
        match fs::metadata(path) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => {
                return Ok(path);
            }
            Ok(found) if found.is_file() => unfit = unfit.or(Some(path)),
            _ => {}
        }
    }
    Err(match unfit {
        Some(path) => exec_failure(path, &io::Error::from_raw_os_error(libc::EACCES)),
        None => format!(
            "Couldn't find valid bootstrap(s): [{}]",
            candidates.join(" ")
        ),
    })
}

/// The words in which Lambda reports a failed exec.
fn exec_failure(path: &str, error: &io::Error) -> String {
    let reason = match error.raw_os_error() {
        Some(libc::EACCES) => "permission denied".to_owned(),
        Some(libc::ENOEXEC) => "exec format error".to_owned(),
        Some(libc::ENOENT) => "no such file or directory".to_owned(),
        _ => error.to_string(),
    };
    format!("fork/exec {path}: {reason}")
}

impl Runtime {
    /// Starts `bootstrap` with exactly this environment.
    ///
    /// # Errors
    /// What the function's owner is told.
    pub(crate) fn start(
        bootstrap: &str,
        environment: &BTreeMap<String, String>,
        host: &Host,
        output: WritingEnds,
    ) -> Result<Self, String> {
        let oom_kills_at_start = oom_kills();
        let program = Program::new(bootstrap, environment.iter())
            .map_err(|error| format!("environment of {bootstrap}: {error}"))?;
        let mut command = sys::confined(program, host.user);
        command
            .current_dir(&host.task_root)
            .stdin(Stdio::null())
            .stdout(output.stdout)
            .stderr(output.stderr);
        let child = command
            .spawn()
            .map_err(|error| exec_failure(bootstrap, &error))?;
        // Dropping the handle neither waits for the child nor ends it; `reap` does the waiting.
        let pid = Pid::from_child(&child);
        Ok(Self {
            pid,
            oom_kills_at_start,
            ended: false,
        })
    }

    /// Waits for every child that ended, without blocking; says how the runtime ended if it is among them.
    pub(crate) fn reap(&mut self, reap: Reap) -> Option<RuntimeExitCause> {
        let mut cause = None;
        let mut reaped = |status: WaitStatus| {
            cause = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Some(RuntimeExitCause::Code(code)),
                (None, Some(signal)) => Some(RuntimeExitCause::Signal(signal)),
                (None, None) => None,
            };
        };
        match reap {
            Reap::Runtime => {
                if let Ok(Some((_, status))) =
                    rustix::process::waitpid(Some(self.pid), WaitOptions::NOHANG)
                {
                    reaped(status);
                }
            }
            // Bounded by the number of processes in the guest.
            Reap::Everyone => {
                while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                    if pid == self.pid {
                        reaped(status);
                    }
                }
            }
        }
        self.ended |= cause.is_some();
        cause
    }

    /// The runtime was found ended by [`Self::reap`].
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Sends a signal to the runtime's process group. That it is gone already is no failure.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }

    /// The kernel's out-of-memory killer struck since the runtime started.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        oom_kills() > self.oom_kills_at_start
    }
}

/// The `oom_kill` counter of /proc/vmstat; 0 where it cannot be read.
fn oom_kills() -> u64 {
    let vmstat = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    vmstat
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_executable_is_chosen() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let candidates = [path("absent"), path("plain"), path("folder"), path("good")];
        assert!(
            find_bootstrap(&candidates)
                .unwrap_err()
                .starts_with("Couldn't find valid bootstrap(s): [/")
        );
        fs::write(path("plain"), "").unwrap();
        fs::create_dir(path("folder")).unwrap();
        assert_eq!(
            find_bootstrap(&candidates).unwrap_err(),
            format!("fork/exec {}: permission denied", path("plain"))
        );
        fs::write(path("good"), "").unwrap();
        fs::set_permissions(path("good"), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_bootstrap(&candidates).unwrap(), path("good"));
    }

    #[test]
    fn missing_bootstraps_are_reported_in_lambdas_words() {
        let candidates = ["/x/bootstrap".to_owned(), "/y/bootstrap".to_owned()];
        assert_eq!(
            find_bootstrap(&candidates).unwrap_err(),
            "Couldn't find valid bootstrap(s): [/x/bootstrap /y/bootstrap]"
        );
    }
}
