//! Base images: the root file systems that functions run in.

mod addons;
mod assemble;
mod ldcache;
mod name;
mod npm;
mod recipe;
mod table;
mod wheels;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::apt::{Apt, Package, PackageError, Suite};
use crate::digest;
use crate::erofs::{self, ErofsError};
use crate::fault::{Fault, FileError};
use crate::progress::{Progress, step};
use crate::staging::{Staging, StagingError, install, make_dir};
use crate::tool::{GXX, ToolError};
pub use ldcache::LdCacheError;
pub use name::{RuntimeName, UnknownRuntime};
use npm::NpmPackage;
pub use npm::{NpmError, NpmRecord};
use recipe::Recipe;
use table::Language;
pub use wheels::WheelError;
use wheels::{ANY_PYTHON, Wheel};

const MANIFEST: &str = "manifest.json";
const ROOTFS: &str = "rootfs.erofs";

/// A runtime's root file system on disk, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeImage {
    /// The runtime.
    pub name: RuntimeName,
    /// A read-only erofs image.
    pub rootfs: PathBuf,
    /// SHA-256 of the image, hexadecimal.
    pub digest: String,
    /// What it was made of.
    pub manifest: RuntimeManifest,
}

/// What an image was made of, and what came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeManifest {
    /// All that decides the image's bytes.
    pub contents: Contents,
    /// SHA-256 of the image, hexadecimal.
    pub sha256: String,
    /// Length of the image in bytes.
    pub size: u64,
}

/// All that decides an image's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contents {
    /// The runtime.
    pub runtime: RuntimeName,
    /// SHA-256 of the recipe; another recipe means that the image is built anew.
    pub recipe: String,
    /// Distribution packages, sorted by name.
    pub packages: Vec<Package>,
    /// The program that packed the image, with its version.
    pub packer: String,
    /// Python wheels.
    pub wheels: Vec<WheelRecord>,
    /// npm packages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub npm: Vec<NpmRecord>,
    /// The compiler of native parts, with its version, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compiler: Option<String>,
}

/// One wheel as an image's manifest lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WheelRecord {
    /// The file's name, which holds project, version and tags.
    pub file: String,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
}

