//! From zips to the image of /var/task and /opt, through the real mkfs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Cursor, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use thaw_images::{Fault, ImageStore};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

fn zip(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    linked(files, &[])
}

fn linked(files: &[(&str, u32, &[u8])], links: &[(&str, &str)]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, mode, data) in files {
        let options = SimpleFileOptions::default().unix_permissions(*mode);
        writer.start_file(*name, options).unwrap();
        writer.write_all(data).unwrap();
    }
    for (name, target) in links {
        writer
            .add_symlink(*name, *target, SimpleFileOptions::default())
            .unwrap();
    }
    writer.finish().unwrap().into_inner()
}

#[test]
fn a_zip_becomes_an_image_with_the_same_files() {
    let home = tempfile::tempdir().unwrap();
    let store = ImageStore::new(home.path().join("home"));
    let code = zip(&[
        ("app.py", 0o600, b"def handler"),
        ("lib/tool", 0o755, b"#!/bin/sh"),
    ]);
    let out = home.path().join("home/functions/hello.erofs");
    let image = store.code_image(&code, &[], &out).unwrap();
    assert_eq!(image.path, out);
    assert_eq!(image.code_size, u64::try_from(code.len()).unwrap());
    let file = std::fs::metadata(&image.path).unwrap();
    assert_eq!(file.len(), thaw_images::CODE_DISK_BYTES);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file);
    assert!(blocks * 512 < 1 << 20, "the rest is a hole");
    assert_eq!(image.unzipped_size, 20);
    assert_eq!(image.code_sha256.len(), 44);

    let tree = home.path().join("tree");
    let status = Command::new("fsck.erofs")
        .arg(format!("--extract={}", tree.display()))
        .arg("--no-preserve-owner")
        .arg(&out)
        .status()
        .unwrap();
    assert!(status.success());
    let mode = |name: &str| {
        fs::metadata(tree.join("task").join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(fs::read(tree.join("task/app.py")).unwrap(), b"def handler");
    assert_eq!(
        (mode("app.py"), mode("lib/tool"), mode("lib")),
        (0o644, 0o755, 0o755)
    );

    let again = store.code_image(&code, &[], &out).unwrap();
    assert_eq!(
        again, image,
        "equal zips give equal images, and the old one is replaced"
    );
}

#[test]
fn a_broken_zip_is_the_callers_fault_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let store = ImageStore::new(home.path());
    let out = home.path().join("hello.erofs");
    let error = store.code_image(b"PK but no zip", &[], &out).unwrap_err();
    assert_eq!(error.fault(), Fault::Caller);
    assert_eq!(
        error.to_string(),
        "Could not unzip uploaded file. Please check your file, then try to upload again."
    );
    assert!(!out.exists());
    let left: Vec<_> = fs::read_dir(home.path().join("staging"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["guard"]);
}

#[test]
fn a_folder_that_cannot_be_written_is_the_hosts_fault() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("staging"), "a file in the way").unwrap();
    let store = ImageStore::new(home.path());
    let error = store
        .code_image(&zip(&[("a", 0o644, b"")]), &[], &home.path().join("o"))
        .unwrap_err();
    assert_eq!(error.fault(), Fault::Host);
}

#[test]
fn relative_paths_are_those_of_the_current_folder() {
    let home = tempfile::tempdir_in(".").unwrap();
    let relative = home.path().file_name().unwrap();
    let store = ImageStore::new(relative);
    let out = std::path::Path::new(relative).join("code.erofs");
    let image = store
        .code_image(&zip(&[("a", 0o644, b"")]), &[], &out)
        .unwrap();
    assert!(image.path.is_absolute() && out.is_file());
}

#[test]
fn a_later_layer_wins_whatever_the_two_hold() {
    let home = tempfile::tempdir().unwrap();
    let store = ImageStore::new(home.path());
    let layers = [
        linked(
            &[
                ("python/both.py", 0o644, b"first"),
                ("python/first.py", 0o644, b"first"),
                ("file-or-folder", 0o644, b"a file"),
                ("folder-or-file/deep/x", 0o644, b"gone"),
                ("folder-or-filex", 0o644, b"stays"),
            ],
            &[
                ("link-or-folder", "python"),
                ("link-or-file", "python/first.py"),
            ],
        ),
        linked(
            &[
                ("python/both.py", 0o644, b"second"),
                ("file-or-folder/x", 0o644, b"in a folder"),
                ("folder-or-file", 0o755, b"a file"),
                ("link-or-folder/first.py", 0o644, b"not through the link"),
                ("link-or-file", 0o644, b"not through the link"),
            ],
            &[("python/link", "/opt/python/both.py")],
        ),
    ];
    let out = home.path().join("code.erofs");
    let image = store
        .code_image(&zip(&[("app.py", 0o644, b"x")]), &layers, &out)
        .unwrap();
    let tree = home.path().join("tree");
    let status = Command::new("fsck.erofs")
        .arg(format!("--extract={}", tree.display()))
        .arg("--no-preserve-owner")
        .arg(&out)
        .status()
        .unwrap();
    assert!(status.success());
    let text = |name: &str| fs::read_to_string(tree.join("opt").join(name)).unwrap();
    assert_eq!(text("python/both.py"), "second");
    assert_eq!(text("python/first.py"), "first");
    assert_eq!(text("file-or-folder/x"), "in a folder");
    assert_eq!(text("folder-or-file"), "a file");
    assert_eq!(text("folder-or-filex"), "stays");
    assert_eq!(text("link-or-folder/first.py"), "not through the link");
    assert_eq!(text("link-or-file"), "not through the link");
    let link = fs::read_link(tree.join("opt/python/link")).unwrap();
    assert_eq!(link, std::path::Path::new("/opt/python/both.py"));
    assert_eq!(fs::read_to_string(tree.join("task/app.py")).unwrap(), "x");
    let other = store
        .code_image(&zip(&[("app.py", 0o644, b"x")]), &layers[..1], &out)
        .unwrap();
    assert_ne!(other.digest, image.digest);
}

#[test]
fn a_layer_that_leaves_its_folder_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let store = ImageStore::new(home.path());
    let code = zip(&[("app.py", 0o644, b"x")]);
    let escaping = linked(&[("a", 0o644, b"")], &[("b", "/var/task/app.py")]);
    let out = home.path().join("code.erofs");
    let error = store.code_image(&code, &[escaping], &out).unwrap_err();
    assert_eq!(error.fault(), Fault::Caller);
    assert!(error.to_string().contains("leaves the folder"), "{error}");
}
