//! The state of one virtual processor: reading it when a machine is saved, setting it when one is restored.
//!
//! # Why the order of setting is what it is
//! Each step is one KVM call; the sources named are of Linux 6.1, under arch/x86/kvm.
//! 1. **CPUID** first: it decides which bits of CR4, XCR0, XSAVE and which MSRs the later calls accept
//!    (`kvm_vcpu_after_set_cpuid`, cpuid.c). KVM refuses a change after the first run.
//! 2. **TSC frequency** before anything that turns guest time into host time (`kvm_set_tsc_khz`, x86.c).
//! 3. **sregs**: carries EFER and CR4, and the APIC base, which decides how the LAPIC page is understood (xAPIC or x2APIC:
//!    `kvm_apic_state_fixup`, lapic.c). It also writes CR8 to the LAPIC, so it must come before the LAPIC.
//! 4. **xcrs**, then **xsave**: XCR0 says what the guest has enabled; both are checked against CPUID alone.
//! 5. **regs**, then **debug registers**. `KVM_SET_REGS` drops a pending exception (`__set_regs`, x86.c), so events come later.
//! 6. **MSRs** but time: they need CPUID. kvm-clock's MSR names guest memory, which is there by now.
//! 7. **LAPIC** after sregs and before TSC_DEADLINE: a write of the deadline is dropped while the timer's LVT is not in deadline
//!    mode (`kvm_set_lapic_tscdeadline_msr`, lapic.c). It also comes before the IOAPIC (see [`super::interrupts`]).
//! 8. **MP state**: `KVM_SET_SREGS` may make the boot processor runnable, so it comes after.
//! 9. **vCPU events** last: what is pending or injected must not be disturbed by any of the above.
//!
//! Then, when the guest resumes ([`set_time`]), and for all vCPUs before the next step:
//! 10. **TSC offset** of every vCPU: as long as not all match, KVM does not run its clock from the TSC
//!     (`kvm_track_tsc_matching`, x86.c). Not `IA32_TSC`: KVM takes a write of that within a second of what it expects for an
//!     attempt to synchronise vCPUs, and ignores the value (`kvm_synchronize_tsc`, x86.c).
//! 11. **KVM clock**, once for the machine ([`super::interrupts`]).
//! 12. **TSC_DEADLINE**: KVM computes the host time of the timer at the write (`start_sw_tscdeadline`, lapic.c); with the wrong
//!     offset it would arm it for the wrong moment and never look again.

use std::io;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    Xsave, kvm_debugregs, kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::cpuid::{self, CpuidEntryV1};
use super::msr::{self, MsrError, MsrV1};
use super::plain::{self, WrongLength};

/// Length of `struct kvm_xsave` without what `KVM_CAP_XSAVE2` adds.
const XSAVE_BYTES: usize = 4096;
/// Longest XSAVE area taken: all of today's features need about 11 KiB.
const XSAVE_BYTES_MAX: usize = 64 * 1024;

/// State of one vCPU as saved. Fields named like KVM's structs hold their bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStateV1 {
    /// What CPUID told the guest.
    pub cpuid: Vec<CpuidEntryV1>,
    /// `struct kvm_sregs`.
    #[serde(with = "crate::bytes")]
    pub sregs: Vec<u8>,
    /// `struct kvm_xcrs`.
    #[serde(with = "crate::bytes")]
    pub xcrs: Vec<u8>,
    /// `struct kvm_xsave`, as long as the saving host's KVM made it.
    #[serde(with = "crate::bytes")]
    pub xsave: Vec<u8>,
    /// `struct kvm_regs`.
    #[serde(with = "crate::bytes")]
    pub regs: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[serde(with = "crate::bytes")]
    pub debugregs: Vec<u8>,
    /// Model-specific registers but time.
    pub msrs: Vec<MsrV1>,
    /// `struct kvm_lapic_state`.
    #[serde(with = "crate::bytes")]
    pub lapic: Vec<u8>,
    /// `KVM_MP_STATE_*`.
    pub mp_state: u32,
    /// `struct kvm_vcpu_events`.
    #[serde(with = "crate::bytes")]
    pub events: Vec<u8>,
    /// `IA32_TSC_DEADLINE`; 0 is no timer.
    pub tsc_deadline: u64,
    /// How far this vCPU's TSC is ahead of the first one's, modulo 2^64.
    pub tsc_ahead: u64,
}

/// What the host's KVM is like, as far as vCPU state depends on it.
#[derive(Clone, Debug)]
pub struct HostVcpuLimits {
    /// MSRs to save.
    pub msr_indices: Vec<u32>,
    /// Bytes of an XSAVE area (`KVM_CAP_XSAVE2`), at least 4,096.
    pub xsave_bytes: usize,
}

