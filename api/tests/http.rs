//! The gateway over real TCP, on a real database and a real state folder. Only the machine below is played: no KVM here.
//! What real guests do is tested end to end elsewhere.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

#[path = "http/answers.rs"]
mod answers;
#[path = "http/auth.rs"]
mod auth;
#[path = "http/concurrency.rs"]
mod concurrency;
#[path = "http/events.rs"]
mod events;
#[path = "http/https.rs"]
mod https;
#[path = "http/layers.rs"]
mod layers;
#[path = "http/limits.rs"]
mod limits;
#[path = "http/machine.rs"]
mod machine;
#[path = "http/quotas.rs"]
mod quotas;
#[path = "http/server.rs"]
mod server;
#[path = "http/snapshots.rs"]
mod snapshots;
#[path = "http/streams.rs"]
mod streams;
#[path = "http/tls.rs"]
mod tls;
#[path = "http/urls.rs"]
mod urls;
#[path = "http/versions.rs"]
mod versions;

use serde_json::{Value, json};
use server::{Server, zip};

const ROLE: &str = "arn:aws:iam::000000000000:role/r";
const FUNCTIONS: &str = "/2015-03-31/functions";

fn create(name: &str, zip: &[u8]) -> Value {
    use base64::Engine as _;
    let code = base64::engine::general_purpose::STANDARD.encode(zip);
    json!({"FunctionName": name, "Role": ROLE, "Runtime": "python3.11", "Handler": "app.handler", "Code": {"ZipFile": code}})
}

fn good(name: &str) -> Value {
    create(name, &zip(&[("app.py", b"x = 1\n")]))
}

/// Asserts an error in Lambda's shape; answers its message.
fn refused(answer: &server::Answer, status: u16, code: &str) -> String {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.header("x-amzn-errortype"), Some(code));
    assert!(answer.header("x-amzn-requestid").is_some());
    let body = answer.json();
    let is_capital = matches!(code, "ResourceNotFoundException" | "ServiceException");
    let spelled = if is_capital || code.starts_with("SnapStart") {
        "Message"
    } else {
        "message"
    };
    body[spelled].as_str().expect("a message").to_owned()
}

#[tokio::test]
async fn a_function_is_created_found_listed_invoked_and_deleted() {
    let server = Server::start().await;
    let made = server.post(FUNCTIONS, &good("hello")).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let view = made.json();
    assert_eq!(view["State"], "Pending");
    assert_eq!(view["StateReasonCode"], "Creating");
    assert!(view.get("LastUpdateStatus").is_none());
    assert_eq!(
        view["FunctionArn"],
        "arn:aws:lambda:us-east-1:000000000000:function:hello"
    );
    server.deployed("hello").await;

    let found = server.get(&format!("{FUNCTIONS}/hello/")).await.json();
    assert_eq!(found["Configuration"]["State"], "Active");
    assert_eq!(found["Configuration"]["LastUpdateStatus"], "Successful");
    let location = found["Code"]["Location"].as_str().unwrap();
    let path = location
        .strip_prefix(&format!("http://{}", server.address))
        .unwrap();
    assert_eq!(server.get(path).await.body, zip(&[("app.py", b"x = 1\n")]));

    let arn = "arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Afunction%3Ahello%3A%24LATEST";
    let by_arn = server
        .get(&format!("{FUNCTIONS}/{arn}/configuration"))
        .await;
    assert!(
        by_arn.json()["FunctionArn"]
            .as_str()
            .unwrap()
            .ends_with(":hello:$LATEST")
    );
    let listed = server.get(FUNCTIONS).await.json();
    assert_eq!(listed["Functions"][0]["FunctionName"], "hello");
    assert!(listed["Functions"][0].get("State").is_none());

    let answer = server
        .send(
            "POST",
            &format!("{FUNCTIONS}/hello/invocations"),
            &[("X-Amz-Log-Type", "Tail"), ("X-Thaw-Timing", "1")],
            b"{\"a\":1}",
        )
        .await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "{\"a\":1}"));
    assert_eq!(answer.header("x-amz-executed-version"), Some("$LATEST"));
    let trace = answer.header("x-amzn-trace-id").unwrap();
    assert!(trace.starts_with("Root=1-"), "{trace}");
    assert!(
        answer
            .header("server-timing")
            .unwrap()
            .starts_with("queue;dur=")
    );
    let log = answer.log();
    let id = answer.header("x-amzn-requestid").unwrap();
    assert!(log.starts_with(&format!("START RequestId: {id} Version: $LATEST\nsaid\nEND RequestId: {id}\nREPORT RequestId: {id}\tDuration: ")), "{log}");

    assert_eq!(
        server
            .send("DELETE", &format!("{FUNCTIONS}/hello"), &[], b"")
            .await
            .status,
        204
    );
    let gone = server.get(&format!("{FUNCTIONS}/hello")).await;
    let message = refused(&gone, 404, "ResourceNotFoundException");
    assert_eq!(
        message,
        "Function not found: arn:aws:lambda:us-east-1:000000000000:function:hello"
    );
    let path = format!("{FUNCTIONS}/hello/invocations");
    let gone = server.send("POST", &path, &[], b"{}").await;
    let message = refused(&gone, 404, "ResourceNotFoundException");
    assert!(message.ends_with(":function:hello:$LATEST"), "{message}");
    assert_eq!(server.post(FUNCTIONS, &good("hello")).await.status, 201);
    server.stop().await;
}

