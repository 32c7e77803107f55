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
    /// What gives functions a network.
    pub egress: PathBuf,
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
        let egress = folder.join("thaw-egress");
        for program in [&vmm, &egress, &agent] {
            ensure!(
                program.is_file(),
                "{} is missing: run `make build`",
                program.display()
            );
        }
        Ok(Self {
            vmm,
            egress,
            agent,
            thaw,
        })
    }
}
