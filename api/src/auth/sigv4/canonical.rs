//! A request's canonical form.

use axum::http::Uri;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use super::Head;

/// All but RFC 3986's unreserved characters.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The canonical request but for its last line. Of the query, the pairs named `skip` are left out. `None` when a signed
/// header is not there.
pub fn head(head: Head<'_>, signed_headers: &[String], skip: Option<&str>) -> Option<String> {
    let mut text = format!(
        "{}\n{}\n{}\n",
        head.method,
        path(head.uri.path()),
        query(head.uri.query().unwrap_or_default(), skip)
    );
    for name in signed_headers {
        text.push_str(name);
        text.push(':');
        text.push_str(&value(head, name)?);
        text.push('\n');
    }
    text.push('\n');
    text.push_str(&signed_headers.join(";"));
    text.push('\n');
    Some(text)
}

/// The path as it travelled, encoded once more: what is percent-encoded on the wire is so twice here, as all services but
/// S3 have it. Empty and dot segments go, as RFC 3986, section 5.2.4, and AWS say.
#[must_use]
pub fn path(raw: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    for segment in raw.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            other => segments.push(other),
        }
    }
    let mut text = String::with_capacity(raw.len() * 2);
    for segment in &segments {
        text.push('/');
        text.extend(percent_encode(segment.as_bytes(), ESCAPED));
    }
    if text.is_empty() || raw.ends_with('/') {
        text.push('/');
    }
    text
}

/// The query's pairs, decoded, encoded in the one canonical way, and sorted. A plus is a space, as in forms.
#[must_use]
pub fn query(raw: &str, skip: Option<&str>) -> String {
    let mut pairs: Vec<(String, String)> = raw
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (again(key), again(value))
        })
        .filter(|(key, _)| Some(key.as_str()) != skip)
        .collect();
    pairs.sort();
    let pairs: Vec<String> = pairs
        .into_iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    pairs.join("&")
}

fn again(text: &str) -> String {
    let spaced = text.replace('+', " ");
    let bytes: Vec<u8> = percent_decode_str(&spaced).collect();
    percent_encode(&bytes, ESCAPED).to_string()
}

/// Percent-encodes one component of a URI.
#[must_use]
pub fn component(text: &str) -> String {
    percent_encode(text.as_bytes(), ESCAPED).to_string()
}

/// A header's values, joined with commas, white space reduced. HTTP/2 has the host in the request line.
fn value(head: Head<'_>, name: &str) -> Option<String> {
    let mut values = Vec::new();
    for value in head.headers.get_all(name) {
        values.push(trimmed(&String::from_utf8_lossy(value.as_bytes())));
    }
    if values.is_empty() && name == "host" {
        values.push(authority(head.uri)?);
    }
    (!values.is_empty()).then(|| values.join(","))
}

fn authority(uri: &Uri) -> Option<String> {
    uri.authority()
        .map(|authority| authority.as_str().to_owned())
}

fn trimmed(value: &str) -> String {
    let words: Vec<&str> = value.split_ascii_whitespace().collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_encoded_once_more_than_on_the_wire() {
        let arn = "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A1%3Afunction%3Af/code";
        assert_eq!(
            path(arn),
            "/2015-03-31/functions/arn%253Aaws%253Alambda%253Aus-east-1%253A1%253Afunction%253Af/code"
        );
        assert_eq!(path("/a:b$c/"), "/a%3Ab%24c/");
        assert_eq!(path("/\u{1234}"), "/%E1%88%B4");
        assert_eq!(path("/example space/"), "/example%20space/");
    }

    #[test]
    fn empty_and_dot_segments_go() {
        for (raw, canonical) in [
            ("", "/"),
            ("/", "/"),
            ("//", "/"),
            ("//example//", "/example/"),
            ("/example/..", "/"),
            ("/example1/example2/../..", "/"),
            ("/./", "/"),
            ("/./example", "/example"),
            ("/a/../../b", "/b"),
        ] {
            assert_eq!(path(raw), canonical, "{raw}");
        }
    }

    #[test]
    fn queries_are_sorted_after_they_were_encoded() {
        assert_eq!(query("", None), "");
        assert_eq!(query("b=2&a=1&&a=0&c", None), "a=0&a=1&b=2&c=");
        assert_eq!(
            query("k=a+b%20c&k=%7e%3a%2F", None),
            "k=a%20b%20c&k=~%3A%2F"
        );
        assert_eq!(query("\u{1234}=bar", None), "%E1%88%B4=bar");
        assert_eq!(
            query("X-Amz-Signature=1&x=2", Some("X-Amz-Signature")),
            "x=2"
        );
    }
}
