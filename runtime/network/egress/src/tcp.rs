//! Connections of a slot: taken, decided, carried.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use thaw_network::{DomainName, Reason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::hello::{Hello, NoName};
use crate::meter::Metered;
use crate::rules::Verdict;
use crate::slot::{Slot, lock};
use crate::web;

/// Longest wait for a server to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// Longest wait for what names the server that is wanted.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// What the kernel keeps for a connection, in each direction, before it holds back who sends: without a limit it grows to megabytes, and a guest with a
/// thousand connections that it does not read has it all. Enough for 12 MB/s at 20 ms.
const BUFFER_BYTES: u32 = 256 * 1024;
/// Pause after a failure of accept(2): out of descriptors, for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Takes the connections of a slot until it ends.
pub async fn serve(slot: Arc<Slot>, listener: TcpListener) {
    let taking = async {
        loop {
            // Who begins too many waits in the kernel's queue.
            let wait = lock(&slot.beginnings).wait(slot.machine.now());
            sleep(wait).await;
            match listener.accept().await {
                Ok((stream, _)) => begin(&slot, stream),
                Err(_) => sleep(ACCEPT_PAUSE).await,
            }
        }
    };
    tokio::select! {
        // Once it has ended, nothing begins any more.
        biased;
        () = slot.ended.cancelled() => {}
        () = taking => {}
    }
}

fn begin(slot: &Arc<Slot>, stream: TcpStream) {
    lock(&slot.beginnings).spend(slot.machine.now(), 1);
    // By TPROXY, the address that the guest wanted.
    let Ok(SocketAddr::V4(to)) = stream.local_addr() else {
        return;
    };
    let Some(admitted) = slot.admit() else {
        slot.denied(&to, Reason::TooMany);
        return reset(&stream);
    };
    let verdict = slot.decide(to);
    if let Verdict::Denied(reason) = verdict {
        slot.denied(&to, reason);
        return reset(&stream);
    }
    let slot = Arc::clone(slot);
    tokio::spawn(async move {
        tokio::select! {
            biased;
            () = slot.ended.cancelled() => {}
            () = carry(&slot, stream, to, verdict) => {}
        }
        drop(admitted);
    });
}

/// Answers with a reset, as a closed port would, when the stream is dropped.
fn reset(stream: &TcpStream) {
    // Fails for a connection that is gone.
    let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

async fn carry(slot: &Arc<Slot>, stream: TcpStream, to: SocketAddrV4, verdict: Verdict) {
    let _ = stream.set_nodelay(true);
    let mut guest = Metered::new(stream, Arc::clone(slot));
    let first = match verdict {
        Verdict::Direct => Vec::new(),
        Verdict::Tls(web) => {
            let wanted = match timeout(HELLO_LIMIT, read_hello(&mut guest)).await {
                Ok((Some(name), bytes)) if web.secret.contains(&name) => {
                    return web::serve_tls(slot, guest, bytes, to, name).await;
                }
                Ok((Some(name), bytes)) if web.open || web.names.contains(&name) => Ok(bytes),
                Ok((None, bytes)) if web.open => Ok(bytes),
                Ok((Some(name), _)) => Err((name.to_string(), Reason::OtherName)),
                Ok((None, _)) | Err(_) => Err((to.to_string(), Reason::NoName)),
            };
            match wanted {
                Ok(bytes) => bytes,
                Err((what, reason)) => {
                    slot.denied(&what, reason);
                    return reset(guest.stream());
                }
            }
        }
        Verdict::Web(web) => return web::serve(slot, guest, to, web).await,
        Verdict::Denied(reason) => {
            slot.denied(&to, reason);
            return reset(guest.stream());
        }
    };
    let Ok(mut server) = open(slot, to).await else {
        return reset(guest.stream());
    };
    let _open = slot.let_out();
    if server.write_all(&first).await.is_err() {
        return reset(guest.stream());
    }
    let pulse = guest.pulse();
    let carried = tokio::select! {
        carried = tokio::io::copy_bidirectional(&mut guest, &mut server) => carried.is_ok(),
        () = pulse.stopped(slot) => false,
    };
    if !carried {
        reset(guest.stream());
        reset(&server);
    }
}

/// The name that a ClientHello asks for, if there is one to be seen, and what was read to see it.
async fn read_hello(guest: &mut Metered) -> (Option<DomainName>, Vec<u8>) {
    let mut hello = Hello::default();
    let mut chunk = [0; 2048];
    loop {
        let count = guest.read(&mut chunk).await.unwrap_or_default();
        match hello.push(&chunk[..count]) {
            Ok(None) if count > 0 => {}
            Ok(name) => return (name, hello.into_bytes()),
            Err(NoName) => return (None, hello.into_bytes()),
        }
    }
}

/// A connection to a server, from this machine. One that fails is told in the slot's report.
pub async fn open(slot: &Slot, to: SocketAddrV4) -> io::Result<TcpStream> {
    let opened = async {
        let _permit = slot.openings.acquire().await.map_err(io::Error::other)?;
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(BUFFER_BYTES)?;
        socket.set_send_buffer_size(BUFFER_BYTES)?;
        let stream = timeout(CONNECT_LIMIT, socket.connect(to.into())).await??;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    opened
        .await
        .inspect_err(|_| slot.denied(&to, Reason::Unreachable))
}
