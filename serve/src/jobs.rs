//! Jobs: requests that outlive their connection and, in a store that does, the process. `POST /v1/jobs`, `GET` and
//! `DELETE /v1/jobs/{id}`, and its events.
//!
//! A job is in the store before it is accepted, with the seed of its first picture, and each picture is there before
//! the job says that it is done. After a restart the pictures that are missing are drawn, and are the same.

use crate::App;
use crate::backend::{Caller, Kind, Problem, Work};
use crate::openai::{datum, now, parse};
use crate::queue::{Receiver, Update, news};
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use respodiff_fields::Request;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::channel;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_stream::wrappers::ReceiverStream;

/// The part of the store with [`Accepted`].
const REQUEST: &str = "request";
/// The part of the store with [`End`].
const END: &str = "end";

/// A job as it was accepted.
#[derive(Serialize, Deserialize)]
struct Accepted {
    created: u64,
    request_id: String,
    tenant: Option<String>,
    idempotency_key: Option<String>,
    /// The body of the request.
    asked: Value,
    /// The seed of the first picture, which the request may have left to chance.
    seed: u64,
    pictures: usize,
    steps: usize,
}

/// The end of a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct End {
    /// completed, failed or cancelled.
    status: String,
    at: u64,
    error: Option<Value>,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    /// Steps done.
    done: usize,
    /// True once a step was taken.
    begun: bool,
    end: Option<End>,
}

#[derive(Clone)]
struct Job {
    id: String,
    accepted: Arc<Accepted>,
    progress: watch::Sender<Progress>,
    /// The task that waits for its pictures, once they are queued.
    task: Arc<OnceLock<AbortHandle>>,
}

impl Job {
    fn new(id: String, accepted: Accepted, end: Option<End>) -> Self {
        let done = if end.as_ref().is_some_and(|end| end.status == "completed") { accepted.steps } else { 0 };
        let (progress, _) = watch::channel(Progress { done, begun: false, end });
        Job { id, accepted: Arc::new(accepted), progress, task: Arc::default() }
    }

    /// The job object, with its pictures if they are given.
    fn json(&self, progress: &Progress, pictures: Option<Vec<Value>>) -> Value {
        let Progress { done, begun, end } = progress;
        let status = match end {
            Some(end) => &end.status,
            None if *begun => "generating",
            None => "queued",
        };
        json!({
            "id": self.id, "object": "job", "kind": "images.generation", "status": status,
            "created": self.accepted.created, "completed": end.as_ref().map(|end| end.at), "steps_done": done,
            "steps": self.accepted.steps, "result": pictures.map(|data| json!({"data": data})),
            "error": end.as_ref().and_then(|end| end.error.clone()),
        })
    }

