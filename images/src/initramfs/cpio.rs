//! Writes cpio archives in the "newc" format.
//!
//! The layout is that of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
//! Owner, times and device numbers are zero and inode numbers count up, so that equal input gives
//! equal bytes.

const MODE_FOLDER: u32 = 0o040_000;
const MODE_CHARACTER_DEVICE: u32 = 0o020_000;
const MODE_FILE: u32 = 0o100_000;
/// The kernel ignores entries with longer names (PATH_MAX of init/initramfs.c), NUL included.
const NAME_BYTES_MAX: usize = 4096;
const TRAILER: &str = "TRAILER!!!";

/// An entry does not fit the format.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpioError {
    /// The name is empty, absolute, too long or holds a NUL.
    #[error("{name:?} is no name for an archive entry")]
    Name {
        /// The name.
        name: String,
    },
    /// The file is 4 GiB or longer.
    #[error("{name} is too long for an archive entry")]
    Length {
        /// The entry's name.
        name: String,
    },
}

/// An archive being written, in memory.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    links: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl Archive {
    /// An archive without entries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder; its parents must have been added before.
    ///
    /// # Errors
    /// When `name` is unfit.
    pub fn folder(&mut self, name: &str, permissions: u32) -> Result<(), CpioError> {
        let mode = MODE_FOLDER | permissions;
        self.entry(&Entry {
            name,
            mode,
            links: 2,
            device: (0, 0),
            data: &[],
        })
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// When `name` is unfit or `data` is 4 GiB or longer.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> Result<(), CpioError> {
        let mode = MODE_FILE | permissions;
        self.entry(&Entry {
            name,
            mode,
            links: 1,
            device: (0, 0),
            data,
        })
    }

    /// Adds a character device node.
    ///
    /// # Errors
    /// When `name` is unfit.
    pub fn character_device(
        &mut self,
        name: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> Result<(), CpioError> {
        let mode = MODE_CHARACTER_DEVICE | permissions;
        self.entry(&Entry {
            name,
            mode,
            links: 1,
            device: (major, minor),
            data: &[],
        })
    }

    /// Ends the archive and hands out its bytes.
    ///
    /// # Errors
    /// None today; the trailer is an entry like any other.
    pub fn finish(mut self) -> Result<Vec<u8>, CpioError> {
        self.entry(&Entry {
            name: TRAILER,
            mode: 0,
            links: 1,
            device: (0, 0),
            data: &[],
        })?;
        Ok(self.bytes)
    }

    fn entry(&mut self, entry: &Entry<'_>) -> Result<(), CpioError> {
        let name = entry.name;
        let unfit = name.is_empty() || name.starts_with('/') || name.contains('\0');
        if unfit || name.len() >= NAME_BYTES_MAX {
            return Err(CpioError::Name {
                name: name.to_owned(),
            });
        }
        let length = u32::try_from(entry.data.len()).map_err(|_| CpioError::Length {
            name: name.to_owned(),
        })?;
        let name_length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        self.entries += 1;
        let (user, group, time, device, check) = (0, 0, 0, 0, 0);
        let fields = [
            self.entries,
            entry.mode,
            user,
            group,
            entry.links,
            time,
            length,
            device,
            device,
            entry.device.0,
            entry.device.1,
            name_length,
            check,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(entry.data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Name, mode, rdev, data.
    type ReadEntry = (String, u32, (u32, u32), Vec<u8>);

    /// Reads entries back as the kernel does.
    fn read(mut bytes: &[u8]) -> Vec<ReadEntry> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, length, name_length) = (field(1), field(6), field(11));
            let rdev = (field(9), field(10));
            let name_end = 110 + usize::try_from(name_length).unwrap();
            assert_eq!(bytes[name_end - 1], 0);
            let name = String::from_utf8(bytes[110..name_end - 1].to_vec()).unwrap();
            let start = name_end.next_multiple_of(4);
            let end = start + usize::try_from(length).unwrap();
            if name == TRAILER {
                assert_eq!(bytes.len(), start);
                return entries;
            }
            entries.push((name, mode, rdev, bytes[start..end].to_vec()));
            bytes = &bytes[end.next_multiple_of(4)..];
        }
    }

    #[test]
    fn a_device_node_keeps_its_numbers() {
        let mut archive = Archive::new();
        archive.folder("dev", 0o755).unwrap();
        archive
            .character_device("dev/console", 0o600, 5, 1)
            .unwrap();
        let entries = read(&archive.finish().unwrap());
        assert_eq!(entries[0], ("dev".to_owned(), 0o040_755, (0, 0), vec![]));
        assert_eq!(
            entries[1],
            ("dev/console".to_owned(), 0o020_600, (5, 1), vec![])
        );
    }

    #[test]
    fn unfit_names_are_refused() {
        let long = "n".repeat(NAME_BYTES_MAX);
        for name in ["", "/init", "a\0b", &long] {
            assert!(Archive::new().file(name, 0o644, b"").is_err(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(files in prop::collection::vec(("[a-z]{1,20}", prop::collection::vec(any::<u8>(), 0..200)), 0..20)) {
            let mut archive = Archive::new();
            for (name, data) in &files {
                archive.file(name, 0o644, data).unwrap();
            }
            let twin = archive.clone();
            let bytes = archive.finish().unwrap();
            let read: Vec<_> = read(&bytes).into_iter().map(|(name, _, _, data)| (name, data)).collect();
            prop_assert_eq!(read, files);
            prop_assert_eq!(bytes, twin.finish().unwrap());
        }
    }
}
