//! A function's code as a zip: a zip as it is, a folder packed.

use std::fs;
use std::io::{Cursor, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use glob::Pattern;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// Names that never belong to a function.
const LEFT_OUT: [&str; 6] = [
    ".git",
    "__pycache__",
    ".venv",
    ".DS_Store",
    ".gitignore",
    super::manifest::FILE,
];
/// Most bytes that are packed, uncompressed: Lambda's limit of 250 MiB.
const BYTES_MAX: u64 = 262_144_000;

/// What a project leaves out beside what never belongs to a function.
#[derive(Clone, Debug, Default)]
pub struct Exclude(Vec<Pattern>);

impl Exclude {
    /// Of patterns like `*.md`, matched against any name, and `docs/*.png`, matched against paths from the root.
    ///
    /// # Errors
    /// One is no pattern.
    pub fn new(patterns: &[String]) -> anyhow::Result<Self> {
        let compiled = patterns.iter().map(|text| {
            Pattern::new(text.trim_end_matches('/'))
                .with_context(|| format!("`exclude` has {text}, which is no pattern"))
        });
        Ok(Self(compiled.collect::<anyhow::Result<_>>()?))
    }

    /// Whether this path, relative to the root, or a folder that it lies in is left out.
    pub fn covers(&self, path: &Path) -> bool {
        path.ancestors().any(|path| {
            let Some(name) = path.file_name() else {
                return false;
            };
            self.0.iter().any(|pattern| {
                let whole = pattern.as_str().contains('/');
                let subject = if whole { path } else { Path::new(name) };
                pattern.matches_path(subject)
            })
        })
    }
}

/// A file, and its name in the zip.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packed {
    name: PathBuf,
    path: PathBuf,
}

/// The zip's bytes. The same folder gives the same bytes.
///
/// # Errors
/// Not there, neither folder nor zip, empty, or too large.
pub fn zip_of(source: &Path) -> anyhow::Result<Vec<u8>> {
    let about =
        fs::metadata(source).with_context(|| format!("cannot read {}", source.display()))?;
    if about.is_file() {
        return fs::read(source).with_context(|| format!("cannot read {}", source.display()));
    }
    zip_selected(source, &[], &Exclude::default())
}

/// The same of a project: of these paths in `root` if any are named, else of all of it.
///
/// # Errors
/// As [`zip_of`]; a named path is not there, or two files have one name.
pub fn zip_selected(root: &Path, paths: &[PathBuf], exclude: &Exclude) -> anyhow::Result<Vec<u8>> {
    let mut files = Vec::new();
    for path in paths {
        let path = root.join(path);
        let about = fs::metadata(&path).with_context(|| {
            format!(
                "`package` in {} names {}, which cannot be read: does `build` make it?",
                super::manifest::FILE,
                path.display()
            )
        })?;
        if about.is_dir() {
            collect(
                &Search {
                    root,
                    top: &path,
                    exclude,
                },
                &path,
                &mut files,
            )?;
        } else if paths.len() == 1 && path.extension().is_some_and(|end| end == "zip") {
            return fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
        } else {
            let name = path
                .file_name()
                .context("a package's path has no name")?
                .into();
            files.push(Packed { name, path });
        }
    }
    if paths.is_empty() {
        ensure!(
            root.is_dir(),
            "{} is neither a folder nor a zip",
            root.display()
        );
        collect(
            &Search {
                root,
                top: root,
                exclude,
            },
            root,
            &mut files,
        )?;
    }
    if files.is_empty() {
        bail!(
            "{0} holds no files to deploy: `thaw init {0}` writes a first function",
            root.display()
        );
    }
    files.sort();
    for pair in files.windows(2) {
        ensure!(
            pair[0].name != pair[1].name,
            "{} and {} would both be {} in the zip: name one of them differently",
            pair[0].path.display(),
            pair[1].path.display(),
            pair[0].name.display()
        );
    }
    pack(root, &files)
}

/// The runtime that a folder or a zip is for: Node.js where it would find a module named index, else Python.
pub fn runtime_of(source: &Path) -> &'static str {
    let archive = fs::File::open(source).ok();
    let archive = archive.and_then(|file| zip::ZipArchive::new(file).ok());
    let has = |name: &&str| match &archive {
        Some(archive) => archive.index_for_name(name).is_some(),
        None => source.join(name).is_file(),
    };
    match ["index.mjs", "index.js", "index.cjs"].iter().any(has) {
        true => "nodejs22.x",
        false => "python3.11",
    }
}

/// Where files are looked for.
struct Search<'a> {
    /// What `exclude` is relative to.
    root: &'a Path,
    /// What names in the zip are relative to.
    top: &'a Path,
    exclude: &'a Exclude,
}

fn collect(search: &Search<'_>, folder: &Path, files: &mut Vec<Packed>) -> anyhow::Result<()> {
    let cannot = || format!("cannot list {}", folder.display());
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let path = entry.path();
        let below = path.strip_prefix(search.root).unwrap_or(&path);
        if LEFT_OUT.iter().any(|name| entry.file_name() == *name) || search.exclude.covers(below) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(search, &path, files)?
        } else {
            let name = path.strip_prefix(search.top).unwrap_or(&path).to_owned();
            files.push(Packed { name, path })
        }
    }
    Ok(())
}

