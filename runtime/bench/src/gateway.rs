//! The gateway's own share of a request: a real `thaw up` on one processor, monitors that answer at once
//! ([`crate::instant`]) and clients on the others.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;
use serde_json::Value;

use crate::bare;
use crate::instant::{GATEWAY_CPU, PLAYED_NAME, leave_gateway_cpu};

/// The function that `thaw up --example` deploys.
const FUNCTION: &str = "hello";
const BODY: &str = "{\"bench\":true}";
/// Folders of THAW_HOME that guests boot from; the gateway finds them made and makes nothing.
const IMAGE_FOLDERS: [&str; 5] = ["kernel", "initramfs", "images", "overlay", "cache"];
/// Length of a tick in /proc, milliseconds: USER_HZ is 100 on x86-64, whatever the kernel's own HZ (time(7)).
const TICK_MS: u64 = 10;
/// Longest wait for the example to be deployed.
const START_LIMIT: Duration = Duration::from_secs(60);
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
#[derive(Clone, Debug, Default, Serialize)]
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
    /// The same of the client, its start included, microseconds.
    pub client_cpu_us: f64,
    /// The same of the monitors, microseconds.
    pub monitors_cpu_us: f64,
}

impl Step {
    fn charge(&mut self, spent: &Spent, good: f64) {
        let each = |spent: Duration| spent.as_secs_f64() / good * 1e6;
        self.gateway_cpu_us = each(spent.gateway);
        self.per_gateway_core_second = 1e6 / self.gateway_cpu_us.max(1e-3);
        self.client_cpu_us = each(spent.clients);
        self.monitors_cpu_us = each(spent.monitors);
    }
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
    steps.push(gateway.bare_step(plan, &invoke)?);
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
    address: String,
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
            address: format!("127.0.0.1:{port}"),
        };
        let (told, is_up) = mpsc::channel();
        thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().take(LINES_MAX).flatten();
            // Nobody waits any more: no harm.
            let _ = told.send(lines.any(|line| line.contains("/fn/hello/")));
        });
        match is_up.recv_timeout(START_LIMIT) {
            Ok(true) => Ok(gateway),
            _ => bail!("the gateway did not come up: its own words are above"),
        }
    }

    fn step(
        &mut self,
        plan: &Plan,
        path: &str,
        body: Option<&str>,
        clients: u32,
    ) -> anyhow::Result<Step> {
        let before = Spent::now(&self.process)?;
        let mut load = Command::new(plan.installation.join("thaw-loadtest"));
        load.args(["--json", "-c", &clients.to_string()]);
        load.args(["-n", &(plan.requests / clients).max(1).to_string()]);
        if let Some(body) = body {
            load.args(["--data", body, "--expect", "bench"]);
        }
        let told = load
            .arg(format!("http://{}{path}", self.address))
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run the load test")?;
        let report: Value = serde_json::from_slice(&told.stdout).with_context(|| {
            format!(
                "the load test says {}",
                String::from_utf8_lossy(&told.stdout)
            )
        })?;
        let spent = Spent::now(&self.process)?.since(&before);
        let number = |name: &str| report[name].as_f64().unwrap_or(0.0);
        let good = number("good");
        ensure!(good > 0.0, "no good answer from {path}: {report}");
        let mut step = Step {
            clients,
            path: path.to_owned(),
            per_second: number("per_second"),
            starts: report["starts"].clone(),
            errors: report["errors"].clone(),
            ..Step::default()
        };
        step.charge(&spent, good);
        Ok(step)
    }

    /// One client again, which is this process ([`bare`]).
    fn bare_step(&self, plan: &Plan, path: &str) -> anyhow::Result<Step> {
        let before = Spent::now(&self.process)?;
        let began = Instant::now();
        let series = bare::run(&self.address, path, BODY, plan.requests)?;
        let (took, spent) = (began.elapsed(), Spent::now(&self.process)?.since(&before));
        let ms = |us: f64| us / 1000.0;
        let starts = series.figures().into_iter().map(|(start, figures)| {
            let figures = serde_json::json!({
                "count": figures.count,
                "p50_ms": ms(figures.p50_us),
                "p90_ms": ms(figures.p90_us),
                "p99_ms": ms(figures.p99_us),
            });
            (start, figures)
        });
        let mut step = Step {
            clients: 1,
            path: "the same, bare client".into(),
            per_second: f64::from(plan.requests) / took.as_secs_f64(),
            starts: Value::Object(starts.collect()),
            ..Step::default()
        };
        step.charge(&spent, f64::from(plan.requests));
        Ok(step)
    }

    fn end(mut self) -> anyhow::Result<()> {
        kill_process(pid(&self.process)?, Signal::TERM).context("cannot stop the gateway")?;
        let began = Instant::now();
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

/// Processor time so far.
struct Spent {
    gateway: Duration,
    /// This process, and load tests that have ended: no other child of it ends before the gateway.
    clients: Duration,
    /// The gateway's children.
    monitors: Duration,
}

impl Spent {
    fn now(gateway: &Child) -> anyhow::Result<Self> {
        let read = |process: &str| {
            let path = format!("/proc/{process}/stat");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            times(&text).with_context(|| format!("cannot understand {path}"))
        };
        let pid = gateway.id().to_string();
        let (own, this) = (read(&pid)?, read("self")?);
        let mut monitors = own.ended_children;
        for process in fs::read_dir("/proc")? {
            let name = process?.file_name();
            // What is no process, or has ended meanwhile, is no monitor.
            let Ok(times) = read(&name.to_string_lossy()) else {
                continue;
            };
            if times.parent == pid {
                monitors += times.own;
            }
        }
        Ok(Self {
            gateway: own.own,
            clients: this.own + this.ended_children,
            monitors,
        })
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            gateway: self.gateway.saturating_sub(earlier.gateway),
            clients: self.clients.saturating_sub(earlier.clients),
            monitors: self.monitors.saturating_sub(earlier.monitors),
        }
    }
}

