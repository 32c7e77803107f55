//! HTTP connections of a guest that are looked at, plain and, to hosts with secrets, within TLS that ends here: each request goes where its host may, and
//! gets the secrets of its host on the way.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use thaw_network::{DomainName, Identity, Policy, Reason};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::machine::Machine;
use crate::meter::{Metered, Pulse};
use crate::rules::Web;
use crate::slot::Slot;
use crate::tcp;

/// Longest head of a request, bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Longest wait for the head of a request.
const HEAD_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for a server to shake hands.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(15);
/// Where secrets are told.
const HTTPS: u16 = 443;
/// What a guest may speak within TLS (RFC 7301).
const PROTOCOL: &[u8] = b"http/1.1";
/// Headers of one connection, which do not go on (RFC 9110, 7.6.1), and one that is answered here.
const HOP: &[&str] = &[
    "connection",
    "expect",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

type Body = Either<Incoming, Full<Bytes>>;

/// Why secrets cannot be told to anybody.
#[derive(Debug, Error)]
pub enum TrustError {
    /// No certificate in it that can be used.
    #[error("the ca of the secret for {0} holds no certificate (PEM)")]
    Ca(DomainName),
    /// The gateway's certificate for the secrets' hosts.
    #[error("the certificate for the secrets' hosts cannot be used")]
    Identity(#[from] rustls::pki_types::pem::Error),
    /// The library's own.
    #[error("cannot prepare TLS")]
    Tls(#[from] rustls::Error),
}

/// By which authorities the servers are checked that secrets are told to, and what this process is for guests that ask those.
pub struct Trusts {
    servers: BTreeMap<DomainName, Arc<ClientConfig>>,
    guests: Option<Arc<ServerConfig>>,
}

impl std::fmt::Debug for Trusts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.servers.keys()).finish()
    }
}

impl Trusts {
    /// Of a policy's secrets.
    pub fn new(
        policy: &Policy,
        machine: &Machine,
        identity: Option<&Identity>,
    ) -> Result<Self, TrustError> {
        let provider = Arc::new(ring::default_provider());
        let mut servers = BTreeMap::new();
        for secret in &policy.secrets {
            let roots = match &secret.ca {
                None => machine.roots(),
                Some(pem) => {
                    let mut roots = RootCertStore::empty();
                    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                        let added = certificate.ok().and_then(|one| roots.add(one).ok());
                        added.ok_or_else(|| TrustError::Ca(secret.host.clone()))?;
                    }
                    if roots.is_empty() {
                        return Err(TrustError::Ca(secret.host.clone()));
                    }
                    Arc::new(roots)
                }
            };
            let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
            servers.insert(secret.host.clone(), Arc::new(config));
        }
        let guests = match identity {
            None => None,
            Some(identity) => {
                let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes())?;
                let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes())?;
                let mut config = ServerConfig::builder_with_provider(provider)
                    .with_safe_default_protocol_versions()?
                    .with_no_client_auth()
                    .with_single_cert(vec![certificate], key)?;
                config.alpn_protocols = vec![PROTOCOL.to_vec()];
                Some(Arc::new(config))
            }
        };
        Ok(Self { servers, guests })
    }
}

/// A connection of a guest, and the one to a server that its last request used.
struct Exchange {
    slot: Arc<Slot>,
    to: SocketAddrV4,
    web: Web,
    server: Mutex<Option<(Whom, SendRequest<Incoming>)>>,
}

/// Who is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whom {
    /// The address that the guest asked, as it asked.
    Plain,
    /// A host with secrets, over TLS.
    Secret(DomainName),
}

/// Why a request does not go on.
#[derive(Debug)]
struct Refused {
    status: StatusCode,
    why: &'static str,
}

const UNREACHABLE: Refused = Refused {
    status: StatusCode::BAD_GATEWAY,
    why: "the server cannot be reached\n",
};

/// Carries the requests of a connection until it ends.
pub async fn serve(slot: &Arc<Slot>, guest: Metered, to: SocketAddrV4, web: Web) {
    let pulse = guest.pulse();
    serve_requests(slot, (guest, pulse), to, web).await;
}

