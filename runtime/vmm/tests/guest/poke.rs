//! A guest that means harm: random values into every register of every device, and rings of its own in memory that it hands
//! to them, by /dev/mem (the test's kernel is told `iomem=relaxed`, as its own drivers hold the same windows).
//!
//! *Gentle*: no device is broken for it, so that it goes on for as long as it likes: rings lie where they should, and a chain
//! has room for a header. *Wild*: all of that, and whatever else there is; the first device that it breaks ends the machine.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::time::{Duration, Instant};
use std::{ptr, thread};

use thaw_fuzz::Dice;

const WINDOWS: u64 = 0xd000_0000;
const PAGE_BYTES: usize = 4096;
/// "virt", which every window begins with.
const MAGIC: u32 = 0x7472_6976;
/// Pages that devices write to, any of them at any time.
const BUFFERS: usize = 16;
/// Where the rings of one queue lie in their page.
const AVAILABLE: usize = 0x800;
const USED: usize = 0xc00;
const ENTRIES_MAX: u32 = 64;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The network device's kind (virtio 1.2, 5).
const NETWORK: u32 = 1;
/// Bytes before each frame.
const VNET_HEADER_BYTES: usize = 12;
/// Shortest buffer for a frame that the device need not refuse: header, Ethernet's own, MTU.
const RECEIVE_BYTES_MIN: usize = VNET_HEADER_BYTES + 14 + 1500;

/// How the buffers of a request to one kind of device look: what the device reads of it, and how much it may write.
struct Kind {
    device: u32,
    queues: u32,
    request: fn(&mut Dice, queue: u32) -> (Vec<u8>, usize),
}

/// One more device is one more row; of devices that have none only registers are poked.
const KINDS: [Kind; 4] = [
    Kind {
        device: NETWORK,
        queues: 2,
        request: network,
    },
    Kind {
        device: 2,
        queues: 1,
        request: block,
    },
    Kind {
        device: 4,
        queues: 1,
        request: |dice, _| (Vec::new(), 1 + dice.index(4096)),
    },
    Kind {
        device: 19,
        queues: 3,
        request: vsock,
    },
];

fn block(dice: &mut Dice, _: u32) -> (Vec<u8>, usize) {
    let mut header = (*dice.pick(&[0u32, 1, 4, 8, 99])).to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(
        (if dice.in_thousand(800) {
            dice.range(0, 4000)
        } else {
            dice.edge(64)
        })
        .to_le_bytes(),
    );
    let length = *dice.pick(&[0, 512, 1024, 777]);
    header.extend(dice.bytes(length));
    (header, 1 + *dice.pick(&[0, 20, 512, 1024, 2000]))
}

/// Packets to the agent's port and anywhere, with any counters.
fn vsock(dice: &mut Dice, queue: u32) -> (Vec<u8>, usize) {
    if queue != 1 {
        return (Vec::new(), 45 + dice.index(3000));
    }
    let length = dice.index(2000);
    let mut packet = Vec::new();
    packet.extend(
        (if dice.in_thousand(950) {
            3
        } else {
            dice.edge(64)
        })
        .to_le_bytes(),
    );
    packet.extend(
        (if dice.in_thousand(950) {
            2
        } else {
            dice.edge(64)
        })
        .to_le_bytes(),
    );
    packet.extend((*dice.pick(&[5000u32, 5000, 5000, 5001])).to_le_bytes());
    packet.extend(
        (if dice.in_thousand(950) {
            1024
        } else {
            dice.edge(32) as u32
        })
        .to_le_bytes(),
    );
    packet.extend((length as u32).to_le_bytes());
    packet.extend([1, 0]);
    packet.extend((*dice.pick(&[1u16, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7, 99])).to_le_bytes());
    packet.extend((dice.range(0, 3) as u32).to_le_bytes());
    packet.extend((dice.edge(32) as u32).to_le_bytes());
    packet.extend((dice.edge(32) as u32).to_le_bytes());
    packet.extend(dice.bytes(length));
    (packet, 0)
}

/// Frames of any length and content under any header; every other one is a datagram that the host hears (harness/net.rs).
fn network(dice: &mut Dice, queue: u32) -> (Vec<u8>, usize) {
    if queue == 0 {
        return (Vec::new(), RECEIVE_BYTES_MIN + dice.index(2000));
    }
    let mut packet = dice.bytes(VNET_HEADER_BYTES);
    if dice.in_thousand(500) {
        let length = dice.index(2000);
        packet.extend(dice.bytes(length));
    } else {
        let length = dice.index(1400);
        packet.extend(datagram(&dice.bytes(length)));
    }
    (packet, 0)
}

