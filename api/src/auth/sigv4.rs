//! Signature Version 4 as a server checks it: pure, no clock, no keys, no I/O.
//!
//! A check has two steps, so that nobody's body is read on his word alone. [`Claim::read`] takes what a request says of its
//! signature and refuses all that is wrong without a secret: form, scope, time, headers that had to be signed.
//! [`Claim::verify`] then takes the key's secret and the body's digest. Where the client declared the digest, both can be
//! done before the body comes.
//!
//! Sources: AWS's IAM user guide, *Create a signed AWS API request*; its published test suite; recorded answers for texts.
//! Lambda's canonical path is encoded twice: the path as it travels, each segment percent-encoded once more.
//!
//! **Invariant:** a request with any other method, path, query, signed header or body is not the one that was signed
//! (`any_changed_bit_of_a_signed_request_is_found`).

use axum::http::{HeaderMap, Method, Uri, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::{digest, hmac};
use thiserror::Error;

pub mod canonical;
mod fields;
mod stamp;

use fields::{Fields, Placement};
pub use stamp::Stamp;

/// The only algorithm: keys are symmetric here.
pub const ALGORITHM: &str = "AWS4-HMAC-SHA256";
/// What a scope ends with.
pub const TERMINATOR: &str = "aws4_request";
/// How far a signature's time may be from ours, seconds; AWS's limit for Lambda.
pub const SKEW_SECONDS_MAX: i64 = 300;
/// Longest life of a presigned request, seconds: a week.
pub const EXPIRES_SECONDS_MAX: i64 = 604_800;
/// Header that declares the body's digest.
pub const CONTENT_SHA256: &str = "x-amz-content-sha256";

/// Why a request is not let in. Texts are AWS's.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SignatureError {
    /// Nothing was signed.
    #[error("Missing Authentication Token")]
    Missing,
    /// It says too little, or malformed, of its signature.
    #[error("{0}")]
    Incomplete(String),
    /// The signature is not one for this request, here and now.
    #[error("{0}")]
    Invalid(String),
    /// No key of this id, or it is disabled, or it came with a session token that nobody gave out.
    #[error("The security token included in the request is invalid.")]
    UnknownKey,
}

impl SignatureError {
    /// The signature is another one.
    #[must_use]
    pub fn mismatch() -> Self {
        Self::Invalid(
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret \
             Access Key and signing method. Consult the service documentation for details."
                .to_owned(),
        )
    }
}

/// A request line and headers, as they travelled.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Method.
    pub method: &'a Method,
    /// URI, not rewritten.
    pub uri: &'a Uri,
    /// Headers.
    pub headers: &'a HeaderMap,
}

/// What a signature must be for.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// Region of its scope.
    pub region: &'a str,
    /// Service of its scope.
    pub service: &'a str,
    /// Now, seconds since the Unix epoch.
    pub now_unix_seconds: i64,
}

/// What a request says of its signature; right in form, scope and time, not yet proven.
#[derive(Clone, Debug)]
pub struct Claim {
    access_key_id: String,
    has_token: bool,
    stamp: Stamp,
    region: String,
    service: String,
    signature: Vec<u8>,
    declared: Option<String>,
    /// The canonical request but for its last line, the body's digest.
    canonical_head: String,
}

impl Claim {
    /// Reads and checks what needs no key.
    ///
    /// # Errors
    /// See [`SignatureError`].
    pub fn read(head: Head<'_>, expected: Expected<'_>) -> Result<Self, SignatureError> {
        let fields = Fields::read(head)?;
        let (access_key_id, scope) = split_credential(&fields)?;
        check_scope(&fields.stamp, &scope, expected)?;
        check_time(&fields, expected.now_unix_seconds)?;
        check_signed_headers(head, &fields.signed_headers)?;
        if has_dot_segment(head.uri.path()) {
            // AWS's canonical form would take another path for this one; no client sends such.
            return Err(SignatureError::mismatch());
        }
        let skip = match fields.placement {
            Placement::Header => None,
            Placement::Query { .. } => Some("X-Amz-Signature"),
        };
        let canonical_head = canonical::head(head, &fields.signed_headers, skip)
            .ok_or_else(SignatureError::mismatch)?;
        let signature = hex_32(&fields.signature).ok_or_else(SignatureError::mismatch)?;
        let declared = declared_digest(head.headers)?;
        Ok(Self {
            access_key_id,
            has_token: fields.has_token,
            stamp: fields.stamp,
            region: expected.region.to_owned(),
            service: expected.service.to_owned(),
            signature,
            declared,
            canonical_head,
        })
    }

