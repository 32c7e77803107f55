//! Snapshots as files, without a VM.

use super::*;
use thaw_snapshot::{
    Access, CpuRecord, Metadata, PageSource, SectionKind, Touch, Writer, set_working_set, tag,
};

const MEMORY: u64 = 4 << 20;

/// Memory whose first page is not zero.
struct First(u8);

impl PageSource for First {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        buffer.fill(0);
        if offset == 0 {
            buffer[0] = self.0;
        }
        Ok(())
    }

    fn next_data(&mut self, offset: u64) -> std::io::Result<Option<u64>> {
        Ok((offset == 0).then_some(0))
    }
}

fn write(home: &Path, path: &Path, first: u8, base: Option<&Path>) -> Found {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut options = fs::File::options();
    options.read(true).write(true).create_new(true);
    let file = options.open(path).unwrap();
    let mut writer = Writer::new(file.try_clone().unwrap());
    writer.metadata(&Metadata::default()).unwrap();
    writer.cpu(&CpuRecord::default()).unwrap();
    match base {
        Some(base) => {
            let base = Snapshot::open(base).unwrap();
            writer
                .memory_difference(&mut First(first), &base, 8)
                .map(drop)
        }
        None => writer.sparse_section(SectionKind::Memory, MEMORY, &mut First(first)),
    }
    .unwrap();
    writer.finish().unwrap();
    tag(&file, &key(home).unwrap()).unwrap();
    Found {
        name: "f".into(),
        origin: "file",
        path: path.to_owned(),
    }
}

#[test]
fn inspect_tells_pages_mib_runs_and_share_of_the_working_set() {
    let home = tempfile::tempdir().unwrap();
    let found = write(home.path(), &home.path().join("s.thaw"), 1, None);
    let key = key(home.path()).unwrap();
    let before = describe(&found, &key).unwrap();
    assert_eq!(working_set_line(&before["workingSet"]), "not recorded");
    let touch = |page, access| Touch { page, access };
    let mut touches: Vec<_> = (100..355).map(|page| touch(page, Access::Read)).collect();
    touches.push(touch(0, Access::Write));
    let set = WorkingSet::from_touches(&touches, MEMORY);
    set_working_set(&found.path, &set, Some(&key)).unwrap();
    let after = describe(&found, &key).unwrap();
    assert_eq!(after["authentic"], true);
    let expected =
        json!({ "pages": 256, "mib": 1.0, "runs": 2, "writtenPages": 1, "percentOfMemory": 25.0 });
    assert_eq!(after["workingSet"], expected);
    assert_eq!(
        working_set_line(&after["workingSet"]),
        "256 pages (1 written), 1.0 MiB, 2 runs, 25.0 % of memory"
    );
    assert_eq!(after["contentDigest"], before["contentDigest"]);
}

#[test]
fn a_pushed_difference_leaves_a_stub_that_needs_no_base_of_this_home() {
    let home = tempfile::tempdir().unwrap();
    let base = home.path().join("bases/python/base.thaw");
    write(home.path(), &base, 1, None);
    let built = home.path().join("snapshots/mine").join(FILE);
    write(home.path(), &built, 2, Some(&base));
    let store = home.path().join("store");
    let push = |snapshot: &str| {
        let (snapshot, store) = (snapshot.to_owned(), store.clone());
        run::push(
            home.path(),
            &run::PushArgs { snapshot, store },
            Format::Json,
        )
    };
    push("mine").unwrap();
    let stub = Snapshot::open(&store.join("stubs/mine.thaw")).unwrap();
    stub.verify_own().unwrap();
    let chunks = thaw_snapshot_store::LocalFolder::new(&store);
    let chunks = thaw_snapshot_store::Store::new(std::sync::Arc::new(chunks));
    let memory = chunks.memory(thaw_snapshot_store::memory_of(&stub).unwrap());
    let mut chunk = vec![0; thaw_snapshot_store::CHUNK_BYTES];
    assert!(memory.unwrap().read_chunk(0, &mut chunk).unwrap());
    assert_eq!(chunk[0], 2);

    fs::remove_file(&base).unwrap();
    let error = push("mine").unwrap_err();
    assert!(
        error.to_string().contains("deploy its function"),
        "{error:#}"
    );
    write(home.path(), &base, 3, None);
    assert!(push("mine").is_err(), "another base");
    assert!(push("nobody").is_err());
}