/// A frame with a UDP datagram from the guest's address to the host's (thaw-agent-protocol's `network`).
fn datagram(payload: &[u8]) -> Vec<u8> {
    let length = |headers: usize| ((headers + payload.len()) as u16).to_be_bytes();
    let mut ip = [
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 172, 31, 255, 2, 172, 31, 255, 1,
    ];
    ip[2..4].copy_from_slice(&length(28));
    let words = ip.as_chunks::<2>().0.iter();
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let mut frame = b"\x06THAW\x01\x06THAW\x02\x08\x00".to_vec();
    frame.extend(ip);
    for field in [
        7001u16.to_be_bytes(),
        7000u16.to_be_bytes(),
        length(8),
        [0; 2],
    ] {
        frame.extend(field);
    }
    frame.extend(payload);
    frame
}

/// A mapping of `length` bytes, for ever.
fn map(length: usize, file: Option<(&File, u64)>) -> *mut u8 {
    let (fd, offset, flags) = match file {
        Some((file, offset)) => (file.as_raw_fd(), offset, libc::MAP_SHARED),
        None => (
            -1,
            0,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE,
        ),
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel picks.
    let place = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            protection,
            flags,
            fd,
            offset as i64,
        )
    };
    assert!(
        place != libc::MAP_FAILED,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    place.cast()
}

/// A page of our own, and where it lies in the machine's memory.
struct Page {
    place: *mut u8,
    address: u64,
}

impl Page {
    fn new() -> Self {
        let place = map(PAGE_BYTES, None);
        // SAFETY: the page was just mapped; written to, so that it is a page of its own.
        unsafe { place.write_volatile(1) };
        let mut entry = [0; 8];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        pagemap
            .read_exact_at(&mut entry, place as u64 / PAGE_BYTES as u64 * 8)
            .unwrap();
        // Documentation/admin-guide/mm/pagemap.rst: the frame in bits 0 to 54.
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        assert_ne!(frame, 0, "only root is told of frames");
        Self {
            place,
            address: frame * PAGE_BYTES as u64,
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE_BYTES);
        for (at, byte) in bytes.iter().enumerate() {
            // SAFETY: within the page, by the line above.
            unsafe { self.place.add(offset + at).write_volatile(*byte) };
        }
    }

    fn half(&self, offset: usize) -> u16 {
        assert!(offset + 2 <= PAGE_BYTES);
        // SAFETY: within the page, by the line above, and the offsets of rings are even.
        unsafe { self.place.add(offset).cast::<u16>().read_volatile() }
    }
}

/// A queue of ours.
struct Queue {
    page: Page,
    /// What the device reads, chain by chain: no other chain writes there while one waits.
    readable: Vec<Page>,
    entries: u16,
    made_available: u16,
    /// The device's index of used chains when it was last looked at.
    used: u16,
    /// Chains that the device gave back, since ever.
    answered: u64,
    /// The device knows of it.
    is_up: bool,
}

impl Queue {
    /// How many chains the device has not given back.
    fn waiting(&mut self) -> u16 {
        let used = self.page.half(USED + 2);
        self.answered += u64::from(used.wrapping_sub(self.used));
        self.used = used;
        self.made_available.wrapping_sub(used)
    }
}

/// A window and its device.
struct Window {
    registers: *mut u8,
    kind: Option<&'static Kind>,
    queues: Vec<Queue>,
}

impl Window {
    fn find() -> Vec<Self> {
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/mem")
            .unwrap();
        let mut found = Vec::new();
        loop {
            let base = WINDOWS + (found.len() * PAGE_BYTES) as u64;
            let window = Self {
                registers: map(PAGE_BYTES, Some((&memory, base))),
                kind: None,
                queues: Vec::new(),
            };
            if window.read(0) != MAGIC {
                return found;
            }
            let device = window.read(8);
            let kind = KINDS.iter().find(|kind| kind.device == device);
            let queue = || Queue {
                page: Page::new(),
                readable: (0..ENTRIES_MAX / 2).map(|_| Page::new()).collect(),
                entries: 0,
                made_available: 0,
                used: 0,
                answered: 0,
                is_up: false,
            };
            let queues = (0..kind.map_or(0, |kind| kind.queues))
                .map(|_| queue())
                .collect();
            found.push(Self {
                kind,
                queues,
                ..window
            });
        }
    }

