//! Signed and unsigned requests at a gateway that asks for signatures.

use std::os::unix::fs::PermissionsExt as _;

use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use tempfile::tempdir;
use thaw_api::auth::keys::{ROOT_FILE, root_signer};
use thaw_api::auth::signer::Signer;
use thaw_api::{AuthMode, StartError, clock};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::server::{Answer, Server, try_start_as};
use crate::{FUNCTIONS, create, good};

fn signer(id: &str, secret: &str) -> Signer {
    Signer {
        access_key_id: id.to_owned(),
        secret: secret.to_owned(),
        region: "us-east-1".to_owned(),
    }
}

pub fn root(server: &Server) -> Signer {
    let signer = root_signer(&server.home().join(ROOT_FILE)).unwrap();
    signer.unwrap()
}

/// Signs for one body and sends another.
pub async fn send_other(
    server: &Server,
    signer: &Signer,
    request: (&str, &str),
    signed: &[u8],
    sent: &[u8],
) -> Answer {
    let (method, path) = request;
    let mut headers = HeaderMap::new();
    let uri = path.parse().unwrap();
    let name = method.parse().unwrap();
    let (host, now) = (server.address.to_string(), clock::unix_ms() / 1000);
    signer
        .sign(&name, &uri, &host, &mut headers, signed, now)
        .unwrap();
    let headers: Vec<(&str, &str)> = headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
        .collect();
    server.send(method, path, &headers, sent).await
}

pub async fn send(server: &Server, signer: &Signer, request: (&str, &str), body: &Value) -> Answer {
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    send_other(server, signer, request, body.as_bytes(), body.as_bytes()).await
}

async fn key(server: &Server, allow: &str, functions: &str) -> Signer {
    limited(server, allow, functions, json!({})).await
}

/// Makes a key as `thaw keys create` does.
pub async fn limited(server: &Server, allow: &str, functions: &str, limits: Value) -> Signer {
    let wanted = json!({"name": "ci", "allow": allow, "functions": functions, "limits": limits});
    let made = send(server, &root(server), ("POST", "/thaw/v1/keys"), &wanted).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let made = made.json();
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    signer(&text("access_key_id"), &text("secret_access_key"))
}

pub async fn guarded() -> Server {
    let server = Server::start_as(tempdir().unwrap(), AuthMode::Required).await;
    server.until_healthy().await;
    server
}

