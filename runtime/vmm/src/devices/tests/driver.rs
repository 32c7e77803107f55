//! A small virtio driver: what a guest kernel does, over the same registers and memory.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::devices::state::DevicesStateV1;
use crate::devices::{
    Devices, DevicesConfig, DiskAccess, DiskConfig, MMIO_BASE, MMIO_WINDOW_BYTES, NetworkDevice,
};
use crate::memory::GuestMemoryMmap;

pub const MEMORY_BYTES: usize = 4 << 20;
pub const GUEST_CID: u64 = 3;
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const QUEUE_SIZE: u16 = 64;
/// Descriptors that one chain may use.
const GROUP: u16 = 4;
const RINGS: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x2000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_BYTES: u64 = 0x1000;

/// Disk 0 (copy-on-write), disk 1 (read-only), vsock, rng.
pub const COW: usize = 0;
pub const READ_ONLY: usize = 1;
pub const VSOCK: usize = 2;
pub const RNG: usize = 3;
/// Where there is one.
pub const NET: usize = 4;

pub fn memory_of(bytes: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

pub fn memory() -> GuestMemoryMmap {
    memory_of(MEMORY_BYTES)
}

/// All of guest memory.
pub fn bytes_of(memory: &GuestMemoryMmap) -> Vec<u8> {
    let length = memory.last_addr().raw_value() as usize + 1;
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

pub fn base_file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Content of a disk of `sectors` sectors, each of its own.
pub fn pattern(sectors: usize) -> Vec<u8> {
    (0..sectors * 512)
        .map(|at| (at / 512 * 7 + at % 251) as u8)
        .collect()
}

pub fn config(disks: &[&[u8]], agent_stream: UnixStream) -> DevicesConfig {
    let disks = disks
        .iter()
        .enumerate()
        .map(|(index, content)| {
            // A window in the middle of a file, as a disk section of a snapshot is.
            let mut bytes = vec![0xee; 1536];
            bytes.extend_from_slice(content);
            bytes.extend([0xee; 777]);
            DiskConfig {
                file: base_file(&bytes),
                access: if index == COW {
                    DiskAccess::CopyOnWrite
                } else {
                    DiskAccess::ReadOnly
                },
                id: format!("thaw-disk-{index}"),
                offset: 1536,
                length: content.len() as u64,
            }
        })
        .collect();
    DevicesConfig {
        disks,
        guest_cid: GUEST_CID,
        agent_stream,
        network: NetworkDevice::Absent,
    }
}

/// A machine without vCPUs.
pub struct Guest {
    pub devices: Arc<Devices>,
    pub memory: GuestMemoryMmap,
    pub host: UnixStream,
}

impl Guest {
    pub fn new(disks: &[&[u8]]) -> Self {
        Self::with_memory(MEMORY_BYTES, disks, NetworkDevice::Absent)
    }

    pub fn with_memory(bytes: usize, disks: &[&[u8]], network: NetworkDevice) -> Self {
        let memory = memory_of(bytes);
        let (host, agent) = UnixStream::pair().unwrap();
        let mut config = config(disks, agent);
        config.network = network;
        let devices = Devices::new(config, memory.clone()).unwrap();
        Self {
            devices,
            memory,
            host,
        }
    }

    pub fn with_two_disks() -> Self {
        let content = pattern(64);
        Self::new(&[&content, &content])
    }

    /// Freezes this machine and thaws another with a copy of its memory and a fresh host socket.
    pub fn clone_by_snapshot(&self, disks: &[&[u8]]) -> Self {
        self.devices.pause().unwrap();
        let bytes = postcard_bytes(&self.devices.save());
        self.thaw(disks, postcard::from_bytes(&bytes).unwrap())
    }

    pub fn thaw(&self, disks: &[&[u8]], state: DevicesStateV1) -> Self {
        let bytes = bytes_of(&self.memory);
        let memory = memory_of(bytes.len());
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let (host, agent) = UnixStream::pair().unwrap();
        let mut config = config(disks, agent);
        config.network = state.network();
        let devices = Devices::restore(config, memory.clone(), &state).unwrap();
        Self {
            devices,
            memory,
            host,
        }
    }

    pub fn address(&self, window: usize, register: u64) -> u64 {
        MMIO_BASE + window as u64 * MMIO_WINDOW_BYTES + register
    }

    pub fn read(&self, window: usize, register: u64) -> u32 {
        let mut bytes = [0xaa; 4];
        self.devices
            .mmio_read(self.address(window, register), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn write(&self, window: usize, register: u64, value: u32) {
        self.devices
            .mmio_write(self.address(window, register), &value.to_le_bytes());
    }

    pub fn status(&self, window: usize) -> u32 {
        self.read(window, 0x70)
    }

    pub fn needs_reset(&self, window: usize) -> bool {
        self.status(window) & 0x40 != 0
    }

    /// 3.1.1 up to FEATURES_OK.
    pub fn negotiate(&self, window: usize, features: u64) {
        for status in [0, 1, 3] {
            self.write(window, 0x70, status);
        }
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(window, 0x24, select);
            self.write(window, 0x20, half as u32);
        }
        self.write(window, 0x70, 11);
    }

    /// Sets up one queue in its own place in memory.
    pub fn set_up_queue(&self, window: usize, index: u32) -> Ring {
        let base = RINGS + (window as u64 * 4 + u64::from(index)) * RING_BYTES;
        let ring = Ring::new(window, index, base);
        self.write(window, 0x30, index);
        self.write(window, 0x38, u32::from(ring.size));
        for (register, address) in [
            (0x80, ring.descriptors),
            (0x90, ring.available),
            (0xa0, ring.used),
        ] {
            self.write(window, register, address as u32);
            self.write(window, register + 4, (address >> 32) as u32);
        }
        self.write(window, 0x44, 1);
        assert_eq!(self.read(window, 0x44), 1);
        ring
    }

    /// Brings a device up with all its queues.
    pub fn bring_up(&self, window: usize, features: u64, queues: u32) -> Vec<Ring> {
        self.negotiate(window, features);
        assert_eq!(self.status(window), 11);
        let rings = (0..queues)
            .map(|index| self.set_up_queue(window, index))
            .collect();
        self.write(window, 0x70, 15);
        assert_eq!(self.status(window), 15);
        rings
    }

    /// What the device thread does, on this thread: until nothing is due.
    pub fn run(&self) {
        for _ in 0..100 {
            if self.devices.serve_all().is_none() {
                return;
            }
        }
    }
}

pub fn postcard_bytes(state: &DevicesStateV1) -> Vec<u8> {
    postcard::to_stdvec(state).unwrap()
}

/// The driver's side of one queue. Chain n uses descriptors `n * GROUP` on and its own buffers.
#[derive(Clone)]
pub struct Ring {
    pub window: usize,
    pub index: u32,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
}

/// One buffer of a chain to be offered.
pub enum Part<'a> {
    Out(&'a [u8]),
    In(usize),
}

impl Ring {
    fn new(window: usize, index: u32, base: u64) -> Self {
        Self {
            window,
            index,
            size: QUEUE_SIZE,
            descriptors: base,
            available: base + 0x800,
            used: base + 0x1000,
            next_available: 0,
            next_used: 0,
            free: (0..QUEUE_SIZE / GROUP).rev().collect(),
        }
    }

    fn buffer(&self, chain: u16, part: usize) -> u64 {
        let queue = self.window as u64 * 4 + u64::from(self.index);
        let chains = u64::from(QUEUE_SIZE / GROUP);
        let slot = (queue * chains + u64::from(chain)) * u64::from(GROUP) + part as u64;
        BUFFERS + slot % 700 * BUFFER_BYTES
    }

    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub fn set_descriptor(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        (address, length, flags, next): (u64, u32, u16, u16),
    ) {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        let place = GuestAddress(self.descriptors + u64::from(index) * 16);
        memory.write_slice(&bytes, place).unwrap();
    }

    /// Makes the chain that begins at `head` available.
    pub fn publish(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        memory
            .write_obj(head, GuestAddress(self.available + 4 + slot * 2))
            .unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        memory
            .write_obj(self.next_available, GuestAddress(self.available + 2))
            .unwrap();
    }

    /// Asks for an interrupt at the next used buffer (event index).
    pub fn want_interrupt(&self, memory: &GuestMemoryMmap) {
        let place = self.available + 4 + u64::from(self.size) * 2;
        memory
            .write_obj(self.next_used, GuestAddress(place))
            .unwrap();
    }

    /// Offers a chain and notifies the device; the head's index.
    pub fn submit(&mut self, guest: &Guest, parts: &[Part<'_>]) -> u16 {
        let head = self.offer(guest, parts);
        guest.write(self.window, 0x50, self.index);
        head
    }

    /// Offers a chain and tells nobody; the head's index.
    pub fn offer(&mut self, guest: &Guest, parts: &[Part<'_>]) -> u16 {
        let chain = self.free.pop().expect("the test keeps chains free");
        let head = chain * GROUP;
        for (at, part) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let index = head + at as u16;
            let address = self.buffer(chain, at);
            let (length, mut flags) = match part {
                Part::Out(bytes) => {
                    guest
                        .memory
                        .write_slice(bytes, GuestAddress(address))
                        .unwrap();
                    (bytes.len(), 0)
                }
                Part::In(length) => (*length, WRITE),
            };
            assert!(length <= BUFFER_BYTES as usize);
            if !last {
                flags |= NEXT;
            }
            self.set_descriptor(
                &guest.memory,
                index,
                (address, length as u32, flags, index + 1),
            );
        }
        self.publish(&guest.memory, head);
        head
    }

    /// Takes a used chain: head and bytes written.
    pub fn take_used(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        if index == self.next_used {
            return None;
        }
        let slot = GuestAddress(self.used + 4 + u64::from(self.next_used % self.size) * 8);
        let element: u64 = memory.read_obj(slot).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let head = (element & 0xffff) as u16;
        self.free.push(head / GROUP);
        Some((head, (element >> 32) as u32))
    }

    /// Reads part `at` of the chain at `head`.
    pub fn part(&self, memory: &GuestMemoryMmap, head: u16, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let place = GuestAddress(self.buffer(head / GROUP, at));
        memory.read_slice(&mut bytes, place).unwrap();
        bytes
    }
}
