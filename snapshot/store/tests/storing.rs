//! Snapshots through the store: kept once, given back as they were, and against a store that lies.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use thaw_snapshot::{
    Access, CpuRecord, Metadata, PAGE_BYTES, PageSource, SectionKind, Snapshot, Touch, VerifyError,
    WorkingSet, Writer,
};
use thaw_snapshot_store::{
    BlobError, BlobName, Blobs, CHUNK_BYTES, LocalFolder, ManifestId, OpenFolder, PutSummary,
    Store, StoreError, StubError, memory_of,
};

const PAGE: usize = 4096;
const CHUNK_PAGES: usize = CHUNK_BYTES / PAGE;

/// Memory whose pages are one byte, repeated after their number.
#[derive(Clone)]
struct Pages(Vec<u8>);

impl Pages {
    fn page(&self, page: usize) -> Vec<u8> {
        let byte = self.0[page];
        let mut bytes = vec![byte; PAGE];
        if byte != 0 {
            bytes[..8].copy_from_slice(&(page as u64).to_le_bytes());
        }
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        (0..self.0.len()).flat_map(|page| self.page(page)).collect()
    }
}

impl PageSource for Pages {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let first = usize::try_from(offset / PAGE_BYTES).unwrap();
        for (page, part) in (first..).zip(buffer.chunks_mut(PAGE)) {
            part.copy_from_slice(&self.page(page));
        }
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < (self.0.len() * PAGE) as u64).then_some(offset))
    }
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn store(&self) -> Store {
        Store::new(Arc::new(LocalFolder::new(&self.root())))
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("store")
    }

    fn snapshot(&self, name: &str, memory: &Pages, base: Option<&str>) -> Snapshot {
        let path = self.0.path().join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let mut writer = Writer::new(options.open(&path).unwrap());
        writer.metadata(&Metadata::default()).unwrap();
        writer.cpu(&CpuRecord::default()).unwrap();
        let base = base.map(|base| Snapshot::open(&self.0.path().join(base)).unwrap());
        match &base {
            Some(base) => {
                let written = writer.memory_difference(&mut memory.clone(), base, 16);
                written.unwrap();
            }
            None => {
                let length = memory.0.len() as u64 * PAGE_BYTES;
                writer
                    .sparse_section(SectionKind::Memory, length, &mut memory.clone())
                    .unwrap();
            }
        }
        writer.finish().unwrap();
        let mut snapshot = Snapshot::open(&path).unwrap();
        if let Some(base) = base {
            snapshot.attach_base(base).unwrap();
        }
        snapshot
    }
}

/// All files below `folder`, with their paths.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

fn read_all(store: &Store, id: ManifestId) -> Result<Vec<u8>, StoreError> {
    let memory = store.memory(id)?;
    let mut all = Vec::new();
    let mut buffer = vec![0xee; CHUNK_BYTES];
    for offset in (0..memory.bytes()).step_by(CHUNK_BYTES) {
        let length = CHUNK_BYTES.min(usize::try_from(memory.bytes() - offset).unwrap());
        match memory.read_chunk(offset, &mut buffer[..length])? {
            true => all.extend_from_slice(&buffer[..length]),
            false => all.extend(std::iter::repeat_n(0, length)),
        }
    }
    Ok(all)
}

fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// Four chunks: mixed, zero, full, and a short last one.
fn memory() -> Pages {
    let mut pages = vec![0; 3 * CHUNK_PAGES + 2];
    (pages[1], pages[5]) = (7, 8);
    pages[2 * CHUNK_PAGES..].fill(9);
    Pages(pages)
}

#[test]
fn equal_chunks_are_kept_once_across_snapshots() {
    let (scratch, memory) = (Scratch::new(), memory());
    let store = scratch.store();
    let first = store
        .put_memory(&scratch.snapshot("a", &memory, None))
        .unwrap();
    let PutSummary {
        chunks,
        zero_chunks,
        new_chunks,
        new_bytes,
        ..
    } = first;
    assert_eq!((chunks, zero_chunks, new_chunks), (4, 1, 3));
    assert!(new_bytes < 10_000, "compressed: {new_bytes}");
    let mut other = memory.clone();
    other.0[0] = 1;
    let second = store
        .put_memory(&scratch.snapshot("b", &other, None))
        .unwrap();
    assert_eq!((second.new_chunks, second.zero_chunks), (1, 1));
    // A difference has the same memory as a snapshot of its own, so it is the same manifest.
    let again = store
        .put_memory(&scratch.snapshot("c", &other, Some("a")))
        .unwrap();
    assert_eq!((again.id, again.new_chunks), (second.id, 0));
    assert_eq!(files(&scratch.root().join("chunks")).len(), 4);
    assert_eq!(read_all(&store, first.id).unwrap(), memory.bytes());
    assert_eq!(read_all(&store, second.id).unwrap(), other.bytes());
}