    /// The device's number and how many chains of each queue came back.
    fn answered(&mut self) -> String {
        let device = self.read(8);
        let counts = self.queues.iter_mut().map(|queue| {
            queue.waiting();
            queue.answered.to_string()
        });
        format!(" {device}={}", counts.collect::<Vec<_>>().join("/"))
    }

    fn read(&self, register: usize) -> u32 {
        // SAFETY: an aligned register within the window's mapping.
        unsafe {
            self.registers
                .add(register & 0xffc)
                .cast::<u32>()
                .read_volatile()
        }
    }

    fn write(&self, register: usize, value: u32) {
        // SAFETY: as in `read`.
        unsafe {
            self.registers
                .add(register & 0xffc)
                .cast::<u32>()
                .write_volatile(value)
        };
    }

    /// An access of another width, anywhere in the window.
    fn access_oddly(&self, dice: &mut Dice) {
        let offset = dice.index(PAGE_BYTES - 8);
        let value = dice.any();
        // SAFETY: within the window's mapping; unaligned accesses are allowed on this processor, and the monitor's to refuse.
        unsafe {
            let place = self.registers.add(offset);
            match dice.range(0, 5) {
                0 => place.write_volatile(value as u8),
                1 => drop(place.read_volatile()),
                2 => place
                    .add(offset & 1)
                    .cast::<u16>()
                    .write_unaligned(value as u16),
                3 => drop(place.cast::<u16>().read_unaligned()),
                4 if offset >= 0x100 => place.cast::<u64>().write_unaligned(value),
                _ => drop(place.cast::<u64>().read_unaligned()),
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        self.write(0x70, value);
        if self.read(0x70) != 15 {
            self.queues.iter_mut().for_each(|queue| queue.is_up = false);
        }
    }

    /// Brings the device up with rings in our pages.
    fn bring_up(&mut self, dice: &mut Dice) {
        for value in [0, 1, 3] {
            self.set_status(value);
        }
        self.write(0x24, 1);
        self.write(0x20, 1);
        self.write(0x24, 0);
        self.write(0x20, *dice.pick(&[0, 1 << 28, 1 << 29, 3 << 28]));
        self.write(0x70, 11);
        for index in 0..self.queues.len() {
            self.write(0x30, index as u32);
            let most = self.read(0x34).clamp(1, ENTRIES_MAX).ilog2();
            let entries = 1u16 << dice.range(0, u64::from(most));
            let queue = &mut self.queues[index];
            queue.waiting();
            queue.page.write(0, &[0; PAGE_BYTES]);
            (queue.entries, queue.made_available, queue.used) = (entries, 0, 0);
            queue.is_up = true;
            let address = queue.page.address;
            self.write(0x38, u32::from(entries));
            for (register, offset) in [(0x80, 0), (0x90, AVAILABLE as u64), (0xa0, USED as u64)] {
                self.write(register, (address + offset) as u32);
                self.write(register + 4, ((address + offset) >> 32) as u32);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
    }

    /// Hands the device a request that it can make something of.
    fn request(&mut self, dice: &mut Dice, buffers: &[Page]) {
        let Some(kind) = self.kind else {
            return;
        };
        let index = dice.index(self.queues.len());
        let queue = &mut self.queues[index];
        let waiting = queue.waiting();
        // Each chain has two descriptors of its own, lest a later one makes nonsense of one that waits.
        let chains = queue.entries / 2;
        if !queue.is_up || waiting >= chains {
            return;
        }
        let (readable, writable) = (kind.request)(dice, index as u32);
        let mut segments = Vec::new();
        for (length, flags) in [(readable.len(), 0), (writable, WRITE)] {
            if length > 0 {
                let page = match flags {
                    0 => &queue.readable[usize::from(queue.made_available % chains)],
                    _ => &buffers[dice.index(buffers.len())],
                };
                let offset = dice.index(PAGE_BYTES - length + 1);
                if flags == 0 {
                    page.write(offset, &readable);
                }
                segments.push((page.address + offset as u64, length, flags));
            }
        }
        let head = queue.made_available % chains * 2;
        let count = segments.len() as u16;
        for (at, (address, length, flags)) in (0u16..).zip(segments) {
            let (place, next) = (head + at, (head + at + 1) % queue.entries);
            let flags = if at + 1 < count { flags | NEXT } else { flags };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend((length as u32).to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            queue.page.write(16 * usize::from(place), &descriptor);
        }
        let slot = usize::from(queue.made_available % queue.entries);
        queue
            .page
            .write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        queue.made_available = queue.made_available.wrapping_add(1);
        // A used buffer's event, for drivers that negotiated it: any.
        queue.page.write(
            AVAILABLE + 4 + 2 * usize::from(queue.entries),
            &dice.any().to_le_bytes()[..2],
        );
        queue
            .page
            .write(AVAILABLE + 2, &queue.made_available.to_le_bytes());
        self.write(0x50, index as u32);
    }

    /// What no driver does.
    fn go_wild(&mut self, dice: &mut Dice) {
        match dice.range(0, 2) {
            0 => self.write(dice.index(0x100), dice.edge(32) as u32),
            1 => {
                // A queue that lies nowhere.
                for (register, value) in [
                    (0x70, 0),
                    (0x70, 1),
                    (0x70, 3),
                    (0x24, 1),
                    (0x20, 1),
                    (0x70, 11),
                ] {
                    self.write(register, value);
                }
                self.queues.iter_mut().for_each(|queue| queue.is_up = false);
                self.write(*dice.pick(&[0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4]), u32::MAX);
                self.write(0x44, 1);
            }
            _ => {
                let place = *dice.pick(&[0, 8, 12, 14, AVAILABLE + 2, AVAILABLE + 4]);
                for queue in 0..self.queues.len() {
                    self.queues[queue]
                        .page
                        .write(place, &dice.edge(16).to_le_bytes()[..2]);
                    self.write(0x50, queue as u32);
                }
            }
        }
    }
}

/// The serial console by the kernel's driver: a process may not use ports itself where KVM is nested in QEMU's emulation, and
/// every register of it is tried without a guest (`fuzz/serial.rs`).
struct Serial(File);

impl Serial {
    fn poke(&mut self, dice: &mut Dice) {
        if dice.in_thousand(700) {
            let length = dice.index(64);
            // A full queue takes less.
            let _ = self.0.write(&dice.bytes(length));
            return;
        }
        let lines = (dice.any() as i32) & (libc::TIOCM_DTR | libc::TIOCM_RTS);
        // SAFETY: a live descriptor and a live integer.
        unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCMSET, &raw const lines) };
    }

    fn say(&mut self, text: &str) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let count = self.0.write(rest).unwrap_or(0);
            rest = &rest[count..];
        }
    }
}

/// Pokes for so many seconds, says on the console how often, and never comes back.
pub fn poke(manner: &str, seconds: u64, seed: u64) -> ! {
    let mut options = OpenOptions::new();
    let options = options
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
    let mut serial = Serial(options.open("/dev/ttyS0").unwrap());
    let is_wild = manner == "wild";
    let mut dice = Dice::from_seed(seed);
    let mut windows = Window::find();
    let buffers: Vec<Page> = (0..BUFFERS).map(|_| Page::new()).collect();
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut count = 0u64;
    while Instant::now() < until {
        let window = dice.index(windows.len());
        let window = &mut windows[window];
        let dice = &mut dice;
        match dice.range(0, 19) {
            0..=2 => drop(window.read(dice.index(PAGE_BYTES))),
            // QueueReady is only written by those who know where the rings are.
            3..=5 => match dice.index(0x100) & 0xfc {
                0x44 => {}
                0x70 => window.set_status(dice.edge(8) as u32),
                register => window.write(register, dice.edge(32) as u32),
            },
            6 => window.set_status(*dice.pick(&[0, 1, 3, 11, 15, 0x8f])),
            7 => window.access_oddly(dice),
            8 => window.bring_up(dice),
            9 => serial.poke(dice),
            10 | 11 if is_wild => window.go_wild(dice),
            _ => window.request(dice, &buffers),
        }
        count += 1;
    }
    let answered = windows.iter_mut().map(Window::answered).collect::<Vec<_>>();
    serial.say(&format!(
        "\npoked {count} times at {} windows, chains answered:{}\n",
        windows.len(),
        answered.concat()
    ));
    loop {
        thread::park();
    }
}
