//! The process `thaw-egress` and what it is asked.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thaw_vmm_control::wire::WireError;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::authority::Authority;
use crate::channel::{self, Incoming, Sender};
use crate::policy::{Policy, PolicyError};
use crate::protocol::{FromEgress, Reply, Report, Request, SlotId, Status, ToEgress};

/// Longest wait for an answer that takes no slot to be made.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Lines of the process's standard error kept for error messages.
const LAST_LINES: usize = 8;
/// Longest such line, bytes: a longer one counts as several.
const LINE_BYTES_MAX: u64 = 512;

/// Why a slot could not be had.
#[derive(Debug, Error)]
pub enum EgressError {
    /// The process could not be started.
    #[error("cannot start {path}")]
    Start {
        /// The binary.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The policy is over a limit.
    #[error("the network policy is refused")]
    Policy(#[from] PolicyError),
    /// No certificate for the hosts of its secrets can be made.
    #[error("no certificate can be made for the hosts of the policy's secrets")]
    Certificate(#[source] rcgen::Error),
    /// It answered that it cannot.
    #[error("thaw-egress failed: {0}")]
    Refused(String),
    /// No answer in time.
    #[error("thaw-egress did not answer within {0:?}")]
    Silent(Duration),
    /// The process is gone, and every slot with it.
    #[error("thaw-egress has ended: {0}")]
    Ended(String),
    /// It said what it should not.
    #[error("thaw-egress broke the protocol")]
    Protocol,
}

/// How the process is started.
#[derive(Clone, Debug)]
pub struct EgressOptions {
    /// The binary `thaw-egress`.
    pub program: PathBuf,
    /// Slots that are kept ready, at most 1024.
    pub ready: usize,
    /// What guests trust that ask a secret's host over TLS; without one they ask over plain HTTP alone.
    pub authority: Option<Arc<Authority>>,
}

/// The process that owns all slots. Clones speak to the same one; it ends, and every slot with it, when the last clone and the last [`Slot`] are gone.
#[derive(Clone, Debug)]
pub struct Egress {
    asks: mpsc::UnboundedSender<Ask>,
    ended: watch::Receiver<Option<String>>,
    pid: u32,
    authority: Option<Arc<Authority>>,
}

/// A request, and who waits for its reply. Nobody: a slot that was dropped.
#[derive(Debug)]
struct Ask {
    request: Request,
    reply: Option<oneshot::Sender<Answer>>,
}

#[derive(Debug)]
enum Answer {
    Slot(Slot, OwnedFd),
    Other(Reply),
}

/// A slot that is taken. Dropping it gives it back, in the background.
#[derive(Debug)]
pub struct Slot {
    id: SlotId,
    asks: mpsc::UnboundedSender<Ask>,
    given_back: bool,
}

impl Slot {
    /// Its number, for [`Egress::report`].
    pub fn id(&self) -> SlotId {
        self.id
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if !self.given_back {
            // Fails only when the process is gone, and the slot with it.
            let _ = self.asks.send(Ask {
                request: Request::GiveBack(self.id),
                reply: None,
            });
        }
    }
}

impl Egress {
    /// Starts the process. Slots are made from now on; a first [`Self::take`] may wait for one. Must be called within tokio.
    ///
    /// # Errors
    /// It cannot be started, or does not answer.
    pub async fn start(options: &EgressOptions) -> Result<Self, EgressError> {
        let failed = |source| EgressError::Start {
            path: options.program.clone(),
            source,
        };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let (sender, incoming) = channel::halves(UnixStream::from_std(ours).map_err(failed)?);
        let mut command = Command::new(&options.program);
        command
            .args(["--ready", &options.ready.to_string()])
            // The gateway's environment may hold secrets; nothing of it is needed there.
            .env_clear()
            // A terminal's Ctrl-C is the gateway's: guests need their network until it has ended them.
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let (started, pid) = oneshot::channel();
        let (end, ended) = watch::channel(None);
        std::thread::Builder::new()
            .name("thaw-egress".into())
            .spawn(move || attend(command, started, &end))
            .map_err(failed)?;
        let pid = pid
            .await
            .unwrap_or_else(|_| Err(io::Error::other("its thread ended")))
            .map_err(failed)?;
        let (asks, queue) = mpsc::unbounded_channel();
        tokio::spawn(converse(sender, incoming, queue, asks.downgrade()));
        let egress = Self {
            asks,
            ended,
            pid,
            authority: options.authority.clone(),
        };
        egress.status().await?;
        Ok(egress)
    }

    /// Process id, for logs and tests.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A slot under `policy`, and the descriptor of its tap (non-blocking; see [`crate::VNET_HEADER_BYTES`]). No call into the kernel's configuration is made
    /// for it if one is ready; else it waits for the next, `limit` at most. Dropping the future loses no slot.
    ///
    /// # Errors
    /// A policy over its limits, no slot in time, or the process has ended.
    pub async fn take(
        &self,
        policy: &Policy,
        limit: Duration,
    ) -> Result<(Slot, OwnedFd), EgressError> {
        policy.check()?;
        let identity = match &self.authority {
            Some(authority) => authority
                .identity(policy)
                .map_err(EgressError::Certificate)?,
            None => None,
        };
        let take = Request::Take {
            policy: policy.clone(),
            identity: identity.as_deref().cloned(),
        };
        match self.ask(take, limit).await? {
            Answer::Slot(slot, tap) => Ok((slot, tap)),
            Answer::Other(_) => Err(EgressError::Protocol),
        }
    }

    /// Gives a slot back and tells what happened in it. Its connections are ended at once; what is left of it goes in the background.
    ///
    /// # Errors
    /// The process has ended, or does not answer.
    pub async fn give_back(&self, mut slot: Slot) -> Result<Report, EgressError> {
        slot.given_back = true;
        self.told(Request::GiveBack(slot.id)).await
    }

    /// What has happened in a slot so far.
    ///
    /// # Errors
    /// No such slot, or the process has ended.
    pub async fn report(&self, slot: &Slot) -> Result<Report, EgressError> {
        self.told(Request::Report(slot.id)).await
    }

    /// How things stand.
    ///
    /// # Errors
    /// The process has ended, or does not answer.
    pub async fn status(&self) -> Result<Status, EgressError> {
        match self.ask(Request::Status, ANSWER_LIMIT).await? {
            Answer::Other(Reply::Status(status)) => Ok(status),
            _ => Err(EgressError::Protocol),
        }
    }

    /// Returns when the process has ended and was reaped, with its last words.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(words) => words.clone().unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    async fn told(&self, request: Request) -> Result<Report, EgressError> {
        match self.ask(request, ANSWER_LIMIT).await? {
            Answer::Other(Reply::Report(report)) => Ok(report),
            _ => Err(EgressError::Protocol),
        }
    }

    async fn ask(&self, request: Request, limit: Duration) -> Result<Answer, EgressError> {
        let (reply, answer) = oneshot::channel();
        let ask = Ask {
            request,
            reply: Some(reply),
        };
        if self.asks.send(ask).is_err() {
            return Err(self.why().await);
        }
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(Answer::Other(Reply::Failed(message)))) => Err(EgressError::Refused(message)),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(self.why().await),
            Err(_) => Err(EgressError::Silent(limit)),
        }
    }