/// Carries the requests of a TLS connection to a host with secrets, whose ClientHello was read, until it ends: for the guest, this is the host.
pub async fn serve_tls(
    slot: &Arc<Slot>,
    guest: Metered,
    hello: Vec<u8>,
    to: SocketAddrV4,
    host: DomainName,
) {
    let Some(config) = slot.trusts.guests.clone() else {
        return slot.denied(&to, Reason::NotAllowed);
    };
    let pulse = guest.pulse();
    let (reader, writer) = tokio::io::split(guest);
    let guest = tokio::io::join(std::io::Cursor::new(hello).chain(reader), writer);
    let shaking = TlsAcceptor::from(config).accept(guest);
    let Ok(Ok(guest)) = timeout(HANDSHAKE_LIMIT, shaking).await else {
        return slot.denied(&format!("https://{host}"), Reason::Untrusted);
    };
    let web = Web {
        names: Vec::new(),
        open: false,
        secret: vec![host],
    };
    serve_requests(slot, (guest, pulse), to, web).await;
}

async fn serve_requests<S>(slot: &Arc<Slot>, (guest, pulse): (S, Pulse), to: SocketAddrV4, web: Web)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let _open = slot.let_out();
    let exchange = Arc::new(Exchange {
        slot: Arc::clone(slot),
        to,
        web,
        server: Mutex::new(None),
    });
    let service = service_fn(move |request| {
        let exchange = Arc::clone(&exchange);
        async move {
            let response = exchange.carry(request).await.unwrap_or_else(|refused| {
                let mut response = Response::new(Either::Right(Full::from(refused.why)));
                *response.status_mut() = refused.status;
                response
            });
            Ok::<_, Infallible>(response)
        }
    });
    let carrying = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        // Who has said all it has to say may still listen.
        .half_close(true)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(guest), service);
    tokio::select! {
        carried = carrying => {
            if carried.is_err_and(|error| error.is_parse()) {
                slot.denied(&to, Reason::NoName);
            }
        }
        () = pulse.stopped(slot) => {}
    }
}

impl Exchange {
    async fn carry(&self, request: Request<Incoming>) -> Result<Response<Body>, Refused> {
        let host = host(&request, self.to.port())
            .inspect_err(|_| self.slot.denied(&self.to, Reason::NoName))?;
        let whom = match host {
            Some(host) if self.web.secret.contains(&host) => Whom::Secret(host),
            Some(host) if self.web.open || self.web.names.contains(&host) => Whom::Plain,
            None if self.web.open => Whom::Plain,
            other => {
                let what = other.map_or_else(|| self.to.to_string(), String::from);
                self.slot.denied(&what, Reason::OtherName);
                return Err(Refused {
                    status: StatusCode::FORBIDDEN,
                    why: "no rule allows this host\n",
                });
            }
        };
        let request = self.prepared(request, &whom)?;
        let mut server = self.server.lock().await;
        let mut sender = match server.take() {
            Some((same, kept)) if same == whom => kept,
            _ => self.open(&whom).await?,
        };
        if sender.ready().await.is_err() {
            sender = self.open(&whom).await?;
        }
        let response = sender.send_request(request).await;
        let mut response = response.map_err(|_| UNREACHABLE)?;
        *server = Some((whom, sender));
        strip(response.headers_mut());
        Ok(response.map(Either::Left))
    }

    /// The request as it goes on: its target without a host, which stands in the header, and secrets in place of what the guest said there.
    fn prepared(
        &self,
        mut request: Request<Incoming>,
        whom: &Whom,
    ) -> Result<Request<Incoming>, Refused> {
        let target = match request.uri().path_and_query() {
            Some(target) if request.method() != Method::CONNECT => Uri::from(target.clone()),
            _ => {
                return Err(Refused {
                    status: StatusCode::METHOD_NOT_ALLOWED,
                    why: "this is no proxy\n",
                });
            }
        };
        *request.uri_mut() = target;
        *request.version_mut() = hyper::Version::HTTP_11;
        let headers = request.headers_mut();
        strip(headers);
        if let Whom::Secret(name) = whom {
            let value = |text: &str| HeaderValue::from_str(text).map_err(|_| UNREACHABLE);
            headers.insert(HOST, value(name.as_str())?);
            for secret in self.slot.rules.secrets(name) {
                let header =
                    HeaderName::from_bytes(secret.header.as_bytes()).map_err(|_| UNREACHABLE)?;
                let mut value = value(&secret.value)?;
                value.set_sensitive(true);
                headers.insert(header, value);
            }
        }
        Ok(request)
    }

