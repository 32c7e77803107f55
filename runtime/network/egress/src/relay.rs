//! What the gateway asks for, and the stock of slots. Nothing here configures a network: slots come from the maker.

use std::collections::{HashMap, VecDeque};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::Context as _;
use thaw_network::channel::{Incoming, Sender, halves};
use thaw_network::{FromEgress, Identity, Policy, Reply, Request, SlotId, Status, ToEgress};
use tokio::time::{Instant, sleep_until};

use crate::machine::Machine;
use crate::maker::{Made, Make};
use crate::slot::Slot;
use crate::{dns, tcp};

/// Most slots, ready and taken.
const SLOTS_MAX: usize = 4096;
/// Most requests for a slot that wait for one to be made.
const WAITING_MAX: usize = 1024;
/// Pause after a slot could not be made.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

/// A slot that nobody has taken yet.
struct Blank {
    tap: OwnedFd,
    relay: TcpListener,
    names: TcpListener,
    datagrams: UdpSocket,
}

/// What a slot is taken for.
type Terms = (Policy, Option<Identity>);

struct Relay {
    machine: Arc<Machine>,
    gateway: Sender,
    maker: Sender,
    /// How many are kept ready.
    target: usize,
    /// One is being made.
    making: bool,
    /// None is made before.
    pause: Option<Instant>,
    ready: VecDeque<Blank>,
    waiting: VecDeque<(u64, Terms)>,
    taken: HashMap<SlotId, (Arc<Slot>, OwnedFd)>,
    /// Taps that are used up.
    closer: mpsc::Sender<OwnedFd>,
    made: u64,
    numbered: u64,
    failure: Option<String>,
}

/// Serves the gateway until it closes.
pub async fn serve(
    control: UnixStream,
    maker: UnixStream,
    machine: Arc<Machine>,
    target: usize,
) -> anyhow::Result<()> {
    machine.refresh();
    tokio::spawn(Arc::clone(&machine).keep_fresh());
    let (gateway, mut from_gateway) = halves(tokio::net::UnixStream::from_std(control)?);
    let (maker, mut from_maker) = halves(tokio::net::UnixStream::from_std(maker)?);
    let mut relay = Relay {
        machine,
        gateway,
        maker,
        target,
        making: false,
        pause: None,
        ready: VecDeque::new(),
        waiting: VecDeque::new(),
        taken: HashMap::new(),
        closer: closer()?,
        made: 0,
        numbered: 0,
        failure: None,
    };
    loop {
        relay.order().await?;
        let pause = relay.pause;
        tokio::select! {
            message = from_gateway.next::<ToEgress>() => match message.context("the gateway is lost")? {
                Some(ToEgress { id, request }) => relay.asked(id, request).await?,
                None => return Ok(()),
            },
            message = from_maker.next::<Made>() => {
                let made = message.context("the maker is lost")?.context("the maker has ended")?;
                relay.made(made, &mut from_maker).await?;
            }
            () = sleep_until(pause.unwrap_or_else(Instant::now)), if pause.is_some() => relay.pause = None,
        }
    }
}

/// A thread that closes taps, one after the other: for the last descriptor of one the kernel takes its network lock (rtnl) and waits until no processor
/// uses the device any more, tens of milliseconds.
fn closer() -> std::io::Result<mpsc::Sender<OwnedFd>> {
    let (closer, taps) = mpsc::channel::<OwnedFd>();
    std::thread::Builder::new()
        .name("taps".into())
        .spawn(move || taps.into_iter().for_each(drop))?;
    Ok(closer)
}

impl Relay {
    /// Has a slot made if one is wanted: one at a time, so that the making never has the machine to itself.
    async fn order(&mut self) -> anyhow::Result<()> {
        let wanted = self.ready.len() < self.target + self.waiting.len();
        let room = self.ready.len() + self.taken.len() < SLOTS_MAX;
        if wanted && room && !self.making && self.pause.is_none() {
            self.maker.send(&Make, &[]).await?;
            self.making = true;
        }
        Ok(())
    }

