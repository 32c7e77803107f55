//! Working sets and differences: written, read back, amended, and against damage.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use thaw_snapshot::{
    Access, AmendError, BaseError, CpuRecord, DIFFERENCE_RUNS_MAX, Key, Metadata, PAGE_BYTES,
    PageRun, PageSource, SectionKind, Snapshot, Summary, TouchedRun, VerifyError, WorkingSet,
    WriteError, Writer, set_working_set, tag,
};

const PAGE: usize = 4096;

/// Memory in which a page is one byte, repeated.
#[derive(Clone, Debug, PartialEq)]
struct Pages(Vec<u8>);

impl Pages {
    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|byte| [*byte; PAGE]).collect()
    }

    fn length(&self) -> u64 {
        self.0.len() as u64 * PAGE_BYTES
    }
}

impl PageSource for Pages {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let first = usize::try_from(offset / PAGE_BYTES).unwrap();
        for (page, byte) in buffer.chunks_mut(PAGE).zip(&self.0[first..]) {
            page.fill(*byte);
        }
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        let first = usize::try_from(offset / PAGE_BYTES).unwrap();
        let found = self.0.iter().skip(first).position(|byte| *byte != 0);
        Ok(found.map(|index| offset + (index * PAGE) as u64))
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn created(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.open(path).unwrap()
}

fn begun(path: &Path) -> Writer {
    let mut writer = Writer::new(created(path));
    writer.metadata(&Metadata::default()).unwrap();
    writer.cpu(&CpuRecord::default()).unwrap();
    writer.section(SectionKind::Machine, b"state").unwrap();
    writer
}

fn write(path: &Path, memory: &Pages) -> Summary {
    let mut writer = begun(path);
    writer
        .sparse_section(SectionKind::Memory, memory.length(), &mut memory.clone())
        .unwrap();
    writer.finish().unwrap()
}

fn write_difference(path: &Path, memory: &Pages, base: &Path, runs_max: usize) -> (u64, Summary) {
    let mut writer = begun(path);
    let base = Snapshot::open(base).unwrap();
    let changed = writer
        .memory_difference(&mut memory.clone(), &base, runs_max)
        .unwrap();
    (changed, writer.finish().unwrap())
}

fn opened(path: &Path, base: &Path) -> Snapshot {
    let mut snapshot = Snapshot::open(path).unwrap();
    snapshot.attach_base(Snapshot::open(base).unwrap()).unwrap();
    snapshot
}

/// Guest memory as mapping the layers in their order gives it.
fn mapped(snapshot: &Snapshot) -> Vec<u8> {
    let mut memory = vec![0xee; usize::try_from(snapshot.memory_bytes().unwrap()).unwrap()];
    for layer in snapshot.memory_layers().unwrap() {
        assert!(layer.file_offset.is_multiple_of(PAGE_BYTES));
        let start = usize::try_from(layer.memory_offset).unwrap();
        let length = usize::try_from(layer.bytes).unwrap();
        let part = &mut memory[start..start + length];
        layer.file.read_exact_at(part, layer.file_offset).unwrap();
    }
    memory
}

fn touched(runs: &[(u64, u64, Access)], memory: &Pages) -> WorkingSet {
    let run = |(start, count, access): &(u64, u64, Access)| TouchedRun {
        pages: PageRun {
            start: *start,
            count: *count,
        },
        access: *access,
    };
    WorkingSet::new(runs.iter().map(run).collect(), memory.length()).unwrap()
}

fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[test]
fn a_working_set_is_added_later_and_replaced_without_changing_what_is_restored() {
    let folder = Folder::new();
    let (path, memory) = (folder.path("s.thaw"), Pages(vec![1, 0, 2, 2, 0, 3, 0, 0]));
    write(&path, &memory);
    let before = Snapshot::open(&path).unwrap();
    assert_eq!(before.working_set().unwrap(), None);
    let long = touched(
        &[
            (5, 1, Access::Write),
            (0, 1, Access::Read),
            (6, 2, Access::Write),
        ],
        &memory,
    );
    let short = touched(&[(2, 2, Access::Read)], &memory);
    for working_set in [&long, &short, &WorkingSet::default(), &long] {
        let summary = set_working_set(&path, working_set, None).unwrap();
        let after = Snapshot::open(&path).unwrap();
        after.verify().unwrap();
        assert_eq!(after.working_set().unwrap().as_ref(), Some(working_set));
        assert_eq!(after.digest(), summary.digest);
        assert_ne!(after.digest(), before.digest());
        assert_eq!(after.content_digest(), before.content_digest());
        assert_eq!(mapped(&after), memory.bytes());
        assert_eq!(after.file_bytes(), fs::metadata(&path).unwrap().len());
    }
    // Whoever had it open still has the whole old file, and nothing else was left in the folder.
    before.verify().unwrap();
    assert_eq!(before.working_set().unwrap(), None);
    assert_eq!(fs::read_dir(folder.0.path()).unwrap().count(), 1);
}

#[test]
fn an_amended_snapshot_keeps_its_holes() {
    let folder = Folder::new();
    let path = folder.path("s.thaw");
    let mut pages = vec![0; 16 << 10];
    (pages[0], pages[9000]) = (1, 2);
    let memory = Pages(pages);
    write(&path, &memory);
    set_working_set(&path, &touched(&[(9000, 1, Access::Read)], &memory), None).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20);
    Snapshot::open(&path).unwrap().verify().unwrap();
}

