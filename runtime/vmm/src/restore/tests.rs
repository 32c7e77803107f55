//! Ten thousand hostile snapshots, down to devices that run on what they say; all but what only KVM can judge.
//!
//! A failure prints its seed: `THAW_SEED=<seed> cargo test -p thaw-vmm mutated -- --nocapture` plays that one alone.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::fs::{MemfdFlags, memfd_create};
use thaw_fuzz::Dice;
use thaw_snapshot::{Key, Metadata, PageSource, TouchedRun, WorkingSet, Writer, tag};
use thaw_vmm_control::DiskSource;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::arch::x86_64::cpuid::{self, CpuidEntryV1, DeadlineTimer, Topology};
use crate::arch::x86_64::interrupts::InterruptChipsV1;
use crate::arch::x86_64::msr::{self, MsrV1};
use crate::arch::x86_64::vcpu_state::VcpuStateV1;
use crate::devices::Devices;
use crate::devices::tests::driver::{GUEST_CID, MEMORY_BYTES as USED_BYTES, pattern};
use crate::devices::tests::restore::busy_guest;
use crate::memory::GuestMemory;
use crate::mutation::{Original, redigest};
use crate::state::FrozenTimeV1;

const CASES: u64 = 10_000;
const MEMORY_BYTES: u64 = 64 << 20;
const VCPUS: u8 = 2;

fn key() -> Key {
    Key::new(&[7; Key::SECRET_BYTES])
}

fn file() -> File {
    memfd_create("thaw-test", MemfdFlags::CLOEXEC)
        .unwrap()
        .into()
}

struct Content(Vec<u8>);

impl PageSource for Content {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        let offset = usize::try_from(offset).unwrap().min(self.0.len());
        let count = buffer.len().min(self.0.len() - offset);
        buffer[..count].copy_from_slice(&self.0[offset..offset + count]);
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.0.len() as u64).then_some(offset))
    }
}

fn leaves(vcpu: u8) -> Vec<CpuidEntryV1> {
    let functions = [
        0,
        1,
        7,
        0xa,
        0xb,
        0xd,
        0x4000_0001,
        0x8000_0001,
        0x8000_0008,
    ];
    let supported = functions.map(|function| CpuidEntryV1 {
        function,
        index: 0,
        flags: u32::from(matches!(function, 7 | 0xd)),
        eax: 0x1f,
        ebx: 0x6874_7541,
        ecx: 0x444d_4163,
        edx: 0x6974_6e65,
    });
    let topology = Topology {
        vcpu,
        vcpu_count: VCPUS,
        deadline_timer: DeadlineTimer::Present,
    };
    cpuid::guest(&supported, topology)
}

/// A shell without KVM: what a claim compares a snapshot with.
struct Bench {
    memory: GuestMemory,
    shape: Shape,
    fresh: Vec<FreshVcpu>,
    limits: HostVcpuLimits,
    disk: File,
}

impl Bench {
    fn new(disk: &[u8]) -> Self {
        let limits = HostVcpuLimits {
            msr_indices: msr::to_save(&[0x174, 0x175, 0xc000_0081, 0x4b56_4d01]),
            xsave_bytes: 4096,
        };
        let msrs: Vec<_> = (limits.msr_indices.iter())
            .map(|index| MsrV1 {
                index: *index,
                data: 0,
            })
            .collect();
        let mut read_only = file();
        read_only.write_all(disk).unwrap();
        Self {
            memory: GuestMemory::reserve(MEMORY_BYTES).unwrap(),
            shape: Shape {
                vcpu_count: VCPUS,
                memory_bytes: MEMORY_BYTES,
                disks: vec![DiskAccess::CopyOnWrite, DiskAccess::ReadOnly],
                network: NetworkDevice::Absent,
            },
            fresh: (0..VCPUS)
                .map(|vcpu| FreshVcpu::of(leaves(vcpu), msrs.clone()))
                .collect(),
            limits,
            disk: read_only,
        }
    }