/// A runtime's image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Packages could not be had.
    #[error("getting the packages of an image")]
    Package(#[from] PackageError),
    /// Wheels could not be had.
    #[error("getting the wheels of an image")]
    Wheel(#[from] WheelError),
    /// npm packages could not be had.
    #[error("getting the npm packages of an image")]
    Npm(#[from] NpmError),
    /// A native part does not run in the image.
    #[error(
        "{addon}, compiled on this machine, does not run in the image ({line}): make the image on Debian 12"
    )]
    Addon {
        /// The native part.
        addon: String,
        /// What the image's loader says.
        line: String,
    },
    /// The loader's cache could not be written.
    #[error("indexing the shared libraries of an image")]
    LdCache(#[from] LdCacheError),
    /// A program failed.
    #[error("building an image")]
    Tool(#[from] ToolError),
    /// The file system could not be packed.
    #[error("packing an image")]
    Erofs(#[from] ErofsError),
    /// A file operation failed.
    #[error("building an image")]
    File(#[from] FileError),
    /// No scratch folder.
    #[error("building an image")]
    Staging(#[from] StagingError),
    /// Another process was to make it.
    #[error("the image {name} was ordered, and not made: {reason}")]
    Ordered {
        /// The runtime.
        name: RuntimeName,
        /// What that process said.
        reason: String,
    },
    /// The finished image is not there.
    #[error("the image {} vanished while it was built", path.display())]
    Vanished {
        /// Where it should be.
        path: PathBuf,
    },
}

impl ImageError {
    /// Base images hold nothing of the caller's.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        Fault::Host
    }
}

/// The image in `folder`, if there is a complete one of today's recipe. Reads the manifest alone.
pub(crate) fn open(folder: &Path, name: RuntimeName) -> Option<RuntimeImage> {
    let text = fs::read(folder.join(MANIFEST)).ok()?;
    let manifest: RuntimeManifest = serde_json::from_slice(&text).ok()?;
    let rootfs = folder.join(ROOTFS);
    let size = fs::metadata(&rootfs).ok()?.len();
    let is_current = manifest.contents.recipe == Recipe::of(name).digest()
        && manifest.contents.runtime == name
        && manifest.size == size;
    is_current.then(|| RuntimeImage {
        name,
        rootfs,
        digest: manifest.sha256.clone(),
        manifest,
    })
}

/// Builds the image of `name` in scratch space and puts it at `folder`.
pub(crate) fn build(
    folder: &Path,
    name: RuntimeName,
    apt: Apt,
    staging: &Staging,
    progress: &mut dyn Progress,
) -> Result<RuntimeImage, ImageError> {
    let recipe = Recipe::of(name);
    let apt = &match recipe.suite {
        Suite::Machine => apt,
        Suite::Debian(suite) => step(
            progress,
            &format!("update the package lists of Debian {suite}"),
            |progress| apt.of(recipe.suite, progress),
        )?,
    };
    let packages = step(progress, "resolve packages", |progress| {
        let packages = resolve(&recipe, apt)?;
        progress.detail(&format!("{} packages", packages.len()));
        Ok::<_, ImageError>(packages)
    })?;
    step(progress, "download packages", |progress| {
        apt.download(&packages, progress)?;
        apt.download(&addons::headers(&recipe, apt)?, progress)?;
        let (npm, wheels) = (apt.root().join("npm"), apt.root().join("wheels"));
        npm::download(&npm, &wheels, &recipe.npm, staging, progress)?;
        let python = recipe.python.unwrap_or(ANY_PYTHON);
        wheels::download(&wheels, &recipe.wheels(), python, progress)?;
        Ok::<_, ImageError>(())
    })?;
    let tree = staging.path().join("root");
    step(progress, "unpack packages", |_| {
        assemble::unpack(&recipe, &packages, apt, staging, &tree)
    })?;
    let mut compiler = None;
    if let Language::Node(node) = &name.row().language {
        step(progress, "compile native parts", |_| {
            addons::build(&recipe, &node.client, apt, staging, &tree)
        })?;
        compiler = Some(GXX.version("--version")?);
    }
    step(progress, "finish the root file system", |progress| {
        assemble::finish(&recipe, &tree, progress)
    })?;
    let contents = Contents {
        runtime: name,
        recipe: recipe.digest(),
        packages,
        packer: erofs::packer()?,
        wheels: recipe.wheels().iter().map(Wheel::record).collect(),
        npm: recipe.npm.iter().map(NpmPackage::record).collect(),
        compiler,
    };
    step(progress, "pack the image", |progress| {
        let out = staging.path().join("image");
        make_dir(&out)?;
        let rootfs = out.join(ROOTFS);
        let seed = serde_json::to_vec(&contents).expect("a manifest has string keys only");
        erofs::pack(&tree, &rootfs, &erofs::uuid_of(&seed))?;
        let size = fs::metadata(&rootfs)
            .map_err(FileError::on("reading", &rootfs))?
            .len();
        progress.detail(&format!("{} MiB", size >> 20));
        let manifest = RuntimeManifest {
            contents,
            sha256: digest::file(&rootfs)?,
            size,
        };
        let text = serde_json::to_vec_pretty(&manifest).expect("a manifest has string keys only");
        let path = out.join(MANIFEST);
        fs::write(&path, text).map_err(FileError::on("writing", &path))?;
        install(&out, folder)?;
        open(folder, name).ok_or_else(|| ImageError::Vanished {
            path: folder.to_owned(),
        })
    })
}

/// The packages of the recipe and what they depend on, less what only installing needs.
fn resolve(recipe: &Recipe, apt: &Apt) -> Result<Vec<Package>, ImageError> {
    let wanted: Vec<&str> = recipe.packages.iter().map(String::as_str).collect();
    let mut packages = apt.resolve(&wanted)?;
    for wanted in &recipe.packages {
        if !packages.iter().any(|package| package.name == *wanted) {
            return Err(PackageError::Absent {
                name: wanted.clone(),
            }
            .into());
        }
    }
    packages.retain(|package| !recipe.without.contains(&package.name.as_str()));
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_of_another_recipe_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(ROOTFS), "12345").unwrap();
        let manifest = |recipe: String, size| RuntimeManifest {
            contents: Contents {
                runtime: RuntimeName::PROVIDED,
                recipe,
                packages: Vec::new(),
                packer: String::new(),
                wheels: Vec::new(),
                npm: Vec::new(),
                compiler: None,
            },
            sha256: String::new(),
            size,
        };
        let is_found = |manifest: &RuntimeManifest| {
            let text = serde_json::to_vec(manifest).unwrap();
            fs::write(folder.path().join(MANIFEST), text).unwrap();
            open(folder.path(), RuntimeName::PROVIDED).is_some()
        };
        let recipe = Recipe::of(RuntimeName::PROVIDED).digest();
        assert!(is_found(&manifest(recipe.clone(), 5)));
        assert!(!is_found(&manifest(recipe, 6)));
        assert!(!is_found(&manifest("another".to_owned(), 5)));
    }
}
