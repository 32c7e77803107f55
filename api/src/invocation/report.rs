//! What Lambda writes around a function's output: START, END and REPORT lines, and the tail that clients ask for.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::clock;
use crate::record::{Logging, VersionId};

/// Bytes of log that `X-Amz-Log-Result` carries.
const TAIL_BYTES_MAX: usize = 4096;

/// How an invocation ended, for the REPORT line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status<'a> {
    /// The function answered or raised: the line says nothing of it.
    Completed,
    /// It took too long.
    TimedOut,
    /// The platform ended it, with this error type.
    Failed(&'a str),
}

/// What the lines need.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// The invocation.
    pub request_id: &'a str,
    /// Which version answered.
    pub version: VersionId,
    /// The function's output.
    pub output: &'a [u8],
    /// A line of the platform's after the output, as of a time-out.
    pub note: Option<&'a str>,
    /// How long it ran.
    pub duration: Duration,
    /// MiB.
    pub memory_mib: u32,
    /// How it ended.
    pub status: Status<'a>,
    /// How the function's log is written.
    pub logging: &'a Logging,
}

impl Report<'_> {
    /// The whole log of the invocation. AWS also reports the memory used; nobody has measured it here, so the line is
    /// silent about it.
    #[must_use]
    pub fn text(&self) -> Vec<u8> {
        let (before, after) = match &self.logging.json {
            Some(levels) => self.json_lines(&levels.system),
            None => self.lines(),
        };
        let mut text = before.into_bytes();
        text.extend_from_slice(self.output);
        if !self.output.is_empty() && !self.output.ends_with(b"\n") {
            text.push(b'\n');
        }
        if let Some(note) = self.note {
            text.extend_from_slice(note.as_bytes());
            text.push(b'\n');
        }
        text.extend_from_slice(after.as_bytes());
        text
    }

    fn milliseconds(&self) -> (f64, u128) {
        let billed = self.duration.as_micros().div_ceil(1000).max(1);
        (self.duration.as_secs_f64() * 1000.0, billed)
    }

    /// Before the function's output, and after it.
    fn lines(&self) -> (String, String) {
        let id = self.request_id;
        let (milliseconds, billed) = self.milliseconds();
        let status = match self.status {
            Status::Completed => String::new(),
            Status::TimedOut => "Status: timeout\t".to_owned(),
            Status::Failed(error_type) => {
                format!("Status: error\tError Type: {error_type}\t")
            }
        };
        let before = format!("START RequestId: {id} Version: {}\n", self.version);
        let after = format!(
            "END RequestId: {id}\nREPORT RequestId: {id}\tDuration: {milliseconds:.2} ms\tBilled Duration: {billed} ms\t\
             Memory Size: {} MB\t{status}\n",
            self.memory_mib
        );
        (before, after)
    }

    /// The same as AWS writes it into a log of JSON. What went well is of level INFO; all else is a warning.
    fn json_lines(&self, level: &str) -> (String, String) {
        let line = |kind: &str, record: Value| {
            let time = clock::log_stamp(clock::unix_ms());
            format!(
                "{}\n",
                json!({"time": time, "type": kind, "record": record})
            )
        };
        let is_terse = level == "WARN";
        let id = self.request_id;
        let (milliseconds, billed) = self.milliseconds();
        let mut record = json!({
            "requestId": id,
            "metrics": {"durationMs": milliseconds, "billedDurationMs": billed, "memorySizeMB": self.memory_mib},
            "status": "success",
        });
        match self.status {
            Status::Completed if is_terse => return (String::new(), String::new()),
            Status::Completed => {}
            Status::TimedOut => record["status"] = "timeout".into(),
            Status::Failed(error_type) => {
                record["status"] = "error".into();
                record["errorType"] = error_type.into();
            }
        }
        let started = json!({"requestId": id, "version": self.version.to_string()});
        let before = match is_terse {
            true => String::new(),
            false => line("platform.start", started),
        };
        (before, line("platform.report", record))
    }
}

/// The value of `X-Amz-Log-Result`: the last 4 KiB, base64.
#[must_use]
pub fn tail(log: &[u8]) -> String {
    let start = log.len().saturating_sub(TAIL_BYTES_MAX);
    STANDARD.encode(log.get(start..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::LogLevels;

    #[test]
    fn the_lines_come_in_lambdas_order() {
        let report = Report {
            request_id: "i",
            version: VersionId::Latest,
            output: b"hello",
            note: None,
            duration: Duration::from_micros(1230),
            memory_mib: 128,
            status: Status::Completed,
            logging: &Logging::default(),
        };
        assert_eq!(
            String::from_utf8(report.text()).unwrap(),
            "START RequestId: i Version: $LATEST\nhello\nEND RequestId: i\n\
             REPORT RequestId: i\tDuration: 1.23 ms\tBilled Duration: 2 ms\tMemory Size: 128 MB\t\n"
        );
        let failed = Report {
            note: Some("note"),
            status: Status::Failed("Runtime.ExitError"),
            ..report
        };
        let text = String::from_utf8(failed.text()).unwrap();
        assert!(text.contains("hello\nnote\nEND"), "{text}");
        assert!(text.ends_with("Status: error\tError Type: Runtime.ExitError\t\n"));
    }

    #[test]
    fn a_log_of_json_has_lines_of_its_level() {
        let mut logging = Logging {
            json: Some(LogLevels::default()),
            ..Logging::default()
        };
        let lines = |logging: &Logging, status| {
            let report = Report {
                request_id: "i",
                version: VersionId::Number(2),
                output: b"{\"message\":\"hello\"}",
                note: None,
                duration: Duration::from_micros(1500),
                memory_mib: 128,
                status,
                logging,
            };
            let text = String::from_utf8(report.text()).unwrap();
            let line = |line: &str| serde_json::from_str::<Value>(line).unwrap();
            text.lines().map(line).collect::<Vec<_>>()
        };
        let all = lines(&logging, Status::Completed);
        assert_eq!(all[0]["type"], "platform.start");
        assert_eq!(all[0]["record"]["version"], "2");
        assert_eq!(all[1]["message"], "hello");
        assert_eq!(all[2]["record"]["metrics"]["durationMs"], 1.5);
        assert_eq!(all[2]["record"]["status"], "success");
        if let Some(levels) = &mut logging.json {
            levels.system = "WARN".to_owned();
        }
        assert_eq!(lines(&logging, Status::Completed).len(), 1);
        let failed = lines(&logging, Status::TimedOut);
        assert_eq!(failed.len(), 2);
        assert_eq!(failed[1]["record"]["status"], "timeout");
    }

    #[test]
    fn the_tail_is_at_most_four_kibibytes() {
        let log = vec![b'x'; 10_000];
        assert_eq!(STANDARD.decode(tail(&log)).unwrap().len(), 4096);
        assert_eq!(tail(b""), "");
    }
}
