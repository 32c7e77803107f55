//! The parent's side: what is possible here, and a cell for each process.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use thiserror::Error;

use crate::cgroup::{self, Tree};
use crate::{CgroupError, Limits, Missing, Orders, SURVEY_ARGUMENT, Wall};

/// Cells, and so users, of one gateway.
const CELLS_MAX: u32 = 65_536;
/// First user of all gateways: beyond what systemd gives to containers and services (systemd.io, "Users, Groups, UIDs and GIDs
/// on systemd Systems"), below 2^31.
const USERS_START: u32 = 0x7000_0000;
/// Blocks of [`CELLS_MAX`] users; a gateway's is drawn from the name of its folder.
const BLOCKS: u32 = 0x0fff;

/// A cell could not be made.
#[derive(Debug, Error)]
pub enum JailerError {
    /// All are taken.
    #[error("all {CELLS_MAX} cells are in use")]
    Full,
    /// Its cgroup.
    #[error("no cgroup for a cell")]
    Cgroup(#[source] CgroupError),
    /// The program that tries the walls.
    #[error("{program} does not tell which walls can be had")]
    Survey {
        /// Which.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Whose cells they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner<'a> {
    /// The one gateway of this state folder, which holds its lock: what an earlier one left is removed.
    Gateway(&'a Path),
    /// A command that runs beside the folder's gateway, or beside other commands.
    Command(&'a Path),
}

/// What is less than it could be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reduced {
    /// "user namespace", "limit of memory", …
    pub what: String,
    /// Why, and what helps where that is known.
    pub reason: String,
}

/// How far a jail reaches on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Empty: all of it.
    pub reduced: Vec<Reduced>,
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.reduced.is_empty() {
            return f.write_str("complete");
        }
        let each = self.reduced.iter();
        let each: Vec<_> = each.map(|r| format!("{} ({})", r.what, r.reason)).collect();
        write!(f, "reduced: without {}", each.join("; "))
    }
}

/// Makes cells. Clones are the same jailer.
#[derive(Clone, Debug)]
pub struct Jailer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    walls: Vec<Wall>,
    first_user: u32,
    tree: Option<Tree>,
    /// Numbers that were given back. The oldest is used again first, and only when all others were: what a process left may
    /// take a moment to go.
    free: Mutex<VecDeque<u32>>,
}

/// The next number that was never used, in all jailers of this process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// One process's cell, until it is given back.
#[derive(Debug)]
pub struct Cell {
    shared: Arc<Shared>,
    number: u32,
    /// For the process.
    pub orders: Orders,
}

impl Jailer {
    /// Finds out what can be had on this machine, by `program`, which must obey [`SURVEY_ARGUMENT`]; and removes what processes of
    /// the same folder that are no more have left.
    ///
    /// # Errors
    /// The program cannot be run. What cannot be had is no error.
    pub fn survey(program: &Path, owner: Owner<'_>) -> Result<(Self, Reach), JailerError> {
        let (folder, pid) = match owner {
            Owner::Gateway(folder) => (folder, None),
            Owner::Command(folder) => (folder, Some(std::process::id())),
        };
        let base = format!("thaw-{:08x}", place(folder, None));
        let mut reach = Reach::default();
        let tree = Tree::open(&base, pid, cgroup::disk_of(folder));
        let tree = tree.map_err(|error| reach.lacks(Wall::Cgroup, with_cause(&error)));
        if let Ok(tree) = &tree {
            tree.sweep();
            for (controller, reason) in tree.lacks() {
                let what = format!("limit of {controller}");
                reach.reduced.push(Reduced { what, reason });
            }
        }
        let first_user = USERS_START + (place(folder, pid) % BLOCKS) * CELLS_MAX;
        let mut walls = Wall::ALL.to_vec();
        walls.retain(|wall| *wall != Wall::Cgroup || tree.is_ok());
        let mut shared = Shared {
            walls,
            first_user,
            tree: tree.ok(),
            free: Mutex::default(),
        };
        for Missing { wall, reason } in shared.missing(program)? {
            shared.walls.retain(|ordered| *ordered != wall);
            let reason = match wall {
                Wall::OwnUser => {
                    format!("without root's rights all monitors share this user: {reason}")
                }
                _ => reason,
            };
            reach.lacks(wall, reason);
        }
        Ok((Self(Arc::new(shared)), reach))
    }

