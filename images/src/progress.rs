//! How a build tells its caller where it is.

use std::time::{Duration, Instant};

/// Receives the steps of a build. Steps do not nest: each `step` is followed by any number of
/// `detail`s and, unless the build fails in it, one `done`.
pub trait Progress {
    /// A step starts: a short phrase such as "resolve packages".
    fn step(&mut self, name: &str);
    /// Something within the step: a file name, a count.
    fn detail(&mut self, text: &str);
    /// The step that last started has succeeded after `took`.
    fn done(&mut self, took: Duration);
}

/// A [`Progress`] that says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&mut self, _name: &str) {}
    fn detail(&mut self, _text: &str) {}
    fn done(&mut self, _took: Duration) {}
}

/// Runs `work` as one step.
pub(crate) fn step<T, E>(
    progress: &mut dyn Progress,
    name: &str,
    work: impl FnOnce(&mut dyn Progress) -> Result<T, E>,
) -> Result<T, E> {
    let start = Instant::now();
    progress.step(name);
    let value = work(progress)?;
    progress.done(start.elapsed());
    Ok(value)
}
