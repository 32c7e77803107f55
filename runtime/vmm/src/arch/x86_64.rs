//! x86-64: where things lie in guest memory, what firmware would have set up, and the state of its processors.

pub mod acpi;
pub mod cpuid;
pub mod interrupts;
pub mod layout;
pub mod loader;
pub mod msr;
pub mod plain;
pub mod regs;
pub mod vcpu_rewind;
pub mod vcpu_state;
