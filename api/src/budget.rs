//! What of the machine sandboxes may use.

use std::fs;

/// Share of the machine's memory that sandboxes may come to use, percent. The rest is for the page cache, which holds the
/// snapshots that all clones map, for what guests write to their disks, for freezes, and for the gateway.
const MEMORY_PERCENT: u64 = 75;

/// Virtual CPUs that run at once, for each of the machine's: an invocation waits for its disk, its clock or its caller at
/// least as often as it computes; and one that only computes still has a quarter of a processor.
const VCPUS_PER_CPU: u32 = 4;

/// What a sandbox of the smallest function counts, MiB.
const SMALLEST_MIB: u64 = 128 + 16;

/// A machine whose memory is unknown is taken for a small one, MiB.
const MEMORY_MIB_UNKNOWN: u64 = 4096;

/// What of the machine sandboxes may use. A request that does not fit waits, and is refused when its time is over; the
/// kernel never has to end a sandbox for want of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Memory of all sandboxes, MiB. One that runs or has run counts with its whole memory and an overhead of 16 MiB; one
    /// that never ran with an eighth of its memory and the overhead; a shell with the overhead.
    pub memory_mib: u64,
    /// Virtual CPUs that run invocations at once.
    pub vcpus: u32,
}

impl Budget {
    /// Three quarters of this machine's memory, and four virtual CPUs for each of its own.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let memory = fs::read_to_string("/proc/meminfo").ok();
        let total_mib = memory.as_deref().and_then(total_mib);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self::of(
            total_mib.unwrap_or(MEMORY_MIB_UNKNOWN),
            u32::try_from(cpus).unwrap_or(u32::MAX),
        )
    }

    /// Most invocations that run at once, of the smallest functions.
    #[must_use]
    pub fn at_once(self) -> u64 {
        u64::from(self.vcpus).min(self.memory_mib / SMALLEST_MIB)
    }

    fn of(total_mib: u64, cpus: u32) -> Self {
        Self {
            memory_mib: total_mib.saturating_mul(MEMORY_PERCENT) / 100,
            vcpus: cpus.saturating_mul(VCPUS_PER_CPU),
        }
    }
}

/// `MemTotal` of proc_meminfo(5), MiB.
fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_a_share_of_the_machine() {
        let meminfo = "MemFree: 1 kB\nMemTotal:        8388608 kB\n";
        let mib = total_mib(meminfo).unwrap();
        assert_eq!(mib, 8192);
        let budget = Budget::of(mib, 2);
        assert_eq!((budget.memory_mib, budget.vcpus), (6144, 8));
        assert_eq!(budget.at_once(), 8);
        assert_eq!(Budget::of(mib, 64).at_once(), 6144 / 144);
        assert_eq!(total_mib("MemTotal: much"), None);
        assert!(Budget::of_this_machine().vcpus >= VCPUS_PER_CPU);
    }
}
