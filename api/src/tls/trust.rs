//! What a client trusts: the certificates of one file, as authorities, and each of them itself.
//!
//! A self-signed certificate as `openssl req -x509` makes it says that it is an authority, and an authority is no server's
//! certificate by the book. Who was given that very file trusts it all the same, as curl and Python do.

use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::client::{WebPkiServerVerifier, verify_server_name};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use super::{PROTOCOLS, TlsError, certificates};

/// A client that trusts the certificates of this file.
///
/// # Errors
/// See [`TlsError`].
pub fn client_config(authorities: &Path) -> Result<ClientConfig, TlsError> {
    let nothing = || TlsError::Nothing {
        path: authorities.to_owned(),
        what: "certificate that can be trusted",
    };
    let given = certificates(authorities)?;
    let (mut roots, provider) = (RootCertStore::empty(), Arc::new(ring::default_provider()));
    roots.add_parsable_certificates(given.iter().cloned());
    let by_the_book =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|_| nothing())?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Client)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trust { by_the_book, given }))
        .with_no_client_auth();
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(config)
}

#[derive(Debug)]
struct Trust {
    by_the_book: Arc<WebPkiServerVerifier>,
    given: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.by_the_book.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            // That it is an authority has no name among the errors; that it has expired has, and is found before.
            Err(Error::InvalidCertificate(CertificateError::Other(_)))
                if self.given.iter().any(|given| given == end_entity) =>
            {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by_the_book.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by_the_book.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.by_the_book.supported_verify_schemes()
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

    fn verified(trusted: &rcgen::Certificate, shown: &rcgen::Certificate, name: &str) -> bool {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), trusted.pem()).unwrap();
        client_config(file.path()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(trusted.der().clone()).unwrap();
        let provider = Arc::new(ring::default_provider());
        let trust = Trust {
            by_the_book: WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .unwrap(),
            given: vec![trusted.der().clone()],
        };
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1_795_440_429));
        let name = ServerName::try_from(name).unwrap();
        trust
            .verify_server_cert(shown.der(), &[], &name, &[], now)
            .is_ok()
    }

    #[test]
    fn a_given_certificate_is_trusted_whether_it_calls_itself_an_authority_or_not() {
        let authority = || IsCa::Ca(BasicConstraints::Unconstrained);
        for is_ca in [IsCa::NoCa, IsCa::ExplicitNoCa, authority()] {
            let given = issue("localhost", is_ca, 2090);
            assert!(verified(&given, &given, "localhost"));
            assert!(!verified(&given, &given, "elsewhere"));
            assert!(!verified(
                &given,
                &issue("localhost", authority(), 2090),
                "localhost"
            ));
        }
        let expired = issue("localhost", authority(), 2020);
        assert!(!verified(&expired, &expired, "localhost"));
    }
}
