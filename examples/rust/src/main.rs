//! A function in Rust: answers with a greeting and the event it was given.
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use serde_json::{Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    run(service_fn(greet)).await
}

async fn greet(event: LambdaEvent<Value>) -> Result<Value, Error> {
    let (event, context) = event.into_parts();
    if event["fail"] == true {
        return Err("the event asked for a failure".into());
    }
    let name = event["name"].as_str().unwrap_or("world");
    Ok(json!({
        "greeting": format!("Hello, {name}!"),
        "event": event,
        "request_id": context.request_id,
    }))
}
