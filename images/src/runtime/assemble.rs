//! Turns packages and wheels into the tree of files that becomes an image.
//!
//! No maintainer script runs; what those of the chosen packages would do is done here or is data
//! in the recipe. Owners do not matter: packing gives every file to root.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::ImageError;
use super::ldcache;
use super::recipe::{MERGED, Recipe};
use crate::apt::{Apt, Package};
use crate::fault::FileError;
use crate::progress::Progress;
use crate::staging::{Staging, make_dir, remove_tree};
use crate::tool::LOADER;

const CERTIFICATES: &str = "usr/share/ca-certificates";
const CERTIFICATE_BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";

/// Unpacks all packages and wheels into `tree`.
pub(super) fn unpack(
    recipe: &Recipe,
    packages: &[Package],
    apt: &Apt,
    staging: &Staging,
    tree: &Path,
) -> Result<(), ImageError> {
    for (path, target) in MERGED {
        make_dir(&tree.join(target))?;
        link(tree, path, target)?;
    }
    let scratch = staging.path().join("package.tar");
    for package in packages {
        apt.unpack(package, &scratch, tree)?;
    }
    let wheels = apt.root().join("wheels");
    for wheel in &recipe.wheels {
        wheel.unpack(&wheels, &tree.join("var/runtime"), "/var/runtime")?;
    }
    Ok(())
}

/// Makes of the unpacked files a root file system.
pub(super) fn finish(
    recipe: &Recipe,
    tree: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ImageError> {
    for path in &recipe.remove {
        let path = tree.join(path);
        let removed = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Ok(metadata) if metadata.is_dir() => remove_tree(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        removed.map_err(FileError::on("removing", &path))?;
    }
    normalise(tree)?;
    for (path, target) in &recipe.links {
        link(tree, path, target)?;
    }
    for (path, _) in &recipe.folders {
        make_dir(&tree.join(path))?;
    }
    for (path, mode, text) in &recipe.files {
        write(&tree.join(path), *mode, text.as_bytes())?;
    }
    bundle_certificates(tree)?;
    if let Some(python) = recipe.python {
        progress.detail("compiling python files");
        compile_python(python, recipe, tree)?;
        normalise(tree)?;
    }
    write(&tree.join("etc/ld.so.cache"), 0o644, &ldcache::build(tree)?)?;
    for (path, mode) in &recipe.folders {
        permit(&tree.join(path), *mode)?;
    }
    Ok(())
}

/// Gives every file and folder one of three permissions: folders and programs 0755, others 0644.
///
/// Nothing stays set-user-id: the code in a sandbox starts without privileges and has no use for
/// a program that gains some.
fn normalise(path: &Path) -> Result<(), FileError> {
    let metadata = fs::symlink_metadata(path).map_err(FileError::on("reading", path))?;
    if metadata.is_dir() {
        permit(path, 0o755)?;
        for entry in fs::read_dir(path).map_err(FileError::on("listing", path))? {
            normalise(&entry.map_err(FileError::on("listing", path))?.path())?;
        }
    } else if metadata.is_file() {
        let is_program = metadata.permissions().mode() & 0o111 != 0;
        permit(path, if is_program { 0o755 } else { 0o644 })?;
    }
    Ok(())
}

fn permit(path: &Path, mode: u32) -> Result<(), FileError> {
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(path, permissions).map_err(FileError::on("setting permissions of", path))
}

/// Makes a symbolic link where nothing is yet; what a package ships stays.
fn link(tree: &Path, path: &str, target: &str) -> Result<(), FileError> {
    let path = tree.join(path);
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    match symlink(target, &path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(FileError::on("linking", &path)),
    }
}

fn write(path: &Path, mode: u32, data: &[u8]) -> Result<(), FileError> {
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    // A package may have a link there, which writing would follow out of the tree.
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(FileError::on("replacing", path)(error));
        }
        _ => {}
    }
    fs::write(path, data).map_err(FileError::on("writing", path))?;
    permit(path, mode)
}

/// Concatenates all certificates, as update-ca-certificates(8) does, in the order of their names.
fn bundle_certificates(tree: &Path) -> Result<(), FileError> {
    let mut paths = Vec::new();
    certificates(&tree.join(CERTIFICATES), &mut paths)?;
    paths.sort();
    let mut bundle = Vec::new();
    for path in paths {
        bundle.extend(fs::read(&path).map_err(FileError::on("reading", &path))?);
        if bundle.last() != Some(&b'\n') {
            bundle.push(b'\n');
        }
    }
    write(&tree.join(CERTIFICATE_BUNDLE), 0o644, &bundle)
}

fn certificates(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<(), FileError> {
    for entry in fs::read_dir(folder).map_err(FileError::on("listing", folder))? {
        let path = entry.map_err(FileError::on("listing", folder))?.path();
        if path.is_dir() {
            certificates(&path, paths)?;
        } else if path.extension().is_some_and(|extension| extension == "crt") {
            paths.push(path);
        }
    }
    Ok(())
}

/// Compiles with the image's own Python and C library, started through the image's own loader, so
/// that nothing of the host's Python enters and no root is needed for a chroot.
fn compile_python(python: &str, recipe: &Recipe, tree: &Path) -> Result<(), ImageError> {
    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    LOADER.run(|command| {
        command
            .env_remove("PYTHONPATH")
            .env("PYTHONHOME", tree.join("usr"));
        // Sets of constants are written in hash order.
        command
            .env("PYTHONHASHSEED", "0")
            .env("PYTHONDONTWRITEBYTECODE", "1");
        command.current_dir(tree);
        command
            .arg(libraries.join("ld-linux-x86-64.so.2"))
            .arg("--library-path")
            .arg(&libraries);
        command
            .arg(tree.join(format!("usr/bin/python{python}")))
            .args(["-s", "-m", "compileall", "-q"]);
        // Unchecked: the image is read-only, so a source file never changes under its code.
        command.args(["--invalidation-mode", "unchecked-hash", "-j", "1"]);
        // Paths in tracebacks are those of the guest.
        command.arg("-s").arg(tree).args(["-p", "/"]);
        command.args(recipe.compile.iter().map(|path| tree.join(path)));
    })?;
    Ok(())
}
