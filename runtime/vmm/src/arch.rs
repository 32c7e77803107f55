//! What differs between processor architectures. Only x86-64 so far.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