#[tokio::test]
async fn bad_requests_are_refused_in_lambdas_words() {
    let server = Server::start().await;
    let refuse = async |change: Value, code: &str, status: u16| {
        let mut body = good("f");
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        refused(&server.post(FUNCTIONS, &body).await, status, code)
    };
    let text = refuse(json!({"FunctionName": "a b"}), "ValidationException", 400).await;
    assert!(text.starts_with("1 validation error detected: Value 'a b' at 'functionName'"));
    refuse(json!({"Timeout": 901}), "ValidationException", 400).await;
    refuse(json!({"Role": "me"}), "ValidationException", 400).await;
    refuse(
        json!({"Timeout": "x"}),
        "InvalidRequestContentException",
        400,
    )
    .await;
    let invalid = "InvalidParameterValueException";
    let text = refuse(json!({"Code": {"ZipFile": "bm8gemlw"}}), invalid, 400).await;
    assert_eq!(
        text,
        "Could not unzip uploaded file. Please check your file, then try to upload again."
    );
    refuse(
        json!({"Code": {"S3Bucket": "b", "S3Key": "k"}}),
        invalid,
        400,
    )
    .await;
    refuse(
        json!({"Code": {"ImageUri": "i"}, "PackageType": "Image"}),
        invalid,
        400,
    )
    .await;
    refuse(json!({"Code": {}}), invalid, 400).await;
    refuse(
        json!({"Environment": {"Variables": {"K": "x".repeat(5000), "KK": "x".repeat(5000)}}}),
        "ValidationException",
        400,
    )
    .await;
    refuse(
        json!({"Environment": {"Variables": {"KK": "x".repeat(5000)}}}),
        invalid,
        400,
    )
    .await;
    let body = server.send("POST", FUNCTIONS, &[], b"{").await;
    refused(&body, 400, "InvalidRequestContentException");
    assert_eq!(server.get(FUNCTIONS).await.json()["Functions"], json!([]));
    assert_eq!(
        server.folders(),
        Vec::<String>::new(),
        "nothing half-written is left"
    );
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_served_is_an_error_of_lambdas_shape() {
    let server = Server::start().await;
    for (method, path) in [
        ("GET", "/2025-11-30/capacity-providers"),
        ("POST", "/2015-03-31/event-source-mappings"),
        ("PATCH", "/2015-03-31/functions"),
    ] {
        let answer = server.send(method, path, &[], b"").await;
        refused(&answer, 400, "InvalidParameterValueException");
    }
    let root = server.get("/").await;
    assert!(refused(&root, 404, "UnknownOperationException").contains("/fn/NAME/"));
    let missing = server
        .send("POST", &format!("{FUNCTIONS}/nope/invocations"), &[], b"{}")
        .await;
    refused(&missing, 404, "ResourceNotFoundException");
    let url = server.get("/fn/nope/").await;
    assert_eq!(url.status, 404);
    assert!(
        url.text().contains("thaw deploy DIR --name nope"),
        "{}",
        url.text()
    );
    server.stop().await;
}

#[tokio::test]
async fn invocation_types_and_states_are_told_apart() {
    let server = Server::start().await;
    server.machine.hold_freezes();
    server.post(FUNCTIONS, &good("f")).await;
    let path = format!("{FUNCTIONS}/f/invocations");
    let pending = server.send("POST", &path, &[], b"{}").await;
    let text = refused(&pending, 409, "ResourceConflictException");
    assert_eq!(
        text,
        "The operation cannot be performed at this time. The function is currently in the following state: Pending"
    );
    let again = server.post(FUNCTIONS, &good("f")).await;
    assert_eq!(
        refused(&again, 409, "ResourceConflictException"),
        "Function already exist: f"
    );
    server.machine.release_freezes();
    server.deployed("f").await;

    let dry = server
        .send("POST", &path, &[("X-Amz-Invocation-Type", "DryRun")], b"{}")
        .await;
    assert_eq!((dry.status, dry.body.len()), (204, 0));
    let other = server
        .send("POST", &path, &[("X-Amz-Invocation-Type", "Other")], b"{}")
        .await;
    refused(&other, 400, "ValidationException");
    let no_json = server.send("POST", &path, &[], b"hello").await;
    refused(&no_json, 400, "InvalidRequestContentException");
    let differing = server
        .send(
            "POST",
            &format!("{FUNCTIONS}/f:1/invocations?Qualifier=2"),
            &[],
            b"{}",
        )
        .await;
    assert_eq!(
        refused(&differing, 400, "InvalidParameterValueException"),
        "The derived qualifier from the function name does not match the specified qualifier."
    );
    server.stop().await;
}

#[tokio::test]
async fn every_end_of_an_invocation_has_its_document() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    for (event, error_type, text) in [
        ("raise", "ValueError", "no"),
        (
            "time-out",
            "Sandbox.Timedout",
            "Error: Task timed out after 3.00 seconds",
        ),
        (
            "exit",
            "Runtime.ExitError",
            "Error: Runtime exited with error: exit status 7",
        ),
        (
            "memory",
            "Runtime.OutOfMemory",
            "Error: Runtime exited with error: signal: killed",
        ),
        (
            "panic",
            "Sandbox.KernelPanic",
            "Kernel panic - not syncing: test",
        ),
    ] {
        let body = format!("\"{event}\"");
        let answer = server
            .send(
                "POST",
                &format!("{FUNCTIONS}/f/invocations"),
                &[("X-Amz-Log-Type", "Tail")],
                body.as_bytes(),
            )
            .await;
        assert_eq!(answer.status, 200, "{event}");
        assert_eq!(
            answer.header("x-amz-function-error"),
            Some("Unhandled"),
            "{event}"
        );
        let document = answer.json();
        assert_eq!(document["errorType"], error_type, "{event}");
        assert!(
            document["errorMessage"].as_str().unwrap().contains(text),
            "{document}"
        );
        assert!(answer.log().contains("REPORT RequestId: "), "{event}");
    }
    let throttled = server
        .send(
            "POST",
            &format!("{FUNCTIONS}/f/invocations"),
            &[],
            b"\"throttle\"",
        )
        .await;
    refused(&throttled, 429, "TooManyRequestsException");
    assert_eq!(throttled.header("retry-after"), Some("1"));
    let path = format!("{FUNCTIONS}/f/invocations");
    let full = server.send("POST", &path, &[], b"\"full\"").await;
    let why = refused(&full, 503, "ServiceUnavailableException");
    assert!(why.contains("the machine had no room in time"), "{why}");
    assert_eq!(full.header("retry-after"), Some("1"));
    let full = server
        .send("POST", "/fn/f/", &[("content-type", "text/plain")], b"full")
        .await;
    assert_eq!(full.status, 503);
    let raised = server
        .send(
            "POST",
            "/fn/f/",
            &[("content-type", "text/plain")],
            b"raise",
        )
        .await;
    assert_eq!(
        (raised.status, raised.header("x-amzn-errortype")),
        (502, Some("ValueError"))
    );
    assert_eq!(raised.text(), "Internal Server Error");
    let fine = server
        .send("POST", &format!("{FUNCTIONS}/f/invocations"), &[], b"1")
        .await;
    assert_eq!(fine.text(), "1", "the next invocation is unharmed");
    assert_eq!(fine.header("x-thaw-start"), Some("rewound"));
    let fine = server.send("POST", "/fn/f/", &[], b"").await;
    assert_eq!(fine.header("x-thaw-start"), Some("rewound"));
    let listed = server.get("/thaw/v1/functions").await.json();
    assert!(
        listed["functions"][0]["last_error"]
            .as_str()
            .unwrap()
            .contains("ValueError")
    );
    server.stop().await;
}

