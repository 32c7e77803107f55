//! What to do about missing virtualization, by the hypervisor this host runs under.

use std::{fmt, fs};

/// The hypervisor below this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Hypervisor {
    VMware,
    HyperV,
    Xen,
    Kvm,
    VirtualBox,
    Firecracker,
    Other,
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::VMware => "VMware",
            Self::HyperV => "Hyper-V",
            Self::Xen => "Xen",
            Self::Kvm => "KVM",
            Self::VirtualBox => "VirtualBox",
            Self::Firecracker => "Firecracker",
            Self::Other => "an unknown hypervisor",
        })
    }
}

impl Hypervisor {
    /// Asks CPUID (leaf 0x4000_0000), the firmware's tables and the kernel. `None` on bare metal.
    pub fn detect() -> Option<Self> {
        let dmi = ["sys_vendor", "product_name", "bios_vendor"]
            .map(|name| fs::read_to_string(format!("/sys/class/dmi/id/{name}")).unwrap_or_default())
            .join(" ");
        let xen = fs::read_to_string("/sys/hypervisor/type").is_ok_and(|kind| kind.trim() == "xen");
        Self::from_signs(crate::clock::hypervisor_signature(), &dmi, xen)
    }

    fn from_signs(signature: Option<[u8; 12]>, dmi: &str, xen: bool) -> Option<Self> {
        let signature = signature?;
        Some(match &signature {
            _ if xen => Self::Xen,
            _ if dmi.contains("VirtualBox") => Self::VirtualBox,
            _ if dmi.contains("Firecracker") => Self::Firecracker,
            b"VMwareVMware" => Self::VMware,
            b"Microsoft Hv" => Self::HyperV,
            b"XenVMMXenVMM" => Self::Xen,
            b"KVMKVMKVM\0\0\0" => Self::Kvm,
            b"VBoxVBoxVBox" => Self::VirtualBox,
            _ => Self::Other,
        })
    }
}

/// How to get hardware virtualization.
pub fn nested(hypervisor: Option<Hypervisor>) -> String {
    let how = match hypervisor {
        None => "enable VT-x or AMD-V (SVM) in the firmware's setup",
        Some(Hypervisor::VMware) => {
            "shut the machine down and tick \"Expose hardware assisted virtualization to the guest OS\" (vhv.enable = \"TRUE\")"
        }
        Some(Hypervisor::HyperV) => {
            "on the Hyper-V host, machine off: Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true; on Azure choose a size with \
             nested virtualization"
        }
        Some(Hypervisor::Xen) => {
            "in the machine's configuration: nestedhvm=1 (hvm guests); EC2: use a .metal instance"
        }
        Some(Hypervisor::Kvm) => {
            "on the KVM host: modprobe kvm_intel nested=1 (or kvm_amd nested=1), and give the machine -cpu host; on Google Cloud: \
             --enable-nested-virtualization"
        }
        Some(Hypervisor::VirtualBox) => "machine off: VBoxManage modifyvm NAME --nested-hw-virt on",
        Some(Hypervisor::Firecracker | Hypervisor::Other) => {
            "this hypervisor offers none; use another host"
        }
    };
    format!("{how}; until then Thaw uses its lab")
}

/// How to get a /dev/kvm.
pub fn load_kvm(hypervisor: Option<Hypervisor>) -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    match flags
        .split_whitespace()
        .find(|flag| ["vmx", "svm"].contains(flag))
    {
        Some("vmx") => "sudo modprobe kvm_intel".to_owned(),
        Some(_) => "sudo modprobe kvm_amd".to_owned(),
        None => nested(hypervisor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypervisors_are_told_apart_and_each_has_its_own_remedy() {
        let signs: [(&[u8; 12], &str, bool, Hypervisor); 6] = [
            (b"VMwareVMware", "VMware, Inc.", false, Hypervisor::VMware),
            (
                b"Microsoft Hv",
                "Microsoft Corporation Virtual Machine",
                false,
                Hypervisor::HyperV,
            ),
            (b"XenVMMXenVMM", "Xen HVM domU", true, Hypervisor::Xen),
            (b"Microsoft Hv", "Xen HVM domU", true, Hypervisor::Xen), // Xen poses as Hyper-V for Windows guests
            (
                b"KVMKVMKVM\0\0\0",
                "QEMU Standard PC",
                false,
                Hypervisor::Kvm,
            ),
            (
                b"KVMKVMKVM\0\0\0",
                "innotek GmbH VirtualBox",
                false,
                Hypervisor::VirtualBox,
            ),
        ];
        for (signature, dmi, xen, expected) in signs {
            assert_eq!(
                Hypervisor::from_signs(Some(*signature), dmi, xen),
                Some(expected)
            );
        }
        assert_eq!(Hypervisor::from_signs(None, "Dell Inc.", false), None);
        let kinds = [
            None,
            Some(Hypervisor::VMware),
            Some(Hypervisor::HyperV),
            Some(Hypervisor::Xen),
            Some(Hypervisor::Kvm),
        ];
        let remedies: std::collections::BTreeSet<String> = kinds.into_iter().map(nested).collect();
        assert_eq!(remedies.len(), kinds.len());
    }
}
