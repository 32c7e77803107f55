//! The end of what the lab's kernel and QEMU print: shown only when something fails.

use std::{
    io::Read,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// Bytes kept.
const KEPT_BYTES_MAX: usize = 16 << 10;

/// Lines shown: a kernel's last words with its stack.
const SHOWN_LINES_MAX: usize = 40;

/// Shared by the threads that read the pipes.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    /// Reads `from` to its end in a thread of its own.
    pub fn follow(&self, mut from: impl Read + Send + 'static) {
        let console = self.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                console.add(&buffer[..count]);
            }
        });
    }

    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT_BYTES_MAX);
        kept.drain(..excess);
    }

    /// The last lines, without control characters.
    pub fn tail(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text: String = String::from_utf8_lossy(&kept)
            .chars()
            .filter(|&letter| letter == '\n' || !letter.is_control())
            .collect();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(SHOWN_LINES_MAX)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_the_end_is_kept_and_shown() {
        let console = super::Console::default();
        for number in 0..10_000 {
            console.add(format!("line \x1b{number}\r\n").as_bytes());
        }
        let tail = console.tail();
        assert!(
            tail.starts_with("line 9960\n") && tail.ends_with("line 9999"),
            "{tail}"
        );
    }
}
