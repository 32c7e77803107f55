//! What keys may use, each limit at its boundary and one over.

use std::time::Instant;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tempfile::tempdir;
use thaw_api::AuthMode;
use thaw_api::auth::signer::Signer;

use super::auth::{limited, root, send, send_other, until_active};
use super::server::{Answer, Server, zip};
use super::{FUNCTIONS, create, good, refused};

const MIB: usize = 1024 * 1024;
const SETTINGS: &str = "/2016-08-19/account-settings";

async fn guarded() -> Server {
    let server = Server::start_as(tempdir().unwrap(), AuthMode::Required).await;
    server.until_healthy().await;
    server
}

async fn deploy(server: &Server, name: &str) {
    let root = root(server);
    let made = send(server, &root, ("POST", FUNCTIONS), &good(name)).await;
    assert_eq!(made.status, 201, "{}", made.text());
    until_active(server, &root, name).await;
}

async fn invoke(server: &Server, signer: &Signer, name: &str, event: &str) -> Answer {
    let path = format!("{FUNCTIONS}/{name}/invocations");
    send(server, signer, ("POST", &path), &json!(event)).await
}

fn throttled(answer: &Answer, reason: &str) -> String {
    let why = refused(answer, 429, "TooManyRequestsException");
    assert_eq!(answer.json()["Reason"], reason, "{why}");
    assert_eq!(answer.header("retry-after"), Some("1"));
    why
}

#[tokio::test]
async fn a_keys_requests_come_at_its_rate_and_no_other_keys_are_fewer() {
    let server = guarded().await;
    let slow = limited(&server, "manage", "*", json!({"rate": 1, "burst": 5})).await;
    let free = limited(&server, "manage", "*", json!({})).await;
    let forged = Signer {
        secret: free.secret.clone(),
        ..slow.clone()
    };
    let list = ("GET", FUNCTIONS);
    for _ in 0..20 {
        let answer = send(&server, &forged, list, &Value::Null).await;
        assert_eq!(answer.status, 403, "who is not the key uses nothing of it");
    }
    let began = Instant::now();
    let asked = (0..50).map(|_| send(&server, &slow, list, &Value::Null));
    let answers = join_all(asked).await;
    let earned = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    let (let_in, over): (Vec<_>, Vec<_>) = answers.iter().partition(|a| a.status == 200);
    assert!((5..=5 + earned).contains(&let_in.len()), "{}", let_in.len());
    let why = throttled(over.first().unwrap(), "CallerRateLimitExceeded");
    assert_eq!(why, "Rate Exceeded. this key may send 1 requests a second");
    let other = send(&server, &free, list, &Value::Null).await;
    assert_eq!(other.status, 200);

    // Without the body's digest the key is known only by its end: the limit is the same.
    let body = b"{}";
    let unsigned = (0..50).map(|_| send_other(&server, &slow, ("POST", FUNCTIONS), body, body));
    let answers = join_all(unsigned).await;
    assert!(answers.iter().any(|answer| answer.status == 429));
    server.stop().await;
}

/// Two invocations that the machine holds, and what comes of a third one meanwhile.
async fn third<T>(server: &Server, signer: &Signer, third: impl AsyncFnOnce() -> T) -> T {
    server.machine.hold_answers(true);
    let held = async || invoke(server, signer, "f", "hold").await.status;
    let meanwhile = async {
        let both = |server: &Server| server.machine.held_answers() == 2;
        server.until(both).await;
        let found = third().await;
        server.machine.hold_answers(false);
        found
    };
    let (first, second, found) = tokio::join!(held(), held(), meanwhile);
    assert_eq!((first, second), (200, 200));
    found
}

#[tokio::test]
async fn a_key_runs_as_many_at_once_as_it_may_over_all_functions() {
    let server = guarded().await;
    deploy(&server, "f").await;
    deploy(&server, "g").await;
    let few = limited(&server, "invoke", "*", json!({"concurrency": 2})).await;
    let other = limited(&server, "invoke", "*", json!({"concurrency": 2})).await;
    third(&server, &few, async || {
        let over = invoke(&server, &few, "g", "x").await;
        let why = throttled(&over, "ConcurrentInvocationLimitExceeded");
        assert!(why.contains("2 invocations at once"), "{why}");
        let url = send(&server, &few, ("GET", "/fn/g/"), &Value::Null).await;
        assert_eq!(url.status, 429, "{}", url.text());
        let fine = invoke(&server, &other, "g", "x").await;
        assert_eq!(fine.status, 200, "{}", fine.text());
        // One that nobody waits for waits itself.
        let path = "/2014-11-13/functions/g/invoke-async";
        let accepted = send(&server, &few, ("POST", path), &json!("later")).await;
        assert_eq!(accepted.status, 202, "{}", accepted.text());
        assert!(!server.machine.events_of("g").contains(&json!("later")));
    })
    .await;
    server
        .until(|server| server.machine.events_of("g").contains(&json!("later")))
        .await;
    assert_eq!(invoke(&server, &few, "g", "x").await.status, 200);
    let settings = send(&server, &root(&server), ("GET", SETTINGS), &Value::Null).await;
    assert_eq!(
        settings.json()["AccountLimit"]["ConcurrentExecutions"],
        1000
    );
    server.stop().await;
}

