//! Operations answer as AWS does: what is not there, what is refused, what changes a revision.

use serde_json::{Value, json};

use crate::server::{Answer, Server};
use crate::{FUNCTIONS, good, refused};

const ARN: &str = "arn:aws:lambda:us-east-1:000000000000:function";
const MISSING: &str = "ResourceNotFoundException";
const INVALID: &str = "InvalidParameterValueException";
const VALIDATION: &str = "ValidationException";
/// The resource that an operation asks for is not there.
const NO_RESOURCE: &str = "The resource you requested does not exist.";

async fn with_body(server: &Server, method: &str, path: &str, body: &Value) -> Answer {
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    server.send(method, path, &[], body.as_bytes()).await
}

async fn deployed(server: &Server, name: &str) {
    let made = server.post(FUNCTIONS, &good(name)).await;
    assert_eq!(made.status, 201, "{}", made.text());
    server.deployed(name).await;
}

#[tokio::test]
async fn each_operation_says_in_its_own_words_what_is_not_there() {
    let server = Server::start().await;
    deployed(&server, "f").await;
    let permission =
        json!({"StatementId": "s", "Action": "lambda:InvokeFunction", "Principal": "*"});
    let destination = json!({"MaximumRetryAttempts": 1});
    let (url, policy) = ("/2021-10-31/functions", "/2015-03-31/functions");
    let (events, ready) = ("/2019-09-25/functions", "/2019-09-30/functions");
    let signing = "/2020-04-22/code-signing-configs/csc-1";
    let none = Value::Null;
    let cases = [
        ("GET", format!("{url}/n/url"), &none, NO_RESOURCE),
        ("POST", format!("{url}/n/url"), &json!({"AuthType": "NONE"}), "Function does not exist"),
        ("GET", format!("{url}/n/urls"), &none, "Function does not exist"),
        ("GET", format!("{policy}/n/policy"), &none, NO_RESOURCE),
        ("POST", format!("{policy}/n/policy"), &permission, "Function not found: {ARN}:n"),
        ("POST", format!("{policy}/f/policy?Qualifier=a"), &permission, "Cannot find alias arn: {ARN}:f:a"),
        ("POST", format!("{policy}/f/policy?Qualifier=7"), &permission, "Function not found: {ARN}:f:7"),
        ("DELETE", format!("{policy}/n/policy/s"), &none, "No policy found for: {ARN}:n"),
        ("PUT", format!("{events}/n/event-invoke-config"), &destination, "The function doesn't exist."),
        ("GET", format!("{events}/n/event-invoke-config"), &none, "The function {ARN}:n:$LATEST doesn't have an EventInvokeConfig"),
        ("GET", format!("{ready}/f/provisioned-concurrency?Qualifier=a"), &none, "Cannot find alias arn: {ARN}:f:a"),
        ("GET", format!("{policy}/f/aliases/a"), &none, "Cannot find alias arn: {ARN}:f:a"),
        ("PUT", format!("{policy}/f/aliases/a"), &json!({}), "Alias not found: {ARN}:f:a"),
        ("POST", format!("{policy}/n/aliases"), &json!({"Name": "a", "FunctionVersion": "1"}), "Function not found: {ARN}:n:1"),
        ("PUT", "/2017-10-31/functions/n/concurrency".to_owned(), &json!({"ReservedConcurrentExecutions": 1}), "Function not found: {ARN}:n:$LATEST"),
        ("DELETE", format!("{policy}/n?Qualifier=1"), &none, "Function not found: {ARN}:n"),
        ("GET", "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aeu-west-1%3A000000000000%3Afunction%3Af".to_owned(), &none,
            "Functions from 'eu-west-1' are not reachable in this region ('us-east-1')"),
        ("GET", "/2015-03-31/event-source-mappings/u".to_owned(), &none, NO_RESOURCE),
        ("GET", signing.to_owned(), &none, "The Lambda code signing configuration csc-1 can not be found."),
        ("GET", "/2017-03-31/tags/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Aevent-source-mapping%3Au".to_owned(), &none,
            "Event source mapping not found: arn:aws:lambda:us-east-1:000000000000:event-source-mapping:u"),
    ];
    for (method, path, body, message) in cases {
        let answer = with_body(&server, method, &path, body).await;
        let told = refused(&answer, 404, MISSING);
        assert_eq!(told, message.replace("{ARN}", ARN), "{method} {path}");
    }
    // What is to go and is not there is gone.
    for gone in ["?Qualifier=9", "?Qualifier=%24latest"] {
        let path = format!("{FUNCTIONS}/f{gone}");
        assert_eq!(with_body(&server, "DELETE", &path, &none).await.status, 204);
    }
    server.stop().await;
}