#[test]
fn a_working_set_of_another_memory_is_refused_and_the_file_stays() {
    let folder = Folder::new();
    let path = folder.path("s.thaw");
    write(&path, &Pages(vec![1, 2]));
    let good = fs::read(&path).unwrap();
    let foreign = touched(&[(2, 1, Access::Read)], &Pages(vec![0; 3]));
    let error = chain(&set_working_set(&path, &foreign, None).unwrap_err());
    assert!(error.contains("outside of 2 pages"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), good);
    assert_eq!(fs::read_dir(folder.0.path()).unwrap().count(), 1);
}

#[test]
fn a_working_set_in_the_file_is_checked_against_its_memory() {
    let folder = Folder::new();
    let path = folder.path("s.thaw");
    let mut writer = begun(&path);
    let early = writer.working_set(&WorkingSet::default()).unwrap_err();
    assert!(early.to_string().contains("no memory before it"), "{early}");
    let memory = Pages(vec![1, 2]);
    writer
        .sparse_section(SectionKind::Memory, memory.length(), &mut memory.clone())
        .unwrap();
    // Page 7 of a memory of two pages, under a right digest.
    let run = [
        &7u64.to_le_bytes()[..],
        &1u32.to_le_bytes(),
        &0u32.to_le_bytes(),
    ]
    .concat();
    writer.section(SectionKind::WorkingSet, &run).unwrap();
    writer.finish().unwrap();
    let error = Snapshot::open(&path).unwrap().working_set().unwrap_err();
    assert!(error.to_string().contains("working set run 0"), "{error}");
}

#[test]
fn amending_keeps_an_authentic_snapshot_authentic_and_vouches_for_no_other() {
    let folder = Folder::new();
    let (base, path) = (folder.path("base.thaw"), folder.path("s.thaw"));
    let (below, memory) = (Pages(vec![1, 0, 2]), Pages(vec![1, 3, 0]));
    write(&base, &below);
    write_difference(&path, &memory, &base, 8);
    let (key, other) = (Key::new(&[1; 32]), Key::new(&[2; 32]));
    let set = touched(&[(1, 1, Access::Write)], &memory);
    let before = fs::read(&path).unwrap();
    let error = set_working_set(&path, &set, Some(&key)).unwrap_err();
    assert!(matches!(error, AmendError::Untrusted(_)), "{error:?}");
    assert!(fs::read(&path).unwrap() == before, "it was touched");

    let writable = |path| fs::OpenOptions::new().read(true).write(true).open(path);
    tag(&writable(&path).unwrap(), &key).unwrap();
    set_working_set(&path, &set, Some(&key)).unwrap();
    let mut snapshot = Snapshot::open(&path).unwrap();
    snapshot.authenticate(&key).unwrap();
    assert_eq!(snapshot.working_set().unwrap(), Some(set.clone()));
    assert!(set_working_set(&path, &set, Some(&other)).is_err());
    // A base that nobody vouched for is no better below it.
    snapshot
        .attach_base(Snapshot::open(&base).unwrap())
        .unwrap();
    let error = snapshot.authenticate(&key).unwrap_err();
    assert!(error.to_string().contains("base.thaw"), "{error}");
    tag(&writable(&base).unwrap(), &key).unwrap();
    opened(&path, &base).authenticate(&key).unwrap();
    opened(&path, &base).verify().unwrap();

    set_working_set(&path, &set, None).unwrap();
    assert!(Snapshot::open(&path).unwrap().authenticate(&key).is_err());
}