    /// What a pool does with a file, then what a monitor does, up to KVM. The name of the first step that refused, `None` if all
    /// of it went well.
    fn play(&self, file: &File) -> Option<&'static str> {
        let again = || file.try_clone().unwrap();
        let Ok(snapshot) = Snapshot::from_file(again(), "mutant") else {
            return Some("open");
        };
        if snapshot.authenticate(&key()).is_err() {
            return Some("authenticate");
        }
        if snapshot.verify().is_err() {
            return Some("verify");
        }
        if snapshot.metadata().is_err() || snapshot.working_set().is_err() {
            return Some("metadata or working set");
        }
        let Ok(mut saved) = read(again(), None) else {
            return Some("decode");
        };
        if shape_of(&saved.state).ok().as_ref() != Some(&self.shape) {
            return Some("shape");
        }
        if check(&mut saved, &self.fresh, &self.limits).is_err() {
            return Some("vcpus and chips");
        }
        let Saved {
            snapshot, state, ..
        } = saved;
        let disk = |id: &str, access, source| Disk {
            id: id.into(),
            access,
            source,
        };
        let request = [
            disk("thaw-disk-0", Access::CopyOnWrite, DiskSource::Snapshot),
            disk("thaw-disk-1", Access::ReadOnly, DiskSource::Descriptor),
        ];
        let files = vec![self.disk.try_clone().unwrap()];
        let Ok((disks, _)) = disks(&snapshot, &request, &state.disks, files) else {
            return Some("disks");
        };
        self.memory.empty().unwrap();
        let Ok(layers) = snapshot.memory_layers() else {
            return Some("memory");
        };
        if layers
            .iter()
            .any(|layer| self.memory.map_layer(layer).is_err())
        {
            return Some("memory");
        }
        if snapshot.memory_runs().is_err() || prefetch::copy_ahead(&snapshot, &self.memory).is_err()
        {
            return Some("memory");
        }
        self.run(&state, disks)
    }

    /// Devices that go on with the state, on memory that the file gave.
    fn run(&self, state: &MachineStateV1, disks: Vec<DiskConfig>) -> Option<&'static str> {
        let shape = (&self.shape.disks[..], self.shape.network);
        let devices = Devices::prepare(shape, GUEST_CID, self.memory.view()).unwrap();
        let (_host, agent) = UnixStream::pair().unwrap();
        let took = devices.reset_to(&state.devices, DiskFiles::Replaced(disks), agent);
        if took.is_err() {
            return Some("devices");
        }
        devices.prime();
        devices.resume();
        for window in 0..4 {
            let base = crate::devices::MMIO_BASE + window * crate::devices::MMIO_WINDOW_BYTES;
            for register in (0..0x120).step_by(4) {
                devices.mmio_read(base + register, &mut [0; 4]);
            }
            devices.mmio_write(base + 0x50, &[0; 4]);
        }
        devices.pause().unwrap();
        let saved = crate::state::encode(&MachineStateV1 {
            devices: devices.save(),
            ..state.clone()
        });
        // What runs can be frozen again, and is a state like any other then.
        crate::state::decode(&saved.unwrap()).unwrap();
        None
    }
}

/// A machine with devices at work, saved as the monitor saves one.
fn good_snapshot(bench: &Bench, disk: &[u8]) -> File {
    let (guest, _) = busy_guest(disk);
    guest.devices.pause().unwrap();
    let mut memory = vec![0; USED_BYTES];
    guest
        .memory
        .read_slice(&mut memory, GuestAddress(0))
        .unwrap();
    let msrs = (bench.limits.msr_indices.iter()).map(|index| MsrV1 {
        index: *index,
        data: 1,
    });
    let msrs: Vec<_> = msrs.collect();
    let vcpu = |number| VcpuStateV1 {
        cpuid: leaves(number),
        sregs: vec![0; 312],
        xcrs: vec![0; 392],
        xsave: vec![0; 4096],
        regs: vec![0; 144],
        debugregs: vec![0; 128],
        msrs: msrs.clone(),
        lapic: vec![0; 1024],
        mp_state: 0,
        events: vec![0; 64],
        tsc_deadline: 5,
        tsc_ahead: u64::MAX,
    };
    let mut ioapic = vec![0; 512];
    ioapic[..8].copy_from_slice(&0xfec0_0000u64.to_ne_bytes());
    let stored = |is_stored| DiskV1 {
        bytes: disk.len() as u64,
        is_stored,
    };
    let state = MachineStateV1 {
        memory_bytes: MEMORY_BYTES,
        time: FrozenTimeV1 {
            clock_ns: 1,
            tsc: 2,
        },
        vcpus: (0..VCPUS).map(vcpu).collect(),
        chips: InterruptChipsV1 {
            pic_master: vec![0; 512],
            pic_slave: vec![0; 512],
            ioapic,
        },
        disks: vec![stored(true), stored(false)],
        devices: guest.devices.save(),
    };
    let file = file();
    let mut writer = Writer::new(file.try_clone().unwrap());
    let metadata = Metadata {
        function: "mutated".into(),
        vcpu_count: VCPUS,
        memory_mib: 64,
        ..Metadata::default()
    };
    writer.metadata(&metadata).unwrap();
    writer
        .cpu(&state::cpu_record(&leaves(0), 2_000_000))
        .unwrap();
    let section = state::encode(&state).unwrap();
    writer.section(SectionKind::Machine, &section).unwrap();
    let memory = &mut Content(memory);
    (writer.sparse_section(SectionKind::Memory, MEMORY_BYTES, memory)).unwrap();
    let content = &mut Content(disk.to_vec());
    let length = disk.len() as u64;
    (writer.sparse_section(SectionKind::Disk(0), length, content)).unwrap();
    let touched = vec![TouchedRun::new(16, 4, true), TouchedRun::new(300, 2, false)];
    let set = WorkingSet::new(touched, MEMORY_BYTES).unwrap();
    writer.working_set(&set).unwrap();
    writer.finish().unwrap();
    tag(&file, &key()).unwrap();
    file
}

