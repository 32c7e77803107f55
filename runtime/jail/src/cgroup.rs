//! Cgroups, version 2 and, where that is all there is, version 1 (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/).
//!
//! All of one gateway's are folders of one *tree*, named for the gateway, so that what a crash left is found again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

/// Where cgroups are on every distribution with systemd, and in the lab.
const MOUNT: &str = "/sys/fs/cgroup";
/// The controllers that limits are set with, as version 2 names them.
const CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "io"];
/// Length of a period in which processor time is given out, microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// How long a cgroup may take to be empty when its processes were killed.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);

/// No cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// There are none here, or not for this user.
    #[error("{what}")]
    Unavailable {
        /// What is missing and what helps.
        what: String,
    },
    /// A file of a cgroup.
    #[error("cannot {act} {path}")]
    File {
        /// What was tried.
        act: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn failed(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File { act, path, source }
}

/// What the processes of one cell may use together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory, bytes, guest memory and page tables included; none of it is swapped out.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub tasks: u64,
    /// Processor time, thousandths of a processor.
    pub cpu_thousandths: u64,
    /// Bytes read, and bytes written, per second.
    pub io_bytes_per_second: u64,
}

/// A gateway's folder in the hierarchy, or in each of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tree {
    version: Version,
    folders: Vec<PathBuf>,
    /// Controllers of [`CONTROLLERS`] that limits can be set with.
    controllers: Vec<&'static str>,
    /// The disk that snapshots and images are on, `major:minor`.
    disk: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Tree {
    /// Makes the folder `name`, or finds it, and enables the controllers in it. `disk` is the one whose use is limited.
    ///
    /// With a `pid` it is that process's own, beside the gateway's.
    pub(crate) fn open(
        base: &str,
        pid: Option<u32>,
        disk: Option<String>,
    ) -> Result<Self, CgroupError> {
        let mount = Path::new(MOUNT);
        let name = match pid {
            Some(pid) => format!("{base}-{pid}"),
            None => base.to_owned(),
        };
        let tree = if mount.join("cgroup.controllers").exists() {
            Self::open_two(mount, &name, disk)
        } else {
            Self::open_one(mount, &name, disk)
        }?;
        tree.remove_dead(base);
        Ok(tree)
    }

    /// Removes the trees of processes that are no more.
    fn remove_dead(&self, base: &str) {
        for beside in self.folders.iter().filter_map(|tree| tree.parent()) {
            let entries = fs::read_dir(beside).into_iter().flatten();
            for folder in entries.filter_map(Result::ok).map(|entry| entry.path()) {
                let name = folder.file_name().and_then(|name| name.to_str());
                let pid = name.and_then(|n| n.strip_prefix(base)?.strip_prefix('-')?.parse().ok());
                let is_dead = pid.and_then(Pid::from_raw).is_some_and(|pid| {
                    rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH)
                });
                if is_dead {
                    sweep(&folder);
                    let _ = fs::remove_dir(&folder);
                }
            }
        }
    }

    fn open_two(mount: &Path, name: &str, disk: Option<String>) -> Result<Self, CgroupError> {
        // The root of the hierarchy if it may be written, as root may; else what this process was given by its service manager.
        let parent = match rustix::fs::access(mount, rustix::fs::Access::WRITE_OK) {
            Ok(()) => mount.to_owned(),
            Err(_) => delegated(mount)?,
        };
        let folder = parent.join(name);
        make(&folder)?;
        let mut controllers = Vec::new();
        for controller in CONTROLLERS {
            let enabled = [&parent, &folder].into_iter().try_for_each(|folder| {
                fs::write(
                    folder.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                )
            });
            controllers.extend(enabled.is_ok().then_some(controller));
        }
        Ok(Self {
            version: Version::Two,
            folders: vec![folder],
            controllers,
            disk,
        })
    }

    fn open_one(mount: &Path, name: &str, disk: Option<String>) -> Result<Self, CgroupError> {
        let (mut folders, mut controllers) = (Vec::new(), Vec::new());
        for controller in CONTROLLERS {
            let hierarchy = mount.join(if controller == "io" {
                "blkio"
            } else {
                controller
            });
            // A folder without this file is a plain folder, in which nothing would be limited.
            if hierarchy.join("cgroup.procs").exists() && make(&hierarchy.join(name)).is_ok() {
                folders.push(hierarchy.join(name));
                controllers.push(controller);
            }
        }
        if folders.is_empty() {
            let what = format!(
                "no cgroups are mounted on {MOUNT}, or this user may not write them: run as root"
            );
            return Err(CgroupError::Unavailable { what });
        }
        Ok(Self {
            version: Version::One,
            folders,
            controllers,
            disk,
        })
    }

    /// What of memory, pids, cpu and io cannot be limited, each with the reason.
    pub(crate) fn lacks(&self) -> Vec<(&'static str, String)> {
        let missing = CONTROLLERS.into_iter().filter_map(|controller| {
            if !self.controllers.contains(&controller) {
                let reason = "its controller cannot be enabled here".to_owned();
                return Some((controller, reason));
            }
            (controller == "io" && self.disk.is_none()).then(|| {
                let reason = "the state folder is on no disk that the kernel can limit".to_owned();
                (controller, reason)
            })
        });
        missing.collect()
    }

    /// The cgroup `name` with `limits`: its folders.
    pub(crate) fn make(&self, name: &str, limits: &Limits) -> Result<Vec<PathBuf>, CgroupError> {
        let folders: Vec<_> = self.folders.iter().map(|tree| tree.join(name)).collect();
        for folder in &folders {
            make(folder)?;
            for (file, value) in self.settings(folder, limits) {
                let path = folder.join(file);
                fs::write(&path, value).map_err(failed("set", &path))?;
            }
        }
        Ok(folders)
    }

    fn settings(&self, folder: &Path, limits: &Limits) -> Vec<(&'static str, String)> {
        let Limits {
            memory_bytes,
            tasks,
            cpu_thousandths,
            io_bytes_per_second: rate,
        } = limits;
        let cpu_us = cpu_thousandths * CPU_PERIOD_US / 1000;
        let has = |controller| self.controllers.contains(&controller);
        let mut settings = Vec::new();
        match self.version {
            Version::Two => {
                if has("memory") {
                    settings.push(("memory.max", memory_bytes.to_string()));
                    settings.push(("memory.oom.group", "1".into()));
                    // Without swap there is no such file.
                    if folder.join("memory.swap.max").exists() {
                        settings.push(("memory.swap.max", "0".into()));
                    }
                }
                if has("pids") {
                    settings.push(("pids.max", tasks.to_string()));
                }
                if has("cpu") {
                    settings.push(("cpu.max", format!("{cpu_us} {CPU_PERIOD_US}")));
                }
                if let Some(disk) = self.disk.as_ref().filter(|_| has("io")) {
                    settings.push(("io.max", format!("{disk} rbps={rate} wbps={rate}")));
                }
            }
            Version::One => {
                let of = |controller: &str| {
                    let hierarchy = folder.strip_prefix(MOUNT).unwrap_or(folder);
                    hierarchy.starts_with(controller)
                };
                if of("memory") {
                    settings.push(("memory.limit_in_bytes", memory_bytes.to_string()));
                } else if of("pids") {
                    settings.push(("pids.max", tasks.to_string()));
                } else if of("cpu") {
                    settings.push(("cpu.cfs_period_us", CPU_PERIOD_US.to_string()));
                    settings.push(("cpu.cfs_quota_us", cpu_us.to_string()));
                } else if let Some(disk) = self.disk.as_ref().filter(|_| of("blkio")) {
                    for file in [
                        "blkio.throttle.read_bps_device",
                        "blkio.throttle.write_bps_device",
                    ] {
                        settings.push((file, format!("{disk} {rate}")));
                    }
                }
            }
        }
        settings
    }

    /// Kills what is in any of the gateway's cgroups, and removes them: what a crash left.
    pub(crate) fn sweep(&self) {
        self.folders.iter().for_each(|tree| sweep(tree));
    }

    /// Sets another limit of memory for a cgroup, of which these are the folders.
    pub(crate) fn limit_memory(&self, folders: &[PathBuf], bytes: u64) -> Result<(), CgroupError> {
        let file = match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        let files = folders.iter().map(|folder| folder.join(file));
        for path in files.filter(|path| path.exists()) {
            fs::write(&path, bytes.to_string()).map_err(failed("set", &path))?;
        }
        Ok(())
    }

    /// Removes the gateway's own folders, if nothing is in them.
    pub(crate) fn close(&self) {
        for folder in &self.folders {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// The cgroup that a service manager gave to this process, which has moved into a leaf of it: no process may be in a cgroup
/// whose controllers are enabled for its children.
fn delegated(mount: &Path) -> Result<PathBuf, CgroupError> {
    let unavailable = || {
        CgroupError::Unavailable {
        what: "this user has no cgroup of its own: run as root, or by `systemd-run --user --scope -p Delegate=yes`".into(),
    }
    };
    let text = fs::read_to_string("/proc/self/cgroup").map_err(|_| unavailable())?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = mount.join(path.ok_or_else(unavailable)?);
    let leaf = own.join("gateway");
    make(&leaf).map_err(|_| unavailable())?;
    fs::write(leaf.join("cgroup.procs"), "0").map_err(|_| unavailable())?;
    Ok(own)
}

fn make(folder: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("make the cgroup", folder)(error))
        }
        _ => Ok(()),
    }
}

