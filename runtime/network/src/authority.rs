//! The authority that guests of functions with secrets trust, so that the relay can read what they say to a secret's host over TLS.
//!
//! It is made of a seed each time, and is the same for the same seed: nothing of it is kept. Its key stays in the gateway; the relay gets certificates
//! for the hosts of one policy.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SanType,
};
use serde::{Deserialize, Serialize};

use crate::policy::Policy;

/// What people see in a certificate.
const NAME: &str = "Thaw egress";
/// A certificate is valid for clocks that are so much behind, and for a sandbox that lives so long.
const BEHIND: Duration = Duration::from_secs(24 * 60 * 60);
const VALID: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// How long the same certificate is given.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);
/// Certificates that are kept, one for each set of hosts.
const KEPT_MAX: usize = 256;
/// An Ed25519 key as PKCS #8 (RFC 8410, section 7), before its 32 bytes.
const PKCS8: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// A certificate for the hosts of a policy's secrets, and its key. PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The certificate; what it is signed by, guests have.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(..)")
    }
}

/// When it was made, and what.
type Kept = (SystemTime, Arc<Identity>);

/// See the module.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    kept: Mutex<HashMap<Vec<String>, Kept>>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority(..)")
    }
}

impl Authority {
    /// That of 32 random bytes, which are its private key.
    ///
    /// # Errors
    /// The library's.
    pub fn of(seed: &[u8; 32]) -> Result<Self, rcgen::Error> {
        let key = [&PKCS8[..], seed].concat();
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key.into(), &PKCS_ED25519)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, NAME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self {
            issuer: CertifiedIssuer::self_signed(params, key)?,
            kept: Mutex::default(),
        })
    }

    /// Its own certificate, for guests. PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for the hosts of a policy's secrets; none for a policy without any.
    ///
    /// # Errors
    /// The library's.
    pub fn identity(&self, policy: &Policy) -> Result<Option<Arc<Identity>>, rcgen::Error> {
        let hosts = policy.secrets.iter().map(|secret| secret.host.to_string());
        let mut hosts: Vec<String> = hosts.collect();
        hosts.sort_unstable();
        hosts.dedup();
        if hosts.is_empty() {
            return Ok(None);
        }
        let now = SystemTime::now();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made, identity)) = kept.get(&hosts)
            // A clock that was set back makes a new one.
            && now.duration_since(*made).is_ok_and(|age| age < FRESH)
        {
            return Ok(Some(Arc::clone(identity)));
        }
        let identity = Arc::new(self.sign(&hosts, now)?);
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(hosts, (now, Arc::clone(&identity)));
        Ok(Some(identity))
    }

    fn sign(&self, hosts: &[String], now: SystemTime) -> Result<Identity, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, NAME);
        for host in hosts {
            let name = Ia5String::try_from(host.as_str())?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        (params.not_before, params.not_after) = ((now - BEHIND).into(), (now + VALID).into());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(hosts: &[&str]) -> Policy {
        let secrets = hosts
            .iter()
            .map(|host| serde_json::json!({"host": host, "header": "x-key", "value": "v"}));
        let secrets: Vec<_> = secrets.collect();
        serde_json::from_value(serde_json::json!({ "secrets": secrets })).unwrap()
    }

    #[test]
    fn an_authority_is_its_seeds_and_keeps_a_certificate_for_each_set_of_hosts() {
        let authority = Authority::of(&[1; 32]).unwrap();
        let key = |authority: &Authority| authority.issuer.key().public_key_pem();
        assert_eq!(key(&authority), key(&Authority::of(&[1; 32]).unwrap()));
        assert_ne!(key(&authority), key(&Authority::of(&[2; 32]).unwrap()));
        let of = |hosts: &[&str]| authority.identity(&policy(hosts)).unwrap();
        assert_eq!(of(&[]), None);
        let one = of(&["a.b", "c.d"]).unwrap();
        assert_eq!(of(&["c.d", "a.b", "a.b"]).unwrap(), one);
        assert_ne!(of(&["a.b"]).unwrap(), one);
        assert!(!format!("{one:?}").contains("KEY"));
        for number in 0..KEPT_MAX {
            of(&[&format!("{number}.b")]);
        }
        assert!(authority.kept.lock().unwrap().len() <= KEPT_MAX);
    }
}
