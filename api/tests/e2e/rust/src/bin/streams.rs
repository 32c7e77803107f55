//! Ten pieces, one each 100 ms, by the official runtime client's own streaming; it asks to be told of the shutdown.
use std::time::Duration;

use lambda_runtime::streaming::{Body, Response, channel};
use lambda_runtime::{Error, LambdaEvent, run, service_fn, spawn_graceful_shutdown_handler};
use serde_json::Value;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    spawn_graceful_shutdown_handler(|| async { eprintln!("shutting down") }).await;
    run(service_fn(stream)).await
}

async fn stream(event: LambdaEvent<Value>) -> Result<Response<Body>, Error> {
    if event.payload["fail"] == true {
        return Err("the event asked for a failure".into());
    }
    let (mut sender, body) = channel();
    tokio::spawn(async move {
        for number in 0..10 {
            let piece = format!("piece {number}\n");
            if sender.send_data(piece.into()).await.is_err() {
                return; // nobody reads any more
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    Ok(Response::from(body))
}
