//! Versions, aliases, tags, policies.

use serde_json::{Value, json};

use super::server::{Answer, Server, zip};
use super::{FUNCTIONS, create, good, refused};

pub const ARN: &str = "arn:aws:lambda:us-east-1:000000000000:function";

pub async fn put(server: &Server, path: &str, body: &Value) -> Answer {
    let body = body.to_string();
    server.send("PUT", path, &[], body.as_bytes()).await
}

pub async fn delete(server: &Server, path: &str) -> Answer {
    server.send("DELETE", path, &[], b"").await
}

/// A function `f` with the version 1.
pub async fn published() -> Server {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let made = server
        .post(&format!("{FUNCTIONS}/f/versions"), &json!({}))
        .await;
    assert_eq!(made.status, 201, "{}", made.text());
    server.version_deployed("f", "1").await;
    server
}

/// Gives `f` other code, so that another version can be published.
pub async fn change_code(server: &Server, text: &str, publish: bool) -> Value {
    use base64::Engine as _;
    let zip = zip(&[("app.py", text.as_bytes())]);
    let code = base64::engine::general_purpose::STANDARD.encode(zip);
    let path = format!("{FUNCTIONS}/f/code");
    let changed = put(server, &path, &json!({"ZipFile": code, "Publish": publish})).await;
    assert_eq!(changed.status, 200, "{}", changed.text());
    server.deployed("f").await;
    changed.json()
}

