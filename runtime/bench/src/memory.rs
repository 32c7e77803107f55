//! What a monitor with its guest costs in memory, as the kernel counts it (Documentation/filesystems/proc.rst, smaps_rollup).

use std::{fs, io};

use anyhow::Context as _;
use serde::Serialize;

/// Of one process, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Its own pages, and of shared ones its share.
    pub pss_kib: u64,
    /// Pages that it alone has written: what one more clone really costs.
    pub private_dirty_kib: u64,
    /// All pages it sees.
    pub rss_kib: u64,
}

impl Memory {
    /// Of a running process.
    ///
    /// # Errors
    /// It is gone, or this user may not look at it.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Self::parse(&text).with_context(|| format!("cannot understand {path}"))
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix(" kB")?.trim().parse().ok()
        };
        Some(Self {
            pss_kib: field("Pss:")?,
            private_dirty_kib: field("Private_Dirty:")?,
            rss_kib: field("Rss:")?,
        })
    }

    /// All of several together.
    pub fn sum(all: &[Self]) -> Self {
        let sum = |field: fn(&Self) -> u64| all.iter().map(field).sum();
        Self {
            pss_kib: sum(|memory| memory.pss_kib),
            private_dirty_kib: sum(|memory| memory.private_dirty_kib),
            rss_kib: sum(|memory| memory.rss_kib),
        }
    }

    /// The mean of several.
    pub fn mean(all: &[Self]) -> Self {
        let count = u64::try_from(all.len()).unwrap_or(u64::MAX).max(1);
        let sum = Self::sum(all);
        Self {
            pss_kib: sum.pss_kib / count,
            private_dirty_kib: sum.private_dirty_kib / count,
            rss_kib: sum.rss_kib / count,
        }
    }
}

/// How many of a process's threads are under a seccomp filter, and how many there are.
///
/// # Errors
/// The process is gone.
pub fn filtered_threads(pid: u32) -> anyhow::Result<(usize, usize)> {
    let (mut filtered, mut all) = (0, 0);
    let folder = format!("/proc/{pid}/task");
    for thread in fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))? {
        let path = thread?.path().join("status");
        let text = match fs::read_to_string(&path) {
            // A thread that ended meanwhile.
            Err(error) if gone(&error) => continue,
            read => read.with_context(|| format!("cannot read {}", path.display()))?,
        };
        all += 1;
        // 2 is SECCOMP_MODE_FILTER (proc(5)).
        filtered += usize::from(text.lines().any(|line| line == "Seccomp:\t2"));
    }
    Ok((filtered, all))
}

/// ENOENT where the file is opened, ESRCH where it is read.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
55d0-7ffc ---p 00000000 00:00 0 [rollup]
Rss:                9000 kB
Pss:                6804 kB
Pss_Dirty:            12 kB
Shared_Clean:       1000 kB
Private_Clean:        40 kB
Private_Dirty:      5200 kB
";

    #[test]
    fn fields_are_taken_by_their_whole_name() {
        let memory = Memory::parse(TEXT).unwrap();
        let expected = Memory {
            pss_kib: 6804,
            private_dirty_kib: 5200,
            rss_kib: 9000,
        };
        assert_eq!(memory, expected);
        assert_eq!(Memory::parse("Rss: 1 kB"), None);
        let half = Memory::default();
        assert_eq!(Memory::mean(&[memory, half]).pss_kib, 3402);
    }

    #[test]
    fn this_process_has_memory_and_threads() {
        let pid = std::process::id();
        let memory = Memory::of(pid).unwrap();
        assert!(memory.rss_kib > 0 && memory.pss_kib <= memory.rss_kib);
        assert!(filtered_threads(pid).unwrap().1 >= 1);
    }
}
