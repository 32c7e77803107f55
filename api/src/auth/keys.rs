//! Access keys: what they are made of, what they may do, and the file of the gateway's own one.
//!
//! Secrets must be known in full to check a signature, so they are stored as they are: the database and the root key's file
//! are for their owner alone (mode 0600).

use std::fmt;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use thaw_api_types::keys::{Allow, ChangeKeyRequest, CreateKeyRequest, KeyLimits, KeySummary};
use thiserror::Error;

use super::quota;
use super::signer::Signer;

/// Longest name of a key, and longest pattern.
const NAME_CHARS_MAX: usize = 64;
/// Name of the root key, in refusals and lists.
pub const ROOT: &str = "root";
/// All functions.
pub const ANY: &str = "*";
/// File of the root key, below `THAW_HOME`.
pub const ROOT_FILE: &str = "root-key";

/// A key, as it is stored.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessKey {
    /// `AKIA` and 16 characters of base32.
    pub id: String,
    /// 40 characters of base64.
    pub secret: String,
    /// For people.
    pub name: String,
    /// What it may do.
    pub allow: Allow,
    /// Functions it may do it with: a name with `*` and `?`.
    pub functions: String,
    /// Whether it is let in.
    pub enabled: bool,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_unix_ms: i64,
    /// What it may use.
    pub limits: KeyLimits,
}

/// Without the secret, so that no log has it.
impl fmt::Debug for AccessKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.summary())
    }
}

/// Why a key was not made.
#[derive(Debug, Error)]
pub enum KeyError {
    /// A value that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The operating system gave no random bytes.
    #[error("cannot draw random bytes")]
    Random,
}

impl AccessKey {
    /// Draws a key.
    ///
    /// # Errors
    /// The request makes no sense, or there is no randomness.
    pub fn draw(request: CreateKeyRequest, created_unix_ms: i64) -> Result<Self, KeyError> {
        let (id, secret) = draw()?;
        let name = request.name.unwrap_or_else(|| id.clone());
        let functions = request.functions.unwrap_or_else(|| ANY.to_owned());
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"+=,.@-_".contains(&byte);
        if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.bytes().all(is_name) {
            return Err(KeyError::Invalid(format!(
                "{name:?} is no name of a key: 1 to {NAME_CHARS_MAX} letters, digits and +=,.@-_"
            )));
        }
        let is_pattern = |byte: u8| byte.is_ascii_alphanumeric() || b"-_*?".contains(&byte);
        let fits = !functions.is_empty() && functions.len() <= NAME_CHARS_MAX;
        if !fits || !functions.bytes().all(is_pattern) {
            return Err(KeyError::Invalid(format!(
                "{functions:?} is no pattern of function names: letters, digits, -, _, * for any characters, ? for one"
            )));
        }
        quota::check(&request.limits).map_err(KeyError::Invalid)?;
        Ok(Self {
            id,
            secret,
            name,
            allow: request.allow,
            functions,
            enabled: true,
            created_unix_ms,
            limits: request.limits,
        })
    }

    /// The same, changed; what is not given stays.
    ///
    /// # Errors
    /// The limits make no sense.
    pub fn changed(&self, change: ChangeKeyRequest) -> Result<Self, KeyError> {
        let limits = change.limits.unwrap_or(self.limits);
        quota::check(&limits).map_err(KeyError::Invalid)?;
        Ok(Self {
            enabled: change.enabled.unwrap_or(self.enabled),
            limits,
            ..self.clone()
        })
    }

    /// Whether it may do something with this function.
    #[must_use]
    pub fn covers(&self, function: &str) -> bool {
        matches(self.functions.as_bytes(), function.as_bytes())
    }

    /// Whether it is for all functions, those to come included.
    #[must_use]
    pub fn covers_all(&self) -> bool {
        self.functions.bytes().all(|byte| byte == b'*')
    }

