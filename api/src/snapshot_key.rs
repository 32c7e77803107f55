//! The key of a home's snapshots: what was not made with it is not used.
//!
//! The gateway and the command line read it; monitors, which hold guests, never do.

use std::fs;
use std::io;
use std::path::Path;

use ring::rand::{SecureRandom as _, SystemRandom};
use thaw_snapshot::Key;

use crate::auth::keys::secret_file;

/// File of the key's secret, below `THAW_HOME`: 32 random bytes.
pub const FILE: &str = "snapshot-key";

/// The key of `home`, made at first need. Who wants another removes the file: all functions are frozen again then.
///
/// # Errors
/// The file cannot be read or made, or holds no key.
pub fn of(home: &Path) -> io::Result<Key> {
    fs::create_dir_all(home)?;
    let bytes = secret_file(&home.join(FILE), || {
        let mut secret = vec![0; Key::SECRET_BYTES];
        let filled = SystemRandom::new().fill(&mut secret);
        filled.map_err(|_| io::Error::other("the operating system gave no random bytes"))?;
        Ok(secret)
    })?;
    let secret = bytes.as_slice().try_into().map_err(|_| {
        let why = format!("{FILE} holds no key: remove it, and functions are frozen again");
        io::Error::new(io::ErrorKind::InvalidData, why)
    })?;
    Ok(Key::new(secret))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use thaw_snapshot::{Metadata, Snapshot, Writer, tag};

    use super::*;

    #[test]
    fn the_snapshot_key_is_made_once_however_many_want_it_and_is_its_owners_alone() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("new");
        let keys: Vec<Key> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| of(&folder).unwrap()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let file = fs::metadata(folder.join(FILE)).unwrap();
        assert_eq!((file.len(), file.permissions().mode() & 0o777), (32, 0o600));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);

        let path = home.path().join("s.thaw");
        let mut options = fs::File::options();
        let file = options
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        let mut writer = Writer::new(file.try_clone().unwrap());
        writer.metadata(&Metadata::default()).unwrap();
        writer.finish().unwrap();
        tag(&file, &of(&folder).unwrap()).unwrap();
        let snapshot = Snapshot::open(&path).unwrap();
        for key in &keys {
            snapshot.authenticate(key).unwrap();
        }
        fs::remove_file(folder.join(FILE)).unwrap();
        assert!(
            snapshot.authenticate(&of(&folder).unwrap()).is_err(),
            "another key"
        );

        fs::write(folder.join(FILE), [7; 31]).unwrap();
        assert!(of(&folder).unwrap_err().to_string().contains("remove it"));
    }
}
