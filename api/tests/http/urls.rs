//! Function URLs that were configured.

use serde_json::{Value, json};

use super::server::{Answer, Server};
use super::{FUNCTIONS, good, refused};

const CONFIG: &str = "/2021-10-31/functions/f/url";

/// A function `f` with the version 1 and the alias `live` for it.
async fn deployed() -> Server {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    server
        .post(&format!("{FUNCTIONS}/f/versions"), &json!({}))
        .await;
    server.version_deployed("f", "1").await;
    let alias = json!({"Name": "live", "FunctionVersion": "1"});
    server.post(&format!("{FUNCTIONS}/f/aliases"), &alias).await;
    server
}

async fn put(server: &Server, path: &str, body: &Value) -> Answer {
    let body = body.to_string();
    server.send("PUT", path, &[], body.as_bytes()).await
}

#[tokio::test]
async fn urls_are_configured_read_listed_and_deleted() {
    let server = deployed().await;
    let missing = server.get(CONFIG).await;
    refused(&missing, 404, "ResourceNotFoundException");
    let made = server.post(CONFIG, &json!({"AuthType": "NONE"})).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let view = made.json();
    assert_eq!(
        view["FunctionUrl"],
        format!("http://{}/fn/f/", server.address)
    );
    assert_eq!(view["InvokeMode"], "BUFFERED");
    let again = server.post(CONFIG, &json!({"AuthType": "NONE"})).await;
    refused(&again, 409, "ResourceConflictException");
    let of_alias = format!("{CONFIG}?Qualifier=live");
    let alias = server
        .post(&of_alias, &json!({"AuthType": "AWS_IAM"}))
        .await
        .json();
    assert!(alias["FunctionArn"].as_str().unwrap().ends_with(":f:live"));
    let cors = json!({"Cors": {"AllowOrigins": ["*"], "MaxAge": 5}});
    let changed = put(&server, CONFIG, &cors).await.json();
    assert_eq!(
        (&changed["AuthType"], &changed["Cors"]),
        (&json!("NONE"), &cors["Cors"])
    );
    let listed = server.get("/2021-10-31/functions/f/urls").await.json();
    assert_eq!(listed["FunctionUrlConfigs"], json!([changed, alias]));

    for (path, body, code) in [
        (CONFIG, json!({"AuthType": "SOME"}), "ValidationException"),
        (CONFIG, json!({"InvokeMode": "X"}), "ValidationException"),
        (
            CONFIG,
            json!({"Cors": {"MaxAge": 86_401}}),
            "ValidationException",
        ),
        (
            CONFIG,
            json!({"Cors": {"AllowOrigins": ["a\nb"]}}),
            "ValidationException",
        ),
        (
            "/2021-10-31/functions/f/url?Qualifier=1",
            json!({}),
            "ValidationException",
        ),
    ] {
        refused(&put(&server, path, &body).await, 400, code);
    }
    // A later alias of the same name has no URL of its own yet.
    let aliases = format!("{FUNCTIONS}/f/aliases");
    let path = format!("{aliases}/live");
    assert_eq!(server.send("DELETE", &path, &[], b"").await.status, 204);
    let again = json!({"Name": "live", "FunctionVersion": "1"});
    assert_eq!(server.post(&aliases, &again).await.status, 201);
    refused(
        &server.get(&of_alias).await,
        404,
        "ResourceNotFoundException",
    );
    assert_eq!(server.send("DELETE", CONFIG, &[], b"").await.status, 204);
    refused(&server.get(CONFIG).await, 404, "ResourceNotFoundException");
    server.stop().await;
}

#[tokio::test]
async fn a_url_answers_by_path_and_by_host_as_what_it_was_made_for() {
    let server = deployed().await;
    server
        .post(
            &format!("{CONFIG}?Qualifier=live"),
            &json!({"AuthType": "NONE"}),
        )
        .await;
    let by_path = server.get("/fn/f:live/a%20b?x=1").await;
    let event = by_path.json();
    assert_eq!(event["rawPath"], "/a%20b");
    let invoked = server.machine.arns();
    assert!(invoked[0].ends_with(":function:f:live"), "{invoked:?}");
    let id = event["requestContext"]["apiId"].as_str().unwrap();
    let host = format!("{id}.lambda-url.us-east-1.localhost:1234");
    // Paths of the gateway's own mean nothing there.
    let by_host = server
        .send("GET", "/healthz", &[("Host", &host)], b"")
        .await;
    assert_eq!(by_host.json()["rawPath"], "/healthz");
    assert_eq!(by_host.json()["requestContext"]["apiId"], id);
    assert_eq!(by_host.json()["requestContext"]["domainPrefix"], id);
    let unknown = [("Host", "0.lambda-url.us-east-1.localhost")];
    let other = server.send("GET", "/healthz", &unknown, b"").await;
    assert_eq!(
        (other.status, other.text().as_str()),
        (403, r#"{"Message":null}"#)
    );
    assert_eq!(
        other.header("x-amzn-errortype"),
        Some("AccessDeniedException")
    );
    let gone = server.get("/fn/f:nope/").await;
    assert_eq!(gone.status, 403);
    assert_eq!(
        gone.header("x-amzn-errortype"),
        Some("AccessDeniedException")
    );
    assert_eq!(server.get("/fn/nope/").await.status, 404);
    server.stop().await;
}

#[tokio::test]
async fn browsers_are_told_what_they_may() {
    let server = deployed().await;
    let cors = json!({"AuthType": "NONE", "Cors": {"AllowOrigins": ["https://a.example"], "AllowMethods": ["GET"]}});
    server.post(CONFIG, &cors).await;
    let asked = [
        ("Origin", "https://a.example"),
        ("Access-Control-Request-Method", "GET"),
    ];
    let granted = server.send("OPTIONS", "/fn/f/x", &asked, b"").await;
    assert_eq!(granted.status, 200);
    assert_eq!(granted.header("access-control-allow-methods"), Some("GET"));
    assert!(
        server.machine.arns().is_empty(),
        "the function is not asked"
    );
    for (origin, told) in [
        ("https://a.example", Some("https://a.example")),
        ("https://b.example", None),
    ] {
        let answer = server
            .send("GET", "/fn/f/", &[("Origin", origin)], b"")
            .await;
        assert_eq!(answer.header("access-control-allow-origin"), told);
    }
    server.stop().await;
}
