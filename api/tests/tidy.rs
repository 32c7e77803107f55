//! The rules of this repository that a compiler does not check.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Who may depend on whom; ARCHITECTURE.md draws it. Development dependencies are not bound.
const ARROWS: &[(&str, &[&str])] = &[
    ("thaw-agent", &["thaw-agent-protocol"]),
    ("thaw-agent-protocol", &[]),
    (
        "thaw-api",
        &[
            "thaw-api-types",
            "thaw-images",
            "thaw-lab",
            "thaw-runtime",
            "thaw-snapshot",
            "thaw-snapshot-store",
        ],
    ),
    ("thaw-api-types", &[]),
    (
        "thaw-bench",
        &[
            "thaw-agent-protocol",
            "thaw-jail",
            "thaw-snapshot",
            "thaw-vmm-control",
        ],
    ),
    ("thaw-bench-guest", &[]),
    ("thaw-egress", &["thaw-network", "thaw-vmm-control"]),
    ("thaw-fuzz", &[]),
    ("thaw-images", &[]),
    ("thaw-jail", &[]),
    ("thaw-lab", &[]),
    ("thaw-loadtest", &[]),
    ("thaw-network", &["thaw-agent-protocol", "thaw-vmm-control"]),
    (
        "thaw-runtime",
        &[
            "thaw-agent-protocol",
            "thaw-jail",
            "thaw-network",
            "thaw-snapshot",
            "thaw-vmm-control",
        ],
    ),
    ("thaw-snapshot", &[]),
    (
        "thaw-snapshot-pager",
        &["thaw-snapshot", "thaw-snapshot-store"],
    ),
    ("thaw-snapshot-store", &["thaw-snapshot"]),
    (
        "thaw-vmm",
        &[
            "thaw-agent-protocol",
            "thaw-jail",
            "thaw-snapshot",
            "thaw-snapshot-pager",
            "thaw-vmm-control",
        ],
    ),
    ("thaw-vmm-control", &[]),
    ("thaw-vmm-test-guest", &["thaw-fuzz"]),
];
/// Crates that must not have these, directly: what a crate exists to forbid.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("thaw-vmm", &["tokio", "axum", "reqwest"]),
    ("thaw-jail", &["kvm-ioctls", "tokio", "vm-memory"]),
    ("thaw-snapshot", &["kvm-ioctls", "tokio", "vm-memory"]),
    ("thaw-snapshot-pager", &["kvm-ioctls", "tokio", "vm-memory"]),
    ("thaw-snapshot-store", &["kvm-ioctls", "vm-memory"]),
    ("thaw-agent-protocol", &["tokio", "kvm-ioctls"]),
    ("thaw-vmm-control", &["tokio", "kvm-ioctls", "vm-memory"]),
    ("thaw-runtime", &["kvm-ioctls", "vm-memory", "axum"]),
    ("thaw-api", &["kvm-ioctls", "vm-memory", "thaw-vmm"]),
    ("thaw-api-types", &["tokio", "axum"]),
    ("thaw-bench", &["thaw-vmm"]),
    (
        "thaw-network",
        &[
            "hickory-proto",
            "hickory-resolver",
            "hyper",
            "tokio-rustls",
            "kvm-ioctls",
        ],
    ),
    (
        "thaw-egress",
        &["kvm-ioctls", "vm-memory", "axum", "reqwest"],
    ),
];
/// Crates that may hold unsafe code, in modules of their own.
const UNSAFE_ALLOWED: &[&str] = &[
    "agent",
    "runtime/bench",
    "runtime/bench/guest",
    "runtime/fuzz",
    "runtime/jail",
    "runtime/lab",
    "runtime/network/egress",
    "runtime/vmm",
    "runtime/vmm/tests/guest",
    "snapshot/pager",
];
/// Longest source file, lines.
const LINES_MAX: usize = 700;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn packages() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let metadata = Command::new(cargo)
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        metadata.status.success(),
        "{}",
        String::from_utf8_lossy(&metadata.stderr)
    );
    serde_json::from_slice::<Value>(&metadata.stdout).unwrap()["packages"]
        .as_array()
        .unwrap()
        .clone()
}

/// Names of a package's ordinary dependencies.
fn dependencies(package: &Value) -> BTreeSet<String> {
    let all = package["dependencies"].as_array().unwrap().iter();
    all.filter(|dependency| dependency["kind"] != "dev")
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

fn all_sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    sources(&root(), &mut found);
    assert!(
        found.len() > 50,
        "the walk over the sources finds too little"
    );
    found
}

#[test]
fn dependency_arrows_are_those_of_the_architecture() {
    let packages = packages();
    let known: BTreeSet<_> = ARROWS.iter().map(|(name, _)| *name).collect();
    let present: BTreeSet<_> = packages
        .iter()
        .map(|package| package["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        present, known,
        "a crate appeared or went: draw its arrows here and in ARCHITECTURE.md"
    );
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let allowed = ARROWS.iter().find(|(known, _)| *known == name).unwrap().1;
        let ours: Vec<_> = dependencies(package)
            .into_iter()
            .filter(|dependency| dependency.starts_with("thaw-"))
            .collect();
        for dependency in &ours {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{name} must not depend on {dependency}"
            );
        }
        for arrow in allowed {
            assert!(
                ours.iter().any(|dependency| dependency == arrow),
                "{name} does not use {arrow} any more: remove the arrow"
            );
        }
    }
}

