//! Builds from real packages: needs the package tools and, on a cold cache, the network.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use thaw_images::{ImageStore, Progress, Quiet, RuntimeName};

/// What an operation may take when there is nothing to do; its real time is below a millisecond.
const IDLE_MAX: Duration = Duration::from_millis(200);

/// A new, empty state folder; all tests and all runs share one download cache.
fn store() -> (TempDir, ImageStore) {
    let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    let store = ImageStore::new(home.path()).with_cache(cache);
    (home, store)
}

fn unpack(image: &Path, into: &Path) {
    let output = Command::new("fsck.erofs")
        .arg(format!("--extract={}", into.display()))
        .arg("--no-preserve-owner")
        .arg(image)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn named(name: &str) -> RuntimeName {
    name.parse().unwrap()
}

/// Counts steps, to tell a build from a look.
#[derive(Default)]
struct Count(usize);

impl Progress for Count {
    fn step(&mut self, _name: &str) {
        self.0 += 1;
    }
    fn detail(&mut self, _text: &str) {}
    fn done(&mut self, _took: Duration) {}
}

#[test]
fn the_kernel_is_built_once_and_its_modules_are_in_order() {
    let (_home, store) = store();
    let kernel = store.kernel(&mut Quiet).unwrap();
    assert!(fs::read(&kernel.vmlinux).unwrap().starts_with(b"\x7fELF"));
    assert_eq!(&fs::read(&kernel.bzimage).unwrap()[0x202..0x206], b"HdrS");
    let names = |modules: &[std::path::PathBuf]| -> Vec<String> {
        let name = |path: &std::path::PathBuf| path.file_stem().unwrap().to_str().unwrap().into();
        modules.iter().map(name).collect()
    };
    let network = names(&kernel.network_modules);
    assert_eq!(network, ["failover", "net_failover", "virtio_net"]);
    let names = names(&kernel.modules);
    let place = |name: &str| {
        names
            .iter()
            .position(|n| *n == name)
            .unwrap_or_else(|| panic!("{name} in {names:?}"))
    };
    assert!(place("virtio") < place("virtio_mmio"));
    assert!(place("vsock") < place("vmw_vsock_virtio_transport"));
    assert!(place("libcrc32c") < place("erofs"));
    let start = Instant::now();
    assert_eq!(store.kernel(&mut Quiet).unwrap(), kernel);
    assert!(start.elapsed() < IDLE_MAX, "{:?}", start.elapsed());
}

#[test]
fn equal_packages_give_equal_bytes_and_two_builders_build_once() {
    let (home, first) = store();
    let (_other_home, second) = store();
    let build = |store: &ImageStore| {
        let mut count = Count::default();
        (
            store.runtime(RuntimeName::PROVIDED, &mut count).unwrap(),
            count.0,
        )
    };
    let ((a, steps_a), (b, steps_b)) = std::thread::scope(|scope| {
        let one = scope.spawn(|| build(&first));
        let two = scope.spawn(|| build(&first));
        (one.join().unwrap(), two.join().unwrap())
    });
    assert_eq!(a, b);
    assert!(
        steps_a.min(steps_b) == 0 && steps_a.max(steps_b) > 0,
        "{steps_a} {steps_b}"
    );
    let (c, _) = build(&second);
    assert_eq!(a.manifest, c.manifest);
    assert!(fs::read(&a.rootfs).unwrap() == fs::read(&c.rootfs).unwrap());

    let start = Instant::now();
    assert_eq!(build(&first), (a, 0));
    assert!(start.elapsed() < IDLE_MAX, "{:?}", start.elapsed());
    let scratch = fs::read_dir(home.path().join("staging")).unwrap();
    let left: Vec<_> = scratch.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["guard"]);
}

#[test]
fn the_python_image_holds_a_python_that_runs_the_lambda_client() {
    let (home, store) = store();
    let image = store.runtime(named("python3.13"), &mut Quiet).unwrap();
    let tree = home.path().join("tree");
    unpack(&image.rootfs, &tree);
    for path in ["var/task", "opt", "tmp", "proc", "sys", "dev", "run"] {
        assert!(tree.join(path).is_dir(), "{path}");
    }
    let passwd = fs::read_to_string(tree.join("etc/passwd")).unwrap();
    assert!(passwd.contains("\nsbx_user1051:x:993:990:"), "{passwd}");
    let certificates = fs::read_to_string(tree.join("etc/ssl/certs/ca-certificates.crt")).unwrap();
    assert!(certificates.matches("BEGIN CERTIFICATE").count() > 100);

    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    let output = Command::new(libraries.join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(tree.join("usr/bin/python3.13"))
        .args([
            "-c",
            "import random, simplejson.scanner, sqlite3, ssl, thaw_runtime, uuid; assert simplejson.scanner.c_make_scanner; \
             thaw_runtime.reseed(); print(thaw_runtime.__cached__)",
        ])
        .env("PYTHONHOME", tree.join("usr"))
        .env("PYTHONPATH", tree.join("var/runtime"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let compiled = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    assert!(compiled.is_file(), "compiled ahead: {}", compiled.display());
}

#[test]
fn the_node_image_holds_a_node_with_native_parts_of_the_lambda_client_that_load_in_it() {
    let (home, store) = store();
    let image = store.runtime(named("nodejs24.x"), &mut Quiet).unwrap();
    assert_eq!(image.manifest.contents.npm.len(), 3);
    let tree = home.path().join("tree");
    unpack(&image.rootfs, &tree);
    let client = tree.join("var/runtime/node_modules/aws-lambda-ric");
    assert!(client.join("index.mjs").is_file());
    assert!(
        !client.join("deps").exists(),
        "sources are not in the image"
    );
    // The distribution's OpenSSL, which the client's libcurl needs, beside the one that this Node.js has inside.
    let script = "const [reseed, client] = process.argv.slice(1); require(reseed)(); const module = { exports: {} };
        process.dlopen(module, client, os.constants.dlopen.RTLD_NOW | os.constants.dlopen.RTLD_DEEPBIND);
        console.log(Object.keys(module.exports).join(), crypto.randomUUID().length)";
    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    let output = Command::new(libraries.join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(tree.join("var/lang/bin/node"))
        .args(["-e", script])
        .arg(tree.join("var/runtime/thaw_identity.node"))
        .arg(client.join("rapid-client.node"))
        .env("AWS_LAMBDA_RUNTIME_API", "127.0.0.1:1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("next") && told.ends_with(" 36\n"), "{told}");
}

#[test]
fn an_overlay_is_sparse_and_always_the_same() {
    let (_home, first) = store();
    let (_other_home, second) = store();
    let (a, b) = (first.overlay(64).unwrap(), second.overlay(64).unwrap());
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    let metadata = fs::metadata(&a).unwrap();
    assert_eq!(metadata.len(), 64 << 20);
    assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512 < 2 << 20);
    assert!(first.overlay(1).is_err());
}
