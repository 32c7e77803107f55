//! AWS's published vectors, real clients' signatures, and every way to be wrong.

use axum::http::{HeaderName, HeaderValue};
use proptest::prelude::*;

use super::*;
use crate::auth::signer::Signer;

const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const NOW: i64 = 1_440_938_160;
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A request that owns its parts.
#[derive(Clone, Debug)]
struct Sent {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

fn sent(method: &str, uri: &str, headers: &[(&str, &str)]) -> Sent {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        map.append(name, HeaderValue::from_str(value).unwrap());
    }
    Sent {
        method: Method::from_bytes(method.as_bytes()).unwrap(),
        uri: uri.parse().unwrap(),
        headers: map,
    }
}

impl Sent {
    fn head(&self) -> Head<'_> {
        Head {
            method: &self.method,
            uri: &self.uri,
            headers: &self.headers,
        }
    }

    fn checked(&self, service: &str, now: i64, body: &[u8]) -> Result<(), SignatureError> {
        let expected = Expected {
            region: "us-east-1",
            service,
            now_unix_seconds: now,
        };
        let claim = Claim::read(self.head(), expected)?;
        if claim.access_key_id() != "AKIDEXAMPLE" {
            return Err(SignatureError::UnknownKey); // no other key has this secret
        }
        claim.verify(SECRET, &hex_digest(body))
    }

    fn lambda(&self) -> Result<(), SignatureError> {
        self.checked("lambda", NOW, b"")
    }
}

type Vector = (
    &'static str,
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
    &'static str,
    &'static str,
);

/// Vectors of AWS's "Signature Version 4 test suite" (aws-sig-v4-test-suite, 2015, Apache-2.0): name, method, target, headers
/// beside `Host` and `X-Amz-Date`, signed headers, signature. Targets stand as the suite's clients put them on the wire.
const VECTORS: &[Vector] = &[
    (
        "get-vanilla",
        "GET",
        "/",
        &[],
        "host;x-amz-date",
        "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
    ),
    (
        "get-header-key-duplicate",
        "GET",
        "/",
        &[
            ("My-Header1", "value2"),
            ("My-Header1", "value2"),
            ("My-Header1", "value1"),
        ],
        "host;my-header1;x-amz-date",
        "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea",
    ),
    (
        "get-header-value-trim",
        "GET",
        "/",
        &[("My-Header1", " value1"), ("My-Header2", " \"a   b   c\"")],
        "host;my-header1;my-header2;x-amz-date",
        "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
    ),
    (
        "get-vanilla-query-order-key-case",
        "GET",
        "/?Param2=value2&Param1=value1",
        &[],
        "host;x-amz-date",
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
    ),
    (
        "get-vanilla-query-order-value",
        "GET",
        "/?Param1=value2&Param1=value1",
        &[],
        "host;x-amz-date",
        "5772eed61e12b33fae39ee5e7012498b51d56abc0abb7c60486157bd471c4694",
    ),
    (
        "get-vanilla-utf8-query",
        "GET",
        "/?%E1%88%B4=bar",
        &[],
        "host;x-amz-date",
        "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04",
    ),
    (
        "get-slashes",
        "GET",
        "//example//",
        &[],
        "host;x-amz-date",
        "9a624bd73a37c9a373b5312afbebe7a714a789de108f0bdfe846570885f57e84",
    ),
    (
        "post-header-key-sort",
        "POST",
        "/",
        &[("My-Header1", "value1")],
        "host;my-header1;x-amz-date",
        "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c",
    ),
    (
        "post-sts-header-before",
        "POST",
        "/",
        &[(
            "X-Amz-Security-Token",
            "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==",
        )],
        "host;x-amz-date;x-amz-security-token",
        "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead",
    ),
    (
        "post-x-www-form-urlencoded",
        "POST",
        "/",
        &[(
            "Content-Type",
            "application/x-www-form-urlencoded; charset=utf-8",
        )],
        "content-type;host;x-amz-date",
        "0c3bc22986c53164a4755b4466c2e17db853888c5ddb98567e700a3ecdb262f6",
    ),
];