#[tokio::test]
async fn a_function_url_speaks_format_2() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let answer = server
        .send(
            "PUT",
            "/fn/f/a%20b/c?x=1&x=2",
            &[("Cookie", "k=v; l=w"), ("content-type", "application/json")],
            b"{}",
        )
        .await;
    assert_eq!(answer.status, 200);
    let event = answer.json();
    let trace = event["headers"]["x-amzn-trace-id"].as_str();
    assert_eq!(answer.header("x-amzn-trace-id"), trace);
    assert_eq!(event["rawPath"], "/a%20b/c");
    assert_eq!(event["rawQueryString"], "x=1&x=2");
    assert_eq!(event["queryStringParameters"]["x"], "1,2");
    assert_eq!(event["cookies"], json!(["k=v", "l=w"]));
    assert_eq!(event["requestContext"]["http"]["method"], "PUT");
    assert_eq!(event["requestContext"]["http"]["sourceIp"], "127.0.0.1");
    assert_eq!(
        (&event["body"], &event["isBase64Encoded"]),
        (&json!("{}"), &json!(false))
    );
    let shaped = server
        .send("POST", "/fn/f", &[("content-type", "text/plain")], b"shape")
        .await;
    assert_eq!((shaped.status, shaped.text().as_str()), (418, "tea"));
    assert_eq!(shaped.header("set-cookie"), Some("a=1"));
    assert_eq!(shaped.header("x-a"), Some("b"));
    server.stop().await;
}

