//! The closed loop: each client sends, waits, sends again.
//!
//! It measures what a client sees that waits for each answer. It says nothing of an overloaded server's queue, because a
//! slow server slows its own load down (coordinated omission): that is what [`crate::open_loop`] is for.

use std::time::Instant;

use anyhow::Context as _;

use crate::report::{Load, Report};
use crate::request::Sender;
use crate::tally::{Sent, Tally};

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Clients at the same time.
    pub clients: u32,
    /// Requests of each.
    pub requests_per_client: u32,
}

/// Runs the plan to its end.
///
/// # Errors
/// The plan cannot be carried out at all (a client task died). A failed request is no error: it is counted.
pub async fn run(plan: Plan, sender: &Sender) -> anyhow::Result<Report> {
    let started = Instant::now();
    let clients: Vec<_> = (0..plan.clients)
        .map(|_| tokio::spawn(client(sender.clone(), plan.requests_per_client)))
        .collect();
    let mut total = Tally::new()?;
    for client in clients {
        total.merge(client.await.context("a client task died")??)?;
    }
    let load = Load::Closed {
        clients: plan.clients,
    };
    Ok(Report::new(load, total, started.elapsed()))
}

async fn client(sender: Sender, requests: u32) -> anyhow::Result<Tally> {
    let mut tally = Tally::new()?;
    for _ in 0..requests {
        let now = Instant::now();
        let sent = Sent {
            intended: now,
            actual: now,
        };
        tally.add(sent, sender.send().await)?;
    }
    Ok(tally)
}