fn pack(root: &Path, files: &[Packed]) -> anyhow::Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut total = 0;
    for Packed { name, path } in files {
        let failed = || format!("cannot pack {}", path.display());
        let name = name.to_str().with_context(failed)?;
        let link = fs::symlink_metadata(path).with_context(failed)?;
        if link.is_symlink() {
            let target = fs::read_link(path).with_context(failed)?;
            zip.add_symlink(
                name,
                target.to_str().with_context(failed)?,
                SimpleFileOptions::default(),
            )
            .with_context(failed)?;
            continue;
        }
        ensure!(
            link.is_file(),
            "{} is neither file nor folder nor link: remove it from the function",
            path.display()
        );
        total += link.len();
        ensure!(
            total <= BYTES_MAX,
            "{} holds more than {} MiB, the limit for a function's code: leave files out with `exclude` in thaw.toml",
            root.display(),
            BYTES_MAX >> 20
        );
        let options =
            SimpleFileOptions::default().unix_permissions(link.permissions().mode() & 0o777);
        zip.start_file(name, options).with_context(failed)?;
        zip.write_all(&fs::read(path).with_context(failed)?)
            .with_context(failed)?;
    }
    Ok(zip.finish().context("cannot finish the zip")?.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn a_folder_is_packed_the_same_way_twice_without_what_does_not_belong() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("lib/__pycache__")).unwrap();
        fs::write(folder.path().join("lib/__pycache__/x.pyc"), b"x").unwrap();
        fs::write(folder.path().join("lib/m.py"), b"y").unwrap();
        fs::write(folder.path().join("bootstrap"), b"#!/bin/sh").unwrap();
        fs::set_permissions(
            folder.path().join("bootstrap"),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        let bytes = zip_of(folder.path()).unwrap();
        assert_eq!(bytes, zip_of(folder.path()).unwrap());
        let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).unwrap();
        assert_eq!(
            zip.file_names().collect::<Vec<_>>(),
            ["bootstrap", "lib/m.py"]
        );
        let mut text = String::new();
        let mut file = zip.by_name("bootstrap").unwrap();
        assert_eq!(file.unix_mode().unwrap() & 0o777, 0o755);
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "#!/bin/sh");
    }

    #[test]
    fn a_module_named_index_at_the_top_is_for_node_and_all_else_for_python() {
        let runtime = |name: &str| {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir_all(folder.path().join("lib")).unwrap();
            fs::write(folder.path().join(name), b"x").unwrap();
            let zip = folder.path().with_extension("zip");
            fs::write(&zip, zip_of(folder.path()).unwrap()).unwrap();
            assert_eq!(runtime_of(&zip), runtime_of(folder.path()));
            fs::remove_file(&zip).unwrap();
            runtime_of(folder.path())
        };
        for name in ["index.mjs", "index.js", "index.cjs"] {
            assert_eq!(runtime(name), "nodejs22.x");
        }
        for name in ["app.py", "lib/index.js", "bootstrap"] {
            assert_eq!(runtime(name), "python3.11");
        }
    }

    #[test]
    fn an_empty_folder_is_no_function() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            zip_of(folder.path())
                .unwrap_err()
                .to_string()
                .contains("holds no files")
        );
    }

    #[test]
    fn a_project_packs_what_it_names_and_leaves_out_what_it_excludes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("out/lib")).unwrap();
        for name in ["out/lib/a.py", "out/notes.md", "bootstrap", "thaw.toml"] {
            fs::write(root.join(name), name).unwrap();
        }
        let names = |paths: &[&str], exclude: &[&str]| {
            let paths: Vec<_> = paths.iter().map(PathBuf::from).collect();
            let exclude: Vec<_> = exclude.iter().map(|text| (*text).to_owned()).collect();
            let zip = zip_selected(root, &paths, &Exclude::new(&exclude).unwrap()).unwrap();
            let zip = zip::ZipArchive::new(Cursor::new(zip)).unwrap();
            zip.file_names().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(
            names(&[], &[]),
            ["bootstrap", "out/lib/a.py", "out/notes.md"]
        );
        assert_eq!(
            names(&["out", "bootstrap"], &["*.md"]),
            ["bootstrap", "lib/a.py"]
        );
        assert_eq!(names(&[], &["out/lib"]), ["bootstrap", "out/notes.md"]);
        assert_eq!(names(&[], &["out/"]), ["bootstrap"]);
        let twice = ["out/lib/a.py".into(), "out/lib".into()];
        let error = zip_selected(root, &twice, &Exclude::default()).unwrap_err();
        assert!(error.to_string().contains("would both be a.py"), "{error}");
        let missing = zip_selected(root, &["gone".into()], &Exclude::default()).unwrap_err();
        assert!(
            missing.to_string().contains("does `build` make it?"),
            "{missing}"
        );
        assert!(Exclude::new(&["[".to_owned()]).is_err());
    }
}
