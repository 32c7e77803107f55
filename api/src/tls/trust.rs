//! Whom this process trusts when it is the client: this machine's authorities, and the certificates of one file, as authorities and
//! each of them itself.
//!
//! A self-signed certificate as `openssl req -x509` makes it says that it is an authority, and an authority is no server's
//! certificate by the book. Who was given that very file trusts it all the same, as curl and Python do.

use std::error::Error as StdError;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;

use reqwest::{Client, ClientBuilder, Url};
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use tokio_rustls::rustls::crypto::{
    WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use super::{PROTOCOLS, TlsError, certificates};

/// Whom to trust. By default nobody: plain HTTP is spoken, TLS with none.
#[derive(Clone, Debug)]
pub struct Trust {
    authorities: Arc<RootCertStore>,
    given: Arc<[CertificateDer<'static>]>,
    machine: Option<Ipv4Addr>,
}

impl Default for Trust {
    fn default() -> Self {
        Self {
            authorities: Arc::new(RootCertStore::empty()),
            given: Arc::default(),
            machine: None,
        }
    }
}

impl Trust {
    /// This machine's authorities (the file that `SSL_CERT_FILE` and the folder that `SSL_CERT_DIR` names, or else where its
    /// distribution has them), and the certificates of `file`.
    ///
    /// # Errors
    /// A file that was named, by the argument or those variables, has no certificate that can be used. That a machine has no
    /// authorities is none.
    pub fn load(file: Option<&Path>) -> Result<Self, TlsError> {
        let mut authorities = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        let (usable, _) = authorities.add_parsable_certificates(found.certs);
        if let (0, Some(source)) = (usable, found.errors.into_iter().next()) {
            return Err(TlsError::Machine(source));
        }
        let given = file.map(certificates).transpose()?.unwrap_or_default();
        let (usable, _) = authorities.add_parsable_certificates(given.iter().cloned());
        match file {
            Some(path) if usable == 0 => Err(TlsError::Nothing {
                path: path.to_owned(),
                what: "certificate that can be trusted",
            }),
            _ => Ok(Self {
                authorities: Arc::new(authorities),
                given: given.into(),
                machine: None,
            }),
        }
    }

    /// The same in the lab, where this machine has another address than a loopback one: see [`Trust::reach`].
    #[must_use]
    pub fn seen_from_lab(self, machine: Ipv4Addr) -> Self {
        let machine = Some(machine);
        Self { machine, ..self }
    }

    /// Where a URL leads to from here. In the lab, what it calls loopback is the machine around it, whose certificates may have any
    /// of the names of its loopback.
    #[must_use]
    pub fn reach(&self, mut url: Url) -> Url {
        let host = url.host_str().unwrap_or_default();
        if let Some(machine) = self.machine
            && matches!(host, "localhost" | "127.0.0.1" | "[::1]")
        {
            // Fails only for URLs that cannot have a host.
            let _ = url.set_ip_host(machine.into());
        }
        url
    }

    /// An HTTP client, as `shape` makes it, which verifies certificates.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn client(
        &self,
        shape: impl FnOnce(ClientBuilder) -> ClientBuilder,
    ) -> Result<Client, TlsError> {
        #[expect(
            clippy::disallowed_methods,
            reason = "here it is given its cryptography"
        )]
        let builder = Client::builder().tls_backend_preconfigured(self.config()?);
        shape(builder).build().map_err(TlsError::Http)
    }

    pub(super) fn config(&self) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = Verifier {
            trust: self.clone(),
            algorithms: provider.signature_verification_algorithms,
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Client)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        Ok(config)
    }

    fn verify(
        &self,
        shown: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
        now: UnixTime,
    ) -> Result<(), Error> {
        let certificate = ParsedCertificate::try_from(shown)?;
        let signed = verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.authorities,
            intermediates,
            now,
            algorithms.all,
        );
        match signed {
            // That it is an authority has no name among the errors; that it has expired has, and is found before.
            Err(Error::InvalidCertificate(CertificateError::Other(_)))
                if self.given.iter().any(|given| given == shown) => {}
            signed => signed?,
        }
        let is_machine = |machine: Ipv4Addr| *name == ServerName::from(IpAddr::from(machine));
        if !self.machine.is_some_and(is_machine) {
            return verify_server_name(&certificate, name);
        }
        let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        addresses
            .into_iter()
            .map(ServerName::from)
            .chain(ServerName::try_from("localhost"))
            .map(|name| verify_server_name(&certificate, &name))
            .reduce(Result::or)
            .unwrap_or(Err(CertificateError::NotValidForName.into()))
    }
}