/// Why a vCPU's state could not be read or set.
#[derive(Debug, Error)]
pub enum VcpuStateError {
    /// A KVM call failed.
    #[error("{call} failed")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Model-specific registers.
    #[error("model-specific registers")]
    Msr(#[source] MsrError),
    /// A saved struct is not of its length.
    #[error("saved vcpu state is malformed")]
    Length(#[source] WrongLength),
    /// The saved XSAVE area does not fit this host.
    #[error("saved xsave area has {found} bytes, this host's kvm takes {host}")]
    Xsave {
        /// Saved bytes.
        found: usize,
        /// What KVM takes.
        host: usize,
    },
    /// Too many CPUID entries.
    #[error("saved cpuid is malformed")]
    Cpuid(#[source] cpuid::TooManyEntries),
    /// CPUID that no vCPU of this host is told.
    #[error("saved cpuid is another machine's")]
    Leaf(#[source] cpuid::ForeignLeaf),
    /// In system management mode, which has no memory here.
    #[error("saved vcpu is in system management mode, which no machine has")]
    ManagementMode,
    /// No MP state of x86.
    #[error("saved mp state {0} is unknown")]
    MpState(u32),
    /// The host cannot run at the guest's TSC frequency.
    #[error("tsc of {guest_khz} khz cannot be had on a host of {host_khz} khz")]
    TscFrequency {
        /// The snapshot's.
        guest_khz: u32,
        /// This host's.
        host_khz: u32,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Call { call, source }
}

fn get_xsave(fd: &VcpuFd, bytes: usize) -> Result<Vec<u8>, VcpuStateError> {
    let words = bytes.div_ceil(4);
    let mut area =
        Xsave::new(words.saturating_sub(XSAVE_BYTES / 4)).map_err(|_| VcpuStateError::Xsave {
            found: bytes,
            host: XSAVE_BYTES_MAX,
        })?;
    if bytes > XSAVE_BYTES {
        // SAFETY: the area was allocated with the length that KVM_CAP_XSAVE2 reports, which is what KVM_GET_XSAVE2 fills.
        unsafe { fd.get_xsave2(&mut area) }.map_err(call("KVM_GET_XSAVE2"))?;
        let (head, tail) = (area.as_fam_struct_ref().xsave.region, area.as_slice());
        return Ok(head
            .iter()
            .chain(tail)
            .flat_map(|word| word.to_ne_bytes())
            .collect());
    }
    let area = fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?;
    Ok(area
        .region
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect())
}

/// KVM reads as much as its own features need; an area from a host that needs less is longer than nothing but zeros.
fn check_xsave(saved: &[u8], host: usize) -> Result<(), VcpuStateError> {
    let fits = (XSAVE_BYTES..=XSAVE_BYTES_MAX.min(host)).contains(&saved.len())
        && saved.len().is_multiple_of(4);
    fits.then_some(()).ok_or(VcpuStateError::Xsave {
        found: saved.len(),
        host,
    })
}

fn set_xsave(fd: &VcpuFd, saved: &[u8], host: usize) -> Result<(), VcpuStateError> {
    check_xsave(saved, host)?;
    let wrong = VcpuStateError::Xsave {
        found: saved.len(),
        host,
    };
    let mut words = saved
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    let mut head = kvm_xsave::default();
    head.region
        .iter_mut()
        .zip(&mut words)
        .for_each(|(slot, word)| *slot = word);
    let Ok(mut area) = Xsave::new(host.div_ceil(4).saturating_sub(XSAVE_BYTES / 4)) else {
        return Err(wrong);
    };
    // SAFETY: only the fixed part is replaced; the flexible array and its length are left alone.
    unsafe { area.as_mut_fam_struct() }.xsave.region = head.region;
    area.as_mut_slice()
        .iter_mut()
        .zip(words)
        .for_each(|(slot, word)| *slot = word);
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says that KVM_SET_XSAVE reads.
    unsafe { fd.set_xsave2(&area) }.map_err(call("KVM_SET_XSAVE"))
}

fn offset_attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address,
    }
}

/// Numbers of calls that kvm-ioctls knows for other architectures only (include/uapi/linux/kvm.h).
mod ioctls {
    use kvm_bindings::{KVMIO, kvm_device_attr};
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

/// What KVM adds to the (scaled) host TSC to make the guest's, modulo 2^64.
///
/// # Errors
/// KVM is older than Linux 5.16.
pub fn tsc_offset(fd: &VcpuFd) -> Result<u64, VcpuStateError> {
    let mut offset = 0u64;
    let attribute = offset_attribute(&raw mut offset as u64);
    // SAFETY: the attribute's address points to a live u64, which is what KVM_VCPU_TSC_OFFSET writes.
    let result = unsafe { ioctl_with_ref(fd, ioctls::KVM_GET_DEVICE_ATTR(), &attribute) };
    attribute_result(result, "KVM_GET_DEVICE_ATTR of the tsc offset")?;
    Ok(offset)
}

fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> Result<(), VcpuStateError> {
    let attribute = offset_attribute(&raw const offset as u64);
    // SAFETY: the attribute's address points to a live u64, which is what KVM_VCPU_TSC_OFFSET reads.
    let result = unsafe { ioctl_with_ref(fd, ioctls::KVM_SET_DEVICE_ATTR(), &attribute) };
    attribute_result(result, "KVM_SET_DEVICE_ATTR of the tsc offset")
}

fn attribute_result(result: i32, name: &'static str) -> Result<(), VcpuStateError> {
    if result == 0 {
        Ok(())
    } else {
        Err(call(name)(kvm_ioctls::Error::last()))
    }
}

/// The guest's TSC now.
///
/// # Errors
/// KVM's own.
pub fn tsc(fd: &VcpuFd) -> Result<u64, VcpuStateError> {
    Ok(msr::read(fd, &[msr::TSC]).map_err(VcpuStateError::Msr)?[0].data)
}

/// Reads the state of a paused vCPU. `first_offset` is [`tsc_offset`] of the machine's first vCPU.
///
/// Every saved MSR is also written back: a register that KVM would refuse on restore is found now, while the machine still
/// lives.
///
/// # Errors
/// Any KVM call that fails; an MSR that cannot be read or written back.
pub fn save(
    fd: &VcpuFd,
    host: &HostVcpuLimits,
    first_offset: u64,
) -> Result<VcpuStateV1, VcpuStateError> {
    // First: KVM_GET_MP_STATE applies INIT and SIPI that are pending, which changes registers.
    let mp_state = fd
        .get_mp_state()
        .map_err(call("KVM_GET_MP_STATE"))?
        .mp_state;
    let msrs = msr::read(fd, &host.msr_indices).map_err(VcpuStateError::Msr)?;
    msr::write(fd, &msrs).map_err(VcpuStateError::Msr)?;
    let cpuid = get_cpuid(fd)?;
    let lapic = fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    Ok(VcpuStateV1 {
        cpuid,
        sregs: plain::to_bytes(&fd.get_sregs().map_err(call("KVM_GET_SREGS"))?),
        xcrs: plain::to_bytes(&fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?),
        xsave: get_xsave(fd, host.xsave_bytes)?,
        regs: plain::to_bytes(&fd.get_regs().map_err(call("KVM_GET_REGS"))?),
        debugregs: plain::to_bytes(&fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?),
        msrs,
        lapic: plain::to_bytes(&lapic),
        mp_state,
        events: plain::to_bytes(&fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?),
        tsc_deadline: msr::read(fd, &[msr::TSC_DEADLINE]).map_err(VcpuStateError::Msr)?[0].data,
        tsc_ahead: tsc_offset(fd)?.wrapping_sub(first_offset),
    })
}

fn mp_state(saved: u32) -> Result<kvm_mp_state, VcpuStateError> {
    match saved {
        KVM_MP_STATE_RUNNABLE
        | KVM_MP_STATE_UNINITIALIZED
        | KVM_MP_STATE_INIT_RECEIVED
        | KVM_MP_STATE_HALTED
        | KVM_MP_STATE_SIPI_RECEIVED => Ok(kvm_mp_state { mp_state: saved }),
        unknown => Err(VcpuStateError::MpState(unknown)),
    }
}

/// Sets CPUID; step 1.
///
/// # Errors
/// More entries than KVM takes, or KVM's own.
pub fn set_cpuid(fd: &VcpuFd, entries: &[CpuidEntryV1]) -> Result<(), VcpuStateError> {
    let cpuid = cpuid::to_kvm(entries).map_err(VcpuStateError::Cpuid)?;
    fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))
}

/// Frequency of the guest's TSC, kHz.
///
/// # Errors
/// KVM's own.
pub fn tsc_khz(fd: &VcpuFd) -> Result<u32, VcpuStateError> {
    fd.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))
}