    /// All but the secret.
    #[must_use]
    pub fn summary(&self) -> KeySummary {
        KeySummary {
            access_key_id: self.id.clone(),
            name: self.name.clone(),
            allow: self.allow,
            functions: self.functions.clone(),
            enabled: self.enabled,
            created_unix_ms: self.created_unix_ms,
            limits: self.limits,
        }
    }
}

/// An id and a secret.
fn draw() -> Result<(String, String), KeyError> {
    use base64::Engine as _;
    const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let (random, mut id, mut secret) = (SystemRandom::new(), [0; 16], [0; 30]);
    random.fill(&mut id).map_err(|_| KeyError::Random)?;
    random.fill(&mut secret).map_err(|_| KeyError::Random)?;
    let letters = id.map(|byte| char::from(BASE32[usize::from(byte & 31)]));
    let id = format!("AKIA{}", letters.iter().collect::<String>());
    Ok((id, base64::engine::general_purpose::STANDARD.encode(secret)))
}

/// Whether a name fits a pattern of `*` and `?`. Backtracks to the last star alone, so it takes at most the product of the
/// two lengths.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut read, mut star) = (0, 0, None);
    while read < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[read] => {
                at += 1;
                read += 1;
            }
            _ => match star {
                Some((back, from)) => {
                    star = Some((back, from + 1));
                    at = back + 1;
                    read = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// The gateway's own key, with which the command line of the same home signs. It is made when there is none; who wants
/// another removes the file and starts the gateway again.
///
/// # Errors
/// The file cannot be read or made, or is malformed.
pub fn root(home: &Path, region: &str, now_unix_ms: i64) -> io::Result<AccessKey> {
    let path = home.join(ROOT_FILE);
    let mut created_unix_ms = 0;
    secret_file(&path, || {
        created_unix_ms = now_unix_ms;
        let (id, secret) = draw().map_err(io::Error::other)?;
        let text = format!(
            "# The key of this gateway's owner. It may do everything: keep it to yourself.\n\
             AWS_ACCESS_KEY_ID={id}\nAWS_SECRET_ACCESS_KEY={secret}\nAWS_REGION={region}\n"
        );
        Ok(text.into_bytes())
    })?;
    let found = root_signer(&path)?.ok_or(io::ErrorKind::NotFound)?;
    Ok(root_key(found.access_key_id, found.secret, created_unix_ms))
}

/// What is in a file that is its owner's alone; it is made with what `make` gives when there is none. Of several who find none at
/// once, one makes it and all have its content.
///
/// # Errors
/// It cannot be read or made, or `make` failed.
pub fn secret_file(path: &Path, make: impl FnOnce() -> io::Result<Vec<u8>>) -> io::Result<Vec<u8>> {
    if !path.exists() {
        let home = path.parent().unwrap_or(Path::new("."));
        // Of mode 0600, and given its name only when it is whole.
        let mut unfinished = tempfile::NamedTempFile::new_in(home)?;
        unfinished.write_all(&make()?)?;
        unfinished.as_file().sync_all()?;
        match unfinished.persist_noclobber(path) {
            Err(failed) if failed.error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed.error);
            }
            _ => File::open(home)?.sync_all()?,
        }
    }
    restrict(path)?;
    fs::read(path)
}

/// What signs with the root key in this file, if there is one.
///
/// # Errors
/// The file cannot be read, or is malformed.
pub fn root_signer(path: &Path) -> io::Result<Option<Signer>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let value = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
    };
    let fields = (
        value("AWS_ACCESS_KEY_ID"),
        value("AWS_SECRET_ACCESS_KEY"),
        value("AWS_REGION"),
    );
    match fields {
        (Some(access_key_id), Some(secret), Some(region)) => Ok(Some(Signer {
            access_key_id,
            secret,
            region,
        })),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it holds no key: remove it, and the next start makes a new one",
        )),
    }
}

fn root_key(id: String, secret: String, created_unix_ms: i64) -> AccessKey {
    AccessKey {
        id,
        secret,
        name: ROOT.to_owned(),
        allow: Allow::All,
        functions: ANY.to_owned(),
        enabled: true,
        created_unix_ms,
        limits: KeyLimits::default(),
    }
}

