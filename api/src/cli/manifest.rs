//! `thaw.toml`: what a function is, beside its code. Pure but for reading the file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thaw_api_types::lambda::{Cors, FunctionUrlRequest};
use thiserror::Error;

use super::near::nearest;
use super::network::NetworkTable;

/// Name of the file, in the function's folder.
pub const FILE: &str = "thaw.toml";

/// What a function is. Settings that are not named have the command line's defaults; `url` and `reserved_concurrency`
/// that are not named stay what they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Function name; the folder's own name if not given.
    pub name: Option<String>,
    /// `python3.11`, …
    pub runtime: Option<String>,
    /// `module.function`.
    pub handler: Option<String>,
    /// MiB.
    pub memory: Option<u32>,
    /// Seconds.
    pub timeout: Option<u32>,
    /// Size of /tmp, MiB.
    pub ephemeral_storage: Option<u32>,
    /// Whether published versions run SnapStart's hooks.
    #[serde(default)]
    pub snap_start: bool,
    /// Layer versions, NAME:VERSION or ARNs; later ones lie over earlier ones.
    #[serde(default)]
    pub layers: Vec<String>,
    /// Environment variables.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Most invocations at once, kept free for this function.
    pub reserved_concurrency: Option<u32>,
    /// Who may call the function's URL.
    pub url: Option<UrlTable>,
    /// What it may reach.
    pub network: Option<NetworkTable>,
    /// Whether `thaw deploy` publishes a version.
    #[serde(default)]
    pub publish: bool,
    /// An alias that names the version that `thaw deploy` publishes.
    pub alias: Option<String>,
    /// A command for the shell, run in the folder before the code is packed.
    pub build: Option<String>,
    /// What is packed instead of the whole folder: files go in under their own names, folders with what they hold.
    #[serde(default)]
    pub package: Paths,
    /// Patterns of what is neither packed nor watched: without a slash of any name, with one of a path from the folder.
    #[serde(default)]
    pub exclude: Vec<String>,
}

/// One path or several.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a path or a list of paths is expected")]
pub enum Paths {
    /// `package = "a"`.
    One(PathBuf),
    /// `package = ["a", "b"]`.
    Several(Vec<PathBuf>),
}

impl Default for Paths {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Paths {
    /// All of them.
    pub fn all(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Several(paths) => paths,
        }
    }
}

/// `[url]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UrlTable {
    /// Who may call it.
    pub auth: UrlAuth,
    /// Whether answers are streamed.
    #[serde(default)]
    pub streaming: bool,
    /// Origins whose pages may read answers.
    #[serde(default)]
    pub allow_origins: Vec<String>,
    /// Methods that such pages may use; all if none is named.
    #[serde(default)]
    pub allow_methods: Vec<String>,
    /// Headers that such pages may send.
    #[serde(default)]
    pub allow_headers: Vec<String>,
}

/// Who may call a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UrlAuth {
    /// Anyone.
    None,
    /// Who signs with a key.
    Iam,
}

impl UrlTable {
    /// As the gateway takes it.
    pub fn request(&self) -> FunctionUrlRequest {
        let mut cors = Cors::default();
        if !self.allow_origins.is_empty() {
            let methods = match self.allow_methods.as_slice() {
                [] => vec!["*".to_owned()],
                named => named.to_vec(),
            };
            cors.allow_origins = Some(self.allow_origins.clone());
            cors.allow_methods = Some(methods);
            cors.allow_headers = Some(self.allow_headers.clone()).filter(|all| !all.is_empty());
        }
        FunctionUrlRequest {
            auth_type: Some(
                match self.auth {
                    UrlAuth::None => "NONE",
                    UrlAuth::Iam => "AWS_IAM",
                }
                .to_owned(),
            ),
            cors: Some(cors),
            invoke_mode: Some(
                if self.streaming {
                    "RESPONSE_STREAM"
                } else {
                    "BUFFERED"
                }
                .to_owned(),
            ),
        }
    }
}

/// Why a `thaw.toml` cannot be used.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not what is expected.
    #[error("{}, line {line}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, and what would be right.
        message: String,
    },
}

impl Manifest {
    /// The one in `folder`, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is not what is expected: the line and the known keys are named.
    pub fn of(folder: &Path) -> Result<Option<Self>, ManifestError> {
        let path = folder.join(FILE);
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&path, &text).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ManifestError::Read { path, source }),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ManifestError> {
        toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let before = text.as_bytes().get(..at).unwrap_or_default();
            ManifestError::Malformed {
                path: path.to_owned(),
                line: 1 + before.iter().filter(|byte| **byte == b'\n').count(),
                message: with_hint(&error.message().replace('\n', ", ")),
            }
        })
    }
}

/// An unknown key's message names the known ones, each between backticks; the nearest is what was meant.
fn with_hint(message: &str) -> String {
    let mut words = message.split('`').skip(1).step_by(2);
    let meant = match (message.starts_with("unknown"), words.next()) {
        (true, Some(wrong)) => nearest(wrong, words),
        _ => None,
    };
    match meant {
        Some(meant) => format!("{message}; did you mean `{meant}`?"),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Manifest, String> {
        Manifest::parse(Path::new(FILE), text).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read() {
        let manifest = parse(
            r#"
            name = "thumbs"
            runtime = "provided"
            handler = "bootstrap"
            memory = 256
            timeout = 30
            ephemeral_storage = 1024
            snap_start = true
            layers = ["tools:3"]
            reserved_concurrency = 5
            publish = true
            alias = "live"
            build = "make"
            package = ["out/bootstrap", "assets"]
            exclude = ["*.md"]
            [environment]
            LEVEL = "info"
            [url]
            auth = "iam"
            streaming = true
            allow_origins = ["https://a.example"]
            "#,
        )
        .unwrap();
        assert_eq!(manifest.memory, Some(256));
        assert_eq!(manifest.layers, ["tools:3"]);
        assert_eq!(manifest.environment["LEVEL"], "info");
        assert_eq!(
            manifest.package.all(),
            [PathBuf::from("out/bootstrap"), PathBuf::from("assets")]
        );
        let url = manifest.url.unwrap().request();
        assert_eq!(url.auth_type.as_deref(), Some("AWS_IAM"));
        assert_eq!(url.invoke_mode.as_deref(), Some("RESPONSE_STREAM"));
        assert_eq!(url.cors.unwrap().allow_methods.unwrap(), ["*"]);
        assert_eq!(
            parse("package = \"out\"").unwrap().package.all(),
            [PathBuf::from("out")]
        );
        assert_eq!(parse("").unwrap(), Manifest::default());
    }

    #[test]
    fn a_slip_is_told_with_its_line_and_the_keys_there_are() {
        let error = parse("name = \"f\"\n\nmemmory = 128\n").unwrap_err();
        assert!(
            error.starts_with("thaw.toml, line 3: unknown field `memmory`"),
            "{error}"
        );
        assert!(
            error.contains("`timeout`") && error.ends_with("did you mean `memory`?"),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
        let error = parse("[url]\nauth = \"all\"\n").unwrap_err();
        assert!(
            error.contains("line 2: unknown variant `all`") && error.contains("`iam`"),
            "{error}"
        );
        let error = parse("memory = \"lots\"").unwrap_err();
        assert!(
            error.contains("line 1: ") && error.contains("u32"),
            "{error}"
        );
        let error = parse("package = 1").unwrap_err();
        assert!(
            error.contains("a path or a list of paths is expected"),
            "{error}"
        );
        assert!(parse("name = ").unwrap_err().contains("line 1"));
    }
}