#[test]
fn crates_keep_what_they_exist_to_forbid() {
    let packages = packages();
    for (name, forbidden) in FORBIDDEN {
        let package = packages
            .iter()
            .find(|package| package["name"] == *name)
            .unwrap();
        for dependency in dependencies(package) {
            assert!(
                !forbidden.contains(&dependency.as_str()),
                "{name} must not depend on {dependency}"
            );
        }
    }
}

#[test]
fn every_version_stands_in_the_one_table() {
    for package in packages() {
        let manifest = fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        let stray: Vec<_> = manifest
            .lines()
            .filter(|line| line.contains("version = \"") || line.contains(" = \"^"))
            .collect();
        assert!(
            stray.is_empty(),
            "{}: {stray:?} belongs in the workspace's table",
            package["name"]
        );
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{} does not use the workspace's lints",
            package["name"]
        );
    }
}

#[test]
fn unsafe_code_is_forbidden_where_it_is_not_needed() {
    for package in packages() {
        let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap());
        let folder = manifest
            .parent()
            .unwrap()
            .strip_prefix(root())
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        if UNSAFE_ALLOWED.contains(&folder.as_str()) {
            continue;
        }
        for target in package["targets"].as_array().unwrap() {
            if target["kind"][0] == "lib" || target["kind"][0] == "bin" {
                let path = target["src_path"].as_str().unwrap();
                assert!(
                    fs::read_to_string(path)
                        .unwrap()
                        .contains("#![forbid(unsafe_code)]"),
                    "{path} does not forbid unsafe code"
                );
            }
        }
    }
}

#[test]
fn no_test_stands_in_the_documentation() {
    for path in all_sources() {
        let text = fs::read_to_string(&path).unwrap();
        let fences = text.lines().filter_map(|line| {
            let line = line.trim_start();
            let comment = line.strip_prefix("///").or(line.strip_prefix("//!"))?;
            comment.trim_start().strip_prefix("```")
        });
        for opening in fences.step_by(2) {
            assert_eq!(
                opening,
                "text",
                "{}: `make test` runs no code that stands in comments",
                path.display()
            );
        }
    }
}

#[test]
fn files_are_short_enough_to_read_and_named_as_the_house_does() {
    for path in all_sources() {
        assert!(
            !path.ends_with("mod.rs"),
            "{}: modules are foo.rs beside foo/",
            path.display()
        );
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            !["utils", "util", "common", "helpers", "manager"].contains(&name),
            "{}: name it after what it does",
            path.display()
        );
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(
            lines <= LINES_MAX,
            "{} has {lines} lines, at most {LINES_MAX} are read with pleasure",
            path.display()
        );
    }
}

#[test]
fn no_test_is_ignored() {
    for path in all_sources() {
        let text = fs::read_to_string(&path).unwrap();
        let ignored = text
            .lines()
            .any(|line| line.trim_start().starts_with("#[ignore"));
        assert!(
            !ignored,
            "{}: a test that does not run proves nothing",
            path.display()
        );
    }
}

/// All sources and end-to-end tests.
fn all_tests() -> String {
    let mut tests = String::new();
    for path in all_sources() {
        tests.push_str(&fs::read_to_string(path).unwrap());
    }
    for entry in fs::read_dir(root().join("api/tests/e2e")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "py") {
            tests.push_str(&fs::read_to_string(path).unwrap());
        }
    }
    tests
}

fn exists(tests: &str, name: &str) -> bool {
    tests.contains(&format!("fn {name}(")) || tests.contains(&format!("def {name}("))
}

#[test]
fn every_proof_against_a_threat_is_a_test_that_exists() {
    let threats = fs::read_to_string(root().join("THREATS.md")).unwrap();
    let tests = all_tests();
    let rows = threats
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| tries"));
    let mut count = 0;
    for row in rows {
        let proof = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let names: Vec<_> = proof.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "nothing proves: {row}");
        for name in names {
            assert!(exists(&tests, name), "no test {name}: {row}");
        }
        count += 1;
    }
    assert!(count >= 30, "THREATS.md names only {count} threats");
}

#[test]
fn every_invariant_names_a_test_that_exists() {
    let architecture = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let tests = all_tests();
    let mut count = 0;
    for paragraph in architecture.split("**Invariant:**").skip(1) {
        let paragraph = paragraph
            .split("\n\n")
            .next()
            .unwrap()
            .split("\n- ")
            .next()
            .unwrap();
        let names: Vec<_> = paragraph
            .split('`')
            .filter(|word| word.contains('_') && !word.contains(' ') && !word.contains('/'))
            .collect();
        let found = names.iter().any(|name| exists(&tests, name));
        assert!(
            found,
            "no test of these exists: {names:?}, for the invariant:{paragraph}"
        );
        count += 1;
    }
    assert!(count >= 10, "ARCHITECTURE.md names only {count} invariants");
}
