//! A gateway on a port of its own, and a client that hides nothing of HTTP.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tempfile::TempDir;
use thaw_api::events::outcome::Retries;
use thaw_api::tls::Trust;
use thaw_api::{AuthMode, Gateway, GatewayConfig, StartError};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::machine::Machine;

/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Server {
    pub address: SocketAddr,
    pub machine: Arc<Machine>,
    client: reqwest::Client,
    home: TempDir,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), thaw_api::ServeError>>,
}

pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    headers: reqwest::header::HeaderMap,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    /// `X-Amz-Log-Result`, decoded.
    pub fn log(&self) -> String {
        let bytes = STANDARD
            .decode(self.header("x-amz-log-result").unwrap())
            .unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

pub async fn try_start(home: &Path) -> Result<(Gateway, Arc<Machine>), StartError> {
    try_start_as(home, "127.0.0.1:0", AuthMode::Off).await
}

pub async fn try_start_as(
    home: &Path,
    address: &str,
    auth: AuthMode,
) -> Result<(Gateway, Arc<Machine>), StartError> {
    try_start_shaped(home, address, Machine::new(), |config| config.auth = auth).await
}

async fn try_start_shaped(
    home: &Path,
    address: &str,
    machine: Machine,
    shape: impl FnOnce(&mut GatewayConfig),
) -> Result<(Gateway, Arc<Machine>), StartError> {
    let listener = TcpListener::bind(address).await.unwrap();
    let mut config = GatewayConfig::new(
        home.to_owned(),
        listener,
        "thaw-vmm".into(),
        "thaw-agent".into(),
    );
    config.limits.event_retries = Retries([Duration::from_millis(1); 2]);
    shape(&mut config);
    let machine = Arc::new(machine);
    let engine: Arc<Machine> = Arc::clone(&machine);
    Ok((Gateway::start_on(config, engine).await?, machine))
}

impl Server {
    pub async fn start() -> Self {
        let server = Self::start_in(tempfile::tempdir().unwrap()).await;
        server.until_healthy().await;
        server
    }

    pub async fn start_in(home: TempDir) -> Self {
        Self::start_as(home, AuthMode::Off).await
    }

    pub async fn start_as(home: TempDir, auth: AuthMode) -> Self {
        Self::start_shaped(home, Machine::new(), |config| config.auth = auth).await
    }

    /// One whose configuration differs from the others'.
    pub async fn shaped(shape: impl FnOnce(&mut GatewayConfig)) -> Self {
        let home = tempfile::tempdir().unwrap();
        let server = Self::start_shaped(home, Machine::new(), shape).await;
        server.until_healthy().await;
        server
    }

    /// One that serves and has no images yet.
    pub async fn without_images() -> Self {
        let machine = Machine::new();
        machine.hold_images();
        Self::start_shaped(tempfile::tempdir().unwrap(), machine, |_config| {}).await
    }

    async fn start_shaped(
        home: TempDir,
        machine: Machine,
        shape: impl FnOnce(&mut GatewayConfig),
    ) -> Self {
        let started = try_start_shaped(home.path(), "127.0.0.1:0", machine, shape).await;
        let (gateway, machine) = started.unwrap();
        let address = gateway.address();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(gateway.run_until(async {
            let _ = stopped.await;
        }));
        let client = Trust::default().client(|http| http.timeout(LIMIT)).unwrap();
        Self {
            address,
            machine,
            client,
            home,
            stop,
            served,
        }
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Ends the gateway as a signal does; its state stays.
    pub async fn stop(self) -> TempDir {
        drop(self.stop);
        tokio::time::timeout(LIMIT, self.served)
            .await
            .expect("the gateway ends")
            .unwrap()
            .unwrap();
        self.home
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self
            .client
            .request(method, format!("http://{}{path}", self.address))
            .body(body.to_vec());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.bytes().await.unwrap().to_vec(),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[], body.to_string().as_bytes())
            .await
    }

    /// A response whose body goes on.
    pub async fn open(&self, path: &str) -> reqwest::Response {
        self.client
            .get(format!("http://{}{path}", self.address))
            .send()
            .await
            .unwrap()
    }

    /// The same for a POST.
    pub async fn open_post(&self, path: &str, body: &str) -> reqwest::Response {
        let url = format!("http://{}{path}", self.address);
        let request = self.client.post(url).body(body.to_owned());
        request.send().await.unwrap()
    }

    /// Waits for the end of the newest deployment; its last line.
    pub async fn deployed(&self, name: &str) -> Value {
        self.version_deployed(name, "$LATEST").await
    }

    /// The same of a published version.
    pub async fn version_deployed(&self, name: &str, version: &str) -> Value {
        let path = format!("/thaw/v1/functions/{name}/progress?version={version}");
        let text = self.get(&path).await.text();
        let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last["done"], true, "{text}");
        last
    }

    pub async fn until_healthy(&self) {
        let healthy = async {
            while self.get("/healthz").await.status != 200 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, healthy)
            .await
            .expect("the gateway becomes healthy");
    }

    /// Waits for what the gateway does in the background.
    pub async fn until(&self, holds: impl Fn(&Self) -> bool) {
        let held = async {
            while !holds(self) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, held)
            .await
            .expect("what the test waits for happens");
    }

    /// Functions' folders.
    pub fn folders(&self) -> Vec<String> {
        let mut names = names(&self.home.path().join("functions"));
        names.retain(|name| !names_of(self.home.path(), name).is_empty());
        names
    }

    /// Folders of a function's revisions.
    pub fn revisions(&self, name: &str) -> Vec<String> {
        Self::revisions_in(self.home.path(), name)
    }

    pub fn revisions_in(home: &Path, name: &str) -> Vec<String> {
        let mut names = names_of(home, name);
        names.retain(|name| !name.starts_with("log"));
        names
    }
}

fn names_of(home: &Path, name: &str) -> Vec<String> {
    names(&home.join("functions").join(name))
}

fn names(folder: &Path) -> Vec<String> {
    let listing = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = listing
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Reads a body until it holds `wanted`.
pub async fn read_until(response: &mut reqwest::Response, wanted: &str) -> String {
    let mut text = String::new();
    let reading = async {
        while !text.contains(wanted) {
            let piece = response.chunk().await.unwrap().expect("the stream goes on");
            text.push_str(&String::from_utf8_lossy(&piece));
        }
    };
    tokio::time::timeout(LIMIT, reading)
        .await
        .expect("it is heard");
    text
}

/// A zip of these files.
pub fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in files {
        writer
            .start_file(*name, zip::write::SimpleFileOptions::default())
            .unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}