#[test]
fn damage_in_the_store_is_found_and_named() {
    let (scratch, memory) = (Scratch::new(), memory());
    let store = scratch.store();
    let id = store
        .put_memory(&scratch.snapshot("a", &memory, None))
        .unwrap()
        .id;
    let all = files(&scratch.root());
    assert_eq!(all.len(), 4);
    for path in &all {
        let good = fs::read(path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            fs::write(path, &bad).unwrap();
            match read_all(&store, id) {
                // A bit of the compressed form that means nothing; the content was verified.
                Ok(bytes) => assert!(bytes == memory.bytes()),
                Err(error) => {
                    let text = chain(&error);
                    assert!(text.contains("store") && !error.may_pass(), "{text}");
                }
            }
        }
        fs::write(path, &good[..good.len() / 2]).unwrap();
        assert!(read_all(&store, id).is_err());
        fs::write(path, []).unwrap();
        assert!(read_all(&store, id).is_err());
        fs::write(path, vec![1; 80 << 20]).unwrap();
        let error = read_all(&store, id).unwrap_err();
        assert!(
            matches!(error, StoreError::Blob(BlobError::TooLong { .. })),
            "{error}"
        );
        fs::remove_file(path).unwrap();
        let error = read_all(&store, id).unwrap_err();
        assert!(
            matches!(error, StoreError::Blob(BlobError::Missing(_))),
            "{error}"
        );
        assert!(chain(&error).contains("is not in the store"));
        fs::write(path, &good).unwrap();
    }
    assert_eq!(read_all(&store, id).unwrap(), memory.bytes());
    // What is damaged is stored again, and nothing else.
    let chunks = files(&scratch.root().join("chunks"));
    fs::write(&chunks[1], b"").unwrap();
    let healed = store
        .put_memory(&scratch.snapshot("a", &memory, None))
        .unwrap();
    assert_eq!((healed.id, healed.new_chunks), (id, 1));
    assert_eq!(read_all(&store, id).unwrap(), memory.bytes());
    // Another chunk under this one's name.
    fs::copy(&chunks[0], &chunks[1]).unwrap();
    assert!(matches!(
        read_all(&store, id),
        Err(StoreError::Chunk { .. })
    ));
}

#[test]
fn a_put_that_fails_leaves_no_manifest_and_is_made_good_later() {
    let (scratch, memory) = (Scratch::new(), memory());
    let snapshot = scratch.snapshot("a", &memory, None);
    // Where a folder of chunks should be, a file is.
    fs::create_dir_all(scratch.root()).unwrap();
    fs::write(scratch.root().join("chunks"), b"").unwrap();
    let error = scratch.store().put_memory(&snapshot).unwrap_err();
    assert!(chain(&error).contains("could not be"), "{}", chain(&error));
    assert!(files(&scratch.root().join("manifests")).is_empty());
    fs::remove_file(scratch.root().join("chunks")).unwrap();
    let id = scratch.store().put_memory(&snapshot).unwrap().id;
    assert_eq!(read_all(&scratch.store(), id).unwrap(), memory.bytes());
}

#[test]
fn what_is_no_chunk_is_refused() {
    let (scratch, memory) = (Scratch::new(), memory());
    let store = scratch.store();
    let id = store
        .put_memory(&scratch.snapshot("a", &memory, None))
        .unwrap()
        .id;
    let stored = store.memory(id).unwrap();
    let read = |offset, length| stored.read_chunk(offset, &mut vec![0; length]);
    let chunk = CHUNK_BYTES as u64;
    assert!(read(0, CHUNK_BYTES).unwrap());
    assert!(read(3 * chunk, 2 * PAGE).unwrap(), "the short one");
    for (offset, length) in [
        (1, CHUNK_BYTES),
        (0, PAGE),
        (3 * chunk, CHUNK_BYTES),
        (4 * chunk, 1),
        (u64::MAX, 1),
    ] {
        assert!(
            matches!(read(offset, length), Err(StoreError::Outside { .. })),
            "{offset}"
        );
    }
}

/// A store over a line that breaks.
struct Broken;