/// What made a connection fail, for people, if it was TLS: the remedy is told where there is one.
#[must_use]
pub fn failure(error: &(dyn StdError + 'static)) -> Option<String> {
    let found = std::iter::successors(Some(error), |error| cause(*error))
        .find_map(|error| error.downcast_ref::<Error>())?;
    Some(match found {
        // The second is that of an authority made anew under its old name.
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => {
            "its certificate is signed by no authority that is trusted here: name a file with that authority's certificate \
             with --ca or THAW_CA"
                .to_owned()
        }
        Error::InvalidMessage(_) => {
            format!("what it says is no TLS ({found}): if it speaks plain HTTP, write http://")
        }
        other => other.to_string(),
    })
}

/// An error's cause; an [`io::Error`] that wraps another passes it over.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    match error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref)
    {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}

#[derive(Debug)]
struct Verifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.trust
            .verify(
                end_entity,
                intermediates,
                server_name,
                &self.algorithms,
                now,
            )
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn issue(name: &str, is_ca: IsCa, year_until: i32) -> rcgen::Certificate {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.is_ca = is_ca;
        params.not_after = rcgen::date_time_ymd(year_until, 1, 1);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap()
    }

    fn trusting(certificate: &rcgen::Certificate) -> Trust {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), certificate.pem()).unwrap();
        Trust::load(Some(file.path())).unwrap()
    }

    fn verified(trust: &Trust, shown: &rcgen::Certificate, name: &str) -> bool {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_795_440_429));
        let algorithms = ring::default_provider().signature_verification_algorithms;
        let name = ServerName::try_from(name).unwrap();
        trust
            .verify(shown.der(), &[], &name, &algorithms, now)
            .is_ok()
    }

    fn authority() -> IsCa {
        IsCa::Ca(BasicConstraints::Unconstrained)
    }

    #[test]
    fn a_given_certificate_is_trusted_whether_it_calls_itself_an_authority_or_not() {
        for is_ca in [IsCa::NoCa, IsCa::ExplicitNoCa, authority()] {
            let given = issue("localhost", is_ca, 2090);
            let trust = trusting(&given);
            assert!(verified(&trust, &given, "localhost"));
            assert!(!verified(&trust, &given, "elsewhere"));
            let other = issue("localhost", authority(), 2090);
            assert!(!verified(&trust, &other, "localhost"));
            assert!(!verified(&Trust::default(), &given, "localhost"));
        }
        let expired = issue("localhost", authority(), 2020);
        assert!(!verified(&trusting(&expired), &expired, "localhost"));
    }

    #[tokio::test]
    async fn a_server_that_speaks_plain_http_is_told_apart() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, axum::Router::new()).await });
        let client = Trust::default().client(|http| http).unwrap();
        let error = client.get(format!("https://{address}/")).send().await;
        let why = failure(&error.unwrap_err()).unwrap();
        assert!(why.ends_with("write http://"), "{why}");
        let nobody = client.get("http://127.0.0.1:1/").send().await;
        assert_eq!(failure(&nobody.unwrap_err()), None);
    }

    #[test]
    fn the_lab_reaches_the_machines_loopback_and_knows_it_by_its_own_names() {
        let machine = Ipv4Addr::new(10, 0, 2, 2);
        let reached = |trust: &Trust, url: &str| trust.reach(Url::parse(url).unwrap()).to_string();
        for name in ["localhost", "127.0.0.1", "::1"] {
            let given = issue(name, IsCa::NoCa, 2090);
            let trust = trusting(&given);
            assert!(!verified(&trust, &given, "10.0.2.2"), "{name}");
            let in_lab = trust.seen_from_lab(machine);
            assert!(verified(&in_lab, &given, "10.0.2.2"), "{name}");
            assert!(!verified(&in_lab, &given, "10.0.2.3"), "{name}");
        }
        let elsewhere = issue("elsewhere", IsCa::NoCa, 2090);
        let in_lab = trusting(&elsewhere).seen_from_lab(machine);
        assert!(!verified(&in_lab, &elsewhere, "10.0.2.2"));
        assert!(verified(&in_lab, &elsewhere, "elsewhere"));
        for (url, from_lab) in [
            ("https://localhost:9000/a", "https://10.0.2.2:9000/a"),
            ("http://[::1]/", "http://10.0.2.2/"),
            ("https://store:9000/", "https://store:9000/"),
        ] {
            assert_eq!(reached(&in_lab, url), from_lab);
            assert_eq!(reached(&Trust::default(), url), url);
        }
    }
}