#[tokio::test]
async fn functions_that_a_key_runs_have_its_memory_together() {
    let server = guarded().await;
    deploy(&server, "f").await;
    let small = limited(&server, "invoke", "*", json!({"memory_mib": 256})).await;
    let other = limited(&server, "invoke", "*", json!({"memory_mib": 128})).await;
    third(&server, &small, async || {
        let over = invoke(&server, &small, "f", "x").await;
        let why = throttled(&over, "ConcurrentInvocationLimitExceeded");
        assert!(
            why.contains("256 MiB run, and this function has 128"),
            "{why}"
        );
        let fine = invoke(&server, &other, "f", "x").await;
        assert_eq!(fine.status, 200, "{}", fine.text());
    })
    .await;
    assert_eq!(invoke(&server, &small, "f", "x").await.status, 200);
    server.stop().await;
}

/// A zip of so many bytes, near a MiB: one that does not compress, and a comment.
fn zip_of(bytes: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut noise = vec![0; bytes - 30_000];
    for byte in &mut noise {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state.to_le_bytes()[0];
    }
    let mut zip = zip(&[("noise", &noise)]);
    let comment = u16::try_from(bytes - zip.len()).unwrap();
    zip.truncate(zip.len() - 2);
    zip.extend(comment.to_le_bytes());
    zip.resize(bytes, b' ');
    zip
}

#[tokio::test]
async fn a_key_stores_as_much_as_it_may_and_a_restart_forgets_nothing_of_it() {
    let server = guarded().await;
    let key = limited(&server, "manage", "*", json!({"storage_mib": 2})).await;
    let other = limited(&server, "manage", "*", json!({"storage_mib": 2})).await;
    let exceeded = |answer: &Answer| refused(answer, 400, "CodeStorageExceededException");
    let make = async |server: &Server, signer: &Signer, name: &str, bytes: usize| {
        let body = create(name, &zip_of(bytes));
        send(server, signer, ("POST", FUNCTIONS), &body).await
    };
    // One that is published with its making takes room for both, or is not made.
    let mut published = create("f", &zip_of(MIB + 1));
    published["Publish"] = true.into();
    exceeded(&send(&server, &key, ("POST", FUNCTIONS), &published).await);
    let made = make(&server, &key, "f", MIB).await;
    assert_eq!(made.status, 201, "{}", made.text());
    until_active(&server, &key, "f").await;

    let layer = async |server: &Server, bytes: usize| {
        use base64::Engine as _;
        let code = base64::engine::general_purpose::STANDARD.encode(zip_of(bytes));
        let body = json!({"Content": {"ZipFile": code}});
        let path = "/2018-10-31/layers/lib/versions";
        send(server, &key, ("POST", path), &body).await
    };
    let why = exceeded(&layer(&server, MIB + 1).await);
    assert!(
        why.starts_with("Code storage limit exceeded. this key may store 2 MiB"),
        "{why}"
    );
    let published = layer(&server, MIB).await;
    assert_eq!(published.status, 201, "{}", published.text());
    exceeded(&make(&server, &key, "g", MIB).await);
    let versions = format!("{FUNCTIONS}/f/versions");
    exceeded(&send(&server, &key, ("POST", &versions), &Value::Null).await);
    let fine = make(&server, &other, "g", MIB).await;
    assert_eq!(fine.status, 201, "{}", fine.text());

    // Other code takes the place of what was there.
    let update = async |server: &Server, bytes: usize| {
        let body: Value = create("f", &zip_of(bytes))["Code"].clone();
        send(server, &key, ("PUT", &format!("{FUNCTIONS}/f/code")), &body).await
    };
    exceeded(&update(&server, MIB + 1).await);
    let updated = update(&server, MIB).await;
    assert_eq!(updated.status, 200, "{}", updated.text());

    let server = Server::start_as(server.stop().await, AuthMode::Required).await;
    server.until_healthy().await;
    exceeded(&make(&server, &key, "h", MIB).await);
    let settings = send(&server, &key, ("GET", SETTINGS), &Value::Null)
        .await
        .json();
    assert_eq!(settings["AccountLimit"]["TotalCodeSize"], 2 * MIB);
    assert_eq!(settings["AccountUsage"]["TotalCodeSize"], 2 * MIB);
    let gone = "/2018-10-31/layers/lib/versions/1";
    let removed = send(&server, &key, ("DELETE", gone), &Value::Null).await;
    assert_eq!(removed.status, 204, "{}", removed.text());
    assert_eq!(make(&server, &key, "h", MIB).await.status, 201);

    // More may be stored from now on, and what was not named stays as it was.
    exceeded(&make(&server, &key, "i", MIB).await);
    let path = format!("/thaw/v1/keys/{}", key.access_key_id);
    let change = async |body: Value| send(&server, &root(&server), ("PUT", &path), &body).await;
    let changed = change(json!({"limits": {"storage_mib": 3, "concurrency": 7}})).await;
    assert_eq!(changed.status, 200, "{}", changed.text());
    assert_eq!(
        change(json!({"enabled": true})).await.json()["limits"]["storage_mib"],
        3
    );
    assert_eq!(make(&server, &key, "i", MIB).await.status, 201);
    let settings = send(&server, &key, ("GET", SETTINGS), &Value::Null)
        .await
        .json();
    assert_eq!(settings["AccountLimit"]["ConcurrentExecutions"], 7);
    for wrong in [
        json!({"limits": {"rate": 0}}),
        json!({"limits": {"burst": 1}}),
    ] {
        assert_eq!(change(wrong).await.status, 400);
    }
    server.stop().await;
}
