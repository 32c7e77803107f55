//! A machine from a kernel.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{FileType, fstat};
use thaw_vmm_control::{
    BootRequest, DISK_COUNT_MAX, Disk, DiskAccess as Access, DiskSource, Network, Timings,
    VCPU_COUNT_MAX,
};
use thiserror::Error;

use crate::arch::x86_64::acpi::{self, AcpiError};
use crate::arch::x86_64::loader::{self, LoadError};
use crate::arch::x86_64::vcpu_state::{self, VcpuStateError};
use crate::arch::x86_64::{msr, regs};
use crate::devices::{
    DeviceBuildError, Devices, DevicesConfig, DiskAccess, DiskConfig, NetworkDevice,
};
use crate::fault::{Blame, Fault};
use crate::host::{Bare, Host, HostError};
use crate::machine::{AssembleError, DiskBase, GUEST_CID, Machine, Parts, acpi_windows};
use crate::memory::{GuestMemory, MemoryError};
use crate::vcpu::monotonic_ns;

/// Why a machine could not be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A number in the request.
    #[error("{what} {value} is out of limits")]
    Limit {
        /// What.
        what: &'static str,
        /// How much.
        value: usize,
    },
    /// Descriptors do not match the request.
    #[error("request names {expected} descriptors but brought {found}")]
    Descriptors {
        /// By the request.
        expected: usize,
        /// With the message.
        found: usize,
    },
    /// A disk from a snapshot.
    #[error("disk {0} cannot come from a snapshot when booting")]
    DiskSource(usize),
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
    /// This host.
    #[error("virtual machine could not be made")]
    Host(#[source] HostError),
    /// Guest memory.
    #[error("guest memory could not be made")]
    Memory(#[source] MemoryError),
    /// Kernel, initramfs, command line.
    #[error("kernel could not be loaded")]
    Load(#[source] LoadError),
    /// Tables in guest memory.
    #[error("acpi tables could not be made")]
    Acpi(#[source] AcpiError),
    /// Descriptor and page tables in guest memory.
    #[error("boot tables could not be written")]
    Tables(#[source] vm_memory::GuestMemoryError),
    /// Devices.
    #[error("devices could not be built")]
    Devices(#[source] DeviceBuildError),
    /// A vCPU's first state.
    #[error("vcpu {vcpu} could not be set up")]
    Vcpu {
        /// Which.
        vcpu: u8,
        /// Cause.
        #[source]
        source: VcpuStateError,
    },
    /// Putting it together.
    #[error("machine could not be assembled")]
    Assemble(#[source] AssembleError),
}

impl Blame for BootError {
    fn fault(&self) -> Fault {
        match self {
            Self::Limit { .. } | Self::Descriptors { .. } | Self::DiskSource(_) | Self::Tap => {
                Fault::Caller
            }
            Self::Host(error) => error.fault(),
            Self::Memory(error) => error.fault(),
            Self::Load(error) => error.fault(),
            Self::Devices(
                DeviceBuildError::TooManyDisks(_)
                | DeviceBuildError::DiskWindow { .. }
                | DeviceBuildError::DiskId { .. },
            ) => Fault::Caller,
            _ => Fault::Host,
        }
    }
}

/// The device's word for the protocol's.
pub(crate) fn access(access: Access) -> DiskAccess {
    match access {
        Access::ReadOnly => DiskAccess::ReadOnly,
        Access::CopyOnWrite => DiskAccess::CopyOnWrite,
    }
}

/// Takes a tap: a character device. Whatever else of it is wrong only loses frames.
pub(crate) fn tap(file: File) -> Option<OwnedFd> {
    let mode = fstat(&file).ok()?.st_mode;
    let is_tap = FileType::from_raw_mode(mode) == FileType::CharacterDevice;
    is_tap.then(|| file.into())
}

/// Takes a disk that is a whole file.
pub(crate) fn whole_file(disk: &Disk, file: File) -> io::Result<(DiskConfig, DiskBase)> {
    let length = file.metadata()?.len();
    let base = DiskBase {
        file: file.try_clone()?,
        offset: 0,
    };
    Ok((
        DiskConfig {
            file,
            access: access(disk.access),
            id: disk.id.clone(),
            offset: 0,
            length,
        },
        base,
    ))
}

fn check(request: &BootRequest, descriptors: usize) -> Result<(), BootError> {
    let BootRequest {
        vcpu_count,
        memory_mib: _,
        command_line: _,
        has_initramfs,
        disks,
        network,
    } = request;
    if *vcpu_count == 0 || *vcpu_count > VCPU_COUNT_MAX {
        return Err(BootError::Limit {
            what: "vcpu count",
            value: usize::from(*vcpu_count),
        });
    }
    if disks.len() > DISK_COUNT_MAX {
        return Err(BootError::Limit {
            what: "disk count",
            value: disks.len(),
        });
    }
    if let Some(disk) = disks
        .iter()
        .position(|disk| disk.source != DiskSource::Descriptor)
    {
        return Err(BootError::DiskSource(disk));
    }
    let has_tap = *network == Network::Plugged;
    let expected = 1 + usize::from(*has_initramfs) + disks.len() + usize::from(has_tap);
    if descriptors != expected {
        return Err(BootError::Descriptors {
            expected,
            found: descriptors,
        });
    }
    Ok(())
}

fn set_vcpu(
    host: &Host,
    bare: &Bare,
    number: u8,
    entry: vm_memory::GuestAddress,
) -> Result<(), VcpuStateError> {
    let call = |call| move |source| VcpuStateError::Call { call, source };
    let fd = &bare.vcpus[usize::from(number)];
    let count = u8::try_from(bare.vcpus.len()).expect("limited by VCPU_COUNT_MAX");
    vcpu_state::set_cpuid(fd, &host.cpuid(number, count))?;
    msr::write(fd, &msr::at_boot()).map_err(VcpuStateError::Msr)?;
    // The others wait for the boot processor's INIT and SIPI, as KVM makes them.
    if number == 0 {
        let fresh = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        fd.set_sregs(&regs::entry_sregs(&fresh))
            .map_err(call("KVM_SET_SREGS"))?;
        fd.set_regs(&regs::entry_regs(entry))
            .map_err(call("KVM_SET_REGS"))?;
    }
    Ok(())
}

/// Makes a machine with its kernel loaded, not yet running.
///
/// # Errors
/// A request out of limits, a file that is no kernel, or this host.
pub fn boot(
    request: &BootRequest,
    files: Vec<File>,
    agent: UnixStream,
    claimed_ns: u64,
) -> Result<Machine, BootError> {
    check(request, files.len())?;
    let mut timings = Timings {
        claimed_ns: Some(claimed_ns),
        ..Default::default()
    };
    let memory_bytes = u64::from(request.memory_mib) << 20;
    let memory = GuestMemory::reserve(memory_bytes).map_err(BootError::Memory)?;
    timings.memory_mapped_ns = Some(monotonic_ns());
    let host = Host::open().map_err(BootError::Host)?;
    let bare = host
        .make(memory, request.vcpu_count)
        .map_err(BootError::Host)?;
    timings.vm_made_ns = Some(monotonic_ns());

    let mut files = files.into_iter();
    let kernel = files.next().ok_or(BootError::Descriptors {
        expected: 1,
        found: 0,
    })?;
    let initramfs = if request.has_initramfs {
        files.next()
    } else {
        None
    };
    let tap = match request.network {
        Network::Plugged => Some(files.next_back().and_then(tap).ok_or(BootError::Tap)?),
        Network::Absent | Network::Unplugged => None,
    };
    let disks = request
        .disks
        .iter()
        .zip(files)
        .enumerate()
        .map(|(disk, (config, file))| {
            whole_file(config, file).map_err(|source| BootError::DiskFile { disk, source })
        });
    let (disks, disk_bases) = disks.collect::<Result<(Vec<_>, Vec<_>), _>>()?;
    let view = bare.memory.view();
    let config = DevicesConfig {
        disks,
        guest_cid: GUEST_CID,
        agent_stream: agent,
        network: match request.network {
            Network::Absent => NetworkDevice::Absent,
            Network::Unplugged | Network::Plugged => NetworkDevice::Present,
        },
    };
    let devices = Devices::new(config, view.clone()).map_err(BootError::Devices)?;
    if let Some(tap) = tap {
        devices.plug(tap).map_err(BootError::Devices)?;
    }
    let windows = devices.mmio_windows().map_err(BootError::Devices)?;

    let described = acpi_windows(&windows).map_err(BootError::Assemble)?;
    let rsdp = acpi::write(&view, request.vcpu_count, &described).map_err(BootError::Acpi)?;
    let entry = loader::load(
        &view,
        memory_bytes,
        &kernel,
        initramfs.as_ref(),
        &request.command_line,
        rsdp,
    )
    .map_err(BootError::Load)?;
    regs::write_tables(&view).map_err(BootError::Tables)?;
    for vcpu in 0..request.vcpu_count {
        set_vcpu(&host, &bare, vcpu, entry).map_err(|source| BootError::Vcpu { vcpu, source })?;
    }
    timings.state_set_ns = Some(monotonic_ns());
    let parts = Parts {
        bare,
        devices,
        windows,
        disk_bases,
        timings,
    };
    Machine::assemble(parts).map_err(BootError::Assemble)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> BootRequest {
        let disk = Disk {
            id: "a".into(),
            access: Access::ReadOnly,
            source: DiskSource::Descriptor,
        };
        BootRequest {
            vcpu_count: 1,
            memory_mib: 128,
            command_line: String::new(),
            has_initramfs: true,
            disks: vec![disk],
            network: Network::Absent,
        }
    }

    #[test]
    fn descriptors_must_match_the_request() {
        assert!(check(&request(), 3).is_ok());
        for found in [0, 2, 4] {
            let error = check(&request(), found).unwrap_err();
            assert!(matches!(error, BootError::Descriptors { expected: 3, .. }));
            assert_eq!(error.fault(), Fault::Caller);
        }
    }

    #[test]
    fn a_tap_is_one_descriptor_more_and_a_character_device() {
        for (network, expected) in [
            (Network::Absent, 3),
            (Network::Unplugged, 3),
            (Network::Plugged, 4),
        ] {
            let request = BootRequest {
                network,
                ..request()
            };
            assert!(check(&request, expected).is_ok());
            assert!(check(&request, 7 - expected).is_err());
        }
        assert!(tap(File::open("/dev/null").unwrap()).is_some());
        assert!(tap(File::open("/proc/self/exe").unwrap()).is_none());
    }

    #[test]
    fn processors_and_disks_have_limits() {
        for vcpu_count in [0, VCPU_COUNT_MAX + 1] {
            assert!(matches!(
                check(
                    &BootRequest {
                        vcpu_count,
                        ..request()
                    },
                    3
                ),
                Err(BootError::Limit { .. })
            ));
        }
        let disks = vec![request().disks[0].clone(); DISK_COUNT_MAX + 1];
        assert!(matches!(
            check(&BootRequest { disks, ..request() }, 11),
            Err(BootError::Limit { .. })
        ));
    }

    #[test]
    fn a_disk_of_a_snapshot_cannot_be_booted_with() {
        let mut request = request();
        request.disks[0].source = DiskSource::Snapshot;
        assert!(matches!(check(&request, 3), Err(BootError::DiskSource(0))));
    }
}
