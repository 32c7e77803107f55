//! `thaw-lab-init probe`: what /dev/kvm of the machine it runs on is worth. A process of its own, because a bad one may never return.
//!
//! A guest without an operating system, in 64-bit ring 0, counts down as fast as it can; then it tries instructions that stock kernels
//! use. One line a result on standard output, each as soon as it is known: `speed <instructions per second>`, `<instruction> ok`,
//! `<instruction> fault <vector>`, `<instruction> exit <KVM exit reason>`, or `error <step>: <why>`.

use crate::sys::{self, Shared};
use std::{
    fs::File,
    io::{self, Write},
    time::{Duration, Instant},
};

const MEMORY_BYTES: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const HANDLERS: u64 = 0x6000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
const STACK: u64 = 0xf000;
/// Port of the code's end; handler of vector v writes to `FAULT_PORT + v`.
const DONE_PORT: u8 = 0x10;
const FAULT_PORT: u8 = 0x40;
const VECTOR_COUNT: u8 = 32;

/// How long the counting should take.
const COUNT_FOR: Duration = Duration::from_millis(40);

/// Code of the count: `dec rcx; jnz`, two instructions a round.
const COUNT: &[u8] = &[0x48, 0xff, 0xc9, 0x75, 0xfb];
/// Instructions of stock kernels that an emulated KVM may lack, with rdi = [`DATA`].
const INSTRUCTIONS: &[(&str, &[u8])] = &[
    ("cmpxchg16b", &[0x48, 0x0f, 0xc7, 0x0f]),
    ("xsave", &[0xb8, 3, 0, 0, 0, 0x31, 0xd2, 0x0f, 0xae, 0x27]), // mov eax,3; xor edx,edx; xsave [rdi]
    ("int3", &[0xcc]),
];

