//! Ten thousand idle connections, in a process of their own: its memory is measured, and its clients are another process, as one
//! may not have as many files open as both ends take.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use server::Server;

#[path = "http/machine.rs"]
#[expect(dead_code, reason = "this one test plays little of the machine")]
mod machine;
#[path = "http/server.rs"]
#[expect(dead_code, reason = "this one test asks for little")]
mod server;

const CONNECTIONS: usize = 10_000;
/// What an idle connection may cost the gateway's process, KiB: its task, and what hyper reads ahead of it.
const CONNECTION_KIB_MAX: usize = 24;
/// In the environment of the clients: where the gateway serves.
const CLIENTS_OF: &str = "THAW_TEST_CLIENTS_OF";
const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n";

#[test]
fn ten_thousand_idle_connections_are_held_while_requests_are_served() {
    if let Ok(address) = env::var(CLIENTS_OF) {
        return hold(&address);
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(serve());
}

async fn serve() {
    let server = Server::start().await;
    let before = resident_kib();
    let this = env::current_exe().unwrap();
    let mut clients = Command::new(this)
        .args([
            "--exact",
            "ten_thousand_idle_connections_are_held_while_requests_are_served",
            "--nocapture",
        ])
        .env(CLIENTS_OF, server.address.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = clients.stdout.take().unwrap();
    let told = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        while !text.ends_with("all are there\n") {
            let mut byte = [0];
            assert_eq!(
                told.read(&mut byte).unwrap(),
                1,
                "the clients said {text:?}"
            );
            text.push(byte[0].into());
        }
        told
    });
    let _told = told.await.unwrap();
    let each = (resident_kib().saturating_sub(before)).div_ceil(CONNECTIONS);
    println!("{CONNECTIONS} connections, {each} KiB each");
    for _ in 0..100 {
        assert_eq!(server.get("/healthz").await.status, 200);
    }
    assert!(each <= CONNECTION_KIB_MAX, "{each} KiB a connection");
    // They end with their standard input, and find then that all connections are still there.
    drop(clients.stdin.take());
    let ended = tokio::task::spawn_blocking(move || clients.wait().unwrap());
    assert!(ended.await.unwrap().success());
    server.stop().await;
}

/// The clients: half of them have never said anything, half have had an answer.
fn hold(address: &str) {
    raise_descriptors();
    let ask = |stream: &mut TcpStream| {
        stream.write_all(HEALTH).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        let mut rest = Vec::new();
        while !rest.ends_with(b"\r\n\r\nok\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            rest.push(byte[0]);
        }
    };
    let mut connections: Vec<TcpStream> = Vec::with_capacity(CONNECTIONS);
    for number in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(address).unwrap();
        if number % 2 == 0 {
            ask(&mut stream);
        }
        connections.push(stream);
    }
    // The last one was answered: those before it were let in, too.
    ask(&mut connections[CONNECTIONS - 1]);
    println!("all are there");
    let mut nothing = Vec::new();
    std::io::stdin().read_to_end(&mut nothing).unwrap();
    for stream in connections.iter_mut().step_by(99) {
        ask(stream);
    }
}

fn raise_descriptors() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, all).unwrap();
}

/// Memory of this process, KiB (proc_pid_status(5)).
fn resident_kib() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let text = line.unwrap().trim().trim_end_matches("kB");
    text.trim().parse().unwrap()
}