#[tokio::test]
async fn versions_are_published_once_listed_invoked_and_deleted() {
    let server = published().await;
    let versions = format!("{FUNCTIONS}/f/versions");
    let freezes = server.machine.freezes();
    let again = server.post(&versions, &json!({"Description": "x"})).await;
    assert_eq!(again.json()["Version"], "1", "nothing has changed");
    assert_eq!(server.machine.freezes(), freezes);

    let second = change_code(&server, "x = 2\n", true).await;
    assert_eq!(second["Version"], "2");
    assert_eq!(second["FunctionArn"], format!("{ARN}:f:2"));
    server.version_deployed("f", "2").await;
    let listed = server.get(&versions).await.json();
    let numbers: Vec<_> = (listed["Versions"].as_array().unwrap().iter())
        .map(|version| version["Version"].as_str().unwrap())
        .collect();
    assert_eq!(numbers, ["$LATEST", "1", "2"]);
    let all = format!("{FUNCTIONS}?FunctionVersion=ALL&MaxItems=2");
    let page = server.get(&all).await.json();
    assert_eq!(page["Functions"][1]["FunctionArn"], format!("{ARN}:f:1"));
    let marker = page["NextMarker"].as_str().unwrap();
    let page = server.get(&format!("{all}&Marker={marker}")).await.json();
    assert_eq!(page["Functions"][0]["FunctionArn"], format!("{ARN}:f:2"));

    // Each has its own code and answers as itself, however it is named.
    let first = server.get(&format!("{FUNCTIONS}/f?Qualifier=1")).await;
    let second = server.get(&format!("{FUNCTIONS}/{ARN}:f:2")).await;
    let digest = |answer: &Answer| answer.json()["Configuration"]["CodeSha256"].clone();
    assert_ne!(digest(&first), digest(&second));
    let location = first.json()["Code"]["Location"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = location.split_once("/thaw/").unwrap().1;
    let code = server.get(&format!("/thaw/{path}")).await;
    assert_eq!(code.body, zip(&[("app.py", b"x = 1\n")]));
    let answer = server
        .send(
            "POST",
            &format!("{FUNCTIONS}/f:1/invocations"),
            &[("X-Amz-Log-Type", "Tail")],
            b"7",
        )
        .await;
    assert_eq!(answer.header("x-amz-executed-version"), Some("1"));
    assert!(answer.log().contains("Version: 1\n"), "{}", answer.log());

    assert_eq!(
        delete(&server, &format!("{FUNCTIONS}/f?Qualifier=1"))
            .await
            .status,
        204
    );
    let gone = server
        .get(&format!("{FUNCTIONS}/f/configuration?Qualifier=1"))
        .await;
    assert_eq!(
        refused(&gone, 404, "ResourceNotFoundException"),
        format!("Function not found: {ARN}:f:1")
    );
    let latest = delete(&server, &format!("{FUNCTIONS}/f?Qualifier=$LATEST")).await;
    refused(&latest, 400, "InvalidParameterValueException");
    change_code(&server, "x = 3\n", false).await;
    let third = server.post(&versions, &json!({"Description": "d"})).await;
    assert_eq!(third.json()["Version"], "3", "no number is given twice");
    assert_eq!(third.json()["Description"], "d");
    server.stop().await;
}

#[tokio::test]
async fn versions_and_aliases_survive_a_restart() {
    let server = published().await;
    let aliases = format!("{FUNCTIONS}/f/aliases");
    let live = json!({"Name": "live", "FunctionVersion": "1"});
    assert_eq!(server.post(&aliases, &live).await.status, 201);
    let freezes = server.machine.freezes();
    let server = Server::start_in(server.stop().await).await;
    server.until_healthy().await;
    let path = format!("{FUNCTIONS}/f/invocations?Qualifier=live");
    let answer = server.send("POST", &path, &[], b"7").await;
    assert_eq!(answer.header("x-amz-executed-version"), Some("1"));
    assert_eq!(server.machine.freezes() + freezes, 2, "none is frozen anew");
    assert_eq!(server.revisions("f").len(), 2);
    assert_eq!(delete(&server, &format!("{FUNCTIONS}/f")).await.status, 204);
    server.until(|server| server.folders().is_empty()).await;
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_published_is_refused() {
    let server = Server::start().await;
    let versions = format!("{FUNCTIONS}/f/versions");
    let missing = server.post(&versions, &json!({})).await;
    refused(&missing, 404, "ResourceNotFoundException");
    server.machine.hold_freezes();
    server.post(FUNCTIONS, &good("f")).await;
    let pending = server.post(&versions, &json!({})).await;
    assert!(refused(&pending, 409, "ResourceConflictException").ends_with("state: Pending"));
    server.machine.release_freezes();
    server.deployed("f").await;
    let other = server.post(&versions, &json!({"CodeSha256": "AAAA"})).await;
    assert!(
        refused(&other, 400, "InvalidParameterValueException")
            .starts_with("CodeSHA256 (AAAA) is different from current CodeSHA256 in $LATEST (")
    );
    let stale = server.post(&versions, &json!({"RevisionId": "r"})).await;
    refused(&stale, 412, "PreconditionFailedException");
    let named = server
        .post(&format!("{FUNCTIONS}/f:1/versions"), &json!({}))
        .await;
    refused(&named, 400, "InvalidParameterValueException");
    // Created and published at once; SnapStart says so.
    let mut body = good("g");
    body["Publish"] = true.into();
    body["SnapStart"] = json!({"ApplyOn": "PublishedVersions"});
    server.machine.hold_freezes();
    let made = server.post(FUNCTIONS, &body).await.json();
    assert_eq!(made["Version"], "1");
    assert_eq!(made["SnapStart"]["OptimizationStatus"], "Off");
    let early = server
        .send("POST", &format!("{FUNCTIONS}/g:1/invocations"), &[], b"1")
        .await;
    assert_eq!(early.status, 409);
    assert_eq!(
        early.header("x-amzn-errortype"),
        Some("SnapStartNotReadyException")
    );
    server.machine.release_freezes();
    server.version_deployed("g", "1").await;
    let view = server
        .get(&format!("{FUNCTIONS}/g/configuration?Qualifier=1"))
        .await;
    assert_eq!(view.json()["SnapStart"]["OptimizationStatus"], "On");
    server.stop().await;
}

#[tokio::test]
async fn aliases_name_versions_and_divide_invocations() {
    let server = published().await;
    change_code(&server, "x = 2\n", true).await;
    server.version_deployed("f", "2").await;
    let aliases = format!("{FUNCTIONS}/f/aliases");
    let live = json!({"Name": "live", "FunctionVersion": "1", "Description": "d"});
    let made = server.post(&aliases, &live).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let view = made.json();
    assert_eq!(view["AliasArn"], format!("{ARN}:f:live"));
    assert!(view.get("RoutingConfig").is_none());
    let again = server.post(&aliases, &live).await;
    assert_eq!(
        refused(&again, 409, "ResourceConflictException"),
        format!("Alias already exists: {ARN}:f:live")
    );
    let path = format!("{aliases}/live");
    assert_eq!(server.get(&path).await.json(), view);
    let named = server
        .get(&format!("{FUNCTIONS}/f/configuration?Qualifier=live"))
        .await
        .json();
    assert_eq!(named["Version"], "1");
    assert_eq!(named["FunctionArn"], format!("{ARN}:f:live"));

    // All goes to the second version, then none.
    for (weight, version) in [(1.0, "2"), (0.0, "1")] {
        let routing = json!({"RoutingConfig": {"AdditionalVersionWeights": {"2": weight}}});
        let moved = put(&server, &path, &routing).await;
        assert_eq!(
            moved.json()["RoutingConfig"]["AdditionalVersionWeights"]["2"],
            weight
        );
        let invoke = format!("{FUNCTIONS}/f:live/invocations");
        let answer = server.send("POST", &invoke, &[], b"1").await;
        assert_eq!(answer.header("x-amz-executed-version"), Some(version));
    }
    let listed = server.get(&format!("{aliases}?FunctionVersion=2")).await;
    assert_eq!(listed.json()["Aliases"][0]["Name"], "live");

    for version in ["1", "2"] {
        let held = delete(&server, &format!("{FUNCTIONS}/f?Qualifier={version}")).await;
        assert!(refused(&held, 409, "ResourceConflictException").contains("[live]"));
    }
    let stale = put(&server, &path, &json!({"RevisionId": view["RevisionId"]})).await;
    refused(&stale, 412, "PreconditionFailedException");
    let as_version = delete(&server, &format!("{FUNCTIONS}/f?Qualifier=live")).await;
    refused(&as_version, 400, "InvalidParameterValueException");
    for _ in 0..2 {
        assert_eq!(delete(&server, &path).await.status, 204);
    }
    let gone = server.get(&path).await;
    assert_eq!(
        refused(&gone, 404, "ResourceNotFoundException"),
        format!("Cannot find alias arn: {ARN}:f:live")
    );
    server.stop().await;
}

#[tokio::test]
async fn aliases_that_make_no_sense_are_refused() {
    let server = published().await;
    let aliases = format!("{FUNCTIONS}/f/aliases");
    let routed = |weights: Value| json!({"AdditionalVersionWeights": weights});
    for (name, version, routing, status, code) in [
        ("7", "1", None, 400, "ValidationException"),
        ("a b", "1", None, 400, "ValidationException"),
        ("a", "one", None, 400, "ValidationException"),
        ("a", "9", None, 404, "ResourceNotFoundException"),
        (
            "a",
            "1",
            Some(json!({"9": 0.5})),
            404,
            "ResourceNotFoundException",
        ),
        (
            "a",
            "1",
            Some(json!({"1": 0.5})),
            400,
            "InvalidParameterValueException",
        ),
        (
            "a",
            "1",
            Some(json!({"2": 1.5})),
            400,
            "ValidationException",
        ),
        (
            "a",
            "$LATEST",
            Some(json!({"1": 0.5})),
            400,
            "InvalidParameterValueException",
        ),
        (
            "a",
            "1",
            Some(json!({"2": 0.5, "3": 0.1})),
            400,
            "InvalidParameterValueException",
        ),
    ] {
        let mut body = json!({"Name": name, "FunctionVersion": version});
        if let Some(weights) = routing {
            body["RoutingConfig"] = routed(weights);
        }
        let answer = server.post(&aliases, &body).await;
        refused(&answer, status, code);
    }
    assert_eq!(server.get(&aliases).await.json()["Aliases"], json!([]));
    server.stop().await;
}

#[tokio::test]
async fn tags_are_kept_on_the_function() {
    let server = published().await;
    let tags = |arn: &str| format!("/2017-03-31/tags/{}", arn.replace(':', "%3A"));
    let path = tags(&format!("{ARN}:f"));
    let made = server
        .post(&path, &json!({"Tags": {"a": "1", "b": "2"}}))
        .await;
    assert_eq!((made.status, made.body.len()), (204, 0));
    assert_eq!(
        delete(&server, &format!("{path}?tagKeys=a&tagKeys=zz"))
            .await
            .status,
        204
    );
    assert_eq!(server.get(&path).await.json(), json!({"Tags": {"b": "2"}}));
    let found = server.get(&format!("{FUNCTIONS}/f")).await.json();
    assert_eq!(found["Tags"], json!({"b": "2"}));
    let many: serde_json::Map<_, _> = (0..50).map(|n| (n.to_string(), "x".into())).collect();
    let refusal = server.post(&path, &json!({"Tags": many})).await;
    refused(&refusal, 400, "InvalidParameterValueException");
    let version = server
        .post(&tags(&format!("{ARN}:f:1")), &json!({"Tags": {"a": "1"}}))
        .await;
    refused(&version, 400, "InvalidParameterValueException");
    refused(&server.get(&tags("f")).await, 400, "ValidationException");
    let missing = server.get(&tags(&format!("{ARN}:nope"))).await;
    refused(&missing, 404, "ResourceNotFoundException");
    server.stop().await;
}

#[tokio::test]
async fn failed_hooks_after_a_restore_are_told_as_snapstarts_error() {
    let server = published().await;
    let invoke = format!("{FUNCTIONS}/f:1/invocations");
    let own = server.send("POST", &invoke, &[], b"\"restore\"").await;
    assert_eq!(
        own.status, 200,
        "without SnapStart the error is the function's"
    );
    assert_eq!(own.header("x-amz-function-error"), Some("Unhandled"));
    let settings = json!({"SnapStart": {"ApplyOn": "PublishedVersions"}});
    put(&server, &format!("{FUNCTIONS}/f/configuration"), &settings).await;
    server.deployed("f").await;
    let versions = format!("{FUNCTIONS}/f/versions");
    server.post(&versions, &json!({})).await;
    server.version_deployed("f", "2").await;
    let invoke = format!("{FUNCTIONS}/f:2/invocations");
    let answer = server.send("POST", &invoke, &[], b"\"restore\"").await;
    let message = refused(&answer, 400, "SnapStartException");
    assert!(message.contains("no network yet"), "{message}");
    let answer = server.send("POST", &invoke, &[], b"\"slow restore\"").await;
    let message = refused(&answer, 408, "SnapStartTimeoutException");
    assert!(message.contains("within the timeout limit"), "{message}");
    let log = server.get("/thaw/v1/functions/f/logs").await.text();
    assert!(log.contains("said"), "what the hook wrote is kept: {log}");
    assert!(
        log.contains("Restore timed out after 10.00 seconds"),
        "{log}"
    );
    server.stop().await;
}

#[tokio::test]
async fn a_version_with_snapstart_that_cannot_be_initialised_is_failed_by_the_function() {
    let server = Server::start().await;
    let mut body = create("f", &zip(&[("broken-import.py", b"")]));
    body["SnapStart"] = json!({"ApplyOn": "PublishedVersions"});
    body["Publish"] = true.into();
    server.post(FUNCTIONS, &body).await;
    assert_eq!(server.deployed("f").await["step"], "active");
    assert_eq!(server.version_deployed("f", "1").await["step"], "failed");
    let server = Server::start_in(server.stop().await).await;
    server.until_healthy().await;
    for (version, state) in [("$LATEST", "Active"), ("1", "Failed")] {
        let path = format!("{FUNCTIONS}/f/configuration?Qualifier={version}");
        let view = server.get(&path).await.json();
        assert_eq!(view["State"], state, "{view}");
    }
    let path = format!("{FUNCTIONS}/f/configuration?Qualifier=1");
    let view = server.get(&path).await.json();
    let reason = view["StateReason"].as_str().unwrap();
    assert!(reason.contains("Runtime.ImportModuleError"), "{reason}");
    for code in ["StateReasonCode", "LastUpdateStatusReasonCode"] {
        assert_eq!(view[code], "FunctionError", "{view}");
    }
    let invoke = format!("{FUNCTIONS}/f:1/invocations");
    let answer = server.send("POST", &invoke, &[], b"1").await;
    let message = refused(&answer, 409, "ResourceConflictException");
    assert!(message.contains("Failed"), "{message}");
    let log = server.get("/thaw/v1/functions/f/logs").await.text();
    assert!(log.contains("Traceback"), "{log}");
    server.stop().await;
}

#[tokio::test]
async fn policies_are_kept_shown_as_iam_writes_them_and_end_with_their_alias() {
    let server = published().await;
    let path = format!("{FUNCTIONS}/f/policy");
    refused(&server.get(&path).await, 404, "ResourceNotFoundException");
    let permission = json!({
        "StatementId": "bucket", "Action": "lambda:InvokeFunction", "Principal": "s3.amazonaws.com",
        "SourceArn": "arn:aws:s3:::b", "SourceAccount": "123456789012",
    });
    let made = server.post(&path, &permission).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let expected = format!(
        r#"{{"Sid":"bucket","Effect":"Allow","Principal":{{"Service":"s3.amazonaws.com"}},"Action":"lambda:InvokeFunction","Resource":"{ARN}:f","Condition":{{"ArnLike":{{"AWS:SourceArn":"arn:aws:s3:::b"}},"StringEquals":{{"AWS:SourceAccount":"123456789012"}}}}}}"#
    );
    assert_eq!(made.json()["Statement"], expected);
    let again = server.post(&path, &permission).await;
    refused(&again, 409, "ResourceConflictException");
    let policy = server.get(&path).await.json();
    assert_eq!(
        policy["Policy"],
        format!(r#"{{"Version":"2012-10-17","Id":"default","Statement":[{expected}]}}"#)
    );
    for (member, value, code) in [
        ("StatementId", json!("a b"), "ValidationException"),
        ("Action", json!("s3:Get"), "ValidationException"),
        ("Action", Value::Null, "ValidationException"),
        (
            "Principal",
            json!("nobody"),
            "InvalidParameterValueException",
        ),
    ] {
        let mut body = permission.clone();
        body["StatementId"] = json!("other");
        body[member] = value;
        refused(&server.post(&path, &body).await, 400, code);
    }
    let latest = format!("{path}?Qualifier=$LATEST");
    let refusal = server.post(&latest, &permission).await;
    refused(&refusal, 400, "InvalidParameterValueException");

    let stale = delete(&server, &format!("{path}/bucket?RevisionId=x")).await;
    refused(&stale, 412, "PreconditionFailedException");
    let revision = policy["RevisionId"].as_str().unwrap();
    let gone = delete(&server, &format!("{path}/bucket?RevisionId={revision}")).await;
    assert_eq!(gone.status, 204, "{}", gone.text());
    let gone = delete(&server, &format!("{path}/bucket")).await;
    refused(&gone, 404, "ResourceNotFoundException");

    let alias = json!({"Name": "live", "FunctionVersion": "1"});
    let aliases = format!("{FUNCTIONS}/f/aliases");
    for expected in [404, 404] {
        server.post(&aliases, &alias).await;
        let of_alias = format!("{path}?Qualifier=live");
        assert_eq!(server.get(&of_alias).await.status, expected);
        let made = server.post(&of_alias, &permission).await.json();
        let statement: Value = serde_json::from_str(made["Statement"].as_str().unwrap()).unwrap();
        assert_eq!(statement["Resource"], format!("{ARN}:f:live"));
        delete(&server, &format!("{aliases}/live")).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn what_there_is_none_of_is_listed_as_nothing_and_asked_of_functions_alone() {
    let server = published().await;
    let signing = |name: &str| format!("/2020-06-30/functions/{name}/code-signing-config");
    assert_eq!(server.get(&signing("f")).await.json(), json!({}));
    let missing = server.get(&signing("nope")).await;
    refused(&missing, 404, "ResourceNotFoundException");
    let runtime = "/2021-07-20/functions/f/runtime-management-config";
    assert_eq!(
        server.get(runtime).await.json(),
        json!({"UpdateRuntimeOn": "Auto", "FunctionArn": format!("{ARN}:f:$LATEST")})
    );
    let mappings = server.get("/2015-03-31/event-source-mappings").await;
    assert_eq!(mappings.json(), json!({"EventSourceMappings": []}));
    server.stop().await;
}

#[tokio::test]
async fn code_in_s3_needs_a_store_that_the_operator_named() {
    let server = Server::start().await;
    let mut body = good("f");
    body["Code"] = json!({"S3Bucket": "code", "S3Key": "app.zip"});
    let message = refused(
        &server.post(FUNCTIONS, &body).await,
        400,
        "InvalidParameterValueException",
    );
    assert!(message.contains("--s3-endpoint"), "{message}");
    body["Code"] = json!({"S3Bucket": "code"});
    refused(
        &server.post(FUNCTIONS, &body).await,
        400,
        "InvalidParameterValueException",
    );
    body["Code"] = json!({"S3Bucket": "code", "S3Key": "app.zip", "ZipFile": "UEsDBA=="});
    refused(
        &server.post(FUNCTIONS, &body).await,
        400,
        "InvalidParameterValueException",
    );
    server.stop().await;
}
