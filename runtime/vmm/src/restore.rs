//! The guest of a snapshot file into a shell, paused and ready. This is the path that a request waits for: it reads and decodes
//! the snapshot once, maps memory over the range that KVM knows already, and sets state; what needs no snapshot is done in
//! [`crate::shell`], and nothing is allocated, opened or told to KVM here that could have been there.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use thaw_snapshot::{
    BaseError, CpuRecord, MissingFeature, OpenError, PAGE_BYTES, SectionKind, Snapshot, VerifyError,
};
use thaw_vmm_control::{
    Disk, DiskAccess as Access, DiskSource, Paging, Prefetch, RestoreRequest, Timings,
};
use thiserror::Error;

use crate::arch::x86_64::cpuid;
use crate::arch::x86_64::interrupts::{self, InterruptError};
use crate::arch::x86_64::msr::MsrError;
use crate::arch::x86_64::vcpu_state::{self, FreshVcpu, HostVcpuLimits, VcpuStateError};
use crate::boot::{access, tap, whole_file};
use crate::devices::{
    DeviceBuildError, DeviceRestoreError, DiskAccess, DiskConfig, DiskFiles, NetworkDevice,
};
use crate::fault::{Blame, Fault};
use crate::machine::{Clocks, DiskBase, Machine, Origin};
use crate::memory::MemoryError;
use crate::outbox::Outbox;
use crate::paging::{self, PagingError};
use crate::prefetch;
use crate::shell::{self, PrepareError, Shape, Shell};
use crate::state::{self, DiskV1, MachineStateV1, StateError};
use crate::vcpu::monotonic_ns;

