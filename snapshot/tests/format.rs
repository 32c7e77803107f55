//! The format against damage: every byte, every length, and a golden file.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::fs;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use thaw_snapshot::{
    AuthenticityError, CpuRecord, Key, Leaf, Metadata, PAGE_BYTES, PageRun, PageSource,
    SectionKind, Snapshot, Summary, Writer, tag,
};

fn key() -> Key {
    Key::new(&[7; Key::SECRET_BYTES])
}

struct Bytes(Vec<u8>);

impl PageSource for Bytes {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.0.len() as u64).then_some(offset))
    }
}

fn page(byte: u8) -> Vec<u8> {
    vec![byte; 4096]
}

fn memory() -> Vec<u8> {
    [
        page(0),
        page(1),
        page(2),
        page(0),
        page(0),
        page(3),
        page(0),
    ]
    .concat()
}

fn cpu() -> CpuRecord {
    let leaf = Leaf {
        function: 7,
        index: 0,
        flags: 1,
        eax: 0,
        ebx: 32,
        ecx: 0,
        edx: 0,
    };
    CpuRecord {
        vendor: "AuthenticAMD".into(),
        tsc_khz: 2_000_000,
        leaves: vec![leaf],
    }
}

fn metadata() -> Metadata {
    Metadata {
        function: "hello".into(),
        memory_mib: 128,
        vcpu_count: 1,
        ..Metadata::default()
    }
}

fn write_with(path: &Path, memory: Vec<u8>, disk: Vec<u8>) -> Summary {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap();
    let mut writer = Writer::new(file);
    writer.metadata(&metadata()).unwrap();
    writer.cpu(&cpu()).unwrap();
    writer
        .section(SectionKind::Machine, b"machine state")
        .unwrap();
    writer
        .sparse_section(SectionKind::Memory, memory.len() as u64, &mut Bytes(memory))
        .unwrap();
    writer
        .sparse_section(SectionKind::Disk(2), disk.len() as u64, &mut Bytes(disk))
        .unwrap();
    let summary = writer.finish().unwrap();
    tag(&open_to_write(path), &key()).unwrap();
    summary
}

fn open_to_write(path: &Path) -> fs::File {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

fn write(path: &Path) -> Summary {
    write_with(path, memory(), [page(9), page(0)].concat())
}

fn usable(path: &Path) -> Result<(), String> {
    let snapshot = Snapshot::open(path).map_err(|error| error.to_string())?;
    snapshot
        .authenticate(&key())
        .map_err(|error| error.to_string())?;
    snapshot.verify().map_err(|error| error.to_string())
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.thaw");
    (folder, path)
}

#[test]
fn what_was_written_is_read_back() {
    let (_folder, path) = scratch();
    let summary = write(&path);
    let snapshot = Snapshot::open(&path).unwrap();
    snapshot.verify().unwrap();
    assert_eq!(snapshot.digest(), summary.digest);
    assert_eq!(snapshot.file_bytes(), fs::metadata(&path).unwrap().len());
    assert_eq!(snapshot.metadata().unwrap(), metadata());
    assert_eq!(snapshot.cpu().unwrap(), cpu());
    assert_eq!(
        snapshot.section(SectionKind::Machine).unwrap(),
        b"machine state"
    );
    let section = snapshot.memory().unwrap();
    assert_eq!(
        section.runs,
        [
            PageRun { start: 1, count: 2 },
            PageRun { start: 5, count: 1 }
        ]
    );
    assert_eq!(
        (section.offset % PAGE_BYTES, section.stored_bytes()),
        (0, 3 * PAGE_BYTES)
    );
    let mut bytes = vec![0; memory().len()];
    snapshot
        .file()
        .read_exact_at(&mut bytes, section.offset)
        .unwrap();
    assert_eq!(bytes, memory());
    assert_eq!(
        snapshot.disk(2).unwrap().runs,
        [PageRun { start: 0, count: 1 }]
    );
    assert!(snapshot.disk(1).is_err());
}

#[test]
fn zero_pages_take_no_room() {
    use std::os::unix::fs::MetadataExt as _;
    let (_folder, path) = scratch();
    let mut bytes = vec![0; 64 << 20];
    bytes[40 << 20] = 1;
    let summary = write_with(&path, bytes, page(0));
    assert!(summary.stored_bytes < 100_000, "{summary:?}");
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20);
    usable(&path).unwrap();
}