#[tokio::test]
async fn a_failed_initialisation_is_every_invocations_answer() {
    let server = Server::start().await;
    server
        .post(FUNCTIONS, &create("f", &zip(&[("broken-import.py", b"")])))
        .await;
    let last = server.deployed("f").await;
    assert_eq!(
        last["init_error"]["error_type"],
        "Runtime.ImportModuleError"
    );
    let view = server
        .get(&format!("{FUNCTIONS}/f/configuration"))
        .await
        .json();
    assert_eq!(view["State"], "Active");
    for _ in 0..2 {
        let answer = server
            .send(
                "POST",
                &format!("{FUNCTIONS}/f/invocations"),
                &[("X-Amz-Log-Type", "Tail")],
                b"{}",
            )
            .await;
        assert_eq!(answer.header("x-amz-function-error"), Some("Unhandled"));
        assert_eq!(answer.json()["errorType"], "Runtime.ImportModuleError");
        assert!(answer.log().contains("Traceback"), "{}", answer.log());
    }
    server.stop().await;
}

#[tokio::test]
async fn a_failure_of_this_machine_is_a_failed_function_and_can_be_mended() {
    let server = Server::start().await;
    server
        .post(FUNCTIONS, &create("f", &zip(&[("disk-full", b"")])))
        .await;
    let last = server.deployed("f").await;
    assert_eq!(last["step"], "failed");
    assert!(
        last["error"]
            .as_str()
            .unwrap()
            .starts_with("no space left for ")
    );
    let view = server
        .get(&format!("{FUNCTIONS}/f/configuration"))
        .await
        .json();
    assert_eq!(
        (&view["State"], &view["StateReasonCode"]),
        (&json!("Failed"), &json!("InternalError"))
    );
    let code = good("f")["Code"].clone();
    let answer = server
        .send(
            "PUT",
            &format!("{FUNCTIONS}/f/code"),
            &[],
            code.to_string().as_bytes(),
        )
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(server.deployed("f").await["step"], "active");
    server.stop().await;
}

