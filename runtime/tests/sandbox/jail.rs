//! What keeps monitors apart from the machine and from each other, looked at from outside.

use std::collections::HashSet;
use std::path::PathBuf;

use rustix::process::Pid;

use super::{AMPLE, alone, eventually, jailer, monitors, pool};

/// A line of /proc/PID/status.
fn status(pid: Pid, line: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let found = text
        .lines()
        .find_map(|l| l.strip_prefix(line)?.strip_prefix(':'));
    found.unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_monitor_is_in_a_jail_of_its_own_and_leaves_nothing() {
    let _turn = alone().await;
    let reduced = &jailer().1.reduced;
    if !rustix::process::geteuid().is_root() {
        // Less can be had, of which it is said what. The walls are tried in `thaw-jail`'s own tests.
        assert!(!reduced.is_empty());
        return;
    }
    // The lab's files are on no disk.
    assert!(
        reduced.iter().all(|r| r.what == "limit of io"),
        "{reduced:?}"
    );
    let (runtime, pool) = pool(2).await;
    eventually("two VMs are ready", || pool.stats().ready == 2).await;
    // A shell may be made this moment: the filter is the last of its walls.
    let is_filtered = |pid: &Pid| {
        let path = format!("/proc/{}/status", pid.as_raw_nonzero());
        std::fs::read_to_string(path).is_ok_and(|text| text.contains("\nSeccomp:\t2\n"))
    };
    let mut pids = Vec::new();
    eventually("every monitor has its filter", || {
        pids = monitors();
        pids.iter().all(is_filtered)
    })
    .await;
    assert!(pids.len() >= 2, "{pids:?}");
    let mut users = HashSet::new();
    let mut cgroups = Vec::new();
    for pid in &pids {
        let of = |file: &str| format!("/proc/{}/{file}", pid.as_raw_nonzero());
        for namespace in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let link = |path: String| std::fs::read_link(path).unwrap();
            let ours = link(format!("/proc/self/ns/{namespace}"));
            assert_ne!(link(of(&format!("ns/{namespace}"))), ours, "{namespace}");
        }
        for (line, value) in [
            ("CapEff", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
        ] {
            assert_eq!(status(*pid, line), value, "{line}");
        }
        assert_eq!(std::fs::read_dir(of("root")).unwrap().count(), 0);
        users.insert(status(*pid, "Uid"));
        let cgroup = std::fs::read_to_string(of("cgroup")).unwrap();
        let folder = PathBuf::from(format!(
            "/sys/fs/cgroup{}",
            cgroup.trim().rsplit(':').next().unwrap()
        ));
        for file in ["memory.max", "pids.max", "cpu.max"] {
            let limit = std::fs::read_to_string(folder.join(file)).unwrap();
            assert!(!limit.starts_with("max"), "{file}: {limit}");
        }
        cgroups.push(folder);
    }
    assert_eq!(users.len(), pids.len(), "{users:?}");
    runtime.shutdown(AMPLE).await;
    assert!(cgroups.iter().all(|folder| !folder.exists()), "{cgroups:?}");
}