    /// Whose key it is said to be.
    #[must_use]
    pub fn access_key_id(&self) -> &str {
        &self.access_key_id
    }

    /// Whether it came with a session token.
    #[must_use]
    pub fn has_token(&self) -> bool {
        self.has_token
    }

    /// The body's digest as the client declared (and signed) it, lower-case hex.
    #[must_use]
    pub fn declared_digest(&self) -> Option<&str> {
        self.declared.as_deref()
    }

    /// Whether this secret signed this request with a body of this digest (SHA-256, lower-case hex). The comparison takes
    /// the same time wherever two signatures differ.
    ///
    /// # Errors
    /// It did not.
    pub fn verify(&self, secret: &str, body_digest: &str) -> Result<(), SignatureError> {
        if self
            .declared
            .as_ref()
            .is_some_and(|declared| declared != body_digest)
        {
            return Err(SignatureError::mismatch());
        }
        let canonical = format!("{}{body_digest}", self.canonical_head);
        let text = string_to_sign(&self.stamp, &self.region, &self.service, &canonical);
        let key = signing_key(secret, self.stamp.date(), &self.region, &self.service);
        hmac::verify(&key, text.as_bytes(), &self.signature).map_err(|_| SignatureError::mismatch())
    }
}

/// The text under a signature.
#[must_use]
pub fn string_to_sign(stamp: &Stamp, region: &str, service: &str, canonical: &str) -> String {
    format!(
        "{ALGORITHM}\n{}\n{}/{region}/{service}/{TERMINATOR}\n{}",
        stamp.text(),
        stamp.date(),
        hex_digest(canonical.as_bytes())
    )
}

/// The key of one secret, day, region and service.
#[must_use]
pub fn signing_key(secret: &str, date: &str, region: &str, service: &str) -> hmac::Key {
    let mut key = hmac::Key::new(hmac::HMAC_SHA256, format!("AWS4{secret}").as_bytes());
    for part in [date, region, service, TERMINATOR] {
        key = hmac::Key::new(
            hmac::HMAC_SHA256,
            hmac::sign(&key, part.as_bytes()).as_ref(),
        );
    }
    key
}

/// SHA-256, lower-case hex.
#[must_use]
pub fn hex_digest(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// Lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value & 15)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(*byte)])
        .collect()
}

fn hex_32(text: &str) -> Option<Vec<u8>> {
    let value = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let bytes = text.as_bytes();
    if bytes.len() != 64 {
        return None;
    }
    bytes
        .chunks_exact(2)
        .map(|pair| Some(value(pair[0])? << 4 | value(pair[1])?))
        .collect()
}

/// Region, service, date and terminator of a credential.
struct Scope<'a> {
    date: &'a str,
    region: &'a str,
    service: &'a str,
    terminator: &'a str,
}

fn split_credential(fields: &Fields) -> Result<(String, Scope<'_>), SignatureError> {
    let parts: Vec<&str> = fields.credential.split('/').collect();
    match parts.as_slice() {
        &[id, date, region, service, terminator] if !id.is_empty() => Ok((
            id.to_owned(),
            Scope {
                date,
                region,
                service,
                terminator,
            },
        )),
        _ => Err(SignatureError::Incomplete(format!(
            "Credential must have exactly 5 slash-delimited elements, e.g. keyid/date/region/service/term, got '{}'",
            fields.credential
        ))),
    }
}

