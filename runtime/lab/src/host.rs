//! What this host can do: the judgement on its /dev/kvm (cheap, made at every start) and the full report of `thaw doctor`.

mod advice;
mod hardening;
mod probe;

use crate::tools;
use serde::Serialize;
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

pub use advice::Hypervisor;

/// Below this many guest instructions a second, /dev/kvm is emulated and of no use: such ones reach about a million, real ones hundreds
/// of millions, the lab's own about a hundred million on a busy machine.
pub const INSTRUCTIONS_PER_SECOND_MIN: u64 = 10_000_000;
/// Free memory below which `thaw up` gets tight, in MiB: a lab and a few sandboxes.
const MEMORY_MIB_WANTED: u64 = 4096;
/// Free disk space below which images and snapshots get tight, in MiB.
const DISK_MIB_WANTED: u64 = 8192;

/// Where sandboxes run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kvm", rename_all = "snake_case")]
pub enum KvmVerdict {
    /// This host's own KVM is good.
    Native {
        /// Measured in a guest.
        instructions_per_second: u64,
    },
    /// The lab is needed.
    Lab {
        /// Why.
        reason: String,
    },
}

/// State of one check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Good.
    Ok,
    /// Thaw runs, with less.
    Warn,
    /// What needs it does not run.
    Missing,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Short name.
    pub name: &'static str,
    /// State.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// How to get it, a command where there is one.
    pub remedy: Option<String>,
}

/// Everything looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// In the order in which a person wants to read them.
    pub checks: Vec<Check>,
    /// The judgement.
    pub kvm: KvmVerdict,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn not(
        name: &'static str,
        status: Status,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name,
            status,
            detail: detail.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// The judgement alone: about 0.1 s, at most 2 s when /dev/kvm hangs.
pub fn kvm_verdict() -> KvmVerdict {
    probe::probe().map_or_else(
        |failure| KvmVerdict::Lab {
            reason: failure.to_string(),
        },
        |found| found.verdict(),
    )
}

/// All checks; `home` is where Thaw keeps its state (or the nearest folder that exists).
pub fn report(home: &Path) -> HostReport {
    let hypervisor = Hypervisor::detect();
    let probed = probe::probe();
    let mut checks = vec![
        processor(hypervisor),
        kvm_device(hypervisor),
        kvm_speed(&probed, hypervisor),
    ];
    checks.extend(kvm_instructions(&probed));
    checks.extend([cgroups(), userfaultfd(), tun(), memory(), disk(home)]);
    checks.extend(network_tools());
    checks.extend(hardening::checks());
    let kvm = probed.map_or_else(
        |failure| KvmVerdict::Lab {
            reason: failure.to_string(),
        },
        |found| found.verdict(),
    );
    if matches!(kvm, KvmVerdict::Lab { .. }) {
        checks.extend(lab_tools());
    }
    HostReport { checks, kvm }
}

fn processor(hypervisor: Option<Hypervisor>) -> Check {
    let name = "processor";
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| {
        info.lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|line| line.split_whitespace().any(|word| word == flag))
    };
    let inside =
        hypervisor.map_or_else(|| "bare metal".to_owned(), |found| format!("under {found}"));
    match (has("vmx"), has("svm")) {
        (true, _) => Check::ok(name, format!("VT-x (vmx), {inside}")),
        (_, true) => Check::ok(name, format!("AMD-V (svm), {inside}")),
        _ => Check::not(
            name,
            Status::Warn,
            format!("no hardware virtualization (vmx, svm), {inside}"),
            advice::nested(hypervisor),
        ),
    }
}

fn kvm_device(hypervisor: Option<Hypervisor>) -> Check {
    let name = "/dev/kvm";
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Check::ok(name, "opens"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::not(
            name,
            Status::Missing,
            "no permission",
            "sudo usermod -aG kvm $USER, then log in again",
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::not(
            name,
            Status::Missing,
            "does not exist",
            advice::load_kvm(hypervisor),
        ),
        Err(error) => Check::not(
            name,
            Status::Missing,
            error.to_string(),
            advice::load_kvm(hypervisor),
        ),
    }
}

fn kvm_speed(
    probed: &Result<probe::Found, probe::ProbeError>,
    hypervisor: Option<Hypervisor>,
) -> Check {
    let name = "guest speed";
    match probed {
        Ok(found) if found.instructions_per_second >= INSTRUCTIONS_PER_SECOND_MIN => Check::ok(
            name,
            format!(
                "{} million instructions a second",
                found.instructions_per_second / 1_000_000
            ),
        ),
        Ok(found) => {
            let detail = format!(
                "{} instructions a second: this KVM is emulated",
                found.instructions_per_second
            );
            Check::not(name, Status::Missing, detail, advice::nested(hypervisor))
        }
        Err(failure) => Check::not(
            name,
            Status::Missing,
            failure.to_string(),
            "see /dev/kvm above",
        ),
    }
}

fn kvm_instructions(probed: &Result<probe::Found, probe::ProbeError>) -> Option<Check> {
    let found = probed.as_ref().ok()?;
    let (name, missing) = ("guest instructions", found.missing_instructions());
    Some(if missing.is_empty() {
        Check::ok(name, "cmpxchg16b, xsave and int3 work")
    } else {
        let remedy = "stock kernels need them: Thaw uses its lab, or run on a host with hardware virtualization";
        Check::not(
            name,
            Status::Missing,
            format!("not in this KVM: {}", missing.join(", ")),
            remedy,
        )
    })
}

fn cgroups() -> Check {
    let name = "cgroups";
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        if writable(Path::new("/sys/fs/cgroup/memory")) {
            return Check::ok(name, "v1, writable");
        }
        let remedy =
            "run as root, or boot with systemd.unified_cgroup_hierarchy=1 and use systemd-run";
        return Check::not(
            name,
            Status::Warn,
            "none that this user can write: sandboxes run without memory and processor limits",
            remedy,
        );
    }
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default()
        .to_owned();
    let folder = Path::new("/sys/fs/cgroup").join(own);
    if writable(&folder) {
        Check::ok(name, format!("v2, {} is writable", folder.display()))
    } else {
        let remedy = "run as root, or under systemd-run --user --scope -p Delegate=yes";
        Check::not(
            name,
            Status::Warn,
            format!("v2, {} is not writable", folder.display()),
            remedy,
        )
    }
}

