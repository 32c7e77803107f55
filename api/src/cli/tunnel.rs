//! The way to a gateway that speaks TLS: a socket in a folder of this process's own, whose bytes go on encrypted.
//!
//! The HTTP client has no TLS of its own: with it, every client of this workspace would need a provider of cryptography.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tempfile::TempDir;
use thaw_api::tls;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// Authorities of this machine, where Debian has them.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Longest time to connect and shake hands.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A tunnel to one host; it ends when this is dropped.
pub struct Tunnel {
    folder: TempDir,
    task: AbortHandle,
    failure: Arc<Mutex<Option<String>>>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Tunnel {
    /// Opens it; nothing is sent yet. Trusted are the certificates in `authorities`, or this machine's.
    pub fn open(host: &str, port: u16, authorities: Option<&Path>) -> anyhow::Result<Self> {
        let authorities = authorities.unwrap_or(Path::new(AUTHORITIES));
        let config = tls::client_config(authorities)
            .context("cannot tell whom to trust: name a file of certificates with --ca")?;
        let bare = host.trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(bare.clone())
            .with_context(|| format!("{host} is no name of a host"))?;
        let folder = tempfile::tempdir().context("cannot make a folder for a socket")?;
        let listener = UnixListener::bind(socket_in(&folder)).context("cannot make a socket")?;
        let failure = Arc::default();
        let way = Arc::new(Way {
            connector: TlsConnector::from(Arc::new(config)),
            host: bare,
            port,
            name,
            failure: Arc::clone(&failure),
        });
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let way = Arc::clone(&way);
                tokio::spawn(async move { way.carry(stream).await });
            }
        });
        Ok(Self {
            folder,
            task: task.abort_handle(),
            failure,
        })
    }

    /// Where it begins.
    pub fn socket(&self) -> PathBuf {
        socket_in(&self.folder)
    }

    /// Why the last connection failed, if it did.
    pub fn failure(&self) -> Option<String> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone()
    }
}

fn socket_in(folder: &TempDir) -> PathBuf {
    folder.path().join("socket")
}

struct Way {
    connector: TlsConnector,
    host: String,
    port: u16,
    name: ServerName<'static>,
    failure: Arc<Mutex<Option<String>>>,
}

impl Way {
    async fn carry(&self, mut stream: UnixStream) {
        let connecting = async {
            let there = TcpStream::connect((self.host.as_str(), self.port)).await?;
            there.set_nodelay(true)?;
            self.connector.connect(self.name.clone(), there).await
        };
        let failure = match tokio::time::timeout(CONNECT_LIMIT, connecting).await {
            Ok(Ok(mut there)) => {
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut there).await;
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {CONNECT_LIMIT:?}"),
        };
        let mut slot = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(failure);
    }
}
