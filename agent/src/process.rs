//! The processes of a sandbox, the runtime and external extensions: found, started unprivileged, reaped.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
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
    /// The working directory of the runtime and of extensions.
    pub task_root: PathBuf,
    /// The folder of the external extensions; it need not exist.
    pub extensions: PathBuf,
    /// Whose children the agent waits for.
    pub reap: Reap,
}

/// Whose children the agent waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reap {
    /// Every process that loses its parent: the agent is PID 1.
    Everyone,
    /// Only those that the agent started.
    Own,
}

/// A running runtime or extension.
#[derive(Debug)]
pub(crate) struct Process {
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

impl Process {
    /// Starts the program at `path` with exactly this environment.
    ///
    /// # Errors
    /// What the function's owner is told.
    pub(crate) fn start(
        path: &str,
        environment: &BTreeMap<String, String>,
        host: &Host,
        output: WritingEnds,
    ) -> Result<Self, String> {
        let oom_kills_at_start = oom_kills();
        let prepared = Program::new(path, environment.iter())
            .map_err(|error| format!("environment of {path}: {error}"))?;
        let mut command = sys::confined(prepared, host.user);
        command
            .current_dir(&host.task_root)
            .stdin(Stdio::null())
            .stdout(output.stdout)
            .stderr(output.stderr);
        let child = command
            .spawn()
            .map_err(|error| exec_failure(path, &error))?;
        // Dropping the handle neither waits for the child nor ends it; `reap` does the waiting.
        let pid = Pid::from_child(&child);
        Ok(Self {
            pid,
            oom_kills_at_start,
            ended: false,
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// It was found ended by [`reap`].
    pub(crate) fn set_ended(&mut self) {
        self.ended = true;
    }

    /// The process was found ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Sends a signal to its process group. That it is gone already is no failure.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }

    /// The most memory that the process had at once, MiB begun (`VmHWM`, proc(5)); 0 if it has ended.
    pub(crate) fn memory_peak_mib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid.as_raw_nonzero());
        let status = fs::read_to_string(path).unwrap_or_default();
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB"));
        let kib: u64 = kib.and_then(|kib| kib.parse().ok()).unwrap_or(0);
        kib.div_ceil(1024)
    }

    /// The kernel's out-of-memory killer struck since it started.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        oom_kills() > self.oom_kills_at_start
    }
}

/// Waits for every child that ended, without blocking; says how those among `own` ended.
pub(crate) fn reap(reap: Reap, own: &[Pid]) -> Vec<(Pid, RuntimeExitCause)> {
    let mut ended = Vec::new();
    let mut reaped = |pid, status: WaitStatus| {
        let cause = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => RuntimeExitCause::Code(code),
            (None, Some(signal)) => RuntimeExitCause::Signal(signal),
            (None, None) => return,
        };
        if own.contains(&pid) {
            ended.push((pid, cause));
        }
    };
    match reap {
        Reap::Own => {
            for pid in own {
                let found = rustix::process::waitpid(Some(*pid), WaitOptions::NOHANG);
                if let Ok(Some((pid, status))) = found {
                    reaped(pid, status);
                }
            }
        }
        // Bounded by the number of processes in the guest.
        Reap::Everyone => {
            while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                reaped(pid, status);
            }
        }
    }
    ended
}

/// The external extensions in `folder`, by name: as on Lambda every file in it is meant to be one, whether it can be
/// executed or not.
pub(crate) fn find_extensions(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let files = entries.flatten().filter(|entry| !entry.path().is_dir());
    let mut names: Vec<String> = files
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The environment of extensions: the runtime's without what concerns the runtime alone (Lambda's developer guide, "Extensions
/// API", environment variables).
pub(crate) fn extension_environment(
    runtime: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    const WITHHELD: [&str; 7] = [
        "AWS_EXECUTION_ENV",
        "AWS_LAMBDA_LOG_GROUP_NAME",
        "AWS_LAMBDA_LOG_STREAM_NAME",
        "AWS_XRAY_CONTEXT_MISSING",
        "AWS_XRAY_DAEMON_ADDRESS",
        "LAMBDA_RUNTIME_DIR",
        "LAMBDA_TASK_ROOT",
    ];
    let is_theirs = |name: &String| !name.starts_with('_') && !WITHHELD.contains(&name.as_str());
    let theirs = runtime.iter().filter(|(name, _)| is_theirs(name));
    theirs
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
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
