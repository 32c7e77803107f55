//! A shell: a machine without a guest, made ahead of demand, with everything done that needs no snapshot.
//!
//! # What is made in which order, and why
//! 1. **Memory slots before the interrupt chips**: with chips, KVM waits for its readers after each change of the slots.
//! 2. **Interrupt chips before vCPUs**: a vCPU has a LAPIC in KVM only if the chips were there first. No PIT: the guest is told of
//!    none.
//! 3. **CPUID** of each vCPU, which the snapshot's nearly always equals; MSRs are read, so that a claim writes only those that
//!    differ.
//! 4. **Event descriptors**, then **threads**, parked: device thread and vCPUs.
//!
//! 5. **A rehearsal** ([`crate::rehearsal`]): the claim's code has run once and its pages are mapped.
//!
//! What remains for a claim is in [`crate::restore`]. A vCPU is not run ahead: its first entry builds page tables over memory that
//! the claim replaces, and tearing these down again cost more than the entry saved.

use thaw_snapshot::CpuRecord;
use thaw_vmm_control::{DISK_COUNT_MAX, DiskShape, PrepareRequest, Timings, VCPU_COUNT_MAX};
use thiserror::Error;

use crate::arch::x86_64::vcpu_state::{self, FreshVcpu, VcpuStateError};
use crate::boot::access;
use crate::devices::{DeviceBuildError, Devices, DiskAccess, NetworkDevice};
use crate::fault::{Blame, Fault};
use crate::host::{Host, HostError};
use crate::machine::{AssembleError, GUEST_CID, Machine, Parts};
use crate::memory::{GuestMemory, MemoryError};
use crate::rehearsal::{RehearsalError, rehearse};
use crate::state;
use crate::vcpu::monotonic_ns;

