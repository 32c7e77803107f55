//! The "newc" archive that the kernel unpacks as its first file system (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction. Names are relative; folders come before what is in them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entry_count: usize,
}

impl Archive {
    /// Adds an empty folder.
    pub fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// Adds a file with these permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, content);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry_count += 1;
        let (inode, size, name_size) = (self.entry_count, content.len(), name.len() + 1);
        // magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let head = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
            0, 1
        );
        self.bytes.extend(head.as_bytes());
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn entries_are_aligned_and_sized() {
        let mut archive = super::Archive::default();
        archive.folder("d");
        archive.file("d/f", 0o644, b"hello");
        let bytes = archive.finish();
        let at = bytes
            .windows(5)
            .position(|window| window == b"hello")
            .unwrap();
        assert_eq!(at % 4, 0);
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"07070100000001000041ed"));
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
