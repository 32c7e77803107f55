//! `thaw init`: a project that can be deployed as it is.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};

use super::{manifest, project};

#[derive(Args)]
pub struct InitArgs {
    /// Folder to write into; it is made if need be.
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// Language of the function; python unless the folder holds a project of another.
    #[arg(long, value_enum)]
    template: Option<Template>,
    /// Function name; the folder's own if not given.
    #[arg(long)]
    name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Template {
    /// A module with a handler.
    Python,
    /// A module with a handler.
    Node,
    /// A program that is built before it is deployed.
    Rust,
    /// A shell script that speaks the Runtime API.
    Shell,
}

/// A file of a template.
#[derive(Clone, Copy, Debug)]
struct Scaffold {
    name: &'static str,
    text: &'static str,
    /// Permissions.
    mode: u32,
}

const fn file(name: &'static str, text: &'static str) -> Scaffold {
    Scaffold {
        name,
        text,
        mode: 0o644,
    }
}

const README: Scaffold = file("README.md", include_str!("init/README.md"));

const PYTHON: &[Scaffold] = &[
    file(manifest::FILE, include_str!("init/python/thaw.toml")),
    file("app.py", include_str!("init/python/app.py")),
    file(".gitignore", include_str!("init/python/gitignore")),
    README,
];
const NODE: &[Scaffold] = &[
    file(manifest::FILE, include_str!("init/node/thaw.toml")),
    file("index.mjs", include_str!("init/node/index.mjs")),
    file(".gitignore", include_str!("init/node/gitignore")),
    README,
];
const RUST: &[Scaffold] = &[
    file(manifest::FILE, include_str!("init/rust/thaw.toml")),
    file("Cargo.toml", include_str!("init/rust/manifest.toml")),
    file("src/main.rs", include_str!("init/rust/src/main.rs")),
    file(".gitignore", include_str!("init/rust/gitignore")),
    README,
];
const SHELL: &[Scaffold] = &[
    file(manifest::FILE, include_str!("init/shell/thaw.toml")),
    Scaffold {
        name: "bootstrap",
        text: include_str!("init/shell/bootstrap"),
        mode: 0o755,
    },
    file(".gitignore", include_str!("init/shell/gitignore")),
    README,
];

impl Template {
    fn files(self) -> &'static [Scaffold] {
        match self {
            Self::Python => PYTHON,
            Self::Node => NODE,
            Self::Rust => RUST,
            Self::Shell => SHELL,
        }
    }

    /// Of the code that a folder holds.
    fn of(folder: &Path) -> Option<Self> {
        let known = [
            ("Cargo.toml", Self::Rust),
            ("package.json", Self::Node),
            ("index.mjs", Self::Node),
            ("bootstrap", Self::Shell),
            ("app.py", Self::Python),
        ];
        let mut found = known.into_iter();
        found
            .find(|(name, _)| project::holds(folder, name))
            .map(|(_, template)| template)
    }
}

pub fn run(args: &InitArgs) -> anyhow::Result<ExitCode> {
    let folder = &args.folder;
    let made = write(args)?;
    for name in &made {
        println!("  + {}", folder.join(name).display());
    }
    let (shown, name) = (folder.display(), function_name(args)?);
    println!("next:\n  thaw deploy {shown}\n  thaw invoke {name} -d '{{\"name\": \"Ada\"}}'");
    Ok(ExitCode::SUCCESS)
}

fn function_name(args: &InitArgs) -> anyhow::Result<String> {
    let whole = std::path::absolute(&args.folder)
        .with_context(|| format!("{} is no usable path", args.folder.display()))?;
    let named = args.name.clone();
    Ok(named.unwrap_or_else(|| project::name_of(&whole)))
}

