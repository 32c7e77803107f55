//! Writes /etc/ld.so.cache, the dynamic loader's index of shared libraries.
//!
//! `ldconfig -r` needs root for its chroot, and its file depends on its own version. The format is
//! that of glibc 2.32 and later: sysdeps/generic/dl-cache.h (`struct cache_file_new`), and the
//! order that elf/dl-cache.c searches in.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use object::elf::{DT_SONAME, ET_DYN, FileHeader64};
use object::read::elf::{Dyn, FileHeader, SectionHeader};

use crate::fault::FileError;

/// The loader's own folders on a merged file system, in order of preference.
const FOLDERS: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "usr/lib"];
const MAGIC: &[u8; 20] = b"glibc-ld.so.cache1.1";
const HEADER_BYTES: usize = 48;
const ENTRY_BYTES: usize = 24;
/// FLAG_ELF_LIBC6 | FLAG_X8664_LIB64.
const FLAGS: u32 = 0x0303;
/// cache_file_new_flags_endian_little.
const LITTLE_ENDIAN: u32 = 2;

/// The cache could not be written.
#[derive(Debug, thiserror::Error)]
pub enum LdCacheError {
    /// A library could not be read.
    #[error("reading shared libraries")]
    File(#[from] FileError),
    /// More than 4 GiB of names.
    #[error("the index of shared libraries is too long")]
    TooLong,
}

/// The cache for the libraries of `tree`.
pub(super) fn build(tree: &Path) -> Result<Vec<u8>, LdCacheError> {
    let mut libraries = BTreeMap::new();
    for folder in FOLDERS {
        let path = tree.join(folder);
        if path.is_dir() {
            scan(&path, folder, &mut libraries)?;
        }
    }
    encode(libraries)
}

/// Adds `soname → path in the guest` of each library in one folder; what is known already stays.
fn scan(
    folder: &Path,
    guest_folder: &str,
    libraries: &mut BTreeMap<String, String>,
) -> Result<(), FileError> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder).map_err(FileError::on("listing", folder))? {
        let entry = entry.map_err(FileError::on("listing", folder))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_library =
            (name.starts_with("lib") || name.starts_with("ld-")) && name.contains(".so");
        if is_library && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        let data = fs::read(&path).map_err(FileError::on("reading", &path))?;
        let Some(soname) = soname(&data) else {
            continue;
        };
        // The loader opens the file by its soname when a link of that name is there.
        let name = if folder.join(&soname).exists() {
            soname.clone()
        } else {
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        // The guest's /lib is /usr/lib; the loader knows the short path.
        let guest_folder = guest_folder.trim_start_matches("usr");
        libraries
            .entry(soname)
            .or_insert_with(|| format!("{guest_folder}/{name}"));
    }
    Ok(())
}

/// DT_SONAME of a shared object.
fn soname(data: &[u8]) -> Option<String> {
    let header = FileHeader64::<object::Endianness>::parse(data).ok()?;
    let endian = header.endian().ok()?;
    if header.e_type(endian) != ET_DYN {
        return None;
    }
    let sections = header.sections(endian, data).ok()?;
    let (entries, strings_at) = sections.dynamic(endian, data).ok()??;
    let strings = sections.section(strings_at).ok()?.data(endian, data).ok()?;
    let entry = entries.iter().find(|e| e.d_tag(endian) == DT_SONAME)?;
    let at = usize::try_from(entry.d_val(endian)).ok()?;
    let text = strings.get(at..)?.split(|&byte| byte == 0).next()?;
    String::from_utf8(text.to_vec())
        .ok()
        .filter(|name| !name.contains('/') && !name.is_empty())
}

