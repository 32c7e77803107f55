//! The gateway's own share of a request: a real `thaw up` on one processor, monitors that answer at once
//! ([`crate::instant`]) and clients on the others.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;
use serde_json::Value;

use crate::instant::{GATEWAY_CPU, PLAYED_NAME, leave_gateway_cpu};

/// The function that `thaw up --example` deploys.
const FUNCTION: &str = "hello";
const BODY: &str = "{\"bench\":true}";
/// Folders of THAW_HOME that guests boot from; the gateway finds them made and makes nothing.
const IMAGE_FOLDERS: [&str; 5] = ["kernel", "initramfs", "images", "overlay", "cache"];
/// Length of a tick in /proc, milliseconds: USER_HZ is 100 on x86-64, whatever the kernel's own HZ (time(7)).
const TICK_MS: u64 = 10;
/// Longest wait for an orderly end.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Lines that the gateway prints before the one that says how to call the function.
const LINES_MAX: usize = 100;

/// What to measure, and with what.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Folder of `thaw`, `thaw-loadtest` and `guest/`.
    pub installation: PathBuf,
    /// A THAW_HOME with images in it; nothing of it is changed.
    pub home: PathBuf,
    /// The example function's folder.
    pub example: PathBuf,
    /// Requests of each step.
    pub requests: u32,
    /// Clients at the same time, step by step.
    pub clients: Vec<u32>,
}

/// One step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Clients at the same time.
    pub clients: u32,
    /// What was called.
    pub path: String,
    /// Good answers a second, whatever limited them.
    pub per_second: f64,
    /// The whole round trip as the client sees it, milliseconds; by the start of the sandbox.
    pub starts: Value,
    /// Bad answers, by kind.
    pub errors: Value,
    /// Time that the gateway's threads ran, for each good answer, microseconds.
    pub gateway_cpu_us: f64,
    /// Good answers for each second that the gateway's threads ran.
    pub per_gateway_core_second: f64,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// The steps.
    pub steps: Vec<Step>,
    /// Others' work on this machine while it was measured: /proc/loadavg before and after.
    pub load_average: [String; 2],
}

/// Starts the gateway, does all steps, ends it.
///
/// # Errors
/// The gateway does not come up, or the load test cannot run.
pub fn run(plan: &Plan) -> anyhow::Result<Findings> {
    let before = load_average();
    let scratch = tempfile::tempdir_in(&plan.home).context("cannot make a folder")?;
    let mut gateway = Gateway::start(plan, scratch.path())?;
    leave_gateway_cpu().context("cannot leave the gateway's processor")?;
    let mut steps = Vec::new();
    // What no sandbox is needed for, as a measure of HTTP itself.
    steps.push(gateway.step(plan, "/healthz", None, 1)?);
    let invoke = format!("/2015-03-31/functions/{FUNCTION}/invocations");
    gateway.step(plan, &invoke, Some(BODY), 1)?;
    for clients in &plan.clients {
        steps.push(gateway.step(plan, &invoke, Some(BODY), *clients)?);
    }
    gateway.end()?;
    Ok(Findings {
        steps,
        load_average: [before, load_average()],
    })
}

fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.trim().to_owned()
}

struct Gateway {
    process: Child,
    url: String,
}