#[tokio::test]
async fn names_and_values_are_refused_in_the_models_words() {
    let server = Server::start().await;
    deployed(&server, "f").await;
    let alias = json!({"Name": "a", "FunctionVersion": "1", "RoutingConfig": {"AdditionalVersionWeights": {"$LATEST": 0.5}}});
    let weight = json!({"Name": "a", "FunctionVersion": "1", "RoutingConfig": {"AdditionalVersionWeights": {"2": 2}}});
    let latest = json!({"Name": "a", "FunctionVersion": "$LATEST", "RoutingConfig": {"AdditionalVersionWeights": {"1": 0.5}}});
    let aliases = format!("{FUNCTIONS}/f/aliases");
    let ready = "/2019-09-30/functions/f/provisioned-concurrency?Qualifier=%24LATEST";
    let architecture = |list: Value| {
        let mut body = good("g");
        body["Architectures"] = list;
        body
    };
    let none = Value::Null;
    let cases = [
        (
            "GET",
            format!("{FUNCTIONS}/f%21?Qualifier=x%21"),
            &none,
            VALIDATION,
            "2 validation errors detected: Value 'f!' at 'functionName'",
        ),
        (
            "DELETE",
            format!("{FUNCTIONS}/n?Qualifier=%24LATEST"),
            &none,
            INVALID,
            "$LATEST version cannot be deleted",
        ),
        (
            "DELETE",
            format!("{FUNCTIONS}/n?Qualifier=a"),
            &none,
            INVALID,
            "Deletion of aliases is not currently supported.",
        ),
        (
            "POST",
            aliases.clone(),
            &alias,
            VALIDATION,
            "1 validation error detected: Value '{$LATEST=0.5}' at 'routingConfig.additionalVersionWeights' failed to satisfy constraint: Map keys",
        ),
        (
            "POST",
            aliases.clone(),
            &weight,
            VALIDATION,
            "1 validation error detected: Value '{2=2.0}' at",
        ),
        (
            "POST",
            aliases,
            &latest,
            INVALID,
            "$LATEST is not supported for an alias",
        ),
        (
            "GET",
            ready.to_owned(),
            &none,
            INVALID,
            "The function resource provided must be an alias or a published version.",
        ),
        (
            "GET",
            "/2021-10-31/functions/n/url?Qualifier=1".to_owned(),
            &none,
            VALIDATION,
            "1 validation error detected: Value '1' at 'qualifier'",
        ),
        (
            "POST",
            FUNCTIONS.to_owned(),
            &architecture(json!(["x86_64", "arm64"])),
            VALIDATION,
            "1 validation error detected: Value '[x86_64, arm64]' at 'architectures'",
        ),
        (
            "POST",
            FUNCTIONS.to_owned(),
            &architecture(json!(["X86_64"])),
            VALIDATION,
            "1 validation error detected: Value '[X86_64]' at 'architectures'",
        ),
        (
            "PUT",
            "/2017-10-31/functions/f%3A1/concurrency".to_owned(),
            &json!({"ReservedConcurrentExecutions": 1}),
            INVALID,
            "This operation is permitted on Lambda functions only.",
        ),
        (
            "PUT",
            "/2024-08-31/functions/f/recursion-config".to_owned(),
            &json!({"RecursiveLoop": "Maybe"}),
            VALIDATION,
            "1 validation error detected: Value 'Maybe' at 'recursiveLoop'",
        ),
        (
            "PUT",
            "/2021-07-20/functions/f/runtime-management-config".to_owned(),
            &json!({"UpdateRuntimeOn": "Manual"}),
            INVALID,
            "UpdateRuntimeOn must be Auto",
        ),
        (
            "PUT",
            format!("{FUNCTIONS}/f/configuration"),
            &json!({"DeadLetterConfig": {"TargetArn": "arn:aws:sqs:us-east-1:000000000000:q"}}),
            INVALID,
            "DeadLetterConfig is not supported",
        ),
        (
            "PUT",
            format!("{FUNCTIONS}/f/configuration"),
            &json!({"KMSKeyArn": "arn:aws:kms:us-east-1:000000000000:key/k"}),
            INVALID,
            "KMSKeyArn is not supported",
        ),
        (
            "PUT",
            format!("{FUNCTIONS}/f/configuration"),
            &json!({"TracingConfig": {"Mode": "active"}}),
            VALIDATION,
            "1 validation error detected: Value 'active' at 'tracingConfig.mode'",
        ),
        (
            "PUT",
            format!("{FUNCTIONS}/f/configuration"),
            &json!({"LoggingConfig": {"SystemLogLevel": "INFO"}}),
            INVALID,
            "LogLevel is not supported when LogFormat",
        ),
    ];
    for (method, path, body, code, begin) in cases {
        let told = refused(&with_body(&server, method, &path, body).await, 400, code);
        assert!(told.starts_with(begin), "{method} {path}: {told}");
    }
    let mut elsewhere = good("g");
    elsewhere["FunctionName"] = "arn:aws:lambda:us-east-1:123456789012:function:g".into();
    let denied = server.post(FUNCTIONS, &elsewhere).await;
    assert_eq!(denied.status, 403);
    assert_eq!(denied.json(), json!({"Message": null}));
    let mut signed = good("g");
    signed["CodeSigningConfigArn"] = "csc".into();
    let told = server.post(FUNCTIONS, &signed).await;
    assert_eq!(
        told.header("x-amzn-errortype"),
        Some("CodeSigningConfigNotFoundException")
    );
    server.stop().await;
}

