//! A snapshot through the store and the pager: as it was, and when the store is damaged.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::fs::{self, OpenOptions};
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, mpsc};

use rustix::mm::{MapFlags, ProtFlags};
use thaw_snapshot::{CpuRecord, Metadata, PAGE_BYTES, PageSource, SectionKind, Snapshot, Writer};
use thaw_snapshot_pager::{Failure, Mode, Pager, PagerConfig, SnapshotSource, Source, Userfault};
use thaw_snapshot_store::{LocalFolder, Store};

const PAGE: usize = 4096;
const PAGES: usize = 200;

/// Every fifth page is not zero.
struct Pages(u8);

impl PageSource for Pages {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let first = usize::try_from(offset / PAGE_BYTES).unwrap();
        for (page, part) in (first..).zip(buffer.chunks_mut(PAGE)) {
            part.fill(byte_of(page, self.0));
        }
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < (PAGES * PAGE) as u64).then_some(offset))
    }
}

fn byte_of(page: usize, more: u8) -> u8 {
    match page % 5 {
        0 => u8::try_from(page).unwrap() | 1,
        1 => more,
        _ => 0,
    }
}

/// A snapshot and a difference to it, whose memory is `Pages(3)`.
fn difference(folder: &std::path::Path) -> Snapshot {
    let write = |name: &str, more, base: Option<&Snapshot>| {
        let path = folder.join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let mut writer = Writer::new(file.unwrap());
        writer.metadata(&Metadata::default()).unwrap();
        writer.cpu(&CpuRecord::default()).unwrap();
        let length = (PAGES * PAGE) as u64;
        match base {
            Some(base) => writer
                .memory_difference(&mut Pages(more), base, 8)
                .map(drop),
            None => writer.sparse_section(SectionKind::Memory, length, &mut Pages(more)),
        }
        .unwrap();
        writer.finish().unwrap();
        Snapshot::open(&path).unwrap()
    };
    let base = write("base", 0, None);
    let mut snapshot = write("function", 3, Some(&base));
    snapshot.attach_base(base).unwrap();
    snapshot
}

/// Serves memory of `PAGES` pages; returns where it is.
fn serve(source: Arc<dyn Source>) -> (Pager, NonNull<u8>, mpsc::Receiver<Failure>) {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let length = PAGES * PAGE;
    // SAFETY: a new mapping at an address that the kernel chooses; it is never unmapped.
    let memory = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, protection, MapFlags::PRIVATE)
    };
    let memory = NonNull::new(memory.unwrap().cast()).unwrap();
    let (tell, told) = mpsc::channel();
    let userfault = Userfault::open().unwrap_or_else(|error| panic!("{error}"));
    let mode = Mode::Serve { first: Vec::new() };
    let config = PagerConfig::default();
    // SAFETY: mapped above, never unmapped, and not read by the tests after the pager is gone.
    let pager = unsafe {
        Pager::start(
            userfault,
            memory,
            length as u64,
            source,
            mode,
            config,
            move |failure| {
                let _ = tell.send(failure);
            },
        )
    };
    (pager.unwrap(), memory, told)
}

fn read(memory: NonNull<u8>, page: usize) -> u8 {
    assert!(page < PAGES);
    // SAFETY: within the mapping.
    unsafe { memory.as_ptr().add(page * PAGE + 9).read_volatile() }
}

#[test]
fn a_difference_is_served_from_its_files_and_from_the_store_alike() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = difference(folder.path());
    let store = Store::new(Arc::new(LocalFolder::new(&folder.path().join("store"))));
    let id = store.put_memory(&snapshot).unwrap().id;
    let sources: [Arc<dyn Source>; 2] = [
        Arc::new(SnapshotSource::new(&snapshot).unwrap()),
        Arc::new(store.memory(id).unwrap()),
    ];
    for source in sources {
        let (_pager, memory, told) = serve(source);
        assert!(
            (0..PAGES)
                .rev()
                .all(|page| read(memory, page) == byte_of(page, 3))
        );
        assert!(told.try_recv().is_err());
    }
}

#[test]
fn a_damaged_chunk_is_told_with_its_place_and_is_not_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = difference(folder.path());
    let root = folder.path().join("store");
    let store = Store::new(Arc::new(LocalFolder::new(&root)));
    let memory = store
        .memory(store.put_memory(&snapshot).unwrap().id)
        .unwrap();
    for entry in fs::read_dir(root.join("chunks")).unwrap() {
        for chunk in fs::read_dir(entry.unwrap().path()).unwrap() {
            fs::write(chunk.unwrap().path(), b"\0not what was stored").unwrap();
        }
    }
    let (pager, start, told) = serve(Arc::new(memory));
    let address = start.as_ptr().expose_provenance() + 40 * PAGE;
    // Waits for ever, as nobody ends this process for it: the test ends without it.
    std::thread::spawn(move || {
        // SAFETY: within the mapping, which the pager keeps until the process ends.
        unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
    });
    let failure = told.recv().unwrap();
    std::mem::forget(pager);
    assert!(
        matches!(failure, Failure::Source { offset, attempts: 1, .. } if offset == 2 * (64 << 10)),
        "{failure}"
    );
}
