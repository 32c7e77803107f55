//! A running split virtqueue (virtio 1.2, 2.7) and the descriptor chains copied out of it.
//!
//! **Invariant:** every chain that is popped is completed before the device's lock is released, so that
//! nothing is in flight when state is saved.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::fault::GuestFault;
use super::registers::QueueRegisters;
use crate::memory::{GuestMemoryMmap, GuestSlice};

/// Descriptors accepted in one chain, indirect tables included.
const DESCRIPTORS_MAX: usize = 256;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
struct Segment {
    address: GuestAddress,
    length: usize,
}

/// The buffers of one direction of a chain, read as one run of bytes.
#[derive(Debug, Default, Clone)]
pub(super) struct Buffers {
    segments: Vec<Segment>,
    length: usize,
}

impl Buffers {
    /// Bytes in all segments.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    fn push(&mut self, address: GuestAddress, length: usize) {
        if length > 0 {
            self.segments.push(Segment { address, length });
            self.length = self.length.saturating_add(length);
        }
    }

    /// The pieces that cover `offset..offset + length`, clipped to the buffers.
    fn pieces(&self, offset: usize, length: usize) -> impl Iterator<Item = Segment> + '_ {
        let end = offset.saturating_add(length);
        let mut start = 0usize;
        self.segments.iter().filter_map(move |segment| {
            let segment_start = start;
            start += segment.length;
            let from = offset.max(segment_start);
            let to = end.min(start);
            (from < to).then(|| Segment {
                address: GuestAddress(
                    segment
                        .address
                        .0
                        .saturating_add((from - segment_start) as u64),
                ),
                length: to - from,
            })
        })
    }

    /// Copies bytes out of the guest; the range must lie within the buffers.
    pub(super) fn read(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for piece in self.pieces(offset, into.len()) {
            memory.read_slice(&mut into[done..done + piece.length], piece.address)?;
            done += piece.length;
        }
        assert_eq!(done, into.len(), "the caller checked the length");
        Ok(())
    }

    /// Copies bytes into the guest; the range must lie within the buffers.
    pub(super) fn write(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        from: &[u8],
    ) -> Result<(), GuestMemoryError> {
        let mut done = 0;
        for piece in self.pieces(offset, from.len()) {
            memory.write_slice(&from[done..done + piece.length], piece.address)?;
            done += piece.length;
        }
        assert_eq!(done, from.len(), "the caller checked the length");
        Ok(())
    }

    /// Calls `act` with each host slice that backs `offset..offset + length` and its distance from `offset`.
    pub(super) fn for_each_slice<E: From<GuestMemoryError>>(
        &self,
        memory: &GuestMemoryMmap,
        offset: usize,
        length: usize,
        mut act: impl FnMut(GuestSlice<'_>, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0u64;
        for piece in self.pieces(offset, length) {
            for slice in GuestMemory::get_slices(
                memory,
                piece.address,
                piece.length,
                Permissions::ReadWrite,
            )? {
                let slice = slice?;
                let slice_length = slice.len() as u64;
                act(slice, done)?;
                done += slice_length;
            }
        }
        Ok(())
    }
}

/// A descriptor chain, copied out of the guest once and checked.
#[derive(Debug)]
pub(super) struct Chain {
    head: u16,
    /// Device-readable buffers.
    pub(super) readable: Buffers,
    /// Device-writable buffers; every one follows every readable one.
    pub(super) writable: Buffers,
}

/// A queue in use.
#[derive(Debug)]
pub(super) struct VirtQueue {
    index: usize,
    queue: Queue,
    /// Buffers were used since the last look at whether to interrupt.
    completed: bool,
}

