//! A booted lab, frozen: memory and device state in files, from which a later QEMU goes on within a fraction of a boot.
//!
//! It is saved where the init waits for its command. The shared file system is not part of it (vhost-user-fs cannot be saved); it is
//! plugged into the resumed machine. What a clone must not share with its siblings, wall clock and randomness, comes with the command.

use crate::{
    machine::{Machine, MachineError},
    monitor::{Monitor, MonitorError},
    protocol,
    qemu::{self, Plan},
    tools,
};
use rustix::fs::SeekFrom;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// Writing or reading the device state takes well under a second.
const STATE_LIMIT: Duration = Duration::from_secs(30);
/// Memory is looked at in pieces of this size: a page.
const PAGE_BYTES: usize = 4096;
/// And copied in pieces of this size.
const COPY_BYTES: usize = 1 << 20;
/// A saved clock runs at the frequency it was booted with; one per mille is more than two measurements ever differ by.
const TSC_TOLERANCE: u64 = 1000;

/// Why a state could not be saved or resumed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// QEMU or virtiofsd.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// QEMU's monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The saved files.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was being done.
        act: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// This machine's clock is not the one that the state was saved with.
    #[error("saved state has a clock of {saved} kHz, this machine {now} kHz")]
    Clock {
        /// When it was saved.
        saved: u64,
        /// Now.
        now: u64,
    },
}

fn io_error<E: Into<io::Error>>(act: &'static str, path: &Path) -> impl FnOnce(E) -> StateError {
    move |source| StateError::Io {
        act,
        path: path.to_path_buf(),
        source: source.into(),
    }
}

/// Folder of one saved state. Its name covers everything that must be equal: QEMU, its arguments (clock and forwards apart), kernel, init.
#[derive(Debug, Clone)]
pub struct SavedState {
    folder: PathBuf,
}

impl SavedState {
    /// Where the state of such a machine is or will be.
    pub fn of(plan: &Plan) -> Result<Self, MachineError> {
        use std::os::unix::fs::MetadataExt;
        let program = tools::qemu()?;
        let same = Plan {
            tsc_khz: 0,
            forwards: Vec::new(),
            ..plan.clone()
        };
        let mut digest = Sha256::new();
        for word in qemu::arguments(
            &same,
            &qemu::Descriptors::default(),
            qemu::Start::BootToSave,
        ) {
            digest.update(word.as_bytes());
            digest.update([0]);
        }
        if let Ok(found) = fs::metadata(&program) {
            digest.update(found.size().to_le_bytes());
            digest.update(found.mtime().to_le_bytes());
        }
        let digest: String = digest
            .finalize()
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let home = plan.kernel.parent().unwrap_or(Path::new("."));
        Ok(Self {
            folder: home.join(format!(
                "saved-{}M-{}-{digest}",
                plan.memory_mib, plan.cpu_count
            )),
        })
    }

    /// True if it has been saved.
    pub fn exists(&self) -> bool {
        self.folder.is_dir()
    }

    /// Removes it. What cannot be removed is tried again at the next start.
    pub fn forget(&self) {
        let _ = fs::remove_dir_all(&self.folder);
    }

    /// Saves a machine that was started with [`qemu::Start::BootToSave`] and has booted. The machine stands still afterwards.
    pub fn save(&self, machine: &Machine, tsc_khz: u64) -> Result<(), StateError> {
        let home = self.folder.parent().unwrap_or(Path::new("."));
        let staging = tempfile::Builder::new()
            .prefix(".saving")
            .tempdir_in(home)
            .map_err(io_error("make a folder in", home))?;
        let path = |name: &str| staging.path().join(name);
        let state = File::create(path("state")).map_err(io_error("make", &path("state")))?;
        let mut monitor = Monitor::connect(&machine.monitor)?;
        monitor.ignore_shared_memory()?;
        monitor.send_descriptor("state", &state)?;
        monitor.execute("migrate", &json!({ "uri": "fd:state" }))?;
        monitor.await_migration(STATE_LIMIT)?;
        let memory = File::create(path("memory")).map_err(io_error("make", &path("memory")))?;
        copy_sparse(&machine.memory, &memory).map_err(io_error("write", &path("memory")))?;
        fs::write(path("tsc_khz"), tsc_khz.to_string())
            .map_err(io_error("write", &path("tsc_khz")))?;
        for file in [&state, &memory] {
            file.sync_all().map_err(io_error("sync", staging.path()))?;
        }
        self.forget();
        fs::rename(staging.path(), &self.folder).map_err(io_error("name", &self.folder))
    }

