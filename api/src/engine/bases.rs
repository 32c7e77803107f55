//! Where the snapshots of runtimes alone are kept, over which functions' snapshots are differences, and when one goes.
//!
//! Each has a folder of its own, named by all that the snapshot is made of: an upgrade makes a new one beside the old. Who makes or
//! uses a base has its folder locked until a snapshot that differs from it is there; what is neither locked nor differed from goes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use thaw_runtime::{BaseRequest, FreezeRequest, Point};
use thaw_snapshot::{Snapshot, commit};

const BASES_FOLDER: &str = "bases";
const CODE_FILE: &str = "no-code.erofs";
const BASE_FILE: &str = "base.thaw";

/// Folders whose folders hold snapshots: `functions/NAME/REVISION/FILE`, `snapshots/NAME/FILE`.
const SNAPSHOTS: [(&str, usize); 2] = [("functions", 2), ("snapshots", 1)];
/// Ending of a snapshot file's name.
const ENDING: &str = "thaw";

/// The base of `request` below `home`.
pub fn request(home: &Path, request: &FreezeRequest) -> BaseRequest {
    let FreezeRequest {
        kernel,
        initramfs,
        overlay,
        vcpu_count,
        memory_mib,
        configure,
        metadata,
        ..
    } = request;
    let mut digest = Sha256::new();
    for part in [
        kernel.as_os_str().as_encoded_bytes(),
        initramfs.as_os_str().as_encoded_bytes(),
        overlay.as_os_str().as_encoded_bytes(),
        metadata.kernel_version.as_bytes(),
        metadata.image_digest.as_bytes(),
        metadata.thaw_version.as_bytes(),
    ] {
        digest.update(part);
        digest.update([0]);
    }
    let digest: String = digest.finalize()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let network = if configure.network { "-net" } else { "" };
    let name = format!(
        "{}-{memory_mib}M-{vcpu_count}{network}-{digest}",
        metadata.runtime
    );
    let folder = home.join(BASES_FOLDER).join(name);
    BaseRequest {
        file: folder.join(BASE_FILE),
        code: folder.join(CODE_FILE),
    }
}

/// A base that stays as long as this is held.
#[derive(Debug)]
pub struct Held {
    _folder: File,
}

