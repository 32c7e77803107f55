//! A sandbox without a virtual machine: the real driver and Runtime API in a thread, this test as the host.
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use thaw_agent::boot::BootError;
use thaw_agent::driver::{Driver, DriverError, Settings};
use thaw_agent::identity::{AdoptError, Machine};
use thaw_agent::process::{Host, Reap};
use thaw_agent_protocol::{
    AgentMessage, Configure, Decoder, Generation, HostMessage, Invoke, LogStream, Message, Thaw,
};

/// Every wait of a test ends after this.
const PATIENCE: Duration = Duration::from_secs(30);

/// A clone of this name cannot be made unique.
pub const UNFIT: &str = "unfit";

/// Appears in the task root when code was mounted anew.
pub const CODE_TAKEN: &str = "code-taken";

/// Appears in the task root when the network was set up.
pub const NETWORK_UP: &str = "network-up";

/// Something of this name in the task root keeps the network from being set up.
pub const NO_NETWORK: &str = "no-network";

/// Records thaws instead of setting this machine's clock.
struct Recorder {
    thaws: mpsc::Sender<Thaw>,
    task_root: PathBuf,
}

impl Machine for Recorder {
    fn adopt(&mut self, thaw: &Thaw) -> Result<(), AdoptError> {
        self.thaws.send(thaw.clone()).unwrap();
        if thaw.hostname == UNFIT {
            return Err(AdoptError::System {
                what: "machine-id",
                source: std::io::ErrorKind::StorageFull.into(),
            });
        }
        Ok(())
    }

    fn set_hostname(&mut self, hostname: &str) -> Result<(), AdoptError> {
        assert_eq!(hostname, "snapshot");
        Ok(())
    }

    fn take_code(&mut self) -> Result<(), BootError> {
        std::fs::create_dir(self.task_root.join(CODE_TAKEN)).unwrap(); // once, or it fails
        Ok(())
    }

    fn set_up_network(&mut self, _: Option<&str>) -> Result<(), BootError> {
        if self.task_root.join(NO_NETWORK).exists() {
            return Err(BootError {
                act: "giving its address to",
                object: "eth0".into(),
                source: std::io::ErrorKind::NotFound.into(),
            });
        }
        std::fs::create_dir(self.task_root.join(NETWORK_UP)).unwrap(); // once, or it fails
        Ok(())
    }
}

pub struct Sandbox {
    pub folder: TempDir,
    pub api: SocketAddr,
    pub thaws: mpsc::Receiver<Thaw>,
    channel: UnixStream,
    decoder: Decoder,
    driver: Option<JoinHandle<Result<(), DriverError>>>,
    /// Output received while waiting for other messages.
    pub log: Vec<u8>,
}