#[tokio::test]
async fn whatever_changes_a_function_changes_its_revision() {
    let server = Server::start().await;
    let revision = async || {
        let path = format!("{FUNCTIONS}/f/configuration");
        let view = server.get(&path).await.json();
        view["RevisionId"].as_str().unwrap().to_owned()
    };
    let made = server.post(FUNCTIONS, &good("f")).await.json();
    server.deployed("f").await;
    let mut seen = vec![made["RevisionId"].as_str().unwrap().to_owned()];
    seen.push(revision().await);
    let change = json!({"Description": "d", "RevisionId": seen[1]});
    let path = format!("{FUNCTIONS}/f/configuration");
    let changed = with_body(&server, "PUT", &path, &change).await.json();
    seen.push(changed["RevisionId"].as_str().unwrap().to_owned());
    server.deployed("f").await;
    seen.push(revision().await);
    let versions = format!("{FUNCTIONS}/f/versions");
    let published = server
        .post(&versions, &json!({"RevisionId": seen[3]}))
        .await;
    assert_eq!(published.status, 201, "{}", published.text());
    seen.push(revision().await);
    // Nothing new to publish, nothing changed.
    server.post(&versions, &json!({})).await;
    assert_eq!(seen[4], revision().await);
    let tags = "/2017-03-31/tags/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Af";
    server.post(tags, &json!({"Tags": {"a": "b"}})).await;
    seen.push(revision().await);
    let policy = format!("{FUNCTIONS}/f/policy");
    let statement = |id: &str, revision: &str| json!({"StatementId": id, "Action": "lambda:InvokeFunction", "Principal": "s3.amazonaws.com", "RevisionId": revision});
    let stale = server.post(&policy, &statement("s", &seen[4])).await;
    let told = refused(&stale, 412, "PreconditionFailedException");
    assert!(told.contains("Call the GetPolicy API"), "{told}");
    let added = server.post(&policy, &statement("s", &seen[5])).await;
    assert_eq!(added.status, 201, "{}", added.text());
    seen.push(revision().await);
    assert_eq!(server.get(&policy).await.json()["RevisionId"], seen[6]);
    let mut unique = seen.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), seen.len(), "{seen:?}");
    // An alias's policy has the alias's.
    let alias = json!({"Name": "a", "FunctionVersion": "1"});
    let alias = server.post(&format!("{FUNCTIONS}/f/aliases"), &alias).await;
    let of_alias = alias.json()["RevisionId"].as_str().unwrap().to_owned();
    let path = format!("{policy}?Qualifier=a");
    let added = server.post(&path, &statement("s", &of_alias)).await;
    assert_eq!(added.status, 201, "{}", added.text());
    let alias = server.get(&format!("{FUNCTIONS}/f/aliases/a")).await.json();
    assert_ne!(alias["RevisionId"], of_alias);
    assert_eq!(
        server.get(&path).await.json()["RevisionId"],
        alias["RevisionId"]
    );
    server.stop().await;
}

