//! The floor: what bare KVM calls cost, without a monitor around them. Nothing that restores a VM can be faster.
//!
//! Two loops over one memory file: make a VM, map the file, set the vCPU's state, run to the guest's first exit; and the
//! same on a VM that was made ahead, where only mapping, state and run remain. The guest's first instruction is an `out`,
//! so its exit is the first moment at which a guest can show that it runs: one exit more than "entered the guest".

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_enable_cap, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};

/// Where the guest's page tables and its program are; a file must have these pages. The program is `out 0x10, al`.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const PROGRAM: u64 = 0x1_0000;
const PORT: u16 = 0x10;
const CODE: [u8; 2] = [0xe6, 0x10];
/// Identity-mapped: 64 large pages, 128 MiB; the program lies in the first.
const LARGE_PAGES: u64 = 64;
/// Where the three-page task state segment of Intel's real mode emulation lies (KVM_SET_TSS_ADDR): above guest memory.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Pins of the I/O APIC with `KVM_CAP_SPLIT_IRQCHIP`.
const IOAPIC_PINS: u64 = 24;
/// EFER, STAR, LSTAR, CSTAR, SF_MASK, FS, GS, KERNEL_GS, SYSENTER's three, PAT, TSC: what every 64-bit guest has.
const MSRS: [u32; 13] = [
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0x174,
    0x175,
    0x176,
    0x277,
    0x10,
];

/// Who emulates the interrupt chips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// All in the kernel: PIC, I/O APIC, LAPIC.
    Kernel,
    /// Only the LAPIC in the kernel.
    Split,
}

/// Guest memory, mapped privately. Nobody forms a reference into it.
struct Mapping {
    address: *mut rustix::ffi::c_void,
    length: usize,
}

impl Mapping {
    /// Address space that file pages are mapped over later.
    fn reserve(length: usize) -> io::Result<Self> {
        let (protection, flags) = Self::how();
        // SAFETY: the kernel chooses the address, so nothing that exists is touched.
        let address =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, protection, flags)? };
        Ok(Self { address, length })
    }

    fn of_file(file: &File, length: usize) -> io::Result<Self> {
        let (protection, flags) = Self::how();
        // SAFETY: as above.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                flags,
                file.as_fd(),
                0,
            )?
        };
        Ok(Self { address, length })
    }

    /// The file's pages in place of what is mapped here.
    fn replace(&self, file: &File) -> io::Result<()> {
        let (protection, flags) = Self::how();
        let flags = flags | MapFlags::FIXED;
        // SAFETY: exactly the range of this mapping, into which nobody holds a reference.
        unsafe {
            rustix::mm::mmap(
                self.address,
                self.length,
                protection,
                flags,
                file.as_fd(),
                0,
            )?;
        }
        Ok(())
    }

    fn how() -> (ProtFlags, MapFlags) {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        (protection, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range of this mapping; the VM above it is gone (`Vm`'s field order).
        let _ = unsafe { rustix::mm::munmap(self.address, self.length) };
    }
}

/// Fields end in this order: vCPU, VM, then the memory below them.
struct Vm {
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: Mapping,
}

struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
}

/// The two loops and what they need.
pub struct Floor {
    kvm: Kvm,
    cpuid: CpuId,
    file: File,
    length: usize,
    state: State,
}

impl Floor {
    /// `file` is a guest's memory; the loops' own four pages are written into it.
    ///
    /// # Errors
    /// No usable KVM, or the file cannot be written.
    pub fn new(file: File) -> anyhow::Result<Self> {
        write_guest(&file).context("cannot write the floor's guest into its memory file")?;
        let length = usize::try_from(file.metadata()?.len())?;
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let memory = Mapping::of_file(&file, length)?;
        let template = make(&kvm, &cpuid, Chip::Kernel, memory)?;
        let state = first_state(&template.vcpu)?;
        drop(template);
        Ok(Self {
            kvm,
            cpuid,
            file,
            length,
            state,
        })
    }

    /// Makes a VM over the file and runs it to its first exit.
    ///
    /// # Errors
    /// A KVM call failed, or the guest did something else than its program.
    pub fn new_vm(&self, chip: Chip) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let memory = Mapping::of_file(&self.file, self.length).context("cannot map memory")?;
        let mut vm = make(&self.kvm, &self.cpuid, chip, memory)?;
        self.state.set(&vm.vcpu)?;
        run(&mut vm.vcpu)?;
        Ok(began.elapsed())
    }

    /// The same on a VM that was made before the clock starts.
    ///
    /// # Errors
    /// As [`Self::new_vm`].
    pub fn ready_vm(&self, chip: Chip) -> anyhow::Result<Duration> {
        let memory = Mapping::reserve(self.length).context("cannot reserve memory")?;
        let mut vm = make(&self.kvm, &self.cpuid, chip, memory)?;
        let began = Instant::now();
        vm.memory.replace(&self.file).context("cannot map memory")?;
        self.state.set(&vm.vcpu)?;
        run(&mut vm.vcpu)?;
        Ok(began.elapsed())
    }
}

