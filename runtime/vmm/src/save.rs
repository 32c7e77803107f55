//! A paused machine into a snapshot file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use thaw_snapshot::{
    DIFFERENCE_RUNS_DEFAULT, Metadata, PAGE_BYTES, PageRun, PageSource, SectionKind, VerifyError,
    WriteError, Writer,
};
use thaw_vmm_control::{SaveForm, SaveRequest, Saved};
use thiserror::Error;
use vm_memory::Bytes;

use crate::arch::x86_64::interrupts::{self, InterruptError};
use crate::arch::x86_64::vcpu_state::{self, VcpuStateError};
use crate::belongings;
use crate::devices::{Devices, DiskAccess};
use crate::fault::{Blame, Fault};
use crate::machine::{DiskBase, Machine};
use crate::memory::GuestMemory;
use crate::state::{self, DiskV1, FrozenTimeV1, MachineStateV1};

/// Why a machine could not be saved. It is paused as before.
#[derive(Debug, Error)]
pub enum SaveError {
    /// Not one descriptor.
    #[error("save needs one descriptor but brought {0}")]
    Descriptors(usize),
    /// Metadata of another shape.
    #[error("metadata of the snapshot is malformed")]
    Metadata(#[source] serde_json::Error),
    /// A vCPU's state.
    #[error("state of vcpu {vcpu} could not be read")]
    Vcpu {
        /// Which.
        vcpu: usize,
        /// Cause.
        #[source]
        source: VcpuStateError,
    },
    /// Interrupt chips or clock.
    #[error("interrupt chips or clock could not be read")]
    Interrupts(#[source] InterruptError),
    /// The state cannot be encoded.
    #[error("machine state could not be encoded")]
    Encode(#[source] postcard::Error),
    /// The snapshot that it was restored from.
    #[error("pages of the origin could not be listed")]
    Origin(#[source] VerifyError),
    /// There is nothing to differ from.
    #[error(
        "machine was not restored from a snapshot, so it cannot be saved as a difference to one"
    )]
    NoOrigin,
    /// A disk is gone.
    #[error("disk {0} has no content")]
    Disk(usize),
    /// The file.
    #[error("snapshot could not be written")]
    Write(#[source] WriteError),
}

impl Blame for SaveError {
    fn fault(&self) -> Fault {
        match self {
            Self::Descriptors(_) | Self::Metadata(_) | Self::NoOrigin => Fault::Caller,
            _ => Fault::Host,
        }
    }
}

/// Reads everything but memory and disk content.
pub(crate) fn capture(machine: &Machine) -> Result<(MachineStateV1, u32), SaveError> {
    let failed = |vcpu| move |source| SaveError::Vcpu { vcpu, source };
    let first = machine
        .vcpus
        .first()
        .expect("a machine has at least one vcpu");
    let time = match machine.frozen() {
        // Never resumed since it was restored: its clocks still stand where they stood.
        Some(frozen) => frozen.time,
        None => FrozenTimeV1 {
            clock_ns: interrupts::clock_ns(&machine.vm).map_err(SaveError::Interrupts)?,
            tsc: vcpu_state::tsc(&first.fd()).map_err(failed(0))?,
        },
    };
    let offset = vcpu_state::tsc_offset(&first.fd()).map_err(failed(0))?;
    let mut vcpus = Vec::with_capacity(machine.vcpus.len());
    for (number, vcpu) in machine.vcpus.iter().enumerate() {
        let mut state =
            vcpu_state::save(&vcpu.fd(), &machine.limits, offset).map_err(failed(number))?;
        if let Some(frozen) = machine.frozen().and_then(|frozen| frozen.vcpus.get(number)) {
            (state.tsc_deadline, state.tsc_ahead) = (frozen.tsc_deadline, frozen.tsc_ahead);
        }
        vcpus.push(state);
    }
    let tsc_khz = vcpu_state::tsc_khz(&first.fd()).map_err(failed(0))?;
    let disks = (0..machine.devices.disk_count())
        .map(|disk| {
            let (bytes, access) = machine.devices.disk(disk).ok_or(SaveError::Disk(disk))?;
            Ok(DiskV1 {
                bytes,
                is_stored: access == DiskAccess::CopyOnWrite,
            })
        })
        .collect::<Result<_, _>>()?;
    let state = MachineStateV1 {
        memory_bytes: machine.memory.bytes(),
        time,
        vcpus,
        chips: interrupts::save(&machine.vm).map_err(SaveError::Interrupts)?,
        disks,
        devices: machine.devices.save(),
    };
    Ok((state, tsc_khz))
}

/// Writes a paused machine into the file.
///
/// # Errors
/// Any call that fails; the file is of no use then.
pub fn save(
    machine: &Machine,
    request: SaveRequest,
    mut files: Vec<File>,
) -> Result<Saved, SaveError> {
    let SaveRequest { metadata, form } = request;
    let metadata: Metadata = serde_json::from_value(metadata).map_err(SaveError::Metadata)?;
    let (Some(file), true) = (files.pop(), files.is_empty()) else {
        return Err(SaveError::Descriptors(files.len()));
    };
    let (state, tsc_khz) = capture(machine)?;
    let write = SaveError::Write;
    let mut writer = Writer::new(file);
    writer.metadata(&metadata).map_err(write)?;
    writer
        .cpu(&state::cpu_record(&state.vcpus[0].cpuid, tsc_khz))
        .map_err(write)?;
    writer
        .section(
            SectionKind::Machine,
            &state::encode(&state).map_err(SaveError::Encode)?,
        )
        .map_err(write)?;
    save_memory(machine, &mut writer, form)?;
    for (index, disk) in (0u8..).zip(&state.disks).filter(|(_, disk)| disk.is_stored) {
        let base = machine
            .disk_bases
            .get(usize::from(index))
            .ok_or(SaveError::Disk(usize::from(index)))?;
        let mut source = DiskContent {
            devices: &machine.devices,
            index: usize::from(index),
            bytes: disk.bytes,
            base,
        };
        let length = disk.bytes.next_multiple_of(PAGE_BYTES);
        writer
            .sparse_section(SectionKind::Disk(index), length, &mut source)
            .map_err(write)?;
    }
    let summary = writer.finish().map_err(write)?;
    Ok(Saved {
        file_bytes: summary.file_bytes,
        stored_bytes: summary.stored_bytes,
        digest: summary.digest.to_string(),
    })
}

/// Writes guest memory, or what of it differs from the snapshot under the mapping.
fn save_memory(machine: &Machine, writer: &mut Writer, form: SaveForm) -> Result<(), SaveError> {
    let origin = machine.origin.as_ref().map(|origin| &origin.snapshot);
    let stored = match origin {
        // What was not touched yet is in the store, all of it.
        Some(_) if machine.served.is_some() => vec![PageRun {
            start: 0,
            count: machine.memory.bytes() / PAGE_BYTES,
        }],
        Some(snapshot) => snapshot.memory_runs().map_err(SaveError::Origin)?,
        None => Vec::new(),
    };
    let mut memory = MemorySource::new(&machine.memory, &stored);
    match form {
        SaveForm::Whole => {
            let length = machine.memory.bytes();
            writer.sparse_section(SectionKind::Memory, length, &mut memory)
        }
        SaveForm::Difference => {
            let base = origin.ok_or(SaveError::NoOrigin)?;
            let written = writer.memory_difference(&mut memory, base, DIFFERENCE_RUNS_DEFAULT);
            written.map(drop)
        }
    }
    .map_err(SaveError::Write)
}

/// Guest memory, skipping what was never touched.
struct MemorySource<'a> {
    memory: &'a GuestMemory,
    /// What the snapshot under the mapping holds: there an untouched page is not zero.
    runs: &'a [PageRun],
    /// `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst), if this process may read it: otherwise every page is
    /// looked at.
    pagemap: Option<&'static File>,
}

/// A page is in memory or in swap: bits 63 and 62 of its pagemap entry.
const PAGEMAP_THERE: u64 = 0b11 << 62;
/// Entries read at once.
const PAGEMAP_BATCH: u64 = 4096;

impl<'a> MemorySource<'a> {
    fn new(memory: &'a GuestMemory, runs: &'a [PageRun]) -> Self {
        Self {
            memory,
            runs,
            pagemap: belongings::pagemap().ok(),
        }
    }

    /// The first page from `page` that this process has touched.
    fn next_touched(&self, pagemap: &File, page: u64) -> io::Result<Option<u64>> {
        let first = self.memory.host_address() / PAGE_BYTES;
        let pages = self.memory.bytes() / PAGE_BYTES;
        let mut at = page;
        let mut entries = vec![0; 8 * 4096];
        while at < pages {
            let count = (pages - at).min(PAGEMAP_BATCH);
            let batch = &mut entries[..usize::try_from(8 * count).map_err(io::Error::other)?];
            pagemap.read_exact_at(batch, 8 * (first + at))?;
            let (words, _) = batch.as_chunks::<8>();
            let touched = words
                .iter()
                .position(|word| u64::from_le_bytes(*word) & PAGEMAP_THERE != 0);
            if let Some(position) = touched {
                return Ok(Some(at + position as u64));
            }
            at += count;
        }
        Ok(None)
    }

    /// The first page from `page` that the snapshot below holds.
    fn next_stored(&self, page: u64) -> Option<u64> {
        let run = self.runs.iter().find(|run| run.start + run.count > page)?;
        Some(run.start.max(page))
    }
}

impl PageSource for MemorySource<'_> {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let view = self.memory.view();
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let outside = || io::Error::from(io::ErrorKind::InvalidInput);
            let (address, left) = self.memory.address_of(at).ok_or_else(outside)?;
            let count = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len() - done);
            view.read_slice(&mut buffer[done..done + count], address)
                .map_err(io::Error::other)?;
            done += count;
        }
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        let Some(pagemap) = &self.pagemap else {
            return Ok(Some(offset));
        };
        let page = offset / PAGE_BYTES;
        let next = match (self.next_touched(pagemap, page)?, self.next_stored(page)) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Ok(next.map(|page| (page * PAGE_BYTES).max(offset)))
    }
}

/// A copy-on-write disk's merged content, skipping the holes of its base file that the guest has not written to.
struct DiskContent<'a> {
    devices: &'a Devices,
    index: usize,
    bytes: u64,
    base: &'a DiskBase,
}

impl PageSource for DiskContent<'_> {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let inside = self.bytes.saturating_sub(offset);
        let count = usize::try_from(inside)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let (content, beyond) = buffer.split_at_mut(count);
        // The last page of a disk that is no whole number of pages.
        beyond.fill(0);
        self.devices
            .disk_read_at(self.index, offset, content)
            .map_err(io::Error::other)
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        let in_base =
            match rustix::fs::seek(&self.base.file, SeekFrom::Data(self.base.offset + offset)) {
                Ok(position) => Some(position.saturating_sub(self.base.offset)),
                Err(rustix::io::Errno::NXIO) => None,
                Err(error) => return Err(error.into()),
            };
        let written = self.devices.disk_written_runs(self.index);
        let in_delta = written
            .iter()
            .find(|run| run.end > offset)
            .map(|run| run.start.max(offset));
        let next = match (in_base, in_delta) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Ok(next.filter(|next| *next < self.bytes))
    }
}
