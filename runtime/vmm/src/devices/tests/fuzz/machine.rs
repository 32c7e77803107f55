//! A machine of whose devices every call is watched: what a guest must not be able to do fails the execution.
//!
//! - A device that the guest broke stays broken, and does nothing, until it is reset.
//! - What a driver negotiated and set up does not change while the device runs, nor a queue's place once it is ready.
//! - A device uses no more chains than it was offered, in their order, and tells no longer length than their buffers have.
//! - It changes no byte of guest memory but in offered buffers and in its used rings, and marks every page that it changes.
//! - All devices together hold and need no more heap than [`HEAP_BYTES_MAX`].

use std::io::Read;
use std::ops::{Deref as _, Range};
use std::os::unix::net::{UnixDatagram, UnixStream};

use thaw_fuzz::{Dice, measured};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::super::driver::{Guest, pattern};
use super::offer::Offer;
use crate::devices::state::{DevicesStateV1, SlotStateV1};
use crate::devices::{Devices, DiskFiles, HEAP_BYTES_MAX, NetworkDevice};
use crate::memory::PAGE_BYTES;

/// Guest memory: little, as it is compared after each step.
pub const MEMORY_BYTES: u64 = 256 * 1024;
/// Sectors of each disk.
pub const DISK_SECTORS: usize = 24;

const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;
const STATUS: u64 = 0x70;

/// Which queues a call may serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Nobody,
    Window(usize),
    Everybody,
}

pub struct Machine {
    pub guest: Guest,
    disk: Vec<u8>,
    /// The other end of the network, as datagrams.
    wire: UnixDatagram,
    frames: usize,
    /// Heap that the devices hold beyond what they were made with.
    held: i64,
    /// Guest memory before and after a call; kept, because there are many calls.
    before: Vec<u8>,
    after: Vec<u8>,
}

/// The other end of a tap that is plugged in.
fn plugged(guest: &Guest) -> UnixDatagram {
    let (wire, tap) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    guest.devices.plug(tap.into()).unwrap();
    wire
}

impl Machine {
    pub fn new() -> Self {
        let disk = pattern(DISK_SECTORS);
        let network = NetworkDevice::Present;
        let guest = Guest::with_memory(MEMORY_BYTES as usize, &[&disk, &disk], network);
        let wire = plugged(&guest);
        Self {
            guest,
            disk,
            wire,
            frames: 0,
            held: 0,
            before: vec![0; MEMORY_BYTES as usize],
            after: vec![0; MEMORY_BYTES as usize],
        }
    }

    pub fn windows(&self) -> Range<usize> {
        0..self.guest.devices.slots.len()
    }

    pub fn state_of(&self, window: usize) -> SlotStateV1 {
        self.guest.devices.slots[window].save()
    }

    /// Tells somebody who replays an execution what the devices reported.
    pub fn tell_faults(&self) {
        let (sender, faults) = std::sync::mpsc::channel();
        self.guest.devices.faults.connect(sender);
        faults
            .try_iter()
            .for_each(|fault| println!("{}", crate::fault::chain(&fault)));
    }

    pub fn is_broken(&self, window: usize) -> bool {
        self.state_of(window).registers.status & NEEDS_RESET != 0
    }

