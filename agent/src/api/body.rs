//! Bodies of POST requests: read whole and bounded, or, of streamed responses, told from the error trailers at their end.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use thaw_agent_protocol::{RESPONSE_BYTES_MAX, StreamFailure};

/// Bytes of an oversized body that are read and dropped, so that its sender sees the answer and not a broken
/// connection. A body longer than this loses its connection.
const DISCARD_BYTES_MAX: usize = 256 * 1024 * 1024;

const IN_BAND_TYPE: &[u8] = b"Lambda-Runtime-Function-Error-Type: ";
const IN_BAND_BODY: &[u8] = b"\r\nLambda-Runtime-Function-Error-Body: ";

/// Longest pair of lines that is recognised as a failure.
const HELD_BYTES_MAX: usize = 256 * 1024;

/// A body that was read to its end.
#[derive(Debug, PartialEq)]
pub(crate) enum Received {
    /// At most [`RESPONSE_BYTES_MAX`].
    Whole { payload: Vec<u8> },
    /// More than that.
    TooLarge,
}

/// Reads a body. Memory is bounded by [`RESPONSE_BYTES_MAX`] whatever the client sends or announces.
pub(crate) async fn receive(mut body: Incoming) -> Result<Received, hyper::Error> {
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut payload = Vec::with_capacity(announced.min(RESPONSE_BYTES_MAX));
    let mut total = 0usize;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        total = total.saturating_add(data.len());
        if total <= RESPONSE_BYTES_MAX {
            payload.extend_from_slice(&data);
        } else {
            payload = Vec::new();
        }
        if total > DISCARD_BYTES_MAX {
            break;
        }
    }
    Ok(if total > RESPONSE_BYTES_MAX {
        Received::TooLarge
    } else {
        Received::Whole { payload }
    })
}

/// The failure that true HTTP trailers report, as Node's client writes them.
pub(crate) fn trailer_failure(trailers: &HeaderMap) -> Option<StreamFailure> {
    let trailer = |name| {
        trailers
            .get(name)
            .and_then(|v: &HeaderValue| v.to_str().ok())
    };
    let error_type = trailer("lambda-runtime-function-error-type")?;
    let encoded = trailer("lambda-runtime-function-error-body").unwrap_or_default();
    Some(failure(error_type, encoded))
}

/// The end of a streamed body, held back while it may become the two lines of a failure, as the Rust client writes them
/// into the body. The rest goes on at once.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    held: Vec<u8>,
}

impl Tail {
    /// Takes in the next bytes; gives those that are the response's for sure.
    pub(crate) fn push(&mut self, data: Bytes) -> Bytes {
        let all = if self.held.is_empty() {
            data
        } else {
            self.held.extend_from_slice(&data);
            Bytes::from(std::mem::take(&mut self.held))
        };
        let first = all.len().saturating_sub(HELD_BYTES_MAX);
        let start = (first..all.len())
            .find(|at| all[*at] == IN_BAND_TYPE[0] && may_become_lines(&all[*at..]));
        let start = start.unwrap_or(all.len());
        self.held = all[start..].to_vec();
        all.slice(..start)
    }

    /// The body is over: what was held back is its end after all, or the failure.
    pub(crate) fn end(self) -> Result<Bytes, StreamFailure> {
        match in_band_failure(&self.held) {
            Some(failure) => Err(failure),
            None => Ok(Bytes::from(self.held)),
        }
    }
}

/// Whether more bytes, or none, make these the two lines.
fn may_become_lines(bytes: &[u8]) -> bool {
    let Some(rest) = after(IN_BAND_TYPE, bytes) else {
        return false;
    };
    let Some(line) = rest.iter().position(|byte| *byte == b'\n') else {
        return true;
    };
    // The line's end is the beginning of what comes between.
    let Some(rest) = line
        .checked_sub(1)
        .and_then(|cr| after(IN_BAND_BODY, &rest[cr..]))
    else {
        return false;
    };
    match rest.iter().position(|byte| *byte == b'\n') {
        None => true,
        Some(end) => end + 1 == rest.len() && end > 0 && rest[end - 1] == b'\r',
    }
}

/// What follows `start`; nothing yet where `bytes` are only its beginning.
fn after<'a>(start: &[u8], bytes: &'a [u8]) -> Option<&'a [u8]> {
    match bytes.strip_prefix(start) {
        Some(rest) => Some(rest),
        None => start.starts_with(bytes).then_some(&[]),
    }
}

fn in_band_failure(bytes: &[u8]) -> Option<StreamFailure> {
    let tail = std::str::from_utf8(bytes.strip_prefix(IN_BAND_TYPE)?).ok()?;
    let (error_type, rest) = tail.split_once(std::str::from_utf8(IN_BAND_BODY).ok()?)?;
    let encoded = rest.strip_suffix("\r\n")?;
    Some(failure(error_type, encoded))
}

