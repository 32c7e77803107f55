//! What the test guests boot from. Named by the environment, because it is built by others: `THAW_TEST_KERNEL_DIR` (vmlinux,
//! bzImage, modules/*.ko, manifest.json with the modules' order) and `THAW_TEST_GUEST` (tests/guest/init.rs, linked static).

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

fn named(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable);
    PathBuf::from(
        value.unwrap_or_else(|| panic!("{variable} must name what the test guests boot from")),
    )
}

/// `vmlinux` or `bzImage`.
pub fn kernel(name: &str) -> File {
    File::open(named("THAW_TEST_KERNEL_DIR").join(name)).unwrap()
}

/// One member of a cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst).
fn member(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let fields = [
        0,
        mode,
        0,
        0,
        1,
        0,
        u32::try_from(content.len()).unwrap(),
        0,
        0,
        0,
        0,
        u32::try_from(name.len() + 1).unwrap(),
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// The test guest's program as /init, with the kernel's modules in two lists: what every guest loads, and what one with a network
/// loads when it is told to.
pub fn initramfs() -> File {
    let folder = named("THAW_TEST_KERNEL_DIR");
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    let mut archive = Vec::new();
    for name in ["dev", "proc", "sys", "disk", "modules"] {
        member(&mut archive, name, 0o040_755, b"");
    }
    member(
        &mut archive,
        "init",
        0o100_755,
        &fs::read(named("THAW_TEST_GUEST")).unwrap(),
    );
    for (modules, list) in [("modules", "order"), ("network_modules", "network-order")] {
        let mut order = String::new();
        for name in manifest[modules].as_array().unwrap() {
            let name = name.as_str().unwrap();
            let module = fs::read(folder.join("modules").join(name)).unwrap();
            let path = format!("modules/{name}");
            member(&mut archive, &path, 0o100_644, &module);
            order.push_str(name);
            order.push('\n');
        }
        let path = format!("modules/{list}");
        member(&mut archive, &path, 0o100_644, order.as_bytes());
    }
    member(&mut archive, "TRAILER!!!", 0, b"");
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&archive).unwrap();
    file
}

/// An empty ext4 file system of 16 MiB.
pub fn ext4() -> File {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-O", "^has_journal"])
        .arg(file.path())
        .status()
        .unwrap();
    assert!(made.success());
    file.reopen().unwrap()
}

/// A disk of one repeated byte.
pub fn disk_of(byte: u8, bytes: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![byte; bytes]).unwrap();
    file
}
