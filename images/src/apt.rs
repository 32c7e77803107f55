//! Distribution packages: which ones an image needs, and their files, checked and cached.
//!
//! Packages are resolved against an empty system (a private state with no installed package), so
//! that the answer depends on the package lists alone and not on what this host has installed.
//! Only the distribution's own packages count; other configured sources are pinned away.

mod suite;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::digest;
use crate::fault::FileError;
use crate::progress::Progress;
use crate::staging::{lock_file, make_dir, remove_tree};
use crate::tool::{APT_GET, DPKG_DEB, TAR, ToolError};
pub(crate) use suite::Suite;

/// Leaves only packages whose release file says that Debian made them (apt_preferences(5)); of two
/// records that match, the first counts.
const PREFERENCES: &str = "Package: *\nPin: release o=Debian\nPin-Priority: 500\n\n\
    Package: *\nPin: release *\nPin-Priority: -1\n";

/// One package as an image's manifest lists it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// Its full version, epoch included.
    pub version: String,
    /// SHA-256 of the package file, lower-case hexadecimal.
    pub sha256: String,
    /// The name of the package file in the cache.
    pub file: String,
}

/// Packages could not be resolved, downloaded or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The host's package lists are missing or older than the archive.
    #[error(
        "the package lists of this machine are missing or out of date: run `apt-get update` as root ({detail})"
    )]
    Lists {
        /// What apt said.
        detail: String,
    },
    /// The lists of another release are older than the archive, and could not be updated.
    #[error(
        "the package lists of Debian {suite} are out of date: is this machine online? ({detail})"
    )]
    SuiteLists {
        /// The release's code name.
        suite: &'static str,
        /// What apt said.
        detail: String,
    },
    /// The mirror has not got a release.
    #[error("the mirror {mirror} has no Debian {suite} ({detail})")]
    NoSuite {
        /// The release's code name.
        suite: &'static str,
        /// The mirror, as this machine's sources name it.
        mirror: String,
        /// What apt said.
        detail: String,
    },
    /// Debian's keys are not installed.
    #[error("{path} is missing: install the package debian-archive-keyring")]
    NoKeyring {
        /// The file with the keys.
        path: &'static str,
    },
    /// A release's lists are signed with a key that this machine has not got.
    #[error(
        "the package lists of Debian {suite} are signed with an unknown key: install today's version of debian-archive-keyring ({detail})"
    )]
    Key {
        /// The release's code name.
        suite: &'static str,
        /// What apt said.
        detail: String,
    },
    /// A package or a list could not be fetched: no network, or an unreachable mirror.
    #[error("the packages could not be downloaded: is this machine online? ({detail})")]
    Download {
        /// What apt said first.
        detail: String,
    },
    /// A program failed.
    #[error("using the package tools")]
    Tool(#[from] ToolError),
    /// A file operation failed.
    #[error("using the package cache")]
    File(#[from] FileError),
    /// apt's answer was not understood.
    #[error("apt printed a line that is no package file: {line:?}")]
    Answer {
        /// The line.
        line: String,
    },
    /// A downloaded file is not what the package lists promise.
    #[error("the package file {file} has the wrong digest or size")]
    Corrupt {
        /// The file's name.
        file: String,
    },
    /// The resolver left out what was asked for.
    #[error("no package named {name} in the package lists")]
    Absent {
        /// What was looked for.
        name: String,
    },
}

/// The private apt state and the package cache under one folder.
///
/// Locked for as long as this lives, because several stores may share the folder.
#[derive(Debug)]
pub(crate) struct Apt {
    root: PathBuf,
    /// Of the suite; another has a state of its own.
    state: PathBuf,
    suite: Suite,
    _lock: File,
}

impl Apt {
    /// `root` is made if need be. The packages are those of this machine's lists.
    pub(crate) fn new(root: &Path) -> Result<Self, PackageError> {
        make_dir(root)?;
        let lock = lock_file(&root.join("lock"))?;
        Self::in_state(root.to_owned(), root.join("state"), Suite::Machine, lock)
    }

    fn in_state(
        root: PathBuf,
        state: PathBuf,
        suite: Suite,
        _lock: File,
    ) -> Result<Self, PackageError> {
        for folder in [&state.join("index"), &root.join("debs")] {
            make_dir(folder)?;
        }
        for (name, text) in [("status", ""), ("preferences", PREFERENCES)] {
            let path = state.join(name);
            fs::write(&path, text).map_err(FileError::on("writing", &path))?;
        }
        Ok(Self {
            root,
            state,
            suite,
            _lock,
        })
    }

    /// The cache folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn configure(&self, command: &mut Command) {
        let path = |name: &str| self.state.join(name).display().to_string();
        for option in [
            format!("Dir::State::status={}", path("status")),
            format!("Dir::State::extended_states={}", path("extended_states")),
            format!("Dir::Etc::preferences={}", path("preferences")),
            format!("Dir::Etc::preferencesparts={}", path("preferences.d")),
            format!("Dir::Cache={}", path("index")),
            "Acquire::ForceHash=SHA256".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            "APT::Install-Recommends=false".to_owned(),
            "APT::Install-Suggests=false".to_owned(),
            // The download user of root's apt may not enter the cache folder.
            "APT::Sandbox::User=".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        if let Suite::Debian(_) = self.suite {
            for option in [
                format!("Dir::State::lists={}", path("lists")),
                format!("Dir::Etc::sourcelist={}", path("debian.sources")),
                "Dir::Etc::sourceparts=/dev/null".to_owned(),
                "Acquire::Languages=none".to_owned(),
            ] {
                command.arg("-o").arg(option);
            }
        }
    }

    /// `names` and all they depend on, sorted by name.
    pub(crate) fn resolve(&self, names: &[&str]) -> Result<Vec<Package>, PackageError> {
        let answer = APT_GET
            .run(|command| {
                self.configure(command);
                command
                    .args(["install", "-qq", "-y", "--print-uris"])
                    .args(names);
            })
            .map_err(|error| self.explain(error))?;
        let mut packages = BTreeMap::new();
        for line in String::from_utf8_lossy(&answer).lines() {
            let package = parse_uri_line(line).ok_or_else(|| PackageError::Answer {
                line: line.to_owned(),
            })?;
            packages.insert(package.name.clone(), package);
        }
        Ok(packages.into_values().collect())
    }

    /// Makes sure that every package's file is in the cache with the right digest.
    pub(crate) fn download(
        &self,
        packages: &[Package],
        progress: &mut dyn Progress,
    ) -> Result<(), PackageError> {
        let missing: Vec<&Package> = packages.iter().filter(|p| !self.is_cached(p)).collect();
        progress.detail(&format!(
            "{} of {} to download",
            missing.len(),
            packages.len()
        ));
        if missing.is_empty() {
            return Ok(());
        }
        let incoming = self.root.join("incoming");
        clear(&incoming)?;
        make_dir(&incoming)?;
        let outcome = self.fetch(&missing, &incoming);
        // Half a download would only take the room that the next try needs.
        clear(&incoming)?;
        outcome
    }

    /// Downloads into `incoming`, checks, and moves into the cache.
    fn fetch(&self, packages: &[&Package], incoming: &Path) -> Result<(), PackageError> {
        APT_GET
            .run(|command| {
                self.configure(command);
                command.current_dir(incoming).args(["download", "-qq"]);
                command.args(packages.iter().map(|p| format!("{}={}", p.name, p.version)));
            })
            .map_err(|error| match error.stderr() {
                stderr if stderr.contains("No space left on device") => {
                    FileError::on("writing", incoming)(ErrorKind::StorageFull.into()).into()
                }
                _ => self.explain(error),
            })?;
        for package in packages {
            let from = incoming.join(&package.file);
            if digest::file(&from)? != package.sha256 {
                return Err(PackageError::Corrupt {
                    file: package.file.clone(),
                });
            }
            let to = self.root.join("debs").join(&package.file);
            fs::rename(&from, &to).map_err(FileError::on("renaming to", &to))?;
        }
        Ok(())
    }

    fn is_cached(&self, package: &Package) -> bool {
        digest::file(&self.root.join("debs").join(&package.file))
            .is_ok_and(|digest| digest == package.sha256)
    }

    /// Unpacks a package's files into `tree`; runs no maintainer script. `scratch` is overwritten.
    ///
    /// Where the tree has a link to a folder (the merged `/bin`), the files go where it points;
    /// `dpkg-deb --extract` would replace the link.
    pub(crate) fn unpack(
        &self,
        package: &Package,
        scratch: &Path,
        tree: &Path,
    ) -> Result<(), PackageError> {
        let file = self.root.join("debs").join(&package.file);
        let archive = DPKG_DEB.run(|command| {
            command.arg("--fsys-tarfile").arg(&file);
        })?;
        fs::write(scratch, archive).map_err(FileError::on("writing", scratch))?;
        TAR.run(|command| {
            command.args(["--extract", "--keep-directory-symlink", "--no-same-owner"]);
            command
                .arg("--file")
                .arg(scratch)
                .arg("--directory")
                .arg(tree);
        })
        .map_err(
            |error| match error.stderr().contains("No space left on device") {
                true => FileError::on("unpacking into", tree)(ErrorKind::StorageFull.into()).into(),
                false => PackageError::Tool(error),
            },
        )?;
        fs::remove_file(scratch)
            .map_err(FileError::on("removing", scratch))
            .map_err(PackageError::File)
    }

    /// Tells the failures that users meet, out-of-date lists and no network, from the others.
    fn explain(&self, error: ToolError) -> PackageError {
        const OUT_OF_DATE: [&str; 4] = [
            "Unable to locate package",
            "has no installation candidate",
            "404  Not Found",
            "was not found",
        ];
        const UNREACHABLE: [&str; 1] = ["Failed to fetch"];
        if let Some(detail) = line_with(error.stderr(), &OUT_OF_DATE) {
            return match self.suite {
                Suite::Machine => PackageError::Lists { detail },
                Suite::Debian(suite) => PackageError::SuiteLists { suite, detail },
            };
        }
        match line_with(error.stderr(), &UNREACHABLE) {
            Some(detail) => PackageError::Download { detail },
            None => PackageError::Tool(error),
        }
    }
}

fn clear(folder: &Path) -> Result<(), FileError> {
    match remove_tree(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(FileError::on("removing", folder)(error))
        }
        _ => Ok(()),
    }
}

