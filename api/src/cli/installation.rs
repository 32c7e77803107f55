//! Where the other programs of this installation are: beside `thaw` itself.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};

/// The programs that `thaw` starts or puts into guests.
#[derive(Clone, Debug)]
pub struct Installation {
    /// This program.
    pub thaw: PathBuf,
    /// The monitor.
    pub vmm: PathBuf,
    /// The guest's init: a static binary.
    pub agent: PathBuf,
}

impl Installation {
    /// Finds them.
    ///
    /// # Errors
    /// One is missing; the message says how to build it.
    pub fn locate() -> anyhow::Result<Self> {
        let thaw = std::env::current_exe().context("cannot tell where this program is")?;
        let folder = thaw.parent().context("this program is in no folder")?;
        let (vmm, agent) = (folder.join("thaw-vmm"), folder.join("guest/thaw-agent"));
        for program in [&vmm, &agent] {
            ensure!(
                program.is_file(),
                "{} is missing: run `make build`",
                program.display()
            );
        }
        Ok(Self { vmm, agent, thaw })
    }
}