    /// A new connection to who is asked.
    async fn open(&self, whom: &Whom) -> Result<SendRequest<Incoming>, Refused> {
        match whom {
            Whom::Plain => {
                let stream = tcp::open(&self.slot, self.to).await;
                self.begin(stream.map_err(|_| UNREACHABLE)?).await
            }
            Whom::Secret(name) => {
                let to = SocketAddrV4::new(*self.to.ip(), HTTPS);
                let stream = tcp::open(&self.slot, to).await.map_err(|_| UNREACHABLE)?;
                let shaken = async {
                    let config = self.slot.trusts.servers.get(name)?;
                    let server = ServerName::try_from(name.to_string()).ok()?;
                    let connecting = TlsConnector::from(Arc::clone(config)).connect(server, stream);
                    timeout(HANDSHAKE_LIMIT, connecting).await.ok()?.ok()
                };
                let Some(stream) = shaken.await else {
                    // Its certificate, mostly.
                    self.slot
                        .denied(&format!("https://{name}"), Reason::Unreachable);
                    return Err(UNREACHABLE);
                };
                self.begin(stream).await
            }
        }
    }

    async fn begin<S>(&self, stream: S) -> Result<SendRequest<Incoming>, Refused>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(HEAD_BYTES_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|_| UNREACHABLE)?;
        let slot = Arc::clone(&self.slot);
        // Ends with its sender, and with the slot.
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = slot.ended.cancelled() => {}
                _ = connection => {}
            }
        });
        Ok(sender)
    }
}

/// The host that a request is for, on this port; none if it is no name. A request that says it twice, and not the same, is refused.
fn host<T>(request: &Request<T>, port: u16) -> Result<Option<DomainName>, Refused> {
    let bad = || Refused {
        status: StatusCode::BAD_REQUEST,
        why: "the request names no host, or several\n",
    };
    let mut said = request.headers().get_all(HOST).iter();
    let (Some(host), None) = (said.next(), said.next()) else {
        return Err(bad());
    };
    let host = host.to_str().map_err(|_| bad())?;
    if let Some(authority) = request.uri().authority()
        && !authority.as_str().eq_ignore_ascii_case(host)
    {
        return Err(bad());
    }
    let name = host.strip_suffix(&format!(":{port}")).unwrap_or(host);
    Ok(DomainName::parse(name).ok())
}

/// Takes the headers away that are a connection's own, and those that `Connection` names.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all("connection")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name: &HeaderName| *name != HOST && *name != hyper::header::CONTENT_LENGTH)
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP {
        headers.remove(*name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(uri: &str, hosts: &[&str]) -> Request<()> {
        let mut builder = Request::builder().uri(uri);
        for host in hosts {
            builder = builder.header(HOST, *host);
        }
        builder.body(()).unwrap()
    }

    fn named(uri: &str, hosts: &[&str]) -> Option<Option<String>> {
        let found = host(&request(uri, hosts), 80).ok()?;
        Some(found.map(String::from))
    }

    #[test]
    fn a_request_is_for_the_one_host_that_it_names() {
        assert_eq!(named("/", &["API.b"]), Some(Some("api.b".into())));
        assert_eq!(named("/", &["api.b.:80"]), Some(Some("api.b".into())));
        assert_eq!(
            named("http://api.b/", &["api.b"]),
            Some(Some("api.b".into()))
        );
        assert_eq!(named("http://evil.org/", &["api.b"]), None);
        assert_eq!(named("http://x@api.b/", &["api.b"]), None);
        assert_eq!(named("/", &[]), None);
        assert_eq!(named("/", &["api.b", "api.b"]), None);
        for no_name in ["1.2.3.4", "api.b:81", "a b", "api.b/", ""] {
            assert_eq!(named("/", &[no_name]), Some(None), "{no_name}");
        }
    }

    #[test]
    fn headers_of_a_connection_do_not_go_on() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-hop, host, content-length"),
            ("x-hop", "1"),
            ("host", "a.b"),
            ("content-length", "3"),
            ("upgrade", "websocket"),
            ("x-stays", "1"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        strip(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "x-stays"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]
        #[test]
        fn any_host_is_taken(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                let mut request = request("/", &[]);
                request.headers_mut().insert(HOST, value);
                let _ = host(&request, 443);
            }
        }
    }
}
