//! What a test guest leaves behind: a secret in every kind of memory that it has, and work that never ends.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;

/// Where secrets are hidden; the harness looks for each of them.
const PLACES: [&str; 8] = [
    "heap",
    "pagecache",
    "tmpfs",
    "overlay",
    "environment",
    "pipe",
    "socket",
    "kmsg",
];

/// Hides `{seed}-{place}` in each of [`PLACES`], for as long as the guest lives.
pub fn hide(seed: &str) -> io::Result<String> {
    for place in PLACES {
        let secret = format!("{seed}-{place}");
        let bytes = secret.as_bytes();
        match place {
            "heap" => drop(Box::leak(Box::new(bytes.repeat(100)))),
            "pagecache" => fs::write("/secret", bytes)?,
            "tmpfs" => {
                super::mount("tmpfs", "/secrets", "tmpfs");
                fs::write("/secrets/secret", bytes)?;
            }
            "overlay" => {
                let mut file = fs::File::create("/disk/secret")?;
                file.write_all(bytes)?;
                file.sync_all()?;
            }
            "environment" => {
                let mut child = Command::new("/init");
                std::mem::forget(child.arg("hold").env("SECRET", secret).spawn()?);
            }
            "pipe" => {
                let (reader, mut writer) = io::pipe()?;
                writer.write_all(bytes)?;
                std::mem::forget((reader, writer));
            }
            "socket" => {
                let (mut one, other) = UnixStream::pair()?;
                one.write_all(bytes)?;
                std::mem::forget((one, other));
            }
            "kmsg" => OpenOptions::new()
                .write(true)
                .open("/dev/kmsg")?
                .write_all(bytes)?,
            unknown => panic!("no place {unknown}"),
        }
    }
    Ok(PLACES.join(" "))
}

/// Writes files to the disk for ever.
pub fn churn() {
    thread::spawn(|| {
        for number in 0u64.. {
            let mut file = fs::File::create(format!("/disk/churn-{}", number % 8)).unwrap();
            file.write_all(&number.to_le_bytes().repeat(4096)).unwrap();
            file.sync_all().unwrap();
        }
    });
}
