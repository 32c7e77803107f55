//! The router.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, header};
use axum::routing::{any, get};
use axum::{Extension, Router, middleware};
use tower::ServiceExt as _;
use tower_http::trace::TraceLayer;

use crate::auth::{self, Auth};
use crate::function_url::{self, Destination};
use crate::record::UrlAuth;
use crate::state::App;
use crate::{lambda, thaw_routes};

/// All routes. What no other takes is the Lambda API's, whose errors have a shape of their own.
pub fn router(app: Arc<App>, auth: Arc<Auth>) -> Router {
    let by_path = |State(app): State<Arc<App>>,
                   Extension(auth): Extension<Arc<Auth>>,
                   request: Request| async move {
        let destination = Destination::by_path(request.uri().path());
        url(app, &auth, destination, request).await
    };
    let api = |State(app): State<Arc<App>>, request: Request| lambda::serve(app, request);
    let inner = Router::new()
        .route("/healthz", get(thaw_routes::health))
        .route("/thaw/v1/functions", get(thaw_routes::list))
        .route("/thaw/v1/functions/{name}", get(thaw_routes::function))
        .route("/thaw/v1/functions/{name}/code", get(thaw_routes::code))
        .route("/thaw/v1/functions/{name}/logs", get(thaw_routes::logs))
        .route(
            "/thaw/v1/functions/{name}/progress",
            get(thaw_routes::progress),
        )
        .route(
            "/thaw/v1/layers/{name}/{version}/code",
            get(thaw_routes::layer_code),
        )
        .route("/thaw/v1/keys", auth::routes::all())
        .route("/thaw/v1/keys/{id}", auth::routes::one())
        .route("/fn/{name}", any(by_path))
        .route("/fn/{name}/", any(by_path))
        .route("/fn/{name}/{*path}", any(by_path))
        .fallback(api)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&auth),
            auth::admission::guard,
        ))
        .layer(Extension(Arc::clone(&auth)))
        .with_state(Arc::clone(&app));
    let all = move |request| by_host(Arc::clone(&app), Arc::clone(&auth), inner.clone(), request);
    // Failures are logged where they are understood; a 503 of /healthz is none.
    Router::new()
        .fallback(all)
        .layer(TraceLayer::new_for_http().on_failure(()))
}

/// A request to a function's own host is for that function, whatever its path; all others are for `inner`.
async fn by_host(
    app: Arc<App>,
    auth: Arc<Auth>,
    inner: Router,
    request: Request,
) -> Response<Body> {
    let host = request.headers().get(header::HOST);
    let host = host.and_then(|host| host.to_str().ok()).unwrap_or_default();
    match Destination::by_host(&app, host, request.uri().path()) {
        Some(Ok(destination)) => url(app, &auth, destination, request).await,
        Some(Err(unknown)) => unknown,
        None => match inner.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        },
    }
}

/// A call of a function URL. One whose configuration does not say that it is public is as the gateway is.
async fn url(
    app: Arc<App>,
    auth: &Auth,
    destination: Destination,
    request: Request,
) -> Response<Body> {
    let config = destination.config(&app);
    let is_public = config.as_ref().is_some_and(|url| url.auth == UrlAuth::None);
    let request = if auth.is_required() && !is_public {
        match auth::authorize_function_url(auth, request, destination.name()).await {
            Ok(request) => request,
            Err(answer) => return answer,
        }
    } else {
        request
    };
    function_url::serve(app, destination, config, request).await
}
