//! The files in which a clone's processes read who they are: machine-id(5), the kernel's boot id (random(4)), and the
//! generation, Thaw's own, for programs that keep random state of their own.
//!
//! They lie on a tmpfs and were written when the guest booted, so that their pages exist: a thaw is one small write
//! each, into one page, by the only process that may. Nothing of a request has been delivered then. A program that reads
//! through a mapping at that very moment may see a part of the new value: it is another value all the same.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use crate::boot::{BootError, step};

/// Folder of the files, on the tmpfs at /run.
pub const FOLDER: &str = "/run/thaw";

/// The generation's file: [`GENERATION_BYTES`] bytes, all zero until the first thaw, new random ones for each clone.
pub const GENERATION_FILE: &str = "/run/thaw/generation";

/// Length of a generation: that of a virtual machine generation id, 128 bits.
pub const GENERATION_BYTES: usize = 16;

/// Random bytes that [`Files::renew`] takes: 128 bits for each file.
pub const RANDOM_BYTES: usize = 48;

/// Where the other two are seen; each file of [`FOLDER`] is bound over one of these.
const BINDINGS: [(&str, &str); 2] = [
    (MACHINE_ID, "/etc/machine-id"),
    (BOOT_ID, "/proc/sys/kernel/random/boot_id"),
];
const MACHINE_ID: &str = "machine-id";
const BOOT_ID: &str = "boot_id";
const GENERATION: &str = "generation";

/// The open files.
#[derive(Debug)]
pub(super) struct Files {
    machine_id: File,
    boot_id: File,
    generation: File,
}

impl Files {
    /// Makes the files in `folder` with the values that hold until the first thaw.
    pub(super) fn create(folder: &Path, random: &[u8; RANDOM_BYTES]) -> Result<Self, BootError> {
        step("making folder", folder, fs::create_dir_all(folder))?;
        let create = |name: &str| {
            let path = folder.join(name);
            let opened = File::options()
                .write(true)
                .create_new(true)
                .mode(0o444)
                .open(&path);
            let file = step("making", &path, opened)?;
            // Whatever the umask is, everyone may read.
            let mode = fs::Permissions::from_mode(0o444);
            step("setting the mode of", &path, file.set_permissions(mode))?;
            Ok(file)
        };
        let files = Self {
            machine_id: create(MACHINE_ID)?,
            boot_id: create(BOOT_ID)?,
            generation: create(GENERATION)?,
        };
        files.renew(random).map_err(|(name, source)| BootError {
            act: "writing",
            object: folder.join(name),
            source,
        })?;
        let zero = files.generation.write_all_at(&[0; GENERATION_BYTES], 0);
        step("writing", folder.join(GENERATION), zero)?;
        Ok(files)
    }

    /// Gives each file its value for a new clone. An error names the file.
    pub(super) fn renew(
        &self,
        random: &[u8; RANDOM_BYTES],
    ) -> Result<(), (&'static str, io::Error)> {
        let [machine_id, boot_id, generation] = split(random);
        let named = |name| move |error| (name, error);
        let machine_id = machine_id_text(version_4(machine_id));
        self.machine_id
            .write_all_at(machine_id.as_bytes(), 0)
            .map_err(named(MACHINE_ID))?;
        self.boot_id
            .write_all_at(uuid_text(version_4(boot_id)).as_bytes(), 0)
            .map_err(named(BOOT_ID))?;
        self.generation
            .write_all_at(&generation, 0)
            .map_err(named(GENERATION))
    }
}

/// Shows the files where programs look for them. Only PID 1 of a guest may call it.
pub(super) fn bind(folder: &Path) -> Result<(), BootError> {
    for (name, target) in BINDINGS {
        let target = Path::new(target);
        if !target.exists() {
            step("making", target, File::create(target))?;
        }
        let bound = rustix::mount::mount_bind(folder.join(name), target);
        step("mounting on", target, bound)?;
    }
    Ok(())
}

fn split(random: &[u8; RANDOM_BYTES]) -> [[u8; 16]; 3] {
    let mut parts = [[0; 16]; 3];
    for (part, bytes) in parts.iter_mut().zip(random.chunks_exact(16)) {
        part.copy_from_slice(bytes);
    }
    parts
}

/// The fixed bits of a random UUID (RFC 9562, section 5.4); machine-id(5) recommends them, too.
fn version_4(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn hex(bytes: &[u8], text: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        for digit in [byte >> 4, byte & 0xf] {
            text.push(char::from(DIGITS[usize::from(digit)]));
        }
    }
}

fn machine_id_text(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(33);
    hex(&bytes, &mut text);
    text.push('\n');
    text
}

fn uuid_text(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(37);
    for (index, part) in [0..4, 4..6, 6..8, 8..10, 10..16].into_iter().enumerate() {
        if index > 0 {
            text.push('-');
        }
        hex(&bytes[part], &mut text);
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(folder: &Path, name: &str) -> Vec<u8> {
        fs::read(folder.join(name)).unwrap()
    }

    #[test]
    fn each_renewal_changes_every_file_and_keeps_its_form() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("thaw");
        let files = Files::create(&folder, &[0xab; RANDOM_BYTES]).unwrap();
        assert_eq!(read(&folder, GENERATION), [0; GENERATION_BYTES]);
        let before = ["machine-id", "boot_id", "generation"].map(|name| read(&folder, name));
        let mut random = [0; RANDOM_BYTES];
        for (byte, value) in random.iter_mut().zip(0..) {
            *byte = value;
        }
        files.renew(&random).unwrap();
        let after = ["machine-id", "boot_id", "generation"].map(|name| read(&folder, name));
        assert_eq!(after[0], b"000102030405460788090a0b0c0d0e0f\n");
        assert_eq!(after[1], b"10111213-1415-4617-9819-1a1b1c1d1e1f\n");
        assert_eq!(after[2], random[32..]);
        for (before, after) in before.iter().zip(&after) {
            assert_ne!(before, after);
            assert_eq!(before.len(), after.len());
        }
        let mode = fs::metadata(folder.join(GENERATION)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o444);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let files = Files {
            machine_id: File::create("/dev/null").unwrap(),
            boot_id: full(),
            generation: full(),
        };
        let (name, error) = files.renew(&[1; RANDOM_BYTES]).unwrap_err();
        assert_eq!(name, "boot_id");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}