/// A vCPU as it was when it was made, before any guest: what need not be set again.
#[derive(Clone, Debug)]
pub struct FreshVcpu {
    cpuid: Vec<CpuidEntryV1>,
    tsc_khz: u32,
    msrs: Vec<MsrV1>,
}

impl FreshVcpu {
    /// Frequency of its TSC, kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// One that no KVM made.
    #[cfg(test)]
    pub(crate) fn of(cpuid: Vec<CpuidEntryV1>, msrs: Vec<MsrV1>) -> Self {
        Self {
            cpuid,
            tsc_khz: 1,
            msrs,
        }
    }

    /// What CPUID tells its guest.
    pub fn cpuid(&self) -> &[CpuidEntryV1] {
        &self.cpuid
    }
}

/// Whether a saved state, of vCPU `place.0` of `place.1`, could be one of this host: what KVM takes without a question, and what can
/// be told before KVM is asked. All lengths are right afterwards; the registers that the saving host did not know are filled in.
///
/// # Errors
/// What is wrong first.
pub fn check(
    state: &mut VcpuStateV1,
    fresh: &FreshVcpu,
    host: &HostVcpuLimits,
    place: (u8, u8),
) -> Result<(), VcpuStateError> {
    let VcpuStateV1 {
        cpuid: leaves,
        sregs,
        xcrs,
        xsave,
        regs,
        debugregs,
        msrs,
        lapic,
        mp_state: saved_mp_state,
        events,
        tsc_deadline: _, // any is a moment
        tsc_ahead: _,    // any is a distance
    } = state;
    if leaves.len() > kvm_bindings::KVM_MAX_CPUID_ENTRIES {
        return Err(VcpuStateError::Cpuid(cpuid::TooManyEntries(leaves.len())));
    }
    if !cpuid::is_same(&fresh.cpuid, leaves) {
        cpuid::check(leaves, &fresh.cpuid, place).map_err(VcpuStateError::Leaf)?;
    }
    let length = VcpuStateError::Length;
    plain::from_bytes::<kvm_sregs>(sregs).map_err(length)?;
    plain::from_bytes::<kvm_xcrs>(xcrs).map_err(length)?;
    check_xsave(xsave, host.xsave_bytes)?;
    plain::from_bytes::<kvm_regs>(regs).map_err(length)?;
    plain::from_bytes::<kvm_debugregs>(debugregs).map_err(length)?;
    msr::check(msrs, &host.msr_indices).map_err(VcpuStateError::Msr)?;
    if msrs.len() != fresh.msrs.len() {
        *msrs = msr::completed(msrs, &fresh.msrs);
    }
    plain::from_bytes::<kvm_lapic_state>(lapic).map_err(length)?;
    mp_state(*saved_mp_state)?;
    let events = plain::from_bytes::<kvm_vcpu_events>(events).map_err(length)?;
    if (events.smi.smm, events.smi.pending) != (0, 0) {
        return Err(VcpuStateError::ManagementMode);
    }
    Ok(())
}

