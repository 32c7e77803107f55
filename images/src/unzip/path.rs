//! Names of zip entries and targets of their symbolic links, held within one folder.

use std::fmt;
use std::path::Path;

/// Longest path of an entry, in bytes; with the folder's own before it, well below the kernel's 4096.
const PATH_BYTES_MAX: usize = 2048;
/// Longest component: NAME_MAX.
const COMPONENT_BYTES_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes.
pub(super) const LINK_BYTES_MAX: u64 = 2048;
/// A clean relative path: no empty, `.` or `..` component. The folder itself is the empty path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EntryPath(Vec<String>);

impl EntryPath {
    /// Checks an entry's name; the error is the reason to refuse it.
    pub(super) fn parse(name: &str) -> Result<Self, &'static str> {
        if name.len() > PATH_BYTES_MAX {
            return Err("has too long a name");
        }
        if name.contains(['\0', '\\']) {
            return Err("has a backslash or a NUL in its name");
        }
        if name.starts_with('/') || has_drive(name) {
            return Err("has an absolute name");
        }
        let mut components = Vec::new();
        for component in name.split('/') {
            match component {
                "" | "." => {}
                ".." => return Err("leaves the folder"),
                long if long.len() > COMPONENT_BYTES_MAX => return Err("has too long a name"),
                fit => components.push(fit.to_owned()),
            }
        }
        Ok(Self(components))
    }

    pub(super) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is somewhere below `folder`.
    pub(super) fn lies_in(&self, folder: &Self) -> bool {
        self.0.len() > folder.0.len() && self.0.starts_with(&folder.0)
    }

    /// The folders above, outermost first, the root left out.
    pub(super) fn parents(&self) -> impl Iterator<Item = Self> + '_ {
        (1..self.0.len()).map(|length| Self(self.0[..length].to_vec()))
    }

    pub(super) fn as_path(&self) -> std::path::PathBuf {
        self.0.iter().map(Path::new).collect()
    }
}

impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("/"))
    }
}

/// `C:` and the like.
fn has_drive(name: &str) -> bool {
    matches!(name.as_bytes(), [letter, b':', ..] if letter.is_ascii_alphabetic())
}

/// Whether a link at `link` to `target` stays within the folder, which the guest sees at `mounted_at`.
///
/// `..` may only lead: after another component it could climb out of where a further link points.
pub(super) fn is_inside(link: &EntryPath, target: &str, mounted_at: &str) -> bool {
    let too_long = u64::try_from(target.len()).map_or(true, |length| length > LINK_BYTES_MAX);
    if target.is_empty() || too_long || target.contains('\0') {
        return false;
    }
    let (mut depth, rest) = match target.strip_prefix(mounted_at) {
        Some("") => return true,
        Some(rest) if rest.starts_with('/') => (0, rest),
        _ if target.starts_with('/') => return false,
        _ => (link.0.len().saturating_sub(1), target),
    };
    let mut may_climb = true;
    for component in rest.split('/') {
        match component {
            "" | "." => {}
            ".." if may_climb && depth > 0 => depth -= 1,
            ".." => return false,
            _ => may_climb = false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in [
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            "C:/x",
            "c:x",
            "a\\..\\b",
            "a\0b",
        ] {
            assert!(EntryPath::parse(name).is_err(), "{name:?}");
        }
        assert!(EntryPath::parse(&"a/".repeat(PATH_BYTES_MAX)).is_err());
        assert!(EntryPath::parse(&"a".repeat(256)).is_err());
    }

    #[test]
    fn the_same_place_has_one_path() {
        let plain = EntryPath::parse("a/b").unwrap();
        for name in ["./a/b", "a//b", "a/./b/", "a/b/"] {
            assert_eq!(EntryPath::parse(name).unwrap(), plain);
        }
    }

    #[test]
    fn links_stay_inside() {
        let inside =
            |link, target| is_inside(&EntryPath::parse(link).unwrap(), target, "/var/task");
        assert!(inside("lib.so", "lib.so.1"));
        assert!(inside("a/b/c", "../../x"));
        assert!(inside("a", "/var/task/x"));
        for (link, target) in [
            ("a", "../x"),
            ("a/b", "../../x"),
            ("a", "/etc/passwd"),
            ("a", "/var/task/../x"),
            ("a", "/var/taskless"),
            ("a/b", "c/../../.."),
            ("a/b", "c/.."),
            ("a", ""),
        ] {
            assert!(!inside(link, target), "{link} -> {target}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_stays_below(name in "([a-c./\\\\:]|\\.\\.|/){0,12}") {
            if let Ok(path) = EntryPath::parse(&name) {
                for component in path.as_path().components() {
                    prop_assert!(matches!(component, std::path::Component::Normal(_)));
                }
            }
        }
    }
}