/// Where leaves, registers, lengths of lists and devices lie among the blobs of the machine section.
fn hot_places(good: &File) -> Vec<(u64, u64)> {
    let snapshot = Snapshot::from_file(good.try_clone().unwrap(), "good").unwrap();
    let section = snapshot.section(SectionKind::Machine).unwrap();
    let state = state::decode(&section).unwrap();
    let own = Original::of(good).sections;
    let start = own.iter().find(|section| section.kind == 3).unwrap().offset;
    let vcpu = &state.vcpus[1];
    let encoded = [
        postcard::to_stdvec(&vcpu.cpuid).unwrap(),
        postcard::to_stdvec(&vcpu.msrs).unwrap(),
        postcard::to_stdvec(&(state.memory_bytes, state.time)).unwrap(),
        postcard::to_stdvec(&(&state.disks, &state.devices)).unwrap(),
        postcard::to_stdvec(&state.devices.slots).unwrap(),
    ];
    let place = |part: &Vec<u8>| {
        let at = section
            .windows(part.len())
            .rposition(|window| window == part);
        (start + at.unwrap() as u64, part.len() as u64)
    };
    encoded.iter().map(place).collect()
}

/// One case: refused as it is, unless nothing changed; with digests and tag made right, refused or harmless.
fn case(seed: u64, bench: &Bench, original: &Original, file: &File) -> (&'static str, String) {
    let mut dice = Dice::from_seed(seed);
    original.write(file);
    let before = Snapshot::from_file(file.try_clone().unwrap(), "good").unwrap();
    let changes: Vec<String> = (0..*dice.pick(&[1, 1, 1, 2, 3]))
        .map(|_| original.mutate(file, &mut dice))
        .collect();
    let told = changes.join("; ");
    let plain = bench.play(file);
    // Made right where it does not agree any more, by somebody who has no key.
    redigest(file);
    let is_other = Snapshot::from_file(file.try_clone().unwrap(), "mutant")
        .is_ok_and(|snapshot| snapshot.digest() != before.digest());
    if is_other {
        assert_eq!(bench.play(file), Some("authenticate"), "{told}");
        assert!(plain.is_some(), "not found without the digests: {told}");
    }
    let outcome = match tag(file, &key()) {
        Ok(()) => bench.play(file),
        Err(_) => Some("open"),
    };
    let same = !is_other && outcome.is_none();
    (
        if same {
            "unchanged"
        } else {
            outcome.unwrap_or("harmless")
        },
        told,
    )
}

#[test]
fn every_one_of_ten_thousand_mutated_snapshots_is_refused_or_harmless() {
    let disk = pattern(64);
    let bench = Bench::new(&disk);
    let good = good_snapshot(&bench, &disk);
    assert_eq!(bench.play(&good), None);
    let mut original = Original::of(&good);
    original.hot = hot_places(&good);
    let file = file();
    original.write(&file);
    assert_eq!(bench.play(&file), None, "the copy is the good one");
    if let Ok(seed) = std::env::var("THAW_SEED") {
        let seed = seed.parse().expect("THAW_SEED is a number");
        println!("{:?}", case(seed, &bench, &original, &file));
        return;
    }
    let mut outcomes: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 0..CASES {
        let played = catch_unwind(AssertUnwindSafe(|| case(seed, &bench, &original, &file)));
        let Ok((outcome, _)) = played else {
            panic!("seed {seed} failed; replay: THAW_SEED={seed} cargo test -p thaw-vmm mutated");
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    println!("{outcomes:?}");
    // Each line of defence was reached.
    for outcome in [
        "open",
        "verify",
        "decode",
        "vcpus and chips",
        "devices",
        "harmless",
    ] {
        assert!(
            outcomes.get(outcome).is_some_and(|count| *count > 50),
            "{outcome}: {outcomes:?}"
        );
    }
    original.write(&file);
    assert_eq!(bench.play(&file), None, "the good one goes on to be taken");
}