    async fn why(&self) -> EgressError {
        let words = tokio::time::timeout(ANSWER_LIMIT, self.ended()).await;
        EgressError::Ended(words.unwrap_or_else(|_| "its socket is closed".into()))
    }
}

/// Starts the process and lives as long as it does: the process asks the kernel to be killed when its parent ends, and takes the *thread* that forked
/// it for the parent (`PR_SET_PDEATHSIG`, prctl(2)).
fn attend(
    mut command: Command,
    started: oneshot::Sender<io::Result<u32>>,
    end: &watch::Sender<Option<String>>,
) {
    let spawned = command.spawn();
    // The other end of the socket must be the child's alone.
    drop(command);
    let mut child: Child = match spawned {
        Ok(child) => child,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(child.id()));
    let mut last = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let mut stderr = BufReader::new(stderr);
        while let Some(line) = next_line(&mut stderr) {
            tracing::warn!(line, "thaw-egress");
            if last.len() == LAST_LINES {
                last.remove(0);
            }
            last.push(line);
        }
    }
    let status = match child.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    last.push(status);
    end.send_replace(Some(last.join("; ")));
}

/// The next line of a process that may write anything, or as much of it as is kept at once.
fn next_line(from: &mut impl BufRead) -> Option<String> {
    let mut bytes = Vec::new();
    let count = from
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut bytes)
        .ok()?;
    let text = String::from_utf8_lossy(&bytes);
    (count > 0).then(|| text.trim_end_matches(['\r', '\n']).to_owned())
}

/// Carries requests and replies until nobody can ask any more or the process closes its end.
async fn converse(
    mut sender: Sender,
    mut incoming: Incoming,
    mut queue: mpsc::UnboundedReceiver<Ask>,
    asks: mpsc::WeakUnboundedSender<Ask>,
) {
    let waiting = Arc::new(Mutex::new(HashMap::new()));
    let replies = async {
        loop {
            let FromEgress { id, reply } = match incoming.next().await {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) => return told(&error),
            };
            let waiter: Option<oneshot::Sender<Answer>> = waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&id)
                .flatten();
            let answer = match reply {
                Reply::Taken(id) => {
                    let (Some(tap), Some(asks)) = (incoming.take_fd(), asks.upgrade()) else {
                        return;
                    };
                    let slot = Slot {
                        id,
                        asks,
                        given_back: false,
                    };
                    Answer::Slot(slot, tap)
                }
                other => Answer::Other(other),
            };
            // Whoever has gone meanwhile gives a slot back by not taking it.
            if let Some(waiter) = waiter {
                let _ = waiter.send(answer);
            }
        }
    };
    let requests = async {
        let mut id = 0;
        while let Some(Ask { request, reply }) = queue.recv().await {
            id += 1;
            waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id, reply);
            if let Err(error) = sender.send(&ToEgress { id, request }, &[]).await {
                return told(&error);
            }
        }
    };
    tokio::select! {
        () = replies => {}
        () = requests => {}
    }
}

fn told(error: &WireError) {
    tracing::warn!(error = %error, "the socket to thaw-egress is lost");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_end_comes_in_pieces_and_bytes_that_are_no_text_end_nothing() {
        let mut endless = BufReader::new(io::repeat(b'x'));
        assert_eq!(next_line(&mut endless).unwrap(), "x".repeat(512));
        let mut odd = &b"one\r\n\xff\n\nlast"[..];
        let lines: Vec<String> = std::iter::from_fn(|| next_line(&mut odd)).collect();
        assert_eq!(lines, ["one", "\u{fffd}", "", "last"]);
    }
}