fn encode(libraries: BTreeMap<String, String>) -> Result<Vec<u8>, LdCacheError> {
    let mut libraries: Vec<(String, String)> = libraries.into_iter().collect();
    // The loader's binary search wants descending order.
    libraries.sort_by(|(a, _), (b, _)| compare(b.as_bytes(), a.as_bytes()));
    let long = |_| LdCacheError::TooLong;
    let mut strings: Vec<u8> = Vec::new();
    let strings_at = HEADER_BYTES + ENTRY_BYTES * libraries.len();
    let mut entries = Vec::new();
    for (soname, path) in &libraries {
        let mut place = |text: &str| {
            let at = u32::try_from(strings_at + strings.len()).map_err(long);
            strings.extend_from_slice(text.as_bytes());
            strings.push(0);
            at
        };
        let (key, value) = (place(soname)?, place(path)?);
        let (os_version, hwcap) = (0, [0, 0]);
        for field in [FLAGS, key, value, os_version, hwcap[0], hwcap[1]] {
            entries.extend_from_slice(&field.to_le_bytes());
        }
    }
    let mut cache = MAGIC.to_vec();
    let count = u32::try_from(libraries.len()).map_err(long)?;
    let length = u32::try_from(strings.len()).map_err(long)?;
    let extensions_at = 0;
    for field in [count, length, LITTLE_ENDIAN, extensions_at, 0, 0, 0] {
        cache.extend_from_slice(&field.to_le_bytes());
    }
    cache.extend_from_slice(&entries);
    cache.extend_from_slice(&strings);
    Ok(cache)
}

/// `_dl_cache_libcmp` of elf/dl-cache.c: runs of digits compare as numbers.
fn compare(mut a: &[u8], mut b: &[u8]) -> Ordering {
    loop {
        match (a.first(), b.first()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(x), Some(y)) => match (x.is_ascii_digit(), y.is_ascii_digit()) {
                (true, true) => match number(&mut a).cmp(&number(&mut b)) {
                    Ordering::Equal => {}
                    other => return other,
                },
                (true, false) => return Ordering::Greater,
                (false, true) => return Ordering::Less,
                (false, false) if x != y => return x.cmp(y),
                (false, false) => (a, b) = (&a[1..], &b[1..]),
            },
        }
    }
}

fn number(text: &mut &[u8]) -> u64 {
    let mut value = 0_u64;
    while let Some((digit, rest)) = text.split_first().filter(|(byte, _)| byte.is_ascii_digit()) {
        value = value
            .saturating_mul(10)
            .saturating_add(u64::from(digit - b'0'));
        *text = rest;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_compare_as_numbers() {
        assert_eq!(compare(b"libc.so.6", b"libc.so.10"), Ordering::Less);
        assert_eq!(compare(b"libc.so", b"libc.so.6"), Ordering::Less);
        assert_eq!(compare(b"lib1", b"liba"), Ordering::Greater);
        assert_eq!(compare(b"libm.so.6", b"libm.so.6"), Ordering::Equal);
    }

    #[test]
    fn the_c_librarys_own_reader_understands_the_cache() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("cache");
        let names = ["libc.so.6", "libm.so.6", "libz.so.1"];
        let libraries = names
            .iter()
            .map(|n| ((*n).to_owned(), format!("/lib/x86_64-linux-gnu/{n}")));
        fs::write(&file, encode(libraries.collect()).unwrap()).unwrap();
        let ldconfig = crate::tool::Tool {
            name: "ldconfig",
            package: "libc-bin",
        };
        let listing = ldconfig.run(|command| {
            command.arg("-p").arg("-C").arg(&file);
        });
        let listing = String::from_utf8(listing.unwrap()).unwrap();
        for name in names {
            let line = format!("{name} (libc6,x86-64) => /lib/x86_64-linux-gnu/{name}");
            assert!(listing.contains(&line), "{listing}");
        }
    }

    #[test]
    fn a_cut_library_has_no_name_and_does_not_panic() {
        let mut path = fs::read_dir("/usr/lib/x86_64-linux-gnu")
            .unwrap()
            .map(|e| e.unwrap().path());
        let library = path.find(|p| p.is_file() && p.to_string_lossy().contains("libz.so"));
        let data = fs::read(library.unwrap()).unwrap();
        assert_eq!(soname(&data).as_deref(), Some("libz.so.1"));
        for length in (0..data.len()).step_by(97) {
            let _ = soname(&data[..length]);
        }
    }
}