#[tokio::test]
async fn an_update_serves_the_old_revision_until_the_new_one_is_frozen() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let before = server
        .get(&format!("{FUNCTIONS}/f/configuration"))
        .await
        .json();
    server.machine.hold_freezes();
    let path = format!("{FUNCTIONS}/f/configuration");
    let stale = json!({"Timeout": 9, "RevisionId": "other"});
    let answer = server
        .send("PUT", &path, &[], stale.to_string().as_bytes())
        .await;
    refused(&answer, 412, "PreconditionFailedException");
    let answer = server
        .send("PUT", &path, &[], b"{\"Timeout\":9}")
        .await
        .json();
    assert_eq!(
        (&answer["LastUpdateStatus"], &answer["Timeout"]),
        (&json!("InProgress"), &json!(9))
    );
    assert_ne!(answer["RevisionId"], before["RevisionId"]);
    let busy = server.send("PUT", &path, &[], b"{\"Timeout\":8}").await;
    refused(&busy, 409, "ResourceConflictException");
    let served = server
        .send("POST", &format!("{FUNCTIONS}/f/invocations"), &[], b"1")
        .await;
    assert_eq!(served.text(), "1");
    server.machine.release_freezes();
    server.deployed("f").await;
    let after = server.get(&path).await.json();
    assert_eq!(
        (&after["LastUpdateStatus"], &after["Timeout"]),
        (&json!("Successful"), &json!(9))
    );
    server
        .until(|server| server.revisions("f").len() == 1)
        .await;
    server.stop().await;
}

#[tokio::test]
async fn functions_survive_a_restart_and_leftovers_do_not() {
    let mut server = Server::start().await;
    for name in ["a", "b"] {
        server.post(FUNCTIONS, &good(name)).await;
        server.deployed(name).await;
    }
    server.machine.hold_freezes();
    server.post(FUNCTIONS, &good("c")).await;
    let home = server.stop().await;
    std::fs::create_dir_all(home.path().join("functions/ghost/1")).unwrap();
    let revision = Server::revisions_in(home.path(), "a").pop().unwrap();
    let leftover = home
        .path()
        .join("functions/a")
        .join(&revision)
        .join("code.zip.tmp");
    std::fs::write(&leftover, b"half").unwrap();

    server = Server::start_in(home).await;
    server.until_healthy().await;
    assert!(!leftover.exists());
    assert_eq!(server.folders(), ["a", "b", "c"]);
    let answer = server
        .send("POST", &format!("{FUNCTIONS}/a/invocations"), &[], b"7")
        .await;
    assert_eq!(answer.text(), "7", "{}", answer.status);
    assert_eq!(
        server.deployed("c").await["step"],
        "active",
        "a deployment that was cut off goes on"
    );
    server.stop().await;
}

#[tokio::test]
async fn lists_come_in_pages() {
    let server = Server::start().await;
    for index in 0..5 {
        server.post(FUNCTIONS, &good(&format!("f{index}"))).await;
    }
    let (mut names, mut marker) = (Vec::new(), String::new());
    loop {
        let page = server
            .get(&format!("{FUNCTIONS}/?MaxItems=2&Marker={marker}"))
            .await
            .json();
        let functions = page["Functions"].as_array().unwrap();
        assert!(functions.len() <= 2);
        names.extend(
            functions
                .iter()
                .map(|f| f["FunctionName"].as_str().unwrap().to_owned()),
        );
        match page["NextMarker"].as_str() {
            Some(next) => marker = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(names, ["f0", "f1", "f2", "f3", "f4"]);
    refused(
        &server.get(&format!("{FUNCTIONS}?MaxItems=0")).await,
        400,
        "ValidationException",
    );
    refused(
        &server.get(&format!("{FUNCTIONS}?Marker=%25")).await,
        400,
        "InvalidParameterValueException",
    );
    server.stop().await;
}

#[tokio::test]
async fn logs_are_kept_and_followed() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let mut follower = server
        .open("/thaw/v1/functions/f/logs?follow=true&tail=0")
        .await;
    server
        .send("POST", &format!("{FUNCTIONS}/f/invocations"), &[], b"1")
        .await;
    let heard = server::read_until(&mut follower, "REPORT").await;
    assert!(heard.contains("said\nEND RequestId"), "{heard}");
    let tail = server.get("/thaw/v1/functions/f/logs?tail=1").await.text();
    assert!(tail.starts_with("REPORT RequestId: "), "{tail}");
    server.stop().await;
}

#[tokio::test]
async fn a_second_gateway_on_the_same_state_is_refused() {
    let server = Server::start().await;
    let error = server::try_start(server.home()).await.err().unwrap();
    assert!(
        matches!(error, thaw_api::StartError::Locked { .. }),
        "{error}"
    );
    server.stop().await;
}
