//! HTTP: the OpenAI API, tokenisation, health and metrics on one listener.

mod body;
mod error;
mod openai;
mod tokenize;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use tower_http::catch_panic::CatchPanicLayer;

use super::Metrics;
use crate::generation::Generator;
use error::ApiError;

/// What every handler works with.
#[derive(Debug, Clone)]
struct App {
    generator: Generator,
    metrics: Metrics,
    /// When serving began, in seconds since 1970.
    started: u64,
}

/// All routes.
pub(super) fn router(generator: Generator, metrics: Metrics) -> Router {
    Router::new()
        .route("/v1/completions", post(openai::completions))
        .route("/v1/chat/completions", post(openai::chat_completions))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*name}", get(openai::model))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(ready))
        .route("/health/ready", get(ready))
        .route("/health/live", get(live))
        .route("/metrics", get(render_metrics))
        .route("/version", get(version))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("the handler panicked; the server's log says where").into_response()
        }))
        .layer(from_fn(named))
        .with_state(App {
            generator,
            metrics,
            started: openai::now(),
        })
}

/// A layer: every answer, errors too, has the id that its request came with or is given here.
async fn named(mut request: Request, next: Next) -> Response {
    let id = HeaderValue::from_str(&openai::request_id(request.headers())).ok();
    if let Some(id) = id.clone() {
        request.headers_mut().insert(openai::REQUEST_ID, id);
    }
    let mut response = next.run(request).await;
    if let Some(id) = id {
        response.headers_mut().insert(openai::REQUEST_ID, id);
    }
    response
}

/// Whether new work is welcome: the readiness probe.
async fn ready(State(app): State<App>) -> Response {
    let engine = app.generator.engine();
    let (status, state) = if !engine.is_healthy() {
        (StatusCode::SERVICE_UNAVAILABLE, "failed")
    } else if engine.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
    } else {
        (StatusCode::OK, "ok")
    };
    (status, Json(json!({"status": state}))).into_response()
}

/// Whether the engine lives, draining or not: the liveness probe.
async fn live(State(app): State<App>) -> Response {
    if app.generator.engine().is_healthy() {
        Json(json!({"status": "ok"})).into_response()
    } else {
        let failed = Json(json!({"status": "failed"}));
        (StatusCode::SERVICE_UNAVAILABLE, failed).into_response()
    }
}

async fn render_metrics(State(app): State<App>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], app.metrics.render()).into_response()
}

async fn version() -> Response {
    Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

async fn no_route(method: Method, uri: Uri, body: Body) -> ApiError {
    let error = ApiError::new(
        StatusCode::NOT_FOUND,
        format!(
            "no route {method} {}; there are /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /health and /metrics",
            uri.path()
        ),
    );
    if body::discard(body).await {
        error
    } else {
        error.closing()
    }
}

async fn no_method(method: Method, uri: Uri, body: Body) -> ApiError {
    let error = ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{} does not take {method}", uri.path()),
    );
    if body::discard(body).await {
        error
    } else {
        error.closing()
    }
}
