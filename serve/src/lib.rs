//! respodiff's HTTP server: a bounded queue before a running batch, and the routes of several dialects. It knows
//! nothing of networks; an engine is whatever implements [`Backend`].
//!
//! | route | |
//! | --- | --- |
//! | `POST /v1/images/generations` | OpenAI's, with `stream`, and `accept: image/png` for the file itself |
//! | `GET /v1/models`, `POST /v1/estimate` | the models; memory and time of a request that is not run |
//! | `POST /v1/jobs`, `/v1/jobs/{id}`, `/v1/jobs/{id}/events` | requests that outlive their connection |
//! | `/sdapi/v1/txt2img`, `progress`, `interrupt` and others | what A1111's front-ends use |
//! | `GET /health/live`, `/health/ready`, `/metrics` | probes, and Prometheus' text |
//! | `GET /openapi.json`, `/` | [the routes and their fields as OpenAPI 3.1](OPENAPI), and a page to try them |
//!
//! Every error has the form of OpenAI's error object, with the field that it is about.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod backend;
mod jobs;
mod metrics;
mod openai;
mod problem;
mod queue;
mod store;
mod webui;

pub use backend::{Backend, Batch, Caller, Estimate, Event, Kind, Model, Picture, Problem, Work};
pub use respodiff_fields::Request;
pub use store::{Memory, Store};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use jobs::Jobs;
use metrics::Metrics;
use queue::{Queue, Wishes};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;
use webui::WebUi;

/// The OpenAPI document of the routes.
pub const OPENAPI: &str = include_str!("openapi.json");

/// A key that lets requests in.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    /// The name of those who have it. Jobs, progress and quotas are each tenant's own.
    pub tenant: Option<Arc<str>>,
    /// The key itself.
    pub key: String,
}

/// The settings of a server.
#[derive(Clone)]
pub struct Settings {
    /// The most images that wait.
    pub queue: usize,
    /// The keys of which every request but those of probes must bring one, as `Authorization: Bearer KEY`; if there are
    /// none, no key is asked for.
    pub keys: Vec<Key>,
    /// The place where jobs are kept.
    pub store: Arc<dyn Store>,
    /// The most ended jobs that are kept, and how long. The oldest are forgotten first.
    pub kept: (usize, Duration),
    /// The most bytes of a body.
    pub body_limit: usize,
    /// The time after which an image that is not done is given up.
    pub timeout: Option<Duration>,
    /// Threads that speak HTTP.
    pub threads: usize,
    /// Gets a line of JSON for every request that was answered.
    pub log: Option<fn(&str)>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            queue: 64,
            keys: Vec::new(),
            store: Arc::new(Memory::default()),
            kept: (64, Duration::from_secs(24 * 3600)),
            body_limit: 1 << 20,
            timeout: None,
            threads: 1,
            log: None,
        }
    }
}

/// The state that every route can use.
#[derive(Clone)]
struct App {
    backend: Arc<dyn Backend>,
    queue: Queue,
    metrics: Arc<Metrics>,
    jobs: Arc<Jobs>,
    webui: Arc<WebUi>,
    settings: Arc<Settings>,
    numbers: Arc<AtomicU64>,
    closing: Arc<AtomicBool>,
}

impl App {
    /// Does work that takes longer than a task should.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let outcome = tokio::task::spawn_blocking(work).await;
        outcome.unwrap_or_else(|problem| Err(Problem::new(Kind::Internal, problem.to_string())))
    }

    async fn plan(&self, request: Request, caller: &Caller) -> Result<Vec<Work>, Problem> {
        let (backend, caller) = (self.backend.clone(), caller.clone());
        self.blocking(move || backend.plan(&request, &caller)).await
    }

    fn wishes(&self) -> Wishes {
        Wishes { deadline: self.settings.timeout.map(|timeout| Instant::now() + timeout), previews: 0 }
    }

    /// A number that no other call gets.
    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }
}

/// A server that is ready to listen.
pub struct Server {
    app: App,
    batch: std::thread::JoinHandle<()>,
}

impl Server {
    /// Starts the thread of the batch.
    ///
    /// # Errors
    /// The system's, if no thread can be started.
    pub fn new(backend: Arc<dyn Backend>, settings: Settings) -> std::io::Result<Self> {
        let metrics = Arc::new(Metrics::default());
        let (queue, batch) = Queue::start(backend.clone(), settings.queue, metrics.clone())?;
        let app = App {
            backend,
            queue,
            metrics,
            jobs: Arc::default(),
            webui: Arc::default(),
            settings: Arc::new(settings),
            // Ids of requests are other ones after a restart.
            numbers: Arc::new(AtomicU64::new(jobs::nanoseconds())),
            closing: Arc::default(),
        };
        Ok(Server { app, batch })
    }

