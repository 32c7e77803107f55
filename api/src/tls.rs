//! TLS: a certificate that was given, and handshakes with it; and whom HTTP clients trust.
//!
//! HTTP/1.1 alone is offered, as everywhere here. A handshake has a time, and its connection's own task waits for it: who connects
//! and says nothing holds up nobody.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

/// Longest handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// What is spoken inside.
const PROTOCOLS: [&[u8]; 1] = [b"http/1.1"];

mod trust;

pub use trust::{Trust, failure};

/// Why TLS cannot be had.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file holds nothing of the kind.
    #[error("{} holds no {what} in PEM", path.display())]
    Nothing {
        /// The file.
        path: PathBuf,
        /// "certificate", "private key".
        what: &'static str,
    },
    /// A file's PEM is damaged.
    #[error("{} is no good PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Certificate and key do not go together, or are of a kind that TLS cannot use.
    #[error("{} and {} cannot be used together", cert.display(), key.display())]
    Unusable {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
    /// This build has no version of TLS.
    #[error("cannot speak TLS")]
    Client(#[source] rustls::Error),
    /// The environment names something else than authorities.
    #[error(
        "cannot read the authorities that this machine trusts: look at SSL_CERT_FILE and SSL_CERT_DIR"
    )]
    Machine(#[source] rustls_native_certs::Error),
    /// There is no HTTP client to be had.
    #[error("cannot make an HTTP client")]
    Http(#[source] reqwest::Error),
}

/// A certificate chain and its key, which can be read again while they are used.
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    current: RwLock<Arc<ServerConfig>>,
}

/// Files alone: what was read from them is secret.
impl fmt::Debug for Tls {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Tls");
        shown.field("cert", &self.cert).field("key", &self.key);
        shown.finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads a certificate chain, the server's own first, and its private key, both in PEM.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn load(cert: &Path, key: &Path) -> Result<Arc<Self>, TlsError> {
        let config = server_config(cert, key)?;
        Ok(Arc::new(Self {
            cert: cert.to_owned(),
            key: key.to_owned(),
            current: RwLock::new(Arc::new(config)),
        }))
    }

    /// Reads both files again, for connections that come from now on.
    ///
    /// # Errors
    /// See [`TlsError`]; what was in use stays so.
    pub fn reload(&self) -> Result<(), TlsError> {
        let config = Arc::new(server_config(&self.cert, &self.key)?);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        *current = config;
        Ok(())
    }

    /// Shakes hands; `None` if that fails or takes too long.
    pub async fn shake(
        &self,
        stream: TcpStream,
        address: SocketAddr,
    ) -> Option<TlsStream<TcpStream>> {
        let acceptor = self.acceptor();
        match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(%address, %error, "handshake failed");
                None
            }
            Err(_) => {
                tracing::debug!(%address, "handshake took too long");
                None
            }
        }
    }

    fn acceptor(&self) -> TlsAcceptor {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&current).into()
    }
}

fn server_config(cert: &Path, key: &Path) -> Result<ServerConfig, TlsError> {
    let chain = certificates(cert)?;
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|source| match source {
        rustls::pki_types::pem::Error::NoItemsFound => TlsError::Nothing {
            path: key.to_owned(),
            what: "private key",
        },
        source => TlsError::Pem {
            path: key.to_owned(),
            source,
        },
    })?;
    let unusable = |source| TlsError::Unusable {
        cert: cert.to_owned(),
        key: key.to_owned(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(unusable)?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(config)
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|source| TlsError::Pem {
        path: path.to_owned(),
        source,
    })?;
    if found.is_empty() {
        return Err(TlsError::Nothing {
            path: path.to_owned(),
            what: "certificate",
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::ServerName;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsConnector;

    use super::*;

    /// A self-signed certificate for `localhost` in `cert` and its key in `key`.
    fn issue(folder: &Path) -> (PathBuf, PathBuf) {
        let (cert, key) = (folder.join("cert"), folder.join("key"));
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        fs::write(&cert, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (cert, key)
    }

    async fn connect(
        address: SocketAddr,
        authorities: &Path,
    ) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let config = Trust::load(Some(authorities)).unwrap().config().unwrap();
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }

    #[tokio::test]
    async fn a_reload_is_for_new_connections_and_a_bad_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (cert, key) = issue(folder.path());
        let tls = Tls::load(&cert, &key).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Arc::clone(&tls);
        tokio::spawn(async move {
            loop {
                let (stream, address) = listener.accept().await.unwrap();
                serving.shake(stream, address).await;
            }
        });
        let old = folder.path().join("old");
        fs::copy(&cert, &old).unwrap();
        connect(address, &old).await.unwrap();
        issue(folder.path());
        tls.reload().unwrap();
        assert!(connect(address, &old).await.is_err());
        connect(address, &cert).await.unwrap();
        fs::write(&key, "nothing").unwrap();
        let error = tls.reload().unwrap_err().to_string();
        assert!(
            error.ends_with("key holds no private key in PEM"),
            "{error}"
        );
        connect(address, &cert).await.unwrap();
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (cert, key) = issue(folder.path());
        let none = folder.path().join("none");
        let text = |cert: &Path, key: &Path| Tls::load(cert, key).unwrap_err().to_string();
        assert_eq!(text(&none, &key), format!("cannot read {}", none.display()));
        assert_eq!(
            text(&cert, &none),
            format!("cannot read {}", none.display())
        );
        assert_eq!(
            text(&key, &key),
            format!("{} holds no certificate in PEM", key.display())
        );
        let other = tempfile::tempdir().unwrap();
        let (foreign, _) = issue(other.path());
        assert_eq!(
            text(&foreign, &key),
            format!(
                "{} and {} cannot be used together",
                foreign.display(),
                key.display()
            )
        );
        fs::write(
            &none,
            "-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----\n",
        )
        .unwrap();
        assert_eq!(
            text(&none, &key),
            format!("{} is no good PEM", none.display())
        );
    }
}