/// Why no shell could be made.
#[derive(Debug, Error)]
pub enum PrepareError {
    /// A number in the request.
    #[error("{what} {value} is out of limits")]
    Limit {
        /// What.
        what: &'static str,
        /// How much.
        value: usize,
    },
    /// Guest memory.
    #[error("guest memory could not be reserved")]
    Memory(#[source] MemoryError),
    /// This host.
    #[error("virtual machine could not be made")]
    Host(#[source] HostError),
    /// A vCPU.
    #[error("vcpu {vcpu} could not be set up")]
    Vcpu {
        /// Which.
        vcpu: u8,
        /// Cause.
        #[source]
        source: VcpuStateError,
    },
    /// Devices.
    #[error("devices could not be built")]
    Devices(#[source] DeviceBuildError),
    /// What every claim does.
    #[error("claim could not be rehearsed")]
    Rehearsal(#[source] RehearsalError),
    /// Putting it together.
    #[error("machine could not be assembled")]
    Assemble(#[source] AssembleError),
}

impl Blame for PrepareError {
    fn fault(&self) -> Fault {
        match self {
            Self::Limit { .. } => Fault::Caller,
            Self::Memory(error) => error.fault(),
            Self::Host(error) => error.fault(),
            _ => Fault::Host,
        }
    }
}

/// What of a machine is decided before its guest is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// 1 to [`VCPU_COUNT_MAX`].
    pub vcpu_count: u8,
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// Disks in order, at most [`DISK_COUNT_MAX`].
    pub disks: Vec<DiskAccess>,
    /// Whether there is a network device.
    pub network: NetworkDevice,
}

impl TryFrom<&PrepareRequest> for Shape {
    type Error = PrepareError;

    fn try_from(request: &PrepareRequest) -> Result<Self, PrepareError> {
        let PrepareRequest {
            vcpu_count,
            memory_mib,
            disks,
            has_network,
        } = request;
        let limit = |what, value| PrepareError::Limit { what, value };
        if *vcpu_count == 0 || *vcpu_count > VCPU_COUNT_MAX {
            return Err(limit("vcpu count", usize::from(*vcpu_count)));
        }
        if disks.len() > DISK_COUNT_MAX {
            return Err(limit("disk count", disks.len()));
        }
        let disk = |shape: &DiskShape| {
            let DiskShape { access: may } = *shape;
            access(may)
        };
        Ok(Self {
            vcpu_count: *vcpu_count,
            memory_bytes: u64::from(*memory_mib) << 20,
            disks: disks.iter().map(disk).collect(),
            network: match has_network {
                true => NetworkDevice::Present,
                false => NetworkDevice::Absent,
            },
        })
    }
}

/// A machine without a guest. Its threads are parked.
#[derive(Debug)]
pub struct Shell {
    pub(crate) machine: Machine,
    pub(crate) shape: Shape,
    /// vCPUs as they were made, in order.
    pub(crate) fresh: Vec<FreshVcpu>,
    /// What the first vCPU was told of this host, for comparing with a snapshot's record.
    pub(crate) cpu: CpuRecord,
}

/// Makes a shell ahead of demand and rehearses its claim; `asked_ns` is when the request arrived.
///
/// # Errors
/// A shape out of limits, or this host.
pub fn prepare(shape: Shape, asked_ns: u64) -> Result<Shell, PrepareError> {
    let mut shell = make(shape, asked_ns)?;
    rehearse(&mut shell.machine).map_err(PrepareError::Rehearsal)?;
    shell.machine.timings.prepared_ns = Some(monotonic_ns());
    Ok(shell)
}

/// Makes a shell that is claimed at once.
///
/// # Errors
/// As [`prepare`].
pub fn make(shape: Shape, asked_ns: u64) -> Result<Shell, PrepareError> {
    let mut timings = Timings {
        prepared_from_ns: Some(asked_ns),
        ..Default::default()
    };
    let memory = GuestMemory::reserve(shape.memory_bytes)
        .map_err(PrepareError::Memory)?
        .tracked();
    let host = Host::open().map_err(PrepareError::Host)?;
    let bare = host
        .make(memory, shape.vcpu_count)
        .map_err(PrepareError::Host)?;
    let mut fresh = Vec::with_capacity(bare.vcpus.len());
    for (vcpu, fd) in (0u8..).zip(&bare.vcpus) {
        let failed = |source| PrepareError::Vcpu { vcpu, source };
        vcpu_state::set_cpuid(fd, &host.cpuid(vcpu, shape.vcpu_count)).map_err(failed)?;
        fresh.push(vcpu_state::fresh(fd, &bare.limits).map_err(failed)?);
    }
    let tsc_khz = fresh.first().map_or(0, FreshVcpu::tsc_khz);
    let cpu = state::cpu_record(&host.cpuid(0, shape.vcpu_count), tsc_khz);
    let devices = Devices::prepare((&shape.disks, shape.network), GUEST_CID, bare.memory.view())
        .map_err(PrepareError::Devices)?;
    let windows = devices.mmio_windows().map_err(PrepareError::Devices)?;
    timings.vm_made_ns = Some(monotonic_ns());
    let parts = Parts {
        bare,
        devices,
        windows,
        disk_bases: Vec::new(),
        timings,
    };
    let mut machine = Machine::assemble(parts).map_err(PrepareError::Assemble)?;
    machine.timings.prepared_ns = Some(monotonic_ns());
    Ok(Shell {
        machine,
        shape,
        fresh,
        cpu,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_vmm_control::DiskAccess as Access;

    fn request() -> PrepareRequest {
        let disk = |access| DiskShape { access };
        PrepareRequest {
            vcpu_count: 2,
            memory_mib: 128,
            disks: vec![disk(Access::ReadOnly), disk(Access::CopyOnWrite)],
            has_network: false,
        }
    }

    #[test]
    fn a_request_becomes_a_shape() {
        let shape = Shape::try_from(&request()).unwrap();
        assert_eq!(
            shape,
            Shape {
                vcpu_count: 2,
                memory_bytes: 128 << 20,
                disks: vec![DiskAccess::ReadOnly, DiskAccess::CopyOnWrite],
                network: NetworkDevice::Absent,
            }
        );
    }

    #[test]
    fn a_shape_out_of_limits_is_the_callers_fault() {
        let disks = vec![request().disks[0]; DISK_COUNT_MAX + 1];
        for wrong in [
            PrepareRequest {
                vcpu_count: 0,
                ..request()
            },
            PrepareRequest {
                vcpu_count: VCPU_COUNT_MAX + 1,
                ..request()
            },
            PrepareRequest { disks, ..request() },
        ] {
            let error = Shape::try_from(&wrong).unwrap_err();
            assert_eq!(error.fault(), Fault::Caller, "{wrong:?}");
        }
        // Memory is judged where it is reserved.
        for memory_bytes in [0, 63 << 20, 10_241 << 20] {
            let shape = Shape {
                memory_bytes,
                ..Shape::try_from(&request()).unwrap()
            };
            let error = prepare(shape, 0).unwrap_err();
            assert_eq!(error.fault(), Fault::Caller, "{memory_bytes}");
        }
    }
}