    /// The job object of the moment, with the pictures if they are done.
    async fn shown(&self, app: &App) -> Result<Value, Problem> {
        let progress = self.progress.borrow().clone();
        let is_done = progress.end.as_ref().is_some_and(|end| end.status == "completed");
        let pictures = match is_done {
            false => None,
            true => {
                let (store, id, pictures) = (app.settings.store.clone(), self.id.clone(), self.accepted.pictures);
                let read = move |i: usize| {
                    let bytes = store.read(&id, &i.to_string())?;
                    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default())
                };
                Some(app.blocking(move || (0..pictures).map(read).collect::<Result<Vec<Value>, Problem>>()).await?)
            }
        };
        Ok(self.json(&progress, pictures))
    }

    fn accepted(&self) -> Response {
        let body = self.json(&self.progress.borrow(), None);
        let place = [(header::LOCATION, format!("/v1/jobs/{}", self.id))];
        (StatusCode::ACCEPTED, place, Json(body)).into_response()
    }

    fn is_over(&self) -> bool {
        self.progress.borrow().end.is_some()
    }

    /// Ends the job, unless it has ended already, and tells if it did.
    async fn end(&self, app: &App, status: &str, problem: Option<&Problem>) -> bool {
        let error = problem.map(|problem| problem.json()["error"].clone());
        let end = End { status: status.into(), at: now(), error };
        let is_first = self.progress.send_if_modified(|progress| {
            let is_first = progress.end.is_none();
            progress.end.get_or_insert(end.clone());
            is_first
        });
        if is_first {
            // If this fails, the job is only done once more after a restart.
            let _ = self.write(app, END.into(), serde_json::to_vec(&end).unwrap_or_default()).await;
        }
        is_first
    }

    async fn write(&self, app: &App, part: String, bytes: Vec<u8>) -> Result<(), Problem> {
        let (store, id) = (app.settings.store.clone(), self.id.clone());
        app.blocking(move || store.write(&id, &part, &bytes)).await
    }

    /// Waits for the pictures, and ends the job.
    fn follow(&self, app: &App, pictures: Vec<(usize, usize, Receiver)>) {
        let (job, app) = (self.clone(), app.clone());
        let task = tokio::spawn(async move {
            match job.pictures(&app, pictures).await {
                Ok(()) => job.end(&app, "completed", None).await,
                // A server that ends has not failed: after a restart, the job goes on.
                Err(problem) if app.queue.is_closed() && problem.kind != Kind::Cancelled => false,
                Err(problem) => job.end(&app, "failed", Some(&problem)).await,
            }
        });
        let _ = self.task.set(task.abort_handle());
    }

    /// Puts pictures into the store as they are done: each has its number and its steps.
    async fn pictures(&self, app: &App, pictures: Vec<(usize, usize, Receiver)>) -> Result<(), Problem> {
        let missing: usize = pictures.iter().map(|(_, steps, _)| steps).sum();
        let mut before = self.accepted.steps - missing.min(self.accepted.steps);
        for (number, steps, mut receiver) in pictures {
            loop {
                match news(&mut receiver).await? {
                    Update::Step { done, .. } => {
                        self.progress.send_modify(|p| (p.begun, p.done) = (true, before + done));
                    }
                    Update::Finished { picture, .. } => {
                        self.write(app, number.to_string(), datum(&picture).to_string().into()).await?;
                        break;
                    }
                }
            }
            before += steps;
            self.progress.send_modify(|p| (p.begun, p.done) = (true, before));
        }
        Ok(())
    }
}

/// Nanoseconds since 1970.
pub fn nanoseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// The jobs of a server, in the order in which they were accepted.
#[derive(Default)]
pub struct Jobs {
    all: Mutex<VecDeque<Job>>,
    latest: AtomicU64,
    /// Held while a request with an `Idempotency-Key` is accepted, so that no other with that key is.
    accepting: tokio::sync::Mutex<()>,
}