fn check_scope(
    stamp: &Stamp,
    scope: &Scope<'_>,
    expected: Expected<'_>,
) -> Result<(), SignatureError> {
    let mut wrong = Vec::new();
    if scope.region != expected.region {
        let region = scope.region;
        wrong.push(format!(
            "Credential should be scoped to a valid Region, not '{region}'."
        ));
    }
    if scope.service != expected.service {
        let service = expected.service;
        wrong.push(format!(
            "Credential should be scoped to correct service: '{service}'."
        ));
    }
    if scope.terminator != TERMINATOR {
        let terminator = scope.terminator;
        wrong.push(format!(
            "Credential should be scoped with a valid terminator: '{TERMINATOR}', not '{terminator}'."
        ));
    }
    if scope.date != stamp.date() {
        wrong.push(format!(
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '{}' != '{}', from '{}'.",
            scope.date,
            stamp.date(),
            stamp.text()
        ));
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(SignatureError::Invalid(wrong.join(" ")))
    }
}

fn check_time(fields: &Fields, now: i64) -> Result<(), SignatureError> {
    let (stamp, signed) = (&fields.stamp, fields.stamp.unix_seconds());
    let show = |seconds: i64| Stamp::at(seconds).text().to_owned();
    if signed > now.saturating_add(SKEW_SECONDS_MAX) {
        return Err(SignatureError::Invalid(format!(
            "Signature not yet current: {} is still later than {} ({} + 5 min.)",
            stamp.text(),
            show(now.saturating_add(SKEW_SECONDS_MAX)),
            show(now)
        )));
    }
    let life = match fields.placement {
        Placement::Header => SKEW_SECONDS_MAX,
        Placement::Query { expires_seconds } => expires_seconds,
    };
    if signed < now.saturating_sub(life) {
        return Err(SignatureError::Invalid(format!(
            "Signature expired: {} is now earlier than {} ({} - {} min.)",
            stamp.text(),
            show(now.saturating_sub(life)),
            show(now),
            life / 60
        )));
    }
    Ok(())
}

/// The host, and every header that means something to AWS, must be under the signature.
fn check_signed_headers(head: Head<'_>, signed: &[String]) -> Result<(), SignatureError> {
    let is_signed = |name: &str| signed.iter().any(|signed| signed == name);
    let unsigned = |name: &str| {
        SignatureError::Invalid(format!(
            "{name} must be a 'SignedHeader' in the AWS Authorization."
        ))
    };
    if !is_signed("host") {
        return Err(unsigned("'Host' or ':authority'"));
    }
    for name in head.headers.keys() {
        if name.as_str().starts_with("x-amz-") && !is_signed(name.as_str()) {
            return Err(unsigned(&format!("'{name}'")));
        }
    }
    Ok(())
}

/// The declared digest. `UNSIGNED-PAYLOAD` and the streaming forms are S3's alone.
fn declared_digest(headers: &HeaderMap) -> Result<Option<String>, SignatureError> {
    let mut values = headers.get_all(CONTENT_SHA256).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value
            .to_str()
            .ok()
            .filter(|text| hex_32(text).is_some())
            .map(|text| Some(text.to_owned()))
            .ok_or_else(SignatureError::mismatch),
        (Some(_), Some(_)) => Err(SignatureError::mismatch()),
    }
}

fn has_dot_segment(path: &str) -> bool {
    path.split('/').any(|segment| matches!(segment, "." | ".."))
}

/// SHA-256 of a header's value in base64: how AWS repeats a value that may hold a secret.
fn hashed(value: &[u8]) -> String {
    STANDARD.encode(digest::digest(&digest::SHA256, value).as_ref())
}

/// Whether a request says anything of a signature, well-formed or not.
#[must_use]
pub fn is_signed(head: Head<'_>) -> bool {
    head.headers.contains_key(header::AUTHORIZATION) || fields::is_presigned(head.uri)
}

#[cfg(test)]
mod tests;
