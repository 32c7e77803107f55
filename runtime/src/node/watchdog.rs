//! The watchdog: a monitor that is idle, a shell or a paused sandbox, is asked for its status now and then, and one that has ended
//! or does not answer within the reply limit is killed and replaced. One at work has its limit already: each request to a
//! monitor has one, and an invocation has its function's time.
//!
//! Nobody waits for any of this: what is asked stays idle and is granted like any other, and its answer is dropped by whoever
//! reads the monitor's next word ([`crate::monitor::Monitor::ask_for_life`]).

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Node;
use crate::schedule::{Input, VmId};

/// Looks in an interval. In each, every thirtieth monitor is asked, so that they do not wake all at once.
const ROUNDS: u32 = 30;

/// Looks at idle monitors until the node is gone; each is asked once in `interval`.
pub(super) async fn watch(node: Weak<Node>, interval: Duration) {
    for round in (0..ROUNDS).cycle() {
        tokio::time::sleep(interval / ROUNDS).await;
        let Some(node) = node.upgrade() else { return };
        node.look(round);
    }
}

impl Node {
    fn look(self: &Arc<Self>, round: u32) {
        let limit = self.config.reply_limit;
        self.apply_all(|desk| {
            let mut lost = Vec::new();
            for (id, sandbox) in &mut desk.held {
                if !sandbox.gives_signs_of_life(is_in(*id, round), limit) {
                    let pid = sandbox.pid();
                    tracing::warn!(
                        pid,
                        ?limit,
                        "an idle monitor has ended or does not answer; it is replaced"
                    );
                    lost.push(Input::Lost(*id));
                }
            }
            lost
        });
    }
}

/// Whether it is this one's turn to be asked.
fn is_in(id: VmId, round: u32) -> Turn {
    match id.0 % u64::from(ROUNDS) == u64::from(round) {
        true => Turn::Now,
        false => Turn::Later,
    }
}

/// Whether a monitor is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It is.
    Now,
    /// Not in this round; what it owes from an earlier one counts.
    Later,
}
