//! Where a request says what of its signature: the Authorization header, or the query of a presigned URL.

use axum::http::{HeaderMap, Uri, header};
use percent_encoding::percent_decode_str;

use super::{ALGORITHM, EXPIRES_SECONDS_MAX, Head, SignatureError, Stamp, hashed};

/// Parameters of a presigned query that are the signature's own.
const QUERY_NAMES: [&str; 7] = [
    "X-Amz-Algorithm",
    "X-Amz-Credential",
    "X-Amz-Date",
    "X-Amz-Expires",
    "X-Amz-Security-Token",
    "X-Amz-Signature",
    "X-Amz-SignedHeaders",
];

/// What was found, not yet understood but for the time.
#[derive(Debug)]
pub(super) struct Fields {
    pub(super) placement: Placement,
    pub(super) credential: String,
    pub(super) signed_headers: Vec<String>,
    pub(super) signature: String,
    pub(super) stamp: Stamp,
    pub(super) has_token: bool,
}

/// Where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    Header,
    Query { expires_seconds: i64 },
}

/// Whether a URI carries a signature.
pub(super) fn is_presigned(uri: &Uri) -> bool {
    pairs(uri).any(|(key, _)| matches!(key.as_str(), "X-Amz-Algorithm" | "X-Amz-Signature"))
}

impl Fields {
    pub(super) fn read(head: Head<'_>) -> Result<Self, SignatureError> {
        let mut values = head.headers.get_all(header::AUTHORIZATION).iter();
        let (first, second) = (values.next(), values.next());
        let is_ours = |bytes: &[u8]| bytes.starts_with(b"AWS4-");
        match (first, is_presigned(head.uri)) {
            (None, false) => Err(SignatureError::Missing),
            // A function may want an Authorization of its own beside a presigned URL.
            (None, true) => Self::of_query(head.uri),
            (Some(value), true) if !is_ours(value.as_bytes()) => Self::of_query(head.uri),
            (Some(_), true) => Err(SignatureError::Incomplete(
                "Only one of the Authorization header and the X-Amz-Signature query-string parameter is allowed."
                    .to_owned(),
            )),
            (Some(value), false) if second.is_none() => {
                Self::of_header(value.as_bytes(), head.headers)
            }
            (Some(_), false) => Err(SignatureError::Incomplete(
                "Only one Authorization header is allowed.".to_owned(),
            )),
        }
    }

