//! Code from an S3-compatible store: signed GETs of one object, its bucket in the path (Amazon S3 API reference, "GetObject" and
//! "Authenticating Requests: Using the Authorization Header").

use std::time::Duration;

use axum::http::header;
use bytes::{Bytes, BytesMut};
use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode, Url};
use ring::hmac;
use thiserror::Error;

use crate::auth::signer::Signer;
use crate::auth::sigv4::canonical::component;
use crate::auth::sigv4::{
    ALGORITHM, CONTENT_SHA256, Stamp, TERMINATOR, hex, hex_digest, signing_key, string_to_sign,
};
use crate::clock;
use crate::tls::{self, TlsError, Trust};

/// Longest that a connection, its handshake included, and a whole answer may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// Most of an error's text that is read, bytes.
const ERROR_BYTES_MAX: usize = 64 * 1024;
/// Longest key, bytes.
const KEY_BYTES_MAX: usize = 1024;
const SERVICE: &str = "s3";

/// A store, and the key that signs requests to it.
#[derive(Clone, Debug)]
pub struct S3 {
    endpoint: Url,
    signer: Signer,
    client: Client,
}

/// One object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Bucket.
    pub bucket: String,
    /// Key, not encoded.
    pub key: String,
    /// Version, where the bucket keeps several.
    pub version: Option<String>,
}

/// Why an object is not had.
#[derive(Debug, Error)]
pub enum S3Error {
    /// The endpoint is none.
    #[error(
        "{0} is no address of an S3-compatible store: write it as http://HOST:PORT or https://HOST:PORT"
    )]
    Endpoint(String),
    /// There is no HTTP client to be had.
    #[error("cannot read from an S3-compatible store")]
    Client(#[from] TlsError),
    /// The bucket or the key can be none. The text says which.
    #[error("{0}")]
    Name(String),
    /// The store refused.
    #[error("Error occurred while GetObject. S3 Error Code: {code}. S3 Error Message: {message}")]
    Refused {
        /// `NoSuchKey`, …
        code: String,
        /// The store's words.
        message: String,
    },
    /// The object is too large, bytes.
    #[error("Zipped size must be smaller than {0} bytes")]
    TooLarge(usize),
    /// The store cannot be reached, or broke off.
    #[error(
        "the S3 endpoint {endpoint} cannot be read: look whether it runs, and whether --s3-endpoint is right"
    )]
    Unreachable {
        /// The store.
        endpoint: String,
        /// Why not.
        #[source]
        source: reqwest::Error,
    },
    /// The store's certificate is refused, or it speaks no TLS.
    #[error("no TLS with the S3 endpoint {endpoint}: {why}")]
    Tls {
        /// The store.
        endpoint: String,
        /// Why not, and what helps.
        why: String,
    },
}

impl S3 {
    /// The store at `endpoint`, an `http://` or `https://` URL.
    ///
    /// # Errors
    /// It is no such URL, or no client can be made.
    pub fn new(endpoint: &str, signer: Signer, trust: &Trust) -> Result<Self, S3Error> {
        let wrong = || S3Error::Endpoint(endpoint.to_owned());
        let url = Url::parse(endpoint).map_err(|_| wrong())?;
        let is_web = matches!(url.scheme(), "http" | "https") && url.has_host();
        if !is_web || url.query().is_some() || !matches!(url.path(), "" | "/") {
            return Err(wrong());
        }
        let client = trust.client(|http| {
            let http = http.connect_timeout(CONNECT_LIMIT).timeout(ANSWER_LIMIT);
            // A store that sends elsewhere would be sent the signature, too.
            http.redirect(Policy::none())
        })?;
        Ok(Self {
            endpoint: trust.reach(url),
            signer,
            client,
        })
    }

    /// The object, if it has at most `bytes_max` bytes.
    ///
    /// # Errors
    /// See [`S3Error`].
    pub async fn get(&self, object: &Object, bytes_max: usize) -> Result<Bytes, S3Error> {
        let path = path(object)?;
        let query = object.version.as_deref().map(component);
        let query = query.map_or_else(String::new, |version| format!("versionId={version}"));
        let mut url = self.endpoint.clone();
        url.set_path(&path);
        if !query.is_empty() {
            url.set_query(Some(&query));
        }
        let unusable = || S3Error::Name(format!("{} is no usable key.", object.key));
        if url.path() != path {
            return Err(unusable());
        }
        let host = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (Some(host), None) => host.to_owned(),
            (None, _) => return Err(unusable()),
        };
        let stamp = Stamp::at(clock::unix_ms().div_euclid(1000));
        let nothing = hex_digest(b"");
        let headers = [
            ("host", host.as_str()),
            (CONTENT_SHA256, nothing.as_str()),
            ("x-amz-date", stamp.text()),
        ];
        let authorization = authorization(&self.signer, &stamp, &path, &query, &headers);
        let [_, digest, date] = headers;
        let request = self.client.get(url).header(digest.0, digest.1);
        let request = request.header(date.0, date.1);
        let sent = request.header(header::AUTHORIZATION, authorization).send();
        let mut answer = sent.await.map_err(|source| self.unreachable(source))?;
        if answer.status() != StatusCode::OK {
            let text = self.body(&mut answer, ERROR_BYTES_MAX).await?;
            return Err(refused(
                answer.status(),
                text.as_deref().unwrap_or_default(),
            ));
        }
        let body = self.body(&mut answer, bytes_max).await?;
        body.ok_or(S3Error::TooLarge(bytes_max))
    }

    /// The answer's body; `None` if it is longer.
    async fn body(
        &self,
        answer: &mut reqwest::Response,
        bytes_max: usize,
    ) -> Result<Option<Bytes>, S3Error> {
        let mut body = BytesMut::new();
        while let Some(piece) = answer
            .chunk()
            .await
            .map_err(|source| self.unreachable(source))?
        {
            if body.len() + piece.len() > bytes_max {
                return Ok(None);
            }
            body.extend_from_slice(&piece);
        }
        Ok(Some(body.freeze()))
    }

    fn unreachable(&self, source: reqwest::Error) -> S3Error {
        let endpoint = self.endpoint.to_string();
        match tls::failure(&source) {
            Some(why) => S3Error::Tls { endpoint, why },
            None => S3Error::Unreachable {
                endpoint,
                source: source.without_url(),
            },
        }
    }
}

