//! QEMU's machine protocol (QMP): one command at a time, events skipped.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, IoSlice, Write},
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    thread,
    time::{Duration, Instant},
};

/// Longest wait for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at a migration.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Why QEMU did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The socket.
    #[error("cannot talk to qemu's monitor")]
    Io(#[source] io::Error),
    /// QEMU's answer to a command.
    #[error("qemu refused {command}: {answer}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's reason.
        answer: String,
    },
    /// A saved state was not written or read in time or at all.
    #[error("qemu's migration is {0}")]
    Migration(String),
}

/// A connection past its greeting.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    /// Waits for the greeting and leaves the negotiation mode.
    pub fn connect(socket: &UnixStream) -> Result<Self, MonitorError> {
        let writer = socket.try_clone().map_err(MonitorError::Io)?;
        let reader = socket.try_clone().map_err(MonitorError::Io)?;
        reader
            .set_read_timeout(Some(ANSWER_LIMIT))
            .map_err(MonitorError::Io)?;
        let mut monitor = Self {
            reader: BufReader::new(reader),
            writer,
        };
        monitor.line()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Runs one command and returns its answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, MonitorError> {
        self.writer
            .write_all(request(command, arguments).as_bytes())
            .map_err(MonitorError::Io)?;
        self.answer(command)
    }

    /// Gives QEMU a copy of an open file under this name.
    pub fn send_descriptor(&mut self, name: &str, file: &File) -> Result<(), MonitorError> {
        let line = request("getfd", &json!({ "fdname": name }));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [file.as_fd()];
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        assert!(fits, "the buffer is made for one descriptor");
        let sent = sendmsg(
            &self.writer,
            &[IoSlice::new(line.as_bytes())],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        );
        let sent = sent.map_err(|error| MonitorError::Io(error.into()))?;
        self.writer
            .write_all(line.as_bytes().get(sent..).unwrap_or_default())
            .map_err(MonitorError::Io)?;
        self.answer("getfd").map(drop)
    }

    fn answer(&mut self, command: &str) -> Result<Value, MonitorError> {
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                let text = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason")
                    .to_owned();
                return Err(MonitorError::Refused {
                    command: command.to_owned(),
                    answer: text,
                });
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Leaves guest memory out of a saved state: it lies in a file already.
    pub fn ignore_shared_memory(&mut self) -> Result<(), MonitorError> {
        let capabilities =
            json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
        self.execute("migrate-set-capabilities", &capabilities)
            .map(drop)
    }

    /// Waits for the end of a migration, in or out.
    pub fn await_migration(&mut self, limit: Duration) -> Result<(), MonitorError> {
        let end = Instant::now() + limit;
        loop {
            let answer = self.execute("query-migrate", &json!({}))?;
            let status = answer
                .get("status")
                .and_then(Value::as_str)
                .unwrap_or("unknown");
            match status {
                "completed" => return Ok(()),
                "failed" | "cancelled" => {
                    let why = answer
                        .get("error-desc")
                        .and_then(Value::as_str)
                        .unwrap_or_default();
                    return Err(MonitorError::Migration(format!("{status} {why}")));
                }
                _ if Instant::now() > end => {
                    return Err(MonitorError::Migration(format!("still {status}")));
                }
                _ => thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn line(&mut self) -> Result<Value, MonitorError> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).map_err(MonitorError::Io)? == 0 {
            return Err(MonitorError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_str(&line).map_err(|error| MonitorError::Io(error.into()))
    }
}

fn request(command: &str, arguments: &Value) -> String {
    let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(lines: &str) -> Result<Value, MonitorError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(b"{\"QMP\":{}}\n{\"return\":{}}\n")
            .unwrap();
        theirs.write_all(lines.as_bytes()).unwrap();
        drop(theirs.shutdown(std::net::Shutdown::Write));
        Monitor::connect(&ours)?.execute("x", &json!({}))
    }

    #[test]
    fn events_between_command_and_answer_are_skipped() {
        assert_eq!(
            answered("{\"event\":\"RESUME\"}\n{\"return\":{\"a\":1}}\n").unwrap(),
            json!({ "a": 1 })
        );
    }

    #[test]
    fn refusals_and_silence_are_errors() {
        assert!(
            matches!(answered("{\"error\":{\"desc\":\"no\"}}\n"), Err(MonitorError::Refused { answer, .. }) if answer == "no")
        );
        assert!(matches!(answered(""), Err(MonitorError::Io(_))));
        assert!(matches!(answered("}\n"), Err(MonitorError::Io(_))));
    }
}