impl Gateway {
    fn start(plan: &Plan, scratch: &Path) -> anyhow::Result<Self> {
        let (programs, home) = (scratch.join("bin"), scratch.join("home"));
        install(plan, &programs)?;
        fs::create_dir(&home)?;
        for folder in IMAGE_FOLDERS {
            let from = plan.home.join(folder);
            if from.exists() {
                symlink(&from, home.join(folder)).context("cannot link the images")?;
            }
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut process = Command::new(programs.join("thaw"))
            .args(["--home".as_ref(), home.as_os_str()])
            .args(["up", "--lab", "never", "--listen"])
            .arg(format!("127.0.0.1:{port}"))
            .args(["--example".as_ref(), plan.example.as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the gateway")?;
        // Before its threads are made: they inherit it, and the runtime counts its processors by it.
        let mut cpus = CpuSet::new();
        cpus.set(GATEWAY_CPU);
        sched_setaffinity(Some(pid(&process)?), &cpus).context("cannot place the gateway")?;
        let stdout = process.stdout.take().context("no output")?;
        let gateway = Self {
            process,
            url: format!("http://127.0.0.1:{port}"),
        };
        for line in BufReader::new(stdout).lines().take(LINES_MAX) {
            if line?.contains("/fn/hello/") {
                return Ok(gateway);
            }
        }
        bail!("the gateway did not come up: its own words are above")
    }

    fn step(
        &mut self,
        plan: &Plan,
        path: &str,
        body: Option<&str>,
        clients: u32,
    ) -> anyhow::Result<Step> {
        let before = cpu_time(&self.process)?;
        let mut load = Command::new(plan.installation.join("thaw-loadtest"));
        load.args(["--json", "-c", &clients.to_string()]);
        load.args(["-n", &(plan.requests / clients).max(1).to_string()]);
        if let Some(body) = body {
            load.args(["--data", body, "--expect", "bench"]);
        }
        let told = load
            .arg(format!("{}{path}", self.url))
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run the load test")?;
        let report: Value = serde_json::from_slice(&told.stdout).with_context(|| {
            format!(
                "the load test says {}",
                String::from_utf8_lossy(&told.stdout)
            )
        })?;
        let ran = cpu_time(&self.process)?
            .saturating_sub(before)
            .as_secs_f64();
        let number = |name: &str| report[name].as_f64().unwrap_or(0.0);
        let good = number("good");
        ensure!(good > 0.0, "no good answer from {path}: {report}");
        Ok(Step {
            clients,
            path: path.to_owned(),
            per_second: number("per_second"),
            starts: report["starts"].clone(),
            errors: report["errors"].clone(),
            gateway_cpu_us: ran / good * 1e6,
            per_gateway_core_second: good / ran.max(1e-9),
        })
    }

    fn end(mut self) -> anyhow::Result<()> {
        kill_process(pid(&self.process)?, Signal::TERM).context("cannot stop the gateway")?;
        let began = std::time::Instant::now();
        while self.process.try_wait()?.is_none() {
            ensure!(began.elapsed() < END_LIMIT, "the gateway does not stop");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An installation whose monitor is this program.
fn install(plan: &Plan, programs: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(programs.join("guest"))?;
    let this = std::env::current_exe().context("cannot tell where this program is")?;
    let from = [
        (plan.installation.join("thaw"), "thaw"),
        (this, PLAYED_NAME),
        (
            plan.installation.join("guest/thaw-agent"),
            "guest/thaw-agent",
        ),
    ];
    for (program, name) in from {
        fs::copy(&program, programs.join(name))
            .with_context(|| format!("cannot copy {}", program.display()))?;
    }
    Ok(())
}

fn pid(process: &Child) -> anyhow::Result<Pid> {
    let raw = i32::try_from(process.id())?;
    Pid::from_raw(raw).context("no process")
}

/// User and system time of all threads of a process: fields 14 and 15 of /proc/PID/stat, in clock ticks (proc(5)).
fn cpu_time(process: &Child) -> anyhow::Result<Duration> {
    let path = format!("/proc/{}/stat", process.id());
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("cannot understand {path}"))?;
    Ok(Duration::from_millis(ticks * TICK_MS))
}

fn ticks(stat: &str) -> Option<u64> {
    // The name may hold spaces and parentheses: fields are counted from behind it.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

impl Findings {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:<46}{:>8}{:>10}{:>10}{:>11}{:>12}{:>14}\n",
            "", "clients", "p50 ms", "p99 ms", "a second", "CPU µs each", "a core-second"
        );
        for step in &self.steps {
            let starts = step.starts.as_object().into_iter().flatten();
            for (start, figures) in starts {
                let ms = |name: &str| figures[name].as_f64().unwrap_or(0.0);
                text += &format!(
                    "{:<46}{:>8}{:>10.3}{:>10.3}{:>11.0}{:>12.1}{:>14.0}\n",
                    format!("{} {start}", step.path),
                    step.clients,
                    ms("p50_ms"),
                    ms("p99_ms"),
                    step.per_second,
                    step.gateway_cpu_us,
                    step.per_gateway_core_second
                );
            }
            if step
                .errors
                .as_object()
                .is_some_and(|errors| !errors.is_empty())
            {
                text += &format!("  errors: {}\n", step.errors);
            }
        }
        let [before, after] = &self.load_average;
        text + &format!("load average: {before} before, {after} after\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found_behind_a_hostile_name() {
        let stat = "7 (a) b ( c) S 1 1 1 0 -1 4 1 0 0 0 120 34 0 0 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(154));
        assert_eq!(ticks("7 (a) S 1"), None);
    }
}
