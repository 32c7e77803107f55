//! Compiles the lab's init into a static executable that the library embeds.
//!
//! It is compiled by the same rustc, with the standard library alone: whoever links `thaw-lab` has the init with it, needs no second
//! build step, and no target beyond the host's.

use std::{env, ffi::OsString, path::PathBuf, process::Command};

fn main() {
    for source in ["init", "src/protocol.rs"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let out =
        PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("thaw-lab-init");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let status = Command::new(rustc)
        .args([
            "--edition=2024",
            "--crate-name=thaw_lab_init",
            "--crate-type=bin",
        ])
        .args([
            "-Ctarget-feature=+crt-static",
            "-Copt-level=2",
            "-Cpanic=abort",
            "-Cstrip=symbols",
        ])
        .arg("init/main.rs")
        .arg("-o")
        .arg(&out)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("rustc could not compile the lab's init: {status}"),
        Err(error) => panic!("rustc could not be started for the lab's init: {error}"),
    }
}
