//! The interrupt chips that KVM emulates, and its clock.
//!
//! The I/O APIC is set **after** every vCPU's LAPIC: setting it delivers what is pending in it to the LAPICs
//! (`kvm_set_ioapic`, arch/x86/kvm/ioapic.c), which a later `KVM_SET_LAPIC` would overwrite. Interrupts that devices had
//! raised and KVM had not yet delivered when the machine was saved are repeated by the devices on resume.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where KVM answers for the I/O APIC (`IOAPIC_DEFAULT_BASE_ADDRESS`, arch/x86/kvm/ioapic.h); nobody moves it.
const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Length of a chip's state in `struct kvm_irqchip`.
const CHIP_BYTES: usize = 512;

/// The chips as saved: for each the bytes of the union in `struct kvm_irqchip`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptChipsV1 {
    /// First 8259.
    #[serde(with = "crate::bytes")]
    pub pic_master: Vec<u8>,
    /// Second 8259.
    #[serde(with = "crate::bytes")]
    pub pic_slave: Vec<u8>,
    /// I/O APIC.
    #[serde(with = "crate::bytes")]
    pub ioapic: Vec<u8>,
}

/// Why chips or clock could not be read or set.
#[derive(Debug, Error)]
pub enum InterruptError {
    /// A KVM call failed.
    #[error("{call} failed")]
    Call {
        /// Name of the ioctl and what it was for.
        call: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The saved I/O APIC is somewhere else than the one of a machine.
    #[error("saved ioapic is at {0:#x} instead of {IOAPIC_BASE:#x}")]
    Base(u64),
    /// A saved chip is not of its length.
    #[error("saved {chip} has {found} bytes instead of {CHIP_BYTES}")]
    Length {
        /// Which.
        chip: &'static str,
        /// Saved bytes.
        found: usize,
    },
}

fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> InterruptError {
    move |source| InterruptError::Call { call, source }
}

fn get(vm: &VmFd, chip_id: u32) -> Result<Vec<u8>, InterruptError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip).map_err(call("KVM_GET_IRQCHIP"))?;
    // SAFETY: every member of the union is plain integers, and `dummy` covers all of it; KVM filled the whole struct.
    let bytes = unsafe { chip.chip.dummy };
    Ok(bytes.iter().map(|byte| byte.cast_unsigned()).collect())
}

fn chip<'a>(name: &'static str, saved: &'a [u8]) -> Result<&'a [u8; CHIP_BYTES], InterruptError> {
    saved.try_into().map_err(|_| InterruptError::Length {
        chip: name,
        found: saved.len(),
    })
}

/// Whether saved chips could be a machine's.
///
/// # Errors
/// A length or the I/O APIC's address.
pub fn check(state: &InterruptChipsV1) -> Result<(), InterruptError> {
    let InterruptChipsV1 {
        pic_master,
        pic_slave,
        ioapic,
    } = state;
    chip("pic master", pic_master)?;
    chip("pic slave", pic_slave)?;
    // `struct kvm_ioapic_state` begins with it.
    let base = chip("ioapic", ioapic)?.first_chunk().copied();
    match base.map_or(0, u64::from_ne_bytes) {
        IOAPIC_BASE => Ok(()),
        elsewhere => Err(InterruptError::Base(elsewhere)),
    }
}

fn set(vm: &VmFd, chip_id: u32, name: &'static str, saved: &[u8]) -> Result<(), InterruptError> {
    let bytes = chip(name, saved)?;
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    chip.chip.dummy = bytes.map(u8::cast_signed);
    vm.set_irqchip(&chip).map_err(call("KVM_SET_IRQCHIP"))
}

/// Reads the chips. All vCPUs are paused.
///
/// # Errors
/// KVM's own.
pub fn save(vm: &VmFd) -> Result<InterruptChipsV1, InterruptError> {
    Ok(InterruptChipsV1 {
        pic_master: get(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: get(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: get(vm, KVM_IRQCHIP_IOAPIC)?,
    })
}

/// Sets the chips, after every vCPU's LAPIC.
///
/// # Errors
/// Malformed state, or KVM's own.
pub fn restore(vm: &VmFd, state: &InterruptChipsV1) -> Result<(), InterruptError> {
    let InterruptChipsV1 {
        pic_master,
        pic_slave,
        ioapic,
    } = state;
    set(vm, KVM_IRQCHIP_PIC_MASTER, "pic master", pic_master)?;
    set(vm, KVM_IRQCHIP_PIC_SLAVE, "pic slave", pic_slave)?;
    set(vm, KVM_IRQCHIP_IOAPIC, "ioapic", ioapic)
}

/// The KVM clock, nanoseconds.
///
/// # Errors
/// KVM's own.
pub fn clock_ns(vm: &VmFd) -> Result<u64, InterruptError> {
    Ok(vm.get_clock().map_err(call("KVM_GET_CLOCK"))?.clock)
}

/// Makes the KVM clock go on from `clock_ns` now. No `KVM_CLOCK_REALTIME`: that would make the guest's monotonic time jump
/// over the days it was frozen.
///
/// # Errors
/// KVM's own.
pub fn set_clock_ns(vm: &VmFd, clock_ns: u64) -> Result<(), InterruptError> {
    vm.set_clock(&kvm_clock_data {
        clock: clock_ns,
        ..Default::default()
    })
    .map_err(call("KVM_SET_CLOCK"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_of_another_length_or_place_are_refused() {
        let mut good = InterruptChipsV1 {
            pic_master: vec![0; CHIP_BYTES],
            pic_slave: vec![0; CHIP_BYTES],
            ioapic: vec![0; CHIP_BYTES],
        };
        assert!(matches!(check(&good), Err(InterruptError::Base(0))));
        good.ioapic[..8].copy_from_slice(&IOAPIC_BASE.to_ne_bytes());
        check(&good).unwrap();
        type Field = fn(&mut InterruptChipsV1) -> &mut Vec<u8>;
        let fields: [Field; 3] = [
            |s| &mut s.pic_master,
            |s| &mut s.pic_slave,
            |s| &mut s.ioapic,
        ];
        for field in fields {
            for length in [0, CHIP_BYTES - 1, CHIP_BYTES + 1] {
                let mut wrong = good.clone();
                field(&mut wrong).resize(length, 0);
                assert!(matches!(check(&wrong), Err(InterruptError::Length { .. })));
            }
        }
    }
}