/// Reads what a new vCPU, whose CPUID was set, is like.
///
/// # Errors
/// KVM's own.
pub fn fresh(fd: &VcpuFd, host: &HostVcpuLimits) -> Result<FreshVcpu, VcpuStateError> {
    Ok(FreshVcpu {
        cpuid: get_cpuid(fd)?,
        tsc_khz: tsc_khz(fd)?,
        msrs: msr::read(fd, &host.msr_indices).map_err(VcpuStateError::Msr)?,
    })
}

fn get_cpuid(fd: &VcpuFd) -> Result<Vec<CpuidEntryV1>, VcpuStateError> {
    let cpuid = fd
        .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(call("KVM_GET_CPUID2"))?;
    Ok(cpuid::written(cpuid.as_slice()))
}

/// Gives a vCPU that has never run the state of a saved one but time: all of the module's steps 1 to 9. Of CPUID, TSC
/// frequency and MSRs only what differs from `fresh` is set: most of it on a host like the one that saved, nothing is.
///
/// # Errors
/// Malformed state, a frequency that the host's processor cannot scale to, or any KVM call that fails.
pub fn claim(
    fd: &VcpuFd,
    fresh: &FreshVcpu,
    state: &VcpuStateV1,
    host: &HostVcpuLimits,
    tsc_khz: u32,
) -> Result<(), VcpuStateError> {
    if !cpuid::is_same(&fresh.cpuid, &state.cpuid) {
        set_cpuid(fd, &state.cpuid)?;
    }
    if tsc_khz != fresh.tsc_khz {
        fd.set_tsc_khz(tsc_khz)
            .map_err(|source| VcpuStateError::TscFrequency {
                guest_khz: tsc_khz,
                host_khz: fresh.tsc_khz,
                source,
            })?;
    }
    let changed = msr::changed(&fresh.msrs, &state.msrs);
    set(fd, state, &changed, host)
}

