//! Jobs: requests that outlive their connection. `POST /v1/jobs`, `GET` and `DELETE /v1/jobs/{id}`, and its events.

use crate::App;
use crate::backend::{Kind, Problem};
use crate::openai::{datum, now, parse};
use crate::queue::{Update, news};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Mutex;
use tokio::sync::mpsc::channel;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_stream::wrappers::ReceiverStream;

/// Ended jobs that are kept for their clients. The oldest are forgotten first.
const KEPT: usize = 64;

#[derive(Clone, Debug)]
struct Progress {
    status: &'static str,
    created: u64,
    completed: Option<u64>,
    done: usize,
    total: usize,
    pictures: Vec<Value>,
    error: Option<Value>,
}

impl Progress {
    fn is_over(&self) -> bool {
        self.completed.is_some()
    }

    fn end(&mut self, status: &'static str) {
        (self.status, self.completed) = (status, Some(now()));
    }

    /// The job object; events leave the pictures out.
    fn json(&self, id: &str, pictures: bool) -> Value {
        let Progress { status, created, completed, done, total, error, .. } = self;
        let result = (pictures && *status == "completed").then(|| json!({"data": self.pictures}));
        json!({
            "id": id, "object": "job", "kind": "images.generation", "status": status, "created": created,
            "completed": completed, "steps_done": done, "steps": total, "result": result, "error": error,
        })
    }
}

struct Job {
    id: String,
    progress: watch::Sender<Progress>,
    task: AbortHandle,
}

/// The jobs of a server.
#[derive(Default)]
pub struct Jobs(Mutex<VecDeque<Job>>);

impl Jobs {
    fn with<T>(&self, of: impl FnOnce(&mut VecDeque<Job>) -> T) -> T {
        of(&mut self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    fn find<T>(&self, id: &str, of: impl FnOnce(&Job) -> T) -> Result<T, Problem> {
        let found = self.with(|jobs| jobs.iter().find(|job| job.id == id).map(of));
        found.ok_or_else(|| {
            Problem::new(Kind::NotFound, format!("there is no job `{id}`; ended ones are soon forgotten"))
        })
    }
}

/// `POST /v1/jobs`: as for images, answered at once by 202.
pub async fn create(State(app): State<App>, body: Result<Bytes, BytesRejection>) -> Result<Response, Problem> {
    let (request, answer) = parse(&body?)?;
    if answer.stream || answer.previews > 0 {
        return Err(Problem::invalid("stream", "a job's events are at /v1/jobs/{id}/events; leave this field out"));
    }
    let works = app.plan(request).await?;
    let total = works.iter().map(|work| work.steps).sum();
    let mut receivers = app.queue.submit(works, app.wishes())?;
    let id = format!("job-{:016x}", app.number());
    let (progress, _) = watch::channel(Progress {
        status: "queued",
        created: now(),
        completed: None,
        done: 0,
        total,
        pictures: Vec::new(),
        error: None,
    });
    let told = progress.clone();
    let task = tokio::spawn(async move {
        let mut before = 0;
        for receiver in &mut receivers {
            loop {
                match news(receiver).await {
                    Ok(Update::Step { done, .. }) => {
                        told.send_modify(|p| (p.status, p.done) = ("generating", before + done));
                    }
                    Ok(Update::Finished { picture, .. }) => {
                        before = told.borrow().done + 1;
                        told.send_modify(|p| p.pictures.push(datum(&picture)));
                        break;
                    }
                    Err(problem) => {
                        told.send_modify(|p| {
                            p.error = Some(problem.json()["error"].clone());
                            p.end("failed");
                        });
                        return;
                    }
                }
            }
        }
        told.send_modify(|p| {
            p.done = p.total;
            p.end("completed");
        });
    });
    let body = progress.borrow().json(&id, false);
    let job = Job { id: id.clone(), progress, task: task.abort_handle() };
    app.jobs.with(|jobs| {
        jobs.push_back(job);
        let ended = jobs.iter().filter(|job| job.progress.borrow().is_over()).count();
        for _ in KEPT..ended {
            if let Some(oldest) = jobs.iter().position(|job| job.progress.borrow().is_over()) {
                jobs.remove(oldest);
            }
        }
    });
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, format!("/v1/jobs/{id}"))], Json(body)).into_response())
}

/// `GET /v1/jobs/{id}`.
pub async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    app.jobs.find(&id, |job| Json(job.progress.borrow().json(&id, true)))
}

/// `DELETE /v1/jobs/{id}`: its images leave the batch before the next step.
pub async fn cancel(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    app.jobs.find(&id, |job| {
        job.progress.send_if_modified(|progress| {
            let running = !progress.is_over();
            if running {
                job.task.abort();
                progress.end("cancelled");
            }
            running
        });
        Json(job.progress.borrow().json(&id, false))
    })
}

/// `GET /v1/jobs/{id}/events`: the job object after every step, the last one with the pictures.
pub async fn events(State(app): State<App>, Path(id): Path<String>) -> Result<Response, Problem> {
    let mut progress = app.jobs.find(&id, |job| job.progress.subscribe())?;
    let (sender, events) = channel::<Result<Event, Infallible>>(16);
    tokio::spawn(async move {
        loop {
            let state = progress.borrow_and_update().clone();
            let body = state.json(&id, state.is_over());
            let event = Event::default().event(state.status).data(body.to_string());
            if sender.send(Ok(event)).await.is_err() || state.is_over() || progress.changed().await.is_err() {
                return;
            }
        }
    });
    Ok(Sse::new(ReceiverStream::new(events)).keep_alive(KeepAlive::default()).into_response())
}
