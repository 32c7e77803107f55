//! Bodies of POST requests: read whole, bounded, with the error trailers of streamed responses.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::header::HeaderMap;
use thaw_agent_protocol::RESPONSE_BYTES_MAX;

/// Bytes of an oversized body that are read and dropped, so that its sender sees the answer and not a broken
/// connection. A body longer than this loses its connection.
const DISCARD_BYTES_MAX: usize = 256 * 1024 * 1024;

const IN_BAND_TYPE: &[u8] = b"Lambda-Runtime-Function-Error-Type: ";
const IN_BAND_BODY: &str = "\r\nLambda-Runtime-Function-Error-Body: ";

/// A body that was read to its end.
#[derive(Debug, PartialEq)]
pub(crate) enum Received {
    /// At most [`RESPONSE_BYTES_MAX`].
    Whole {
        payload: Vec<u8>,
        trailers: HeaderMap,
    },
    /// More than that.
    TooLarge,
}

/// Reads a body. Memory is bounded by [`RESPONSE_BYTES_MAX`] whatever the client sends or announces.
pub(crate) async fn receive(mut body: Incoming) -> Result<Received, hyper::Error> {
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut payload = Vec::with_capacity(announced.min(RESPONSE_BYTES_MAX));
    let mut trailers = HeaderMap::new();
    let mut total = 0usize;
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => {
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
            Err(frame) => {
                if let Ok(read) = frame.into_trailers() {
                    trailers = read;
                }
            }
        }
    }
    Ok(if total > RESPONSE_BYTES_MAX {
        Received::TooLarge
    } else {
        Received::Whole { payload, trailers }
    })
}

/// A streamed response that failed midway.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StreamFailure {
    pub(crate) error_type: String,
    pub(crate) document: Vec<u8>,
}

/// The failure that a streamed response's trailers report: true HTTP trailers, or the same two lines at the end of the
/// body, as the Rust client writes them; those are cut off.
pub(crate) fn stream_failure(payload: &mut Vec<u8>, trailers: &HeaderMap) -> Option<StreamFailure> {
    let trailer = |name| {
        trailers
            .get(name)
            .and_then(|v: &hyper::header::HeaderValue| v.to_str().ok())
    };
    if let Some(error_type) = trailer("lambda-runtime-function-error-type") {
        let encoded = trailer("lambda-runtime-function-error-body").unwrap_or_default();
        return Some(failure(error_type, encoded));
    }
    let start = payload
        .windows(IN_BAND_TYPE.len())
        .rposition(|window| window == IN_BAND_TYPE)?;
    let tail = std::str::from_utf8(&payload[start + IN_BAND_TYPE.len()..]).ok()?;
    let (error_type, rest) = tail.split_once(IN_BAND_BODY)?;
    let encoded = rest.strip_suffix("\r\n")?;
    if error_type.contains('\n') || encoded.contains('\n') {
        return None;
    }
    let found = failure(error_type, encoded);
    payload.truncate(start);
    Some(found)
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

    #[test]
    fn a_failure_written_in_band_is_cut_off_the_body() {
        let mut payload = b"half a bo".to_vec();
        payload.extend_from_slice(
            b"Lambda-Runtime-Function-Error-Type: Runtime.StreamError\r\n\
              Lambda-Runtime-Function-Error-Body: b29wcw==\r\n",
        );
        let failure = stream_failure(&mut payload, &HeaderMap::new()).unwrap();
        assert_eq!(payload, b"half a bo");
        assert_eq!(failure.error_type, "Runtime.StreamError");
        let document: serde_json::Value = serde_json::from_slice(&failure.document).unwrap();
        assert_eq!(document["errorMessage"], "oops");
    }

    #[test]
    fn a_body_that_only_mentions_the_trailer_is_left_alone() {
        for text in [
            "Lambda-Runtime-Function-Error-Type: x",
            "see Lambda-Runtime-Function-Error-Type: x\r\nLambda-Runtime-Function-Error-Body: eA==\r\nmore",
        ] {
            let mut payload = text.as_bytes().to_vec();
            assert_eq!(stream_failure(&mut payload, &HeaderMap::new()), None);
            assert_eq!(payload, text.as_bytes());
        }
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
        let failure = stream_failure(&mut b"abc".to_vec(), &trailers).unwrap();
        assert_eq!(failure.document, br#"{"errorMessage":"x"}"#);
    }

    proptest! {
        #[test]
        fn any_body_is_taken(mut payload in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..120) {
            let lines = b"Lambda-Runtime-Function-Error-Type: a\r\nLambda-Runtime-Function-Error-Body: b\r\n";
            payload.extend_from_slice(&lines[..cut.min(lines.len())]);
            stream_failure(&mut payload, &HeaderMap::new());
        }
    }
}
