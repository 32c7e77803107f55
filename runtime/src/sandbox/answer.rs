//! Where a streamed answer goes: to a caller who takes it piece by piece, or into memory for one who wants it whole.

use bytes::Bytes;
use thaw_agent_protocol::RESPONSE_BYTES_MAX;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::{End, StreamPart};

const TOO_LARGE: &str = "Function.ResponseSizeTooLarge";

/// One invocation's.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Collected, at most [`RESPONSE_BYTES_MAX`] bytes; `None`: there were more.
    Whole(Option<Vec<u8>>),
    /// Passed on, no faster than it is taken.
    Parts(mpsc::Sender<StreamPart>),
}

/// What became of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Yes,
    /// The caller did not take it in time.
    TooLate,
    /// The caller is gone.
    Abandoned,
}

impl Answer {
    /// For a caller who wants it whole.
    pub(crate) fn whole() -> Self {
        Self::Whole(Some(Vec::new()))
    }

    /// Hands on a piece; waits for the caller to have room for it, until `deadline`.
    pub(crate) async fn take(&mut self, part: StreamPart, deadline: Instant) -> Taken {
        match self {
            Self::Whole(collected) => {
                if let (StreamPart::Chunk(bytes), Some(all)) = (part, collected.as_mut()) {
                    if all.len() + bytes.len() > RESPONSE_BYTES_MAX {
                        *collected = None;
                    } else {
                        all.extend_from_slice(&bytes);
                    }
                }
                Taken::Yes
            }
            Self::Parts(sink) => match timeout_at(deadline, sink.send(part)).await {
                Ok(Ok(())) => Taken::Yes,
                Ok(Err(_)) => Taken::Abandoned,
                Err(_) => Taken::TooLate,
            },
        }
    }

    /// Returns when the caller is gone.
    pub(crate) async fn abandoned(&self) {
        match self {
            Self::Whole(_) => std::future::pending().await,
            Self::Parts(sink) => sink.closed().await,
        }
    }

    /// The end with what was collected: as if the function had answered whole.
    pub(crate) fn complete(&mut self, end: End) -> End {
        let Self::Whole(collected) = self else {
            return end;
        };
        let collected = collected.replace(Vec::new());
        match (end, collected) {
            (End::Response { .. }, None) => too_large(),
            (
                End::Response {
                    payload,
                    content_type,
                },
                Some(all),
            ) if !all.is_empty() => {
                debug_assert!(payload.is_empty(), "one answer has one form");
                End::Response {
                    payload: all.into(),
                    content_type,
                }
            }
            (end, _) => end,
        }
    }
}

fn too_large() -> End {
    let message = format!(
        "Response payload size exceeded maximum allowed payload size ({RESPONSE_BYTES_MAX} bytes)."
    );
    let document = format!(r#"{{"errorType":"{TOO_LARGE}","errorMessage":"{message}"}}"#);
    End::FunctionError {
        error_type: Some(TOO_LARGE.to_owned()),
        document: Bytes::from(document),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_over_the_limit_of_whole_answers_is_told_as_such() {
        let soon = Instant::now() + std::time::Duration::from_secs(60);
        let streamed = || End::Response {
            payload: Bytes::new(),
            content_type: None,
        };
        for (last, fits) in [(0, true), (1, false)] {
            let mut answer = Answer::whole();
            let sizes = [RESPONSE_BYTES_MAX - 1, 1, last];
            for size in sizes {
                let part = StreamPart::Chunk(vec![b'x'; size].into());
                assert_eq!(answer.take(part, soon).await, Taken::Yes);
            }
            match answer.complete(streamed()) {
                End::Response { payload, .. } => {
                    assert!(fits && payload.len() == RESPONSE_BYTES_MAX)
                }
                End::FunctionError { error_type, .. } => {
                    assert!(!fits && error_type.as_deref() == Some(TOO_LARGE));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