#[tokio::test]
async fn what_is_deployed_before_the_images_are_there_is_frozen_once() {
    let server = Server::without_images().await;
    server.machine.hold_freezes();
    assert_eq!(server.post(FUNCTIONS, &good("f")).await.status, 201);
    server.until(|server| server.machine.freezes() == 1).await;
    server.machine.release_images();
    server.until_healthy().await;
    server.machine.release_freezes();
    server.deployed("f").await;
    assert_eq!(server.machine.freezes(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_published_version_is_active_at_once_and_its_invocations_wait_for_it() {
    let server = Server::start().await;
    deployed(&server, "f").await;
    server.machine.hold_freezes();
    let published = server
        .post(&format!("{FUNCTIONS}/f/versions"), &json!({}))
        .await
        .json();
    assert_eq!(published["State"], "Active");
    assert_eq!(published["LastUpdateStatus"], "Successful");
    let path = format!("{FUNCTIONS}/f/invocations?Qualifier=1");
    let answered = async {
        let answer = server.send("POST", &path, &[], b"{\"a\":1}").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "{\"a\":1}"));
        assert_eq!(answer.header("x-amz-executed-version"), Some("1"));
    };
    let released = async {
        server.until(|server| server.machine.freezes() == 2).await;
        assert_eq!(server.machine.arns(), Vec::<String>::new());
        server.machine.release_freezes();
    };
    tokio::join!(answered, released);
    // One that is deleted meanwhile is not waited for.
    server.machine.hold_freezes();
    let change = json!({"Description": "other"});
    let path = format!("{FUNCTIONS}/f/configuration");
    with_body(&server, "PUT", &path, &change).await;
    server.machine.release_freezes();
    server.deployed("f").await;
    server.machine.hold_freezes();
    server
        .post(&format!("{FUNCTIONS}/f/versions"), &json!({}))
        .await;
    let path = format!("{FUNCTIONS}/f/invocations?Qualifier=2");
    let ended = async { server.send("POST", &path, &[], b"{}").await };
    let deleted = async {
        server.until(|server| server.machine.freezes() == 4).await;
        let path = format!("{FUNCTIONS}/f?Qualifier=2");
        with_body(&server, "DELETE", &path, &Value::Null).await
    };
    let (ended, deleted) = tokio::join!(ended, deleted);
    assert_eq!(deleted.status, 204);
    refused(&ended, 404, MISSING);
    server.machine.release_freezes();
    let path = format!("{FUNCTIONS}/f/configuration?Qualifier=1");
    let after = server.get(&path).await.json();
    assert_eq!(after["RevisionId"], published["RevisionId"]);
    server.stop().await;
}

#[tokio::test]
async fn settings_are_kept_and_shown() {
    let server = Server::start().await;
    let mut body = good("f");
    body["LoggingConfig"] = json!({"LogFormat": "JSON", "SystemLogLevel": "WARN"});
    body["TracingConfig"] = json!({"Mode": "Active"});
    body["Environment"] = json!({"Variables": {}});
    body["Publish"] = true.into();
    let made = server.post(FUNCTIONS, &body).await.json();
    assert_eq!(made["FunctionArn"], format!("{ARN}:f"));
    assert_eq!(
        (&made["Version"], &made["State"]),
        (&json!("1"), &json!("Pending"))
    );
    let first = server
        .get(&format!("{FUNCTIONS}/f/configuration?Qualifier=1"))
        .await
        .json();
    assert_eq!(first["State"], "Active");
    assert_ne!(first["RevisionId"], made["RevisionId"]);
    assert_eq!(made["Environment"], json!({"Variables": {}}));
    server.deployed("f").await;
    let path = format!("{FUNCTIONS}/f/configuration");
    let view = server.get(&path).await.json();
    assert_eq!(
        view["LoggingConfig"],
        json!({"LogFormat": "JSON", "ApplicationLogLevel": "INFO", "SystemLogLevel": "WARN", "LogGroup": "/aws/lambda/f"})
    );
    let listed = server.get(FUNCTIONS).await.json();
    assert!(listed["Functions"][0].get("RuntimeVersionConfig").is_none());
    assert!(view["RuntimeVersionConfig"]["RuntimeVersionArn"].is_string());
    let change = json!({"LoggingConfig": {"LogFormat": "Text", "LogGroup": "mine"}});
    let changed = with_body(&server, "PUT", &path, &change).await.json();
    assert_eq!(changed["LastUpdateStatusReasonCode"], "Creating");
    assert_eq!(changed["TracingConfig"], json!({"Mode": "Active"}));
    assert_eq!(
        changed["LoggingConfig"],
        json!({"LogFormat": "Text", "LogGroup": "mine"})
    );
    server.deployed("f").await;
    let loops = "/2024-08-31/functions/f/recursion-config";
    assert_eq!(
        server.get(loops).await.json(),
        json!({"RecursiveLoop": "Terminate"})
    );
    let allow = json!({"RecursiveLoop": "Allow"});
    assert_eq!(with_body(&server, "PUT", loops, &allow).await.json(), allow);
    assert_eq!(server.get(loops).await.json(), allow);
    let runtime = "/2021-07-20/functions/f/runtime-management-config";
    let managed = json!({"UpdateRuntimeOn": "Auto"});
    let managed = with_body(&server, "PUT", runtime, &managed).await.json();
    assert_eq!(managed, server.get(runtime).await.json());
    server.stop().await;
}