#[test]
fn a_flip_in_every_byte_position_is_found() {
    let (_folder, path) = scratch();
    write(&path);
    let good = fs::read(&path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for (position, byte) in good.iter().enumerate() {
        for pattern in [0x01, 0x80] {
            file.write_all_at(&[byte ^ pattern], position as u64)
                .unwrap();
            assert!(
                usable(&path).is_err(),
                "flip {pattern:#x} at {position} was not found"
            );
        }
        file.write_all_at(&[*byte], position as u64).unwrap();
    }
    usable(&path).unwrap();
}

#[test]
fn every_truncation_is_found() {
    let (_folder, path) = scratch();
    write(&path);
    let good = fs::read(&path).unwrap();
    for length in (0..good.len()).rev() {
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length as u64)
            .unwrap();
        assert!(
            Snapshot::open(&path).is_err(),
            "a file of {length} of {} bytes was opened",
            good.len()
        );
    }
}

#[test]
fn appended_bytes_are_refused() {
    let (_folder, path) = scratch();
    write(&path);
    let mut bytes = fs::read(&path).unwrap();
    bytes.push(0);
    fs::write(&path, bytes).unwrap();
    let error = anyhow_chain(&Snapshot::open(&path).unwrap_err());
    assert!(error.contains("appended"), "{error}");
}

#[test]
fn another_version_and_another_file_each_say_so() {
    let (_folder, path) = scratch();
    write(&path);
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 1;
    fs::write(&path, &bytes).unwrap();
    let error = anyhow_chain(&Snapshot::open(&path).unwrap_err());
    assert!(
        error.contains("format version 1") && error.contains("deploy"),
        "{error}"
    );
    bytes[0] = b'X';
    fs::write(&path, &bytes).unwrap();
    let error = anyhow_chain(&Snapshot::open(&path).unwrap_err());
    assert!(error.contains("THAWSNAP"), "{error}");
}

#[test]
fn a_snapshot_without_a_tag_or_with_one_of_another_key_is_refused_and_told_what_helps() {
    let (_folder, path) = scratch();
    write(&path);
    let snapshot = Snapshot::open(&path).unwrap();
    snapshot.authenticate(&key()).unwrap();
    let name = path.display().to_string();
    let other = Key::new(&[8; Key::SECRET_BYTES]);
    let error = snapshot.authenticate(&other).unwrap_err();
    assert_eq!(error, AuthenticityError::Foreign { name: name.clone() });
    let remedy = format!("thaw snapshot trust {name}");
    assert!(error.to_string().contains(&remedy), "{error}");
    // A tag is part of nothing else: with another one it is the same snapshot.
    let digest = snapshot.digest();
    tag(&open_to_write(&path), &other).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    snapshot.authenticate(&other).unwrap();
    snapshot.verify().unwrap();
    assert_eq!(snapshot.digest(), digest);
    open_to_write(&path).write_all_at(&[0; 32], 4064).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    snapshot.verify().unwrap();
    let error = snapshot.authenticate(&key()).unwrap_err();
    assert_eq!(error, AuthenticityError::Untagged { name });
    assert!(error.to_string().contains(&remedy), "{error}");
    assert_eq!(format!("{:?}", key()), "Key(..)");
}

#[test]
fn a_full_disk_is_an_error_that_names_the_section() {
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let error = Writer::new(full)
        .section(SectionKind::Machine, b"x")
        .unwrap_err();
    assert!(error.to_string().contains("machine"), "{error}");
}

#[test]
fn the_golden_file_still_opens_and_is_still_written() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2.thaw");
    usable(&golden).unwrap();
    let (_folder, path) = scratch();
    write(&path);
    let (expected, written) = (fs::read(&golden).unwrap(), fs::read(&path).unwrap());
    assert!(
        expected == written,
        "the same input is written to other bytes: a new format version is due"
    );
}

fn anyhow_chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_mix_of_zero_and_other_pages_survives(pages in prop::collection::vec(0u8..3, 1..600)) {
        let (_folder, path) = scratch();
        let bytes: Vec<u8> = pages.iter().flat_map(|byte| page(*byte)).collect();
        write_with(&path, bytes.clone(), page(0));
        usable(&path).unwrap();
        let snapshot = Snapshot::open(&path).unwrap();
        let section = snapshot.memory().unwrap();
        let stored: u64 = pages.iter().map(|byte| u64::from(*byte != 0)).sum();
        prop_assert_eq!(section.stored_bytes(), stored * PAGE_BYTES);
        let mut read = vec![0; bytes.len()];
        snapshot.file().read_exact_at(&mut read, section.offset).unwrap();
        prop_assert!(read == bytes);
    }

    #[test]
    fn random_mutations_are_found_and_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..20)) {
        let (_folder, path) = scratch();
        write(&path);
        let good = fs::read(&path).unwrap();
        let mut bytes = good.clone();
        for (index, change) in changes {
            let at = index.index(bytes.len());
            bytes[at] ^= change;
        }
        fs::write(&path, &bytes).unwrap();
        prop_assert_eq!(usable(&path).is_ok(), bytes == good);
    }
}
