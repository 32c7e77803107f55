//! Errors that the platform, not the function, reports about an invocation: types and texts as AWS writes them.

use std::time::Duration;

use bytes::Bytes;
use thaw_api_types::lambda::FunctionErrorDocument;
use thaw_runtime::{ExitReason, RuntimeExit, RuntimeExitCause};

use crate::record::InitCause;

/// Most bytes of a console line that a client sees.
const LINE_BYTES_MAX: usize = 512;

/// One such error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformFault {
    /// `Sandbox.Timedout`, `Runtime.ExitError`, …
    pub error_type: &'static str,
    /// What follows `RequestId: … Error: `.
    pub text: String,
}

impl PlatformFault {
    /// The message of the error document, and of the log.
    #[must_use]
    pub fn message(&self, request_id: &str) -> String {
        message(request_id, &self.text)
    }

    /// The error document.
    #[must_use]
    pub fn document(&self, request_id: &str) -> Bytes {
        document(self.error_type, request_id, &self.text)
    }
}

impl From<PlatformFault> for InitCause {
    fn from(fault: PlatformFault) -> Self {
        Self::Found {
            error_type: fault.error_type.to_owned(),
            text: fault.text,
        }
    }
}

/// The message of a platform error.
#[must_use]
pub fn message(request_id: &str, text: &str) -> String {
    format!("RequestId: {request_id} Error: {text}")
}

/// The document of a platform error.
#[must_use]
pub fn document(error_type: &str, request_id: &str, text: &str) -> Bytes {
    let document = FunctionErrorDocument {
        error_type: error_type.to_owned(),
        error_message: message(request_id, text),
    };
    // Two strings always make JSON; the fallback keeps this free of a panic.
    serde_json::to_vec(&document).unwrap_or_default().into()
}

/// The text of a document that has the form of [`document`], or lacks the request id.
#[must_use]
pub fn text_of(document: &[u8]) -> String {
    let message = serde_json::from_slice(document)
        .map(|document: FunctionErrorDocument| document.error_message)
        .unwrap_or_default();
    let text = message.split_once("Error: ").map(|(_, text)| text);
    text.unwrap_or(&message).to_owned()
}

/// The function took too long.
#[must_use]
pub fn timed_out(limit: Duration) -> PlatformFault {
    PlatformFault {
        error_type: "Sandbox.Timedout",
        text: format!("Task timed out after {:.2} seconds", limit.as_secs_f64()),
    }
}

/// Its hooks after the restore took too long.
#[must_use]
pub fn restore_timed_out() -> PlatformFault {
    let limit = thaw_runtime::RuntimeConfig::default().hooks_limit;
    PlatformFault {
        error_type: "Sandbox.Timedout",
        text: format!("Restore timed out after {:.2} seconds", limit.as_secs_f64()),
    }
}

/// Its initialisation took too long.
#[must_use]
pub fn init_timed_out(limit: Duration) -> PlatformFault {
    PlatformFault {
        error_type: "Sandbox.Timedout",
        text: format!(
            "Initialization timed out after {:.2} seconds",
            limit.as_secs_f64()
        ),
    }
}

/// The function's process ended.
#[must_use]
pub fn exit(exit: &RuntimeExit) -> PlatformFault {
    if exit.out_of_memory {
        return out_of_memory();
    }
    PlatformFault {
        error_type: "Runtime.ExitError",
        text: match exit.cause {
            RuntimeExitCause::Code(0) => "Runtime exited without providing a reason".to_owned(),
            RuntimeExitCause::Code(code) => {
                format!("Runtime exited with error: exit status {code}")
            }
            RuntimeExitCause::Signal(number) => {
                format!("Runtime exited with error: signal: {}", signal(number))
            }
        },
    }
}

fn out_of_memory() -> PlatformFault {
    PlatformFault {
        error_type: "Runtime.OutOfMemory",
        text: "Runtime exited with error: signal: killed".to_owned(),
    }
}