/// The first line of `text` with one of `signs` in it.
fn line_with(text: &str, signs: &[&str]) -> Option<String> {
    let mut lines = text.lines();
    lines
        .find(|line| signs.iter().any(|sign| line.contains(sign)))
        .map(|line| line.trim().to_owned())
}

/// Reads a line of `apt-get --print-uris`: `'URI' NAME_VERSION_ARCH.deb SIZE SHA256:DIGEST`.
fn parse_uri_line(line: &str) -> Option<Package> {
    let mut fields = line.rsplitn(4, ' ');
    let sha256 = fields.next()?.strip_prefix("SHA256:")?;
    let _size: u64 = fields.next()?.parse().ok()?;
    let file = fields.next()?;
    let mut parts = file.strip_suffix(".deb")?.splitn(3, '_');
    let (name, version, _arch) = (parts.next()?, parts.next()?, parts.next()?);
    let is_digest = sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_digest || name.is_empty() || name.starts_with('-') || file.contains('/') {
        return None;
    }
    Some(Package {
        name: name.to_owned(),
        // apt escapes the epoch's colon in file names.
        version: version.replace("%3a", ":"),
        sha256: sha256.to_owned(),
        file: file.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "c4945123d66d0503ba42e2fc0585abc76d0838978c6d277b9cc37a4da25d1a34";

    #[test]
    fn a_line_with_an_epoch_is_read() {
        let line =
            format!("'scheme://host/a_b.deb' libattr1_1%3a2.5.1-4_amd64.deb 22164 SHA256:{DIGEST}");
        let package = parse_uri_line(&line).unwrap();
        assert_eq!(package.name, "libattr1");
        assert_eq!(package.version, "1:2.5.1-4");
        assert_eq!(package.file, "libattr1_1%3a2.5.1-4_amd64.deb");
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [
            String::new(),
            "Reading package lists...".to_owned(),
            format!("'u' a_1_amd64.deb 1 MD5Sum:{DIGEST}"),
            format!("'u' a_1_amd64.deb x SHA256:{DIGEST}"),
            format!("'u' ../a_1_amd64.deb 1 SHA256:{DIGEST}"),
            format!("'u' -o_1_amd64.deb 1 SHA256:{DIGEST}"),
        ] {
            assert_eq!(parse_uri_line(&line), None, "{line}");
        }
    }
}