    /// A cell for one process.
    ///
    /// # Errors
    /// All are in use, or its cgroup cannot be made.
    pub fn cell(&self, limits: &Limits) -> Result<Cell, JailerError> {
        let number = self.0.take()?;
        match self.0.orders(number, limits) {
            Ok(orders) => Ok(Cell {
                shared: Arc::clone(&self.0),
                number,
                orders,
            }),
            Err(error) => {
                self.0.give_back(number);
                Err(error)
            }
        }
    }

    /// Makes the next process that the calling thread starts the first of a PID namespace. The thread must start no other process
    /// and no thread, ever, and live as long as that process, which is killed with its parent: the kernel takes a thread for
    /// that (prctl(2), `PR_SET_PDEATHSIG`). To come back to its own namespace would take a privilege that an ordinary user's
    /// gateway has not.
    pub fn turn_thread(&self) {
        self.0.turn_thread();
    }
}

impl Reach {
    fn lacks(&mut self, wall: Wall, reason: String) {
        let what = wall.to_string();
        self.reduced.push(Reduced { what, reason });
    }
}

impl Shared {
    fn take(&self) -> Result<u32, JailerError> {
        let fresh = NEXT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
            (next < CELLS_MAX).then_some(next + 1)
        });
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.or_else(|_| free.pop_front().ok_or(JailerError::Full))
    }

    fn give_back(&self, number: u32) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push_back(number);
    }

    fn orders(&self, number: u32, limits: &Limits) -> Result<Orders, JailerError> {
        let name = format!("vm-{number}");
        let cgroups = match &self.tree {
            Some(tree) => tree.make(&name, limits).map_err(JailerError::Cgroup)?,
            None => Vec::new(),
        };
        Ok(Orders {
            walls: self.walls.iter().copied().collect(),
            user: self.first_user + number,
            cgroups,
        })
    }

    fn turn_thread(&self) {
        if self.walls.contains(&Wall::PidNamespace) {
            // SAFETY: descriptors stay shared: the flag is not FILES.
            let _ = unsafe { unshare_unsafe(UnshareFlags::NEWPID) };
            // Where it failed, the process sees for itself, and says so.
        }
    }

    /// Which of the walls do not stand, told by `program`.
    fn missing(&self, program: &Path) -> Result<Vec<Missing>, JailerError> {
        let failed = |source| JailerError::Survey {
            program: program.to_owned(),
            source,
        };
        let limits = Limits {
            memory_bytes: 64 << 20,
            tasks: 16,
            cpu_thousandths: 1000,
            io_bytes_per_second: 1 << 30,
        };
        let number = self.take()?;
        let orders = self.orders(number, &limits)?;
        let mut command = Command::new(program);
        command
            .args([SURVEY_ARGUMENT, &orders.to_argument()])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .env_clear();
        let output = std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                self.turn_thread();
                command.output()
            });
            run.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .map_err(failed)?;
        for folder in &orders.cgroups {
            cgroup::remove(folder).map_err(JailerError::Cgroup)?;
        }
        self.give_back(number);
        serde_json::from_slice(&output.stdout).map_err(|_| {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            failed(io::Error::other(format!("{}: {said}", output.status)))
        })
    }
}

impl Drop for Shared {
    /// With the last cell and jailer, what they had in common is removed.
    fn drop(&mut self) {
        if let Some(tree) = &self.tree {
            tree.close();
        }
    }
}

impl Cell {
    /// Sets how much memory the cell may use from now on, bytes.
    ///
    /// # Errors
    /// The cgroup's file cannot be written.
    pub fn limit_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        match &self.shared.tree {
            Some(tree) => tree.limit_memory(&self.orders.cgroups, bytes),
            None => Ok(()),
        }
    }

    /// Whether the kernel has killed in this cell because its memory was used up.
    #[must_use]
    pub fn ran_out_of_memory(&self) -> bool {
        self.orders.cgroups.iter().any(|f| cgroup::has_killed(f))
    }

    /// The cell's process is gone: what it had is removed. May wait for the kernel, a few milliseconds as a rule and 5 s at most.
    ///
    /// # Errors
    /// A cgroup cannot be removed. Its number is not used again, and the next gateway removes it.
    pub fn close(self) -> Result<(), CgroupError> {
        for folder in &self.orders.cgroups {
            cgroup::remove(folder)?;
        }
        self.shared.give_back(self.number);
        Ok(())
    }
}

/// A number for a folder, the same every time, or for a process that uses it: FNV-1a over the name.
fn place(folder: &Path, pid: Option<u32>) -> u32 {
    let bytes = folder.as_os_str().as_encoded_bytes().iter().copied();
    let bytes = bytes.chain(pid.into_iter().flat_map(u32::to_le_bytes));
    bytes.fold(0x811c_9dc5, |hash: u32, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
