//! The guest's kernel: the distribution's cloud kernel, unmodified, as bzImage and as ELF, with the
//! modules that a guest loads.

pub(crate) mod bzimage;
pub(crate) mod modules;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::apt::{Apt, Package, PackageError};
use crate::digest;
use crate::fault::FileError;
use crate::progress::{Progress, step};
use crate::staging::{Staging, StagingError, install, make_dir};
use bzimage::BzImageError;
use modules::{ModuleError, ModuleInfo};

/// The meta-package whose dependency is the newest kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// What the guest needs and a stock kernel may have as modules, in the order of need.
const WANTED: [&str; 7] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
    "ext4",
];
/// What a guest with a network device needs beyond these.
const WANTED_FOR_NETWORK: [&str; 1] = ["virtio_net"];
/// Goes up when the content of the kernel folder changes for the same package.
const RECIPE: u32 = 2;
const MANIFEST: &str = "manifest.json";

/// A kernel on disk, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The release, as `uname -r` prints it in the guest.
    pub release: String,
    /// The compressed image for the Linux boot protocol.
    pub bzimage: PathBuf,
    /// The same kernel as an ELF file.
    pub vmlinux: PathBuf,
    /// The module files in the order in which they load.
    pub modules: Vec<PathBuf>,
    /// What only a guest with a network device loads, after the others.
    pub network_modules: Vec<PathBuf>,
    /// Identifies the content of all of the above: SHA-256 in hexadecimal.
    pub digest: String,
}

