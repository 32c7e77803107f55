//! Many clones of one snapshot alive at once: what each costs while it idles, and that each still answers.
//!
//! They are as a pool keeps them: restored, paused, no instruction run since the freeze. Then each is asked once, one after the
//! other, and goes on running, so that in the end all of them run.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use crate::memory::Memory;
use crate::ours::{Monitor, Ours, Vmm};
use crate::report::Host;
use crate::stats::Figures;

/// Clones that tell beforehand what one costs.
const TRIAL: u32 = 4;
/// What must stay free, KiB: the host's kernel and whatever else runs must not reclaim for this.
const RESERVE_KIB: u64 = 256 * 1024;
/// Descriptors of this process for a clone: control socket, agent channel.
const DESCRIPTORS_PER_CLONE: u64 = 2;
/// Descriptors of this process for everything else.
const DESCRIPTORS_ELSE: u64 = 64;
/// How long clones idle before their memory is looked at.
const SETTLE: Duration = Duration::from_secs(1);

/// What to make clones of, and how many.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Guest kernel, ELF vmlinux.
    pub kernel: PathBuf,
    /// Initramfs with `thaw-bench-guest` as init.
    pub initramfs: PathBuf,
    /// Thaw's monitor.
    pub vmm: PathBuf,
    /// Scratch folder: the snapshot.
    pub work: PathBuf,
    /// How many live at once.
    pub clones: u32,
    /// Memory of a guest, MiB.
    pub memory_mib: u32,
}

/// What came out.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How many lived at once.
    pub clones: u32,
    /// How many of them answered.
    pub answered: u32,
    /// Memory of a guest, MiB.
    pub memory_mib: u32,
    /// What this machine says of itself.
    pub host: Host,
    /// Restored and paused.
    pub idle: Shares,
    /// Each has answered once and runs.
    pub used: Shares,
    /// Of the host.
    pub available: Available,
    /// From a monitor's start to its restored, paused VM, one after the other.
    pub made: Option<Figures>,
    /// From the resume of an idle clone to its answer, with all others alive.
    pub answer: Option<Figures>,
}

/// Memory of all clones together and of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shares {
    /// Sum.
    pub all: Memory,
    /// Mean.
    pub one: Memory,
}

/// `MemAvailable` of the host (proc(5)), KiB: what is left without swapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Available {
    /// `MemTotal`.
    pub total_kib: u64,
    /// Before the first clone.
    pub before_kib: u64,
    /// With all of them idle.
    pub idle_kib: u64,
    /// When all had answered.
    pub used_kib: u64,
}

/// Freezes a guest and makes the clones.
///
/// # Errors
/// This host's memory or descriptors will not do, a clone cannot be made, or one does not answer.
pub fn run(plan: &Plan) -> anyhow::Result<Report> {
    descriptors_for(plan.clones)?;
    let ours = Ours {
        vmm: Vmm::new(plan.vmm.clone(), &plan.work)?,
        memory_mib: plan.memory_mib,
        snapshot: plan.work.join("ours.thaw"),
    };
    ours.freeze(&plan.kernel, &plan.initramfs)
        .context("cannot freeze the bench's guest")?;
    let one_kib = trial(&ours)?;
    let before_kib = meminfo_kib("MemAvailable")?;
    check_memory(plan.clones, one_kib, before_kib)?;
    let (mut clones, mut made) = (Vec::new(), Vec::new());
    for number in 1..=plan.clones {
        let began = Instant::now();
        clones.push(make(&ours).with_context(|| format!("clone {number} cannot be made"))?);
        made.push(began.elapsed());
        let left = meminfo_kib("MemAvailable")?;
        ensure!(
            left > RESERVE_KIB,
            "with {number} clones alive only {} MiB are left to this host",
            left / 1024
        );
    }
    thread::sleep(SETTLE);
    let (idle, idle_kib) = (Shares::of(&clones)?, meminfo_kib("MemAvailable")?);
    let mut answers = Vec::new();
    for (number, clone) in (1..).zip(&mut clones) {
        let took = ask(clone).with_context(|| format!("clone {number} does not answer"));
        answers.push(took?);
    }
    thread::sleep(SETTLE);
    Ok(Report {
        clones: plan.clones,
        answered: u32::try_from(answers.len())?,
        memory_mib: plan.memory_mib,
        host: Host::this(),
        idle,
        used: Shares::of(&clones)?,
        available: Available {
            total_kib: meminfo_kib("MemTotal")?,
            before_kib,
            idle_kib,
            used_kib: meminfo_kib("MemAvailable")?,
        },
        made: Figures::of(&made),
        answer: Figures::of(&answers),
    })
}

/// What one clone that has answered takes from the host, KiB: its own pages, and what the kernel keeps for it, which no process's
/// figures have.
fn trial(ours: &Ours) -> anyhow::Result<u64> {
    // The first brings program and snapshot into the page cache.
    ask(&mut make(ours)?)?;
    let before = meminfo_kib("MemAvailable")?;
    let mut clones = Vec::new();
    for _ in 0..TRIAL {
        clones.push(make(ours)?);
    }
    for clone in &mut clones {
        ask(clone)?;
    }
    let fell = before.saturating_sub(meminfo_kib("MemAvailable")?) / u64::from(TRIAL);
    Ok(fell.max(Shares::of(&clones)?.one.private_dirty_kib))
}

