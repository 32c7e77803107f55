//! The newest bytes of an output that may be endless.

use std::collections::VecDeque;

/// Keeps the last `max` bytes pushed.
#[derive(Debug)]
pub(crate) struct Tail {
    bytes: VecDeque<u8>,
    max: usize,
    dropped: u64,
}

impl Tail {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            max,
            dropped: 0,
        }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.max)..];
        let overflow = (self.bytes.len() + kept.len()).saturating_sub(self.max);
        self.bytes.drain(..overflow);
        self.bytes.extend(kept);
        self.dropped += (overflow + bytes.len() - kept.len()) as u64;
    }

    /// The bytes; where some were dropped, behind a line that says how many.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        let bytes = std::mem::take(&mut self.bytes);
        let dropped = std::mem::take(&mut self.dropped);
        if dropped == 0 {
            return bytes.into();
        }
        let mut noted = format!("[thaw: {dropped} earlier bytes of output dropped]\n").into_bytes();
        noted.extend(bytes);
        noted
    }

    /// The bytes as text, on one line, introduced by a colon; empty if there are none.
    pub(crate) fn as_reason(&self) -> String {
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        if lines.is_empty() {
            String::new()
        } else {
            format!(": {}", lines.join(" | "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_tail_is_the_end_of_everything_pushed(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..12), max in 0usize..64,
        ) {
            let mut tail = Tail::new(max);
            for chunk in &chunks {
                tail.push(chunk);
            }
            let all = chunks.concat();
            let expected = &all[all.len().saturating_sub(max)..];
            prop_assert_eq!(tail.dropped, (all.len() - expected.len()) as u64);
            prop_assert!(tail.take().ends_with(expected));
        }
    }

    #[test]
    fn dropped_bytes_are_noted_and_whole_output_is_not() {
        let mut tail = Tail::new(4);
        tail.push(b"abcd");
        assert_eq!(tail.take(), b"abcd");
        tail.push(b"abcdef");
        assert_eq!(
            tail.take(),
            b"[thaw: 2 earlier bytes of output dropped]\ncdef"
        );
    }
}