#[test]
fn a_difference_stores_what_differs_and_no_page_more() {
    let folder = Folder::new();
    let (base, path) = (folder.path("base.thaw"), folder.path("s.thaw"));
    write(&base, &Pages(vec![1, 0, 2, 2, 0, 3, 0, 4]));
    // Changed, written over a hole, made zero; the rest equals the base.
    let memory = Pages(vec![9, 0, 2, 0, 5, 3, 0, 4]);
    let (changed, summary) = write_difference(&path, &memory, &base, 8);
    assert_eq!(changed, 3);
    let snapshot = opened(&path, &base);
    snapshot.verify().unwrap();
    let run = |start, count| PageRun { start, count };
    assert_eq!(snapshot.own_memory().unwrap().runs, [run(0, 1), run(3, 2)]);
    assert_eq!(
        snapshot.memory_runs().unwrap(),
        [run(0, 1), run(2, 4), run(7, 1)]
    );
    assert_eq!(mapped(&snapshot), memory.bytes());
    let mut read = vec![0; memory.bytes().len()];
    snapshot
        .memory_reader()
        .unwrap()
        .read_at(0, &mut read)
        .unwrap();
    assert_eq!(read, memory.bytes());
    let whole = write(&folder.path("whole.thaw"), &memory);
    assert!(summary.stored_bytes < whole.stored_bytes + PAGE_BYTES);
}

#[test]
fn an_equal_memory_is_a_difference_of_no_pages() {
    let folder = Folder::new();
    let (base, path) = (folder.path("base.thaw"), folder.path("s.thaw"));
    let memory = Pages(
        (0..2000u32)
            .map(|page| u8::try_from(page % 7).unwrap())
            .collect(),
    );
    write(&base, &memory);
    assert_eq!(write_difference(&path, &memory, &base, 1).0, 0);
    let snapshot = opened(&path, &base);
    assert_eq!(snapshot.memory_layers().unwrap().len(), 1);
    assert_eq!(mapped(&snapshot), memory.bytes());
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 64 << 10);
}

#[test]
fn a_base_stays_the_base_when_it_is_given_a_working_set() {
    let folder = Folder::new();
    let (base, path) = (folder.path("base.thaw"), folder.path("s.thaw"));
    let (below, memory) = (Pages(vec![1, 2, 3]), Pages(vec![1, 9, 3]));
    write(&base, &below);
    write_difference(&path, &memory, &base, 8);
    set_working_set(&base, &touched(&[(0, 1, Access::Read)], &below), None).unwrap();
    set_working_set(&path, &touched(&[(1, 1, Access::Write)], &memory), None).unwrap();
    let snapshot = opened(&path, &base);
    snapshot.verify().unwrap();
    assert_eq!(mapped(&snapshot), memory.bytes());
}

