//! Reserved and provisioned concurrency.

use serde_json::{Value, json};

use super::machine::READY_MAX;
use super::server::Server;
use super::versions::{ARN, change_code, delete, published, put};
use super::{FUNCTIONS, refused};

#[tokio::test]
async fn reserved_concurrency_bounds_all_versions_together() {
    let server = published().await;
    let path = "/2017-10-31/functions/f/concurrency";
    let reserve = |count: i64| json!({"ReservedConcurrentExecutions": count});
    let made = put(&server, path, &reserve(1)).await;
    assert_eq!((made.status, made.json()), (200, reserve(1)));
    let read = server.get("/2019-09-30/functions/f/concurrency").await;
    assert_eq!(read.json(), reserve(1));
    let found = server.get(&format!("{FUNCTIONS}/f")).await.json();
    assert_eq!(found["Concurrency"], reserve(1));
    let account = server.get("/2016-08-19/account-settings").await.json();
    assert_eq!(
        account["AccountLimit"]["UnreservedConcurrentExecutions"],
        999
    );
    assert_eq!(account["AccountUsage"]["FunctionCount"], 1);

    server.machine.hold_answers(true);
    let invoke = format!("{FUNCTIONS}/f/invocations");
    let first = server.send("POST", &invoke, &[], b"\"hold\"");
    let second = async {
        server
            .until(|server| server.machine.held_answers() == 1)
            .await;
        let path = format!("{FUNCTIONS}/f:1/invocations");
        let throttled = server.send("POST", &path, &[], b"1").await;
        let url = server.get("/fn/f/").await;
        server.machine.hold_answers(false);
        (throttled, url)
    };
    let (first, (throttled, url)) = tokio::join!(first, second);
    assert_eq!(first.status, 200, "{}", first.text());
    assert_eq!(
        refused(&throttled, 429, "TooManyRequestsException"),
        "Rate Exceeded."
    );
    assert_eq!(
        throttled.json()["Reason"],
        "ReservedFunctionConcurrentInvocationLimitExceeded"
    );
    assert_eq!(throttled.header("retry-after"), Some("1"));
    assert_eq!(url.status, 429);
    assert_eq!(server.send("POST", &invoke, &[], b"1").await.status, 200);

    refused(
        &put(&server, path, &reserve(901)).await,
        400,
        "InvalidParameterValueException",
    );
    refused(
        &put(&server, path, &reserve(-1)).await,
        400,
        "ValidationException",
    );
    put(&server, path, &reserve(0)).await;
    let none = server.send("POST", &invoke, &[], b"1").await;
    refused(&none, 429, "TooManyRequestsException");
    assert_eq!(delete(&server, path).await.status, 204);
    assert_eq!(
        server
            .get("/2019-09-30/functions/f/concurrency")
            .await
            .json(),
        json!({})
    );
    assert_eq!(server.send("POST", &invoke, &[], b"1").await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn provisioned_concurrency_follows_its_alias_and_ends_with_it() {
    let server = published().await;
    let path = |qualifier: &str| {
        format!("/2019-09-30/functions/f/provisioned-concurrency?Qualifier={qualifier}")
    };
    let want = |count: i64| json!({"ProvisionedConcurrentExecutions": count});
    change_code(&server, "x = 2\n", true).await;
    server.version_deployed("f", "2").await;
    let aliases = format!("{FUNCTIONS}/f/aliases");
    let alias = json!({"Name": "live", "FunctionVersion": "1"});
    server.post(&aliases, &alias).await;

    let none = server.get(&path("live")).await;
    let code = "ProvisionedConcurrencyConfigNotFoundException";
    refused(&none, 404, code);
    let made = put(&server, &path("live"), &want(4)).await;
    assert_eq!(made.status, 202, "{}", made.text());
    let read = server.get(&path("live")).await.json();
    for (member, value) in [
        ("RequestedProvisionedConcurrentExecutions", json!(4)),
        ("AllocatedProvisionedConcurrentExecutions", json!(4)),
        ("AvailableProvisionedConcurrentExecutions", json!(4)),
        ("Status", json!("READY")),
        ("StatusReason", Value::Null),
    ] {
        assert_eq!(read[member], value, "{member}");
    }
    put(
        &server,
        &path("live"),
        &want(i64::try_from(READY_MAX).unwrap() + 1),
    )
    .await;
    let read = server.get(&path("live")).await.json();
    assert_eq!(read["Status"], "FAILED", "{read}");
    let reason = read["StatusReason"].as_str().unwrap();
    assert!(reason.contains("memory for 12 of 13 sandboxes"), "{reason}");
    put(&server, &path("live"), &want(4)).await;
    let overlapping = put(&server, &path("1"), &want(1)).await;
    refused(&overlapping, 409, "ResourceConflictException");

    // A canary takes its share, and without it the version of the alias has none.
    let weights = json!({"RoutingConfig": {"AdditionalVersionWeights": {"2": 0.25}}});
    put(&server, &format!("{aliases}/live"), &weights).await;
    assert_eq!(server.machine.ready("f:1"), 3);
    assert_eq!(server.machine.ready("f:2"), 1);
    let moved = json!({"FunctionVersion": "2", "RoutingConfig": {"AdditionalVersionWeights": {}}});
    put(&server, &format!("{aliases}/live"), &moved).await;
    assert_eq!(server.machine.ready("f:1"), 0);
    assert_eq!(server.machine.ready("f:2"), 4);

    let direct = put(&server, &path("1"), &want(2)).await;
    assert_eq!(direct.status, 202, "{}", direct.text());
    let list = "/2019-09-30/functions/f/provisioned-concurrency?List=ALL";
    let listed = server.get(list).await.json();
    let arns: Vec<_> = (listed["ProvisionedConcurrencyConfigs"]
        .as_array()
        .unwrap()
        .iter())
    .map(|config| config["FunctionArn"].as_str().unwrap().to_owned())
    .collect();
    assert_eq!(arns, [format!("{ARN}:f:1"), format!("{ARN}:f:live")]);

    let reserved = json!({"ReservedConcurrentExecutions": 5});
    let reserve = "/2017-10-31/functions/f/concurrency";
    let too_few = put(&server, reserve, &reserved).await;
    refused(&too_few, 400, "InvalidParameterValueException");

    assert_eq!(delete(&server, &path("1")).await.status, 204);
    assert_eq!(
        delete(&server, &format!("{aliases}/live")).await.status,
        204
    );
    assert_eq!(server.machine.ready("f:2"), 0);
    let left = server.get(list).await.json();
    assert_eq!(left["ProvisionedConcurrencyConfigs"], json!([]));
    server.stop().await;
}

#[tokio::test]
async fn provisioned_concurrency_is_of_published_versions_and_within_the_limits() {
    let server = published().await;
    let path =
        |qualifier: &str| format!("/2019-09-30/functions/f/provisioned-concurrency{qualifier}");
    let want = |count: i64| json!({"ProvisionedConcurrentExecutions": count});
    for (qualifier, body, status, code) in [
        ("", want(1), 400, "ValidationException"),
        ("?Qualifier=1", json!({}), 400, "ValidationException"),
        ("?Qualifier=1", want(0), 400, "ValidationException"),
        ("?Qualifier=9", want(1), 404, "ResourceNotFoundException"),
        (
            "?Qualifier=$LATEST",
            want(1),
            400,
            "InvalidParameterValueException",
        ),
        (
            "?Qualifier=1",
            want(901),
            400,
            "InvalidParameterValueException",
        ),
    ] {
        let answer = put(&server, &path(qualifier), &body).await;
        refused(&answer, status, code);
    }
    let reserve = "/2017-10-31/functions/f/concurrency";
    put(
        &server,
        reserve,
        &json!({"ReservedConcurrentExecutions": 2}),
    )
    .await;
    let above = put(&server, &path("?Qualifier=1"), &want(3)).await;
    refused(&above, 400, "InvalidParameterValueException");
    let made = put(&server, &path("?Qualifier=1"), &want(2)).await;
    assert_eq!(made.status, 202, "{}", made.text());
    // All that is reserved is provisioned for the version: none is left for others.
    for (qualifier, status) in [("", 429), (":1", 200)] {
        let invoke = format!("{FUNCTIONS}/f{qualifier}/invocations");
        let answer = server.send("POST", &invoke, &[], b"1").await;
        assert_eq!(answer.status, status, "{qualifier} {}", answer.text());
    }

    // It is kept, and a start of the gateway keeps it up.
    let server = Server::start_in(server.stop().await).await;
    server
        .until(|server| server.machine.ready("f:1") == 2)
        .await;
    let gone = delete(&server, &format!("{FUNCTIONS}/f?Qualifier=1")).await;
    assert_eq!(gone.status, 204, "{}", gone.text());
    let list = server.get(&path("?List=ALL")).await.json();
    assert_eq!(list["ProvisionedConcurrencyConfigs"], json!([]));
    server.stop().await;
}
