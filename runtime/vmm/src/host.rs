//! This host's KVM, and a virtual machine on it before it has a guest.

use std::sync::OnceLock;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;

use crate::arch::x86_64::cpuid::{CpuidEntryV1, DeadlineTimer, Topology, guest};
use crate::arch::x86_64::vcpu_state::HostVcpuLimits;
use crate::arch::x86_64::{layout, msr};
use crate::belongings;
use crate::fault::{Blame, Fault};
use crate::memory::{GuestMemory, MemoryError};

/// What of KVM a machine cannot do without.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];
/// Bytes of an XSAVE area on a KVM without `KVM_CAP_XSAVE2`.
const XSAVE_BYTES: usize = 4096;

/// Why no machine can be made here.
#[derive(Debug, Error)]
pub enum HostError {
    /// `/dev/kvm` cannot be used.
    #[error("/dev/kvm could not be opened")]
    Open(#[source] kvm_ioctls::Error),
    /// KVM is too old or incomplete.
    #[error("this host's kvm lacks {0}")]
    Lacks(&'static str),
    /// A KVM call failed.
    #[error("{call} failed")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory.
    #[error("guest memory")]
    Memory(#[source] MemoryError),
}

impl Blame for HostError {
    fn fault(&self) -> Fault {
        match self {
            Self::Memory(error) => error.fault(),
            _ => Fault::Host,
        }
    }
}

fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HostError {
    move |source| HostError::Call { call, source }
}

/// Whether this host's KVM shadows guests' page tables, the processor not walking them itself: parameter `npt` of kvm_amd, `ept`
/// of kvm_intel. Shadows follow what the guest writes to its tables, but not what the monitor writes there. Where neither is told,
/// they may be there.
pub fn shadows_page_tables() -> bool {
    static SHADOWS: OnceLock<bool> = OnceLock::new();
    *SHADOWS.get_or_init(|| {
        let parameters = ["kvm_amd/parameters/npt", "kvm_intel/parameters/ept"];
        let told = parameters.map(|name| std::fs::read_to_string(format!("/sys/module/{name}")));
        let walks = |text: &String| matches!(text.trim(), "Y" | "1");
        !told.iter().flatten().any(walks)
    })
}

/// This host's KVM.
#[derive(Debug)]
pub struct Host {
    kvm: &'static Kvm,
    supported: Vec<CpuidEntryV1>,
    deadline_timer: DeadlineTimer,
}

/// A virtual machine without a guest: memory, interrupt chips and vCPUs exist.
#[derive(Debug)]
pub struct Bare {
    /// The machine.
    pub vm: VmFd,
    /// Its memory, told to KVM.
    pub memory: GuestMemory,
    /// Its processors.
    pub vcpus: Vec<VcpuFd>,
    /// What their state depends on.
    pub limits: HostVcpuLimits,
}

impl Host {
    /// Opens KVM and asks what it can do.
    ///
    /// # Errors
    /// No KVM, or one that lacks what we need.
    pub fn open() -> Result<Self, HostError> {
        let kvm = belongings::kvm().map_err(HostError::Open)?;
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(HostError::Lacks(name));
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let supported = supported.as_slice().iter().map(Into::into).collect();
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let deadline_timer = if deadline {
            DeadlineTimer::Present
        } else {
            DeadlineTimer::Absent
        };
        Ok(Self {
            kvm,
            supported,
            deadline_timer,
        })
    }

    /// CPUID of one vCPU of a new machine on this host.
    pub fn cpuid(&self, vcpu: u8, vcpu_count: u8) -> Vec<CpuidEntryV1> {
        guest(
            &self.supported,
            Topology {
                vcpu,
                vcpu_count,
                deadline_timer: self.deadline_timer,
            },
        )
    }

    /// Makes a machine around `memory`. Slots are registered before the interrupt chips exist, which is cheaper: afterwards KVM
    /// waits for its readers with every change (`synchronize_srcu`).
    ///
    /// # Errors
    /// Any KVM call that fails.
    pub fn make(&self, memory: GuestMemory, vcpu_count: u8) -> Result<Bare, HostError> {
        let vm = self.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        vm.set_tss_address(layout::TSS)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        memory.register(&vm).map_err(HostError::Memory)?;
        vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        let vcpus = (0..u64::from(vcpu_count))
            .map(|number| vm.create_vcpu(number).map_err(call("KVM_CREATE_VCPU")))
            .collect::<Result<_, _>>()?;
        let listed = self
            .kvm
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2))
            .unwrap_or(0)
            .max(XSAVE_BYTES);
        let limits = HostVcpuLimits {
            msr_indices: msr::to_save(listed.as_slice()),
            xsave_bytes,
        };
        Ok(Bare {
            vm,
            memory,
            vcpus,
            limits,
        })
    }
}
