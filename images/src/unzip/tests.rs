//! Hostile archives, built here byte by byte where the zip crate would refuse to write them.

use std::io::Write;

use proptest::prelude::*;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;

const LIMITS: Limits = Limits {
    bytes_max: 1 << 20,
    entries_max: 50,
};

fn options() -> SimpleFileOptions {
    SimpleFileOptions::default().compression_method(CompressionMethod::Stored)
}

fn archive(write: impl FnOnce(&mut ZipWriter<Cursor<Vec<u8>>>)) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    write(&mut writer);
    writer.finish().unwrap().into_inner()
}

fn file(name: &str, data: &[u8]) -> Vec<u8> {
    archive(|zip| {
        zip.start_file(name, options()).unwrap();
        zip.write_all(data).unwrap();
    })
}

/// Replaces every occurrence of `from`; lengths must agree so that offsets stay right.
fn patched(mut data: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> = (0..data.len() - from.len())
        .filter(|at| data[*at..].starts_with(from))
        .collect();
    assert!(!places.is_empty());
    for at in places {
        data[at..at + to.len()].copy_from_slice(to);
    }
    data
}

/// Sets the Unix mode of the only entry (external attributes, high half).
fn with_mode(mut data: Vec<u8>, mode: u16) -> Vec<u8> {
    let at = (0..data.len())
        .find(|at| data[*at..].starts_with(CENTRAL_SIGNATURE))
        .unwrap();
    data[at + 5] = 3; // made by: Unix
    data[at + 40..at + 42].copy_from_slice(&mode.to_le_bytes());
    data
}

fn extract(data: &[u8]) -> Result<(tempfile::TempDir, u64), UnzipError> {
    let folder = tempfile::tempdir().unwrap();
    let bytes = plan(data, LIMITS, "/var/task")?.extract(folder.path())?;
    Ok((folder, bytes))
}