impl Jobs {
    fn with<T>(&self, of: impl FnOnce(&mut VecDeque<Job>) -> T) -> T {
        of(&mut self.all.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// A tenant's job.
    fn find(&self, id: &str, caller: &Caller) -> Result<Job, Problem> {
        let is_it = |job: &&Job| job.id == id && job.accepted.tenant.as_deref() == caller.tenant.as_deref();
        self.with(|jobs| jobs.iter().find(is_it).cloned()).ok_or_else(|| {
            Problem::new(Kind::NotFound, format!("there is no job `{id}`; ended ones are forgotten after a time"))
        })
    }

    /// An id that no other job has, nor had before a restart. Ids sort by time.
    fn id(&self) -> String {
        let now = nanoseconds();
        let next = |latest: u64| now.max(latest + 1);
        let latest = self.latest.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |latest| Some(next(latest)));
        format!("job-{:016x}", next(latest.unwrap_or(now)))
    }
}

/// Forgets the jobs that ended long ago, and the oldest ended ones beyond the number that is kept.
async fn forget(app: &App) -> Result<(), Problem> {
    let (most, time) = app.settings.kept;
    let gone = app.jobs.with(|jobs| {
        let ended = jobs.iter().filter(|job| job.is_over()).count();
        let mut surplus = ended.saturating_sub(most);
        let mut gone = Vec::new();
        jobs.retain(|job| {
            let old = |end: &End| end.at + time.as_secs() < now();
            let Some(is_old) = job.progress.borrow().end.as_ref().map(old) else { return true };
            let goes = is_old || surplus > 0;
            if goes {
                surplus = surplus.saturating_sub(1);
                gone.push(job.id.clone());
            }
            !goes
        });
        gone
    });
    let store = app.settings.store.clone();
    app.blocking(move || gone.iter().try_for_each(|id| store.remove(id))).await
}

/// Takes up the jobs of the store, and looks for old ones from time to time.
pub async fn resume(app: &App) {
    let store = app.settings.store.clone();
    let found = app.blocking(move || {
        let mut found = Vec::new();
        for id in store.jobs()? {
            let Some(request) = store.read(&id, REQUEST)? else {
                // It was never accepted.
                store.remove(&id)?;
                continue;
            };
            // Jobs that another version has written are left alone.
            let Ok(accepted) = serde_json::from_slice(&request) else { continue };
            let end = store.read(&id, END)?.and_then(|end| serde_json::from_slice(&end).ok());
            found.push(Job::new(id, accepted, end));
        }
        Ok(found)
    });
    let jobs = found.await.unwrap_or_default();
    app.jobs.with(|all| all.extend(jobs.iter().cloned()));
    let app = app.clone();
    tokio::spawn(async move {
        for job in jobs.iter().filter(|job| !job.is_over()) {
            if let Err(problem) = again(&app, job).await
                && !app.queue.is_closed()
            {
                job.end(&app, "failed", Some(&problem)).await;
            }
        }
        while !app.queue.is_closed() {
            let _ = forget(&app).await;
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
    });
}

/// Queues the pictures that a job of an earlier process lacks.
async fn again(app: &App, job: &Job) -> Result<(), Problem> {
    let Accepted { asked, seed, tenant, request_id, .. } = &*job.accepted;
    let caller = Caller { id: request_id.as_str().into(), tenant: tenant.as_deref().map(Into::into) };
    let (request, _) = parse(asked.to_string().as_bytes())?;
    let mut waits = 0;
    loop {
        let works = app.plan(Request { seed: Some(*seed), ..request.clone() }, &caller).await?;
        let (store, id) = (app.settings.store.clone(), job.id.clone());
        let numbered = works.into_iter().enumerate();
        let missing = app.blocking(move || {
            let lacks = |(i, _): &(usize, Work)| store.read(&id, &i.to_string()).map(|part| part.is_none());
            let mut missing = Vec::new();
            for work in numbered {
                if lacks(&work)? {
                    missing.push(work);
                }
            }
            Ok(missing)
        });
        let (numbers, works): (Vec<_>, Vec<_>) = missing.await?.into_iter().unzip();
        let steps: Vec<usize> = works.iter().map(|work| work.steps).collect();
        if job.is_over() {
            // It was cancelled meanwhile.
            return Ok(());
        }
        match app.queue.submit(works, app.wishes()) {
            Ok(receivers) => {
                let pictures = numbers.into_iter().zip(steps).zip(receivers).map(|((n, steps), r)| (n, steps, r));
                job.follow(app, pictures.collect());
                return Ok(());
            }
            // Accepted jobs wait for room.
            Err(problem) if problem.kind == Kind::Busy => {
                waits += 1;
                tokio::time::sleep(Duration::from_millis(50 * waits.min(20))).await;
            }
            Err(problem) => return Err(problem),
        }
    }
}

/// Waits until the tasks of all jobs have ended, once the queue has.
pub async fn ended(app: &App) {
    let runs = |job: &Job| job.task.get().is_some_and(|task| !task.is_finished());
    while app.jobs.with(|jobs| jobs.iter().any(runs)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// `POST /v1/jobs`: as for images, answered at once by 202. Of requests with one `Idempotency-Key`, the first is a job,
/// and the others are answered by that job.
pub async fn create(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = body?;
    let (request, answer) = parse(&body)?;
    if answer.stream || answer.previews > 0 {
        return Err(Problem::invalid("stream", "a job's events are at /v1/jobs/{id}/events; leave this field out"));
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let key = headers.get("idempotency-key").map(|key| String::from_utf8_lossy(key.as_bytes()).into_owned());
    let _accepting = match &key {
        Some(_) => Some(app.jobs.accepting.lock().await),
        None => None,
    };
    let is_same = |job: &&Job| {
        let Accepted { tenant, idempotency_key, .. } = &*job.accepted;
        tenant.as_deref() == caller.tenant.as_deref() && key.is_some() && *idempotency_key == key
    };
    if let Some(job) = app.jobs.with(|jobs| jobs.iter().find(is_same).cloned()) {
        return match job.accepted.asked == asked {
            true => Ok(job.accepted()),
            false => {
                Err(Problem::new(Kind::Conflict, "this Idempotency-Key came with another request; send a new one"))
            }
        };
    }
    let works = app.plan(request, &caller).await?;
    let each: Vec<usize> = works.iter().map(|work| work.steps).collect();
    let accepted = Accepted {
        created: now(),
        request_id: caller.id.to_string(),
        tenant: caller.tenant.as_deref().map(Into::into),
        idempotency_key: key,
        asked,
        seed: works.first().map_or(0, |work| work.seed),
        pictures: works.len(),
        steps: each.iter().sum(),
    };
    let receivers = app.queue.submit(works, app.wishes())?;
    let record = serde_json::to_vec(&accepted).unwrap_or_default();
    let job = Job::new(app.jobs.id(), accepted, None);
    // If this fails, the receivers are dropped, and the pictures with them.
    job.write(&app, REQUEST.into(), record).await?;
    job.follow(&app, each.into_iter().zip(receivers).enumerate().map(|(i, (steps, r))| (i, steps, r)).collect());
    app.jobs.with(|jobs| jobs.push_back(job.clone()));
    forget(&app).await?;
    Ok(job.accepted())
}

/// `GET /v1/jobs/{id}`.
pub async fn show(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Problem> {
    app.jobs.find(&id, &caller)?.shown(&app).await.map(Json)
}

/// `DELETE /v1/jobs/{id}`: the images of one that is not done leave the batch before the next step; the pictures of
/// one that has ended are forgotten.
pub async fn cancel(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Problem> {
    let job = app.jobs.find(&id, &caller)?;
    if job.end(&app, "cancelled", None).await {
        job.task.get().into_iter().for_each(AbortHandle::abort);
    } else {
        app.jobs.with(|jobs| jobs.retain(|other| other.id != id));
        let store = app.settings.store.clone();
        app.blocking(move || store.remove(&id)).await?;
    }
    let body = job.json(&job.progress.borrow(), None);
    Ok(Json(body))
}

/// `GET /v1/jobs/{id}/events`: the job object after every step, the last one with the pictures.
pub async fn events(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let job = app.jobs.find(&id, &caller)?;
    let mut progress = job.progress.subscribe();
    let (sender, events) = channel::<Result<Event, Infallible>>(16);
    tokio::spawn(async move {
        loop {
            let state = progress.borrow_and_update().clone();
            let is_over = state.end.is_some();
            let body = match is_over {
                true => job.shown(&app).await.unwrap_or_else(|problem| problem.json()),
                false => job.json(&state, None),
            };
            let event = Event::default().event(body["status"].as_str().unwrap_or("error")).data(body.to_string());
            if sender.send(Ok(event)).await.is_err() || is_over || progress.changed().await.is_err() {
                return;
            }
        }
    });
    Ok(Sse::new(ReceiverStream::new(events)).keep_alive(KeepAlive::default()).into_response())
}
