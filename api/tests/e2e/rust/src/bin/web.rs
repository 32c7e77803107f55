//! A web function with `lambda_http`: method, path, query, header and body come back, with a cookie.
use lambda_http::http::StatusCode;
use lambda_http::{Body, Error, IntoResponse, Request, RequestExt, Response, run, service_fn};
use serde_json::json;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    run(service_fn(answer)).await
}

async fn answer(request: Request) -> Result<impl IntoResponse, Error> {
    let name = request.query_string_parameters();
    let body = json!({
        "method": request.method().as_str(),
        "path": request.raw_http_path(),
        "name": name.first("name"),
        "header": request.headers().get("x-test").and_then(|value| value.to_str().ok()),
        "body": String::from_utf8_lossy(request.body().as_ref()),
    });
    let response = Response::builder()
        .status(StatusCode::CREATED)
        .header("content-type", "application/json")
        .header("set-cookie", "seen=1")
        .body(Body::from(body.to_string()))?;
    Ok(response)
}
