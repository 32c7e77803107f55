//! Builds artifacts into a state folder: `build HOME kernel`, `build HOME initramfs AGENT`,
//! `build HOME runtime NAME`, `build HOME overlay MIB`, `build HOME code ZIP OUT`.

use std::path::Path;
use std::time::Duration;

use thaw_images::{ImageStore, Progress};

struct Print;

impl Progress for Print {
    fn step(&mut self, name: &str) {
        println!("{name}");
    }
    fn detail(&mut self, text: &str) {
        println!("  {text}");
    }
    fn done(&mut self, took: Duration) {
        println!("  done in {} ms", took.as_millis());
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [home, "kernel"] => kernel(&ImageStore::new(*home)),
        [home, "initramfs", agent] => initramfs(&ImageStore::new(*home), Path::new(agent)),
        [home, "runtime", name] => runtime(&ImageStore::new(*home), name),
        [home, "overlay", mib] => overlay(&ImageStore::new(*home), mib),
        [home, "code", zip, out] => code(&ImageStore::new(*home), zip, Path::new(out)),
        _ => Err("usage: build HOME kernel | initramfs AGENT | runtime NAME | overlay MIB | code ZIP OUT".into()),
    }
}

fn kernel(store: &ImageStore) -> Outcome {
    let kernel = store.kernel(&mut Print)?;
    println!("{} {}", kernel.release, kernel.vmlinux.display());
    Ok(())
}

fn initramfs(store: &ImageStore, agent: &Path) -> Outcome {
    let kernel = store.kernel(&mut Print)?;
    println!("{}", store.initramfs(&kernel, agent)?.path.display());
    Ok(())
}

fn runtime(store: &ImageStore, name: &str) -> Outcome {
    let image = store.runtime(name.parse()?, &mut Print)?;
    println!("{} {}", image.digest, image.rootfs.display());
    Ok(())
}

fn overlay(store: &ImageStore, mib: &str) -> Outcome {
    println!("{}", store.overlay(mib.parse()?)?.display());
    Ok(())
}

fn code(store: &ImageStore, zip: &str, out: &Path) -> Outcome {
    println!("{:?}", store.code_image(&std::fs::read(zip)?, &[], out)?);
    Ok(())
}
