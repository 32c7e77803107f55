//! The router, and serving until told to stop.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::connect_info::Connected;
use axum::extract::{Request, State};
use axum::http::Response;
use axum::routing::{any, get};
use axum::serve::{IncomingStream, Listener};
use axum::{Extension, Router, middleware};
use tower_http::trace::TraceLayer;

use crate::auth::{self, Auth};
use crate::state::App;
use crate::{function_url, lambda, thaw_routes};

/// All routes. What no other takes is the Lambda API's, whose errors have a shape of their own.
pub fn router(app: Arc<App>, auth: Arc<Auth>) -> Router {
    let url = |State(app): State<Arc<App>>, request: Request| url(app, request);
    let api = |State(app): State<Arc<App>>, request: Request| lambda::serve(app, request);
    Router::new()
        .route("/healthz", get(thaw_routes::health))
        .route("/thaw/v1/functions", get(thaw_routes::list))
        .route("/thaw/v1/functions/{name}", get(thaw_routes::function))
        .route("/thaw/v1/functions/{name}/code", get(thaw_routes::code))
        .route("/thaw/v1/functions/{name}/logs", get(thaw_routes::logs))
        .route(
            "/thaw/v1/functions/{name}/progress",
            get(thaw_routes::progress),
        )
        .route("/thaw/v1/keys", auth::routes::all())
        .route("/thaw/v1/keys/{id}", auth::routes::one())
        .route("/fn/{name}", any(url))
        .route("/fn/{name}/", any(url))
        .route("/fn/{name}/{*path}", any(url))
        .fallback(api)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&auth),
            auth::admission::guard,
        ))
        .layer(Extension(auth))
        // Failures are logged where they are understood; a 503 of /healthz is none.
        .layer(TraceLayer::new_for_http().on_failure(()))
        .with_state(app)
}

/// A call of a function URL. While no function says that its URL is public, all are as the gateway is.
async fn url(app: Arc<App>, request: Request) -> Response<Body> {
    let auth = request.extensions().get::<Arc<Auth>>().cloned();
    let request = match auth {
        Some(auth) if auth.is_required() => {
            let function = function_url::name(request.uri().path());
            match auth::authorize_function_url(&auth, request, &function).await {
                Ok(request) => request,
                Err(answer) => return answer,
            }
        }
        _ => request,
    };
    function_url::serve(app, request).await
}

/// Serves until `shutdown` ends, then lets running requests end within the drain limit.
///
/// # Errors
/// The listener failed.
pub async fn serve<L>(
    listener: L,
    router: Router,
    app: &Arc<App>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()>
where
    L: Listener<Addr = SocketAddr>,
    SocketAddr: for<'a> Connected<IncomingStream<'a, L>>,
{
    let stop = app.stop.clone();
    let told = app.stop.clone();
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let serving = axum::serve(listener, service).with_graceful_shutdown(async move {
        shutdown.await;
        // Streams end now; requests that wait for a sandbox are refused.
        told.cancel();
    });
    let limit = app.limits.drain_limit;
    tokio::select! {
        served = serving => served,
        () = async {
            stop.cancelled().await;
            tokio::time::sleep(limit).await;
        } => Ok(()),
    }
}
