//! A used machine back to its snapshot, in place: afterwards it is as [`crate::restore`] leaves a machine, paused, with nothing of
//! its life in it.
//!
//! # What is undone, in the order of a restore
//! 1. **Memory**: every page that was ever written is given its content of the snapshot by *copying*: the page stays mapped, so
//!    the next life writes it without a fault. Dropping the pages would be as fast, but then each is faulted in anew
//!    (512 pages: 0.2 ms after copying, 40 ms after dropping, in the lab). The content comes from a second mapping of the
//!    snapshot, made at the first rewind. Where KVM shadows guests' page tables, the shadows of tables that were put back are
//!    dropped with all others. Memory that is served as it is touched ([`crate::paging`]) has no second mapping: its written
//!    pages are dropped, and come anew from where they came.
//! 2. **vCPUs**: what KVM keeps beside the state that is saved ([`vcpu_rewind`]), then that state, all of it.
//! 3. **Interrupt chips**.
//! 4. **Devices** ([`Devices::reset_to`](crate::devices::Devices::reset_to)): disks' deltas, queues, the agent channel, the tap, console.
//! 5. **Clocks** stand again, as after a restore; the next resume sets them.
//!
//! # Which pages were written
//! KVM's log and the devices' bitmap tell ([`GuestMemory::take_written`]). The alternative, `/proc/self/pagemap`, needs no help
//! from KVM or the devices, but costs 1.2 ms for 128 MiB and 2.3 ms for 256 MiB in the lab (0.26 and 0.33 ms on metal),
//! however little was written: as much as copying 512 pages back.
//!
//! # What is left of the last life
//! KVM takes an interrupt from a device's eventfd at once, but delivers it from a work queue (`irqfd_inject`, virt/kvm/eventfd.c),
//! and no call waits for that short of unregistering the eventfd, which waits for all of KVM's readers as well. Devices are
//! parked first and chips are set last; should such work be later still, the new life sees one edge of a device that has
//! nothing pending, as after any resume, and its driver, which reads InterruptStatus first, ignores it.
//!
//! Whatever fails on the way leaves a machine that must not run again.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{FileType, fstat};
use thaw_snapshot::{PageRun, Snapshot, VerifyError};
use thaw_vmm_control::{Rewound, Timings};
use thiserror::Error;

use crate::arch::x86_64::interrupts::{self, InterruptError};
use crate::arch::x86_64::vcpu_rewind;
use crate::arch::x86_64::vcpu_state::{self, VcpuStateError};
use crate::boot;
use crate::devices::{DeviceBuildError, DeviceRestoreError, DiskFiles, NetworkDevice};
use crate::fault::{Blame, Fault};
use crate::host;
use crate::machine::{Machine, SwitchError};
use crate::memory::{GuestMemory, MemoryError, PageSet};
use crate::vcpu::monotonic_ns;

/// Most pages that are put back, 32 MiB. Copying that many costs about 3 ms (0.4 µs each; 20 ms in the lab): as much as a claim
/// and the first writes of a small function to 500 pages of a fresh mapping (0.2 ms and 5 µs each; 1.7 ms and 70 µs in
/// the lab). As the set only grows over the lives of a machine, one that was once used for more is not worth keeping.
pub const PAGES_MAX: u64 = 8192;

