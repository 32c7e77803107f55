//! Releases of Debian other than this machine's: package lists of their own, fetched without root.
//!
//! The mirror is the one that this machine gets its own packages from, so that a local one goes on serving; the key is Debian's,
//! from the keyring package that every Debian has.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::{Apt, PackageError, line_with};
use crate::fault::FileError;
use crate::progress::Progress;
use crate::staging::make_dir;
use crate::tool::APT_GET;

/// Where packages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Suite {
    /// The package lists of this machine.
    Machine,
    /// A stable release of Debian, by its code name.
    Debian(&'static str),
}

/// Holds the keys of the releases before, at and after the one that it came with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where this machine gets Debian's packages from.
#[derive(Debug, PartialEq, Eq)]
struct Mirrors {
    archive: String,
    /// None where the machine has no source of security updates.
    security: Option<String>,
}

impl Mirrors {
    /// Reads lines of labels and URIs; the first of each label counts.
    fn parse(lines: &str) -> Option<Self> {
        let of = |wanted: &str| {
            let mut pairs = lines.lines().filter_map(|line| line.split_once('\t'));
            pairs
                .find(|(label, _)| *label == wanted)
                .map(|(_, uri)| uri.to_owned())
        };
        Some(Self {
            archive: of("Debian")?,
            security: of("Debian-Security"),
        })
    }

    /// The text of a sources file (sources.list(5)): packages of `suite` alone, with its updates.
    fn sources(&self, suite: &str) -> String {
        let stanza = |uri: &str, suites: &str| {
            format!(
                "Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nTargets: Packages\nSigned-By: {KEYRING}\n\n"
            )
        };
        let mut text = stanza(&self.archive, &format!("{suite} {suite}-updates"));
        if let Some(security) = &self.security {
            text.push_str(&stanza(security, &format!("{suite}-security")));
        }
        text
    }
}

impl Apt {
    /// The same with the packages of `suite`, whose lists are brought up to date. Without a network, those of before serve.
    pub(crate) fn of(
        self,
        suite: Suite,
        progress: &mut dyn Progress,
    ) -> Result<Self, PackageError> {
        let Suite::Debian(name) = suite else {
            return Ok(self);
        };
        let mirrors = self.mirrors()?;
        progress.detail(&mirrors.archive);
        if !Path::new(KEYRING).is_file() {
            return Err(PackageError::NoKeyring { path: KEYRING });
        }
        let state = self.root.join(name);
        make_dir(&state.join("lists").join("partial"))?;
        let sources = state.join("debian.sources");
        fs::write(&sources, mirrors.sources(name)).map_err(FileError::on("writing", &sources))?;
        let apt = Self::in_state(self.root, state, suite, self._lock)?;
        match apt.update(name, &mirrors) {
            Err(PackageError::Download { detail }) if apt.has_lists() => {
                progress.detail(&format!("those of before are used ({detail})"));
            }
            other => other?,
        }
        Ok(apt)
    }

    fn mirrors(&self) -> Result<Mirrors, PackageError> {
        let answer = APT_GET.run(|command| {
            self.configure(command);
            command.args(["indextargets", "--format", "$(LABEL)\t$(REPO_URI)"]);
            command.args(["Created-By: Packages", "Origin: Debian", "Component: main"]);
        })?;
        Mirrors::parse(&String::from_utf8_lossy(&answer)).ok_or_else(|| PackageError::Lists {
            detail: "no list of Debian's packages".to_owned(),
        })
    }

    fn update(&self, suite: &'static str, mirrors: &Mirrors) -> Result<(), PackageError> {
        let updated = APT_GET.run(|command| {
            self.configure(command);
            command.args(["update", "-qq", "--error-on=any"]);
        });
        let Err(error) = updated else { return Ok(()) };
        let said = |signs: &[&str]| line_with(error.stderr(), signs);
        Err(
            if let Some(detail) = said(&["NO_PUBKEY", "is not signed", "couldn't be verified"]) {
                PackageError::Key { suite, detail }
            } else if let Some(detail) = said(&["does not have a Release file"]) {
                PackageError::NoSuite {
                    suite,
                    mirror: mirrors.archive.clone(),
                    detail,
                }
            } else if let Some(detail) = said(&["Failed to fetch", "Could not resolve"]) {
                PackageError::Download { detail }
            } else {
                PackageError::Tool(error)
            },
        )
    }

    fn has_lists(&self) -> bool {
        let lists = fs::read_dir(self.state.join("lists"));
        lists.is_ok_and(|mut lists| {
            lists.any(|list| {
                list.is_ok_and(|list| list.file_name().to_string_lossy().contains("_Packages"))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Quiet;

    const LINES: &str = "Debian\thttp://mirror/debian/\nDebian\thttp://mirror/debian/\n\
        Debian Backports\thttp://mirror/backports/\nDebian-Security\thttp://mirror/security/\n";

    #[test]
    fn another_release_comes_from_the_machines_own_mirror() {
        let mirrors = Mirrors::parse(LINES).unwrap();
        let sources = mirrors.sources("trixie");
        assert!(sources.contains("URIs: http://mirror/debian/\nSuites: trixie trixie-updates\n"));
        assert!(sources.contains("URIs: http://mirror/security/\nSuites: trixie-security\n"));
        assert_eq!(sources.matches("Signed-By: /").count(), 2);
        let without = Mirrors::parse("Debian\thttp://mirror/\n").unwrap();
        assert!(!without.sources("trixie").contains("security"));
        assert_eq!(Mirrors::parse("Ubuntu\thttp://mirror/\n"), None);
    }

    #[test]
    fn a_release_that_cannot_be_had_is_named_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("cache");
        let update = |uri: &str| {
            let state = root.join("absent");
            make_dir(&state.join("lists/partial")).unwrap();
            let mirrors = Mirrors {
                archive: uri.to_owned(),
                security: None,
            };
            fs::write(state.join("debian.sources"), mirrors.sources("absent")).unwrap();
            let machine = Apt::new(&root).unwrap();
            let suite = Suite::Debian("absent");
            let apt = Apt::in_state(root.clone(), state, suite, machine._lock).unwrap();
            assert!(!apt.has_lists());
            apt.update("absent", &mirrors).unwrap_err()
        };
        let empty = tempfile::tempdir().unwrap();
        let error = update(&format!("file://{}", empty.path().display()));
        assert!(matches!(error, PackageError::NoSuite { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("has no Debian absent"), "{text}");
        // Port 1 of this machine answers nobody.
        let error = update("http://127.0.0.1:1/debian");
        assert!(matches!(error, PackageError::Download { .. }), "{error:?}");
    }

    #[test]
    fn the_machines_own_packages_need_no_other_lists() {
        let folder = tempfile::tempdir().unwrap();
        let apt = Apt::new(folder.path()).unwrap();
        let apt = apt.of(Suite::Machine, &mut Quiet).unwrap();
        assert!(!apt.has_lists());
    }
}
