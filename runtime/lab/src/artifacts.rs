//! The lab's files: `kernel/<package>_<version>/` with `vmlinux`, `modules/<release>/` and `initrd-<digest of the init>`; `kernel/current`
//! names the folder in use.

mod cpio;
mod debian;
mod modules;

use crate::{kernel, kernel::KernelError, tools::MissingTool};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::ExitStatus,
};

/// The static init that build.rs compiled.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/thaw-lab-init"));

/// Why the lab could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A program is missing.
    #[error(transparent)]
    Missing(#[from] MissingTool),
    /// A program failed.
    #[error("{program} ended with {status}: {stderr}")]
    Tool {
        /// The program with its main argument.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        stderr: String,
    },
    /// A file or folder.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was being done.
        act: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel image is unusable.
    #[error("cannot use {}", path.display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: KernelError,
    },
    /// The kernel package lacks what the lab needs.
    #[error("kernel package has no {0}")]
    Lacks(String),
    /// apt knows no kernel.
    #[error("apt knows no package {0}; on Debian: sudo apt-get update")]
    NoPackage(&'static str),
}

/// The lab has not been built here yet.
#[derive(Debug, thiserror::Error)]
#[error("the lab has not been built in {}", .0.display())]
pub struct NotBuilt(PathBuf);

/// Paths of a built lab.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// Folder of this kernel; saved states go here as well.
    pub folder: PathBuf,
    /// ELF kernel.
    pub kernel: PathBuf,
    /// Initramfs with init and modules.
    pub initrd: PathBuf,
    /// Folder for /lib/modules.
    pub modules: PathBuf,
}

impl Artifacts {
    fn at(folder: PathBuf) -> Self {
        let digest = Sha256::digest(INIT);
        let digest: String = digest
            .iter()
            .take(6)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self {
            kernel: folder.join("vmlinux"),
            initrd: folder.join(format!("initrd-{digest}")),
            modules: folder.join("modules"),
            folder,
        }
    }
}

/// What [`build`] left in `cache`.
pub fn current(cache: &Path) -> Result<Artifacts, NotBuilt> {
    let name = fs::read_to_string(cache.join("kernel/current"))
        .map_err(|_| NotBuilt(cache.to_path_buf()))?;
    let found = Artifacts::at(cache.join("kernel").join(name.trim()));
    if found.kernel.is_file() && found.initrd.is_file() {
        Ok(found)
    } else {
        Err(NotBuilt(cache.to_path_buf()))
    }
}

/// See [`crate::Lab::build`].
pub fn build(cache: &Path, progress: &mut dyn FnMut(&str)) -> Result<(), BuildError> {
    let folder = cache.join("kernel");
    fs::create_dir_all(&folder).map_err(io_error("make", &folder))?;
    let lock = folder.join("lock");
    let file = File::create(&lock).map_err(io_error("make", &lock))?;
    file.lock().map_err(io_error("lock", &lock))?; // freed when `file` is closed
    let mark = folder.join("current");
    let built = current(cache).ok();
    if built.is_some() && !debian::lists_are_newer_than(&mark) {
        return Ok(());
    }
    let name = match debian::candidate() {
        Ok(package) => fetch(&folder, &package, progress)?,
        // Without apt's lists an older kernel still does.
        Err(error) => match fs::read_to_string(&mark) {
            Ok(name) if folder.join(name.trim()).join("vmlinux").is_file() => {
                name.trim().to_owned()
            }
            _ => return Err(error),
        },
    };
    let artifacts = Artifacts::at(folder.join(&name));
    if !artifacts.initrd.is_file() {
        progress("making the lab's initramfs");
        write_atomically(&artifacts.initrd, &initrd(&artifacts.modules)?)?;
    }
    write_atomically(&mark, name.as_bytes())
}

/// Makes the kernel's folder unless it is there; returns its name.
fn fetch(
    folder: &Path,
    package: &debian::Package,
    progress: &mut dyn FnMut(&str),
) -> Result<String, BuildError> {
    let name = format!("{}_{}", package.name, package.version.replace(':', "%3a"));
    let target = folder.join(&name);
    if target.is_dir() {
        return Ok(name);
    }
    let staging = tempfile::Builder::new()
        .prefix(".new")
        .tempdir_in(folder)
        .map_err(io_error("make a folder in", folder))?;
    progress(&format!("fetching {} {}", package.name, package.version));
    let unpacked = debian::download(package, staging.path())?;
    progress("taking the kernel out of its image");
    let image = debian::kernel_image(&unpacked)?;
    let bytes = fs::read(&image).map_err(io_error("read", &image))?;
    let kernel = kernel::extract(&bytes).map_err(|source| BuildError::Kernel {
        path: image,
        source,
    })?;
    let finished = staging.path().join("finished");
    fs::create_dir(&finished).map_err(io_error("make", &finished))?;
    write_atomically(&finished.join("vmlinux"), &kernel)?;
    let modules = unpacked.join("lib/modules");
    fs::rename(&modules, finished.join("modules")).map_err(io_error("move", &modules))?;
    fs::rename(&finished, &target).map_err(io_error("name", &target))?;
    Ok(name)
}

fn initrd(modules: &Path) -> Result<Vec<u8>, BuildError> {
    let mut archive = cpio::Archive::default();
    for folder in ["dev", "modules", "proc", "sys"] {
        archive.folder(folder);
    }
    archive.file("init", 0o755, INIT);
    let mut order = String::new();
    for (name, content) in modules::in_order(modules)? {
        archive.file(&format!("modules/{name}"), 0o644, &content);
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file =
        tempfile::NamedTempFile::new_in(folder).map_err(io_error("make a file in", folder))?;
    io::Write::write_all(&mut file, bytes).map_err(io_error("write", path))?;
    file.as_file().sync_all().map_err(io_error("sync", path))?;
    file.persist(path)
        .map(drop)
        .map_err(|error| io_error("name", path)(error.error))
}

fn io_error(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Io {
        act,
        path: path.to_path_buf(),
        source,
    }
}
