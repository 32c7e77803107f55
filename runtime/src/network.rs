//! Slots for the guests of functions with a network: from the process `thaw-egress`, which is started when the first one is wanted, and
//! again when it has ended.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use thaw_network::{Authority, Egress, EgressError, EgressOptions, Policy, Slot};

use thaw_snapshot::Key;

use crate::HostError;

/// Why there is no network.
const NONE_HERE: &str = "no program that makes networks was named";

/// Of the home's key, another for this use.
const AUTHORITY: &str = "thaw 2026-11-29 authority of the network's secrets";

/// Where slots come from.
#[derive(Debug)]
pub(crate) struct Networks {
    options: Option<EgressOptions>,
    current: tokio::sync::Mutex<Option<Egress>>,
}

/// A slot and the end of it that a monitor gets.
#[derive(Debug)]
pub(crate) struct Plug {
    pub(crate) socket: Socket,
    pub(crate) tap: OwnedFd,
}

/// A slot in use. Dropping it ends every connection of its guest and gives it back, in the background.
#[derive(Debug)]
pub(crate) struct Socket {
    egress: Egress,
    slot: Slot,
}

impl Networks {
    pub(crate) fn new(options: Option<EgressOptions>, key: &Key) -> Self {
        let authority = Authority::of(&key.derive(AUTHORITY))
            .inspect_err(|error| tracing::error!(%error, "no authority for secrets over TLS"));
        let authority = authority.ok().map(Arc::new);
        let options = options.map(|options| EgressOptions {
            authority,
            ..options
        });
        Self {
            options,
            current: tokio::sync::Mutex::new(None),
        }
    }

    /// The authority that a guest under `policy` is to trust, PEM.
    pub(crate) fn authority(&self, policy: &Policy) -> Option<String> {
        let options = self.options.as_ref()?;
        let authority = options.authority.as_ref();
        authority
            .filter(|_| !policy.secrets.is_empty())
            .map(|it| it.pem())
    }

    /// A fresh slot, within `limit`. One that is ready costs a message and no call that configures a network.
    pub(crate) async fn plug(&self, policy: &Policy, limit: Duration) -> Result<Plug, HostError> {
        let taken = match self.take(policy, limit).await {
            // It has died since a slot was last taken; no life has begun with it, and another process may do better.
            Err(EgressError::Ended(_) | EgressError::Protocol) => self.take(policy, limit).await,
            taken => taken,
        };
        taken.map_err(HostError::Network)
    }

    async fn take(&self, policy: &Policy, limit: Duration) -> Result<Plug, EgressError> {
        let egress = self.egress().await?;
        let taken = egress.take(policy, limit).await;
        if matches!(taken, Err(EgressError::Ended(_) | EgressError::Protocol)) {
            let mut current = self.current.lock().await;
            // Not one that somebody else has started meanwhile: it would end with every slot of it.
            current.take_if(|it| it.pid() == egress.pid());
        }
        let (slot, tap) = taken?;
        let socket = Socket { egress, slot };
        Ok(Plug { socket, tap })
    }

    /// Starts the process ahead of the first slot that is wanted.
    pub(crate) fn warm(self: &Arc<Self>, tokio: &tokio::runtime::Handle) {
        let networks = Arc::clone(self);
        tokio.spawn(async move {
            if let Err(error) = networks.egress().await {
                tracing::warn!(
                    error = crate::vm::chain(&error),
                    "functions have no network"
                );
            }
        });
    }

    async fn egress(&self) -> Result<Egress, EgressError> {
        let mut current = self.current.lock().await;
        if let Some(egress) = &*current {
            return Ok(egress.clone());
        }
        let Some(options) = &self.options else {
            return Err(EgressError::Refused(NONE_HERE.into()));
        };
        let egress = Egress::start(options).await?;
        Ok(current.insert(egress).clone())
    }
}

impl Socket {
    /// A line for the function's log about each thing that its guest wanted and did not get; empty if there was none.
    pub(crate) async fn denials(&self) -> Vec<u8> {
        let report = match self.egress.report(&self.slot).await {
            Ok(report) => report,
            Err(error) => {
                tracing::debug!(%error, "no report of a network");
                return Vec::new();
            }
        };
        let mut lines = String::new();
        for denial in &report.denials {
            lines.push_str(&format!("thaw: network: denied {denial}\n"));
        }
        let told = u64::try_from(report.denials.len()).unwrap_or(u64::MAX);
        if report.denied > told {
            lines.push_str(&format!("thaw: network: denied {} in all\n", report.denied));
        }
        lines.into_bytes()
    }
}