/// What /proc/PID/stat tells: the parent (field 4), user and system time of all threads (14 and 15), and of children that
/// were waited for (16 and 17), in clock ticks (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Times {
    parent: String,
    own: Duration,
    ended_children: Duration,
}

fn times(stat: &str) -> Option<Times> {
    // The name may hold spaces and parentheses: fields are counted from behind it.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace();
    let parent = fields.nth(1)?.to_owned();
    let mut fields = fields.skip(9).map(|field| field.parse::<u64>().ok());
    let mut two = || {
        Some(Duration::from_millis(
            (fields.next()?? + fields.next()??) * TICK_MS,
        ))
    };
    Some(Times {
        parent,
        own: two()?,
        ended_children: two()?,
    })
}

impl Findings {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:<46}{:>8}{:>8}{:>10}{:>10}{:>10}{:>10}{:>12}{:>14}{:>11}{:>13}\n",
            "",
            "clients",
            "answers",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "a second",
            "CPU µs each",
            "a core-second",
            "client µs",
            "monitors µs"
        );
        for step in &self.steps {
            let starts = step.starts.as_object().into_iter().flatten();
            for (start, figures) in starts {
                let ms = |name: &str| figures[name].as_f64().unwrap_or(0.0);
                text += &format!(
                    "{:<46}{:>8}{:>8}{:>10.3}{:>10.3}{:>10.3}{:>10.0}{:>12.1}{:>14.0}{:>11.1}{:>13.1}\n",
                    format!("{} {start}", step.path),
                    step.clients,
                    figures["count"],
                    ms("p50_ms"),
                    ms("p90_ms"),
                    ms("p99_ms"),
                    step.per_second,
                    step.gateway_cpu_us,
                    step.per_gateway_core_second,
                    step.client_cpu_us,
                    step.monitors_cpu_us
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
        let stat = "7 (a) b ( c) S 3 1 1 0 -1 4 1 0 0 0 120 34 5 1 20 0 1 0 5 6 7";
        let told = Times {
            parent: "3".into(),
            own: Duration::from_millis(1540),
            ended_children: Duration::from_millis(60),
        };
        assert_eq!(times(stat), Some(told));
        assert_eq!(times("7 (a) S 1"), None);
    }
}