impl Blobs for Broken {
    fn get(&self, name: BlobName, _: u64) -> Result<Vec<u8>, BlobError> {
        Err(BlobError::Io {
            name,
            act: "read",
            source: io::ErrorKind::TimedOut.into(),
        })
    }

    fn put(&self, name: BlobName, _: &[u8]) -> Result<(), BlobError> {
        self.get(name, 0).map(drop)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_failing_line_is_told_from_damage() {
    let scratch = Scratch::new();
    let store = Store::new(Arc::new(Broken));
    let error = store.memory(ManifestId([3; 32])).unwrap_err();
    assert!(error.may_pass());
    assert!(
        chain(&error).contains("manifests/03/0303"),
        "{}",
        chain(&error)
    );
    assert!(
        store
            .put_memory(&scratch.snapshot("a", &memory(), None))
            .is_err()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn any_memory_comes_back_as_it_was(pages in prop::collection::vec(0u8..3, 1..80)) {
        let (scratch, memory) = (Scratch::new(), Pages(pages));
        let store = scratch.store();
        let put = store.put_memory(&scratch.snapshot("a", &memory, None)).unwrap();
        prop_assert!(read_all(&store, put.id).unwrap() == memory.bytes());
        let again = store.put_memory(&scratch.snapshot("b", &memory, None)).unwrap();
        prop_assert_eq!((again.id, again.new_chunks), (put.id, 0));
    }
}

#[test]
fn a_stub_has_all_of_a_snapshot_but_its_memory_which_it_names() {
    let scratch = Scratch::new();
    let length = 40;
    let memory = Pages((0u8..length).map(|page| page % 3).collect());
    let disk = Pages(vec![0, 0, 7, 0, 9]);
    let path = scratch.0.path().join("whole");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    let mut writer = Writer::new(options.open(&path).unwrap());
    let metadata = Metadata {
        function: "f".into(),
        ..Metadata::default()
    };
    writer.metadata(&metadata).unwrap();
    writer.cpu(&CpuRecord::default()).unwrap();
    writer.section(SectionKind::Machine, b"state").unwrap();
    let bytes = u64::from(length) * PAGE_BYTES;
    let sections = [
        (SectionKind::Memory, bytes, &memory),
        (SectionKind::Disk(2), 5 * PAGE_BYTES, &disk),
    ];
    for (kind, bytes, pages) in sections {
        (writer.sparse_section(kind, bytes, &mut pages.clone())).unwrap();
    }
    let touch = Touch {
        page: 4,
        access: Access::Write,
    };
    let set = WorkingSet::from_touches(&[touch], bytes);
    writer.working_set(&set).unwrap();
    writer.finish().unwrap();
    let whole = Snapshot::open(&path).unwrap();

    let stub_path = scratch.0.path().join("stub");
    let file = options.open(&stub_path).unwrap();
    let pushed = scratch.store().push(&whole, file).unwrap();
    let stub = Snapshot::open(&stub_path).unwrap();
    stub.verify_own().unwrap();
    assert_eq!(stub.metadata().unwrap(), metadata);
    assert_eq!(stub.section(SectionKind::Machine).unwrap(), b"state");
    assert_eq!(stub.working_set().unwrap(), Some(set));
    assert_eq!(stub.memory_bytes().unwrap(), bytes);
    let (ours, theirs) = (stub.disk(2).unwrap(), whole.disk(2).unwrap());
    assert_eq!((ours.length, &ours.runs), (theirs.length, &theirs.runs));
    assert!(pushed.stub.stored_bytes < whole.own_memory().unwrap().stored_bytes());

    // Its memory is found by what it names, through a descriptor of the folder, and in no other way.
    let id = memory_of(&stub).unwrap();
    assert_eq!(id, pushed.memory.id);
    let folder = fs::File::open(scratch.root()).unwrap();
    let store = Store::new(Arc::new(OpenFolder::new(folder.into())));
    assert_eq!(read_all(&store, id).unwrap(), memory.bytes());

    let other = scratch.snapshot("other", &Pages(vec![5; 40]), None);
    assert!(store.put_memory(&other).is_err(), "it is read only");
    assert!(matches!(
        stub.memory_layers(),
        Err(VerifyError::BaseMissing(_))
    ));
    assert!(matches!(memory_of(&whole), Err(StubError::NoStub)));
    let difference = scratch.snapshot("difference", &Pages(vec![6; 40]), Some("other"));
    assert!(matches!(memory_of(&difference), Err(StubError::NoStub)));
}
