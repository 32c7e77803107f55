//! Signing requests as clients do: for the command line, and for links that the gateway gives out.

use std::fmt;

use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use ring::hmac;

use super::sigv4::{ALGORITHM, CONTENT_SHA256, Head, Stamp, TERMINATOR, canonical, hex};
use super::sigv4::{hex_digest, signing_key, string_to_sign};

/// Service of every scope here.
pub const SERVICE: &str = "lambda";

/// A key that signs, for one region.
#[derive(Clone, PartialEq, Eq)]
pub struct Signer {
    /// Access key id.
    pub access_key_id: String,
    /// Secret access key.
    pub secret: String,
    /// Region of the scope.
    pub region: String,
}

/// Without the secret, so that no log has it.
impl fmt::Debug for Signer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Signer");
        shown.field("access_key_id", &self.access_key_id);
        shown.field("region", &self.region).finish_non_exhaustive()
    }
}

impl Signer {
    /// Adds `Host`, `X-Amz-Date`, `X-Amz-Content-Sha256` and `Authorization`. The host and all `x-amz-` headers are signed.
    /// `host` is what the client will send: with a port unless it is the scheme's own. `None` when a value fits no header.
    pub fn sign(
        &self,
        method: &Method,
        uri: &Uri,
        host: &str,
        headers: &mut HeaderMap,
        body: &[u8],
        now_unix_seconds: i64,
    ) -> Option<()> {
        let (stamp, digest) = (Stamp::at(now_unix_seconds), hex_digest(body));
        headers.insert(header::HOST, HeaderValue::from_str(host).ok()?);
        headers.insert("x-amz-date", HeaderValue::from_str(stamp.text()).ok()?);
        headers.insert(CONTENT_SHA256, HeaderValue::from_str(&digest).ok()?);
        let mut names: Vec<String> = headers
            .keys()
            .map(|name| name.as_str().to_owned())
            .filter(|name| name == "host" || name.starts_with("x-amz-"))
            .collect();
        names.sort();
        let parts = Head {
            method,
            uri,
            headers,
        };
        let canonical = canonical::head(parts, &names, None)? + &digest;
        let value = format!(
            "{ALGORITHM} Credential={}, SignedHeaders={}, Signature={}",
            self.credential(&stamp),
            names.join(";"),
            self.signature(&stamp, &canonical)
        );
        headers.insert(header::AUTHORIZATION, HeaderValue::from_str(&value).ok()?);
        Some(())
    }

    /// Path and query, given and added, of a GET that is good for `expires_seconds`, for a client that sends no header but this host.
    /// `None` when path and host make no request.
    #[must_use]
    pub fn presign(
        &self,
        target: &str,
        host: &str,
        expires_seconds: i64,
        now_unix_seconds: i64,
    ) -> Option<String> {
        let stamp = Stamp::at(now_unix_seconds);
        let joint = if target.contains('?') { '&' } else { '?' };
        let target = format!(
            "{target}{joint}X-Amz-Algorithm={ALGORITHM}&X-Amz-Credential={}&X-Amz-Date={}&X-Amz-Expires={expires_seconds}&X-Amz-SignedHeaders=host",
            canonical::component(&self.credential(&stamp)),
            stamp.text()
        );
        let uri: Uri = target.parse().ok()?;
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_str(host).ok()?);
        let parts = Head {
            method: &Method::GET,
            uri: &uri,
            headers: &headers,
        };
        let canonical = canonical::head(parts, &["host".to_owned()], None)? + &hex_digest(b"");
        let signature = self.signature(&stamp, &canonical);
        Some(format!("{target}&X-Amz-Signature={signature}"))
    }

    fn credential(&self, stamp: &Stamp) -> String {
        let (id, region) = (&self.access_key_id, &self.region);
        format!("{id}/{}/{region}/{SERVICE}/{TERMINATOR}", stamp.date())
    }

    fn signature(&self, stamp: &Stamp, canonical: &str) -> String {
        let text = string_to_sign(stamp, &self.region, SERVICE, canonical);
        let key = signing_key(&self.secret, stamp.date(), &self.region, SERVICE);
        hex(hmac::sign(&key, text.as_bytes()).as_ref())
    }
}