    /// Fills a part of memory.
    pub fn poke(&self, address: u64, bytes: &[u8]) {
        self.guest
            .memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn peek(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.guest
            .memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// A register of 32 bits.
    pub fn write(&mut self, window: usize, register: u64, value: u32) {
        self.write_any(self.guest.address(window, register), &value.to_le_bytes());
    }

    /// A write of any width anywhere.
    pub fn write_any(&mut self, address: u64, data: &[u8]) {
        let window = self
            .windows()
            .find(|&w| self.guest.address(w, STATUS) == address);
        let is_reset = data == [0; 4];
        let reset = window.filter(|_| is_reset);
        self.act(Reach::Nobody, reset, |devices| {
            devices.mmio_write(address, data)
        });
    }

    /// A read of any width anywhere: it changes nothing.
    pub fn read_any(&mut self, address: u64, data: &mut [u8]) {
        let before: Vec<_> = self.windows().map(|window| self.state_of(window)).collect();
        self.act(Reach::Nobody, None, |devices| {
            devices.mmio_read(address, data)
        });
        let after: Vec<_> = self.windows().map(|window| self.state_of(window)).collect();
        assert_eq!(before, after, "a read has changed something");
    }

    /// A frame comes, of another length each time, and what has gone is taken off.
    fn exchange_frames(&mut self) {
        const LENGTHS: [usize; 6] = [26, 72, 1526, 1527, 3, 4000];
        self.frames += 1;
        let frame = vec![self.frames as u8; LENGTHS[self.frames % LENGTHS.len()]];
        // Fails when the guest does not take what came before.
        let _ = self.wire.send(&frame);
        let mut gone = [0; 4096];
        while let Ok(length) = self.wire.recv(&mut gone) {
            assert!(
                (12 + 14..=12 + 1514).contains(&length),
                "a frame of {length} bytes"
            );
            assert_eq!(gone[..12], [0; 12], "a header that is the guest's");
        }
    }

    /// One turn of a device.
    pub fn serve(&mut self, window: usize) {
        self.exchange_frames();
        self.act(Reach::Window(window), None, |devices| {
            devices.slots[window].serve()
        });
    }

    /// One turn of all.
    pub fn serve_all(&mut self) {
        self.act(Reach::Everybody, None, |devices| devices.serve_all());
    }

    /// Pauses, and saves in the form of a snapshot.
    pub fn freeze(&mut self) -> DevicesStateV1 {
        self.act(Reach::Everybody, None, |devices| devices.pause().unwrap());
        let bytes = super::super::driver::postcard_bytes(&self.guest.devices.save());
        postcard::from_bytes(&bytes).unwrap()
    }

    /// What a guest has made of its devices can be saved, restored in another process, and put back in place; it is the same then.
    pub fn round_trip(&mut self, dice: &mut Dice) {
        let state = self.freeze();
        if dice.in_thousand(500) {
            self.thaw(&state);
        } else {
            let (host, agent) = UnixStream::pair().unwrap();
            let reset = |devices: &Devices| devices.reset_to(&state, DiskFiles::Kept, agent);
            let (result, grown) = measured(|| reset(&self.guest.devices));
            self.held += grown.held;
            if result.is_err() {
                // What the guest has ended is not brought back. The heap is that of other devices from here on.
                assert!(self.guest.devices.faults.has_ended(), "{result:?}");
                dice.saw("ended");
                self.thaw(&state);
            } else {
                self.guest.host = host;
                self.wire = plugged(&self.guest);
                dice.saw("put back");
            }
        }
        assert_eq!(self.guest.devices.save(), state);
        self.act(
            Reach::Window(self.guest.devices.disk_count()),
            None,
            Devices::prime,
        );
        self.guest.devices.resume();
        dice.saw("restored");
    }

    fn thaw(&mut self, state: &DevicesStateV1) {
        self.guest = self.guest.thaw(&[&self.disk, &self.disk], state.clone());
        self.wire = plugged(&self.guest);
        self.held = 0;
    }

    /// Pages that devices and the test have marked as written since the last call.
    fn take_marked(&self) -> Vec<u64> {
        let region = self.guest.memory.iter().next().unwrap();
        let bitmap: &AtomicBitmap = region.deref().bitmap();
        bitmap.get_and_reset()
    }

    /// The bytes that have come to the host.
    pub fn hear(&mut self) -> Vec<u8> {
        self.guest.host.set_nonblocking(true).unwrap();
        let (mut all, mut chunk) = (Vec::new(), [0; 16 * 1024]);
        while let Ok(count @ 1..) = self.guest.host.read(&mut chunk) {
            all.extend_from_slice(&chunk[..count]);
        }
        all
    }

    /// Makes a call and compares what it did with what it may do. `reset` is the device that it resets.
    pub fn act<T>(
        &mut self,
        reach: Reach,
        reset: Option<usize>,
        call: impl FnOnce(&Devices) -> T,
    ) -> T {
        let states: Vec<_> = self.windows().map(|window| self.state_of(window)).collect();
        let mut before = std::mem::take(&mut self.before);
        let memory = &self.guest.memory;
        memory.read_slice(&mut before, GuestAddress(0)).unwrap();
        self.take_marked();
        let served: Vec<usize> = match reach {
            Reach::Nobody => Vec::new(),
            Reach::Window(window) => vec![window],
            Reach::Everybody => self.windows().collect(),
        };
        let offers: Vec<_> = served
            .iter()
            .flat_map(|&window| offers(&before, window, &states[window]))
            .collect();
        let (result, grown) = measured(|| call(&self.guest.devices));
        self.held += grown.held;
        let most = i64::try_from(HEAP_BYTES_MAX).unwrap();
        assert!(self.held <= most, "devices hold {} bytes", self.held);
        assert!(grown.peak <= most, "a call needs {} bytes", grown.peak);

        let mut after = std::mem::take(&mut self.after);
        let memory = &self.guest.memory;
        memory.read_slice(&mut after, GuestAddress(0)).unwrap();
        let marked = self.take_marked();
        let is_tangled =
            (offers.iter()).any(|(_, one)| offers.iter().any(|(_, two)| one.is_tangled_with(two)));
        let page_bytes = PAGE_BYTES as usize;
        let pages = before
            .chunks(page_bytes)
            .zip(after.chunks(page_bytes))
            .enumerate();
        for (page, (old, new)) in pages.filter(|(_, (old, new))| old != new) {
            assert!(
                marked[page / 64] & 1 << (page % 64) != 0,
                "page {page} is not marked"
            );
            for at in (0..page_bytes).filter(|&at| !is_tangled && old[at] != new[at]) {
                let address = (page * page_bytes + at) as u64;
                let may = offers.iter().any(|(_, offer)| offer.may_write(address));
                assert!(may, "{address:#x} was changed: {offers:?}");
            }
        }
        for window in self.windows() {
            let state = self.state_of(window);
            check_registers(window, &states[window], &state, reset == Some(window));
            check_positions(window, &states[window], &state, &offers);
            if !is_tangled {
                check_used(&after, &states[window], &state, window, &offers);
            }
        }
        (self.before, self.after) = (before, after);
        result
    }
}

/// A queue by window and index, with what lies in it.
type Offered = ((usize, usize), Offer);

fn offers(memory: &[u8], window: usize, state: &SlotStateV1) -> Vec<Offered> {
    let queues = state.queues.iter().zip(&state.registers.queues).enumerate();
    queues
        .filter_map(|(index, (running, registers))| {
            let position = running.as_ref()?.position;
            Some(((window, index), Offer::read(memory, registers, position)))
        })
        .collect()
}

fn check_registers(window: usize, before: &SlotStateV1, after: &SlotStateV1, is_reset: bool) {
    let (old, new) = (&before.registers, &after.registers);
    let stage = new.status & !(NEEDS_RESET | FAILED);
    assert!(
        [0, 1, 3, 11, 15].contains(&stage),
        "window {window}: status {:#x}",
        new.status
    );
    let runs = new.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK;
    let running = after.queues.iter().flatten().count();
    assert!(
        runs || new.status & FAILED != 0 || running == 0,
        "window {window} runs: {after:?}"
    );
    if is_reset {
        assert_eq!(new.status, 0, "window {window} is not reset");
        return;
    }
    let broken = old.status & (NEEDS_RESET | FAILED);
    assert_eq!(new.status & broken, broken, "window {window} was mended");
    if broken != 0 {
        assert!(
            new.status | FAILED == old.status | FAILED,
            "window {window} went on"
        );
        assert_eq!(
            new.queues, old.queues,
            "window {window} was set up while broken"
        );
    }
    assert_eq!(
        new.status & stage_of(old.status),
        stage_of(old.status),
        "window {window} went back"
    );
    if old.status & DRIVER_OK != 0 {
        assert_eq!(
            new.queues, old.queues,
            "window {window} changed a running queue"
        );
        assert_eq!(new.driver_features, old.driver_features, "window {window}");
    }
    for (old, new) in old
        .queues
        .iter()
        .zip(&new.queues)
        .filter(|(old, _)| old.ready)
    {
        let mut same = new.clone();
        same.ready = true;
        assert_eq!(same, *old, "window {window} moved a ready queue");
    }
}

fn stage_of(status: u32) -> u32 {
    status & !(NEEDS_RESET | FAILED)
}

fn check_positions(window: usize, before: &SlotStateV1, after: &SlotStateV1, offers: &[Offered]) {
    for (index, pair) in before.queues.iter().zip(&after.queues).enumerate() {
        let (Some(before), Some(after)) = pair else {
            continue;
        };
        let used = after.position.wrapping_sub(before.position);
        let offer = offers.iter().find(|(place, _)| *place == (window, index));
        let most = offer.map_or(0, |(_, offer)| offer.chains.len());
        assert!(
            usize::from(used) <= most,
            "window {window} used {used} of {most} chains"
        );
    }
}

fn check_used(
    memory: &[u8],
    before: &SlotStateV1,
    after: &SlotStateV1,
    window: usize,
    offers: &[Offered],
) {
    for ((_, index), offer) in offers.iter().filter(|((place, _), _)| *place == window) {
        let (Some(old), Some(new)) = (&before.queues[*index], &after.queues[*index]) else {
            continue;
        };
        if old.position == new.position {
            continue;
        }
        let queue = &before.registers.queues[*index];
        let at = |address: u64| &memory[usize::try_from(address).unwrap()..];
        let told = u16::from_le_bytes(*at(queue.used + 2).first_chunk().unwrap());
        assert_eq!(
            told, new.position,
            "the used index is the device's position"
        );
        let count = new.position.wrapping_sub(old.position);
        // A ring that went round holds the newest alone.
        for nth in count.saturating_sub(queue.size)..count {
            let slot = u64::from(old.position.wrapping_add(nth) % queue.size);
            let element = u64::from_le_bytes(*at(queue.used + 4 + 8 * slot).first_chunk().unwrap());
            let (head, writable) = offer.chains[usize::from(nth)];
            assert_eq!(
                element & 0xffff_ffff,
                u64::from(head),
                "chains are used in their order"
            );
            assert!(
                element >> 32 <= writable,
                "more written than there was room"
            );
        }
    }
}