fn failure(error_type: &str, encoded: &str) -> StreamFailure {
    let decoded = STANDARD.decode(encoded.trim()).unwrap_or_default();
    let document = if decoded.first() == Some(&b'{') {
        decoded
    } else {
        // The Rust client sends the bare message.
        crate::document::error(error_type, &String::from_utf8_lossy(&decoded))
    };
    StreamFailure {
        error_type: error_type.to_owned(),
        document,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What goes on of a body that comes in these pieces, and how it ends.
    fn through(pieces: &[&[u8]]) -> (Vec<u8>, Option<StreamFailure>) {
        let (mut tail, mut out) = (Tail::default(), Vec::new());
        for piece in pieces {
            out.extend_from_slice(&tail.push(Bytes::copy_from_slice(piece)));
        }
        match tail.end() {
            Ok(rest) => {
                out.extend_from_slice(&rest);
                (out, None)
            }
            Err(failure) => (out, Some(failure)),
        }
    }

    const LINES: &[u8] = b"Lambda-Runtime-Function-Error-Type: Runtime.StreamError\r\n\
        Lambda-Runtime-Function-Error-Body: b29wcw==\r\n";

    #[test]
    fn a_failure_written_in_band_is_cut_off_the_body_wherever_the_pieces_end() {
        let body = [b"half a bo, L, Lambda-".as_slice(), LINES].concat();
        for cut in 1..body.len() {
            let pieces: Vec<&[u8]> = body.chunks(cut).collect();
            let (out, failure) = through(&pieces);
            assert_eq!(out, b"half a bo, L, Lambda-", "{cut}");
            let failure = failure.unwrap();
            assert_eq!(failure.error_type, "Runtime.StreamError");
            let document: serde_json::Value = serde_json::from_slice(&failure.document).unwrap();
            assert_eq!(document["errorMessage"], "oops");
        }
    }

    #[test]
    fn a_body_that_only_mentions_the_lines_is_left_alone() {
        for text in [
            "Lambda-Runtime-Function-Error-Type: x",
            "Lambda-Runtime-Function-Error-Type: \n\n",
            "Lambda-Runtime-Function-Error-Type: x\r\nLambda-Runtime-Function-Error-Body: x\n",
            "see Lambda-Runtime-Function-Error-Type: x\r\nLambda-Runtime-Function-Error-Body: eA==\r\nmore",
        ] {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(7).collect();
            assert_eq!(through(&pieces), (text.as_bytes().to_vec(), None));
        }
    }

    #[test]
    fn what_cannot_become_a_failure_is_not_held_back() {
        let mut tail = Tail::default();
        assert_eq!(
            tail.push(Bytes::from_static(b"data: Lambda\n\n")),
            "data: Lambda\n\n"
        );
        assert_eq!(tail.push(Bytes::from_static(b"All")), "All");
        assert_eq!(tail.push(Bytes::from_static(b"ah L")), "ah ");
        assert_eq!(tail.push(Bytes::from_static(b"a")), "");
        assert_eq!(tail.push(Bytes::from_static(b"s")), "Las");
        let long = [IN_BAND_TYPE, &vec![b'x'; 2 * HELD_BYTES_MAX]].concat();
        assert!(tail.push(Bytes::from(long)).len() > HELD_BYTES_MAX);
    }

    #[test]
    fn true_trailers_carry_the_document() {
        let mut trailers = HeaderMap::new();
        trailers.insert(
            "lambda-runtime-function-error-type",
            "Error".parse().unwrap(),
        );
        trailers.insert(
            "lambda-runtime-function-error-body",
            "eyJlcnJvck1lc3NhZ2UiOiJ4In0=".parse().unwrap(),
        );
        let failure = trailer_failure(&trailers).unwrap();
        assert_eq!(failure.document, br#"{"errorMessage":"x"}"#);
        assert_eq!(trailer_failure(&HeaderMap::new()), None);
    }

    proptest! {
        #[test]
        fn no_byte_of_a_body_is_lost(
            parts in prop::collection::vec((prop::collection::vec(prop_oneof![any::<u8>(), Just(b'L'), Just(b'\n')], 0..20), 0usize..140), 0..4),
            size in 1usize..50,
        ) {
            let mut body = Vec::new();
            for (bytes, cut) in &parts {
                body.extend_from_slice(bytes);
                body.extend_from_slice(&LINES[..(*cut).min(LINES.len())]);
            }
            let pieces: Vec<&[u8]> = body.chunks(size).collect();
            let (out, failure) = through(&pieces);
            match failure {
                None => prop_assert_eq!(out, body),
                Some(_) => prop_assert!(body.starts_with(&out) && body[out.len()..].starts_with(IN_BAND_TYPE)),
            }
        }
    }
}
