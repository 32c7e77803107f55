//! Asynchronous invocations: the queue, attempts, destinations.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use serde_json::{Value, json};

use super::server::{Answer, Server};
use super::{FUNCTIONS, good, refused};

const ARN: &str = "arn:aws:lambda:us-east-1:000000000000:function";
const CONFIG: &str = "/2019-09-25/functions/f/event-invoke-config";

async fn send(server: &Server, name: &str, event: &Value) -> Answer {
    let path = format!("{FUNCTIONS}/{name}/invocations");
    let kind = [("X-Amz-Invocation-Type", "Event")];
    let event = event.to_string();
    server.send("POST", &path, &kind, event.as_bytes()).await
}

async fn configure(server: &Server, config: &Value) -> Answer {
    let body = config.to_string();
    server.send("PUT", CONFIG, &[], body.as_bytes()).await
}

/// What is posted to a URL: refused as often as asked for, then kept.
struct Hook {
    url: String,
    bodies: Arc<Mutex<Vec<Value>>>,
}

impl Hook {
    async fn start(refusals: usize) -> Self {
        let bodies: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (kept, left) = (Arc::clone(&bodies), Arc::new(Mutex::new(refusals)));
        let take = move |body: String| async move {
            let mut left = left.lock().unwrap();
            if *left > 0 {
                *left -= 1;
                return StatusCode::SERVICE_UNAVAILABLE;
            }
            kept.lock()
                .unwrap()
                .push(serde_json::from_str(&body).unwrap());
            StatusCode::NO_CONTENT
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let router = Router::new().route("/hook", post(take));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, bodies }
    }
}

#[tokio::test]
async fn acknowledged_events_survive_a_restart_and_reach_their_destination() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("g")).await;
    server.deployed("g").await;
    server.machine.hold_freezes();
    server.post(FUNCTIONS, &good("f")).await;
    let destination =
        json!({"DestinationConfig": {"OnSuccess": {"Destination": format!("{ARN}:g")}}});
    let configured = configure(&server, &destination).await;
    assert_eq!(configured.status, 200, "{}", configured.text());
    for number in 0..20 {
        let taken = send(&server, "f", &json!(number)).await;
        assert_eq!((taken.status, taken.body.len()), (202, 0));
    }
    assert!(
        server.machine.events_of("f").is_empty(),
        "f is not there yet"
    );

    let server = Server::start_in(server.stop().await).await;
    server
        .until(|server| server.machine.events_of("g").len() == 20)
        .await;
    let mut events: Vec<_> = server.machine.events_of("f");
    events.sort_by_key(Value::as_u64);
    assert_eq!(events, (0..20).map(Value::from).collect::<Vec<_>>());
    let records = server.machine.events_of("g");
    let mut answers: Vec<_> = records.iter().map(|r| &r["responsePayload"]).collect();
    answers.sort_by_key(|answer| answer.as_u64());
    assert_eq!(answers, events.iter().collect::<Vec<_>>());
    assert_eq!(records[0]["requestContext"]["condition"], "Success");
    assert_eq!(
        records[0]["requestContext"]["functionArn"],
        format!("{ARN}:f:$LATEST")
    );

    // Nothing is left to be done again.
    let server = Server::start_in(server.stop().await).await;
    server.until_healthy().await;
    assert_eq!(send(&server, "f", &json!("last")).await.status, 202);
    server
        .until(|server| !server.machine.events_of("g").is_empty())
        .await;
    assert_eq!(server.machine.events_of("f"), [json!("last")]);
    server.stop().await;
}

