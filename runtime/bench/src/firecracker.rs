//! Firecracker beside it: the same kernel, initramfs, command line, memory and answer, over its documented API
//! (docs/snapshotting/snapshot-support.md, docs/vsock.md of its repository), one fresh process for each restore.
//!
//! Its host-side handshake is given the best case: the question is sent together with `CONNECT`, without waiting for `OK`.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::echo::{COMMAND_LINE, GUEST_PORT, PATIENCE, PROBE};

/// How long to wait between looks for a socket that is not there yet.
const POLL: Duration = Duration::from_micros(300);
/// Name of the API socket in a process's folder.
const API: &str = "api.sock";
/// Name of the vsock device's socket in a process's folder: relative, so that clones do not collide.
const VSOCK: &str = "v.sock";
/// Longest head of an answer of the API, bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// What clones are made of.
#[derive(Clone, Debug)]
pub struct Firecracker {
    /// The program the user named.
    pub program: PathBuf,
    /// Memory of a guest, MiB.
    pub memory_mib: u32,
    /// Snapshot, memory file, and a folder for each process.
    pub folder: PathBuf,
}

impl Firecracker {
    /// `firecracker --version`, first line.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn version(&self) -> anyhow::Result<String> {
        let told = Command::new(&self.program)
            .arg("--version")
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        let text = String::from_utf8_lossy(&told.stdout).into_owned();
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    /// Boots the guest, hears it answer, and freezes it.
    ///
    /// # Errors
    /// It does not boot or answer, or cannot be saved.
    pub fn freeze(&self, kernel: &Path, initramfs: &Path) -> anyhow::Result<()> {
        let mut process = self.spawn("boot")?;
        process.put(
            "/boot-source",
            &json!({ "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": COMMAND_LINE }),
        )?;
        process.put(
            "/machine-config",
            &json!({ "vcpu_count": 1, "mem_size_mib": self.memory_mib }),
        )?;
        process.put("/vsock", &json!({ "guest_cid": 3, "uds_path": VSOCK }))?;
        process.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
        drop(process.connect_answered()?);
        process.request("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let (state, memory) = self.files();
        process.put(
            "/snapshot/create",
            &json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory }),
        )
    }

    fn files(&self) -> (PathBuf, PathBuf) {
        (self.folder.join("state"), self.folder.join("memory"))
    }

    /// A process whose API answers, in a fresh folder of this name.
    ///
    /// # Errors
    /// It cannot be started, or its API does not come up.
    pub fn spawn(&self, name: &str) -> anyhow::Result<Process> {
        let folder = self.folder.join(name);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot clear {}", folder.display()));
            }
            _ => {}
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let child = Command::new(&self.program)
            .args(["--api-sock", API])
            .current_dir(&folder)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let mut process = Process {
            child,
            folder,
            api: None,
        };
        process.api = Some(process.connect(API)?);
        Ok(process)
    }

    /// Loads the snapshot into a process and runs it.
    ///
    /// # Errors
    /// The API refuses.
    pub fn load(&self, process: &mut Process) -> anyhow::Result<()> {
        let (state, memory) = self.files();
        process.put(
            "/snapshot/load",
            &json!({
                "snapshot_path": state,
                "mem_backend": { "backend_type": "File", "backend_path": memory },
                "resume_vm": true,
            }),
        )
    }
}

/// One Firecracker process; it dies with this value.
#[derive(Debug)]
pub struct Process {
    child: Child,
    folder: PathBuf,
    api: Option<UnixStream>,
}

impl Process {
    /// Of the process, for looking at its memory.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects to a socket in its folder as soon as there is one.
    fn connect(&mut self, name: &str) -> anyhow::Result<UnixStream> {
        let (path, began) = (self.folder.join(name), Instant::now());
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    return Ok(stream);
                }
                Err(error) => {
                    if let Some(status) = self.child.try_wait()? {
                        bail!("firecracker ended, {status}");
                    }
                    ensure!(began.elapsed() < PATIENCE, "no {}: {error}", path.display());
                }
            }
            thread::sleep(POLL);
        }
    }

    /// A stream to the guest on which it has answered already.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn connect_answered(&mut self) -> anyhow::Result<Echo> {
        let began = Instant::now();
        loop {
            let mut stream = self.connect(VSOCK)?;
            match handshake(&mut stream) {
                Ok(()) => return Ok(Echo(stream)),
                Err(error) => ensure!(
                    began.elapsed() < PATIENCE,
                    "the guest does not answer: {error}"
                ),
            }
            // Refused: nobody listens in the guest yet.
            thread::sleep(POLL);
        }
    }

    fn put(&mut self, path: &str, body: &Value) -> anyhow::Result<()> {
        self.request("PUT", path, body)
    }

    fn request(&mut self, method: &str, path: &str, body: &Value) -> anyhow::Result<()> {
        let stream = self.api.as_mut().context("no API connection")?;
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream
            .write_all(request.as_bytes())
            .with_context(|| format!("firecracker's API is closed at {path}"))?;
        let answer = http_answer(stream).with_context(|| format!("no answer to {path}"))?;
        ensure!(
            answer.starts_with("HTTP/1.1 2"),
            "firecracker refuses {path}: {answer}"
        );
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `CONNECT`, and the question behind it; `OK`, and the answer behind it.
fn handshake(stream: &mut UnixStream) -> io::Result<()> {
    let mut question = format!("CONNECT {GUEST_PORT}\n").into_bytes();
    question.push(PROBE);
    stream.write_all(&question)?;
    let (mut head, mut byte) = (Vec::new(), [0]);
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
        if head.len() > 32 {
            return Err(io::Error::other("no vsock handshake"));
        }
    }
    if !head.starts_with(b"OK ") {
        return Err(io::Error::other("vsock handshake refused"));
    }
    Echo::read(stream)
}

/// One answer of the API: its head, and its body by `Content-Length`.
fn http_answer(stream: &mut impl io::Read) -> anyhow::Result<String> {
    let (mut bytes, mut chunk) = (Vec::new(), [0; 1024]);
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let named = name.eq_ignore_ascii_case("content-length");
                named.then(|| value.trim().parse::<usize>().ok()).flatten()
            });
            if body.len() >= length.unwrap_or(0) {
                return Ok(text);
            }
        }
        ensure!(bytes.len() < ANSWER_BYTES_MAX, "the answer has no end");
        let count = stream.read(&mut chunk)?;
        ensure!(count > 0, "firecracker closed its API");
        bytes.extend_from_slice(&chunk[..count]);
    }
}

/// A stream to the guest.
#[derive(Debug)]
pub struct Echo(UnixStream);

impl Echo {
    /// A byte to the guest and back.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn answer(&mut self) -> anyhow::Result<()> {
        self.0.write_all(&[PROBE]).context("the guest is gone")?;
        Self::read(&mut self.0).context("the guest does not answer")
    }

    fn read(stream: &mut UnixStream) -> io::Result<()> {
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        if answer != [PROBE] {
            return Err(io::Error::other("the guest answers something else"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_to_its_end_however_it_is_cut() {
        let text = "HTTP/1.1 400 \r\nServer: API\r\nContent-Length: 5\r\n\r\nfault";
        for cut in 1..text.len() {
            let mut stream = text.as_bytes()[..cut].chain(&text.as_bytes()[cut..]);
            assert_eq!(http_answer(&mut stream).unwrap(), text);
        }
        let none = "HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n";
        assert_eq!(http_answer(&mut none.as_bytes()).unwrap(), none);
        assert!(http_answer(&mut &text.as_bytes()[..text.len() - 1]).is_err());
    }
}
