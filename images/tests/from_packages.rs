//! Builds from real packages: needs the package tools and, on a cold cache, the network.

use std::path::Path;

use thaw_images::{ImageStore, Quiet};

/// Outside the build folder's profile, so that all test runs share one download cache.
fn store(name: &str) -> ImageStore {
    ImageStore::new(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name))
}

#[test]
fn the_kernel_is_built_once_and_its_modules_are_in_order() {
    let store = store("home");
    let kernel = store.kernel(&mut Quiet).unwrap();
    let vmlinux = std::fs::read(&kernel.vmlinux).unwrap();
    assert!(vmlinux.starts_with(b"\x7fELF"));
    let names: Vec<_> = kernel
        .modules
        .iter()
        .map(|path| path.file_stem().unwrap().to_str().unwrap())
        .collect();
    let place = |name: &str| {
        names
            .iter()
            .position(|n| *n == name)
            .unwrap_or_else(|| panic!("{name} in {names:?}"))
    };
    assert!(place("virtio") < place("virtio_mmio"));
    assert!(place("vsock") < place("vmw_vsock_virtio_transport"));
    assert!(place("libcrc32c") < place("erofs"));
    let start = std::time::Instant::now();
    assert_eq!(store.kernel(&mut Quiet).unwrap(), kernel);
    assert!(start.elapsed().as_millis() < 100, "{:?}", start.elapsed());
}
