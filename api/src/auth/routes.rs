//! `/thaw/v1/keys`: what `thaw keys` asks for.

use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::routing::{MethodRouter, get, put};
use serde::Serialize;
use thaw_api_types::keys::{ChangeKeyRequest, CreateKeyRequest, CreatedKey, KeyList};

use super::keys::KeyError;
use super::{Auth, ChangeKeyError};

/// Largest body, bytes.
const BODY_BYTES_MAX: usize = 4096;

/// `/thaw/v1/keys`.
pub fn all<S: Clone + Send + Sync + 'static>() -> MethodRouter<S> {
    get(list)
        .post(create)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

/// `/thaw/v1/keys/{id}`.
pub fn one<S: Clone + Send + Sync + 'static>() -> MethodRouter<S> {
    put(change)
        .delete(remove)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

async fn list(Extension(auth): Extension<Arc<Auth>>) -> Response<Body> {
    let list = KeyList {
        keys: auth.list(),
        required: auth.is_required(),
    };
    json(StatusCode::OK, &list)
}

async fn create(Extension(auth): Extension<Arc<Auth>>, body: Bytes) -> Response<Body> {
    let request: CreateKeyRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return text(StatusCode::BAD_REQUEST, &format!("no such key: {error}")),
    };
    match auth.create(request).await {
        Ok(key) => {
            let created = CreatedKey {
                key: key.summary(),
                secret_access_key: key.secret.clone(),
            };
            json(StatusCode::CREATED, &created)
        }
        Err(error) => failed(&error),
    }
}

async fn change(
    Extension(auth): Extension<Arc<Auth>>,
    Path(id): Path<String>,
    body: Bytes,
) -> Response<Body> {
    let request: ChangeKeyRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return text(StatusCode::BAD_REQUEST, &format!("no such change: {error}")),
    };
    match auth.change(&id, request).await {
        Ok(key) => json(StatusCode::OK, &key.summary()),
        Err(error) => failed(&error),
    }
}

async fn remove(Extension(auth): Extension<Arc<Auth>>, Path(id): Path<String>) -> Response<Body> {
    match auth.remove(&id).await {
        Ok(()) => text(StatusCode::OK, "removed"),
        Err(error) => failed(&error),
    }
}

fn failed(error: &ChangeKeyError) -> Response<Body> {
    let status = match error {
        ChangeKeyError::Unknown(_) => StatusCode::NOT_FOUND,
        ChangeKeyError::TooMany | ChangeKeyError::Key(KeyError::Invalid(_)) => {
            StatusCode::BAD_REQUEST
        }
        ChangeKeyError::Key(KeyError::Random) | ChangeKeyError::Store(_) => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    };
    text(status, &crate::engine::chain(error))
}

fn text(status: StatusCode, text: &str) -> Response<Body> {
    typed(
        status,
        Body::from(format!("{text}\n")),
        "text/plain; charset=utf-8",
    )
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => typed(status, Body::from(bytes), "application/json"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn typed(status: StatusCode, body: Body, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    // An answer may hold a secret.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
