//! KVM's C structs as bytes of a checked length, which is how a snapshot holds them.

use std::mem::size_of;
use std::ptr;

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use thiserror::Error;

/// A C struct of integers without padding and without pointers, valid for every content of its bytes.
///
/// # Safety
/// The implementor is `repr(C)`, has no padding bytes, and every bit pattern is a valid value.
pub unsafe trait Plain: Copy {
    /// Its name in the kernel's headers, for errors.
    const NAME: &'static str;
}

macro_rules! plain {
    ($($name:ident of $bytes:literal),*) => {$(
        const _: () = assert!(size_of::<$name>() == $bytes, "layout of the kernel's ABI");
        // SAFETY: a struct of the kernel's ABI made of integers and arrays of them, padded explicitly; its size is checked
        // above against the sum of its fields.
        unsafe impl Plain for $name {
            const NAME: &'static str = stringify!($name);
        }
    )*};
}
plain!(
    kvm_regs of 144, kvm_sregs of 312, kvm_debugregs of 128, kvm_vcpu_events of 64, kvm_xcrs of 392, kvm_lapic_state of 1024
);

/// A saved struct has the wrong length.
#[derive(Debug, Error)]
#[error("saved {name} has {found} bytes instead of {expected}")]
pub struct WrongLength {
    /// The struct.
    pub name: &'static str,
    /// Bytes in the snapshot.
    pub found: usize,
    /// Bytes of the struct.
    pub expected: usize,
}

/// The struct's bytes.
pub fn to_bytes<T: Plain>(value: &T) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<T>()];
    // SAFETY: `Plain` has no padding, so all its bytes are initialised; source and destination are of that length and apart.
    unsafe {
        ptr::copy_nonoverlapping(
            ptr::from_ref(value).cast::<u8>(),
            bytes.as_mut_ptr(),
            bytes.len(),
        )
    };
    bytes
}

/// The struct of these bytes.
///
/// # Errors
/// Any other length than the struct's.
pub fn from_bytes<T: Plain>(bytes: &[u8]) -> Result<T, WrongLength> {
    if bytes.len() != size_of::<T>() {
        return Err(WrongLength {
            name: T::NAME,
            found: bytes.len(),
            expected: size_of::<T>(),
        });
    }
    // SAFETY: the length was checked, alignment does not matter to `read_unaligned`, and every bit pattern is valid.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_struct_survives_its_bytes() {
        let regs = kvm_regs {
            rax: 1,
            rflags: u64::MAX,
            r15: 0x0102_0304,
            ..Default::default()
        };
        assert_eq!(from_bytes::<kvm_regs>(&to_bytes(&regs)).unwrap(), regs);
    }

    #[test]
    fn any_other_length_is_refused() {
        for length in [0, 143, 145] {
            assert!(from_bytes::<kvm_regs>(&vec![0; length]).is_err());
        }
    }
}