fn refused(answer: &Answer, code: &str) -> String {
    assert_eq!(answer.status, 403, "{}", answer.text());
    assert_eq!(answer.header("x-amzn-errortype"), Some(code));
    let body = answer.json();
    let spelled = if code == "AccessDeniedException" {
        "Message"
    } else {
        "message"
    };
    body[spelled].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn without_auth_no_web_page_is_served_but_by_functions() {
    let server = Server::start().await;
    let body = good("f").to_string();
    let page = ("origin", "https://evil.example");
    for header in [page, ("origin", "null"), ("host", "evil.example:9000")] {
        let headers = [header];
        let sent = server.send("POST", FUNCTIONS, &headers, body.as_bytes());
        let told = refused(&sent.await, "AccessDeniedException");
        assert!(told.contains("--auth"), "{told}");
    }
    let rebound = [("host", "rebound.example")];
    let listed = server.send("GET", FUNCTIONS, &rebound, b"").await;
    refused(&listed, "AccessDeniedException");
    // A page of this machine's own, and pages that call a function: its URL says which may.
    let own = ("origin", "http://localhost:3000");
    assert_eq!(server.send("GET", FUNCTIONS, &[own], b"").await.status, 200);
    assert_eq!(server.send("GET", "/fn/f/", &[page], b"").await.status, 404);
}

#[tokio::test]
async fn a_key_has_records_sent_only_to_what_it_may_call() {
    let server = guarded().await;
    let root = root(&server);
    for name in ["team-a", "team-b", "other"] {
        let made = send(&server, &root, ("POST", FUNCTIONS), &good(name)).await;
        assert_eq!(made.status, 201, "{}", made.text());
    }
    let team = key(&server, "manage", "team-*").await;
    let path = "/2019-09-25/functions/team-a/event-invoke-config";
    let keep = async |signer: &Signer, side: &str, to: &str| {
        let config = json!({"DestinationConfig": {side: {"Destination": to}}});
        send(&server, signer, ("PUT", path), &config).await
    };
    let arn = |name: &str| format!("arn:aws:lambda:us-east-1:000000000000:function:{name}");
    for to in [arn("other"), "http://127.0.0.1:1/".to_owned()] {
        for side in ["OnSuccess", "OnFailure"] {
            let answer = keep(&team, side, &to).await;
            assert_eq!(answer.status, 400, "{}", answer.text());
            assert!(
                answer.text().contains("may not have records"),
                "{}",
                answer.text()
            );
        }
        assert_eq!(keep(&root, "OnSuccess", &to).await.status, 200);
    }
    assert_eq!(keep(&team, "OnSuccess", &arn("team-b")).await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn nothing_unsigned_altered_or_not_allowed_reaches_a_handler() {
    let server = guarded().await;
    let root = root(&server);
    let missing = "MissingAuthenticationTokenException";
    for path in [
        FUNCTIONS,
        "/thaw/v1/functions",
        "/thaw/v1/keys",
        "/",
        "/x",
        "/fn/",
        "/fn//x",
        "//fn/f/",
    ] {
        let answer = server.get(path).await;
        assert_eq!(refused(&answer, missing), "Missing Authentication Token");
    }
    refused(&server.post(FUNCTIONS, &good("f")).await, missing);
    let forbidden = refused(&server.get("/fn/f/").await, "AccessDeniedException");
    assert!(forbidden.starts_with("Forbidden. "));
    let body = good("f").to_string();
    let other = send_other(&server, &root, ("POST", FUNCTIONS), b"{}", body.as_bytes()).await;
    refused(&other, "InvalidSignatureException");
    let stranger = signer("AKIAAAAAAAAAAAAAAAAA", &root.secret);
    let unknown = send(&server, &stranger, ("POST", FUNCTIONS), &good("f")).await;
    let text = refused(&unknown, "UnrecognizedClientException");
    assert_eq!(
        text,
        "The security token included in the request is invalid."
    );
    let invoker = key(&server, "invoke", "*").await;
    let denied = send(&server, &invoker, ("POST", FUNCTIONS), &good("f")).await;
    assert_eq!(
        refused(&denied, "AccessDeniedException"),
        "User: arn:aws:iam::000000000000:user/ci is not authorized to perform: lambda:CreateFunction on resource: arn:aws:lambda:us-east-1:000000000000:function:f because no identity-based policy allows the lambda:CreateFunction action"
    );
    let listed = send(&server, &root, ("GET", FUNCTIONS), &Value::Null).await;
    assert_eq!(listed.json()["Functions"], json!([]));

    let made = send(&server, &root, ("POST", FUNCTIONS), &good("f")).await;
    assert_eq!(made.status, 201, "{}", made.text());
    until_active(&server, &root, "f").await;
    // The link to the code is for clients that sign nothing.
    let path = format!("{FUNCTIONS}/f");
    let found = send(&server, &root, ("GET", &path), &Value::Null).await;
    let location = found.json()["Code"]["Location"]
        .as_str()
        .unwrap()
        .to_owned();
    let link = location.strip_prefix(&format!("http://{}", server.address));
    assert_eq!(server.get(link.unwrap()).await.status, 200);
    use base64::Engine as _;
    let zip = super::server::zip(&[("lib.py", b"x = 1\n")]);
    let layer =
        json!({"Content": {"ZipFile": base64::engine::general_purpose::STANDARD.encode(zip)}});
    let path = "/2018-10-31/layers/lib/versions";
    let made = send(&server, &root, ("POST", path), &layer).await;
    let found = send(&server, &root, ("GET", &format!("{path}/1")), &Value::Null).await;
    for answer in [made, found] {
        let document = answer.json();
        let location = document["Content"]["Location"].as_str().unwrap();
        let link = location.strip_prefix(&format!("http://{}", server.address));
        assert_eq!(server.get(link.unwrap()).await.status, 200, "{location}");
    }
    let code = server.get("/thaw/v1/layers/lib/1/code").await;
    refused(&code, "MissingAuthenticationTokenException");
    let denied = send(&server, &invoker, ("POST", path), &layer).await;
    refused(&denied, "AccessDeniedException");
    let longer = link.unwrap().replace("Expires=600", "Expires=601");
    refused(&server.get(&longer).await, "InvalidSignatureException");
    let arn = "arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Af";
    for path in [
        format!("{FUNCTIONS}/{arn}/invocations?Qualifier=%24LATEST"),
        "/fn/f/a%20b?x=%3A".to_owned(),
    ] {
        let answer = send(&server, &invoker, ("POST", &path), &json!({"a": 1})).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        if path.starts_with("/fn/") {
            let context = answer.json()["requestContext"].clone();
            assert_eq!(context["accountId"], "000000000000");
            let iam = &context["authorizer"]["iam"];
            assert_eq!(iam["accessKey"], invoker.access_key_id);
            assert_eq!(iam["userArn"], "arn:aws:iam::000000000000:user/ci");
        }
    }
    server.stop().await;
}

pub async fn until_active(server: &Server, signer: &Signer, name: &str) {
    let path = format!("/thaw/v1/functions/{name}/progress");
    let text = send(server, signer, ("GET", &path), &Value::Null)
        .await
        .text();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["done"], true, "{text}");
}

#[tokio::test]
async fn a_key_does_what_it_may_with_the_functions_it_is_for() {
    let server = guarded().await;
    let team = key(&server, "manage", "team-*").await;
    let made = send(&server, &team, ("POST", FUNCTIONS), &good("team-a")).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let denied = "AccessDeniedException";
    for (request, body) in [
        (("POST", FUNCTIONS.to_owned()), good("other")),
        (
            ("POST", FUNCTIONS.to_owned()),
            json!({"FunctionName": "a b"}),
        ),
        (("GET", FUNCTIONS.to_owned()), Value::Null),
        (("GET", format!("{FUNCTIONS}/other")), Value::Null),
        (
            ("GET", "/thaw/v1/functions/other/logs".to_owned()),
            Value::Null,
        ),
        (("GET", "/thaw/v1/keys".to_owned()), Value::Null),
        (
            ("POST", "/thaw/v1/keys".to_owned()),
            json!({"allow": "all"}),
        ),
        (("GET", "/fn/other/".to_owned()), Value::Null),
    ] {
        let (method, path) = &request;
        let answer = send(&server, &team, (method, path), &body).await;
        refused(&answer, denied);
    }
    let found = send(
        &server,
        &team,
        ("GET", &format!("{FUNCTIONS}/team-a")),
        &Value::Null,
    )
    .await;
    assert_eq!(found.status, 200);
    // A key for all functions but not for keys makes none.
    let manager = key(&server, "manage", "*").await;
    let answer = send(
        &server,
        &manager,
        ("POST", "/thaw/v1/keys"),
        &json!({"allow": "all"}),
    )
    .await;
    refused(&answer, denied);
    let listed = send(&server, &manager, ("GET", FUNCTIONS), &Value::Null).await;
    assert_eq!(listed.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn keys_outlive_the_gateway_and_end_when_they_are_disabled_or_removed() {
    let server = guarded().await;
    let (one, two) = (
        key(&server, "all", "*").await,
        key(&server, "invoke", "*").await,
    );
    let home = server.stop().await;
    let mode = |name: &str| {
        let file = std::fs::metadata(home.path().join(name)).unwrap();
        file.permissions().mode() & 0o777
    };
    assert_eq!((mode("thaw.db"), mode(ROOT_FILE)), (0o600, 0o600));
    let server = Server::start_as(home, AuthMode::Required).await;
    let root = root(&server);
    let keys = ("GET", "/thaw/v1/keys");
    let listed = send(&server, &one, keys, &Value::Null).await;
    assert!(!listed.text().contains(&one.secret));
    let listed = listed.json();
    assert_eq!(listed["keys"].as_array().unwrap().len(), 2);
    assert_eq!(listed["required"], true);

    let path = format!("/thaw/v1/keys/{}", one.access_key_id);
    let change = async |enabled: bool| {
        let body = json!({"enabled": enabled});
        send(&server, &root, ("PUT", &path), &body).await.status
    };
    assert_eq!(change(false).await, 200);
    let answer = send(&server, &one, keys, &Value::Null).await;
    refused(&answer, "UnrecognizedClientException");
    assert_eq!(change(true).await, 200);
    assert_eq!(send(&server, &one, keys, &Value::Null).await.status, 200);
    let removed = send(&server, &root, ("DELETE", &path), &Value::Null).await;
    assert_eq!(removed.status, 200);
    let again = send(&server, &root, ("DELETE", &path), &Value::Null).await;
    assert_eq!(again.status, 404);
    let answer = send(&server, &one, keys, &Value::Null).await;
    refused(&answer, "UnrecognizedClientException");

    let bad = json!({"allow": "invoke", "name": "a b"});
    let answer = send(&server, &root, ("POST", "/thaw/v1/keys"), &bad).await;
    assert_eq!(answer.status, 400, "{}", answer.text());
    // With auth off the keys are kept, and not asked for.
    let server = Server::start_in(server.stop().await).await;
    let listed = server.get("/thaw/v1/keys").await.json();
    assert_eq!(
        listed["keys"][0]["access_key_id"],
        two.access_key_id.as_str()
    );
    assert_eq!(listed["required"], false);
    server.stop().await;
}

#[tokio::test]
async fn bodies_keep_their_limits_with_auth_on() {
    let server = guarded().await;
    let root = root(&server);
    let large = vec![b'x'; 6 * 1024 * 1024 + 1];
    let path = format!("{FUNCTIONS}/f/invocations");
    let answer = send_other(&server, &root, ("POST", &path), &large, &large).await;
    assert_eq!(answer.status, 413);
    assert_eq!(
        answer.header("x-amzn-errortype"),
        Some("RequestTooLargeException")
    );
    let path = format!("{FUNCTIONS}/f/configuration");
    let answer = send_other(&server, &root, ("PUT", &path), &large, &large).await;
    assert_eq!(
        answer.header("x-amzn-errortype"),
        Some("RequestEntityTooLargeException")
    );
    // Code may weigh more, and is read whole before it is looked at.
    let code = create("f", &large);
    let answer = send(&server, &root, ("POST", FUNCTIONS), &code).await;
    assert_eq!(
        answer.header("x-amzn-errortype"),
        Some("InvalidParameterValueException")
    );
    server.stop().await;
}

#[tokio::test]
async fn nobody_is_told_to_send_a_body_before_he_is_known() {
    let server = guarded().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST {FUNCTIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 70000000\r\nExpect: 100-continue\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 403");
    server.stop().await;
}

#[tokio::test]
async fn another_address_than_loopback_takes_auth() {
    let home = tempdir().unwrap();
    let refused = try_start_as(home.path(), "0.0.0.0:0", AuthMode::Off).await;
    let Err(StartError::NotLoopback { address }) = refused else {
        panic!("it started, or failed otherwise");
    };
    assert!(address.ip().is_unspecified());
    assert!(
        try_start_as(home.path(), "0.0.0.0:0", AuthMode::Required)
            .await
            .is_ok()
    );
}
