//! A folder that a jailed process may read, and nothing beside it.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

/// Opens a folder so that whoever has the descriptor reaches what is below it, but not, by "..", what is above: it is the root of a
/// mount of its own that hangs nowhere (open_tree(2), `OPEN_TREE_CLONE`). Where that is not permitted, the folder is opened as
/// it is: an ordinary user's permissions are what is left then.
///
/// # Errors
/// It cannot be opened.
pub fn open_alone(folder: &Path) -> io::Result<File> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, folder, flags) {
        Ok(alone) => Ok(File::from(alone)),
        Err(_) => File::open(folder),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags, fstat, openat};
    use std::io::Read as _;

    #[test]
    fn nothing_above_a_folder_is_reached_from_it() {
        let outer = tempfile::tempdir().expect("a folder");
        let inner = outer.path().join("inner");
        std::fs::create_dir(&inner).expect("a folder");
        std::fs::write(inner.join("file"), "below").expect("a file");
        let folder = open_alone(&inner).expect("open");
        let file = openat(&folder, "file", OFlags::RDONLY, Mode::empty()).expect("its file");
        let mut text = String::new();
        File::from(file).read_to_string(&mut text).expect("read");
        assert_eq!(text, "below");
        let up = openat(&folder, "..", OFlags::RDONLY, Mode::empty()).expect("..");
        let is_itself = fstat(&up).expect("stat").st_ino == fstat(&folder).expect("stat").st_ino;
        // An ordinary user has no mount of its own.
        assert!(is_itself || !rustix::process::geteuid().is_root());
    }
}
