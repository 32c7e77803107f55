//! Which modules the guest needs, and in which order they load.
//!
//! What modprobe computes from modules.dep is computed here from each module's own `.modinfo`
//! section (`depends=`, `softdep=`), because the package carries no modules.dep.

use std::collections::{BTreeMap, BTreeSet};

use object::{Object, ObjectSection};

/// What loading a module needs to know of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Modules that must be loaded before (`depends=`), names normalised.
    pub depends: Vec<String>,
    /// Modules or aliases to load before if they exist (`softdep=pre:`), names normalised.
    pub soft_pre: Vec<String>,
}

/// A module cannot be read, or the wanted ones cannot be ordered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// The file is no ELF object.
    #[error("no ELF object ({0})")]
    NotElf(String),
    /// The object has no readable `.modinfo` section.
    #[error("no .modinfo section")]
    NoModinfo,
    /// A module is neither in the package nor built in.
    #[error("the kernel has no module {name}, needed by {by}")]
    Absent {
        /// The missing module.
        name: String,
        /// Who needs it.
        by: String,
    },
    /// Modules depend on one another in a circle.
    #[error("the dependencies of module {name} form a circle")]
    Circle {
        /// A module on the circle.
        name: String,
    },
}

impl ModuleInfo {
    /// Reads the `.modinfo` section of a module file.
    ///
    /// # Errors
    /// When `file` is no ELF object with that section.
    pub fn parse(file: &[u8]) -> Result<Self, ModuleError> {
        let object =
            object::File::parse(file).map_err(|error| ModuleError::NotElf(error.to_string()))?;
        let section = object
            .section_by_name(".modinfo")
            .ok_or(ModuleError::NoModinfo)?;
        let data = section.data().map_err(|_| ModuleError::NoModinfo)?;
        Ok(Self::from_section(data))
    }

    /// Reads NUL-separated `key=value` strings (include/linux/moduleparam.h, `__MODULE_INFO`).
    fn from_section(data: &[u8]) -> Self {
        let mut info = Self::default();
        for entry in data.split(|&byte| byte == 0) {
            let entry = String::from_utf8_lossy(entry);
            if let Some(names) = entry.strip_prefix("depends=") {
                info.depends
                    .extend(names.split(',').filter(|n| !n.is_empty()).map(normalise));
            } else if let Some(text) = entry.strip_prefix("softdep=") {
                info.soft_pre.extend(soft_pre(text));
            }
        }
        info
    }
}

/// The `pre:` names of `pre: a b post: c`.
fn soft_pre(text: &str) -> Vec<String> {
    let mut is_pre = false;
    let mut names = Vec::new();
    for word in text.split_whitespace() {
        match word {
            "pre:" => is_pre = true,
            "post:" => is_pre = false,
            name if is_pre => names.push(normalise(name)),
            _ => {}
        }
    }
    names
}

/// Module names treat `-` and `_` alike; file names keep either.
pub(crate) fn normalise(name: &str) -> String {
    name.replace('-', "_")
}

/// The names in a modules.builtin file (one path a line).
pub(crate) fn builtin_names(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"))
        .map(normalise)
        .collect()
}

/// The modules to load for `wanted`, each after all it needs; those in `builtin` are left out.
/// `info` reads one module, or answers `None` when the package has none of that name.
///
/// # Errors
/// What `info` answers; or a needed module exists nowhere; or the dependencies form a circle.
pub fn load_order<E: From<ModuleError>>(
    wanted: &[&str],
    builtin: &BTreeSet<String>,
    info: &mut dyn FnMut(&str) -> Result<Option<ModuleInfo>, E>,
) -> Result<Vec<String>, E> {
    let mut walk = Walk {
        builtin,
        info,
        state: BTreeMap::new(),
        order: Vec::new(),
    };
    for name in wanted {
        walk.visit(&normalise(name), "the guest", Need::Hard)?;
    }
    Ok(walk.order)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Hard,
    Soft,
}

#[derive(Clone, Copy)]
enum Visit {
    Open,
    Done,
}

struct Walk<'a, E> {
    builtin: &'a BTreeSet<String>,
    info: &'a mut dyn FnMut(&str) -> Result<Option<ModuleInfo>, E>,
    state: BTreeMap<String, Visit>,
    order: Vec<String>,
}