    /// The routes.
    pub fn router(&self) -> Router {
        let app = self.app.clone();
        Router::new()
            .route("/", get(page))
            .route("/openapi.json", get(openapi))
            .route("/v1/images/generations", post(openai::generate))
            .route("/v1/models", get(openai::models))
            .route("/v1/estimate", post(openai::estimate))
            .route("/v1/jobs", post(jobs::create))
            .route("/v1/jobs/{id}", get(jobs::show).delete(jobs::cancel))
            .route("/v1/jobs/{id}/events", get(jobs::events))
            .route("/sdapi/v1/txt2img", post(webui::txt2img))
            .route("/sdapi/v1/progress", get(webui::progress))
            .route("/sdapi/v1/interrupt", post(webui::interrupt))
            .route("/sdapi/v1/samplers", get(webui::samplers))
            .route("/sdapi/v1/sd-models", get(webui::models))
            .route("/sdapi/v1/options", get(webui::options))
            .route("/sdapi/v1/loras", get(webui::loras))
            .route("/sdapi/v1/embeddings", get(webui::embeddings))
            .route("/sdapi/v1/prompt-styles", get(webui::prompt_styles))
            .route("/metrics", get(metrics))
            .route("/health", get(ready))
            .route("/health/live", get(live))
            .route("/health/ready", get(ready))
            .fallback(async || {
                Problem::new(Kind::NotFound, "there is no such route; see the list in the documentation")
            })
            .method_not_allowed_fallback(async || {
                let problem = Problem::new(Kind::Invalid, "this route has no such method");
                (StatusCode::METHOD_NOT_ALLOWED, axum::Json(problem.json()))
            })
            .layer(DefaultBodyLimit::max(app.settings.body_limit))
            .layer(from_fn_with_state(app.clone(), around))
            .with_state(app)
    }

    /// Serves until `stop` is ready. Then it takes no more requests, finishes those that it has, and returns.
    ///
    /// # Errors
    /// The system's.
    pub fn run(self, listener: TcpListener, stop: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
        let threads = self.app.settings.threads.max(1);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
        let (router, app) = (self.router(), self.app.clone());
        runtime.block_on(async move {
            jobs::resume(&app).await;
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let closing = app.closing.clone();
            let stopped = async move {
                stop.await;
                closing.store(true, Ordering::Relaxed);
            };
            axum::serve(listener, router).with_graceful_shutdown(stopped).await
        })?;
        self.app.queue.close();
        // A panic of that thread has been reported where it happened.
        let _ = self.batch.join();
        // The last pictures of jobs are still on their way to the store.
        runtime.block_on(jobs::ended(&self.app));
        Ok(())
    }
}

/// Waits for Ctrl-C or SIGTERM.
pub async fn interrupted() {
    #[cfg(unix)]
    if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = tokio::signal::ctrl_c() => (),
        }
        return;
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Handles every request around its route: checks the key, gives it an id, and counts the answer.
async fn around(State(app): State<App>, mut request: axum::extract::Request, next: Next) -> Response {
    const ID: HeaderName = HeaderName::from_static("x-request-id");
    let given = request.headers().get(&ID).and_then(|id| id.to_str().ok()).filter(|id| id.len() <= 128);
    let id: Arc<str> = given.map_or_else(|| format!("req-{:016x}", app.number()).into(), Into::into);
    let route = request.extensions().get::<MatchedPath>().map_or("none".to_string(), |path| path.as_str().into());
    let open = route.starts_with("/health") || route == "/";
    let (method, began) = (request.method().clone(), Instant::now());
    let tenant = tenant(&app, request.headers().get(header::AUTHORIZATION)).or(open.then_some(None));
    let mut response = match tenant.clone() {
        Some(tenant) => {
            request.extensions_mut().insert(Caller { id: id.clone(), tenant });
            next.run(request).await
        }
        None => Problem::new(Kind::Unauthorized, "send the key as `Authorization: Bearer KEY`").into_response(),
    };
    let status = response.status().as_u16();
    app.metrics.answered(&route, status);
    if let Some(log) = app.settings.log {
        let line = serde_json::json!({
            "time": openai::now(), "id": &*id, "tenant": tenant.flatten().as_deref(), "method": method.as_str(),
            "route": route, "status": status, "ms": began.elapsed().as_millis() as u64,
        });
        log(&line.to_string());
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(ID, id);
    }
    response
}

/// The tenant of a request; `None` if it brings no key although one is needed. The time that this takes depends neither
/// on the place of the first difference nor on which key it is.
#[expect(clippy::option_option, reason = "a key need not have a name")]
fn tenant(app: &App, header: Option<&HeaderValue>) -> Option<Option<Arc<str>>> {
    let keys = &app.settings.keys;
    if keys.is_empty() {
        return Some(None);
    }
    let given = header.and_then(|value| value.as_bytes().strip_prefix(b"Bearer ")).unwrap_or_default();
    let equal = |found: Option<usize>, (i, key): (usize, &Key)| match given.ct_eq(key.key.as_bytes()).into() {
        true => Some(i),
        false => found,
    };
    keys.iter().enumerate().fold(None, equal).map(|i| keys[i].tenant.clone())
}

async fn live() -> &'static str {
    "alive\n"
}

async fn ready(State(app): State<App>) -> Response {
    match app.closing.load(Ordering::Relaxed) || app.queue.is_closed() {
        false => {
            let models = app.backend.models();
            let loaded: Vec<&str> = models.iter().filter(|model| model.loaded).map(|model| &*model.id).collect();
            axum::Json(serde_json::json!({"status": "ready", "loaded": loaded})).into_response()
        }
        true => Problem::new(Kind::Unavailable, "the server is about to end").into_response(),
    }
}

async fn metrics(State(app): State<App>) -> ([(HeaderName, &'static str); 1], String) {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.text())
}

async fn openapi() -> ([(HeaderName, &'static str); 1], &'static str) {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}

async fn page() -> Html<&'static str> {
    Html(include_str!("page.html"))
}
