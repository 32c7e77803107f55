//! What KVM keeps of a vCPU that has run, beside the state that is saved and set ([`super::vcpu_state`]). The sources named are
//! of Linux 6.1, under arch/x86/kvm.
//!
//! - **INIT and SIPI that nobody has looked at**: applied by `KVM_GET_MP_STATE` (`kvm_apic_accept_events`, lapic.c); all vCPUs are
//!   stopped, so none follows.
//! - **NMIs that are queued**: merged into the events by `KVM_GET_VCPU_EVENTS` (`process_nmi`, x86.c), which setting the events
//!   replaces.
//! - **TSC_DEADLINE**: setting the LAPIC starts its timer anew (`kvm_apic_set_state`, lapic.c), in deadline mode for the deadline
//!   that the vCPU still has; so that one goes first. Outside of deadline mode it is zero already. What the timer had
//!   pending is dropped there too.
//! - **Machine check banks**: no state lists them, but a guest's kernel may write what it likes into their address registers.
//! - **PPR, the processor priority**: setting the LAPIC computes it from the interrupt that was in service before
//!   (`apic_update_ppr` before `highest_isr_cache` is dropped, `kvm_apic_set_state`). It is computed again before the guest is
//!   interrupted and when the guest reads it, so it may stay.
//!
//! - **Page faults that KVM finishes beside the vCPU**: where memory comes late, a vCPU waits for it without the guest's knowledge
//!   (`KVM_REQ_APF_HALT`, x86.c), in the old life too. It is not to be dropped: then nothing would end the wait but an interrupt,
//!   and the guest may be where none is taken. So it ends by itself, in the new life, and changes nothing there: memory given
//!   back comes as the snapshot has it. Hence [`msr`] leaves the register alone that would drop it.
//!
//! CPUID is not set again: KVM refuses a change after the first run, and it is what the machine was claimed with.

use kvm_ioctls::VcpuFd;

use super::msr::{self, MsrV1};
use super::vcpu_state::VcpuStateError;

/// `IA32_MCG_CAP`: the number of banks in the lowest 8 bits.
const MCG_CAP: u32 = 0x179;
/// `IA32_MC0_CTL`, the first of four registers a bank.
const MC0_CTL: u32 = 0x400;
/// Most banks that KVM has (`KVM_MAX_MCE_BANKS`).
const BANKS_MAX: u32 = 32;

/// Drops what is named above. The vCPU is paused, and so are all others; its state is set next.
///
/// # Errors
/// Any KVM call that fails.
pub fn forget(fd: &VcpuFd) -> Result<(), VcpuStateError> {
    let failed = |call| move |source| VcpuStateError::Call { call, source };
    fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    fd.get_vcpu_events()
        .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let zero = |index| MsrV1 { index, data: 0 };
    let capability = msr::read(fd, &[MCG_CAP]).map_err(VcpuStateError::Msr)?[0].data;
    let banks = u32::try_from(capability & 0xff).map_or(BANKS_MAX, |banks| banks.min(BANKS_MAX));
    let mut cleared = vec![zero(msr::TSC_DEADLINE)];
    cleared.extend((MC0_CTL..MC0_CTL + 4 * banks).map(zero));
    msr::write(fd, &cleared).map_err(VcpuStateError::Msr)
}
