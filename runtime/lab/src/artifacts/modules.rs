//! The kernel modules that the init loads, and the order they need.

use super::{BuildError, debian, io_error};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Needed before anything can be shared or run, then what sandboxes, images and networks use. Loading a module later patches the running
/// kernel, which can hang the lab (see the init's `boot.rs`), so what may be used is loaded at once.
pub const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtiofs",
    "overlay",
    "tun",
    "loop",
    "erofs",
    "veth",
    "nf_tables",
    "nft_tproxy",
    "kvm",
    "kvm_amd",
];

/// Names and contents of the wanted modules under `modules` and of all that they need, in loading order.
pub fn in_order(modules: &Path) -> Result<Vec<(String, Vec<u8>)>, BuildError> {
    let mut paths = BTreeMap::new();
    collect(modules, &mut paths)?;
    let mut ordered = Vec::new();
    for wanted in WANTED {
        add(wanted, &paths, &mut ordered)?;
    }
    Ok(ordered)
}

fn collect(folder: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<(), BuildError> {
    for path in debian::entries(folder)? {
        let metadata = fs::symlink_metadata(&path).map_err(io_error("read", &path))?;
        if metadata.is_dir() {
            collect(&path, paths)?;
        } else if let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".ko"))
        {
            paths.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn add(
    name: &str,
    paths: &BTreeMap<String, PathBuf>,
    ordered: &mut Vec<(String, Vec<u8>)>,
) -> Result<(), BuildError> {
    let file = format!("{name}.ko");
    if ordered.iter().any(|(done, _)| *done == file) {
        return Ok(());
    }
    let path = paths
        .get(name)
        .ok_or_else(|| BuildError::Lacks(format!("module {name}")))?;
    let content = fs::read(path).map_err(io_error("read", path))?;
    for needed in needs(&content) {
        add(&needed, paths, ordered)?;
    }
    ordered.push((file, content));
    Ok(())
}

/// The `depends=` entry of the module's .modinfo section. Modules never depend on each other in a circle: the linker forbids it.
fn needs(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let rest = &module[at + key.len()..];
    let end = rest.iter().position(|&byte| byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needed_modules_come_first_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = BTreeMap::new();
        for (name, needs) in [("a", "b,c-d"), ("b", "c-d"), ("c_d", "")] {
            let path = folder.path().join(format!("{name}.ko"));
            fs::write(&path, format!("x\0depends={needs}\0y")).unwrap();
            paths.insert(name.to_owned(), path);
        }
        let mut ordered = Vec::new();
        add("a", &paths, &mut ordered).unwrap();
        add("b", &paths, &mut ordered).unwrap();
        assert_eq!(
            ordered
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>(),
            ["c_d.ko", "b.ko", "a.ko"]
        );
        assert!(matches!(
            add("gone", &paths, &mut ordered),
            Err(BuildError::Lacks(_))
        ));
    }
}
