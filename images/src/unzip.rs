//! Unpacks a zip that nobody vouches for.
//!
//! In two steps: [`plan`] reads the directory of the archive and refuses it whole if any entry is
//! unfit; only then does [`Plan::extract`] write. Files are written before symbolic links exist, so
//! that no entry is ever written through a link.

mod path;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::{self, Cursor, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use zip::ZipArchive;
use zip::result::ZipError;

use crate::fault::{Fault, FileError};
use crate::staging::make_dir;
use path::{EntryPath, LINK_BYTES_MAX, is_inside};

const MODE_KIND: u32 = 0o170_000;
const MODE_FOLDER: u32 = 0o040_000;
const MODE_FILE: u32 = 0o100_000;
const MODE_LINK: u32 = 0o120_000;
/// "PK\1\2", a record of the central directory (APPNOTE.TXT 4.3.12).
const CENTRAL_SIGNATURE: &[u8] = b"PK\x01\x02";
const CENTRAL_HEADER_BYTES: usize = 46;
const FLAG_ENCRYPTED: u16 = 1;

/// How much an archive may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// All files together, unpacked.
    pub(crate) bytes_max: u64,
    /// Files, links and folders, implied folders included.
    pub(crate) entries_max: usize,
}

/// An archive that is not unpacked, and why.
#[derive(Debug, thiserror::Error)]
pub enum UnzipError {
    /// No zip, or a damaged one. The text is the one that Lambda's clients know.
    #[error("Could not unzip uploaded file. Please check your file, then try to upload again.")]
    Broken(#[source] Option<ZipError>),
    /// There is nothing in it.
    #[error("Uploaded file must be a non-empty zip")]
    Empty,
    /// More unpacked bytes than allowed.
    #[error("Unzipped size must be smaller than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// More entries than allowed.
    #[error("the zip holds more than {limit} files and folders")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// One entry is unfit.
    #[error("the zip entry {name:?} {reason}")]
    Entry {
        /// The entry's name, at most 200 characters of it.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// This machine could not write a file.
    #[error("unpacking a zip")]
    File(#[from] FileError),
}

impl UnzipError {
    /// The caller's, unless a file could not be written.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        match self {
            Self::File(_) => Fault::Host,
            _ => Fault::Caller,
        }
    }

    fn entry(name: &str, reason: &'static str) -> Self {
        Self::Entry {
            name: name.chars().take(200).collect(),
            reason,
        }
    }
}

enum Node {
    Folder,
    File { index: usize, mode: u32 },
    Link { target: String },
}

/// Archives all of whose entries are fit, one laid over the other.
pub(crate) struct Plan<'a> {
    archives: Vec<ZipArchive<Cursor<&'a [u8]>>>,
    /// Each with the archive that it is from. Parents sort before what they hold.
    nodes: BTreeMap<EntryPath, (usize, Node)>,
    limits: Limits,
}

/// Reads and checks the directory of an archive. `mounted_at` is where the guest sees the folder: a link may name it.
pub(crate) fn plan<'a>(
    data: &'a [u8],
    limits: Limits,
    mounted_at: &str,
) -> Result<Plan<'a>, UnzipError> {
    let broken = |error| UnzipError::Broken(Some(error));
    let mut archive = ZipArchive::new(Cursor::new(data)).map_err(broken)?;
    check_directory(data, &archive, limits)?;
    if archive.has_overlapping_files().map_err(broken)? {
        return Err(UnzipError::Broken(None));
    }
    let mut nodes = BTreeMap::new();
    let mut declared = 0_u64;
    for index in 0..archive.len() {
        let (path, node, size) = read_entry(&mut archive, index, mounted_at)?;
        declared = declared.saturating_add(size);
        if declared > limits.bytes_max {
            return Err(UnzipError::TooLarge {
                limit: limits.bytes_max,
            });
        }
        place(&mut nodes, path, node)?;
        if nodes.len() > limits.entries_max {
            return Err(UnzipError::TooMany {
                limit: limits.entries_max,
            });
        }
    }
    let nodes = nodes.into_iter().map(|(path, node)| (path, (0, node)));
    Ok(Plan {
        archives: vec![archive],
        nodes: nodes.collect(),
        limits,
    })
}