    /// Starts a machine from this state, its init waiting for the command and the shared file system plugged in.
    pub fn resume(&self, plan: &Plan) -> Result<Machine, StateError> {
        let path = |name: &str| self.folder.join(name);
        let saved =
            fs::read_to_string(path("tsc_khz")).map_err(io_error("read", &path("tsc_khz")))?;
        let saved = saved.trim().parse().unwrap_or(0);
        if plan.tsc_khz.abs_diff(saved) > plan.tsc_khz / TSC_TOLERANCE {
            return Err(StateError::Clock {
                saved,
                now: plan.tsc_khz,
            });
        }
        let state = File::open(path("state")).map_err(io_error("open", &path("state")))?;
        let source = File::open(path("memory")).map_err(io_error("open", &path("memory")))?;
        let memory = Machine::memory(plan.memory_mib)?;
        let target = memory
            .try_clone()
            .map_err(io_error("share", &path("memory")))?;
        let machine = Machine::start(plan, memory, qemu::Start::Resume)?;
        // QEMU leaves guest memory alone until the state comes in, so that copying it overlaps with QEMU's own start.
        copy_sparse(&OwnedFd::from(source), &File::from(target))
            .map_err(io_error("copy", &path("memory")))?;
        let mut monitor = Monitor::connect(&machine.monitor)?;
        monitor.ignore_shared_memory()?;
        monitor.send_descriptor("state", &state)?;
        monitor.execute("migrate-incoming", &json!({ "uri": "fd:state" }))?;
        monitor.await_migration(STATE_LIMIT)?;
        let device = json!({ "driver": qemu::ROOT_DEVICE, "id": "root", "chardev": "root", "tag": protocol::ROOT_TAG });
        monitor.execute("device_add", &device)?;
        Ok(machine)
    }
}

/// Copies what is not zero; holes stay holes.
fn copy_sparse(from: &OwnedFd, to: &File) -> io::Result<()> {
    let source = File::from(from.try_clone()?);
    let size = source.metadata()?.len();
    to.set_len(size)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Some(data) = seek(&source, SeekFrom::Data(at))? {
        let end = seek(&source, SeekFrom::Hole(data))?.unwrap_or(size);
        at = data;
        while at < end {
            let count = usize::try_from(end - at)
                .unwrap_or(COPY_BYTES)
                .min(COPY_BYTES);
            source.read_exact_at(&mut buffer[..count], at)?;
            write_pages(&buffer[..count], to, at)?;
            at += count as u64;
        }
    }
    Ok(())
}

/// Writes the runs of pages that are not all zero.
fn write_pages(bytes: &[u8], to: &File, at: u64) -> io::Result<()> {
    let zero = [0; PAGE_BYTES];
    let mut run = 0; // where the pages not yet written begin
    let mut here = 0;
    for page in bytes.chunks(PAGE_BYTES) {
        if page == &zero[..page.len()] {
            to.write_all_at(&bytes[run..here], at + run as u64)?;
            run = here + page.len();
        }
        here += page.len();
    }
    to.write_all_at(&bytes[run..], at + run as u64)
}

fn seek(file: &File, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None), // nothing but a hole from there on
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_equal_and_sparse() {
        use std::os::unix::fs::MetadataExt;
        let from = tempfile::tempfile().unwrap();
        from.set_len(8 << 20).unwrap();
        from.write_all_at(&[1; 5000], 3 << 20).unwrap();
        from.write_all_at(&[0; 1 << 20], 5 << 20).unwrap(); // allocated zeros
        from.write_all_at(&[2; 10], (8 << 20) - 10).unwrap();
        let to = tempfile::tempfile().unwrap();
        copy_sparse(&OwnedFd::from(from.try_clone().unwrap()), &to).unwrap();
        let read = |file: &File| {
            let mut bytes = vec![0; 8 << 20];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&from) == read(&to));
        assert_eq!(to.metadata().unwrap().len(), 8 << 20);
        assert!(
            to.metadata().unwrap().blocks() * 512 < 128 << 10,
            "{} blocks",
            to.metadata().unwrap().blocks()
        );
    }
}
