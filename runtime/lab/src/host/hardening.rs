//! Settings of a host by which guests could learn of each other, or reach what the jail should keep from them.
//!
//! What to set and why: Firecracker's "Production Host Setup Recommendations" (docs/prod-host-setup.md), and the kernel's
//! Documentation/admin-guide/hw-vuln/.

use std::fs;
use std::path::Path;

use super::{Check, Status};

const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// One look at each.
pub fn checks() -> Vec<Check> {
    let mut checks = vec![
        same_page_merging(read("/sys/kernel/mm/ksm/run").as_deref()),
        swap(read("/proc/swaps").as_deref()),
        threads_of_a_core(read("/sys/devices/system/cpu/smt/active").as_deref()),
        huge_pages(
            read("/sys/module/kvm/parameters/nx_huge_pages").as_deref(),
            read(&format!("{VULNERABILITIES}/itlb_multihit")).as_deref(),
        ),
        processor_bugs(&listed(Path::new(VULNERABILITIES))),
    ];
    checks.push(user_namespaces(&[
        (
            "user.max_user_namespaces",
            read("/proc/sys/user/max_user_namespaces"),
            "0",
            "15000",
        ),
        (
            "kernel.unprivileged_userns_clone",
            read("/proc/sys/kernel/unprivileged_userns_clone"),
            "0",
            "1",
        ),
        (
            "kernel.apparmor_restrict_unprivileged_userns",
            read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
            "1",
            "0",
        ),
    ]));
    checks
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Names and contents of a folder's files, by name.
fn listed(folder: &Path) -> Vec<(String, String)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Some((name, text.trim().to_owned()))
        })
        .collect();
    files.sort();
    files
}

fn same_page_merging(run: Option<&str>) -> Check {
    let name = "same-page merging";
    match run {
        Some("1") => Check::not(
            name,
            Status::Warn,
            "KSM is on: a guest can tell by the time of a write what another has in memory",
            "echo 2 | sudo tee /sys/kernel/mm/ksm/run",
        ),
        _ => Check::ok(name, "off"),
    }
}

fn swap(table: Option<&str>) -> Check {
    let name = "swap";
    // The first line is a heading.
    let devices = table.map_or(0, |table| table.lines().skip(1).count());
    if devices == 0 {
        return Check::ok(name, "none");
    }
    Check::not(
        name,
        Status::Warn,
        "guests' memory can be written to a disk, where it stays after they have ended",
        "sudo swapoff -a, or swap on an encrypted device",
    )
}

fn threads_of_a_core(active: Option<&str>) -> Check {
    let name = "threads of a core";
    match active {
        Some("1") => Check::not(
            name,
            Status::Warn,
            "SMT is on: two guests may share a core's caches and buffers, by which one can learn of the other",
            "echo off | sudo tee /sys/devices/system/cpu/smt/control",
        ),
        _ => Check::ok(name, "one"),
    }
}

fn huge_pages(setting: Option<&str>, vulnerability: Option<&str>) -> Check {
    let name = "kvm nx_huge_pages";
    let is_affected = vulnerability.is_some_and(|text| text != "Not affected");
    match (setting, is_affected) {
        (None, _) => Check::ok(name, "no such setting"),
        (Some("N" | "never"), true) => Check::not(
            name,
            Status::Warn,
            "off, and this processor is affected by iTLB multihit: a guest can halt the machine",
            "echo 1 | sudo tee /sys/module/kvm/parameters/nx_huge_pages",
        ),
        (Some(setting), true) => Check::ok(name, format!("{setting}, against iTLB multihit")),
        (Some(setting), false) => Check::ok(name, format!("{setting}; not needed here")),
    }
}

fn processor_bugs(known: &[(String, String)]) -> Check {
    let name = "processor bugs";
    let open = known
        .iter()
        .filter(|(_, text)| text.starts_with("Vulnerable"));
    let open: Vec<_> = open.map(|(name, _)| name.as_str()).collect();
    if open.is_empty() {
        return Check::ok(name, "none without a mitigation");
    }
    Check::not(
        name,
        Status::Warn,
        format!("not mitigated: {}", open.join(", ")),
        "a newer kernel and microcode, and no mitigations=off",
    )
}

/// An ordinary user's gateway makes namespaces inside a user namespace of its own: (name, value, which forbids, which allows).
fn user_namespaces(settings: &[(&str, Option<String>, &str, &str)]) -> Check {
    let name = "user namespaces";
    let forbidding = settings
        .iter()
        .find(|(_, value, forbids, _)| value.as_deref() == Some(*forbids));
    match forbidding {
        None => Check::ok(name, "allowed"),
        Some((setting, _, _, allows)) => Check::not(
            name,
            Status::Warn,
            format!(
                "forbidden to ordinary users by {setting}: without root, the jail around sandboxes has gaps"
            ),
            format!("sudo sysctl {setting}={allows}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lets_guests_learn_of_each_other_is_warned_of() {
        let swaps = "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n";
        let bug = |text: &str| ("mds".to_owned(), text.to_owned());
        for check in [
            same_page_merging(Some("1")),
            swap(Some(swaps)),
            threads_of_a_core(Some("1")),
            huge_pages(Some("N"), Some("KVM: Vulnerable")),
            processor_bugs(&[bug("Vulnerable: Clear CPU buffers attempted, no microcode")]),
        ] {
            assert_eq!(check.status, Status::Warn, "{check:?}");
            assert!(check.remedy.is_some(), "{check:?}");
        }
    }

    #[test]
    fn a_careful_host_is_left_alone() {
        let bug = |text: &str| ("mds".to_owned(), text.to_owned());
        for check in [
            same_page_merging(Some("0")),
            same_page_merging(None),
            swap(Some("Filename Type Size Used Priority\n")),
            threads_of_a_core(Some("0")),
            huge_pages(Some("Y"), Some("KVM: Mitigation: Split huge pages")),
            huge_pages(Some("N"), Some("Not affected")),
            processor_bugs(&[bug("Not affected"), bug("Mitigation: Clear CPU buffers")]),
        ] {
            assert_eq!(check.status, Status::Ok, "{check:?}");
        }
    }

    #[test]
    fn a_sysctl_that_forbids_user_namespaces_is_named() {
        let set = |value: &str| {
            [(
                "kernel.unprivileged_userns_clone",
                Some(value.to_owned()),
                "0",
                "1",
            )]
        };
        let forbidden = user_namespaces(&set("0"));
        assert_eq!(forbidden.status, Status::Warn);
        assert_eq!(
            forbidden.remedy.as_deref(),
            Some("sudo sysctl kernel.unprivileged_userns_clone=1")
        );
        assert_eq!(user_namespaces(&set("1")).status, Status::Ok);
    }
}