fn write_guest(file: &File) -> io::Result<()> {
    // Present and writable (1 | 2); a page directory's entry is a large page too (0x80).
    let table = |entry: u64| {
        let mut page = [0; 4096];
        page[..8].copy_from_slice(&(entry | 0x3).to_le_bytes());
        page
    };
    file.write_all_at(&table(PDPT), PML4)?;
    file.write_all_at(&table(PAGE_DIRECTORY), PDPT)?;
    let mut directory = [0; 4096];
    for (entry, number) in directory.chunks_exact_mut(8).zip(0..LARGE_PAGES) {
        entry.copy_from_slice(&((number << 21) | 0x83).to_le_bytes());
    }
    file.write_all_at(&directory, PAGE_DIRECTORY)?;
    file.write_all_at(&CODE, PROGRAM)
}

/// Memory slot before the interrupt chips, as the cheaper order.
fn make(kvm: &Kvm, cpuid: &CpuId, chip: Chip, memory: Mapping) -> anyhow::Result<Vm> {
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: u64::try_from(memory.length)?,
        userspace_addr: u64::try_from(memory.address.addr())?,
    };
    // SAFETY: the mapping outlives the VM: both end in `Vm`, the VM first.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    vm.set_tss_address(TSS_ADDRESS)
        .context("KVM_SET_TSS_ADDR")?;
    match chip {
        Chip::Kernel => vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?,
        Chip::Split => {
            let capability = kvm_enable_cap {
                cap: KVM_CAP_SPLIT_IRQCHIP,
                args: [IOAPIC_PINS, 0, 0, 0],
                ..Default::default()
            };
            vm.enable_cap(&capability)
                .context("KVM_CAP_SPLIT_IRQCHIP")?;
        }
    }
    let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    vcpu.set_cpuid2(cpuid).context("KVM_SET_CPUID2")?;
    Ok(Vm {
        vcpu,
        _vm: vm,
        memory,
    })
}

/// What a fresh vCPU has, but in 64-bit mode at the program.
fn first_state(vcpu: &VcpuFd) -> anyhow::Result<State> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let segment = |selector, type_, l, db| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(8, 11, 1, 0);
    let data = segment(16, 3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // Paging, protection, write protection, and the rest as Linux has it; PAE and SSE; system calls, long mode, NX.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PML4, 0x620, 0xd01);
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let regs = kvm_regs {
        rip: PROGRAM,
        rflags: 2,
        ..Default::default()
    };
    let entries = MSRS.map(|index| kvm_msr_entry {
        index,
        ..Default::default()
    });
    let mut msrs = Msrs::from_entries(&entries).context("too many MSRs")?;
    let read = vcpu.get_msrs(&mut msrs).context("KVM_GET_MSRS")?;
    anyhow::ensure!(
        read == MSRS.len(),
        "KVM knows only {read} of the floor's MSRs"
    );
    Ok(State {
        regs,
        sregs: vcpu.get_sregs().context("KVM_GET_SREGS")?,
        xcrs: vcpu.get_xcrs().context("KVM_GET_XCRS")?,
        xsave: vcpu.get_xsave().context("KVM_GET_XSAVE")?,
        lapic: vcpu.get_lapic().context("KVM_GET_LAPIC")?,
        msrs,
        mp_state: vcpu.get_mp_state().context("KVM_GET_MP_STATE")?,
        events: vcpu.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?,
    })
}

impl State {
    fn set(&self, vcpu: &VcpuFd) -> anyhow::Result<()> {
        vcpu.set_sregs(&self.sregs).context("KVM_SET_SREGS")?;
        vcpu.set_xcrs(&self.xcrs).context("KVM_SET_XCRS")?;
        // SAFETY: this program enables no feature that makes the area longer than the struct (arch_prctl, XSTATE_PERM).
        unsafe { vcpu.set_xsave(&self.xsave) }.context("KVM_SET_XSAVE")?;
        vcpu.set_regs(&self.regs).context("KVM_SET_REGS")?;
        vcpu.set_lapic(&self.lapic).context("KVM_SET_LAPIC")?;
        vcpu.set_msrs(&self.msrs).context("KVM_SET_MSRS")?;
        vcpu.set_mp_state(self.mp_state)
            .context("KVM_SET_MP_STATE")?;
        vcpu.set_vcpu_events(&self.events)
            .context("KVM_SET_VCPU_EVENTS")
    }
}

fn run(vcpu: &mut VcpuFd) -> anyhow::Result<()> {
    match vcpu.run().context("KVM_RUN")? {
        VcpuExit::IoOut(PORT, _) => Ok(()),
        other => bail!("the floor's guest did not run its program: {other:?}"),
    }
}

#[cfg(all(test, feature = "kvm-tests"))]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_reached_on_new_and_on_ready_vms() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let floor = Floor::new(file).unwrap();
        for chip in [Chip::Kernel, Chip::Split] {
            assert!(floor.new_vm(chip).unwrap() > Duration::ZERO);
            assert!(floor.ready_vm(chip).unwrap() > Duration::ZERO);
        }
    }

    #[test]
    fn a_memory_file_without_the_program_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let floor = Floor::new(file.try_clone().unwrap()).unwrap();
        file.write_all_at(&[0x0f, 0x0b], PROGRAM).unwrap(); // ud2 without a handler: a triple fault
        assert!(floor.ready_vm(Chip::Kernel).is_err());
    }
}