#[test]
fn the_published_vectors_are_verified() {
    for (name, method, target, headers, signed, signature) in VECTORS {
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders={signed}, Signature={signature}"
        );
        let mut all = vec![
            ("Host", "example.amazonaws.com"),
            ("X-Amz-Date", "20150830T123600Z"),
            ("Authorization", &authorization),
        ];
        all.extend_from_slice(headers);
        let request = sent(method, target, &all);
        assert_eq!(request.checked("service", NOW, b""), Ok(()), "{name}");
        let mismatch = Err(SignatureError::mismatch());
        assert_eq!(request.checked("service", NOW, b"x"), mismatch, "{name}");
    }
}

/// What botocore 1.44.5 signs for a function named by its ARN, at the suite's time and with its key.
fn botos() -> Sent {
    sent(
        "POST",
        "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Ahello%3A%24LATEST/invocations?Qualifier=%24LATEST",
        &[
            ("Host", "127.0.0.1:8080"),
            ("X-Amz-Log-Type", "Tail"),
            ("User-Agent", "Boto3"),
            ("X-Amz-Date", "20150830T123600Z"),
            (
                "Authorization",
                "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/lambda/aws4_request, SignedHeaders=host;x-amz-date;x-amz-log-type, Signature=59875881e30b7109eef956c0a6b6364a929ecdb680bfe4875531912800cebb36",
            ),
        ],
    )
}

/// What botocore 1.44.5 presigns, for 60 s.
const PRESIGNED: &str = "/fn/hello/a%20b?x=1&y=a%20b&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Flambda%2Faws4_request&X-Amz-Date=20150830T123600Z&X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Signature=36bf74d1115bd75b636ac2bc5f5227274346c14d80f5fe169144d224af13ea6b";

