//! A machine from a snapshot file, paused and ready: everything is done that can be done before it resumes.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;

use thaw_snapshot::{MissingFeature, OpenError, PAGE_BYTES, SectionKind, Snapshot, VerifyError};
use thaw_vmm_control::{Disk, DiskAccess as Access, DiskSource, RestoreRequest, Timings};
use thiserror::Error;

use crate::arch::x86_64::interrupts::{self, InterruptError};
use crate::arch::x86_64::vcpu_state::{self, VcpuStateError};
use crate::boot::{access, whole_file};
use crate::devices::{DeviceBuildError, DeviceRestoreError, Devices, DevicesConfig, DiskConfig};
use crate::fault::{Blame, Fault};
use crate::host::{Host, HostError};
use crate::machine::{AssembleError, DiskBase, Frozen, GUEST_CID, Machine, Parts};
use crate::memory::{GuestMemory, MemoryError};
use crate::state::{self, DiskV1, StateError};
use crate::vcpu::monotonic_ns;

/// Why a machine could not be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The file is no snapshot.
    #[error("snapshot could not be opened")]
    Open(#[source] OpenError),
    /// A section is missing or damaged.
    #[error("snapshot could not be read")]
    Read(#[source] VerifyError),
    /// The machine section does not make sense.
    #[error("snapshot holds no machine")]
    State(#[source] StateError),
    /// This host cannot run it.
    #[error("this host's cpu lacks what the snapshot was taken with: {}", list(.0))]
    Cpu(Vec<MissingFeature>),
    /// The sections contradict each other.
    #[error("snapshot contradicts itself: {0}")]
    Contradiction(&'static str),
    /// Disks of the request are not those of the snapshot.
    #[error("snapshot was taken with {expected} disks, the request names {found}")]
    DiskCount {
        /// Snapshot's.
        expected: usize,
        /// Request's.
        found: usize,
    },
    /// A disk does not fit.
    #[error("disk {disk} does not fit the snapshot: {why}")]
    Disk {
        /// Which.
        disk: usize,
        /// Why.
        why: &'static str,
    },
    /// A disk's file.
    #[error("file of disk {disk} could not be used")]
    DiskFile {
        /// Which.
        disk: usize,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Descriptors do not match the request.
    #[error("request names {expected} descriptors but brought {found}")]
    Descriptors {
        /// By the request.
        expected: usize,
        /// With the message.
        found: usize,
    },
    /// This host's KVM.
    #[error("virtual machine could not be made")]
    Host(#[source] HostError),
    /// Guest memory.
    #[error("guest memory could not be mapped")]
    Memory(#[source] MemoryError),
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
    #[error("devices could not be restored")]
    Devices(#[source] DeviceRestoreError),
    /// The devices' windows.
    #[error("devices could not be described")]
    Windows(#[source] DeviceBuildError),
    /// Putting it together.
    #[error("machine could not be assembled")]
    Assemble(#[source] AssembleError),
}

fn list(missing: &[MissingFeature]) -> String {
    missing
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

impl Blame for RestoreError {
    fn fault(&self) -> Fault {
        match self {
            Self::Open(OpenError::Read { .. }) | Self::Read(VerifyError::Read(..)) => Fault::Host,
            Self::DiskFile { .. } | Self::Interrupts(InterruptError::Call { .. }) => Fault::Host,
            Self::Host(error) => error.fault(),
            Self::Memory(error) => error.fault(),
            Self::Vcpu {
                source: VcpuStateError::Call { .. } | VcpuStateError::Msr(_),
                ..
            } => Fault::Host,
            Self::Assemble(_) | Self::Windows(_) => Fault::Host,
            _ => Fault::Caller,
        }
    }
}

/// Pairs the request's disks with the snapshot's.
fn disks(
    snapshot: &Snapshot,
    request: &[Disk],
    saved: &[DiskV1],
    files: Vec<File>,
) -> Result<(Vec<DiskConfig>, Vec<DiskBase>), RestoreError> {
    if request.len() != saved.len() {
        return Err(RestoreError::DiskCount {
            expected: saved.len(),
            found: request.len(),
        });
    }
    let expected = request
        .iter()
        .filter(|disk| disk.source == DiskSource::Descriptor)
        .count();
    if files.len() != expected {
        return Err(RestoreError::Descriptors {
            expected: expected + 1,
            found: files.len() + 1,
        });
    }
    let mut files = files.into_iter();
    let mut pairs = (Vec::new(), Vec::new());
    for (index, (disk, saved)) in request.iter().zip(saved).enumerate() {
        let wrong = |why| RestoreError::Disk { disk: index, why };
        let used = |source| RestoreError::DiskFile {
            disk: index,
            source,
        };
        if (disk.access == Access::CopyOnWrite) != saved.is_stored {
            return Err(wrong("its access differs"));
        }
        let (config, base) = match disk.source {
            DiskSource::Descriptor => {
                if saved.is_stored {
                    return Err(wrong("its content is in the snapshot"));
                }
                let file = files
                    .next()
                    .ok_or_else(|| wrong("its descriptor is missing"))?;
                whole_file(disk, file).map_err(used)?
            }
            DiskSource::Snapshot => {
                let number = u8::try_from(index).map_err(|_| wrong("too many"))?;
                let section = snapshot.disk(number).map_err(RestoreError::Read)?;
                if section.length != saved.bytes.next_multiple_of(PAGE_BYTES) {
                    return Err(RestoreError::Contradiction("a disk section's length"));
                }
                let file = snapshot.file().try_clone().map_err(used)?;
                let base = DiskBase {
                    file: file.try_clone().map_err(used)?,
                    offset: section.offset,
                };
                let id = disk.id.clone();
                (
                    DiskConfig {
                        file,
                        access: access(disk.access),
                        id,
                        offset: section.offset,
                        length: saved.bytes,
                    },
                    base,
                )
            }
        };
        if config.length != saved.bytes {
            return Err(wrong("its length differs"));
        }
        pairs.0.push(config);
        pairs.1.push(base);
    }
    Ok(pairs)
}

/// Makes the machine of a snapshot. The file's own digests of memory and disks are not checked here: its owner has done that
/// once ([`Snapshot::verify`]), as a restore must not read what the guest will not.
///
/// # Errors
/// See [`RestoreError`]; an error of any KVM call that sets state is one, none is ignored.
pub fn restore(
    request: &RestoreRequest,
    files: Vec<File>,
    agent: UnixStream,
    claimed_ns: u64,
) -> Result<Machine, RestoreError> {
    let mut timings = Timings {
        claimed_ns: Some(claimed_ns),
        ..Default::default()
    };
    let mut files = files.into_iter();
    let file = files.next().ok_or(RestoreError::Descriptors {
        expected: 1,
        found: 0,
    })?;
    let snapshot = Snapshot::from_file(file, "given").map_err(RestoreError::Open)?;
    let cpu = snapshot.cpu().map_err(RestoreError::Read)?;
    let host = Host::open().map_err(RestoreError::Host)?;
    let section = snapshot
        .section(SectionKind::Machine)
        .map_err(RestoreError::Read)?;
    let state = state::decode(&section).map_err(RestoreError::State)?;
    let vcpu_count = u8::try_from(state.vcpus.len())
        .map_err(|_| RestoreError::Contradiction("the vcpu count"))?;
    // What a machine of this shape would be told here; some bits speak of the shape.
    let missing = cpu.missing_on(&state::cpu_record(&host.cpuid(0, vcpu_count), cpu.tsc_khz));
    if !missing.is_empty() {
        return Err(RestoreError::Cpu(missing));
    }
    let stored = snapshot.memory().map_err(RestoreError::Read)?;
    if stored.length != state.memory_bytes {
        return Err(RestoreError::Contradiction("the memory section's length"));
    }
    let (disks, disk_bases) = disks(&snapshot, &request.disks, &state.disks, files.collect())?;

    let memory = GuestMemory::reserve(state.memory_bytes).map_err(RestoreError::Memory)?;
    let bare = host.make(memory, vcpu_count).map_err(RestoreError::Host)?;
    timings.vm_made_ns = Some(monotonic_ns());
    bare.memory
        .map_private(snapshot.file(), stored.offset)
        .map_err(RestoreError::Memory)?;
    timings.memory_mapped_ns = Some(monotonic_ns());

    for (vcpu, (fd, saved)) in bare.vcpus.iter().zip(&state.vcpus).enumerate() {
        vcpu_state::restore(fd, saved, &bare.limits, cpu.tsc_khz)
            .map_err(|source| RestoreError::Vcpu { vcpu, source })?;
    }
    interrupts::restore(&bare.vm, &state.chips).map_err(RestoreError::Interrupts)?;
    let config = DevicesConfig {
        disks,
        guest_cid: GUEST_CID,
        agent_stream: agent,
    };
    let devices = Devices::restore(config, bare.memory.view(), &state.devices)
        .map_err(RestoreError::Devices)?;
    let windows = devices.mmio_windows().map_err(RestoreError::Windows)?;
    timings.state_set_ns = Some(monotonic_ns());
    let frozen = Some(Frozen {
        time: state.time,
        vcpus: state.vcpus,
    });
    let parts = Parts {
        bare,
        devices,
        windows,
        disk_bases,
        memory_runs: Some(stored.runs),
        frozen,
        timings,
    };
    Machine::assemble(parts).map_err(RestoreError::Assemble)
}