/// Makes a file that is there the owner's alone.
///
/// # Errors
/// Its mode cannot be changed.
pub fn restrict(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.permissions().mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "others could read this file, which holds secrets; not any more");
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
    }
    Ok(())
}

/// Makes a file the owner's alone before anything is in it; SQLite gives its log the same mode.
///
/// # Errors
/// It cannot be made or changed.
pub fn make_private(path: &Path) -> io::Result<()> {
    private(OpenOptions::new().append(true).create(true)).open(path)?;
    restrict(path)
}

fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    options.mode(0o600)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn request(name: Option<&str>, functions: Option<&str>) -> CreateKeyRequest {
        CreateKeyRequest {
            name: name.map(str::to_owned),
            allow: Allow::Invoke,
            functions: functions.map(str::to_owned),
            limits: KeyLimits::default(),
        }
    }

    #[test]
    fn keys_look_like_awss_and_are_all_different() {
        let mut seen = HashSet::new();
        for _ in 0..100 {
            let key = AccessKey::draw(request(None, None), 7).unwrap();
            let is_base32 = |byte: u8| byte.is_ascii_uppercase() || (b'2'..=b'7').contains(&byte);
            assert_eq!((key.id.len(), key.secret.len()), (20, 40));
            assert!(key.id.starts_with("AKIA") && key.id.bytes().all(is_base32));
            assert_eq!(key.name, key.id);
            assert!(key.covers_all() && key.covers("anything"));
            assert!(!format!("{key:?}").contains(&key.secret));
            assert!(seen.insert(key.id) && seen.insert(key.secret));
        }
    }

    #[test]
    fn names_and_patterns_are_checked() {
        for (name, functions) in [
            (Some(""), None),
            (Some("a b"), None),
            (Some("a/b"), None),
            (None, Some("")),
            (None, Some("a[b]")),
        ] {
            let refused = AccessKey::draw(request(name, functions), 7);
            assert!(matches!(refused, Err(KeyError::Invalid(_))));
        }
        let key = AccessKey::draw(request(Some("ci@x"), Some("team-*")), 7).unwrap();
        assert!(key.covers("team-a") && !key.covers("other") && !key.covers_all());
    }

    #[test]
    fn patterns_fit_as_in_a_shell() {
        for (pattern, name, fits) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a", "a", true),
            ("?", "", false),
            ("a*c", "abbc", true),
            ("a*c", "abcb", false),
            ("*a*b*", "xxaxxb", true),
            ("*a?b", "aab_axb", true),
            ("team-*", "team", false),
            ("**", "x", true),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), name.as_bytes()),
                fits,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn the_root_key_is_made_once_and_is_its_owners_alone() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(ROOT_FILE);
        assert!(root_signer(&path).unwrap().is_none());
        let made = root(home.path(), "us-east-1", 7).unwrap();
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let again = root(home.path(), "us-east-1", 8).unwrap();
        assert_eq!((again.id, again.secret), (made.id.clone(), made.secret));
        let signer = root_signer(&path).unwrap().unwrap();
        assert_eq!(
            (signer.access_key_id, signer.region),
            (made.id, "us-east-1".to_owned())
        );
        assert_eq!(mode(), 0o600);
        fs::write(&path, "AWS_ACCESS_KEY_ID=\n").unwrap();
        assert!(root(home.path(), "us-east-1", 9).is_err());
    }

    proptest! {
        #[test]
        fn a_pattern_made_from_a_name_fits_it(name in "[a-c]{0,8}", stars in proptest::collection::vec((0_usize..9, 0_usize..3), 0..4)) {
            let mut pattern = name.clone();
            for (at, kind) in stars {
                let at = at.min(pattern.len());
                match kind {
                    0 => pattern.insert(at, '*'),
                    1 if at < pattern.len() => pattern.replace_range(at..=at, "*"),
                    _ => {}
                }
            }
            prop_assert!(matches(pattern.as_bytes(), name.as_bytes()), "{} {}", pattern, name);
        }
    }
}