#[test]
fn botocores_signature_of_an_arn_is_verified() {
    let request = botos();
    assert_eq!(request.checked("lambda", NOW, br#"{"a":1}"#), Ok(()));
    let expected = Expected {
        region: "us-east-1",
        service: "lambda",
        now_unix_seconds: NOW,
    };
    let claim = Claim::read(request.head(), expected).unwrap();
    assert_eq!(claim.access_key_id(), "AKIDEXAMPLE");
    assert_eq!(claim.declared_digest(), None);
    let other = claim.verify("other", &hex_digest(br#"{"a":1}"#));
    assert_eq!(other, Err(SignatureError::mismatch()));
}

#[test]
fn a_presigned_url_is_good_until_it_expires() {
    let request = sent("GET", PRESIGNED, &[("Host", "127.0.0.1:8080")]);
    assert_eq!(request.lambda(), Ok(()));
    assert_eq!(request.checked("lambda", NOW + 60, b""), Ok(()));
    let late = request.checked("lambda", NOW + 61, b"").unwrap_err();
    assert_eq!(
        late.to_string(),
        "Signature expired: 20150830T123600Z is now earlier than 20150830T123601Z (20150830T123701Z - 1 min.)"
    );
    // The function may want an Authorization of its own.
    let both = [("Host", "127.0.0.1:8080"), ("Authorization", "Bearer x")];
    assert_eq!(sent("GET", PRESIGNED, &both).lambda(), Ok(()));
    let twice = format!("{PRESIGNED}&X-Amz-Expires=600");
    for changed in [
        PRESIGNED.replace("x=1", "x=2"),
        PRESIGNED.replace("hello", "other"),
        PRESIGNED.replace("Expires=60", "Expires=600"),
        PRESIGNED.replace("Expires=60", "Expires=604801"),
        PRESIGNED.replace("Expires=60", "Expires=-1"),
        PRESIGNED.replace("&X-Amz-Expires=60", ""),
        format!("{PRESIGNED}&z=1"),
        twice,
    ] {
        let request = sent("GET", &changed, &[("Host", "127.0.0.1:8080")]);
        assert!(request.lambda().is_err(), "{changed}");
    }
}

#[test]
fn the_signers_own_requests_are_verified() {
    let signer = Signer {
        access_key_id: "AKIDEXAMPLE".to_owned(),
        secret: SECRET.to_owned(),
        region: "us-east-1".to_owned(),
    };
    let mut request = sent("PUT", "/2015-03-31/functions/f%3A1/code?b=2&a=1", &[]);
    let (method, uri) = (request.method.clone(), request.uri.clone());
    signer
        .sign(&method, &uri, "h:1", &mut request.headers, b"body", NOW)
        .unwrap();
    assert_eq!(request.checked("lambda", NOW, b"body"), Ok(()));
    let mismatch = Err(SignatureError::mismatch());
    assert_eq!(request.checked("lambda", NOW, b"bodY"), mismatch);
    let link = signer
        .presign("/thaw/v1/x?b=%3A&a", "h:1", 600, NOW)
        .unwrap();
    let request = sent("GET", &link, &[("Host", "h:1")]);
    assert_eq!(request.checked("lambda", NOW + 600, b""), Ok(()));
    assert!(request.checked("lambda", NOW + 601, b"").is_err());
    assert!(!format!("{signer:?}").contains(SECRET));
}

#[test]
fn five_minutes_are_the_most_a_clock_may_be_off() {
    let body = br#"{"a":1}"#;
    for off in [-300, 300] {
        assert_eq!(botos().checked("lambda", NOW + off, body), Ok(()), "{off}");
    }
    let text = |now| {
        botos()
            .checked("lambda", now, body)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        text(NOW + 301),
        "Signature expired: 20150830T123600Z is now earlier than 20150830T123601Z (20150830T124101Z - 5 min.)"
    );
    assert_eq!(
        text(NOW - 301),
        "Signature not yet current: 20150830T123600Z is still later than 20150830T123559Z (20150830T123059Z + 5 min.)"
    );
}

fn with(name: &'static str, value: &str) -> Sent {
    let mut request = botos();
    request
        .headers
        .insert(name, HeaderValue::from_str(value).unwrap());
    request
}

#[test]
fn what_is_missing_or_wrong_is_told_in_awss_words() {
    let plain = sent("GET", "/", &[("Host", "h")]);
    assert_eq!(plain.lambda(), Err(SignatureError::Missing));
    assert!(!is_signed(plain.head()) && is_signed(botos().head()));
    let text = |request: Sent| request.lambda().unwrap_err().to_string();
    let bearer = text(sent("GET", "/", &[("Authorization", "Bearer secret")]));
    assert!(bearer.starts_with("Authorization header requires 'Credential' parameter. Authorization header requires 'Signature' parameter. Authorization header requires 'SignedHeaders' parameter. Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header. "), "{bearer}");
    assert!(!bearer.contains("secret"));
    let good = botos().headers["authorization"]
        .to_str()
        .unwrap()
        .to_owned();
    let changed = |from: &str, to: &str| text(with("authorization", &good.replace(from, to)));
    assert_eq!(
        changed("us-east-1/lambda/aws4_request", "eu-west-1/s3/aws5_request"),
        "Credential should be scoped to a valid Region, not 'eu-west-1'. Credential should be scoped to correct service: 'lambda'. Credential should be scoped with a valid terminator: 'aws4_request', not 'aws5_request'."
    );
    assert_eq!(
        changed("/20150830/", "/20150829/"),
        "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '20150829' != '20150830', from '20150830T123600Z'."
    );
    assert!(
        changed("AKIDEXAMPLE/", "")
            .starts_with("Credential must have exactly 5 slash-delimited elements")
    );
    assert!(changed("HMAC-SHA256", "ECDSA-P256-SHA256").starts_with("Unsupported AWS 'algorithm'"));
    assert!(
        changed("Signature=", "Signature")
            .starts_with("Invalid key=value pair (missing equal-sign)")
    );
    assert_eq!(
        changed("=host;", "="),
        "'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization."
    );
    assert_eq!(
        changed(";x-amz-log-type", ""),
        "'x-amz-log-type' must be a 'SignedHeader' in the AWS Authorization."
    );
    let mismatch = SignatureError::mismatch().to_string();
    assert_eq!(changed("=host;", "=absent;host;"), mismatch);
    assert_eq!(changed("Signature=5", "Signature=6"), mismatch);
    assert_eq!(changed("Signature=5", "Signature="), mismatch);
    assert!(text(with("x-amz-date", "today")).starts_with("Date must be in ISO-8601"));
    let mut twice = botos();
    twice
        .headers
        .append("authorization", HeaderValue::from_static("x"));
    assert_eq!(text(twice), "Only one Authorization header is allowed.");
}

#[test]
fn a_declared_digest_must_be_signed_and_be_the_bodys() {
    let declared = |value: &str, signed: &str| {
        let good = botos().headers["authorization"]
            .to_str()
            .unwrap()
            .to_owned();
        let mut request = with(
            "authorization",
            &good.replace("host;x-amz-date", &format!("host;{signed}x-amz-date")),
        );
        request
            .headers
            .insert(CONTENT_SHA256, HeaderValue::from_str(value).unwrap());
        request.lambda().unwrap_err()
    };
    assert_eq!(
        declared(EMPTY, "").to_string(),
        "'x-amz-content-sha256' must be a 'SignedHeader' in the AWS Authorization."
    );
    for value in ["UNSIGNED-PAYLOAD", "", &EMPTY.to_uppercase()] {
        let found = declared(value, "x-amz-content-sha256;");
        assert_eq!(found, SignatureError::mismatch(), "{value}");
    }
}

#[test]
fn a_path_with_dot_segments_is_never_the_one_that_was_signed() {
    let target = "/fn/other/../hello/";
    let mut request = sent("GET", target, &[]);
    let signer = Signer {
        access_key_id: "AKIDEXAMPLE".to_owned(),
        secret: SECRET.to_owned(),
        region: "us-east-1".to_owned(),
    };
    let signed: Uri = "/fn/hello/".parse().unwrap();
    signer
        .sign(&Method::GET, &signed, "h", &mut request.headers, b"", NOW)
        .unwrap();
    assert_eq!(request.lambda(), Err(SignatureError::mismatch()));
    request.uri = signed;
    assert_eq!(request.lambda(), Ok(()));
}

/// Signed by AWS's own Rust SDK.
fn sdk_signed(target: &str, headers: &[(&str, &str)], body: &[u8], declares: bool) -> Sent {
    use aws_sigv4::http_request::{
        PayloadChecksumKind, SignableBody, SignableRequest, SigningSettings, sign,
    };
    use std::time::{Duration, SystemTime};

    let credentials =
        aws_credential_types::Credentials::new("AKIDEXAMPLE", SECRET, None, None, "test");
    let identity = aws_smithy_runtime_api::client::identity::Identity::from(credentials);
    let mut settings = SigningSettings::default();
    if declares {
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    }
    let params = aws_sigv4::sign::v4::SigningParams::builder()
        .identity(&identity)
        .region("us-east-1")
        .name("lambda")
        .time(SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.unsigned_abs()))
        .settings(settings)
        .build()
        .unwrap();
    let url = format!("http://127.0.0.1:8080{target}");
    let all = [("host", "127.0.0.1:8080")]
        .into_iter()
        .chain(headers.iter().copied());
    let request = SignableRequest::new("POST", url, all, SignableBody::Bytes(body)).unwrap();
    let (instructions, _) = sign(request, &params.into()).unwrap().into_parts();
    let mut request = sent("POST", target, headers);
    request
        .headers
        .insert("host", HeaderValue::from_static("127.0.0.1:8080"));
    for (name, value) in instructions.headers() {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        request
            .headers
            .insert(name, HeaderValue::from_str(value).unwrap());
    }
    request
}

const ARN_TARGET: &str = "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A1%3Afunction%3Af/invocations?Qualifier=p%20q";

#[test]
fn the_rust_sdks_signatures_are_verified_with_and_without_a_declared_digest() {
    for declares in [false, true] {
        let request = sdk_signed(ARN_TARGET, &[("x-amz-log-type", "Tail")], b"{}", declares);
        assert_eq!(request.checked("lambda", NOW, b"{}"), Ok(()), "{declares}");
        let mismatch = Err(SignatureError::mismatch());
        assert_eq!(request.checked("lambda", NOW, b"{ }"), mismatch);
    }
}

/// One changed bit; `None` where the result is no HTTP.
fn flipped(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let index = bit / 8 % bytes.len();
    bytes[index] ^= 1 << (bit % 8);
    bytes
}

proptest! {
    #[test]
    fn any_changed_bit_of_a_signed_request_is_found(bit in 0_usize..4096, declares: bool) {
        let body = b"{\"a\":1}";
        let good = sdk_signed(ARN_TARGET, &[("x-amz-log-type", "Tail")], body, declares);
        prop_assert_eq!(good.checked("lambda", NOW, body), Ok(()));
        prop_assert!(good.checked("lambda", NOW, &flipped(body, bit)).is_err());

        if let Ok(method) = Method::from_bytes(&flipped(b"POST", bit)) {
            let changed = Sent { method, ..good.clone() };
            prop_assert!(changed.checked("lambda", NOW, body).is_err());
        }
        let target = flipped(ARN_TARGET.as_bytes(), bit);
        if let Ok(uri) = Uri::try_from(target.as_slice())
            && (uri.path() != good.uri.path()
                || pairs(&uri) != pairs(&good.uri))
        {
            let changed = Sent { uri, ..good.clone() };
            prop_assert!(changed.checked("lambda", NOW, body).is_err());
        }
        for (name, value) in &good.headers {
            if let Ok(value) = HeaderValue::from_bytes(&flipped(value.as_bytes(), bit)) {
                let mut changed = good.clone();
                let is_same = value.as_bytes().trim_ascii() == good.headers[name].as_bytes();
                changed.headers.insert(name.clone(), value);
                prop_assert!(is_same || changed.checked("lambda", NOW, body).is_err(), "{}", name);
            }
        }
    }

    #[test]
    fn whatever_is_sent_panics_nobody(
        authorization in "(AWS4-HMAC-SHA256 )?(Credential=|SignedHeaders=|Signature=|[ -~]|,|/){0,40}",
        query in "(X-Amz-(Algorithm|Credential|Date|Expires|Signature|SignedHeaders)=|AWS4-HMAC-SHA256|[!-~]|&|%2F){0,30}",
        date in "[ -~]{0,20}",
    ) {
        let headers = [("host", "h"), ("x-amz-date", date.as_str()), ("authorization", authorization.as_str())];
        if let Ok(uri) = format!("/x?{query}").parse::<Uri>() {
            let mut request = sent("GET", "/", &headers);
            request.uri = uri;
            prop_assert!(request.lambda().is_err());
            request.headers.remove("authorization");
            prop_assert!(request.lambda().is_err());
        }
    }

    #[test]
    fn whatever_the_signer_signs_is_verified(path in "(/[!-~&&[^?#]]{1,12}){1,4}", query in "[!-~&&[^#]]{0,30}", body: Vec<u8>) {
        let target = format!("{path}?{query}");
        let Ok(uri) = target.parse::<Uri>() else { return Ok(()) };
        prop_assume!(!has_dot_segment(uri.path()) && !fields::is_presigned(&uri));
        let signer = Signer { access_key_id: "AKIDEXAMPLE".to_owned(), secret: SECRET.to_owned(), region: "us-east-1".to_owned() };
        let mut request = sent("POST", "/", &[]);
        request.uri = uri.clone();
        signer.sign(&Method::POST, &uri, "h", &mut request.headers, &body, NOW).unwrap();
        prop_assert_eq!(request.checked("lambda", NOW, &body), Ok(()));
    }
}

/// A query as the gateway reads it.
fn pairs(uri: &Uri) -> Vec<(String, String)> {
    crate::lambda::query(uri.query().unwrap_or_default()).collect()
}
