//! A function on this machine: its folder or zip, what its thaw.toml says, what the command line says instead.

use std::fs;
use std::io::Cursor;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use thaw_api::code;
use thaw_api::environment::is_provided;
use thaw_api::lambda::validate::ZIP_BYTES_MAX;
use thaw_api::record::Code;
use thaw_images::RuntimeName;
use zip::ZipArchive;

use super::client::Deployment;
use super::deploy::Settings;
use super::manifest::{self, Manifest};
use super::near::nearest;
use super::package::{self, Exclude};

/// Which function, and what is different about it.
#[derive(Args, Clone, Debug)]
pub struct ProjectArgs {
    /// Folder or zip with the function's code.
    #[arg(default_value = ".")]
    pub code: PathBuf,
    /// Function name; that of thaw.toml, or the folder's or zip's own, if not given.
    #[arg(long)]
    pub name: Option<String>,
    /// Layer version that it sees at /opt, NAME:VERSION or an ARN; may be given several times, later ones over earlier ones. Those
    /// of thaw.toml if none is given.
    #[arg(long, value_name = "LAYER")]
    pub layer: Vec<String>,
    #[command(flatten)]
    pub settings: Settings,
}

/// A function that can be packed.
#[derive(Clone, Debug)]
pub struct Project {
    /// Function name.
    pub name: String,
    /// Everything but its code.
    pub settings: thaw_api::record::Settings,
    /// Layer versions, NAME:VERSION or ARNs.
    pub layers: Vec<String>,
    /// What thaw.toml says; nothing if there is none.
    pub manifest: Manifest,
    /// The folder, or the zip.
    pub code: PathBuf,
    /// What is neither packed nor watched.
    pub exclude: Exclude,
}

impl Project {
    /// Reads thaw.toml, if there is one, and lays what the command line says over it.
    ///
    /// # Errors
    /// The code is not there, or what is said of it is wrong.
    pub fn open(args: &ProjectArgs) -> anyhow::Result<Self> {
        let code = args.code.canonicalize();
        let code = code.with_context(|| {
            let path = args.code.display();
            format!("cannot read {path}: `thaw init {path}` writes a first function there")
        })?;
        let manifest = match code.is_dir() {
            true => Manifest::of(&code)?.unwrap_or_default(),
            false => Manifest::default(),
        };
        let stem = code.file_stem().and_then(|stem| stem.to_str());
        let name = args.name.clone().or_else(|| manifest.name.clone());
        let name = name.or_else(|| stem.map(str::to_owned));
        let mut settings = args.settings.over(&manifest, &code);
        if let Some(network) = &manifest.network {
            settings.network = network.policy(|name| std::env::var(name).ok())?;
        }
        check_runtime(&settings.runtime)?;
        let layers = match args.layer.as_slice() {
            [] => manifest.layers.clone(),
            given => given.to_vec(),
        };
        Ok(Self {
            name: name.context("this path gives no function name: say --name")?,
            exclude: Exclude::new(&manifest.exclude)?,
            settings,
            layers,
            manifest,
            code,
        })
    }

    /// Runs `build`, if thaw.toml names a command; what it prints goes to standard error. It ends when this is dropped.
    ///
    /// # Errors
    /// It fails.
    pub async fn build(&self) -> anyhow::Result<()> {
        let Some(command) = &self.manifest.build else {
            return Ok(());
        };
        let stderr = std::io::stderr().as_fd().try_clone_to_owned();
        let stderr = stderr.context("no standard error is left")?;
        let status = tokio::process::Command::new("sh")
            .args(["-c", command])
            .current_dir(&self.code)
            .stdin(Stdio::null())
            .stdout(stderr)
            .kill_on_drop(true)
            .status()
            .await
            .with_context(|| format!("cannot run `{command}`"))?;
        ensure!(
            status.success(),
            "`build` in {} failed ({status}): {command}",
            manifest::FILE
        );
        Ok(())
    }