/// Writes the files that belong there and answers their names. Nothing is written unless all can be.
fn write(args: &InitArgs) -> anyhow::Result<Vec<&'static str>> {
    let folder = &args.folder;
    if project::holds(folder, manifest::FILE) {
        let shown = folder.display();
        bail!("{shown} is a project already: `thaw deploy {shown}` deploys it");
    }
    // Beside somebody's own code, only thaw.toml is missing.
    let files = match (args.template, Template::of(folder)) {
        (Some(asked), _) => asked.files(),
        (None, Some(found)) => &found.files()[..1],
        (None, None) => PYTHON,
    };
    let there: Vec<_> = files
        .iter()
        .map(|file| file.name)
        .filter(|name| project::holds(folder, name))
        .collect();
    if !there.is_empty() {
        bail!(
            "{} has {} already: choose an empty folder, or leave --template out to add only {}",
            folder.display(),
            there.join(", "),
            manifest::FILE
        );
    }
    let name = function_name(args)?;
    for file in files {
        let path = folder.join(file.name);
        let cannot = || format!("cannot write {}", path.display());
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).with_context(cannot)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(file.mode);
        let text = file.text.replace("{{name}}", &name);
        let opened = options.open(&path);
        opened
            .and_then(|mut opened| opened.write_all(text.as_bytes()))
            .with_context(cannot)?;
    }
    Ok(files.iter().map(|file| file.name).collect())
}

#[cfg(test)]
mod tests {
    use super::super::deploy::Settings;
    use super::super::manifest::Manifest;
    use super::super::project::{Project, ProjectArgs};
    use super::*;

    fn args(folder: &Path, template: Option<Template>) -> InitArgs {
        InitArgs {
            folder: folder.to_owned(),
            template,
            name: Some("first".to_owned()),
        }
    }

    #[test]
    fn every_template_is_a_project_whose_manifest_is_understood() {
        for template in Template::value_variants() {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path().join("new");
            write(&args(&root, Some(*template))).unwrap();
            let manifest = Manifest::of(&root).unwrap().unwrap();
            assert_eq!(manifest.name.as_deref(), Some("first"), "{template:?}");
            let readme = fs::read_to_string(root.join("README.md")).unwrap();
            assert!(readme.contains("thaw invoke first"), "{readme}");
            assert!(root.join(".gitignore").exists());
            let module = manifest.handler.unwrap();
            let module = module.split('.').next().unwrap();
            if manifest.package.all().is_empty() {
                let names = template.files().iter().map(|file| file.name);
                let handlers = names.filter(|name| name.split('.').next() == Some(module));
                assert_eq!(handlers.count(), 1, "{template:?} lacks its handler");
            }
        }
    }

    #[test]
    fn python_and_shell_can_be_packed_as_they_are() {
        for template in [Template::Python, Template::Shell] {
            let folder = tempfile::tempdir().unwrap();
            write(&args(folder.path(), Some(template))).unwrap();
            let args = ProjectArgs {
                code: folder.path().to_owned(),
                name: None,
                layer: Vec::new(),
                settings: Settings::default(),
            };
            let (deployment, _) = Project::open(&args).unwrap().pack().unwrap();
            assert_eq!(deployment.name, "first");
        }
    }

    #[test]
    fn nothing_is_overwritten_and_own_code_gets_a_manifest_alone() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::write(root.join("README.md"), "mine").unwrap();
        fs::write(root.join("app.py"), "mine").unwrap();
        let error = write(&args(root, Some(Template::Python))).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("has app.py, README.md already"), "{error}");
        assert_eq!(fs::read_dir(root).unwrap().count(), 2);
        assert_eq!(write(&args(root, None)).unwrap(), [manifest::FILE]);
        assert_eq!(fs::read(root.join("app.py")).unwrap(), b"mine");
        let error = write(&args(root, None)).unwrap_err().to_string();
        assert!(error.contains("a project already"), "{error}");
    }

    #[test]
    fn the_language_is_that_of_the_folder() {
        for (name, expected) in [
            ("Cargo.toml", Some(Template::Rust)),
            ("package.json", Some(Template::Node)),
            ("bootstrap", Some(Template::Shell)),
            ("notes.txt", None),
        ] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join(name), "").unwrap();
            assert_eq!(Template::of(folder.path()), expected, "{name}");
        }
    }
}