#[tokio::test]
async fn a_function_that_fails_is_tried_three_times_and_a_url_told_once_it_listens() {
    let server = Server::start().await;
    let hook = Hook::start(1).await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let to_hook = json!({"DestinationConfig": {"OnFailure": {"Destination": hook.url}}});
    assert_eq!(configure(&server, &to_hook).await.status, 200);
    let taken = send(&server, "f", &json!("raise")).await;
    let id = taken.header("x-amzn-requestid").unwrap().to_owned();
    server
        .until(|_| !hook.bodies.lock().unwrap().is_empty())
        .await;
    assert_eq!(server.machine.events_of("f").len(), 3);
    let record = hook.bodies.lock().unwrap()[0].clone();
    let context = &record["requestContext"];
    assert_eq!(context["requestId"], id);
    assert_eq!(context["condition"], "RetriesExhausted");
    assert_eq!(context["approximateInvokeCount"], 3);
    assert_eq!(record["responsePayload"]["errorType"], "ValueError");

    let none =
        json!({"MaximumRetryAttempts": 0, "DestinationConfig": to_hook["DestinationConfig"]});
    configure(&server, &none).await;
    send(&server, "f", &json!("raise")).await;
    server
        .until(|_| hook.bodies.lock().unwrap().len() == 2)
        .await;
    assert_eq!(server.machine.events_of("f").len(), 4, "no second attempt");

    // Nothing may run, so nothing is waited for.
    let path = "/2017-10-31/functions/f/concurrency";
    let barred = json!({"ReservedConcurrentExecutions": 0}).to_string();
    server.send("PUT", path, &[], barred.as_bytes()).await;
    send(&server, "f", &json!(5)).await;
    server
        .until(|_| hook.bodies.lock().unwrap().len() == 3)
        .await;
    let record = hook.bodies.lock().unwrap()[2].clone();
    let context = &record["requestContext"];
    assert_eq!(context["condition"], "ZeroReservedConcurrency");
    assert_eq!(context["approximateInvokeCount"], 0);
    assert_eq!(record["requestPayload"], 5);
    assert_eq!(server.machine.events_of("f").len(), 4);
    server.stop().await;
}

