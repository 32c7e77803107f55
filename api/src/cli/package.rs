//! A function's code as a zip: a zip as it is, a folder packed.

use std::fs;
use std::io::{Cursor, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// Names that never belong to a function.
const LEFT_OUT: [&str; 4] = [".git", "__pycache__", ".venv", ".DS_Store"];
/// Most bytes that are packed, uncompressed: Lambda's limit of 250 MiB.
const BYTES_MAX: u64 = 262_144_000;

/// The zip's bytes. The same folder gives the same bytes.
///
/// # Errors
/// Not there, neither folder nor zip, empty, or too large.
pub fn zip_of(source: &Path) -> anyhow::Result<Vec<u8>> {
    let about =
        fs::metadata(source).with_context(|| format!("cannot read {}", source.display()))?;
    if about.is_file() {
        return fs::read(source).with_context(|| format!("cannot read {}", source.display()));
    }
    ensure!(
        about.is_dir(),
        "{} is neither a folder nor a zip",
        source.display()
    );
    let mut files = Vec::new();
    collect(source, &mut files)?;
    if files.is_empty() {
        bail!("{} holds no files", source.display());
    }
    files.sort();
    pack(source, &files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let entry = entry?;
        if LEFT_OUT.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?
        } else {
            files.push(entry.path())
        }
    }
    Ok(())
}

fn pack(root: &Path, files: &[PathBuf]) -> anyhow::Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut total = 0;
    for path in files {
        let failed = || format!("cannot pack {}", path.display());
        let name = path
            .strip_prefix(root)
            .with_context(failed)?
            .to_str()
            .with_context(failed)?;
        let link = fs::symlink_metadata(path).with_context(failed)?;
        if link.is_symlink() {
            let target = fs::read_link(path).with_context(failed)?;
            zip.add_symlink(
                name,
                target.to_str().with_context(failed)?,
                SimpleFileOptions::default(),
            )
            .with_context(failed)?;
            continue;
        }
        ensure!(
            link.is_file(),
            "{} is neither file nor folder nor link: remove it from the function",
            path.display()
        );
        total += link.len();
        ensure!(
            total <= BYTES_MAX,
            "{} holds more than {BYTES_MAX} bytes, the limit for a function's code",
            root.display()
        );
        let options =
            SimpleFileOptions::default().unix_permissions(link.permissions().mode() & 0o777);
        zip.start_file(name, options).with_context(failed)?;
        zip.write_all(&fs::read(path).with_context(failed)?)
            .with_context(failed)?;
    }
    Ok(zip.finish().context("cannot finish the zip")?.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn a_folder_is_packed_the_same_way_twice_without_what_does_not_belong() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("lib/__pycache__")).unwrap();
        fs::write(folder.path().join("lib/__pycache__/x.pyc"), b"x").unwrap();
        fs::write(folder.path().join("lib/m.py"), b"y").unwrap();
        fs::write(folder.path().join("bootstrap"), b"#!/bin/sh").unwrap();
        fs::set_permissions(
            folder.path().join("bootstrap"),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        let bytes = zip_of(folder.path()).unwrap();
        assert_eq!(bytes, zip_of(folder.path()).unwrap());
        let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).unwrap();
        assert_eq!(
            zip.file_names().collect::<Vec<_>>(),
            ["bootstrap", "lib/m.py"]
        );
        let mut text = String::new();
        let mut file = zip.by_name("bootstrap").unwrap();
        assert_eq!(file.unix_mode().unwrap() & 0o777, 0o755);
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "#!/bin/sh");
    }

    #[test]
    fn an_empty_folder_is_no_function() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            zip_of(folder.path())
                .unwrap_err()
                .to_string()
                .contains("holds no files")
        );
    }
}
