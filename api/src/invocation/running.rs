//! An invocation whose answer comes in parts.

use std::sync::Arc;

use thaw_runtime::StreamPart;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Answer, Refusal, Request, run_streaming};
use crate::state::{App, Live, LiveFunction};

/// Parts that wait for a slow client; more wait in the guest.
const PARTS_WAITING_MAX: usize = 4;

/// How it ended.
pub type Ended = Result<Answer, Refusal>;

/// It runs; dropping this ends it.
pub struct Running {
    /// Its answer.
    pub parts: mpsc::Receiver<StreamPart>,
    ended: JoinHandle<Ended>,
}

impl Running {
    /// Begins.
    #[must_use]
    pub fn start(
        app: &Arc<App>,
        function: &Arc<LiveFunction>,
        live: &Arc<Live>,
        request: Request,
    ) -> Self {
        let (sink, parts) = mpsc::channel(PARTS_WAITING_MAX);
        let (app, function, live) = (app.clone(), function.clone(), live.clone());
        let ended =
            tokio::spawn(async move { run_streaming(&app, &function, &live, request, sink).await });
        Self { parts, ended }
    }

    /// The outcome, once there are no more parts.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub async fn end(self) -> Ended {
        let ended = self.ended.await;
        ended.unwrap_or_else(|_| Err(Refusal::Host("the invocation's task died".to_owned())))
    }
}