fn check_memory(clones: u32, one_kib: u64, available_kib: u64) -> anyhow::Result<()> {
    let needed = one_kib
        .saturating_mul(clones.into())
        .saturating_add(RESERVE_KIB);
    ensure!(
        needed <= available_kib,
        "{clones} clones of {} MiB each need {} MiB with what must stay free, and this host has {} MiB left: \
         make fewer, or give the lab more memory",
        one_kib.div_ceil(1024),
        needed.div_ceil(1024),
        available_kib / 1024
    );
    Ok(())
}

/// Lets this process open what its ends of the clones' sockets need.
fn descriptors_for(clones: u32) -> anyhow::Result<()> {
    let needed = u64::from(clones) * DESCRIPTORS_PER_CLONE + DESCRIPTORS_ELSE;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    ensure!(
        maximum.is_none_or(|maximum| maximum >= needed),
        "{clones} clones need {needed} descriptors and this process may have {}: raise its limit (ulimit -n)",
        maximum.unwrap_or_default()
    );
    let current = Some(needed);
    setrlimit(Resource::Nofile, Rlimit { current, maximum })
        .context("cannot raise the limit of descriptors")
}

fn make(ours: &Ours) -> anyhow::Result<Monitor> {
    let mut clone = ours.shell()?;
    clone.restore(&ours.open()?)?;
    Ok(clone)
}

fn ask(clone: &mut Monitor) -> anyhow::Result<Duration> {
    let began = Instant::now();
    clone.question()?;
    clone.send_resume()?;
    clone.hear()?;
    let took = began.elapsed();
    clone.finish()?;
    Ok(took)
}

fn meminfo_kib(name: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let value = text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?.strip_prefix(':')?;
        rest.trim().strip_suffix(" kB")?.parse().ok()
    });
    value.with_context(|| format!("/proc/meminfo has no {name}"))
}

impl Shares {
    fn of(clones: &[Monitor]) -> anyhow::Result<Self> {
        let all: anyhow::Result<Vec<_>> =
            clones.iter().map(|clone| Memory::of(clone.pid())).collect();
        let all = all?;
        Ok(Self {
            all: Memory::sum(&all),
            one: Memory::mean(&all),
        })
    }
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let out = &mut text;
        // Writing into a string cannot fail.
        let _ = writeln!(
            out,
            "{} clones of one snapshot alive at once, {} MiB each; {} of them answered",
            self.clones, self.memory_mib, self.answered
        );
        let row = |out: &mut String, words: &str, memory: &Memory| {
            let _ = writeln!(
                out,
                "{words:<44}{:>10}{:>14}{:>10}",
                memory.pss_kib, memory.private_dirty_kib, memory.rss_kib
            );
        };
        let _ = writeln!(
            out,
            "\n{:<44}{:>10}{:>14}{:>10}",
            "KiB", "Pss", "private dirty", "Rss"
        );
        row(out, "idle, restored and paused: one", &self.idle.one);
        row(out, "… all", &self.idle.all);
        row(out, "having answered, running: one", &self.used.one);
        row(out, "… all", &self.used.all);
        let mib = |kib: u64| kib / 1024;
        let left = &self.available;
        let _ = writeln!(
            out,
            "\nMiB available to this host: {} of {} before, {} with all idle, {} when all had answered",
            mib(left.before_kib),
            mib(left.total_kib),
            mib(left.idle_kib),
            mib(left.used_kib)
        );
        let _ = writeln!(
            out,
            "\n{:<44}{:>10}{:>10}{:>10}{:>6}",
            "milliseconds", "p50", "p90", "p99", "n"
        );
        let timed = [
            ("monitor's start → restored, paused", &self.made),
            ("resume → answer", &self.answer),
        ];
        for (words, figures) in timed {
            let Some(figures) = figures else { continue };
            let [p50, p90, p99] =
                [figures.p50_us, figures.p90_us, figures.p99_us].map(|micros| micros / 1e3);
            let count = figures.count;
            let _ = writeln!(
                out,
                "{words:<44}{p50:>10.3}{p90:>10.3}{p99:>10.3}{count:>6}"
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_that_would_not_fit_are_refused_with_the_sum() {
        let gib = 1024 * 1024;
        check_memory(200, 4096, gib + 64 * 1024).unwrap();
        let refusal = check_memory(200, 8192, gib).unwrap_err().to_string();
        for part in ["200 clones of 8 MiB", "1856 MiB", "1024 MiB left"] {
            assert!(refusal.contains(part), "{refusal}");
        }
        assert!(check_memory(u32::MAX, u64::MAX, u64::MAX - 1).is_err());
    }

    #[test]
    fn this_host_has_memory_and_few_clones_have_their_descriptors() {
        let [total, left] = ["MemTotal", "MemAvailable"].map(|name| meminfo_kib(name).unwrap());
        assert!(0 < left && left <= total);
        assert!(meminfo_kib("MemTot").is_err());
        descriptors_for(1).unwrap();
        if getrlimit(Resource::Nofile).maximum.is_some() {
            let refusal = descriptors_for(u32::MAX).unwrap_err().to_string();
            assert!(refusal.contains("ulimit -n"), "{refusal}");
        }
    }
}