/// Why a machine could not be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The file is no snapshot.
    #[error("snapshot could not be opened")]
    Open(#[source] OpenError),
    /// The snapshot is a difference, and what it came with is not its base; or it is none.
    #[error("base of the snapshot could not be used")]
    Base(#[source] BaseError),
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
    /// What should be a tap is none.
    #[error("the descriptor of the tap is another file's")]
    Tap,
    /// A tap for a guest that has no network device.
    #[error("a tap was given, but the snapshot has no network device")]
    NoNetwork,
    /// The tap cannot be used.
    #[error("tap could not be connected")]
    Plug(#[source] DeviceBuildError),
    /// Descriptors do not match the request.
    #[error("request names {expected} descriptors but brought {found}")]
    Descriptors {
        /// By the request.
        expected: usize,
        /// With the message.
        found: usize,
    },
    /// There was no shell, and none could be made.
    #[error("shell could not be made")]
    Prepare(#[source] PrepareError),
    /// The shell is another one's.
    #[error("shell of {} cannot hold a snapshot of {}", shape(.shell), shape(.snapshot))]
    Shape {
        /// What was prepared.
        shell: Box<Shape>,
        /// What is needed.
        snapshot: Box<Shape>,
    },
    /// Guest memory.
    #[error("guest memory could not be mapped")]
    Memory(#[source] MemoryError),
    /// Guest memory that is not mapped.
    #[error("guest memory could not be served as it is touched")]
    Paging(#[source] PagingError),
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
}

fn shape(shape: &Shape) -> String {
    let Shape {
        vcpu_count,
        memory_bytes,
        disks,
        network,
    } = shape;
    format!(
        "{vcpu_count} vcpus, {} mib, disks {disks:?}, network {network:?}",
        memory_bytes >> 20
    )
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
            Self::DiskFile { .. }
            | Self::Interrupts(InterruptError::Call { .. })
            | Self::Plug(_) => Fault::Host,
            Self::Prepare(error) => error.fault(),
            Self::Memory(error) => error.fault(),
            Self::Paging(error) => error.fault(),
            // What KVM refuses as invalid is the snapshot's.
            Self::Vcpu {
                source: VcpuStateError::Call { source, .. },
                ..
            } if source.errno() != libc::EINVAL => Fault::Host,
            Self::Vcpu {
                source: VcpuStateError::Msr(MsrError::Call { .. }),
                ..
            } => Fault::Host,
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
                let section = snapshot.disk_range(number).map_err(RestoreError::Read)?;
                let pages = saved.bytes.checked_next_multiple_of(PAGE_BYTES);
                if pages != Some(section.end - section.start) {
                    return Err(RestoreError::Contradiction("a disk section's length"));
                }
                let file = snapshot.file().try_clone().map_err(used)?;
                let base = DiskBase {
                    file: file.try_clone().map_err(used)?,
                    offset: section.start,
                };
                let id = disk.id.clone();
                (
                    DiskConfig {
                        file,
                        access: access(disk.access),
                        id,
                        offset: section.start,
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

/// What a claim reads of a snapshot before it touches the shell.
struct Saved {
    snapshot: Snapshot,
    state: MachineStateV1,
    cpu: CpuRecord,
}

fn read(file: File, base: Option<File>) -> Result<Saved, RestoreError> {
    let mut snapshot = Snapshot::from_file(file, "given").map_err(RestoreError::Open)?;
    if let Some(base) = base {
        let base = Snapshot::from_file(base, "given base").map_err(RestoreError::Open)?;
        snapshot.attach_base(base).map_err(RestoreError::Base)?;
    }
    let cpu = snapshot.cpu().map_err(RestoreError::Read)?;
    if cpu.tsc_khz == 0 {
        return Err(RestoreError::Contradiction("the frequency of the tsc"));
    }
    let section = snapshot
        .section(SectionKind::Machine)
        .map_err(RestoreError::Read)?;
    let state = state::decode(&section).map_err(RestoreError::State)?;
    if snapshot.memory_bytes().map_err(RestoreError::Read)? != state.memory_bytes {
        return Err(RestoreError::Contradiction("the memory section's length"));
    }
    Ok(Saved {
        snapshot,
        state,
        cpu,
    })
}

/// Checks all of a machine's state that is checked by itself, before anything of it is set; devices check theirs as a whole
/// ([`crate::devices::Devices::reset_to`]).
fn check(
    saved: &mut Saved,
    fresh: &[FreshVcpu],
    limits: &HostVcpuLimits,
) -> Result<(), RestoreError> {
    let count = u8::try_from(fresh.len()).unwrap_or(u8::MAX);
    for (number, (state, fresh)) in (0u8..).zip(saved.state.vcpus.iter_mut().zip(fresh)) {
        vcpu_state::check(state, fresh, limits, (number, count)).map_err(|source| {
            RestoreError::Vcpu {
                vcpu: number.into(),
                source,
            }
        })?;
        // The record in a section of its own may be another's.
        let told = |cpuid| state::cpu_record(cpuid, saved.cpu.tsc_khz);
        if !cpuid::is_same(fresh.cpuid(), &state.cpuid) {
            let missing = told(&state.cpuid).missing_on(&told(fresh.cpuid()));
            if !missing.is_empty() {
                return Err(RestoreError::Cpu(missing));
            }
        }
    }
    interrupts::check(&saved.state.chips).map_err(RestoreError::Interrupts)
}

/// The shape of a saved machine.
fn shape_of(state: &MachineStateV1) -> Result<Shape, RestoreError> {
    let vcpu_count = u8::try_from(state.vcpus.len())
        .map_err(|_| RestoreError::Contradiction("the vcpu count"))?;
    let access = |disk: &DiskV1| match disk.is_stored {
        true => DiskAccess::CopyOnWrite,
        false => DiskAccess::ReadOnly,
    };
    Ok(Shape {
        vcpu_count,
        memory_bytes: state.memory_bytes,
        disks: state.disks.iter().map(access).collect(),
        network: state.devices.network(),
    })
}

/// Takes `shell`, or makes one for what `saved` needs, if this host can run it.
fn shell_for(saved: &Saved, shell: Option<Shell>, asked_ns: u64) -> Result<Shell, RestoreError> {
    let needed = shape_of(&saved.state)?;
    let shell = match shell {
        Some(shell) if shell.shape != needed => {
            return Err(RestoreError::Shape {
                shell: Box::new(shell.shape),
                snapshot: Box::new(needed),
            });
        }
        Some(shell) => shell,
        None => shell::make(needed, asked_ns).map_err(RestoreError::Prepare)?,
    };
    // What a machine of this shape is told here; some bits speak of the shape.
    let missing = saved.cpu.missing_on(&shell.cpu);
    if missing.is_empty() {
        Ok(shell)
    } else {
        Err(RestoreError::Cpu(missing))
    }
}

/// Gives the guest of a snapshot to `shell`, or to a new one if there is none; the machine is paused. The file's own digests of
/// memory and disks are not checked here: its owner has done that once ([`Snapshot::verify`]), as a restore must not read what
/// the guest will not.
///
/// # Errors
/// See [`RestoreError`]; an error of any KVM call that sets state is one, none is ignored. The shell is gone then.
pub fn restore(
    shell: Option<Shell>,
    request: &RestoreRequest,
    files: Vec<File>,
    (agent, outbox): (UnixStream, &Arc<Outbox>),
    claimed_ns: u64,
) -> Result<Machine, RestoreError> {
    let mut files = files.into_iter();
    let missing = || RestoreError::Descriptors {
        expected: 1 + usize::from(request.has_base),
        found: 0,
    };
    let file = files.next().ok_or_else(missing)?;
    let (base, store) = match (request.has_base, request.paging) {
        (true, Paging::Store) => return Err(RestoreError::Paging(PagingError::Descriptors)),
        (true, _) => (Some(files.next().ok_or_else(missing)?), None),
        (false, Paging::Store) => (None, files.next()),
        (false, _) => (None, None),
    };
    let tap = match request.has_tap {
        true => Some(files.next_back().and_then(tap).ok_or(RestoreError::Tap)?),
        false => None,
    };
    let mut saved = read(file, base)?;
    if tap.is_some() && saved.state.devices.network() == NetworkDevice::Absent {
        return Err(RestoreError::NoNetwork);
    }
    let decoded_ns = monotonic_ns();
    let shell = shell_for(&saved, shell, claimed_ns)?;
    check(&mut saved, &shell.fresh, &shell.machine.limits)?;
    let Saved {
        snapshot,
        state,
        cpu,
    } = saved;
    let (disks, disk_bases) = disks(&snapshot, &request.disks, &state.disks, files.collect())?;
    let Shell {
        mut machine, fresh, ..
    } = shell;
    let mut timings = Timings {
        claimed_ns: Some(claimed_ns),
        decoded_ns: Some(decoded_ns),
        ..machine.timings
    };
    if request.paging == Paging::Mapped {
        for layer in snapshot.memory_layers().map_err(RestoreError::Read)? {
            let mapped = machine.memory.map_layer(&layer);
            mapped.map_err(RestoreError::Memory)?;
        }
        if request.prefetch == Prefetch::WorkingSet {
            machine.to_fetch = prefetch::copy_ahead(&snapshot, &machine.memory)
                .inspect_err(|error| tracing::warn!(%error, "working set is not fetched"))
                .unwrap_or_default();
        }
    } else {
        let how = (request.paging, store);
        let outbox = Arc::clone(outbox);
        let ends = (machine.end_sender(), move |exit| {
            outbox.send_last_word(exit);
        });
        machine.served = paging::serve(&machine.memory, &snapshot, how, request.prefetch, ends)
            .map_err(RestoreError::Paging)?;
    }
    timings.memory_mapped_ns = Some(monotonic_ns());

    let vcpus = machine.vcpus.iter().zip(&fresh).zip(&state.vcpus);
    for (vcpu, ((running, fresh), saved)) in vcpus.enumerate() {
        vcpu_state::claim(&running.fd(), fresh, saved, &machine.limits, cpu.tsc_khz)
            .map_err(|source| RestoreError::Vcpu { vcpu, source })?;
    }
    if let Some(first) = machine.vcpus.first() {
        machine.to_fetch.map_ahead(&first.fd(), &machine.memory);
    }
    timings.vcpus_set_ns = Some(monotonic_ns());
    interrupts::restore(&machine.vm, &state.chips).map_err(RestoreError::Interrupts)?;
    timings.chips_set_ns = Some(monotonic_ns());
    machine
        .devices
        .reset_to(&state.devices, DiskFiles::Replaced(disks), agent)
        .map_err(RestoreError::Devices)?;
    if let Some(tap) = tap {
        machine.devices.plug(tap).map_err(RestoreError::Plug)?;
    }
    timings.state_set_ns = Some(monotonic_ns());

    machine.disk_bases = disk_bases;
    machine.timings = timings;
    machine.clocks = Clocks::Frozen;
    machine.origin = Some(Origin {
        state,
        tsc_khz: cpu.tsc_khz,
        snapshot,
        pristine: None,
    });
    Ok(machine)
}

#[cfg(test)]
mod tests;