/// The guest itself ended.
#[must_use]
pub fn death(reason: ExitReason, detail: &str, console: &str) -> PlatformFault {
    let panic = console
        .lines()
        .rev()
        .find(|line| line.contains("Kernel panic"));
    let with = |error_type, what: &str| {
        let detail = if detail.is_empty() {
            String::new()
        } else {
            format!(": {}", bounded(detail))
        };
        PlatformFault {
            error_type,
            text: format!("{what}{detail}"),
        }
    };
    match reason {
        ExitReason::Panic => {
            let line = panic.map_or("no text on its console", |line| strip_stamp(line));
            if line.contains("Out of memory") || line.contains("deadlocked on memory") {
                return out_of_memory();
            }
            PlatformFault {
                error_type: "Sandbox.KernelPanic",
                text: format!("The guest's kernel panicked: {}", bounded(line)),
            }
        }
        ExitReason::Shutdown => with("Sandbox.Shutdown", "The guest powered itself off"),
        ExitReason::Reset => with("Sandbox.Reset", "The guest asked for a reset"),
        ExitReason::GuestFault => with("Sandbox.GuestFault", "The guest broke its machine"),
        ExitReason::HostFault => with("Sandbox.HostFault", "The host failed the sandbox"),
    }
}

/// The last line with any text.
#[must_use]
pub fn last_line(console: &str) -> String {
    let line = console.lines().rev().find(|line| !line.trim().is_empty());
    bounded(line.unwrap_or("nothing")).to_owned()
}

/// A kernel line without its `[    1.234567] `.
fn strip_stamp(line: &str) -> &str {
    let line = line.trim();
    match line
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
    {
        Some((_, text)) => text,
        None => line,
    }
}

fn bounded(text: &str) -> &str {
    let mut end = text.len().min(LINE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

/// Go's names for signals, for AWS's supervisor is written in Go.
fn signal(number: i32) -> String {
    let name = match number {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        number => return format!("signal {number}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(cause: RuntimeExitCause, out_of_memory: bool) -> RuntimeExit {
        RuntimeExit {
            cause,
            out_of_memory,
            request_id: None,
        }
    }

    #[test]
    fn exits_are_told_as_aws_tells_them() {
        let text = |cause| exit(&ended(cause, false)).text;
        assert_eq!(
            text(RuntimeExitCause::Code(0)),
            "Runtime exited without providing a reason"
        );
        assert_eq!(
            text(RuntimeExitCause::Code(127)),
            "Runtime exited with error: exit status 127"
        );
        assert_eq!(
            text(RuntimeExitCause::Signal(11)),
            "Runtime exited with error: signal: segmentation fault"
        );
        let fault = exit(&ended(RuntimeExitCause::Signal(9), true));
        assert_eq!(fault.error_type, "Runtime.OutOfMemory");
        assert_eq!(
            fault.message("r"),
            "RequestId: r Error: Runtime exited with error: signal: killed"
        );
    }

    #[test]
    fn the_text_of_a_document_is_found_with_and_without_a_request() {
        let fault = timed_out(Duration::from_secs(1));
        assert_eq!(text_of(&fault.document("i")), fault.text);
        let at_init = br#"{"errorType":"E","errorMessage":"Error: exit status 4"}"#;
        assert_eq!(text_of(at_init), "exit status 4");
        assert_eq!(text_of(b"no document"), "");
    }

    #[test]
    fn a_time_out_has_the_recorded_document() {
        assert_eq!(
            timed_out(Duration::from_secs(1)).document("i"),
            r#"{"errorType":"Sandbox.Timedout","errorMessage":"RequestId: i Error: Task timed out after 1.00 seconds"}"#
        );
    }

    #[test]
    fn a_panic_shows_the_kernels_line() {
        let console =
            "[    0.5] ok\n[    1.2] Kernel panic - not syncing: sysrq triggered crash\nmore";
        let fault = death(ExitReason::Panic, "", console);
        assert_eq!(fault.error_type, "Sandbox.KernelPanic");
        assert!(
            fault
                .text
                .ends_with("panicked: Kernel panic - not syncing: sysrq triggered crash")
        );
        let fault = death(
            ExitReason::Panic,
            "",
            "[ 1.2] Kernel panic - not syncing: System is deadlocked on memory",
        );
        assert_eq!(fault.error_type, "Runtime.OutOfMemory");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let fault = death(ExitReason::GuestFault, &"é".repeat(1000), "");
        assert!(fault.text.len() < 600);
    }
}