/// Sets everything but time, CPUID and TSC frequency, whatever the vCPU has done since it took these from the same state;
/// steps 3 to 9 of the module's order.
///
/// # Errors
/// Malformed state, or any KVM call that fails.
pub fn restore(
    fd: &VcpuFd,
    state: &VcpuStateV1,
    host: &HostVcpuLimits,
) -> Result<(), VcpuStateError> {
    set(fd, state, &state.msrs, host)
}

fn set(
    fd: &VcpuFd,
    state: &VcpuStateV1,
    msrs: &[MsrV1],
    host: &HostVcpuLimits,
) -> Result<(), VcpuStateError> {
    let VcpuStateV1 {
        cpuid: _, // claim
        sregs,
        xcrs,
        xsave,
        regs,
        debugregs,
        msrs: _, // those of `msrs`
        lapic,
        mp_state: saved_mp_state,
        events,
        tsc_deadline: _, // set_deadline
        tsc_ahead: _,    // set_time
    } = state;
    let length = VcpuStateError::Length;
    fd.set_sregs(&plain::from_bytes(sregs).map_err(length)?)
        .map_err(call("KVM_SET_SREGS"))?;
    fd.set_xcrs(&plain::from_bytes(xcrs).map_err(length)?)
        .map_err(call("KVM_SET_XCRS"))?;
    set_xsave(fd, xsave, host.xsave_bytes)?;
    fd.set_regs(&plain::from_bytes(regs).map_err(length)?)
        .map_err(call("KVM_SET_REGS"))?;
    fd.set_debug_regs(&plain::from_bytes(debugregs).map_err(length)?)
        .map_err(call("KVM_SET_DEBUGREGS"))?;
    msr::write(fd, msrs).map_err(VcpuStateError::Msr)?;
    fd.set_lapic(&plain::from_bytes(lapic).map_err(length)?)
        .map_err(call("KVM_SET_LAPIC"))?;
    fd.set_mp_state(mp_state(*saved_mp_state)?)
        .map_err(call("KVM_SET_MP_STATE"))?;
    fd.set_vcpu_events(&plain::from_bytes(events).map_err(length)?)
        .map_err(call("KVM_SET_VCPU_EVENTS"))
}

/// The offset that makes the first vCPU's TSC read `wanted` now.
///
/// # Errors
/// KVM's own.
pub fn offset_for(fd: &VcpuFd, wanted: u64) -> Result<u64, VcpuStateError> {
    // Read together, so that what passes in between is in both: the scaled host TSC is what remains.
    let (offset, now) = (tsc_offset(fd)?, tsc(fd)?);
    Ok(offset.wrapping_add(wanted.wrapping_sub(now)))
}

/// Sets the TSC; step 10. `first_offset` is [`offset_for`] the first vCPU.
///
/// # Errors
/// KVM's own.
pub fn set_time(fd: &VcpuFd, state: &VcpuStateV1, first_offset: u64) -> Result<(), VcpuStateError> {
    set_tsc_offset(fd, first_offset.wrapping_add(state.tsc_ahead))
}

/// Arms the deadline timer; step 12.
///
/// # Errors
/// KVM's own.
pub fn set_deadline(fd: &VcpuFd, state: &VcpuStateV1) -> Result<(), VcpuStateError> {
    let deadline = MsrV1 {
        index: msr::TSC_DEADLINE,
        data: state.tsc_deadline,
    };
    msr::write(fd, &[deadline]).map_err(VcpuStateError::Msr)
}

/// Tells the guest's watchdog that it was stopped (`KVM_KVMCLOCK_CTRL`). A guest that has no kvm-clock yet has no watchdog
/// to tell, which KVM answers with `EINVAL`.
///
/// # Errors
/// KVM's own.
pub fn tell_paused(fd: &VcpuFd) -> Result<(), VcpuStateError> {
    match fd.kvmclock_ctrl() {
        Err(error) if io::Error::from(error).raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result.map_err(call("KVM_KVMCLOCK_CTRL")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mp_state_of_another_architecture_is_refused() {
        assert!(mp_state(KVM_MP_STATE_HALTED).is_ok());
        for unknown in [5, 9, 10, u32::MAX] {
            assert!(matches!(mp_state(unknown), Err(VcpuStateError::MpState(_))));
        }
    }

    #[test]
    fn the_tsc_of_a_later_vcpu_keeps_its_distance() {
        // What save computes from two offsets, set_time gives back relative to any new first offset.
        let (first, second) = (0x10u64, u64::MAX - 5);
        let ahead = second.wrapping_sub(first);
        assert_eq!(0x10u64.wrapping_add(ahead), second);
    }
}
