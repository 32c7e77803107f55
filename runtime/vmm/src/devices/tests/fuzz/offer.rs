//! What a device may do with the chains that lie in a queue: a second, plain reading of virtio 1.2, 2.7, to compare with.

use std::ops::Range;

use crate::devices::state::QueueRegistersStateV1;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The chains that are available in one queue.
#[derive(Debug, Default)]
pub struct Offer {
    /// Their heads and how many bytes the device may write, in the driver's order.
    pub chains: Vec<(u16, u64)>,
    /// Device-writable buffers.
    pub writable: Vec<Range<u64>>,
    /// The used ring.
    pub used: Range<u64>,
    /// Rings and tables: what the device reads to find the rest.
    pub described: Vec<Range<u64>>,
}

fn number<const N: usize>(memory: &[u8], address: u64) -> Option<[u8; N]> {
    let start = usize::try_from(address).ok()?;
    memory.get(start..)?.first_chunk().copied()
}

fn half(memory: &[u8], address: u64) -> Option<u16> {
    number(memory, address).map(u16::from_le_bytes)
}

impl Offer {
    /// Reads a queue whose driver and device have both come to `position`.
    pub fn read(memory: &[u8], queue: &QueueRegistersStateV1, position: u16) -> Self {
        let size = u64::from(queue.size);
        let mut offer = Self {
            used: queue.used..queue.used + 6 + 8 * size,
            described: vec![
                queue.descriptors..queue.descriptors + 16 * size,
                queue.available..queue.available + 6 + 2 * size,
            ],
            ..Self::default()
        };
        let available = half(memory, queue.available + 2).expect("rings lie in memory");
        let count = available.wrapping_sub(position);
        if count > queue.size {
            return offer;
        }
        for nth in 0..count {
            let slot = u64::from(position.wrapping_add(nth) % queue.size);
            let head = half(memory, queue.available + 4 + 2 * slot).expect("rings lie in memory");
            let writable = offer.walk(memory, queue, head);
            offer.chains.push((head, writable));
        }
        offer
    }

    /// Follows a chain as far as it leads; how many bytes of it may be written.
    fn walk(&mut self, memory: &[u8], queue: &QueueRegistersStateV1, head: u16) -> u64 {
        let (mut table, mut entries, mut next) = (queue.descriptors, u64::from(queue.size), head);
        let (mut is_indirect, mut writable) = (false, 0);
        // Longer than any that is taken.
        for _ in 0..300 {
            if u64::from(next) >= entries {
                break;
            }
            let place = table.saturating_add(16 * u64::from(next));
            let Some([address, rest]) = number::<16>(memory, place).map(|bytes| {
                let (low, high) = bytes.split_at(8);
                [low, high].map(|half| u64::from_le_bytes(half.try_into().unwrap()))
            }) else {
                break;
            };
            let length = rest & 0xffff_ffff;
            let (flags, link) = ((rest >> 32) as u16, (rest >> 48) as u16);
            if flags & INDIRECT != 0 {
                if is_indirect {
                    break;
                }
                (is_indirect, table, entries, next) = (true, address, length / 16, 0);
                self.described.push(address..address.saturating_add(length));
                continue;
            }
            let end = address.checked_add(length);
            // An empty buffer may be anywhere: nobody looks there.
            if length > 0 && end.is_none_or(|end| end > memory.len() as u64) {
                break;
            }
            if flags & WRITE != 0 && length > 0 {
                self.writable.push(address..address + length);
                writable += length;
            }
            if flags & NEXT == 0 {
                break;
            }
            next = link;
        }
        writable
    }

    /// Whether a write that is allowed changes what is to be read, here or in the offer of another queue.
    pub fn is_tangled_with(&self, other: &Self) -> bool {
        let meets = |one: &Range<u64>, two: &Range<u64>| one.start < two.end && two.start < one.end;
        let written = || self.writable.iter().chain([&self.used]);
        let is_same = std::ptr::eq(self, other);
        written().any(|range| other.described.iter().any(|other| meets(range, other)))
            || self.writable.iter().any(|range| meets(range, &other.used))
            || (!is_same && meets(&self.used, &other.used))
    }

    /// Whether the device may write to this address.
    pub fn may_write(&self, address: u64) -> bool {
        self.used.contains(&address) || self.writable.iter().any(|range| range.contains(&address))
    }
}