impl<E: From<ModuleError>> Walk<'_, E> {
    fn visit(&mut self, name: &str, by: &str, need: Need) -> Result<(), E> {
        if self.builtin.contains(name) {
            return Ok(());
        }
        match self.state.get(name) {
            Some(Visit::Done) => return Ok(()),
            // A soft dependency may point back; only a hard one makes loading impossible.
            Some(Visit::Open) if need == Need::Soft => return Ok(()),
            Some(Visit::Open) => {
                return Err(ModuleError::Circle {
                    name: name.to_owned(),
                }
                .into());
            }
            None => {}
        }
        let Some(info) = (self.info)(name)? else {
            // Soft dependencies often name crypto aliases ("crc32c") that something built in serves.
            return match need {
                Need::Soft => Ok(()),
                Need::Hard => Err(ModuleError::Absent {
                    name: name.to_owned(),
                    by: by.to_owned(),
                }
                .into()),
            };
        };
        self.state.insert(name.to_owned(), Visit::Open);
        for soft in &info.soft_pre {
            self.visit(soft, name, Need::Soft)?;
        }
        for hard in &info.depends {
            self.visit(hard, name, Need::Hard)?;
        }
        self.state.insert(name.to_owned(), Visit::Done);
        self.order.push(name.to_owned());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(
        wanted: &[&str],
        builtin: &[&str],
        modules: &[(&str, &[&str], &[&str])],
    ) -> Result<Vec<String>, ModuleError> {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let all: BTreeMap<_, _> = modules
            .iter()
            .map(|(name, hard, soft)| {
                (
                    *name,
                    ModuleInfo {
                        depends: own(hard),
                        soft_pre: own(soft),
                    },
                )
            })
            .collect();
        let builtin = builtin.iter().map(|n| (*n).to_owned()).collect();
        load_order(wanted, &builtin, &mut |name| Ok(all.get(name).cloned()))
    }

    #[test]
    fn modinfo_strings_are_read() {
        let info = ModuleInfo::from_section(
            b"license=GPL\0depends=virtio,virtio-ring\0softdep=pre: crc32c-x a post: b\0\0",
        );
        assert_eq!(info.depends, ["virtio", "virtio_ring"]);
        assert_eq!(info.soft_pre, ["crc32c_x", "a"]);
    }

    #[test]
    fn a_module_follows_all_it_needs() {
        let modules: [(&str, &[&str], &[&str]); 3] = [
            ("blk", &["virtio", "ring"], &[]),
            ("ring", &["virtio"], &["crc32c"]),
            ("virtio", &[], &[]),
        ];
        assert_eq!(
            order(&["blk"], &[], &modules).unwrap(),
            ["virtio", "ring", "blk"]
        );
        assert_eq!(
            order(&["blk"], &["virtio"], &modules).unwrap(),
            ["ring", "blk"]
        );
    }

    #[test]
    fn a_missing_module_is_named() {
        let error = order(&["blk"], &[], &[("blk", &["virtio"], &[])]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel has no module virtio, needed by blk"
        );
    }

    #[test]
    fn a_circle_is_refused_but_a_soft_one_is_not() {
        assert!(order(&["a"], &[], &[("a", &["b"], &[]), ("b", &["a"], &[])]).is_err());
        let soft = order(&["a"], &[], &[("a", &["b"], &[]), ("b", &[], &["a"])]);
        assert_eq!(soft.unwrap(), ["b", "a"]);
    }

    proptest! {
        #[test]
        fn no_module_file_panics(mut data: Vec<u8>) {
            let _ = ModuleInfo::parse(&data);
            data.splice(0..0, *b"\x7fELF\x02\x01\x01");
            let _ = ModuleInfo::parse(&data);
        }

        #[test]
        fn any_graph_without_circles_is_ordered(edges in prop::collection::vec((0_usize..12, 0_usize..12), 0..40)) {
            // An edge always points to a smaller number, so that there is no circle.
            let needs = |n: usize| edges.iter().filter(move |(a, b)| a.max(b) == &n && a != b)
                .map(|(a, b)| format!("m{}", a.min(b))).collect::<Vec<_>>();
            let names: Vec<String> = (0..12).map(|n| format!("m{n}")).collect();
            let wanted: Vec<&str> = names.iter().rev().map(String::as_str).collect();
            let order = load_order::<ModuleError>(&wanted, &BTreeSet::new(), &mut |name| {
                let n = name[1..].parse().unwrap();
                Ok(Some(ModuleInfo { depends: needs(n), soft_pre: Vec::new() }))
            }).unwrap();
            prop_assert_eq!(order.len(), 12);
            for (place, name) in order.iter().enumerate() {
                for need in needs(name[1..].parse().unwrap()) {
                    prop_assert!(order[..place].contains(&need));
                }
            }
        }
    }
}