/// The kernel could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Its package could not be had.
    #[error("getting the kernel package")]
    Package(#[from] PackageError),
    /// A file operation failed.
    #[error("building the kernel folder")]
    File(#[from] FileError),
    /// No scratch folder.
    #[error("building the kernel folder")]
    Staging(#[from] StagingError),
    /// The package lacks a file.
    #[error("the kernel package {package} has no {what}")]
    Layout {
        /// The package.
        package: String,
        /// What was looked for.
        what: &'static str,
    },
    /// The bzImage cannot be taken apart.
    #[error("extracting vmlinux from {}", path.display())]
    BzImage {
        /// The bzImage.
        path: PathBuf,
        /// Why.
        #[source]
        source: BzImageError,
    },
    /// A module cannot be read.
    #[error("reading the kernel module {}", path.display())]
    Module {
        /// The module file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ModuleError,
    },
    /// The modules cannot be ordered.
    #[error("ordering the kernel modules")]
    Order(#[from] ModuleError),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    recipe: u32,
    release: String,
    package: Package,
    /// In load order.
    modules: Vec<String>,
    /// In load order, after those.
    network_modules: Vec<String>,
    /// Path within the folder → SHA-256.
    files: BTreeMap<String, FileRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    sha256: String,
    size: u64,
}

/// The kernel in `folder`, if there is a complete one of today's recipe. Reads no file but the manifest.
pub(crate) fn open(folder: &Path) -> Option<Kernel> {
    let text = fs::read(folder.join(MANIFEST)).ok()?;
    let manifest: Manifest = serde_json::from_slice(&text).ok()?;
    let is_whole = manifest.files.iter().all(|(name, record)| {
        fs::metadata(folder.join(name)).is_ok_and(|m| m.is_file() && m.len() == record.size)
    });
    if manifest.recipe != RECIPE || !is_whole {
        return None;
    }
    let paths = |names: &[String]| {
        let path = |name| folder.join("modules").join(name);
        names.iter().map(path).collect()
    };
    Some(Kernel {
        release: manifest.release,
        bzimage: folder.join("bzImage"),
        vmlinux: folder.join("vmlinux"),
        modules: paths(&manifest.modules),
        network_modules: paths(&manifest.network_modules),
        digest: digest::bytes(&text),
    })
}

/// Builds the kernel folder anew, in scratch space, and puts it at `folder`.
pub(crate) fn build(
    folder: &Path,
    apt: &Apt,
    staging: &Staging,
    progress: &mut dyn Progress,
) -> Result<Kernel, KernelError> {
    let package = step(progress, "find the kernel package", |progress| {
        let package = kernel_package(apt.resolve(&[META_PACKAGE])?)?;
        progress.detail(&format!("{} {}", package.name, package.version));
        Ok::<_, KernelError>(package)
    })?;
    step(progress, "download the kernel", |progress| {
        apt.download(std::slice::from_ref(&package), progress)
    })?;
    step(progress, "unpack the kernel", |progress| {
        let tree = staging.path().join("package");
        make_dir(&tree)?;
        apt.unpack(&package, &staging.path().join("package.tar"), &tree)?;
        let out = staging.path().join("kernel");
        let release = release(&tree, &package)?;
        write_images(&tree, &release, &out)?;
        let modules = write_modules(&tree, &release, &package, &out)?;
        let count = modules.always.len() + modules.network.len();
        progress.detail(&format!("{release}, {count} modules"));
        write_manifest(&out, package, release, modules)?;
        install(&out, folder)?;
        open(folder).ok_or_else(|| KernelError::Layout {
            package: META_PACKAGE.to_owned(),
            what: "complete set of files",
        })
    })
}

/// The real kernel among the closure of the meta-package.
fn kernel_package(closure: Vec<Package>) -> Result<Package, PackageError> {
    closure
        .into_iter()
        .find(|package| package.name != META_PACKAGE && package.name.starts_with("linux-image-"))
        .ok_or_else(|| PackageError::Absent {
            name: META_PACKAGE.to_owned(),
        })
}

/// The release is the part of the package's name after `linux-image-`; checked against its files.
fn release(tree: &Path, package: &Package) -> Result<String, KernelError> {
    let release = package.name.trim_start_matches("linux-image-").to_owned();
    if tree
        .join("boot")
        .join(format!("vmlinuz-{release}"))
        .is_file()
    {
        return Ok(release);
    }
    Err(KernelError::Layout {
        package: package.name.clone(),
        what: "boot/vmlinuz",
    })
}

fn write_images(tree: &Path, release: &str, out: &Path) -> Result<(), KernelError> {
    let source = tree.join("boot").join(format!("vmlinuz-{release}"));
    let image = fs::read(&source).map_err(FileError::on("reading", &source))?;
    let vmlinux = bzimage::extract_vmlinux(&image).map_err(|error| KernelError::BzImage {
        path: source,
        source: error,
    })?;
    make_dir(&out.join("modules"))?;
    for (name, data) in [("bzImage", &image), ("vmlinux", &vmlinux)] {
        let path = out.join(name);
        fs::write(&path, data).map_err(FileError::on("writing", &path))?;
    }
    Ok(())
}

/// File names of modules, in load order.
struct Modules {
    always: Vec<String>,
    /// After the others.
    network: Vec<String>,
}

/// Copies the modules that the guest needs.
fn write_modules(
    tree: &Path,
    release: &str,
    package: &Package,
    out: &Path,
) -> Result<Modules, KernelError> {
    let folder = ["lib/modules", "usr/lib/modules"]
        .map(|prefix| tree.join(prefix).join(release))
        .into_iter()
        .find(|folder| folder.is_dir())
        .ok_or_else(|| KernelError::Layout {
            package: package.name.clone(),
            what: "lib/modules",
        })?;
    let builtin_path = folder.join("modules.builtin");
    let builtin = fs::read_to_string(&builtin_path)
        .map_err(FileError::on("reading", &builtin_path))
        .map(|text| modules::builtin_names(&text))?;
    let mut files = BTreeMap::new();
    index_modules(&folder, &mut files)?;
    let mut info = |name: &str| -> Result<_, KernelError> {
        let Some(path) = files.get(name) else {
            return Ok(None);
        };
        let data = fs::read(path).map_err(FileError::on("reading", path))?;
        ModuleInfo::parse(&data)
            .map(Some)
            .map_err(|source| KernelError::Module {
                path: path.clone(),
                source,
            })
    };
    let always = modules::load_order(&WANTED, &builtin, &mut info)?;
    let wanted = [&WANTED[..], &WANTED_FOR_NETWORK].concat();
    // Begins as the other does: what is wanted later is visited later.
    let order = modules::load_order(&wanted, &builtin, &mut info)?;
    let mut names = Vec::with_capacity(order.len());
    for name in order {
        let file_name = format!("{name}.ko");
        let to = out.join("modules").join(&file_name);
        fs::copy(&files[&name], &to).map_err(FileError::on("writing", &to))?;
        names.push(file_name);
    }
    let network = names.split_off(always.len());
    Ok(Modules {
        always: names,
        network,
    })
}

/// Finds every module file below `folder`; the key is its normalised name.
fn index_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), FileError> {
    for entry in fs::read_dir(folder).map_err(FileError::on("listing", folder))? {
        let path = entry.map_err(FileError::on("listing", folder))?.path();
        if path.is_dir() {
            index_modules(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|n| n.to_str()) {
            // A compressed module (.ko.xz) is indexed as well: reading it then says what it is not.
            if let Some((name, _)) = name.split_once(".ko") {
                files.insert(modules::normalise(name), path);
            }
        }
    }
    Ok(())
}

fn write_manifest(
    out: &Path,
    package: Package,
    release: String,
    modules: Modules,
) -> Result<(), KernelError> {
    let Modules { always, network } = modules;
    let names = ["bzImage".to_owned(), "vmlinux".to_owned()]
        .into_iter()
        .chain((always.iter().chain(&network)).map(|name| format!("modules/{name}")));
    let mut files = BTreeMap::new();
    for name in names {
        let path = out.join(&name);
        let size = fs::metadata(&path)
            .map_err(FileError::on("reading", &path))?
            .len();
        files.insert(
            name,
            FileRecord {
                sha256: digest::file(&path)?,
                size,
            },
        );
    }
    let manifest = Manifest {
        recipe: RECIPE,
        release,
        package,
        modules: always,
        network_modules: network,
        files,
    };
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest has string keys only");
    let path = out.join(MANIFEST);
    fs::write(&path, text).map_err(FileError::on("writing", &path))?;
    Ok(())
}
