//! A driver's side of a queue that lies in its ring as it should, or nearly.

use thaw_fuzz::Dice;

use super::machine::{MEMORY_BYTES, Machine};

/// One buffer of a request.
pub enum Want {
    Out(Vec<u8>),
    In(usize),
}

/// Where rings begin; each queue of each window has a place of its own.
const RINGS: u64 = 0x2000;
const RING_BYTES: u64 = 0x1800;
const QUEUES_PER_WINDOW: u64 = 3;
/// Where indirect tables lie, and behind them the buffers.
const TABLES: u64 = 0x1_c000;
const BUFFERS: u64 = 0x2_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One queue.
#[derive(Clone, Debug)]
pub struct Ring {
    pub window: usize,
    pub index: u32,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    next_available: u16,
}

/// A chain in the queue.
#[derive(Debug)]
pub struct Placed {
    /// Address and length of each buffer of the request.
    pub buffers: Vec<(u64, usize)>,
}

impl Ring {
    pub fn new(window: usize, index: u32, size: u16) -> Self {
        let place = window as u64 * QUEUES_PER_WINDOW + u64::from(index);
        let base = RINGS + place * RING_BYTES;
        assert!(
            base + RING_BYTES <= TABLES,
            "every queue has room for its rings"
        );
        Self {
            window,
            index,
            size,
            descriptors: base,
            available: base + 0x800,
            used: base + 0x1000,
            next_available: 0,
        }
    }

    /// Tells the device of it, up to QueueReady.
    pub fn set_up(&self, machine: &mut Machine) {
        let mut write = |register, value| machine.write(self.window, register, value);
        write(0x30, self.index);
        write(0x38, u32::from(self.size));
        for (register, address) in [
            (0x80, self.descriptors),
            (0x90, self.available),
            (0xa0, self.used),
        ] {
            write(register, address as u32);
            write(register + 4, (address >> 32) as u32);
        }
        write(0x44, 1);
    }

    fn descriptor(&self, machine: &Machine, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = fields;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        machine.poke(table + 16 * u64::from(index), &bytes);
    }

    /// Puts a request into memory as a chain, direct or indirect, and makes it available; buffers lie anywhere.
    pub fn offer(&mut self, machine: &Machine, dice: &mut Dice, request: &[Want]) -> Placed {
        let direct = request.len() <= usize::from(self.size) && dice.in_thousand(700);
        // Chains of one batch may share descriptors and buffers: what is read then is the newest request, which is as good.
        let head = dice.index(usize::from(self.size)) as u16;
        let (table, entries, first) = if direct {
            (self.descriptors, self.size, head)
        } else {
            let table =
                TABLES + 16 * dice.range(0, (BUFFERS - TABLES) / 16 - 17) + dice.range(0, 15);
            let bytes = 16 * request.len() as u32;
            self.descriptor(machine, self.descriptors, head, (table, bytes, INDIRECT, 0));
            (table, request.len() as u16, 0)
        };
        let mut buffers = Vec::new();
        for (at, want) in (0u16..).zip(request) {
            let length = match want {
                Want::Out(bytes) => bytes.len(),
                Want::In(length) => *length,
            };
            let address = dice.range(BUFFERS, MEMORY_BYTES - length as u64);
            let mut flags = 0;
            match want {
                Want::Out(bytes) => machine.poke(address, bytes),
                Want::In(_) => flags = WRITE,
            }
            if usize::from(at) + 1 < request.len() {
                flags |= NEXT;
            }
            let (index, next) = ((first + at) % entries, (first + at + 1) % entries);
            self.descriptor(machine, table, index, (address, length as u32, flags, next));
            buffers.push((address, length));
        }
        self.publish(machine, head);
        Placed { buffers }
    }

    /// Makes the chain that begins at `head` available.
    pub fn publish(&mut self, machine: &Machine, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        machine.poke(self.available + 4 + 2 * slot, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        machine.poke(self.available + 2, &self.next_available.to_le_bytes());
    }

    /// Chains that the device has not used, as its used index tells.
    pub fn waiting(&self, machine: &Machine) -> u16 {
        let used = machine.peek(self.used + 2, 2);
        self.next_available
            .wrapping_sub(u16::from_le_bytes([used[0], used[1]]))
    }

    /// Spoils what lies in memory, in one way.
    pub fn spoil(&mut self, machine: &Machine, dice: &mut Dice) {
        let number = |dice: &mut Dice, bits: u32| {
            dice.edge(bits).to_le_bytes()[..bits as usize / 8].to_vec()
        };
        let descriptor = self.descriptors + 16 * dice.range(0, u64::from(self.size) - 1);
        let table = dice.range(TABLES, BUFFERS - 16);
        match dice.range(0, 9) {
            0 => machine.poke(descriptor, &number(dice, 64)),
            // Over the end of memory.
            1 => machine.poke(
                descriptor,
                &(MEMORY_BYTES - dice.range(0, 64)).to_le_bytes(),
            ),
            2 => machine.poke(descriptor + 8, &number(dice, 32)),
            3 => machine.poke(descriptor + 12, &[dice.range(0, 7) as u8, 0]),
            4 => machine.poke(
                descriptor + 14,
                &(dice.range(0, u64::from(self.size)) as u16).to_le_bytes(),
            ),
            5 => machine.poke(table, &number(dice, 64)),
            6 => {
                let noise = dice.bytes(16);
                machine.poke(descriptor, &noise);
            }
            7 => {
                let slot = dice.range(0, u64::from(self.size) - 1);
                machine.poke(self.available + 4 + 2 * slot, &number(dice, 16));
            }
            8 => {
                let any = dice.any() as u16;
                self.next_available = *dice.pick(&[
                    self.next_available.wrapping_add(self.size),
                    self.next_available.wrapping_add(self.size + 1),
                    self.next_available.wrapping_sub(1),
                    any,
                ]);
                machine.poke(self.available + 2, &self.next_available.to_le_bytes());
            }
            // A buffer over this queue's own rings.
            _ => machine.poke(
                descriptor,
                &(self.descriptors + dice.range(0, 0x17ff)).to_le_bytes(),
            ),
        }
    }
}