#[test]
fn a_base_that_is_not_the_one_named_is_refused() {
    let folder = Folder::new();
    let (base, other, path) = (folder.path("b"), folder.path("o"), folder.path("s"));
    let below = Pages(vec![1, 2, 3]);
    write(&base, &below);
    write(&other, &Pages(vec![1, 2, 4]));
    write_difference(&path, &Pages(vec![1, 9, 3]), &base, 8);
    let mut snapshot = Snapshot::open(&path).unwrap();
    let named = Snapshot::open(&base).unwrap().content_digest();
    assert_eq!(snapshot.base().unwrap().unwrap().digest, named);
    let attach =
        |snapshot: &mut Snapshot, path: &Path| snapshot.attach_base(Snapshot::open(path).unwrap());
    let error = attach(&mut snapshot, &other).unwrap_err();
    assert!(matches!(error, BaseError::Digest { expected, .. } if expected == named));
    assert!(matches!(
        attach(&mut Snapshot::open(&other).unwrap(), &base),
        Err(BaseError::NotADifference)
    ));
    // Nothing reads a difference as if its holes were zeros.
    for error in [
        snapshot.verify().unwrap_err(),
        snapshot.memory_layers().unwrap_err(),
        snapshot.memory_reader().unwrap_err(),
        snapshot.memory_runs().unwrap_err(),
    ] {
        assert!(
            matches!(error, VerifyError::BaseMissing(base) if base.digest == named),
            "{error}"
        );
    }
    assert!(matches!(snapshot.memory(), Err(VerifyError::Layered)));
    snapshot.verify_own().unwrap();
    // One difference on another is neither written nor read.
    let mut writer = begun(&folder.path("chain"));
    let error = writer.memory_difference(&mut below.clone(), &snapshot, 8);
    assert!(matches!(error, Err(WriteError::Base(_))));
}

#[test]
fn damage_to_the_base_is_found_through_the_difference() {
    let folder = Folder::new();
    let (base, path) = (folder.path("b"), folder.path("s"));
    write(&base, &Pages(vec![1, 2, 3]));
    write_difference(&path, &Pages(vec![1, 9, 3]), &base, 8);
    let offset = Snapshot::open(&base).unwrap().memory().unwrap().offset;
    let file = OpenOptions::new().write(true).open(&base).unwrap();
    file.write_all_at(b"x", offset + 2 * PAGE_BYTES + 7)
        .unwrap();
    let error = opened(&path, &base).verify().unwrap_err();
    assert!(
        matches!(&error, VerifyError::Base(inner) if matches!(**inner, VerifyError::Digest(SectionKind::Memory))),
        "{error}"
    );
}

#[test]
fn a_difference_of_more_runs_than_may_be_mapped_is_refused() {
    let folder = Folder::new();
    let (base, path) = (folder.path("b"), folder.path("s"));
    let pages = 2 * DIFFERENCE_RUNS_MAX + 2;
    write(&base, &Pages(vec![0; pages]));
    let striped = Pages((0..pages).map(|page| u8::from(page % 2 == 0)).collect());
    let mut writer = begun(&path);
    let mut refuse = |runs_max| {
        let base = Snapshot::open(&base).unwrap();
        writer.memory_difference(&mut striped.clone(), &base, runs_max)
    };
    assert!(matches!(refuse(0), Err(WriteError::Unfit(..))));
    assert!(matches!(
        refuse(DIFFERENCE_RUNS_MAX + 1),
        Err(WriteError::Unfit(..))
    ));
    let (changed, _) = write_difference(&path, &striped, &base, 3);
    assert_eq!(changed, pages as u64 / 2);
    let snapshot = opened(&path, &base);
    assert_eq!(snapshot.memory_layers().unwrap().len(), 4);
    assert_eq!(mapped(&snapshot), striped.bytes());
    // Written by somebody else: a base section before an ordinary sparse section of too many runs.
    let reference = snapshot.section(SectionKind::Base).unwrap();
    let mut writer = begun(&path);
    writer.section(SectionKind::Base, &reference).unwrap();
    writer
        .sparse_section(SectionKind::Memory, striped.length(), &mut striped.clone())
        .unwrap();
    writer.finish().unwrap();
    let error = opened(&path, &base).memory_layers().unwrap_err();
    assert!(error.to_string().contains("runs"), "{error}");
}

fn key() -> Key {
    Key::new(&[7; Key::SECRET_BYTES])
}

