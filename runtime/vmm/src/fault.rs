//! Whose fault an error is, and how a chain of causes is written for people.

use std::error::Error;

use thaw_vmm_control::Failure;
pub use thaw_vmm_control::Fault;

/// An error that knows whose fault it is.
pub trait Blame: Error {
    /// Whose fault.
    fn fault(&self) -> Fault;
}

/// The error and its causes as one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The answer to a request that failed with `error`.
pub fn failure(error: &dyn Blame) -> Failure {
    Failure {
        message: chain(error),
        fault: error.fault(),
    }
}
