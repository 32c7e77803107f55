//! Runs the embedded init as `thaw-lab-init probe`, in a process of its own and with a deadline (see `init/probe.rs`).

use super::{INSTRUCTIONS_PER_SECOND_MIN, KvmVerdict};
use crate::{
    artifacts::INIT,
    process::{Leniency, spawn_tied},
};
use rustix::fs::MemfdFlags;
use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsRawFd,
    process::{Command, Stdio},
    sync::mpsc::channel,
    thread,
    time::Duration,
};

/// A usable KVM is probed in about 0.1 s; one that has not answered by now is not usable.
pub const LIMIT: Duration = Duration::from_secs(2);

/// What the probe measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub instructions_per_second: u64,
    /// Instruction and whether a guest can execute it.
    pub instructions: Vec<(String, bool)>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("/dev/kvm cannot be opened: {0}")]
    Device(String),
    #[error("/dev/kvm fails at {0}")]
    Call(String),
    #[error("a guest of a few instructions did not end within {} s", LIMIT.as_secs())]
    Hangs,
    #[error("the test guest could not be started")]
    Start(#[source] io::Error),
}

impl Found {
    /// Instructions that stock kernels use and this KVM lacks.
    pub fn missing_instructions(&self) -> Vec<&str> {
        self.instructions
            .iter()
            .filter(|(_, works)| !works)
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// The judgement.
    pub fn verdict(&self) -> KvmVerdict {
        let missing = self.missing_instructions();
        if !missing.is_empty() {
            let reason = format!(
                "guests of this /dev/kvm cannot execute {}, which stock kernels need",
                missing.join(", ")
            );
            return KvmVerdict::Lab { reason };
        }
        let speed = self.instructions_per_second;
        if speed < INSTRUCTIONS_PER_SECOND_MIN {
            return KvmVerdict::Lab {
                reason: format!("guests of this /dev/kvm run at {speed} instructions a second"),
            };
        }
        KvmVerdict::Native {
            instructions_per_second: speed,
        }
    }
}

/// Probes this host.
pub fn probe() -> Result<Found, ProbeError> {
    let program = executable().map_err(ProbeError::Start)?;
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command
        .arg("probe")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = spawn_tied(&mut command, &[], Leniency::None).map_err(ProbeError::Start)?;
    let mut output = child
        .child()
        .stdout
        .take()
        .ok_or_else(|| ProbeError::Start(io::ErrorKind::BrokenPipe.into()))?;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut text = String::new();
        let read = output.read_to_string(&mut text);
        sender.send(read.map(|_| text))
    });
    let text = receiver
        .recv_timeout(LIMIT)
        .map_err(|_| ProbeError::Hangs)?
        .map_err(ProbeError::Start)?;
    parse(&text)
}

/// The embedded program as an open file: no place on disk is needed. Linux starts no program that is open for writing, hence the second
/// descriptor.
fn executable() -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(
        "thaw-lab-init",
        MemfdFlags::CLOEXEC,
    )?);
    file.write_all(INIT)?;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn parse(text: &str) -> Result<Found, ProbeError> {
    let mut found = Found {
        instructions_per_second: 0,
        instructions: Vec::new(),
    };
    for line in text.lines() {
        let (name, result) = line.split_once(' ').unwrap_or((line, ""));
        match name {
            "speed" => found.instructions_per_second = result.parse().unwrap_or_default(),
            "error" => {
                return Err(match result.strip_prefix("open: ") {
                    Some(why) => ProbeError::Device(why.to_owned()),
                    None => ProbeError::Call(result.to_owned()),
                });
            }
            // A breakpoint's "fault" is the breakpoint.
            name => found.instructions.push((
                name.to_owned(),
                result == "ok" || (name, result) == ("int3", "fault 3"),
            )),
        }
    }
    if found.instructions.is_empty() {
        Err(ProbeError::Call("the first guest".to_owned()))
    } else {
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_and_complete_kvm_is_native() {
        let found = parse("speed 244893229\ncmpxchg16b ok\nxsave ok\nint3 fault 3\n").unwrap();
        assert_eq!(
            found.verdict(),
            KvmVerdict::Native {
                instructions_per_second: 244_893_229
            }
        );
    }

    #[test]
    fn emulated_kvm_is_told_by_its_instructions_and_by_its_speed() {
        let lacking = parse("speed 1441514\ncmpxchg16b exit 17\nxsave ok\nint3 exit 17\n").unwrap();
        assert_eq!(lacking.missing_instructions(), ["cmpxchg16b", "int3"]);
        assert!(
            matches!(lacking.verdict(), KvmVerdict::Lab { reason } if reason.contains("cmpxchg16b, int3"))
        );
        let slow = parse("speed 1441514\nxsave ok\n").unwrap();
        assert!(matches!(slow.verdict(), KvmVerdict::Lab { reason } if reason.contains("1441514")));
    }

    #[test]
    fn failures_name_their_step() {
        assert!(matches!(
            parse("error open: No such file\n"),
            Err(ProbeError::Device(_))
        ));
        assert!(matches!(
            parse("error KVM_CREATE_VM: Busy\n"),
            Err(ProbeError::Call(_))
        ));
        assert!(parse("").is_err());
    }
}