/// A difference with a working set, both it and its base tagged, whose bytes are fixed for ever.
fn write_golden(folder: &Folder) -> PathBuf {
    let (base, path) = (folder.path("base.thaw"), folder.path("s.thaw"));
    write(&base, &Pages(vec![1, 0, 2]));
    let memory = Pages(vec![1, 3, 0]);
    let mut writer = begun(&path);
    writer
        .memory_difference(&mut memory.clone(), &Snapshot::open(&base).unwrap(), 8)
        .unwrap();
    let runs = [(1, 1, Access::Write), (0, 1, Access::Read)];
    writer.working_set(&touched(&runs, &memory)).unwrap();
    writer.finish().unwrap();
    for file in [&base, &path] {
        let mut options = OpenOptions::new();
        tag(&options.read(true).write(true).open(file).unwrap(), &key()).unwrap();
    }
    path
}

#[test]
fn the_golden_difference_still_opens_and_is_still_written() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2-difference.thaw");
    let folder = Folder::new();
    let path = write_golden(&folder);
    let snapshot = opened(&golden, &folder.path("base.thaw"));
    snapshot.authenticate(&key()).unwrap();
    snapshot.verify().unwrap();
    assert_eq!(snapshot.working_set().unwrap().unwrap().pages(), 2);
    assert!(
        fs::read(&golden).unwrap() == fs::read(&path).unwrap(),
        "the same input is written to other bytes: a new format version is due"
    );
}

#[test]
fn a_flip_in_every_byte_of_a_difference_is_found() {
    let folder = Folder::new();
    let path = write_golden(&folder);
    let base = folder.path("base.thaw");
    let good = fs::read(&path).unwrap();
    let usable = || {
        let Ok(mut snapshot) = Snapshot::open(&path) else {
            return false;
        };
        let base = Snapshot::open(&base).unwrap();
        snapshot.attach_base(base).is_ok()
            && snapshot.authenticate(&key()).is_ok()
            && snapshot.verify().is_ok()
    };
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for (position, byte) in good.iter().enumerate() {
        file.write_all_at(&[byte ^ 0x11], position as u64).unwrap();
        assert!(!usable(), "flip at {position} was not found");
        file.write_all_at(&[*byte], position as u64).unwrap();
    }
    assert!(usable());
    for length in (0..good.len()).rev().step_by(7) {
        file.set_len(length as u64).unwrap();
        assert!(
            !usable(),
            "a file of {length} of {} bytes was used",
            good.len()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_memory_over_any_base_is_what_its_layers_make(
        pages in prop::collection::vec((0u8..3, 0u8..3), 1..400), runs_max in 1usize..40, at in 0usize..500, length in 0usize..9000
    ) {
        let folder = Folder::new();
        let (base, path) = (folder.path("b"), folder.path("s"));
        let (below, memory): (Vec<u8>, Vec<u8>) = pages.into_iter().unzip();
        let differing = below.iter().zip(&memory).filter(|(one, other)| one != other).count() as u64;
        write(&base, &Pages(below));
        let memory = Pages(memory);
        let (changed, _) = write_difference(&path, &memory, &base, runs_max);
        prop_assert_eq!(changed, differing);
        let snapshot = opened(&path, &base);
        snapshot.verify().unwrap();
        prop_assert!(mapped(&snapshot) == memory.bytes());
        prop_assert!(snapshot.memory_layers().unwrap().len() <= 1 + runs_max);
        let own = snapshot.own_memory().unwrap();
        if own.runs.len() < runs_max {
            prop_assert_eq!(own.stored_bytes(), changed * PAGE_BYTES);
        }
        let reader = snapshot.memory_reader().unwrap();
        let mut part = vec![0xcc; length];
        let start = at * 1000;
        match memory.bytes().get(start..start + length) {
            Some(expected) => {
                reader.read_at(start as u64, &mut part).unwrap();
                prop_assert!(part == expected);
            }
            None => prop_assert!(reader.read_at(start as u64, &mut part).is_err()),
        }
    }
}