    /// The code packed and judged, with everything else.
    ///
    /// # Errors
    /// There is none, it is too large, or what would be started is not in it.
    pub fn pack(&self) -> anyhow::Result<(Deployment, Code)> {
        let zip = if self.code.is_dir() {
            let zip =
                package::zip_selected(&self.code, self.manifest.package.all(), &self.exclude)?;
            // What is not in the folder may be in a layer.
            if self.layers.is_empty() {
                self.check_start(&zip)?;
            }
            zip
        } else {
            package::zip_of(&self.code)?
        };
        ensure!(
            zip.len() <= ZIP_BYTES_MAX,
            "{} is {} MiB as a zip, and {} MiB are taken: leave files out with `exclude` in {}",
            self.code.display(),
            zip.len() >> 20,
            ZIP_BYTES_MAX >> 20,
            manifest::FILE
        );
        let code = code::check(&zip)
            .with_context(|| format!("{} cannot be deployed", self.code.display()))?;
        let deployment = Deployment {
            name: self.name.clone(),
            zip,
            layers: Vec::new(),
            settings: self.settings.clone(),
        };
        Ok((deployment, code))
    }

    /// What the runtime starts must be in the zip.
    fn check_start(&self, zip: &[u8]) -> anyhow::Result<()> {
        let mut archive = ZipArchive::new(Cursor::new(zip)).context("the zip cannot be read")?;
        let folder = self.code.display();
        if is_provided(&self.settings.runtime) {
            let runtime = &self.settings.runtime;
            let file = archive.by_name("bootstrap").with_context(|| {
                format!("{folder} has no file named bootstrap, which {runtime} starts: add it, or name another runtime")
            })?;
            let executable = file.unix_mode().is_none_or(|mode| mode & 0o111 != 0);
            ensure!(
                executable,
                "bootstrap cannot be executed: `chmod +x {folder}/bootstrap`"
            );
            return Ok(());
        }
        let handler = &self.settings.handler;
        let module = handler
            .rsplit_once('.')
            .map_or(handler.as_str(), |(module, _)| module);
        let path = match self.settings.runtime.starts_with("python") {
            true => module.replace('.', "/"),
            false => module.to_owned(),
        };
        let starts = |name: &str| {
            let rest = name.strip_prefix(path.as_str()).unwrap_or_default();
            rest.starts_with('.') || rest.starts_with('/')
        };
        if archive.file_names().any(starts) {
            return Ok(());
        }
        let end = match self.settings.runtime.starts_with("python") {
            true => "py",
            false => "mjs",
        };
        bail!(
            "{folder} has no {path}.{end} for the handler {handler}: name yours with --handler or in {}",
            manifest::FILE
        )
    }

    /// Whether a change of this file changes the function.
    pub fn watches(&self, path: &Path) -> bool {
        /// Names whose changes are never the author's.
        const NOISE: [&str; 5] = [".git", "target", "node_modules", "__pycache__", ".venv"];
        let Ok(below) = path.strip_prefix(&self.code) else {
            return false;
        };
        let noise = below
            .iter()
            .any(|name| NOISE.iter().any(|noise| name == *noise));
        // What `build` makes would otherwise be built again for being made.
        let made = self.manifest.build.is_some()
            && self
                .manifest
                .package
                .all()
                .iter()
                .any(|path| below.starts_with(path));
        !noise && !made && !self.exclude.covers(below)
    }
}

fn check_runtime(runtime: &str) -> anyhow::Result<()> {
    let served: Vec<_> = RuntimeName::served().collect();
    if served.contains(&runtime) {
        return Ok(());
    }
    let hint =
        nearest(runtime, served.iter().copied()).map(|meant| format!("; did you mean {meant}?"));
    bail!(
        "there is no runtime {runtime}, but there are {}{}",
        served.join(", "),
        hint.unwrap_or_default()
    )
}

/// A function name made of a folder's: what a name cannot hold becomes a dash.
pub fn name_of(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let fits = |char: char| char.is_ascii_alphanumeric() || char == '-' || char == '_';
    let name: String = name
        .chars()
        .map(|char| if fits(char) { char } else { '-' })
        .collect();
    match name.trim_matches('-') {
        "" => "function".to_owned(),
        name => name.chars().take(64).collect(),
    }
}