fn refusal(data: &[u8]) -> String {
    let error = extract(data).map(|_| ()).unwrap_err();
    assert_eq!(error.fault(), Fault::Caller);
    error.to_string()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn an_ordinary_zip_comes_out_with_permissions() {
    let data = archive(|zip| {
        zip.add_directory("empty", options()).unwrap();
        zip.start_file("pkg/app.py", options().unix_permissions(0o600))
            .unwrap();
        zip.write_all(b"def handler").unwrap();
        zip.start_file("bootstrap", options().unix_permissions(0o755))
            .unwrap();
        zip.add_symlink("pkg/link", "../bootstrap", options())
            .unwrap();
    });
    let (folder, bytes) = extract(&data).unwrap();
    let at = |name: &str| folder.path().join(name);
    assert_eq!(bytes, 11);
    assert_eq!(fs::read(at("pkg/app.py")).unwrap(), b"def handler");
    assert_eq!(mode(&at("pkg/app.py")), 0o644);
    assert_eq!(mode(&at("bootstrap")), 0o755);
    assert_eq!(mode(&at("empty")), 0o755);
    assert_eq!(
        fs::read_link(at("pkg/link")).unwrap(),
        Path::new("../bootstrap")
    );
}

#[test]
fn permission_bits_beyond_the_ordinary_are_dropped_and_none_means_all() {
    let (folder, _) = extract(&with_mode(file("tool", b""), 0o104_755)).unwrap();
    assert_eq!(mode(&folder.path().join("tool")), 0o755);
    let (folder, _) = extract(&with_mode(file("tool", b""), 0)).unwrap();
    assert_eq!(mode(&folder.path().join("tool")), 0o755);
}

#[test]
fn what_is_no_zip_is_refused_in_lambdas_words() {
    let whole = file("app.py", b"some content");
    for data in [
        b"".as_slice(),
        b"no zip at all",
        &whole[..whole.len() - 1],
        &whole[..20],
    ] {
        assert_eq!(
            refusal(data),
            "Could not unzip uploaded file. Please check your file, then try to upload again."
        );
    }
    let damaged = patched(whole, b"some content", b"some CONTENT");
    assert!(refusal(&damaged).starts_with("Could not unzip"));
}

#[test]
fn an_empty_zip_is_refused() {
    assert_eq!(
        refusal(&archive(|_| {})),
        "Uploaded file must be a non-empty zip"
    );
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    for name in [
        "../escape",
        "/absolute",
        "a/../../b",
        "C:/windows",
        "..\\escape",
    ] {
        let plain = "x".repeat(name.len());
        let data = patched(file(&plain, b""), plain.as_bytes(), name.as_bytes());
        assert!(refusal(&data).contains(&format!("{name:?}")), "{name}");
    }
}

#[test]
fn links_out_of_the_folder_are_refused() {
    for target in ["../../etc/passwd", "/etc/passwd", "/var/task/../../etc"] {
        let data = archive(|zip| zip.add_symlink("a/link", target, options()).unwrap());
        assert!(refusal(&data).contains("leaves the folder"), "{target}");
    }
}

#[test]
fn nothing_is_written_through_a_link() {
    let data = archive(|zip| {
        zip.add_symlink("link", "folder", options()).unwrap();
        zip.start_file("link/file", options()).unwrap();
    });
    assert!(refusal(&data).contains("lies in a file or a link"));
}

#[test]
fn devices_fifos_and_sockets_are_refused() {
    for kind in [0o020_000, 0o060_000, 0o010_000, 0o140_000] {
        let data = with_mode(file("special", b""), kind | 0o644);
        assert!(refusal(&data).contains("neither a file"), "{kind:o}");
    }
}

#[test]
fn a_name_that_occurs_twice_is_refused() {
    let two = |first: &str, second: &str| {
        archive(|zip| {
            zip.start_file(first, options()).unwrap();
            zip.start_file(second, options()).unwrap();
        })
    };
    assert!(refusal(&patched(two("aa", "ab"), b"ab", b"aa")).contains("occurs twice"));
    assert!(refusal(&two("a/b", "a//b")).contains("occurs twice"));
    assert!(refusal(&two("a", "a/b")).contains("lies in a file"));
    assert!(refusal(&two("a/b", "a")).contains("occurs twice"));
}

#[test]
fn an_encrypted_entry_is_refused() {
    let mut data = file("secret", b"12345678901234");
    let central = (0..data.len())
        .find(|at| data[*at..].starts_with(CENTRAL_SIGNATURE))
        .unwrap();
    data[6] |= 1;
    data[central + 8] |= 1;
    assert!(refusal(&data).contains("is encrypted"));
}

#[test]
fn too_much_is_refused_by_declaration_and_by_what_comes_out() {
    let bomb = archive(|zip| {
        let options = options().compression_method(CompressionMethod::Deflated);
        zip.start_file("zeros", options).unwrap();
        zip.write_all(&vec![0; (1 << 20) + 1]).unwrap();
    });
    assert_eq!(
        refusal(&bomb),
        "Unzipped size must be smaller than 1048576 bytes"
    );
    // The directory now claims one byte; what comes out is counted all the same.
    let length = ((1_u32 << 20) + 1).to_le_bytes();
    let lying = patched(bomb, &length, &1_u32.to_le_bytes());
    let message = refusal(&lying);
    assert!(
        message.starts_with("Unzipped") || message.starts_with("Could not"),
        "{message}"
    );
}

#[test]
fn too_many_entries_are_refused_implied_folders_included() {
    let data = archive(|zip| {
        for n in 0..51 {
            zip.start_file(format!("f{n}"), options()).unwrap();
        }
    });
    assert_eq!(
        refusal(&data),
        "the zip holds more than 50 files and folders"
    );
    assert!(refusal(&file(&format!("{}f", "d/".repeat(60)), b"")).contains("more than 50"));
}

proptest! {
    #[test]
    fn no_damage_panics_or_writes_outside(at: usize, byte: u8, cut: usize) {
        let mut data = archive(|zip| {
            zip.start_file("folder/app.py", options()).unwrap();
            zip.write_all(b"content content").unwrap();
            zip.add_symlink("link", "folder", options()).unwrap();
        });
        let length = data.len();
        data[at % length] = byte;
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("in");
        for data in [&data[..], &data[..cut % length]] {
            if let Ok(plan) = plan(data, LIMITS, "/var/task") {
                let _ = plan.extract(&folder);
            }
        }
        for entry in fs::read_dir(outer.path()).unwrap() {
            prop_assert_eq!(entry.unwrap().file_name(), "in");
        }
    }
}