/// Kills what is in any of the tree's cgroups, and removes them. What does not go now goes the next time.
fn sweep(tree: &Path) {
    let entries = fs::read_dir(tree).into_iter().flatten();
    let left = entries.filter_map(Result::ok).map(|entry| entry.path());
    for folder in left.filter(|path| path.is_dir()) {
        let _ = remove(&folder);
    }
}

/// Whether the kernel has killed in it for want of memory: "oom_kill N" in one of these files.
pub(crate) fn has_killed(folder: &Path) -> bool {
    let files = ["memory.events", "memory.oom_control"].map(|file| folder.join(file));
    let texts = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok());
    let mut counts = texts.flat_map(|text| {
        let lines = text
            .lines()
            .filter_map(|line| line.strip_prefix("oom_kill "));
        lines.map(|count| count != "0").collect::<Vec<_>>()
    });
    counts.any(|killed| killed)
}

/// Kills what is in the cgroup and removes it.
pub(crate) fn remove(folder: &Path) -> Result<(), CgroupError> {
    let deadline = Instant::now() + EMPTY_LIMIT;
    loop {
        let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|line| line.parse().ok()) {
            // Fails only for a process that has gone.
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
        match fs::remove_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Its last process may still be on its way out.
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            removed => return removed.map_err(failed("remove the cgroup", folder)),
        }
    }
}