impl Sandbox {
    /// An agent that has said hello and waits to be configured.
    pub fn boot() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (channel, agent_end) = UnixStream::pair().unwrap();
        channel.set_read_timeout(Some(PATIENCE)).unwrap();
        let (address_to, address) = mpsc::channel();
        let (thaws_to, thaws) = mpsc::channel();
        let task_root = folder.path().to_owned();
        let driver = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(async {
                    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                    address_to.send(listener.local_addr().unwrap()).unwrap();
                    let (reader, writer) =
                        thaw_agent::channel::split(OwnedFd::from(agent_end)).unwrap();
                    let settings = Settings {
                        listener,
                        host: Host {
                            user: None,
                            task_root: task_root.clone(),
                            extensions: task_root.join("extensions"),
                            reap: Reap::Own,
                        },
                        machine: Recorder {
                            thaws: thaws_to,
                            task_root,
                        },
                    };
                    Driver::new(reader, writer, settings).unwrap().run().await
                })
        });
        let mut sandbox = Self {
            folder,
            api: address.recv_timeout(PATIENCE).unwrap(),
            thaws,
            channel,
            decoder: Decoder::new(),
            driver: Some(driver),
            log: Vec::new(),
        };
        assert!(matches!(
            sandbox.receive(),
            (Generation(0), AgentMessage::Hello { .. })
        ));
        sandbox
    }

    /// An agent whose runtime is this shell script.
    pub fn script(text: &str) -> Self {
        let mut sandbox = Self::boot();
        sandbox.write("bootstrap", text);
        sandbox.configure(&["bootstrap"], &[]);
        sandbox
    }

    /// An agent whose runtime does nothing: the test itself speaks the Runtime API.
    pub fn idle() -> Self {
        Self::script("#!/bin/sh\nexec sleep 1000\n")
    }

    /// Writes an executable file into the task root. Another process does it: a descriptor open for writing here could
    /// be inherited by another test's child at the wrong moment, and executing the file would fail with ETXTBSY.
    pub fn write(&self, name: &str, text: &str) {
        let mut install = Command::new("install")
            .args(["-m", "755", "/dev/stdin", &self.path(name)])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = install.stdin.take().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        drop(stdin);
        assert!(install.wait().unwrap().success());
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn configure(&mut self, bootstrap: &[&str], environment: &[(&str, &str)]) {
        self.configure_with_limit(bootstrap, environment, Duration::from_secs(60));
    }

    pub fn configure_with_limit(
        &mut self,
        bootstrap: &[&str],
        environment: &[(&str, &str)],
        init_limit: Duration,
    ) {
        let mut all = BTreeMap::from([
            ("PATH".to_owned(), std::env::var("PATH").unwrap()),
            ("AWS_LAMBDA_FUNCTION_NAME".to_owned(), "f".to_owned()),
            ("AWS_LAMBDA_FUNCTION_VERSION".to_owned(), "1".to_owned()),
            (
                "AWS_LAMBDA_FUNCTION_MEMORY_SIZE".to_owned(),
                "128".to_owned(),
            ),
        ]);
        all.extend(
            environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        self.send(
            0,
            HostMessage::Configure(Configure {
                bootstrap: bootstrap.iter().map(|name| self.path(name)).collect(),
                environment: all,
                init_limit_ms: u64::try_from(init_limit.as_millis()).unwrap(),
                hostname: "snapshot".into(),
                account_id: Some("123456789012".into()),
                network: false,
                authority: None,
            }),
        );
    }

    pub fn send(&mut self, generation: u64, message: HostMessage) {
        self.send_at_once(generation, [message]);
    }

    /// In one write, as the host does: an agent that ends at the first message cannot be gone before the second.
    pub fn send_at_once<const N: usize>(&mut self, generation: u64, messages: [HostMessage; N]) {
        let mut bytes = Vec::new();
        for message in messages {
            message.encode(Generation(generation), &mut bytes).unwrap();
        }
        self.channel.write_all(&bytes).unwrap();
    }

    pub fn thaw(&mut self, generation: u64) {
        self.send(generation, thaw_named(format!("clone-{generation}")));
    }

    pub fn invoke(&mut self, generation: u64, request_id: &str, payload: &[u8]) {
        self.send(generation, invoke(request_id, payload));
    }

    /// The next frame of any kind.
    pub fn receive(&mut self) -> (Generation, AgentMessage) {
        let mut buffer = vec![0; 65536];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                let generation = frame.generation;
                return (generation, AgentMessage::from_frame(frame).unwrap());
            }
            let length = self
                .read(&mut buffer)
                .expect("the agent sends something before the test's patience ends");
            assert_ne!(length, 0, "the agent closed the channel");
            self.decoder.feed(&buffer[..length]);
        }
    }

    /// Reads the channel. The agent's SIGCHLD interrupts the test, too: both are one process here.
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.channel.read(buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// The next message that is no output; output is collected.
    pub fn message(&mut self) -> AgentMessage {
        loop {
            match self.receive().1 {
                AgentMessage::Log { bytes, .. } => self.log.extend_from_slice(&bytes),
                message => return message,
            }
        }
    }

    /// The next message is the word that the clone is unique.
    pub fn hear_thawed(&mut self) {
        let message = self.message();
        assert!(
            matches!(message, AgentMessage::Thawed { .. }),
            "{message:?}"
        );
    }

    /// Output of one stream until it contains `text`.
    pub fn log_until(&mut self, wanted: LogStream, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            if let (_, AgentMessage::Log { stream, bytes }) = self.receive()
                && stream == wanted
            {
                seen.extend_from_slice(&bytes);
            }
            let so_far = String::from_utf8_lossy(&seen);
            if so_far.contains(text) {
                return so_far.into_owned();
            }
        }
    }

    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&self.log).into_owned()
    }

    /// Nothing arrives for a moment.
    pub fn assert_silent(&mut self, moment: Duration) {
        assert!(self.is_silent(moment));
    }

    /// Whether nothing arrives for a moment. What arrives is kept.
    pub fn is_silent(&mut self, moment: Duration) -> bool {
        assert_eq!(self.decoder.next_frame().unwrap(), None);
        self.channel.set_read_timeout(Some(moment)).unwrap();
        let mut byte = [0];
        let read = self.read(&mut byte);
        self.channel.set_read_timeout(Some(PATIENCE)).unwrap();
        match read {
            Ok(length) => self.decoder.feed(&byte[..length]),
            Err(ref error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        read.is_err()
    }

    /// Ends the sandbox as the host does and hands back how the driver ended.
    pub fn shutdown(mut self) -> Result<(), DriverError> {
        self.send(0, HostMessage::Shutdown);
        self.driver.take().unwrap().join().unwrap()
    }

    /// The host goes away.
    pub fn close(&self) {
        self.channel.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// How the driver ended by itself.
    pub fn end(mut self) -> Result<(), DriverError> {
        self.driver.take().unwrap().join().unwrap()
    }

    pub fn client(&self) -> Client {
        Client::connect(self.api)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // A failed test leaves no runtime behind: the closed channel ends the driver, which kills it.
        let _ = self.channel.shutdown(std::net::Shutdown::Both);
        if let Some(driver) = self.driver.take() {
            let _ = driver.join();
        }
    }
}

pub fn thaw_named(hostname: String) -> HostMessage {
    HostMessage::Thaw(Thaw {
        unix_time_ns: 1_800_000_000_000_000_000,
        hostname,
        entropy: vec![7; 64],
    })
}

pub fn invoke(request_id: &str, payload: &[u8]) -> HostMessage {
    HostMessage::Invoke(Invoke {
        request_id: request_id.into(),
        deadline_unix_ms: 4_000_000_000_000,
        function_arn: "arn:aws:lambda:us-east-1:000000000000:function:f".into(),
        trace_id: Some("Root=1-0".into()),
        payload: payload.to_vec(),
        ..Invoke::default()
    })
}

/// One keep-alive connection to the Runtime API.
pub struct Client {
    stream: BufReader<TcpStream>,
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub fn start(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {}\r\n\r\n",
            body.len()
        );
        let stream = self.stream.get_mut();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    pub fn writer(&self) -> TcpStream {
        self.stream.get_ref().try_clone().unwrap()
    }

    pub fn finish(&mut self) -> Reply {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            assert_ne!(
                self.stream.read_line(&mut line).unwrap(),
                0,
                "connection closed"
            );
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            lines.push(line.to_owned());
        }
        let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
        let headers: BTreeMap<String, String> = lines[1..]
            .iter()
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        let length = headers["content-length"].parse().unwrap();
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).unwrap();
        Reply {
            status,
            headers,
            body,
        }
    }

    /// The server closes the connection and has sent nothing.
    pub fn is_closed_without_an_answer(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(length) => length == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub fn get(&mut self, path: &str) -> Reply {
        self.start("GET", path, "", b"");
        self.finish()
    }

    pub fn post(&mut self, path: &str, body: &[u8]) -> Reply {
        self.start("POST", path, "", body);
        self.finish()
    }

    pub fn start_next(&mut self) {
        self.start("GET", NEXT, "", b"");
    }
}

pub const NEXT: &str = "/2018-06-01/runtime/invocation/next";

pub fn response_path(request_id: &str) -> String {
    format!("/2018-06-01/runtime/invocation/{request_id}/response")
}