fn userfaultfd() -> Check {
    let name = "userfaultfd";
    if File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .is_ok()
    {
        return Check::ok(name, "/dev/userfaultfd opens");
    }
    match fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd") {
        Ok(value) if value.trim() == "1" || rustix::process::geteuid().is_root() => {
            Check::ok(name, "allowed")
        }
        Ok(_) => Check::not(
            name,
            Status::Warn,
            "for root only",
            "sudo sysctl vm.unprivileged_userfaultfd=1",
        ),
        Err(_) => Check::not(
            name,
            Status::Warn,
            "not in this kernel: snapshots are mapped, never fetched lazily",
            "a kernel with CONFIG_USERFAULTFD",
        ),
    }
}

fn tun() -> Check {
    let name = "/dev/net/tun";
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::ok(name, "opens"),
        Err(error) => Check::not(
            name,
            Status::Warn,
            format!("sandboxes get no network: {error}"),
            "sudo modprobe tun",
        ),
    }
}

/// A line of /proc/meminfo, MiB.
fn meminfo_mib(name: &str) -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let rest = info
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(rest.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
}

/// Memory of this machine, MiB; `None` where the kernel does not tell.
pub fn memory_total_mib() -> Option<u64> {
    meminfo_mib("MemTotal")
}

fn memory() -> Check {
    let name = "memory";
    let available = meminfo_mib("MemAvailable").unwrap_or_default();
    at_least(
        name,
        available,
        MEMORY_MIB_WANTED,
        "end other programs, or use smaller functions and pools",
    )
}

fn disk(home: &Path) -> Check {
    let name = "disk space";
    let Some(folder) = home.ancestors().find(|folder| folder.is_dir()) else {
        return Check::not(
            name,
            Status::Warn,
            format!("{} has no folder above it", home.display()),
            "set THAW_HOME",
        );
    };
    match rustix::fs::statvfs(folder) {
        Ok(found) => at_least(
            name,
            (found.f_bavail * found.f_frsize) >> 20,
            DISK_MIB_WANTED,
            "free some, or set THAW_HOME to another disk",
        ),
        Err(error) => Check::not(
            name,
            Status::Warn,
            format!("{}: {error}", folder.display()),
            "set THAW_HOME",
        ),
    }
}

fn at_least(name: &'static str, mib: u64, wanted: u64, remedy: &str) -> Check {
    if mib >= wanted {
        Check::ok(name, format!("{mib} MiB free"))
    } else {
        Check::not(
            name,
            Status::Warn,
            format!("{mib} MiB free, {wanted} MiB are comfortable"),
            remedy,
        )
    }
}

/// What the lab needs; looked at only where the lab is.
/// A program, and how bad it is to be without.
fn installed(
    name: &'static str,
    found: Result<PathBuf, tools::MissingTool>,
    without: Status,
) -> Check {
    match found {
        Ok(path) => Check::ok(name, path.display().to_string()),
        Err(missing) => Check::not(
            name,
            without,
            format!("{} is not installed", missing.program),
            format!("sudo apt-get install {}", missing.package),
        ),
    }
}

/// What makes the networks of functions that have one.
fn network_tools() -> [Check; 2] {
    [
        ("network: nft", tools::find("nft", "nftables")),
        ("network: ip", tools::find("ip", "iproute2")),
    ]
    .map(|(name, found)| installed(name, found, Status::Warn))
}

fn lab_tools() -> Vec<Check> {
    let mut checks: Vec<Check> = [
        ("lab: qemu", tools::qemu()),
        ("lab: virtiofsd", tools::virtiofsd()),
        ("lab: apt", tools::find("apt-get", "apt")),
    ]
    .into_iter()
    .map(|(name, found)| installed(name, found, Status::Missing))
    .collect();
    if !rustix::process::geteuid().is_root() {
        checks.push(user_namespaces());
    }
    checks
}

/// An ordinary user's virtiofsd runs in a user namespace.
fn user_namespaces() -> Check {
    let name = "lab: user namespaces";
    let forbidden =
        |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    if forbidden("/proc/sys/user/max_user_namespaces", "0") {
        Check::not(
            name,
            Status::Missing,
            "none allowed",
            "sudo sysctl user.max_user_namespaces=10000",
        )
    } else if forbidden("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        Check::not(
            name,
            Status::Missing,
            "for root only",
            "sudo sysctl kernel.unprivileged_userns_clone=1",
        )
    } else if forbidden(
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
    ) {
        Check::not(
            name,
            Status::Missing,
            "restricted by AppArmor",
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        )
    } else {
        Check::ok(name, "allowed")
    }
}

fn writable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_gives_a_remedy_for_whatever_is_not_well() {
        let report = report(Path::new("/nonexistent/thaw"));
        assert!(report.checks.len() >= 8);
        for check in &report.checks {
            assert_eq!(
                check.remedy.is_none(),
                check.status == Status::Ok,
                "{check:?}"
            );
        }
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["kvm"]["kvm"].is_string(), "{json}");
    }

    #[test]
    fn verdict_is_quick() {
        let start = std::time::Instant::now();
        let _ = kvm_verdict();
        assert!(start.elapsed() < probe::LIMIT * 2);
    }
}
