//! Progress that a person can follow: a line a step, with its time; a spinner while it runs if there is a terminal.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Steps one after another, on standard error.
pub struct Steps {
    bar: ProgressBar,
    current: Option<(String, Instant)>,
}

impl Steps {
    /// No step yet.
    pub fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        bar.set_style(style);
        Self { bar, current: None }
    }

    /// Ends the step that ran and begins another.
    pub fn begin(&mut self, name: &str) {
        if self
            .current
            .as_ref()
            .is_some_and(|(current, _)| current == name)
        {
            return;
        }
        self.end();
        self.current = Some((name.to_owned(), Instant::now()));
        self.bar.reset();
        self.bar.set_message(name.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(120));
    }

    /// Ends the step that ran.
    pub fn end(&mut self) {
        if let Some((name, began)) = self.current.take() {
            self.note(&format!(
                "  {name:<44} {:>7.2} s",
                began.elapsed().as_secs_f64()
            ));
        }
    }

    /// Prints a line without disturbing the spinner.
    pub fn note(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.end();
        self.bar.finish_and_clear();
    }
}
