//! What a first run costs, paid ahead. A claim is a few dozen system calls and some decoding; in a process that has done none of
//! it yet, most of its time goes into page faults on the monitor's own code and heap and into what KVM makes at first use.
//! So a shell goes through the motions of a claim with its own, empty state, and its program's pages are mapped.
//!
//! A shell whose rehearsal fails is none: whatever would fail every claim is found before there is a request.

use std::fs::File;
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{Advice, madvise};
use thaw_snapshot::{Metadata, PageSource, SectionKind, Snapshot, VerifyError, WriteError, Writer};
use thaw_vmm_control::wire::{self, Receiver, WireError};
use thaw_vmm_control::{Disk, DiskAccess, DiskSource, Request, RestoreRequest};
use thiserror::Error;

use crate::arch::x86_64::interrupts::{self, InterruptError};
use crate::arch::x86_64::vcpu_state::{self, VcpuStateError};
use crate::belongings;
use crate::devices::{DeviceRestoreError, DiskFiles};
use crate::machine::Machine;
use crate::save::{self, SaveError};
use crate::state::{self, StateError};

/// What went wrong in a rehearsal.
#[derive(Debug, Error)]
pub enum RehearsalError {
    /// No descriptors or sockets.
    #[error("descriptors for a rehearsal could not be made")]
    Descriptors(#[source] std::io::Error),
    /// The shell's state could not be read.
    #[error("state of the shell could not be read")]
    Capture(#[source] SaveError),
    /// It could not be encoded.
    #[error("state of the shell could not be encoded")]
    Encode(#[source] postcard::Error),
    /// It could not be written.
    #[error("rehearsed snapshot could not be written")]
    Write(#[source] WriteError),
    /// It could not be read.
    #[error("rehearsed snapshot could not be read")]
    Read(#[source] VerifyError),
    /// Nor opened.
    #[error("rehearsed snapshot could not be opened")]
    Open(#[source] thaw_snapshot::OpenError),
    /// It could not be decoded.
    #[error("rehearsed state could not be decoded")]
    State(#[source] StateError),
    /// A request like the one to come.
    #[error("rehearsed request could not be exchanged")]
    Request(#[source] WireError),
    /// A vCPU.
    #[error("vcpu state could not be set")]
    Vcpu(#[source] VcpuStateError),
    /// Interrupt chips or clock.
    #[error("interrupt chips or clock could not be set")]
    Interrupts(#[source] InterruptError),
    /// Devices.
    #[error("devices could not take on a state")]
    Devices(#[source] DeviceRestoreError),
}

/// Maps the pages of this program and its libraries, which lie in the page cache, all at once.
fn map_program() {
    // What cannot be read or mapped ahead is mapped when it is needed, which is slower and otherwise the same.
    let Ok(maps) = belongings::maps() else {
        return;
    };
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(access), Some(path)) = (words.next(), words.next(), words.nth(3))
        else {
            continue;
        };
        let bounds = range.split_once('-').and_then(|(start, end)| {
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some((number(start)?, number(end)?))
        });
        let (Some((start, end)), true) = (bounds, path.starts_with('/')) else {
            continue;
        };
        if access.starts_with("r-") {
            let address = std::ptr::without_provenance_mut(start);
            // SAFETY: MADV_POPULATE_READ changes no content; it fails for a range that is not mapped any more.
            let _ = unsafe { madvise(address, end - start, Advice::LinuxPopulateRead) };
        }
    }
}

/// A snapshot's memory of nothing but zeros.
struct Nothing;

impl PageSource for Nothing {
    fn read_at(&mut self, _offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn next_data(&mut self, _offset: u64) -> std::io::Result<Option<u64>> {
        Ok(None)
    }
}

/// A request like the one that will come, sent and received.
fn rehearse_request(disks: usize) -> Result<(), RehearsalError> {
    let (ours, theirs) = UnixStream::pair().map_err(RehearsalError::Descriptors)?;
    let disk = Disk {
        id: "disk".into(),
        access: DiskAccess::ReadOnly,
        source: DiskSource::Descriptor,
    };
    let request = Request::Restore(RestoreRequest {
        disks: vec![disk; disks],
        resume: true,
        ..Default::default()
    });
    wire::send(&ours, &request, &[]).map_err(RehearsalError::Request)?;
    let mut receiver = Receiver::new();
    receiver
        .read_from(&theirs)
        .map_err(RehearsalError::Descriptors)?;
    receiver
        .next_message::<Request>()
        .map_err(RehearsalError::Request)?;
    Ok(())
}

/// Writes the shell's own state as a snapshot and gives it back to the shell as a claim would, down to the clocks.
fn rehearse_claim(machine: &mut Machine) -> Result<(), RehearsalError> {
    let (captured, tsc_khz) = save::capture(machine).map_err(RehearsalError::Capture)?;
    let file = memfd_create("thaw-rehearsal", MemfdFlags::CLOEXEC)
        .map_err(|error| RehearsalError::Descriptors(error.into()))?;
    let file = File::from(file);
    let copy = file.try_clone().map_err(RehearsalError::Descriptors)?;
    let mut writer = Writer::new(copy);
    let write = RehearsalError::Write;
    writer.metadata(&Metadata::default()).map_err(write)?;
    let cpu = state::cpu_record(&captured.vcpus[0].cpuid, tsc_khz);
    writer.cpu(&cpu).map_err(write)?;
    let section = state::encode(&captured).map_err(RehearsalError::Encode)?;
    writer
        .section(SectionKind::Machine, &section)
        .map_err(write)?;
    writer
        .sparse_section(SectionKind::Memory, captured.memory_bytes, &mut Nothing)
        .map_err(write)?;
    writer.finish().map_err(write)?;

    let snapshot = Snapshot::from_file(file, "rehearsal").map_err(RehearsalError::Open)?;
    let read = RehearsalError::Read;
    let cpu = snapshot.cpu().map_err(read)?;
    assert!(cpu.missing_on(&cpu).is_empty(), "a host has what it has");
    let section = snapshot.section(SectionKind::Machine).map_err(read)?;
    let saved = state::decode(&section).map_err(RehearsalError::State)?;
    snapshot.memory_layers().map_err(read)?;

    let vcpu = RehearsalError::Vcpu;
    for (running, state) in machine.vcpus.iter().zip(&saved.vcpus) {
        vcpu_state::restore(&running.fd(), state, &machine.limits).map_err(vcpu)?;
    }
    interrupts::restore(&machine.vm, &saved.chips).map_err(RehearsalError::Interrupts)?;
    let (agent, _) = UnixStream::pair().map_err(RehearsalError::Descriptors)?;
    machine
        .devices
        .reset_to(&saved.devices, DiskFiles::Kept, agent)
        .map_err(RehearsalError::Devices)?;
    machine.devices.prime();
    if let Some(first) = machine.vcpus.first() {
        let offset = vcpu_state::offset_for(&first.fd(), saved.time.tsc).map_err(vcpu)?;
        vcpu_state::set_time(&first.fd(), &saved.vcpus[0], offset).map_err(vcpu)?;
        vcpu_state::set_deadline(&first.fd(), &saved.vcpus[0]).map_err(vcpu)?;
        vcpu_state::tell_paused(&first.fd()).map_err(vcpu)?;
    }
    interrupts::set_clock_ns(&machine.vm, saved.time.clock_ns).map_err(RehearsalError::Interrupts)
}

/// Goes through a claim with an unclaimed shell's machine. It is afterwards as it was, but faster.
///
/// # Errors
/// What would fail a claim.
pub fn rehearse(machine: &mut Machine) -> Result<(), RehearsalError> {
    map_program();
    rehearse_request(machine.devices.disk_count())?;
    rehearse_claim(machine)
}