/// Walks the records of the central directory: the zip crate keeps one of each name, and lets the
/// last one win.
fn check_directory(
    data: &[u8],
    archive: &ZipArchive<Cursor<&[u8]>>,
    limits: Limits,
) -> Result<(), UnzipError> {
    let mut rest = usize::try_from(archive.central_directory_start())
        .ok()
        .and_then(|start| data.get(start..))
        .ok_or(UnzipError::Broken(None))?;
    let mut names = BTreeSet::new();
    while rest.starts_with(CENTRAL_SIGNATURE) {
        let field = |at: usize| {
            rest.get(at..at + 2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
        };
        let (Some(flags), Some(name), Some(extra), Some(comment)) =
            (field(8), field(28), field(30), field(32))
        else {
            return Err(UnzipError::Broken(None));
        };
        let name_end = CENTRAL_HEADER_BYTES + usize::from(name);
        let end = name_end + usize::from(extra) + usize::from(comment);
        let record = rest.get(..end).ok_or(UnzipError::Broken(None))?;
        let name = &record[CENTRAL_HEADER_BYTES..name_end];
        let refuse = |reason| UnzipError::entry(&String::from_utf8_lossy(name), reason);
        if flags & FLAG_ENCRYPTED != 0 {
            return Err(refuse("is encrypted"));
        }
        if !names.insert(name) {
            return Err(refuse("occurs twice"));
        }
        if names.len() > limits.entries_max {
            return Err(UnzipError::TooMany {
                limit: limits.entries_max,
            });
        }
        rest = &rest[end..];
    }
    match names.len() {
        0 => Err(UnzipError::Empty),
        count if count == archive.len() => Ok(()),
        _ => Err(UnzipError::Broken(None)),
    }
}

/// The place, kind and declared size of an entry.
fn read_entry(
    archive: &mut ZipArchive<Cursor<&[u8]>>,
    index: usize,
    mounted_at: &str,
) -> Result<(EntryPath, Node, u64), UnzipError> {
    let mut entry = archive
        .by_index(index)
        .map_err(|error| UnzipError::Broken(Some(error)))?;
    let name = entry.name().to_owned();
    let refuse = |reason| UnzipError::entry(&name, reason);
    let path = EntryPath::parse(&name).map_err(refuse)?;
    let mode = entry.unix_mode().unwrap_or(0);
    let kind = match mode & MODE_KIND {
        0 if name.ends_with('/') => MODE_FOLDER,
        0 => MODE_FILE,
        kind => kind,
    };
    match kind {
        MODE_FOLDER => Ok((path, Node::Folder, 0)),
        _ if path.is_root() => Err(refuse("has no name")),
        MODE_FILE if name.ends_with('/') => Err(refuse("is both a file and a folder")),
        // Everyone may read: the function runs as a user of its own. A zip made where files have
        // no permission bits says 0; such files may also be run.
        MODE_FILE => {
            let mode = if mode & 0o777 == 0 {
                0o755
            } else {
                mode & 0o777 | 0o444
            };
            let size = entry.size();
            Ok((path, Node::File { index, mode }, size))
        }
        MODE_LINK => {
            let mut target = Vec::new();
            let mut reader = entry.by_ref().take(LINK_BYTES_MAX + 1);
            reader
                .read_to_end(&mut target)
                .map_err(|_| UnzipError::Broken(None))?;
            let target =
                String::from_utf8(target).map_err(|_| refuse("is a link to an unfit name"))?;
            if !is_inside(&path, &target, mounted_at) {
                return Err(refuse("is a symbolic link that leaves the folder"));
            }
            Ok((path, Node::Link { target }, 0))
        }
        _ => Err(refuse("is neither a file, a folder nor a symbolic link")),
    }
}

/// Adds a node and the folders that its path implies.
fn place(
    nodes: &mut BTreeMap<EntryPath, Node>,
    path: EntryPath,
    node: Node,
) -> Result<(), UnzipError> {
    for parent in path.parents() {
        match nodes.entry(parent).or_insert(Node::Folder) {
            Node::Folder => {}
            _ => {
                return Err(UnzipError::entry(
                    &path.to_string(),
                    "lies in a file or a link",
                ));
            }
        }
    }
    if path.is_root() {
        return Ok(());
    }
    match (nodes.get(&path), &node) {
        (None, _) => {
            nodes.insert(path, node);
            Ok(())
        }
        // Implied by an entry within it, and now named.
        (Some(Node::Folder), Node::Folder) => Ok(()),
        _ => Err(UnzipError::entry(&path.to_string(), "occurs twice")),
    }
}

impl<'a> Plan<'a> {
    /// Lays the tree of another archive over this one. Where the two differ in a place, the later one has it: its file takes
    /// the place of a folder with all that is in it, its folder the place of a file or a link.
    ///
    /// # Errors
    /// More entries than one archive may have.
    pub(crate) fn overlay(mut self, later: Plan<'a>) -> Result<Self, UnzipError> {
        let offset = self.archives.len();
        self.archives.extend(later.archives);
        for (path, (archive, node)) in later.nodes {
            // Its folders come before what is in them, so that only this very place can be taken.
            let is_folder = matches!(node, Node::Folder);
            match self.nodes.get(&path) {
                Some((_, Node::Folder)) if is_folder => continue,
                Some((_, Node::Folder)) => self.nodes.retain(|other, _| !other.lies_in(&path)),
                _ => {}
            }
            self.nodes.insert(path, (offset + archive, node));
        }
        let limit = self.limits.entries_max;
        if self.nodes.len() > limit {
            return Err(UnzipError::TooMany { limit });
        }
        Ok(self)
    }

    /// Writes everything below `folder`, which is made if need be. Answers the bytes written.
    pub(crate) fn extract(mut self, folder: &Path) -> Result<u64, UnzipError> {
        make_dir(folder)?;
        let mut written = 0_u64;
        let mut links = Vec::new();
        for (path, (archive, node)) in &self.nodes {
            let to = folder.join(path.as_path());
            match node {
                Node::Folder => {
                    make_dir(&to)?;
                    set_mode(&to, 0o755)?;
                }
                Node::Link { target } => links.push((to, target)),
                Node::File { index, mode } => {
                    let budget = self.limits.bytes_max - written;
                    let archive = &mut self.archives[*archive];
                    written += extract_file(archive, *index, &to, *mode, budget)?.ok_or(
                        UnzipError::TooLarge {
                            limit: self.limits.bytes_max,
                        },
                    )?;
                }
            }
        }
        for (to, target) in links {
            symlink(target, &to).map_err(FileError::on("linking", &to))?;
        }
        Ok(written)
    }
}

/// Writes one file; `None` when it is longer than `budget`, whatever the directory declared.
fn extract_file(
    archive: &mut ZipArchive<Cursor<&[u8]>>,
    index: usize,
    to: &Path,
    mode: u32,
    budget: u64,
) -> Result<Option<u64>, UnzipError> {
    let entry = archive
        .by_index(index)
        .map_err(|error| UnzipError::Broken(Some(error)))?;
    let mut entry = entry.take(budget.saturating_add(1));
    let mut file = File::create_new(to).map_err(FileError::on("making", to))?;
    let mut buffer = vec![0_u8; 64 << 10];
    let mut written = 0_u64;
    loop {
        let length = match entry.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Damaged data, or a checksum that does not match.
            Err(error) => return Err(UnzipError::Broken(Some(ZipError::Io(error)))),
        };
        file.write_all(&buffer[..length])
            .map_err(FileError::on("writing", to))?;
        written += u64::try_from(length).unwrap_or(u64::MAX);
    }
    set_mode(to, mode)?;
    Ok((written <= budget).then_some(written))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), FileError> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(FileError::on("setting permissions of", path))
}

#[cfg(test)]
mod tests;