#[test]
fn a_difference_is_verified_with_the_base_that_home_has() {
    let home = tempfile::tempdir().unwrap();
    let base = home.path().join("bases/python/base.thaw");
    write(home.path(), &base, 1, None);
    let found = write(home.path(), &home.path().join("s.thaw"), 2, Some(&base));
    verify(home.path(), &found, Format::Json).unwrap();
    let about = describe(&found, &key(home.path()).unwrap()).unwrap();
    assert!(about["baseDigest"].is_string());
    fs::remove_file(&base).unwrap();
    let error = verify(home.path(), &found, Format::Json).unwrap_err();
    assert!(
        error.to_string().contains("deploy its function again"),
        "{error:#}"
    );
    write(home.path(), &base, 3, None);
    assert!(verify(home.path(), &found, Format::Json).is_err());
}

#[test]
fn what_a_file_says_of_itself_cannot_steer_a_terminal() {
    assert_eq!(
        shown("py\u{1b}[2Jthön\n\u{9b}"),
        "py\\u{1b}[2Jthön\\n\\u{9b}"
    );
}

#[test]
fn a_snapshot_of_another_home_is_refused_until_it_is_trusted() {
    let (home, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (home, other) = (home.path(), other.path());
    let base = other.join("bases/python/base.thaw");
    write(other, &base, 1, None);
    let found = write(other, &home.join("s.thaw"), 2, Some(&base));
    let ours = home.join("bases/python/base.thaw");
    fs::create_dir_all(ours.parent().unwrap()).unwrap();
    fs::copy(&base, &ours).unwrap();

    let refused = |found: &Found| {
        let error = format!("{:#}", verify(home, found, Format::Json).unwrap_err());
        let name = found.path.display().to_string();
        assert!(
            error.starts_with(&name) && error.contains("another machine"),
            "{error}"
        );
        let store = home.join("store");
        let snapshot = name.clone();
        let args = run::PushArgs { snapshot, store };
        assert!(run::push(home, &args, Format::Json).is_err());
        error
    };
    assert!(refused(&found).contains(&format!("thaw snapshot trust {}", found.path.display())));
    assert_eq!(
        describe(&found, &key(home).unwrap()).unwrap()["authentic"],
        false
    );
    // Nobody vouches for a base by vouching for what is above it.
    let error = trust::trust(home, &found, Format::Json).unwrap_err();
    assert!(
        format!("{error:#}").contains(&format!("trust {}", ours.display())),
        "{error:#}"
    );
    let below = find(home, ours.to_str().unwrap()).unwrap();
    trust::trust(home, &below, Format::Json).unwrap();
    refused(&found);
    trust::trust(home, &found, Format::Json).unwrap();
    verify(home, &found, Format::Json).unwrap();
    assert_eq!(
        describe(&found, &key(home).unwrap()).unwrap()["authentic"],
        true
    );
}

#[test]
fn damage_is_not_trusted() {
    use std::os::unix::fs::FileExt as _;
    let home = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let found = write(other.path(), &home.path().join("s.thaw"), 1, None);
    let length = fs::metadata(&found.path).unwrap().len();
    let file = fs::File::options().write(true).open(&found.path).unwrap();
    file.write_all_at(b"x", length / 2).unwrap();
    let before = fs::read(&found.path).unwrap();
    let error = trust::trust(home.path(), &found, Format::Json).unwrap_err();
    assert!(format!("{error:#}").contains("damaged"), "{error:#}");
    assert!(fs::read(&found.path).unwrap() == before);
}

#[test]
fn a_stub_of_another_home_can_be_trusted() {
    let (home, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let found = write(other.path(), &other.path().join("s.thaw"), 1, None);
    let store = home.path().join("store");
    let snapshot = found.path.display().to_string();
    let args = run::PushArgs {
        snapshot,
        store: store.clone(),
    };
    run::push(other.path(), &args, Format::Json).unwrap();
    let stub = store.join("stubs/s.thaw");
    let is_ours = || {
        let key = key(home.path()).unwrap();
        Snapshot::open(&stub).unwrap().authenticate(&key).is_ok()
    };
    assert!(!is_ours());
    let found = find(home.path(), stub.to_str().unwrap()).unwrap();
    trust::trust(home.path(), &found, Format::Json).unwrap();
    assert!(is_ours());
}
