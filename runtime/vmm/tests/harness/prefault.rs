//! Pages mapped ahead of a guest, where KVM does that; and nothing changed where it does not.

use std::io::Write as _;

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::{VcpuExit, VcpuFd};
use thaw_vmm::host::{Bare, Host, shadows_page_tables};
use thaw_vmm::memory::{GuestMemory, PageSet};
use thaw_vmm::prefault::map_ahead;
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY_BYTES: u64 = 64 << 20;
/// Where the guest's program is.
const PROGRAM: u64 = 0x1000;
/// Writes 7 to the first byte of pages 0x28 and 0x64, then an exit: mov ax, 0x2800; mov ds, ax; mov byte [0], 7; the same for 0x6400;
/// out 0x10, al.
const WRITE_TWO: [u8; 22] = [
    0xb8, 0x00, 0x28, 0x8e, 0xd8, 0xc6, 0x06, 0x00, 0x00, 0x07, //
    0xb8, 0x00, 0x64, 0x8e, 0xd8, 0xc6, 0x06, 0x00, 0x00, 0x07, //
    0xe6, 0x10,
];

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * 4096)
}

fn pages(set: &PageSet) -> Vec<u64> {
    set.runs().flatten().collect()
}

/// Runs the program in real mode to its exit.
fn run(fd: &mut VcpuFd) {
    let mut sregs = fd.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    fd.set_sregs(&sregs).unwrap();
    let mut regs = fd.get_regs().unwrap();
    (regs.rip, regs.rflags) = (PROGRAM, 2);
    fd.set_regs(&regs).unwrap();
    let exit = fd.run().unwrap();
    assert!(matches!(exit, VcpuExit::IoOut(0x10, _)), "{exit:?}");
}

#[test]
fn pages_mapped_ahead_keep_their_content_and_every_write_to_them_is_known() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[1; 256 * 4096]).unwrap();
    file.set_len(MEMORY_BYTES).unwrap();
    let memory = GuestMemory::reserve(MEMORY_BYTES).unwrap().tracked();
    memory.map_private(&file, 0).unwrap();
    let host = Host::open().unwrap();
    let Bare {
        vm,
        memory,
        mut vcpus,
        ..
    } = host.make(memory, 1).unwrap();
    let view = memory.view();
    view.write_slice(&WRITE_TWO, GuestAddress(PROGRAM)).unwrap();
    for page in 0x28..0x2c {
        view.write_obj(2u8, at(page)).unwrap();
    }
    // What this process wrote itself is told once.
    memory.take_written(&vm).unwrap();

    let does_it = vm.check_extension_raw(u64::from(KVM_CAP_PRE_FAULT_MEMORY)) > 0;
    let expected = does_it && !shadows_page_tables();
    let mapped = map_ahead(&vcpus[0], &memory, &[0x28..0x2c, 0x64..0x6e]);
    println!("mapped ahead: {mapped} pages; kvm does it: {does_it}, expected: {expected}");
    assert_eq!(mapped, if expected { 14 } else { 0 });
    let writable = match expected {
        true => vec![0x28, 0x29, 0x2a, 0x2b],
        false => vec![],
    };
    assert_eq!(pages(&memory.take_written(&vm).unwrap()), writable);

    run(&mut vcpus[0]);
    let written = pages(&memory.take_written(&vm).unwrap());
    assert!(
        written.contains(&0x28) && written.contains(&0x64),
        "{written:x?}"
    );
    assert!(
        (0x65..0x6e).all(|page| !written.contains(&page)),
        "{written:x?}"
    );
    let first = |page| view.read_obj::<u8>(at(page)).unwrap();
    assert_eq!([0x28, 0x29, 0x64, 0x65, 0x6d].map(first), [7, 2, 7, 1, 1]);
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0x64 * 4096).unwrap();
    assert_eq!(byte, [1]);
}
