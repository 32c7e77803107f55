//! The Lambda client for Node.js, as pinned npm packages.
//!
//! npm fetches them, from whatever registry the user has configured, and npm itself comes with a Node.js that PyPI has as a
//! wheel, unpacked for the time of the download: the distribution's npm brings some 400 packages.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha512};

use super::wheels::{self, ANY_PYTHON, NODEJS_FOLDER, NODEJS22, WheelError};
use crate::fault::FileError;
use crate::progress::Progress;
use crate::staging::{Staging, make_dir};
use crate::tool::{NODE, TAR, ToolError};

/// An npm package, pinned to one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct NpmPackage {
    pub(super) name: &'static str,
    version: &'static str,
    /// SHA-512 of the file, as package-lock.json has it.
    integrity: &'static str,
}

/// The client, with the sources of its native part.
pub(super) const AWS_LAMBDA_RIC_3: NpmPackage = NpmPackage {
    name: "aws-lambda-ric",
    version: "3.3.0",
    integrity: "sha512-9p06TbKVK4a050NY/vYOxhMHvnIiUu5o1W0//q6yNLSqA/c91pn4BOj3C3sRTpplkUNsGJdU5qWyU2STo6L8hA==",
};

/// The client's next major version, whose native part is the same but for C++ that it is linked with.
pub(super) const AWS_LAMBDA_RIC_4: NpmPackage = NpmPackage {
    name: "aws-lambda-ric",
    version: "4.0.2",
    integrity: "sha512-FE5Vskx7mYNnqAnWWJXUOsLp2VGgdsJsCoRLFTa8L4Yk0QVtArqR8q58yPA++QC1a73ZWJXBQ2AH31nIAv7NOQ==",
};

/// The C++ headers that the client's native part is written with.
pub(super) const NODE_ADDON_API: NpmPackage = NpmPackage {
    name: "node-addon-api",
    version: "6.1.0",
    integrity: "sha512-+eawOlIgy680F0kBzPUNFhMZGtJ1YmqM6l4+Crf4IkImjYrO/mqPwRMh352g23uIaQKFItcQ64I7KMaJxHgAVA==",
};

/// One npm package as an image's manifest lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NpmRecord {
    /// The package's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Digest of its file, as package-lock.json writes it.
    pub integrity: String,
}

/// npm packages could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NpmError {
    /// npm itself could not be had.
    #[error("getting npm")]
    Wheel(#[from] WheelError),
    /// npm or tar failed.
    #[error("downloading with npm")]
    Tool(#[from] ToolError),
    /// A file operation failed.
    #[error("using the cache of npm packages")]
    File(#[from] FileError),
    /// npm brought another file than the pinned one.
    #[error("the npm package {file} is missing or has the wrong digest")]
    Corrupt {
        /// The pinned file's name.
        file: String,
    },
}

impl NpmPackage {
    /// As the manifest lists it.
    pub(super) fn record(&self) -> NpmRecord {
        NpmRecord {
            name: self.name.to_owned(),
            version: self.version.to_owned(),
            integrity: self.integrity.to_owned(),
        }
    }

    fn file(&self) -> String {
        format!("{}-{}.tgz", self.name, self.version)
    }

    fn is_in(&self, cache: &Path) -> bool {
        fs::read(cache.join(self.file())).is_ok_and(|data| {
            let digest = STANDARD.encode(Sha512::digest(data));
            self.integrity.strip_prefix("sha512-") == Some(digest.as_str())
        })
    }

    /// Unpacks the package into a folder of its own in `into`, and returns that.
    pub(super) fn unpack(&self, cache: &Path, into: &Path) -> Result<PathBuf, NpmError> {
        let folder = into.join(format!("{}-{}", self.name, self.version));
        make_dir(&folder)?;
        untar(&cache.join(self.file()), &folder)?;
        Ok(folder)
    }
}

/// Unpacks an archive whose files are all in one folder, which is left out.
pub(super) fn untar(archive: &Path, into: &Path) -> Result<(), ToolError> {
    TAR.run(|command| {
        command.args(["--extract", "--no-same-owner", "--strip-components=1"]);
        command.arg("--file").arg(archive);
        command.arg("--directory").arg(into);
    })
    .map(|_output| ())
}

/// Makes sure that every package is in `cache` with the right digest; npm's wheel goes to `wheel_cache`.
pub(super) fn download(
    cache: &Path,
    wheel_cache: &Path,
    packages: &[NpmPackage],
    staging: &Staging,
    progress: &mut dyn Progress,
) -> Result<(), NpmError> {
    if packages.iter().all(|package| package.is_in(cache)) {
        return Ok(());
    }
    wheels::download(wheel_cache, &[NODEJS22], ANY_PYTHON, progress)?;
    progress.detail("npm packages");
    let folder = staging.path().join("npm-itself");
    NODEJS22.unpack(wheel_cache, &folder, "/")?;
    let nodejs = folder.join(NODEJS_FOLDER);
    let node = nodejs.join("bin/node");
    let npm = nodejs.join("lib/node_modules/npm/bin/npm-cli.js");
    make_dir(cache)?;
    NODE.run_at(&node, |command| {
        command
            .arg(&npm)
            .args(["pack", "--silent", "--ignore-scripts"]);
        command.arg("--cache").arg(folder.join("cache"));
        command.arg("--pack-destination").arg(cache);
        command.args(packages.iter().map(|p| format!("{}@{}", p.name, p.version)));
        command.current_dir(&folder);
    })?;
    match packages.iter().find(|package| !package.is_in(cache)) {
        Some(package) => Err(NpmError::Corrupt {
            file: package.file(),
        }),
        None => Ok(()),
    }
}