    fn of_header(value: &[u8], headers: &HeaderMap) -> Result<Self, SignatureError> {
        let text = std::str::from_utf8(value).map_err(|_| malformed(value))?;
        let (algorithm, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let (mut credential, mut signed_headers, mut signature) = (None, None, None);
        if algorithm == ALGORITHM {
            for pair in rest
                .split(',')
                .map(str::trim)
                .filter(|pair| !pair.is_empty())
            {
                let (name, value_of) = pair.split_once('=').ok_or_else(|| malformed(value))?;
                let slot = match name.trim_end() {
                    "Credential" => &mut credential,
                    "SignedHeaders" => &mut signed_headers,
                    "Signature" => &mut signature,
                    _ => continue,
                };
                if slot.replace(value_of.trim_start()).is_some() {
                    return Err(malformed(value));
                }
            }
        } else if algorithm.starts_with("AWS4-") {
            return Err(SignatureError::Incomplete(format!(
                "Unsupported AWS 'algorithm': '{algorithm}'."
            )));
        }
        let date = date_of(headers)?;
        match (credential, signature, signed_headers, date) {
            (Some(credential), Some(signature), Some(signed_headers), Some(stamp)) => Ok(Self {
                placement: Placement::Header,
                credential: credential.to_owned(),
                signed_headers: split_names(signed_headers),
                signature: signature.to_owned(),
                stamp,
                has_token: headers.contains_key("x-amz-security-token"),
            }),
            (credential, signature, signed_headers, date) => {
                let mut missing = Vec::new();
                let parts = [
                    ("Credential", credential.is_some()),
                    ("Signature", signature.is_some()),
                    ("SignedHeaders", signed_headers.is_some()),
                ];
                for (name, _) in parts.iter().filter(|(_, there)| !there) {
                    missing.push(format!("Authorization header requires '{name}' parameter."));
                }
                if date.is_none() {
                    missing.push(
                        "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header."
                            .to_owned(),
                    );
                }
                Err(SignatureError::Incomplete(format!(
                    "{} (Hashed with SHA-256 and encoded with Base64) Authorization={}",
                    missing.join(" "),
                    hashed(value)
                )))
            }
        }
    }

    fn of_query(uri: &Uri) -> Result<Self, SignatureError> {
        let mut found: [Option<String>; QUERY_NAMES.len()] = Default::default();
        for (key, value) in pairs(uri) {
            if let Some(index) = QUERY_NAMES.iter().position(|name| *name == key)
                && found[index].replace(value).is_some()
            {
                return Err(SignatureError::Incomplete(format!(
                    "The query-string parameter '{key}' is given more than once. Re-examine the query-string parameters."
                )));
            }
        }
        let [
            algorithm,
            credential,
            date,
            expires,
            token,
            signature,
            signed,
        ] = found;
        let given = |name: &str, value: Option<String>| {
            value.ok_or_else(|| {
                SignatureError::Incomplete(format!(
                    "AWS query-string parameters must include '{name}'. Re-examine the query-string parameters."
                ))
            })
        };
        let algorithm = given("X-Amz-Algorithm", algorithm)?;
        if algorithm != ALGORITHM {
            return Err(SignatureError::Incomplete(format!(
                "Unsupported AWS 'algorithm': '{algorithm}'."
            )));
        }
        let expires = given("X-Amz-Expires", expires)?;
        let expires_seconds = expires
            .parse::<i64>()
            .ok()
            .filter(|seconds| (1..=EXPIRES_SECONDS_MAX).contains(seconds))
            .ok_or_else(|| {
                SignatureError::Incomplete(format!(
                    "X-Amz-Expires must be a number of seconds from 1 to {EXPIRES_SECONDS_MAX}."
                ))
            })?;
        let date = given("X-Amz-Date", date)?;
        Ok(Self {
            placement: Placement::Query { expires_seconds },
            credential: given("X-Amz-Credential", credential)?,
            signed_headers: split_names(&given("X-Amz-SignedHeaders", signed)?),
            signature: given("X-Amz-Signature", signature)?,
            stamp: Stamp::parse(&date).ok_or_else(|| not_a_date(&date))?,
            has_token: token.is_some(),
        })
    }
}

/// The time of a request: `X-Amz-Date`, or else `Date`.
fn date_of(headers: &HeaderMap) -> Result<Option<Stamp>, SignatureError> {
    let text = |name: &str| Some(String::from_utf8_lossy(headers.get(name)?.as_bytes()));
    if let Some(text) = text("x-amz-date") {
        return match Stamp::parse(&text) {
            Some(stamp) => Ok(Some(stamp)),
            None => Err(not_a_date(&text)),
        };
    }
    match text("date") {
        None => Ok(None),
        Some(text) => match Stamp::parse_date_header(&text) {
            Some(stamp) => Ok(Some(stamp)),
            None => Err(not_a_date(&text)),
        },
    }
}

fn not_a_date(text: &str) -> SignatureError {
    SignatureError::Incomplete(format!(
        "Date must be in ISO-8601 'basic format'. Got '{text}'. See http://en.wikipedia.org/wiki/ISO_8601"
    ))
}

fn malformed(value: &[u8]) -> SignatureError {
    SignatureError::Incomplete(format!(
        "Invalid key=value pair (missing equal-sign) in Authorization header (hashed with SHA-256 and encoded with Base64): '{}'.",
        hashed(value)
    ))
}

fn split_names(text: &str) -> Vec<String> {
    text.split(';').map(str::to_owned).collect()
}

/// Decoded pairs of a query; names are told apart by case.
fn pairs(uri: &Uri) -> impl Iterator<Item = (String, String)> {
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
    };
    uri.query().unwrap_or_default().split('&').map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key), decode(value))
    })
}
