//! Guest memory: one private mapping of the host, told to KVM in as many slots as there are ranges around the device hole.
//!
//! Which pages were written is known from two sides: KVM logs what the guest (and KVM itself) writes, for memory that is
//! [`GuestMemory::tracked`]; a bitmap of [`GuestMemoryMmap`] marks what devices write, which KVM does not see.
//!
//! Invariant: the mapping of a [`GuestMemory`] is never unmapped, so every pointer into it (KVM's slots, the devices'
//! [`GuestMemoryMmap`]) stays valid as long as the process. A monitor holds one VM and ends with it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use thaw_snapshot::MemoryLayer;
use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend as _, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion, VolatileSlice,
};

use crate::arch::x86_64::layout::{MEMORY_MIB_MAX, MEMORY_MIB_MIN, MemoryRange, memory_ranges};
use crate::fault::{Blame, Fault};

/// Bytes of a page, as KVM's log and the bitmaps count them.
pub const PAGE_BYTES: u64 = 4096;
/// Pages for which one word of a log or a bitmap stands.
const WORD_PAGES: u64 = 64;
/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`: reading the log clears nothing and write-protects nothing
/// (Documentation/virt/kvm/api.rst, 7.18).
const MANUAL_PROTECT: u64 = 1;
const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Guest memory as loaders and devices see it. It marks the pages that they write.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<AtomicBitmap>;
/// A piece of it in this process's memory.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// Why guest memory could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size is not one we make.
    #[error(
        "guest memory of {bytes} bytes is not within {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} mib in whole mib"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The host's address space.
    #[error("guest memory of {bytes} bytes could not be reserved")]
    Reserve {
        /// What was asked for.
        bytes: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The file cannot be memory.
    #[error("memory section at offset {offset} could not be mapped")]
    MapFile {
        /// Where in the file.
        offset: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The file is shorter than the memory it should hold: a later access would kill the process.
    #[error(
        "memory section at offset {offset} of {bytes} bytes lies outside a file of {file_bytes} bytes or is not page aligned"
    )]
    Section {
        /// Where in the file.
        offset: u64,
        /// How long.
        bytes: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// Pages stay where they are.
    #[error("pages of guest memory could not be given back")]
    GiveBack(#[source] io::Error),
    /// The mapping was refused as guest memory.
    #[error("mapping is no guest memory")]
    Region(#[source] MmapRegionError),
    /// The ranges do not go together.
    #[error("guest memory ranges do not go together")]
    Ranges(#[source] GuestRegionCollectionError),
    /// A range's end is past the address space.
    #[error("guest memory range at {0:#x} is past the address space")]
    Range(u64),
    /// KVM cannot log writes as it is needed.
    #[error("writes to guest memory cannot be logged")]
    Track(#[source] kvm_ioctls::Error),
    /// KVM did not tell what was written.
    #[error("log of writes to memory slot {slot} could not be read")]
    Log {
        /// Its number.
        slot: u32,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused a slot.
    #[error("memory slot {slot} was refused by kvm")]
    Slot {
        /// Its number.
        slot: u32,
        /// Cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

impl Blame for MemoryError {
    fn fault(&self) -> Fault {
        match self {
            Self::Size { .. } | Self::Section { .. } => Fault::Caller,
            _ => Fault::Host,
        }
    }
}

/// The guest's memory: `bytes` bytes at `host`, readable and writable, never unmapped (see the module's invariant).
#[derive(Debug)]
pub struct GuestMemory {
    host: *mut u8,
    bytes: u64,
    regions: GuestMemoryMmap,
    is_tracked: bool,
}

// SAFETY: `host` is an address that is valid for the life of the process from any thread; what may race there is the
// guest's business and is only ever accessed through volatile copies or system calls.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// Reserves `bytes` of zeros. Pages cost nothing until they are touched (`MAP_NORESERVE`).
    ///
    /// # Errors
    /// A size out of [`MEMORY_MIB_MIN`] to [`MEMORY_MIB_MAX`], or no address space.
    pub fn reserve(bytes: u64) -> Result<Self, MemoryError> {
        let mib = bytes >> 20;
        let whole = bytes.is_multiple_of(1 << 20)
            && (u64::from(MEMORY_MIB_MIN)..=u64::from(MEMORY_MIB_MAX)).contains(&mib);
        let length = usize::try_from(bytes)
            .ok()
            .filter(|_| whole)
            .ok_or(MemoryError::Size { bytes })?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel picks; nothing existing is touched.
        let host = unsafe { libc::mmap(ptr::null_mut(), length, PROTECTION, flags, -1, 0) };
        if host == libc::MAP_FAILED {
            return Err(MemoryError::Reserve {
                bytes,
                source: io::Error::last_os_error(),
            });
        }
        let host = host.cast::<u8>();
        let mut regions = Vec::new();
        let mut offset = 0;
        for range in memory_ranges(bytes) {
            let length = usize::try_from(range.length).map_err(|_| MemoryError::Size { bytes })?;
            // SAFETY: `offset + length` is within the mapping made above, because the ranges sum up to `bytes`; it stays
            // mapped for ever by the module's invariant.
            let region =
                unsafe { MmapRegion::build_raw(host.add(offset), length, PROTECTION, flags) };
            let region = region.map_err(MemoryError::Region)?;
            regions.push(
                GuestRegionMmap::new(region, range.start)
                    .ok_or(MemoryError::Range(range.start.raw_value()))?,
            );
            offset += length;
        }
        let regions = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Ranges)?;
        Ok(Self {
            host,
            bytes,
            regions,
            is_tracked: false,
        })
    }

    /// The same memory, whose writes KVM logs from [`GuestMemory::register`] on. That costs a guest nothing but huge pages: a
    /// page is logged when KVM makes it writable, at a fault that is taken anyway, and is never write-protected again.
    pub fn tracked(self) -> Self {
        Self {
            is_tracked: true,
            ..self
        }
    }

    /// Maps `bytes` of `file` at `offset` privately over the reserved range: the guest reads the file's pages and keeps its
    /// writes to itself.
    ///
    /// # Errors
    /// The section is not all of this memory, not page aligned, or not inside the file; or `mmap`'s own.
    pub fn map_private(&self, file: &File, offset: u64) -> Result<(), MemoryError> {
        self.map_layer(&MemoryLayer {
            file,
            file_offset: offset,
            memory_offset: 0,
            bytes: self.bytes,
        })
    }

    /// The same for a part of this memory.
    ///
    /// # Errors
    /// The part is not within this memory, not page aligned, or not inside the file; or `mmap`'s own.
    pub fn map_layer(&self, layer: &MemoryLayer<'_>) -> Result<(), MemoryError> {
        let &MemoryLayer {
            file,
            file_offset: offset,
            memory_offset,
            bytes,
        } = layer;
        let map = |source| MemoryError::MapFile { offset, source };
        let file_bytes = file.metadata().map_err(map)?.len();
        let within = |start: u64, length: u64| {
            let end = start.checked_add(bytes);
            end.is_some_and(|end| end <= length) && start.is_multiple_of(PAGE_BYTES)
        };
        let wrong = MemoryError::Section {
            offset,
            bytes,
            file_bytes,
        };
        let fits = within(offset, file_bytes)
            && within(memory_offset, self.bytes)
            && bytes.is_multiple_of(PAGE_BYTES);
        let (true, Ok(start), Ok(length), Ok(position)) = (
            fits,
            usize::try_from(memory_offset),
            usize::try_from(bytes),
            libc::off_t::try_from(offset),
        ) else {
            return Err(wrong);
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: replaces a part of the range that `reserve` made and this value owns: `start + length` is at most its length,
        // checked above. No reference into it exists: all access is by volatile copies, and no vCPU runs before the machine is
        // restored.
        let mapped = unsafe {
            libc::mmap(
                self.host.add(start).cast(),
                length,
                PROTECTION,
                flags,
                file.as_raw_fd(),
                position,
            )
        };
        if mapped == libc::MAP_FAILED {
            Err(map(io::Error::last_os_error()))
        } else {
            Ok(())
        }
    }

    /// Replaces all of it by zeros that were never touched: what was mapped or written here is gone. Nobody may access it meanwhile.
    ///
    /// # Errors
    /// `mmap`'s own.
    pub fn empty(&self) -> Result<(), MemoryError> {
        let bytes = self.bytes;
        let length = usize::try_from(bytes).map_err(|_| MemoryError::Size { bytes })?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: replaces the whole range that `reserve` made and this value owns, which stays mapped, as in `map_layer`.
        let mapped = unsafe { libc::mmap(self.host.cast(), length, PROTECTION, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            let source = io::Error::last_os_error();
            return Err(MemoryError::Reserve { bytes, source });
        }
        Ok(())
    }

    /// Gives `pages` of memory that is served as it is touched ([`crate::paging`]) back to the host: they come anew when they are
    /// touched again. Nobody may access them meanwhile.
    ///
    /// # Errors
    /// `madvise`'s own.
    pub fn give_back(&self, pages: Range<u64>) -> Result<(), MemoryError> {
        let (offset, bytes) = self.place(&pages);
        // SAFETY: a part of a mapping that is never unmapped (checked by `place`); the caller keeps everybody else away.
        let result =
            unsafe { libc::madvise(self.host.add(offset).cast(), bytes, libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(MemoryError::GiveBack(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Tells KVM of the memory. Before interrupt chips and vCPUs exist this is several times cheaper than after.
    ///
    /// # Errors
    /// KVM refused a slot.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        let mut flags = 0;
        if self.is_tracked {
            let mut capability = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            capability.args[0] = MANUAL_PROTECT;
            vm.enable_cap(&capability).map_err(MemoryError::Track)?;
            flags = KVM_MEM_LOG_DIRTY_PAGES;
        }
        self.set_slots(vm, flags, |range| range.length)
    }

    /// Makes KVM forget what it derived from guest memory, its shadows of the guest's page tables above all, by taking the slots
    /// away and giving them back. The log of written pages begins anew. No vCPU may run.
    ///
    /// # Errors
    /// KVM refused a slot.
    pub fn forget_shadows(&self, vm: &VmFd) -> Result<(), MemoryError> {
        self.set_slots(vm, 0, |_| 0)?;
        self.register(vm)
    }

    fn set_slots(
        &self,
        vm: &VmFd,
        flags: u32,
        length: impl Fn(&MemoryRange) -> u64,
    ) -> Result<(), MemoryError> {
        let mut host = self.host as u64;
        for (slot, range) in (0u32..).zip(memory_ranges(self.bytes)) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: range.start.raw_value(),
                memory_size: length(&range),
                userspace_addr: host,
            };
            // SAFETY: the range is mapped for the life of the process (the module's invariant), and slots do not overlap.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(|source| MemoryError::Slot { slot, source })?;
            host += range.length;
        }
        Ok(())
    }

    /// The pages that were written: by the guest or KVM ever since [`GuestMemory::register`], by devices since the last call.
    /// KVM's part is never cleared: what was written once stays writable, so that it costs no fault to write it again.
    ///
    /// # Errors
    /// The memory is not [`GuestMemory::tracked`], or KVM's own.
    pub fn take_written(&self, vm: &VmFd) -> Result<PageSet, MemoryError> {
        let mut words = Vec::new();
        let slots = (0u32..).zip(memory_ranges(self.bytes));
        for ((slot, range), region) in slots.zip(self.regions.iter()) {
            let bytes = usize::try_from(range.length).map_err(|_| MemoryError::Size {
                bytes: range.length,
            })?;
            let logged = vm
                .get_dirty_log(slot, bytes)
                .map_err(|source| MemoryError::Log { slot, source })?;
            let by_devices = region.bitmap().get_and_reset();
            assert_eq!(logged.len(), by_devices.len(), "both cover the range");
            words.extend((logged.iter().zip(by_devices)).map(|(one, other)| one | other));
        }
        Ok(PageSet { words })
    }

    /// Makes `pages` of this memory those of `original`, which is as long and not written by anybody. Nobody else may access
    /// them meanwhile.
    pub fn copy_from(&self, original: &Self, pages: Range<u64>) {
        let (offset, bytes) = self.place(&pages);
        assert_eq!(original.bytes, self.bytes, "memory of the same machine");
        // SAFETY: both ranges lie within mappings that are never unmapped (checked by `place`, and the assertion above);
        // they are different mappings, so they do not overlap; the caller keeps everybody else away from them.
        unsafe {
            ptr::copy_nonoverlapping(original.host.add(offset), self.host.add(offset), bytes);
        }
    }

    /// Makes `pages` zero. Nobody else may access them meanwhile.
    pub fn zero(&self, pages: Range<u64>) {
        let (offset, bytes) = self.place(&pages);
        // SAFETY: as in `copy_from`.
        unsafe { ptr::write_bytes(self.host.add(offset), 0, bytes) };
    }

    /// Offset and length in bytes of pages that are within this memory.
    fn place(&self, pages: &Range<u64>) -> (usize, usize) {
        assert!(
            pages.start <= pages.end && pages.end <= self.bytes / PAGE_BYTES,
            "pages {pages:?} are within guest memory"
        );
        let bytes = |pages: u64| {
            usize::try_from(pages * PAGE_BYTES).expect("guest memory fits this process")
        };
        (bytes(pages.start), bytes(pages.end - pages.start))
    }

    /// Length, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A view for loaders and devices.
    pub fn view(&self) -> GuestMemoryMmap {
        self.regions.clone()
    }

    /// The same as a pointer.
    pub(crate) fn host_pointer(&self) -> *mut u8 {
        self.host
    }

    /// Where the mapping starts in this process.
    pub fn host_address(&self) -> u64 {
        self.host as u64
    }

    /// Guest-physical address of a byte of the concatenated ranges, and how many bytes its range has from there.
    pub fn address_of(&self, offset: u64) -> Option<(GuestAddress, u64)> {
        let mut inside = offset;
        for range in memory_ranges(self.bytes) {
            if inside < range.length {
                return Some((range.start.checked_add(inside)?, range.length - inside));
            }
            inside -= range.length;
        }
        None
    }
}

/// Pages of guest memory, counted over the concatenated ranges: bit n of word m is page 64 m + n.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// How many.
    pub fn count(&self) -> u64 {
        let ones = self.words.iter().map(|word| word.count_ones());
        ones.map(u64::from).sum()
    }

    /// Neighbouring pages together, ascending; two runs touch at most where a word ends.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        (0u64..)
            .zip(&self.words)
            .filter(|(_, word)| **word != 0)
            .flat_map(|(at, word)| {
                let mut rest = *word;
                std::iter::from_fn(move || {
                    if rest == 0 {
                        return None;
                    }
                    let start = rest.trailing_zeros();
                    let length = (!(rest >> start)).trailing_zeros();
                    let end = start + length;
                    // A run that ends the word leaves nothing; shifting by 64 would overflow.
                    rest = u64::MAX.checked_shl(end).map_or(0, |above| rest & above);
                    let first = at * WORD_PAGES;
                    Some(first + u64::from(start)..first + u64::from(end))
                })
            })
    }
}

impl FromIterator<u64> for PageSet {
    fn from_iter<T: IntoIterator<Item = u64>>(pages: T) -> Self {
        let mut words = Vec::new();
        for page in pages {
            let word = usize::try_from(page / WORD_PAGES).expect("pages of a guest's memory");
            if word >= words.len() {
                words.resize(word + 1, 0);
            }
            words[word] |= 1 << (page % WORD_PAGES);
        }
        Self { words }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn a_size_out_of_bounds_is_refused() {
        for bytes in [0, 63 << 20, (64 << 20) + 1, 10_241 << 20, u64::MAX] {
            assert!(
                matches!(GuestMemory::reserve(bytes), Err(MemoryError::Size { .. })),
                "{bytes}"
            );
        }
    }

    #[test]
    fn memory_above_the_hole_is_reachable() {
        let memory = GuestMemory::reserve(4 << 30).unwrap();
        memory
            .view()
            .write_obj(7u8, GuestAddress((1 << 32) + 5))
            .unwrap();
        assert!(
            memory
                .view()
                .write_obj(7u8, GuestAddress(0xd000_0000))
                .is_err()
        );
        assert_eq!(
            memory.address_of(3 << 30),
            Some((GuestAddress(1 << 32), 1 << 30))
        );
        assert_eq!(memory.address_of(4 << 30), None);
    }

    #[test]
    fn a_mapped_file_is_read_but_never_written() {
        let memory = GuestMemory::reserve(64 << 20).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        file.set_len(4096 + (64 << 20)).unwrap();
        memory.map_private(&file, 4096).unwrap();
        let view = memory.view();
        assert_eq!(view.read_obj::<u8>(GuestAddress(4095)).unwrap(), 1);
        assert_eq!(view.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
        view.write_obj(9u8, GuestAddress(0)).unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 4096).unwrap();
        assert_eq!(byte, [1]);
    }

    #[test]
    fn a_later_layer_lies_over_an_earlier() {
        let memory = GuestMemory::reserve(64 << 20).unwrap();
        let (mut base, mut above) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        base.write_all(&[1; 3 * 4096]).unwrap();
        base.set_len(64 << 20).unwrap();
        above.write_all(&[2; 2 * 4096]).unwrap();
        memory.map_private(&base, 0).unwrap();
        let layer = MemoryLayer {
            file: &above,
            file_offset: 4096,
            memory_offset: 4096,
            bytes: 4096,
        };
        memory.map_layer(&layer).unwrap();
        let first = |page: u64| {
            memory
                .view()
                .read_obj::<u8>(GuestAddress(page * 4096))
                .unwrap()
        };
        assert_eq!([0, 1, 2, 3].map(first), [1, 2, 1, 0]);
        for (file_offset, memory_offset, bytes) in [
            (8192, 0, 4096),
            (0, 64 << 20, 4096),
            (0, 1, 4096),
            (0, 0, 1),
            (0, u64::MAX, 4096),
        ] {
            let outside = MemoryLayer {
                file: &above,
                file_offset,
                memory_offset,
                bytes,
            };
            assert!(memory.map_layer(&outside).is_err(), "{outside:?}");
        }
    }

    #[test]
    fn a_section_outside_the_file_or_unaligned_is_refused() {
        let memory = GuestMemory::reserve(64 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        for offset in [1, 4096, u64::MAX] {
            assert!(matches!(
                memory.map_private(&file, offset),
                Err(MemoryError::Section { .. })
            ));
        }
    }

    #[test]
    fn runs_are_the_pages_of_the_set() {
        for pages in [
            vec![],
            vec![0],
            vec![63],
            vec![63, 64],
            vec![0, 1, 2, 5, 62, 63, 64, 65, 127, 128, 255],
            (0..256).collect(),
            (0..256).step_by(2).collect(),
        ] {
            let set: PageSet = pages.iter().copied().collect();
            assert_eq!(set.count(), pages.len() as u64);
            assert_eq!(set.runs().flatten().collect::<Vec<_>>(), pages);
        }
        assert_eq!(
            PageSet::from_iter([1, 2, 3, 9]).runs().collect::<Vec<_>>(),
            [1..4, 9..10]
        );
    }

    #[test]
    fn pages_are_copied_back_and_zeroed_and_their_neighbours_stay() {
        let (memory, original) = (
            GuestMemory::reserve(64 << 20).unwrap(),
            GuestMemory::reserve(64 << 20).unwrap(),
        );
        let (view, old) = (memory.view(), original.view());
        for page in 0..8u64 {
            old.write_slice(&[1; 4096], GuestAddress(page * 4096))
                .unwrap();
            view.write_slice(&[2; 4096], GuestAddress(page * 4096))
                .unwrap();
        }
        memory.copy_from(&original, 1..3);
        memory.zero(4..5);
        let first = |page: u64| view.read_obj::<u64>(GuestAddress(page * 4096)).unwrap() & 0xff;
        let last = |page: u64| {
            view.read_obj::<u8>(GuestAddress(page * 4096 + 4095))
                .unwrap()
        };
        let found: Vec<_> = (0..6).map(|page| (first(page), last(page))).collect();
        assert_eq!(found, [(2, 2), (1, 1), (1, 1), (2, 2), (0, 0), (2, 2)]);
    }

    #[test]
    fn pages_written_by_devices_are_marked() {
        let memory = GuestMemory::reserve(64 << 20).unwrap();
        let view = memory.view();
        view.write_obj(1u8, GuestAddress(5 * 4096)).unwrap();
        view.write_slice(&[1; 4096], GuestAddress(9 * 4096 + 1))
            .unwrap();
        view.read_obj::<u64>(GuestAddress(20 * 4096)).unwrap();
        let region = memory.regions.iter().next().unwrap();
        let words = region.bitmap().get_and_reset();
        assert_eq!(words[0], 1 << 5 | 1 << 9 | 1 << 10);
        assert_eq!(words.iter().sum::<u64>(), words[0]);
    }
}