/// Keeps a base, which may still have to be made; waits while it is being removed.
///
/// # Errors
/// Its folder cannot be made or locked.
pub fn hold(base: &BaseRequest) -> io::Result<Held> {
    let folder = base.file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    loop {
        fs::create_dir_all(folder)?;
        let opened = match File::open(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        opened.lock_shared()?;
        // Who removed it may have come before this lock, and another has made it anew.
        let named = fs::metadata(folder).ok();
        if named.is_some_and(|named| {
            opened
                .metadata()
                .is_ok_and(|ours| ours.ino() == named.ino())
        }) {
            return Ok(Held { _folder: opened });
        }
    }
}

/// Removes each base that no snapshot below `home` is a difference from and that nobody holds, and what a crash left of others.
///
/// # Errors
/// A folder that cannot be read or removed.
pub fn remove_unused(home: &Path) -> io::Result<()> {
    let (mut free, mut held) = (Vec::new(), Vec::new());
    for folder in list(&home.join(BASES_FOLDER))? {
        let lock = File::open(&folder)?;
        match lock.try_lock() {
            Ok(()) => free.push((folder, lock)),
            Err(_) => held.push(folder),
        }
    }
    // Looked at under the locks: nobody makes a snapshot meanwhile that differs from one of these.
    let used = used(home)?;
    for (folder, _lock) in free {
        let base = Snapshot::open(&folder.join(BASE_FILE));
        if base.is_ok_and(|base| used.contains(&base.content_digest())) {
            held.push(folder);
        } else {
            Point::BaseUnused.reached();
            fs::remove_dir_all(&folder)?;
            Point::BaseRemoved.reached();
        }
    }
    for folder in held {
        commit::remove_stale(&folder)?;
    }
    Ok(())
}

/// What snapshots below `home` are differences from.
fn used(home: &Path) -> io::Result<BTreeSet<thaw_snapshot::Digest>> {
    let snapshots = SNAPSHOTS.map(|(folder, depth)| folders_below(&home.join(folder), depth));
    let mut used = BTreeSet::new();
    for folder in snapshots.into_iter().flatten() {
        let files = list(&folder)?.into_iter();
        let files = files.filter(|path| path.extension().is_some_and(|ending| ending == ENDING));
        // One that cannot be opened serves nobody.
        let opened = files.filter_map(|path| Snapshot::open(&path).ok());
        used.extend(opened.filter_map(|snapshot| Some(snapshot.base().ok()??.digest)));
    }
    Ok(used)
}

/// The folders `depth` levels below `folder`.
fn folders_below(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    for _ in 0..depth {
        let below = folders
            .iter()
            .flat_map(|folder| list(folder).unwrap_or_default());
        folders = below.filter(|path| path.is_dir()).collect();
    }
    folders
}

fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

#[cfg(test)]
mod tests {
    use thaw_snapshot::{CpuRecord, Metadata, PageSource, SectionKind, Writer};

    use super::*;

    const MEMORY: u64 = 1 << 20;

    /// Memory whose first byte is this and all others are zero.
    struct First(u8);

    impl PageSource for First {
        fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            buffer.fill(0);
            if let (0, Some(first)) = (offset, buffer.first_mut()) {
                *first = self.0;
            }
            Ok(())
        }

        fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
            Ok((offset == 0).then_some(0))
        }
    }

    #[test]
    fn a_base_that_is_removed_while_it_is_wanted_is_made_anew() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join(BASES_FOLDER).join("b").join(BASE_FILE);
        let code = file.with_file_name(CODE_FILE);
        let base = BaseRequest { file, code };
        drop(hold(&base).unwrap());
        let folder = base.file.parent().unwrap().to_owned();
        let removing = File::open(&folder).unwrap();
        removing.lock().unwrap();
        let waiting = std::thread::spawn(move || hold(&base).unwrap());
        fs::remove_dir(&folder).unwrap();
        drop(removing);
        let _held = waiting.join().unwrap();
        assert!(File::open(&folder).unwrap().try_lock().is_err());
    }

    fn write(path: &Path, first: u8, base: Option<&Path>) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut writer = Writer::new(File::create_new(path).unwrap());
        writer.metadata(&Metadata::default()).unwrap();
        writer.cpu(&CpuRecord::default()).unwrap();
        match base.map(|base| Snapshot::open(base).unwrap()) {
            Some(base) => (writer.memory_difference(&mut First(first), &base, 8)).map(drop),
            None => writer.sparse_section(SectionKind::Memory, MEMORY, &mut First(first)),
        }
        .unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn a_base_goes_when_nothing_differs_from_it_and_nobody_holds_it() {
        let home = tempfile::tempdir().unwrap();
        let base = |name: &str| home.path().join(BASES_FOLDER).join(name).join(BASE_FILE);
        for (first, name) in (1..).zip(["deployed", "built", "unused", "new"]) {
            write(&base(name), first, None);
        }
        let [deployed, built] = ["functions/f/1/snapshot.thaw", "snapshots/s/snapshot.thaw"]
            .map(|path| home.path().join(path));
        write(&deployed, 9, Some(&base("deployed")));
        write(&built, 9, Some(&base("built")));
        let cut_off = base("deployed").with_file_name(".base.thaw.thaw-tmp-1-1");
        fs::write(&cut_off, "").unwrap();
        let in_work = commit::PendingFile::create(&base("new")).unwrap();
        let new = BaseRequest {
            file: base("new"),
            code: base("new").with_file_name(CODE_FILE),
        };
        let held = [hold(&new).unwrap(), hold(&new).unwrap()];
        let left = || {
            let folders = list(&home.path().join(BASES_FOLDER)).unwrap();
            let mut names: Vec<_> = (folders
                .iter()
                .map(|path| path.file_name().unwrap().to_owned()))
            .collect();
            names.sort();
            names
        };
        remove_unused(home.path()).unwrap();
        assert_eq!(left(), ["built", "deployed", "new"]);
        assert!(!cut_off.exists());
        in_work.commit().unwrap();
        fs::remove_file(&built).unwrap();
        remove_unused(home.path()).unwrap();
        assert_eq!(left(), ["deployed", "new"]);
        drop(held);
        remove_unused(home.path()).unwrap();
        assert_eq!(left(), ["deployed"]);
        assert!(remove_unused(&home.path().join("absent")).is_ok());
    }
}
