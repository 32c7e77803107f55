//! Frames: `magic "TH" | version u8 | kind u8 | generation u64 | head length u32 | body length u32 | head | body`,
//! little-endian. The head is JSON, the body is raw bytes, so that a payload of megabytes is never re-encoded.

use thiserror::Error;

/// Length of the fixed part of a frame, bytes.
pub const HEADER_BYTES: usize = 20;
/// Largest JSON head, bytes.
pub const HEAD_BYTES_MAX: usize = 256 * 1024;
/// Largest raw body, bytes: the larger of request and response limit, rounded up to leave room for error bodies.
pub const BODY_BYTES_MAX: usize = 7 * 1024 * 1024;
/// Largest frame, bytes. A [`Decoder`] holds one at most, in a buffer that doubles when it grows, and what one feed adds.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + HEAD_BYTES_MAX + BODY_BYTES_MAX;

const MAGIC: [u8; 2] = *b"TH";

/// Counts the lives of one sandbox: 0 while the snapshot is built, then a fresh number for each thaw. A frame of another
/// generation was written before the freeze, or for another clone, and is never taken for an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// One frame, not yet interpreted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Message kind; see [`crate::message`].
    pub kind: u8,
    /// The life of the sandbox in which the frame was written.
    pub generation: Generation,
    /// JSON, at most [`HEAD_BYTES_MAX`].
    pub head: Vec<u8>,
    /// Raw bytes, at most [`BODY_BYTES_MAX`].
    pub body: Vec<u8>,
}

/// Why bytes are not a frame. The stream cannot be resynchronised afterwards: close it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// The first two bytes are not `TH`.
    #[error("agent frame starts with {0:02x?}, not with \"TH\"")]
    Magic([u8; 2]),
    /// The peer speaks a newer protocol.
    #[error("agent frame has protocol version {0}, newest known is {max}", max = crate::PROTOCOL_VERSION)]
    Version(u8),
    /// Announced head is over the limit.
    #[error("agent frame announces a head of {0} bytes, limit is {HEAD_BYTES_MAX}")]
    HeadTooLarge(usize),
    /// Announced body is over the limit.
    #[error("agent frame announces a body of {0} bytes, limit is {BODY_BYTES_MAX}")]
    BodyTooLarge(usize),
}

impl Frame {
    /// Appends the frame's bytes to `out`.
    ///
    /// # Errors
    /// A head or body over its limit; nothing is appended then.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let head_bytes = bounded(self.head.len(), HEAD_BYTES_MAX, FrameError::HeadTooLarge)?;
        let body_bytes = bounded(self.body.len(), BODY_BYTES_MAX, FrameError::BodyTooLarge)?;
        out.reserve(HEADER_BYTES + self.head.len() + self.body.len());
        out.extend_from_slice(&MAGIC);
        out.push(crate::PROTOCOL_VERSION);
        out.push(self.kind);
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.extend_from_slice(&head_bytes.to_le_bytes());
        out.extend_from_slice(&body_bytes.to_le_bytes());
        out.extend_from_slice(&self.head);
        out.extend_from_slice(&self.body);
        Ok(())
    }
}

fn bounded(length: usize, max: usize, error: fn(usize) -> FrameError) -> Result<u32, FrameError> {
    match u32::try_from(length) {
        Ok(value) if length <= max => Ok(value),
        _ => Err(error(length)),
    }
}

/// Turns a byte stream into frames. Holds at most one frame's bytes plus what one `feed` adds.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they came from the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more bytes are fed.
    ///
    /// # Errors
    /// The bytes are not a frame; the stream is lost.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let bytes = &self.buffer[self.consumed..];
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [m0, m1, version, kind, rest @ ..] = header;
        if [*m0, *m1] != MAGIC {
            return Err(FrameError::Magic([*m0, *m1]));
        }
        if *version == 0 || *version > crate::PROTOCOL_VERSION {
            return Err(FrameError::Version(*version));
        }
        let [
            g0,
            g1,
            g2,
            g3,
            g4,
            g5,
            g6,
            g7,
            h0,
            h1,
            h2,
            h3,
            b0,
            b1,
            b2,
            b3,
        ] = *rest;
        let generation = Generation(u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7]));
        let head_bytes = u32::from_le_bytes([h0, h1, h2, h3]) as usize;
        let body_bytes = u32::from_le_bytes([b0, b1, b2, b3]) as usize;
        if head_bytes > HEAD_BYTES_MAX {
            return Err(FrameError::HeadTooLarge(head_bytes));
        }
        if body_bytes > BODY_BYTES_MAX {
            return Err(FrameError::BodyTooLarge(body_bytes));
        }
        let body_start = HEADER_BYTES + head_bytes;
        let end = body_start + body_bytes;
        if bytes.len() < end {
            return Ok(None);
        }
        let frame = Frame {
            kind: *kind,
            generation,
            head: bytes[HEADER_BYTES..body_start].to_vec(),
            body: bytes[body_start..end].to_vec(),
        };
        self.consumed += end;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame() -> impl Strategy<Value = Frame> {
        (
            any::<u8>(),
            any::<u64>(),
            prop::collection::vec(any::<u8>(), 0..200),
            prop::collection::vec(any::<u8>(), 0..2000),
        )
            .prop_map(|(kind, generation, head, body)| Frame {
                kind,
                generation: Generation(generation),
                head,
                body,
            })
    }

    proptest! {
        #[test]
        fn frames_survive_any_split_of_the_stream(frames in prop::collection::vec(frame(), 1..5), cut in 1usize..97) {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.encode(&mut bytes).unwrap();
            }
            let (mut decoder, mut seen) = (Decoder::new(), Vec::new());
            for chunk in bytes.chunks(cut) {
                decoder.feed(chunk);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, frames);
        }
    }

    #[test]
    fn an_announced_length_over_the_limit_is_refused_before_it_is_buffered() {
        let mut bytes = Vec::new();
        Frame {
            kind: 1,
            generation: Generation(0),
            head: vec![],
            body: vec![],
        }
        .encode(&mut bytes)
        .unwrap();
        bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut decoder = Decoder::new();
        decoder.feed(&bytes);
        assert_eq!(
            decoder.next_frame(),
            Err(FrameError::BodyTooLarge(u32::MAX as usize))
        );
    }

    #[test]
    fn a_newer_protocol_version_is_refused() {
        let mut bytes = Vec::new();
        Frame {
            kind: 1,
            generation: Generation(0),
            head: vec![],
            body: vec![],
        }
        .encode(&mut bytes)
        .unwrap();
        bytes[2] = crate::PROTOCOL_VERSION + 1;
        let mut decoder = Decoder::new();
        decoder.feed(&bytes);
        assert_eq!(
            decoder.next_frame(),
            Err(FrameError::Version(crate::PROTOCOL_VERSION + 1))
        );
    }
}