#[tokio::test]
async fn a_loop_of_destinations_ends_and_is_told_unless_it_is_allowed() {
    let server = Server::start().await;
    let hook = Hook::start(0).await;
    for name in ["f", "g"] {
        server.post(FUNCTIONS, &good(name)).await;
        server.deployed(name).await;
    }
    for (name, next) in [("f", "g"), ("g", "f")] {
        let path = format!("/2019-09-25/functions/{name}/event-invoke-config");
        let next = format!("{ARN}:{next}");
        let config = json!({"DestinationConfig": {"OnSuccess": {"Destination": next}, "OnFailure": {"Destination": hook.url}}});
        let body = config.to_string();
        let configured = server.send("PUT", &path, &[], body.as_bytes()).await;
        assert_eq!(configured.status, 200, "{}", configured.text());
    }
    assert_eq!(send(&server, "f", &json!("round")).await.status, 202);
    server
        .until(|_| !hook.bodies.lock().unwrap().is_empty())
        .await;
    let record = hook.bodies.lock().unwrap()[0].clone();
    let context = &record["requestContext"];
    assert_eq!(context["condition"], "RecursiveLoop");
    assert_eq!(context["functionArn"], format!("{ARN}:f:$LATEST"));
    assert_eq!(context["approximateInvokeCount"], 0);
    let ran = || ["f", "g"].map(|name| server.machine.events_of(name).len());
    assert_eq!(ran(), [16, 16]);

    let allow = json!({"RecursiveLoop": "Allow"}).to_string();
    for name in ["f", "g"] {
        let path = format!("/2024-08-31/functions/{name}/recursion-config");
        let allowed = server.send("PUT", &path, &[], allow.as_bytes()).await;
        assert_eq!(allowed.status, 200);
    }
    send(&server, "f", &json!("round")).await;
    server.until(|_| ran().iter().all(|runs| *runs > 40)).await;
    assert_eq!(hook.bodies.lock().unwrap().len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_deleted_functions_events_go_with_it() {
    let server = Server::start().await;
    server.machine.hold_freezes();
    server.post(FUNCTIONS, &good("f")).await;
    assert_eq!(send(&server, "f", &json!(1)).await.status, 202);
    server
        .send("DELETE", &format!("{FUNCTIONS}/f"), &[], b"")
        .await;
    server.machine.release_freezes();
    let server = Server::start_in(server.stop().await).await;
    server.until_healthy().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    send(&server, "f", &json!(2)).await;
    server
        .until(|server| !server.machine.events_of("f").is_empty())
        .await;
    assert_eq!(server.machine.events_of("f"), [json!(2)]);
    server.stop().await;
}

#[tokio::test]
async fn the_old_path_and_the_limits_of_events_are_lambdas() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let old = "/2014-11-13/functions/f/invoke-async";
    let taken = server.send("POST", old, &[], b"5").await;
    assert_eq!((taken.status, taken.json()), (202, json!({"Status": 202})));
    server
        .until(|server| server.machine.events_of("f") == [json!(5)])
        .await;
    let large = json!("x".repeat(1024 * 1024));
    refused(
        &send(&server, "f", &large).await,
        413,
        "RequestTooLargeException",
    );
    refused(
        &send(&server, "nope", &json!(1)).await,
        404,
        "ResourceNotFoundException",
    );
    server.stop().await;
}

#[tokio::test]
async fn event_invoke_configs_are_put_merged_listed_and_deleted() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let missing = server.get(CONFIG).await;
    assert!(
        refused(&missing, 404, "ResourceNotFoundException")
            .ends_with("f:$LATEST doesn't have an EventInvokeConfig")
    );
    let put = configure(
        &server,
        &json!({"MaximumRetryAttempts": 1, "MaximumEventAgeInSeconds": 60}),
    )
    .await;
    let view = put.json();
    assert_eq!(view["FunctionArn"], format!("{ARN}:f:$LATEST"));
    assert!(view["LastModified"].as_f64().unwrap() > 1.7e9);
    assert_eq!(
        view["DestinationConfig"],
        json!({"OnSuccess": {}, "OnFailure": {}})
    );
    let merge = json!({"MaximumRetryAttempts": 0}).to_string();
    let merged = server
        .send("POST", CONFIG, &[], merge.as_bytes())
        .await
        .json();
    assert_eq!(
        (
            &merged["MaximumRetryAttempts"],
            &merged["MaximumEventAgeInSeconds"]
        ),
        (&json!(0), &json!(60))
    );
    let replaced = configure(&server, &json!({"MaximumRetryAttempts": 2}))
        .await
        .json();
    assert!(replaced.get("MaximumEventAgeInSeconds").is_none());
    let listed = server.get(&format!("{CONFIG}/list")).await.json();
    assert_eq!(
        listed["FunctionEventInvokeConfigs"][0],
        server.get(CONFIG).await.json()
    );
    for bad in [
        json!({"MaximumRetryAttempts": 3}),
        json!({"MaximumEventAgeInSeconds": 59}),
    ] {
        refused(&configure(&server, &bad).await, 400, "ValidationException");
    }
    for nowhere in [
        &format!("{ARN}:nope"),
        "arn:aws:sqs:us-east-1:000000000000:q",
        "http://",
        "https://",
        "http://169.254.169.254/latest/api/token",
    ] {
        let config = json!({"DestinationConfig": {"OnFailure": {"Destination": nowhere}}});
        refused(
            &configure(&server, &config).await,
            400,
            "InvalidParameterValueException",
        );
    }
    let said = async |destination: &str| {
        let config = json!({"DestinationConfig": {"OnSuccess": {"Destination": destination}}});
        let answer = configure(&server, &config).await;
        let code = answer.header("x-amzn-errortype").unwrap().to_owned();
        refused(&answer, 400, &code)
    };
    for none in ["f", "ftp://h.example/"] {
        let message = said(none).await;
        assert!(message.contains("'destinationConfig.onSuccess.destination'"));
    }
    assert_eq!(
        said(&format!("{ARN}:f")).await,
        "You can't specify the function as a destination for itself."
    );
    let nope = format!("{ARN}:nope");
    assert_eq!(
        said(&nope).await,
        format!("The destination ARN {nope} is invalid.")
    );
    let role = "arn:aws:iam:us-east-1:000000000000:role/r";
    assert_eq!(
        said(role).await,
        format!(
            "The provided destination config DestinationConfig(onSuccess=OnSuccess(destination={role}), onFailure=null) is invalid."
        )
    );
    let nothing = refused(
        &configure(&server, &json!({})).await,
        400,
        "InvalidParameterValueException",
    );
    assert!(nothing.starts_with("You must specify at least one"));
    assert_eq!(server.send("DELETE", CONFIG, &[], b"").await.status, 204);
    refused(&server.get(CONFIG).await, 404, "ResourceNotFoundException");
    server.stop().await;
}

#[tokio::test]
async fn a_request_that_is_sent_again_runs_once() {
    let server = Server::start().await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    server.machine.hold_answers(true);
    let path = format!("{FUNCTIONS}/f/invocations");
    let id = [(
        "amz-sdk-invocation-id",
        "2f8d6e3c-0c5e-4c1d-9a59-7d3f0f6f3f11",
    )];
    let send = || server.send("POST", &path, &id, b"\"hold\"");
    let second = async {
        server
            .until(|server| server.machine.held_answers() == 1)
            .await;
        let again = send();
        server.machine.hold_answers(false);
        again.await
    };
    let (first, second) = tokio::join!(send(), second);
    let third = send().await;
    for answer in [&first, &second, &third] {
        assert_eq!((answer.status, answer.text().as_str()), (200, "\"hold\""));
    }
    assert_eq!(server.machine.events_of("f").len(), 1);
    let other = server.send("POST", &path, &id, b"2").await;
    assert_eq!(other.text(), "2", "another event is another request");
    server.stop().await;
}