/// struct kvm_segment, include/uapi/asm/kvm.h (x86), as the next three.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Table {
    base: u64,
    limit: u16,
    padding: [u16; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct SpecialRegisters {
    cs: Segment,
    data: [Segment; 5], // ds es fs gs ss
    tr: Segment,
    ldt: Segment,
    gdt: Table,
    idt: Table,
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    cr8: u64,
    efer: u64,
    apic_base: u64,
    interrupts: [u64; 4],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Registers {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rsp: u64,
    rbp: u64,
    r8_to_r15: [u64; 8],
    rip: u64,
    rflags: u64,
}

const _: () = assert!(size_of::<SpecialRegisters>() == 312 && size_of::<Registers>() == 144);

/// Why the probe stopped: the step and the cause.
type Stop = (&'static str, io::Error);

/// Prints the results; true if it came to the end.
pub fn run() -> bool {
    match probe() {
        Ok(()) => true,
        Err((step, error)) => {
            say(&format!("error {step}: {error}"));
            false
        }
    }
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush()); // nobody reads: nothing to do
}

fn probe() -> Result<(), Stop> {
    let mut guest = Guest::new()?;
    // A short count first: an emulated KVM needs a second for what a real one does in a millisecond.
    let rough = guest.count(5_000)?;
    let rounds = (rough * COUNT_FOR.as_secs_f64() / 2.0).clamp(5_000.0, 50_000_000.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped on the line above"
    )]
    let speed = guest.count(rounds as u64)?;
    say(&format!("speed {speed:.0}"));
    for (name, code) in INSTRUCTIONS {
        let end = guest.run(code, 0)?;
        say(&format!("{name} {end}"));
    }
    Ok(())
}

struct Guest {
    _kvm: File,
    _vm: File,
    vcpu: File,
    memory: Shared,
    state: Shared,
    special: SpecialRegisters,
}

impl Guest {
    // ioctl numbers: include/uapi/linux/kvm.h.
    fn new() -> Result<Self, Stop> {
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|error| ("open", error))?;
        let vm = sys::ioctl_number(&kvm, 0xae01, 0)
            .map(sys::own)
            .map_err(|error| ("KVM_CREATE_VM", error))?;
        let memory = Shared::anonymous(MEMORY_BYTES).map_err(|error| ("mmap", error))?;
        let mut region = [0_u64, 0, MEMORY_BYTES as u64, memory.address()];
        sys::ioctl_struct(&vm, 0x4020_ae46, &mut region)
            .map_err(|error| ("KVM_SET_USER_MEMORY_REGION", error))?;
        sys::ioctl_number(&vm, 0xae47, 0xfffb_d000).map_err(|error| ("KVM_SET_TSS_ADDR", error))?;
        let vcpu = sys::ioctl_number(&vm, 0xae41, 0)
            .map(sys::own)
            .map_err(|error| ("KVM_CREATE_VCPU", error))?;
        let size = sys::ioctl_number(&kvm, 0xae04, 0)
            .map_err(|error| ("KVM_GET_VCPU_MMAP_SIZE", error))?;
        let size = usize::try_from(size).unwrap_or_default();
        let state = Shared::of(&vcpu, size).map_err(|error| ("mmap of the vCPU", error))?;
        let mut features = vec![0_u32; 2 + 10 * 256]; // struct kvm_cpuid2: count, padding, entries of 40 bytes
        features[0] = 256;
        sys::ioctl_words(&kvm, 0xc008_ae05, &mut features)
            .map_err(|error| ("KVM_GET_SUPPORTED_CPUID", error))?;
        sys::ioctl_words(&vcpu, 0x4008_ae90, &mut features)
            .map_err(|error| ("KVM_SET_CPUID2", error))?;
        let mut special = SpecialRegisters::default();
        sys::ioctl_struct(&vcpu, 0x8138_ae83, &mut special)
            .map_err(|error| ("KVM_GET_SREGS", error))?;
        long_mode(&mut special);
        let mut guest = Self {
            _kvm: kvm,
            _vm: vm,
            vcpu,
            memory,
            state,
            special,
        };
        guest.lay_out();
        Ok(guest)
    }

    /// Page tables (identity, one page of 2 MiB), descriptor tables, fault handlers.
    fn lay_out(&mut self) {
        for (at, entry) in [(PML4, PDPT | 3), (PDPT, DIRECTORY | 3), (DIRECTORY, 0x83)] {
            self.write(at, &entry.to_le_bytes());
        }
        self.write(GDT + 8, &0x00af_9b00_0000_ffff_u64.to_le_bytes()); // 64-bit code
        self.write(GDT + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes()); // data
        for vector in 0..VECTOR_COUNT {
            let handler = HANDLERS + u64::from(vector) * 16;
            self.write(handler, &[0xe6, FAULT_PORT + vector, 0xf4]); // out; hlt
            let gate = (handler & 0xffff) | (8 << 16) | (0x8e00 << 32);
            self.write(IDT + u64::from(vector) * 16, &gate.to_le_bytes());
        }
    }

    /// Counts `rounds` down; instructions a second.
    fn count(&mut self, rounds: u64) -> Result<f64, Stop> {
        let start = Instant::now();
        let end = self.run(COUNT, rounds)?;
        if end != "ok" {
            return Err(("count", io::Error::other(end)));
        }
        #[expect(clippy::cast_precision_loss, reason = "a rough figure")]
        let instructions = (2 * rounds) as f64;
        Ok(instructions / start.elapsed().as_secs_f64())
    }

    /// Runs `code` to its end and says how it ended.
    fn run(&mut self, code: &[u8], rcx: u64) -> Result<String, Stop> {
        self.write(CODE, code);
        self.write(CODE + code.len() as u64, &[0xe6, DONE_PORT, 0xf4]); // out; hlt
        let mut registers = Registers {
            rcx,
            rdi: DATA,
            rsp: STACK,
            rip: CODE,
            rflags: 2,
            ..Registers::default()
        };
        let mut special = self.special;
        sys::ioctl_struct(&self.vcpu, 0x4138_ae84, &mut special)
            .map_err(|error| ("KVM_SET_SREGS", error))?;
        sys::ioctl_struct(&self.vcpu, 0x4090_ae82, &mut registers)
            .map_err(|error| ("KVM_SET_REGS", error))?;
        loop {
            match sys::ioctl_number(&self.vcpu, 0xae80, 0) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(("KVM_RUN", error)),
            }
        }
        // struct kvm_run: exit_reason at 8; for an I/O exit direction, size, port (u16) from 32 on.
        let reason = u32::from(self.state.byte(8)) | u32::from(self.state.byte(9)) << 8;
        let port = self.state.byte(34);
        Ok(match (reason, port.checked_sub(FAULT_PORT)) {
            (2, _) if port == DONE_PORT => "ok".to_owned(),
            (2, Some(vector)) => format!("fault {vector}"),
            (reason, _) => format!("exit {reason}"),
        })
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        for (offset, &byte) in bytes.iter().enumerate() {
            self.memory.set_byte(
                usize::try_from(at)
                    .unwrap_or(usize::MAX)
                    .saturating_add(offset),
                byte,
            );
        }
    }
}

fn long_mode(special: &mut SpecialRegisters) {
    let code = Segment {
        limit: u32::MAX,
        selector: 8,
        kind: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Segment::default()
    };
    let data = Segment {
        limit: u32::MAX,
        selector: 16,
        kind: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Segment::default()
    };
    special.cs = code;
    special.data = [data; 5];
    special.gdt = Table {
        base: GDT,
        limit: 23,
        ..Table::default()
    };
    special.idt = Table {
        base: IDT,
        limit: u16::from(VECTOR_COUNT) * 16 - 1,
        ..Table::default()
    };
    special.cr3 = PML4;
    special.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18; // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    special.cr0 = 0x8005_0033; // PG AM WP NE ET MP PE
    special.efer = 0xd01; // NX LMA LME SCE
}
