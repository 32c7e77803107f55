//! Which pages a function touches first: one invocation in a VM that notes them.

use std::sync::Arc;

use thaw_snapshot::WorkingSet;
use thaw_vmm_control::Paging;

use super::Pool;
use crate::monitor::Size;
use crate::node::touched;
use crate::sandbox::answer::Answer;
use crate::sandbox::{Moment, NotRun, Sandbox};
use crate::{HostError, Invocation, InvokeError, Outcome};

fn host(error: HostError) -> InvokeError {
    InvokeError::Host(Arc::new(error))
}

impl Pool {
    /// Runs one request as [`Pool::invoke`] does, in a VM whose memory comes page by page as it is touched, and tells which pages
    /// those were, in their order. That is many times slower than an ordinary invocation; the VM is made for this one alone, past
    /// queue and budgets, and destroyed afterwards. Not for a stub, whose memory is in no file.
    ///
    /// # Errors
    /// A failure of this machine. What the function did is an [`Outcome`].
    pub async fn record(
        &self,
        invocation: &Invocation,
    ) -> Result<(Outcome, WorkingSet), InvokeError> {
        let (node, member) = (&self.inner.node, &self.inner.member);
        let mut files = member.files().again().map_err(|source| {
            host(HostError::File {
                act: "cannot keep open",
                path: member.spec.snapshot.clone(),
                source,
            })
        })?;
        files.paging = Paging::Recorded;
        let mut sandbox = Sandbox::spawn(&node.spawner, Size::of_shell(member.shape))
            .await
            .map_err(host)?;
        let asked = Moment::now();
        let ran = sandbox
            .run(
                invocation,
                (&files, node.plug(member).await.map_err(host)?),
                &mut Answer::whole(),
                (asked, asked),
                &node.config,
                &mut || {},
            )
            .await;
        let told = match &ran {
            Ok(_) => sandbox.working_set(&node.config).await.map_err(host),
            Err(_) => Ok(Vec::new()),
        };
        sandbox.end().await;
        let outcome = ran.map_err(|error| match error {
            NotRun::Surely(error) => InvokeError::Host(error),
            NotRun::Perhaps(error) => error,
        })?;
        let bytes = u64::from(member.shape.memory_mib) << 20;
        let set = WorkingSet::new(told?.iter().map(touched).collect(), bytes).map_err(|_| {
            host(HostError::UnexpectedReply {
                request: "tell its working set",
                reply: "pages outside of its memory",
            })
        })?;
        Ok((outcome, set))
    }
}
