//! A network of a test's own: the "machine" that the test and `thaw-egress` run in, and a world behind one link, with servers.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use hickory_proto::op::{Message, Metadata, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use nix::sched::{CloneFlags, unshare};
use thaw_network::{Authority, Egress, EgressOptions, Policy, Report, Slot};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UdpSocket};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use super::guest::Guest;

/// A server of the world, public.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
/// Another one.
pub const OTHER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 35);
/// A private one.
pub const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
/// Where clouds keep credentials.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The machine's own, though public.
pub const OWN: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 99);
/// Sends back what it gets.
pub const ECHO: u16 = 7;
/// What the world's resolver knows.
const NAMES: &[(&str, Ipv4Addr)] = &[
    ("api.example.com.", SERVER),
    ("shared.example.org.", SERVER),
    ("rebinding.example.com.", PRIVATE),
    ("metadata.example.com.", METADATA),
];
/// Marks a process that is in a network of its own.
const INSIDE: &str = "THAW_TEST_INSIDE";
/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Runs the test again, in namespaces of its own, unless this is that run: returns true there, and false, after its success, outside.
pub fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount"]);
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let status = command
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed inside");
    false
}

pub fn run(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What a server was asked: over TLS or not, and its `authorization`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub tls: bool,
    pub host: String,
    pub authorization: Vec<String>,
}

/// The machine, with `thaw-egress`.
pub struct Machine {
    pub tokio: tokio::runtime::Runtime,
    pub egress: Egress,
    /// What the world's HTTP servers were asked.
    pub asked: Arc<Mutex<Vec<Asked>>>,
    /// The authority that the world's certificates are of.
    pub ca: String,
    /// The one that guests with secrets trust.
    pub authority: String,
    _files: tempfile::TempDir,
}

impl Machine {
    /// A machine with `ready` slots.
    pub fn start(ready: usize) -> Self {
        Self::start_with(PathBuf::from(env!("CARGO_BIN_EXE_thaw-egress")), ready)
    }

    pub fn start_with(program: PathBuf, ready: usize) -> Self {
        let asked = Arc::default();
        let ca = link(&asked);
        let files = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("resolv.conf", "nameserver 9.9.9.9\nsearch example.org\n"),
            ("hosts", "93.184.216.35 hosts.example.com\n"),
        ] {
            let file = files.path().join(name);
            std::fs::write(&file, content).unwrap();
            run("chmod", &format!("644 {}", file.display()));
            run("mount", &format!("--bind {} /etc/{name}", file.display()));
        }
        let tokio = tokio::runtime::Runtime::new().unwrap();
        let authority = Arc::new(Authority::of(&[7; 32]).unwrap());
        let options = EgressOptions {
            program,
            ready,
            authority: Some(Arc::clone(&authority)),
        };
        let egress = tokio.block_on(Egress::start(&options)).unwrap();
        Self {
            tokio,
            egress,
            asked,
            ca,
            authority: authority.pem(),
            _files: files,
        }
    }

    /// A guest under a policy, given as JSON.
    pub fn guest(&self, policy: &str) -> (Slot, Guest) {
        let policy: Policy = serde_json::from_str(policy).unwrap();
        let taken = self.tokio.block_on(self.egress.take(&policy, LIMIT));
        let (slot, tap) = taken.unwrap();
        (slot, Guest::new(tap))
    }

    pub fn report(&self, slot: &Slot) -> Report {
        self.tokio.block_on(self.egress.report(slot)).unwrap()
    }

    /// Waits until `ready` slots wait.
    pub fn wait_ready(&self, ready: usize) {
        self.tokio.block_on(async {
            let waited = async {
                while self.egress.status().await.unwrap().ready < ready {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(LIMIT, waited).await.unwrap();
        });
    }
}

/// Joins the machine and a new world by one link; returns the authority of the world's certificates.
fn link(asked: &Arc<Mutex<Vec<Asked>>>) -> String {
    let (to_machine, thread) = mpsc::channel();
    let (go, ready) = mpsc::channel::<()>();
    let asked = Arc::clone(asked);
    let (certificates, ca) = certificates();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        to_machine.send(nix::unistd::gettid()).unwrap();
        ready.recv().unwrap();
        run("ip", "link set lo up");
        run("ip", "addr add 198.51.100.2/24 dev w0");
        run("ip", "link set w0 up");
        for address in [SERVER, OTHER, PRIVATE, METADATA, Ipv4Addr::new(9, 9, 9, 9)] {
            run("ip", &format!("addr add {address}/32 dev lo"));
        }
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        tokio.block_on(serve(asked, certificates, to_machine));
    });
    let world = thread.recv().unwrap();
    run("ip", "link set lo up");
    run(
        "ip",
        &format!("link add h0 type veth peer name w0 netns {world}"),
    );
    run("ip", "addr add 198.51.100.1/24 dev h0");
    run("ip", &format!("addr add {OWN}/32 dev lo"));
    run("ip", "link set h0 up");
    run("ip", "route add default via 198.51.100.2");
    go.send(()).unwrap();
    // Its servers listen.
    thread.recv().unwrap();
    ca
}