/// The path of an object, encoded once, as S3 alone has it. No name leads to another path.
fn path(object: &Object) -> Result<String, S3Error> {
    let (bucket, key) = (&object.bucket, &object.key);
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(is_fit) || bucket.contains("..") {
        return Err(S3Error::Name(format!("{bucket} is no name of a bucket.")));
    }
    let is_dots = |segment: &str| matches!(segment, "." | "..");
    if key.is_empty() || key.len() > KEY_BYTES_MAX || key.split('/').any(is_dots) {
        return Err(S3Error::Name(format!("{key} is no usable key.")));
    }
    let segments: Vec<String> = key.split('/').map(component).collect();
    Ok(format!("/{bucket}/{}", segments.join("/")))
}

/// The `Authorization` of a GET without a body; `headers` are sorted, and all of them are signed.
fn authorization(
    signer: &Signer,
    stamp: &Stamp,
    path: &str,
    query: &str,
    headers: &[(&str, &str)],
) -> String {
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let lines: String = headers
        .iter()
        .map(|(name, value)| format!("{name}:{value}\n"))
        .collect();
    let names = names.join(";");
    let canonical = format!(
        "GET\n{path}\n{query}\n{lines}\n{names}\n{}",
        hex_digest(b"")
    );
    let region = &signer.region;
    let text = string_to_sign(stamp, region, SERVICE, &canonical);
    let key = signing_key(&signer.secret, stamp.date(), region, SERVICE);
    format!(
        "{ALGORITHM} Credential={}/{}/{region}/{SERVICE}/{TERMINATOR}, SignedHeaders={names}, Signature={}",
        signer.access_key_id,
        stamp.date(),
        hex(hmac::sign(&key, text.as_bytes()).as_ref())
    )
}

/// An error's document: `<Error><Code>…</Code><Message>…</Message>…</Error>`.
fn refused(status: StatusCode, body: &[u8]) -> S3Error {
    let text = String::from_utf8_lossy(body);
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        let (value, _) = rest.split_once(&format!("</{name}>"))?;
        // Some stores write texts so.
        let value = value.strip_prefix("<![CDATA[").unwrap_or(value);
        let value = value.strip_suffix("]]>").unwrap_or(value);
        Some(value.chars().take(256).collect::<String>())
    };
    let reason = status.canonical_reason().unwrap_or_default();
    S3Error::Refused {
        code: element("Code").unwrap_or_else(|| status.as_str().to_owned()),
        message: element("Message").unwrap_or_else(|| reason.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer() -> Signer {
        Signer {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned(),
            region: "us-east-1".to_owned(),
        }
    }

    #[test]
    fn the_documentations_own_example_is_signed_as_it_says() {
        // Amazon S3 API reference, "Signature Calculations for the Authorization Header", example GET Object.
        let headers = [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("range", "bytes=0-9"),
            (CONTENT_SHA256, &hex_digest(b"")),
            ("x-amz-date", "20130524T000000Z"),
        ];
        let stamp = Stamp::at(1_369_353_600);
        let value = authorization(&signer(), &stamp, "/test.txt", "", &headers);
        assert!(
            value.ends_with(
                "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
            ),
            "{value}"
        );
    }

    #[test]
    fn names_lead_to_their_own_path_or_nowhere() {
        let object = |bucket: &str, key: &str| Object {
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            version: None,
        };
        assert_eq!(
            path(&object("code", "a b/c?d#e%2F.zip")).unwrap(),
            "/code/a%20b/c%3Fd%23e%252F.zip"
        );
        for (bucket, key) in [
            ("..", "k"),
            ("a/b", "k"),
            ("user@host", "k"),
            ("code", ""),
            ("code", "a/../../admin"),
            ("code", "."),
        ] {
            assert!(path(&object(bucket, key)).is_err(), "{bucket} {key}");
        }
    }

    #[test]
    fn endpoints_are_whole_hosts_and_the_labs_loopback_is_not_the_machines() {
        let lab = Trust::default().seen_from_lab([10, 0, 2, 2].into());
        for endpoint in ["ftp://h", "h:9000", "http://h/path", "https://h?x"] {
            assert!(S3::new(endpoint, signer(), &lab).is_err(), "{endpoint}");
        }
        let seen = |endpoint: &str| {
            let store = S3::new(endpoint, signer(), &lab).unwrap();
            store.endpoint.to_string()
        };
        assert_eq!(seen("http://localhost:9000"), "http://10.0.2.2:9000/");
        assert_eq!(seen("https://store:9000"), "https://store:9000/");
    }

    #[test]
    fn a_refusal_is_read() {
        let body =
            b"<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code><Message>gone</Message></Error>";
        assert_eq!(
            refused(StatusCode::NOT_FOUND, body).to_string(),
            "Error occurred while GetObject. S3 Error Code: NoSuchKey. S3 Error Message: gone"
        );
        assert!(
            refused(StatusCode::FORBIDDEN, b"")
                .to_string()
                .contains("403")
        );
    }
}