impl VirtQueue {
    /// Builds the queue that the registers describe, starting at `position` in both rings.
    pub(super) fn new(
        index: usize,
        registers: QueueRegisters,
        event_idx: bool,
        position: u16,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, GuestFault> {
        let QueueRegisters {
            size,
            ready: _,
            descriptors,
            available,
            used,
        } = registers;
        let broken = |_| GuestFault::QueueAddress { queue: index };
        let mut queue = Queue::new(size).map_err(broken)?;
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .map_err(broken)?;
        queue
            .try_set_avail_ring_address(GuestAddress(available))
            .map_err(broken)?;
        queue
            .try_set_used_ring_address(GuestAddress(used))
            .map_err(broken)?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(position);
        queue.set_next_used(position);
        queue.set_ready(true);
        // virtio-queue takes an available ring at 0 for "not set up".
        if available == 0 || !queue.is_valid(memory) {
            return Err(GuestFault::QueueAddress { queue: index });
        }
        Ok(Self {
            index,
            queue,
            completed: false,
        })
    }

    fn ring_fault(&self, source: virtio_queue::Error) -> GuestFault {
        GuestFault::Ring {
            queue: self.index,
            source,
        }
    }

    /// Whether the driver has made no other chain available.
    pub(super) fn is_empty(&self, memory: &GuestMemoryMmap) -> Result<bool, GuestFault> {
        let available = self
            .queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(|e| self.ring_fault(e))?;
        Ok(available.0 == self.queue.next_avail())
    }

    /// Takes the next chain, or `None` when the driver has made no other available.
    pub(super) fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, GuestFault> {
        let queue = self.index;
        let ring = |source| GuestFault::Ring { queue, source };
        let Some(descriptors) = self.queue.iter(memory).map_err(ring)?.next() else {
            return Ok(None);
        };
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        // The crate ends a bad chain silently; the last descriptor then still promises another.
        let mut complete = false;
        for (count, descriptor) in descriptors.enumerate() {
            let length = descriptor.len() as usize;
            if count >= DESCRIPTORS_MAX {
                return Err(GuestFault::Chain { queue });
            }
            if !GuestMemory::check_range(memory, descriptor.addr(), length, Permissions::ReadWrite)
            {
                return Err(GuestFault::Buffer { queue });
            }
            if descriptor.is_write_only() {
                chain.writable.push(descriptor.addr(), length);
            } else if chain.writable.length() > 0 {
                // 2.7.4.2: all readable buffers come first.
                return Err(GuestFault::Chain { queue });
            } else {
                chain.readable.push(descriptor.addr(), length);
            }
            complete = !descriptor.has_next();
        }
        if complete {
            Ok(Some(chain))
        } else {
            Err(GuestFault::Chain { queue })
        }
    }

    /// Gives a chain back with `written` bytes placed in its writable buffers.
    pub(super) fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        written: usize,
    ) -> Result<(), GuestFault> {
        let written = u32::try_from(written).expect("a chain holds less than 4 GiB");
        self.queue
            .add_used(memory, chain.head, written)
            .map_err(|e| self.ring_fault(e))?;
        self.completed = true;
        Ok(())
    }

    /// Asks the driver to notify the next buffer; true if one came meanwhile (2.7.10).
    pub(super) fn rearm(&mut self, memory: &GuestMemoryMmap) -> Result<bool, GuestFault> {
        self.queue
            .enable_notification(memory)
            .map_err(|e| self.ring_fault(e))
    }

    /// Whether the driver wants an interrupt for what was completed since the last call.
    pub(super) fn take_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, GuestFault> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        self.queue
            .needs_notification(memory)
            .map_err(|e| self.ring_fault(e))
    }

    pub(super) fn too_small(&self) -> GuestFault {
        GuestFault::TooSmall { queue: self.index }
    }

    pub(super) fn buffer_fault(&self) -> GuestFault {
        GuestFault::Buffer { queue: self.index }
    }

    /// The position in both rings: they agree because nothing is in flight.
    pub(super) fn save(&self) -> VirtQueueStateV1 {
        let Self {
            index: _,
            queue,
            completed,
        } = self;
        assert!(
            !completed,
            "interrupts are decided before the lock is released"
        );
        assert_eq!(
            queue.next_avail(),
            queue.next_used(),
            "no chain is in flight"
        );
        VirtQueueStateV1 {
            position: queue.next_used(),
        }
    }
}

/// Where a running queue stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtQueueStateV1 {
    /// Next index of the available and of the used ring.
    pub position: u16,
}
