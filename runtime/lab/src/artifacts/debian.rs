//! The Debian cloud kernel, through apt.

use super::{BuildError, io_error};
use crate::tools;
use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Depends on the current kernel of Debian's cloud flavour.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const APT_LISTS: &str = "/var/lib/apt/lists";

/// A kernel package and its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: String,
}

/// True if apt may know a newer kernel than when `mark` was written.
pub fn lists_are_newer_than(mark: &Path) -> bool {
    let changed = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
    changed(Path::new(APT_LISTS)) > changed(mark)
}

/// The kernel that apt would install.
pub fn candidate() -> Result<Package, BuildError> {
    let apt_cache = tools::find("apt-cache", "apt")?;
    let depends = output(Command::new(&apt_cache).args(["depends", META_PACKAGE]))?;
    let name = depends
        .lines()
        .find_map(|line| {
            line.trim()
                .strip_prefix("Depends: ")
                .filter(|name| name.starts_with("linux-image-"))
        })
        .ok_or(BuildError::NoPackage(META_PACKAGE))?;
    let show = output(Command::new(&apt_cache).args(["show", "--no-all-versions", name]))?;
    let version = show
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .ok_or(BuildError::NoPackage(META_PACKAGE))?;
    Ok(Package {
        name: name.to_owned(),
        version: version.to_owned(),
    })
}

/// Downloads the package into `folder` (apt checks its signature's digest) and unpacks it there; nothing is installed.
pub fn download(package: &Package, folder: &Path) -> Result<PathBuf, BuildError> {
    let apt_get = tools::find("apt-get", "apt")?;
    let dpkg_deb = tools::find("dpkg-deb", "dpkg")?;
    let exact = format!("{}={}", package.name, package.version);
    output(
        Command::new(apt_get)
            .args(["-q", "download", &exact])
            .current_dir(folder),
    )?;
    let archive = entries(folder)?
        .into_iter()
        .find(|path| path.extension() == Some(OsStr::new("deb")))
        .ok_or_else(|| BuildError::Lacks(format!("archive in {}", folder.display())))?;
    let unpacked = folder.join("unpacked");
    output(
        Command::new(dpkg_deb)
            .arg("-x")
            .arg(&archive)
            .arg(&unpacked),
    )?;
    Ok(unpacked)
}

/// `boot/vmlinuz-…` of the unpacked package.
pub fn kernel_image(unpacked: &Path) -> Result<PathBuf, BuildError> {
    let is_image = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-"))
    };
    entries(&unpacked.join("boot"))?
        .into_iter()
        .find(is_image)
        .ok_or_else(|| BuildError::Lacks("boot/vmlinuz".to_owned()))
}

/// Paths in a folder, sorted.
pub fn entries(folder: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let list = fs::read_dir(folder).map_err(io_error("list", folder))?;
    let mut paths = list
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io_error("list", folder))?;
    paths.sort();
    Ok(paths)
}

fn output(command: &mut Command) -> Result<String, BuildError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(io_error("start", Path::new(&program)))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let stderr = lines[lines.len().saturating_sub(3)..].join("; ");
    Err(BuildError::Tool {
        program,
        status: done.status,
        stderr,
    })
}
