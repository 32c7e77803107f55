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
use crate::tool::{APT_GET, ToolError};

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
        updated
            .map(|_output| ())
            .map_err(|error| explain(suite, &mirrors.archive, error))
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

/// Why the lists of `suite` cannot be had.
fn explain(suite: &'static str, mirror: &str, error: ToolError) -> PackageError {
    let said = |signs: &[&str]| line_with(error.stderr(), signs);
    if let Some(detail) = said(&["NO_PUBKEY", "is not signed"]) {
        return PackageError::Key { suite, detail };
    }
    if let Some(detail) = said(&["does not have a Release file"]) {
        let mirror = mirror.to_owned();
        return PackageError::NoSuite {
            suite,
            mirror,
            detail,
        };
    }
    match said(&["Failed to fetch"]) {
        Some(detail) => PackageError::Download { detail },
        None => PackageError::Tool(error),
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
    fn a_release_that_the_mirror_lacks_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mirrors = Mirrors {
            archive: format!("file://{}", folder.path().display()),
            security: None,
        };
        let state = folder.path().join("absent");
        make_dir(&state.join("lists/partial")).unwrap();
        fs::write(state.join("debian.sources"), mirrors.sources("absent")).unwrap();
        let machine = Apt::new(folder.path()).unwrap();
        let suite = Suite::Debian("absent");
        let apt = Apt::in_state(machine.root, state, suite, machine._lock).unwrap();
        assert!(!apt.has_lists());
        let error = apt.update("absent", &mirrors).unwrap_err();
        assert!(matches!(error, PackageError::NoSuite { .. }), "{error:?}");
        assert!(error.to_string().contains("has no Debian absent"));
    }

    #[test]
    fn a_missing_key_and_a_missing_network_are_told_apart() {
        let explain = |stderr: &str| {
            let error = ToolError::Failed {
                tool: "apt-get",
                status: std::os::unix::process::ExitStatusExt::from_raw(100 << 8),
                stderr: stderr.to_owned(),
            };
            explain("trixie", "http://mirror/debian", error)
        };
        // As apt 2.6 says it.
        let error = explain(
            "W: GPG error: http://mirror/debian trixie InRelease: The following signatures couldn't be verified because the \
             public key is not available: NO_PUBKEY 6ED0E7B82643E131\n\
             E: The repository 'http://mirror/debian trixie InRelease' is not signed.",
        );
        let text = error.to_string();
        assert!(text.contains("debian-archive-keyring") && text.contains("NO_PUBKEY 6ED0"));
        let error = explain(
            "E: Failed to fetch http://mirror/debian/dists/trixie/InRelease  Could not resolve 'mirror'\n\
             E: Some index files failed to download. They have been ignored, or old ones used instead.",
        );
        assert!(error.to_string().contains("is this machine online?"));
        assert!(matches!(explain("E: another"), PackageError::Tool(_)));
    }

    #[test]
    fn the_machines_own_packages_need_no_other_lists() {
        let folder = tempfile::tempdir().unwrap();
        let apt = Apt::new(folder.path()).unwrap();
        let apt = apt.of(Suite::Machine, &mut Quiet).unwrap();
        assert!(!apt.has_lists());
    }
}