/// The disk that a folder is on, `major:minor`, if it is one of its own or a partition of one: the kernel limits whole disks.
pub(crate) fn disk_of(folder: &Path) -> Option<String> {
    let device = rustix::fs::stat(folder).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let block = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = if block.join("partition").exists() {
        block.parent()?
    } else {
        &block
    };
    let numbers = fs::read_to_string(disk.join("dev")).ok()?;
    Some(numbers.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    const AMPLE: Limits = Limits {
        memory_bytes: 1 << 30,
        tasks: 64,
        cpu_thousandths: 2000,
        io_bytes_per_second: 1 << 30,
    };

    /// A tree of this test's own, with the limits that this machine and user have; removed in the end.
    struct Own(Tree);

    impl Own {
        /// None for an ordinary user to whom no cgroup was given.
        fn open(name: &str, folder: &Path) -> Option<Self> {
            let base = format!("thaw-test-{name}");
            let tree = Tree::open(&base, Some(std::process::id()), disk_of(folder));
            match tree {
                Err(CgroupError::Unavailable { .. }) if !rustix::process::geteuid().is_root() => {
                    None
                }
                tree => Some(Self(tree.unwrap())),
            }
        }

        /// Whether this can be limited here; what cannot be is told.
        fn has(&self, controller: &str) -> bool {
            let lacks = self.0.lacks();
            let lacking = lacks.iter().find(|(what, _)| *what == controller);
            lacking.inspect(|lacking| println!("not tested: {lacking:?}"));
            lacking.is_none()
        }

        /// A shell that does this in a cgroup of its own; the folders of that.
        fn run(&self, limits: &Limits, script: &str) -> (Child, Vec<PathBuf>) {
            let folders = self.0.make("vm", limits).unwrap();
            let entries = folders.iter().map(|folder| {
                let procs = folder.join("cgroup.procs");
                format!("echo $$ > {} && ", procs.display())
            });
            let script = entries.collect::<String>() + script;
            let child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
            (child, folders)
        }

        fn end(mut child: Child, folders: &[PathBuf]) {
            folders.iter().for_each(|folder| remove(folder).unwrap());
            child.wait().unwrap();
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            self.0.sweep();
            self.0.close();
        }
    }

    /// Waits until a counter of one of the folders is above zero.
    fn counts(folders: &[PathBuf], file: &str, counter: &str) {
        let start = Instant::now();
        let above_zero = |folder: &PathBuf| {
            let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
            let mut values = text
                .lines()
                .filter_map(|line| line.strip_prefix(counter)?.trim().parse::<u64>().ok());
            values.any(|value| value > 0)
        };
        while !folders.iter().any(above_zero) {
            assert!(start.elapsed() < Duration::from_secs(60), "{counter} is 0");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the kernel counts in `file` of a cgroup what it did to hold back who does this under these limits.
    fn holds_back(controller: &str, limits: &Limits, script: &str, (file, counter): (&str, &str)) {
        let Some(own) = Own::open(controller, Path::new("/")) else {
            return;
        };
        if own.has(controller) {
            let (child, folders) = own.run(limits, script);
            counts(&folders, file, counter);
            Own::end(child, &folders);
        }
    }

    #[test]
    fn who_computes_more_than_the_limit_waits() {
        let limits = Limits {
            cpu_thousandths: 200,
            ..AMPLE
        };
        let throttled = ("cpu.stat", "nr_throttled ");
        holds_back("cpu", &limits, "while :; do :; done", throttled);
    }

    #[test]
    fn who_makes_more_processes_than_the_limit_gets_none() {
        let limits = Limits { tasks: 8, ..AMPLE };
        let forks = "while sleep 60 & do :; done 2>/dev/null";
        holds_back("pids", &limits, forks, ("pids.events", "max "));
    }

    #[test]
    fn who_reads_more_than_the_limit_waits() {
        let folder = tempfile::tempdir().unwrap();
        let Some(own) = Own::open("io", folder.path()) else {
            return;
        };
        let limits = Limits {
            io_bytes_per_second: 1 << 20,
            ..AMPLE
        };
        if own.has("io") {
            let file = folder.path().join("file");
            fs::write(&file, vec![1; 3 << 20]).unwrap();
            fs::File::open(&file).unwrap().sync_all().unwrap();
            let read = format!(
                "exec dd if={} of=/dev/null bs=64k iflag=direct status=none",
                file.display()
            );
            let start = Instant::now();
            let (mut child, folders) = own.run(&limits, &read);
            assert!(child.wait().unwrap().success());
            // A least time, which no speed of the machine makes shorter: three seconds, but for what passes at once.
            assert!(start.elapsed() > Duration::from_millis(1500));
            Own::end(child, &folders);
        }
    }
}