async fn serve(
    asked: Arc<Mutex<Vec<Asked>>>,
    certificates: ServerConfig,
    listening: mpsc::Sender<nix::unistd::Pid>,
) {
    let bind = |port| TcpListener::bind(("0.0.0.0", port));
    let (echo, http, https) = (
        bind(ECHO).await.unwrap(),
        bind(80).await.unwrap(),
        bind(443).await.unwrap(),
    );
    let names = UdpSocket::bind("9.9.9.9:53").await.unwrap();
    listening.send(nix::unistd::gettid()).unwrap();
    let tls = TlsAcceptor::from(Arc::new(certificates));
    let echoing = async {
        loop {
            let (mut stream, _) = echo.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    };
    let plain = async {
        loop {
            let (stream, _) = http.accept().await.unwrap();
            tokio::spawn(answer(stream, false, Arc::clone(&asked)));
        }
    };
    let secure = async {
        loop {
            let (stream, _) = https.accept().await.unwrap();
            let (tls, asked) = (tls.clone(), Arc::clone(&asked));
            tokio::spawn(async move {
                if let Ok(stream) = tls.accept(stream).await {
                    answer(stream, true, asked).await;
                }
            });
        }
    };
    tokio::join!(echoing, plain, secure, resolve(names));
}

async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    tls: bool,
    asked: Arc<Mutex<Vec<Asked>>>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let headers = request.headers();
        let all = |name| {
            headers
                .get_all(name)
                .iter()
                .map(|value| value.to_str().unwrap().to_owned())
        };
        asked.lock().unwrap().push(Asked {
            tls,
            host: all("host").collect(),
            authorization: all("authorization").collect(),
        });
        let body = format!("served {}", request.uri());
        async move { Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from(body)))) }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn resolve(socket: UdpSocket) {
    let mut bytes = [0; 1500];
    loop {
        let (length, from): (usize, SocketAddr) = socket.recv_from(&mut bytes).await.unwrap();
        let query = Message::from_vec(&bytes[..length]).unwrap();
        let question = query.queries[0].clone();
        let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
        answer.metadata = Metadata::response_from_request(&query.metadata);
        answer.add_query(question.clone());
        let name = question.name.to_ascii().to_ascii_lowercase();
        match NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, address)) if question.query_type == RecordType::A => {
                answer.add_answer(Record::from_rdata(question.name, 60, RData::A(A(*address))));
            }
            Some(_) => {}
            None => answer.metadata.response_code = ResponseCode::NXDomain,
        }
        socket
            .send_to(&answer.to_vec().unwrap(), from)
            .await
            .unwrap();
    }
}

/// A server's certificate for `api.example.com`, and its authority's.
fn certificates() -> (ServerConfig, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = parameters.self_signed(&key).unwrap();
    let ca = certificate.pem();
    let issuer = rcgen::Issuer::new(parameters, key);
    let key = rcgen::KeyPair::generate().unwrap();
    let parameters = rcgen::CertificateParams::new(vec!["api.example.com".to_owned()]).unwrap();
    let certificate = parameters.signed_by(&key, &issuer).unwrap();
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            key.serialize_der().try_into().unwrap(),
        )
        .unwrap();
    (config, ca)
}