    async fn made(&mut self, made: Made, from: &mut Incoming) -> anyhow::Result<()> {
        self.making = false;
        match made {
            Made::Slot => {
                let mut next = || from.take_fd().context("a descriptor is missing");
                let blank = Blank {
                    tap: next()?,
                    relay: next()?.into(),
                    names: next()?.into(),
                    datagrams: next()?.into(),
                };
                self.made += 1;
                self.failure = None;
                match self.waiting.pop_front() {
                    Some((id, terms)) => self.give(id, terms, blank).await,
                    None => {
                        self.ready.push_back(blank);
                        Ok(())
                    }
                }
            }
            Made::Failed(why) => {
                if self.failure.is_none() {
                    tracing::error!(why, "no network slot can be made");
                }
                self.pause = Some(Instant::now() + FAILURE_PAUSE);
                self.failure = Some(why.clone());
                for (id, _) in std::mem::take(&mut self.waiting) {
                    self.reply(id, Reply::Failed(why.clone())).await?;
                }
                Ok(())
            }
        }
    }

    async fn asked(&mut self, id: u64, request: Request) -> anyhow::Result<()> {
        let no_slot = |slot: SlotId| Reply::Failed(format!("slot {} is not taken", slot.0));
        let reply = match request {
            Request::Take { policy, identity } => match (policy.check(), self.ready.pop_front()) {
                (Err(error), blank) => {
                    self.ready.extend(blank);
                    Reply::Failed(error.to_string())
                }
                (Ok(()), Some(blank)) => return self.give(id, (policy, identity), blank).await,
                (Ok(()), None) if self.waiting.len() < WAITING_MAX => {
                    self.waiting.push_back((id, (policy, identity)));
                    return Ok(());
                }
                (Ok(()), None) => Reply::Failed(format!("{WAITING_MAX} requests wait for a slot")),
            },
            Request::GiveBack(slot) => match self.taken.remove(&slot) {
                Some((given, tap)) => {
                    // Tasks and sockets go; with the tap the namespace, whose end is the kernel's own work.
                    given.ended.cancel();
                    // Fails only without the thread, and closes it here.
                    let _ = self.closer.send(tap);
                    Reply::Report(given.report())
                }
                None => no_slot(slot),
            },
            Request::Report(slot) => match self.taken.get(&slot) {
                Some((slot, _)) => Reply::Report(slot.report()),
                None => no_slot(slot),
            },
            Request::Status => Reply::Status(Status {
                ready: self.ready.len(),
                taken: self.taken.len(),
                made: self.made,
                failure: self.failure.clone(),
            }),
        };
        self.reply(id, reply).await
    }

    async fn give(&mut self, id: u64, terms: Terms, blank: Blank) -> anyhow::Result<()> {
        let (policy, identity) = terms;
        let slot = match Slot::new(Arc::clone(&self.machine), policy, identity.as_ref()) {
            Ok(slot) => Arc::new(slot),
            Err(error) => {
                self.ready.push_front(blank);
                return self.reply(id, Reply::Failed(crate::chain(&error))).await;
            }
        };
        let Blank {
            tap,
            relay,
            names,
            datagrams,
        } = blank;
        let relay = tokio::net::TcpListener::from_std(relay)?;
        let names = tokio::net::TcpListener::from_std(names)?;
        let datagrams = tokio::net::UdpSocket::from_std(datagrams)?;
        tokio::spawn(tcp::serve(Arc::clone(&slot), relay));
        tokio::spawn(dns::serve_connections(Arc::clone(&slot), names));
        tokio::spawn(dns::serve_datagrams(Arc::clone(&slot), datagrams));
        self.numbered += 1;
        let number = SlotId(self.numbered);
        let message = FromEgress {
            id,
            reply: Reply::Taken(number),
        };
        self.gateway.send(&message, &[tap.as_fd()]).await?;
        // Kept, so that the monitor's is never the last: who closes that waits for the kernel.
        self.taken.insert(number, (slot, tap));
        Ok(())
    }

    async fn reply(&mut self, id: u64, reply: Reply) -> anyhow::Result<()> {
        Ok(self.gateway.send(&FromEgress { id, reply }, &[]).await?)
    }
}