/// Whether a folder is there and holds a file of this name.
pub fn holds(folder: &Path, name: &str) -> bool {
    fs::symlink_metadata(folder.join(name)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn project(files: &[(&str, &str)]) -> (tempfile::TempDir, ProjectArgs) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let args = ProjectArgs {
            code: folder.path().to_owned(),
            name: None,
            layer: Vec::new(),
            settings: Settings::default(),
        };
        (folder, args)
    }

    fn refusal(args: &ProjectArgs) -> String {
        let error = Project::open(args).and_then(|project| project.pack());
        format!("{:#}", error.err().unwrap())
    }

    #[test]
    fn the_command_line_wins_over_the_manifest_and_the_manifest_over_defaults() {
        let toml = "name = \"f\"\nmemory = 256\ntimeout = 9\n[environment]\nA = \"1\"\nB = \"1\"\n";
        let (_folder, mut args) = project(&[("thaw.toml", toml), ("app.py", "")]);
        args.settings.memory = Some(512);
        args.settings.env = vec![("B".into(), "2".into())];
        let project = Project::open(&args).unwrap();
        assert_eq!(project.name, "f");
        let settings = &project.settings;
        assert_eq!((settings.memory_mib, settings.timeout_seconds), (512, 9));
        assert_eq!(settings.runtime, "python3.11");
        let variables = settings.environment.clone().unwrap();
        assert_eq!((&*variables["A"], &*variables["B"]), ("1", "2"));
        args.name = Some("g".into());
        assert_eq!(Project::open(&args).unwrap().name, "g");
    }

    #[test]
    fn usual_mistakes_are_told_with_their_remedy() {
        let (folder, mut args) = project(&[]);
        let error = refusal(&args);
        assert!(error.contains("`thaw init "), "{error}");
        args.code = folder.path().join("gone");
        assert!(refusal(&args).contains("`thaw init "), "{}", refusal(&args));
        let (_folder, args) = project(&[("main.py", "")]);
        let error = refusal(&args);
        assert!(
            error.contains("no app.py for the handler app.handler") && error.contains("--handler"),
            "{error}"
        );
        let (folder, mut args) = project(&[("bootstrap", "#!/bin/sh")]);
        args.settings.runtime = Some("provided".into());
        assert!(refusal(&args).contains("chmod +x"), "{}", refusal(&args));
        fs::set_permissions(
            folder.path().join("bootstrap"),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        Project::open(&args).unwrap().pack().unwrap();
        args.settings.runtime = Some("python3.12".into());
        let error = refusal(&args);
        assert!(
            error.ends_with("did you mean python3.11?") && error.contains("provided.al2023"),
            "{error}"
        );
        let (folder, mut args) = project(&[("code.zip", "no zip")]);
        args.code = folder.path().join("code.zip");
        assert!(
            refusal(&args).contains("no usable zip"),
            "{}",
            refusal(&args)
        );
        let file = fs::File::create(&args.code).unwrap();
        file.set_len(u64::try_from(ZIP_BYTES_MAX).unwrap() + 1)
            .unwrap();
        assert!(
            refusal(&args).contains("50 MiB are taken"),
            "{}",
            refusal(&args)
        );
    }

    #[test]
    fn handlers_may_lie_in_packages() {
        for (file, handler) in [
            ("a/b.py", "a.b.run"),
            ("a/__init__.py", "a.run"),
            ("a.so", "a.run"),
        ] {
            let (_folder, mut args) = project(&[(file, "")]);
            args.settings.handler = Some(handler.into());
            Project::open(&args).unwrap().pack().unwrap();
        }
        let (_folder, args) = project(&[("application.py", "")]);
        assert!(refusal(&args).contains("no app.py"));
    }

    #[test]
    fn what_builds_and_tools_write_is_not_watched() {
        let toml = "build = \"make\"\npackage = \"out\"\nexclude = [\"*.log\"]\n";
        let (folder, args) = project(&[("thaw.toml", toml)]);
        let project = Project::open(&args).unwrap();
        let root = folder.path().canonicalize().unwrap();
        for (name, watched) in [
            ("src/main.rs", true),
            ("thaw.toml", true),
            ("target/x", false),
            ("a/node_modules/b/c.js", false),
            (".git/index", false),
            ("out/bootstrap", false),
            ("a/b.log", false),
        ] {
            assert_eq!(project.watches(&root.join(name)), watched, "{name}");
        }
        assert!(!project.watches(Path::new("/elsewhere/app.py")));
    }

    #[test]
    fn folders_give_names_that_functions_can_have() {
        assert_eq!(name_of(Path::new("/a/my shop")), "my-shop");
        assert_eq!(name_of(Path::new("/a/ü")), "function");
        assert_eq!(name_of(Path::new("/a/b_c-1")), "b_c-1");
    }
}