/// Why a machine could not be rewound. It is of no use then.
#[derive(Debug, Error)]
pub enum RewindError {
    /// Not one socket, or what follows it is no tap.
    #[error("rewind needs one socket, the agent's, and at most one tap after it")]
    Descriptors,
    /// A tap for a guest that has no network device.
    #[error("a tap was given, but the snapshot has no network device")]
    NoNetwork,
    /// The new tap cannot be used.
    #[error("tap could not be connected")]
    Plug(#[source] DeviceBuildError),
    /// It was booted.
    #[error("machine was not restored from a snapshot")]
    NoOrigin,
    /// It did not stop.
    #[error("machine could not be stopped")]
    Stop(#[source] SwitchError),
    /// More than is worth undoing.
    #[error("{pages} pages were written, over the limit of {PAGES_MAX}")]
    TooMuch {
        /// Pages ever written.
        pages: u64,
    },
    /// Guest memory, or the second mapping of the snapshot.
    #[error("memory could not be put back")]
    Memory(#[source] MemoryError),
    /// Where the snapshot's memory lies.
    #[error("snapshot could not be read")]
    Snapshot(#[source] VerifyError),
    /// A vCPU's state.
    #[error("state of vcpu {vcpu} could not be set")]
    Vcpu {
        /// Which.
        vcpu: usize,
        /// Cause.
        #[source]
        source: VcpuStateError,
    },
    /// Interrupt chips.
    #[error("interrupt chips could not be set")]
    Interrupts(#[source] InterruptError),
    /// Devices.
    #[error("devices could not be put back")]
    Devices(#[source] DeviceRestoreError),
}

impl Blame for RewindError {
    fn fault(&self) -> Fault {
        match self {
            Self::Descriptors | Self::NoNetwork | Self::NoOrigin => Fault::Caller,
            Self::TooMuch { .. } | Self::Devices(DeviceRestoreError::Ended) => Fault::Guest,
            Self::Stop(error) => error.fault(),
            Self::Memory(_)
            | Self::Snapshot(_)
            | Self::Vcpu { .. }
            | Self::Interrupts(_)
            | Self::Plug(_)
            | Self::Devices(_) => Fault::Host,
        }
    }
}

/// The descriptors of the request, if they are a socket and at most one tap.
fn descriptors(files: Vec<File>) -> Option<(UnixStream, Option<OwnedFd>)> {
    let mut files = files.into_iter();
    let (agent, tap) = (files.next()?, files.next());
    let mode = fstat(&agent).ok()?.st_mode;
    let fits = FileType::from_raw_mode(mode) == FileType::Socket && files.next().is_none();
    let tap = match tap {
        Some(tap) => Some(boot::tap(tap)?),
        None => None,
    };
    fits.then(|| (UnixStream::from(OwnedFd::from(agent)), tap))
}

/// Stops a machine that was restored, if it runs, and puts it back to its snapshot; the request came at `asked_ns`. The old
/// agent stream must stay open at its other end until this is done: losing it ends a machine.
///
/// # Errors
/// See [`RewindError`]; an error of any call is one, none is ignored.
pub fn rewind(
    machine: &mut Machine,
    files: Vec<File>,
    asked_ns: u64,
) -> Result<Rewound, RewindError> {
    let (agent, tap) = descriptors(files).ok_or(RewindError::Descriptors)?;
    let network = (machine.origin.as_ref()).map(|origin| origin.state.devices.network());
    if tap.is_some() && network == Some(NetworkDevice::Absent) {
        return Err(RewindError::NoNetwork);
    }
    // Taken out, so that a machine that fails on the way cannot be resumed or rewound again.
    let mut origin = machine.origin.take().ok_or(RewindError::NoOrigin)?;
    machine.park().map_err(RewindError::Stop)?;
    let mut timings = Timings {
        claimed_ns: Some(asked_ns),
        ..Timings::default()
    };

    let written = machine
        .memory
        .take_written(&machine.vm)
        .map_err(RewindError::Memory)?;
    timings.decoded_ns = Some(monotonic_ns());
    let pages = written.count();
    if pages > PAGES_MAX {
        return Err(RewindError::TooMuch { pages });
    }
    if machine.served.is_some() {
        let mut runs = written.runs();
        let given = runs.try_for_each(|pages| machine.memory.give_back(pages));
        given.map_err(RewindError::Memory)?;
    } else {
        let pristine = match origin.pristine.take() {
            Some(pristine) => pristine,
            None => Pristine::map(&origin.snapshot, machine.memory.bytes())?,
        };
        put_back(&machine.memory, &pristine, &written);
        origin.pristine = Some(pristine);
    }
    if host::shadows_page_tables() {
        machine
            .memory
            .forget_shadows(&machine.vm)
            .map_err(RewindError::Memory)?;
    }
    timings.memory_mapped_ns = Some(monotonic_ns());

    let state = &origin.state;
    for (vcpu, (parked, saved)) in machine.vcpus.iter().zip(&state.vcpus).enumerate() {
        let fd = parked.fd();
        vcpu_rewind::forget(&fd)
            .and_then(|()| vcpu_state::restore(&fd, saved, &machine.limits))
            .map_err(|source| RewindError::Vcpu { vcpu, source })?;
    }
    timings.vcpus_set_ns = Some(monotonic_ns());
    interrupts::restore(&machine.vm, &state.chips).map_err(RewindError::Interrupts)?;
    timings.chips_set_ns = Some(monotonic_ns());
    let disk_bytes = machine.devices.disk_written_bytes();
    machine
        .devices
        .reset_to(&state.devices, DiskFiles::Kept, agent)
        .map_err(RewindError::Devices)?;
    if let Some(tap) = tap {
        machine.devices.plug(tap).map_err(RewindError::Plug)?;
    }
    timings.state_set_ns = Some(monotonic_ns());
    machine.begin_anew(origin, timings);
    Ok(Rewound { pages, disk_bytes })
}

/// The snapshot's memory in a mapping of its own, which nobody writes. It is kept: the next rewind finds its pages mapped.
#[derive(Debug)]
pub struct Pristine {
    memory: GuestMemory,
    /// Pages that the snapshot or its base stores; all others are zero.
    stored: Vec<PageRun>,
}

impl Pristine {
    fn map(snapshot: &Snapshot, bytes: u64) -> Result<Self, RewindError> {
        let memory = GuestMemory::reserve(bytes).map_err(RewindError::Memory)?;
        for layer in snapshot.memory_layers().map_err(RewindError::Snapshot)? {
            memory.map_layer(&layer).map_err(RewindError::Memory)?;
        }
        let stored = snapshot.memory_runs().map_err(RewindError::Snapshot)?;
        Ok(Self { memory, stored })
    }
}

/// Gives the pages of `written` their content of the snapshot: what it stores, and zeros elsewhere, for which no file is touched.
fn put_back(memory: &GuestMemory, pristine: &Pristine, written: &PageSet) {
    let Pristine {
        memory: original,
        stored,
    } = pristine;
    let end_of = |run: &PageRun| run.start.saturating_add(run.count);
    for pages in written.runs() {
        let mut at = pages.start;
        let mut next = stored.partition_point(|run| end_of(run) <= at);
        while at < pages.end {
            let end = match stored.get(next) {
                Some(run) if run.start <= at => {
                    let end = end_of(run).min(pages.end);
                    memory.copy_from(original, at..end);
                    next += 1;
                    end
                }
                hole => {
                    let end = hole.map_or(pages.end, |run| run.start.min(pages.end));
                    memory.zero(at..end);
                    end
                }
            };
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn stored_pages_are_copied_and_holes_are_zeroed() {
        let memory = GuestMemory::reserve(64 << 20).unwrap();
        let pristine = Pristine {
            memory: GuestMemory::reserve(64 << 20).unwrap(),
            stored: vec![
                PageRun { start: 1, count: 2 },
                PageRun { start: 5, count: 3 },
                PageRun {
                    start: 60,
                    count: 70,
                },
            ],
        };
        let is_stored = |page: u64| [1..3, 5..8, 60..130].iter().any(|run| run.contains(&page));
        let place = |page: u64| GuestAddress(page * 4096);
        let old = pristine.memory.view();
        for page in (0..200).filter(|page| is_stored(*page)) {
            old.write_slice(&[1; 4096], place(page)).unwrap();
        }
        let is_written = |page: u64| page % 7 != 3;
        let set = (0..200).filter(|page| is_written(*page)).collect();
        for page in 0..200 {
            memory.view().write_slice(&[2; 4096], place(page)).unwrap();
        }
        put_back(&memory, &pristine, &set);
        for page in 0..200 {
            let mut bytes = [0; 4096];
            memory.view().read_slice(&mut bytes, place(page)).unwrap();
            let expected = match (is_written(page), is_stored(page)) {
                (false, _) => 2,
                (true, stored) => u8::from(stored),
            };
            assert_eq!(bytes, [expected; 4096], "page {page}");
        }
    }
}
