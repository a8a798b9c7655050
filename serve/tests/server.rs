//! The server before an engine that draws numbers: routes, queue, batch, and whatever clients may send.

use axum::Router;
use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use respodiff_serve::{
    Backend, Batch, Caller, Estimate, Event, Key, Kind, Memory, Model, Picture, Problem, Request, Server, Settings,
    Store, Work,
};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tower::ServiceExt;

/// An engine whose pictures are their seeds and steps in words.
#[derive(Default)]
struct Fake {
    /// Batches that were made.
    opened: AtomicUsize,
    /// Images in the batch at the moment, and the most that ever were.
    inside: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    cancelled: Arc<AtomicUsize>,
}

const ROWS: usize = 4;

impl Backend for Fake {
    fn models(&self) -> Vec<Model> {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        vec![Model {
            id: "fake".into(),
            size: (64, 64),
            samplers: names(&["Euler"]),
            concepts: names(&["woman"]),
            loras: names(&["style"]),
            embeddings: names(&["word"]),
            sha256: None,
            loaded: true,
        }]
    }

    fn plan(&self, request: &Request, _: &Caller) -> Result<Vec<Work>, Problem> {
        if request.model.as_deref().is_some_and(|model| model != "fake") {
            return Err(Problem::new(Kind::NotFound, "no such model"));
        }
        let steps = request.steps.unwrap_or(5);
        if steps == 0 || steps > 1000 {
            return Err(Problem::invalid("num_inference_steps", "1 to 1000"));
        }
        let size = (request.width.unwrap_or(64), request.height.unwrap_or(64));
        let first = request.seed.unwrap_or(0);
        let work = |i: usize| {
            let seed = first.wrapping_add(i as u64);
            Work { model: "fake".into(), size, seed, steps, image: Box::new(request.prompts[0].clone()) }
        };
        Ok((0..request.n).map(work).collect())
    }

    fn estimate(&self, request: &Request) -> Result<Estimate, Problem> {
        Ok(Estimate {
            memory_bytes: Some(5),
            steps: self.plan(request, &Caller::default())?.iter().map(|work| work.steps).sum(),
        })
    }

    fn open(&self, work: &Work) -> Result<Box<dyn Batch>, Problem> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        if work.size.0 > 4096 {
            return Err(Problem::new(Kind::Impossible, "no memory for this size"));
        }
        let (inside, most, cancelled) = (self.inside.clone(), self.most.clone(), self.cancelled.clone());
        Ok(Box::new(FakeBatch { size: work.size, images: Vec::new(), next: 0, inside, most, cancelled }))
    }
}

struct FakeBatch {
    size: (usize, usize),
    /// Id, prompt, seed, steps done and in all.
    images: Vec<(u64, String, u64, usize, usize)>,
    next: u64,
    inside: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    cancelled: Arc<AtomicUsize>,
}

impl FakeBatch {
    fn count(&self) {
        self.inside.store(self.images.len(), Ordering::Relaxed);
        self.most.fetch_max(self.images.len(), Ordering::Relaxed);
    }
}

impl Batch for FakeBatch {
    fn fits(&self, work: &Work) -> bool {
        work.size == self.size
    }

    fn free(&self) -> usize {
        ROWS - self.images.len()
    }

    fn join(&mut self, work: &Work) -> Result<u64, Problem> {
        assert!(self.images.len() < ROWS);
        let prompt = work.image.downcast_ref::<String>().unwrap().clone();
        if prompt == "refused" {
            return Err(Problem::invalid("prompt", "this one cannot join"));
        }
        self.next += 1;
        self.images.push((self.next, prompt, work.seed, 0, work.steps));
        self.count();
        Ok(self.next)
    }

    fn step(&mut self) -> Result<Vec<(u64, Event)>, Problem> {
        std::thread::sleep(Duration::from_millis(1));
        if self.images.iter().any(|(_, prompt, ..)| prompt == "poison") {
            return Err(Problem::new(Kind::Internal, "the device is lost"));
        }
        assert!(!self.images.iter().any(|(_, prompt, ..)| prompt == "panic"), "a fault of the engine");
        let mut events = Vec::new();
        for (id, prompt, seed, done, total) in &mut self.images {
            *done += 1;
            let (done, total) = (*done, *total);
            events.push(match done == total {
                _ if prompt == "broken" => (*id, Event::Failed(Problem::new(Kind::Impossible, "not finite"))),
                false => (*id, Event::Step { done, total }),
                true => {
                    let png = format!("{seed} in {total}").into_bytes();
                    (*id, Event::Finished(Picture { png, seed: *seed, parameters: json!({"steps": total}) }))
                }
            });
        }
        self.images.retain(|(_, prompt, _, done, total)| done < total && prompt != "broken");
        self.count();
        Ok(events)
    }

    fn cancel(&mut self, image: u64) {
        self.images.retain(|(id, ..)| *id != image);
        self.cancelled.fetch_add(1, Ordering::Relaxed);
        self.count();
    }

    fn preview(&mut self, image: u64) -> Result<Option<Vec<u8>>, Problem> {
        Ok(self.images.iter().find(|(id, ..)| *id == image).map(|image| format!("step {}", image.3).into_bytes()))
    }
}

fn server(settings: Settings) -> (Router, Arc<Fake>) {
    let fake = Arc::new(Fake::default());
    let server = Server::new(fake.clone(), settings).unwrap();
    (server.router(), fake)
}

/// Keys that are also the names of who has them.
fn keys(names: &[&str]) -> Vec<Key> {
    names.iter().map(|name| Key { tenant: Some((*name).into()), key: name.to_string() }).collect()
}

async fn send(router: &Router, method: &str, path: &str, body: impl Into<Body>) -> (StatusCode, Vec<u8>) {
    let request = HttpRequest::builder().method(method).uri(path).body(body.into()).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status();
    (status, axum::body::to_bytes(response.into_body(), 1 << 24).await.unwrap().to_vec())
}

async fn json(router: &Router, method: &str, path: &str, body: Value) -> (StatusCode, Value) {
    let (status, body) = send(router, method, path, body.to_string()).await;
    (status, serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&body))))
}

const GENERATE: &str = "/v1/images/generations";

/// What a picture's base64 says.
fn decoded(datum: &Value) -> String {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(datum["b64_json"].as_str().unwrap()).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn pictures_of_many_clients_are_their_own() {
    let (router, fake) = server(Settings::default());
    let ask = async |i: usize| {
        let (seed, steps) = (1000 * i, 3 + i % 7);
        let body = json!({"prompt": "x", "seed": seed, "num_inference_steps": steps, "n": 1 + i % 3});
        let (status, answer) = json(&router, "POST", GENERATE, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let data = answer["data"].as_array().unwrap();
        assert_eq!(data.len(), 1 + i % 3);
        for (k, datum) in data.iter().enumerate() {
            assert_eq!(decoded(datum), format!("{} in {steps}", seed + k));
            assert_eq!(datum["seed"], seed + k);
        }
    };
    let all: Vec<_> = (0..24).map(ask).collect();
    for one in all {
        // Polled one after the other, they are queued all the same by the first poll of each.
        one.await;
    }
    let together = (0..24).map(|i| {
        let router = router.clone();
        tokio::spawn(async move {
            let body = json!({"prompt": "x", "seed": i, "num_inference_steps": 20});
            json(&router, "POST", GENERATE, body).await
        })
    });
    for (i, task) in together.collect::<Vec<_>>().into_iter().enumerate() {
        let (status, answer) = task.await.unwrap();
        assert_eq!((status, decoded(&answer["data"][0])), (StatusCode::OK, format!("{i} in 20")));
    }
    assert_eq!((fake.most.load(Ordering::Relaxed), fake.opened.load(Ordering::Relaxed)), (ROWS, 1));
    assert_eq!(fake.inside.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_its_field() {
    let (router, _) = server(Settings { body_limit: 10_000, ..Settings::default() });
    for (body, status, field) in [
        (json!({}), 400, json!("prompt")),
        (json!({"prompt": 3}), 400, json!("prompt")),
        (json!({"prompt": "x", "stepps": 3}), 400, json!("stepps")),
        (json!({"prompt": "x", "n": 0}), 400, json!("n")),
        (json!({"prompt": "x", "n": -1}), 400, json!("n")),
        (json!({"prompt": "x", "n": 65}), 400, json!("n")),
        (json!({"prompt": "x", "size": "big"}), 400, json!("size")),
        (json!({"prompt": "x", "size": "64x99999999999999999999999"}), 400, json!("size")),
        (json!({"prompt": "x", "response_format": "url"}), 400, json!("response_format")),
        (json!({"prompt": "x", "output_format": "jpeg"}), 400, json!("output_format")),
        (json!({"prompt": "x", "partial_images": 4}), 400, json!("partial_images")),
        (json!({"prompt": "x", "num_inference_steps": 0}), 400, json!("num_inference_steps")),
        (json!({"prompt": "x", "guidance_scale": "much"}), 400, json!("guidance_scale")),
        (json!({"prompt": "x", "concepts": [{"weight": 1}]}), 400, json!("concepts")),
        (json!({"prompt": "x", "model": "dall-e-3"}), 404, Value::Null),
        (json!({"prompt": "x", "size": "8192x64"}), 422, Value::Null),
        (json!({"prompt": "refused"}), 400, json!("prompt")),
        (json!({"prompt": "broken"}), 422, Value::Null),
        (json!({"prompt": "x".repeat(20_000)}), 413, Value::Null),
        (json!([]), 400, Value::Null),
    ] {
        let shown: String = body.to_string().chars().take(60).collect();
        let (code, answer) = json(&router, "POST", GENERATE, body).await;
        assert_eq!((code.as_u16(), &answer["error"]["param"]), (status, &field), "{shown}: {answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|text| text.len() > 3), "{answer}");
    }
    let nearest = json(&router, "POST", GENERATE, json!({"prompt": "x", "num_inferense_steps": 3})).await;
    assert!(nearest.1["error"]["message"].as_str().unwrap().contains("`num_inference_steps`"), "{}", nearest.1);
    for (method, path, status) in [
        ("GET", "/v1/nothing", 404),
        ("GET", GENERATE, 405),
        ("GET", "/v1/jobs/job-1", 404),
        ("DELETE", "/v1/jobs/job-1", 404),
        ("POST", "/v1/jobs", 400),
    ] {
        let (code, answer) = json(&router, method, path, json!({})).await;
        assert!(code.as_u16() == status && answer["error"]["type"].is_string(), "{method} {path}: {code} {answer}");
    }
    // OpenAI's own fields that mean nothing here are no error.
    let body = json!({"prompt": "x", "quality": "hd", "style": "vivid", "user": "me", "background": null});
    assert_eq!(json(&router, "POST", GENERATE, body).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_again() {
    let (router, fake) = server(Settings { queue: 6, ..Settings::default() });
    let slow = |n: usize| json!({"prompt": "x", "n": n, "num_inference_steps": 300}).to_string();
    let request = |body: String| HttpRequest::builder().method("POST").uri(GENERATE).body(Body::from(body)).unwrap();
    // Four are drawn, and six wait.
    let first = tokio::spawn(router.clone().oneshot(request(slow(4))));
    while fake.inside.load(Ordering::Relaxed) < 4 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let second = tokio::spawn(router.clone().oneshot(request(slow(6))));
    tokio::time::sleep(Duration::from_millis(20)).await;
    let refused = router.clone().oneshot(request(slow(1))).await.unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let seconds: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=3600).contains(&seconds));
    let (status, answer) = json(&router, "POST", GENERATE, json!({"prompt": "x", "n": 7})).await;
    assert_eq!((status, &answer["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("n")), "it can never fit");
    // A client that leaves frees its places, in the queue and in the batch.
    for task in [second, first] {
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    }
    let (status, _) = json(&router, "POST", GENERATE, json!({"prompt": "x", "num_inference_steps": 2})).await;
    assert_eq!((status, fake.inside.load(Ordering::Relaxed)), (StatusCode::OK, 0));
    assert_eq!(fake.cancelled.load(Ordering::Relaxed), 4);
    let (_, metrics) = send(&router, "GET", "/metrics", "").await;
    let metrics = String::from_utf8(metrics).unwrap();
    assert!(metrics.contains("respodiff_cancelled_total{by=\"client\"} 10\n"), "{metrics}");
    assert!(
        metrics.contains("respodiff_requests_total{route=\"/v1/images/generations\",code=\"429\"} 1\n"),
        "{metrics}"
    );
}

static LOGGED: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

#[tokio::test]
async fn every_request_is_logged() {
    let (router, _) =
        server(Settings { log: Some(|line| LOGGED.lock().unwrap().push(line.into())), ..Settings::default() });
    let request = HttpRequest::builder().method("POST").uri(GENERATE).header("x-request-id", "mine\"\\");
    let response = router.clone().oneshot(request.body(Body::from("{}")).unwrap()).await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine\"\\");
    let lines = LOGGED.lock().unwrap().clone();
    let line: Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!((lines.len(), &line["id"], &line["status"]), (1, &json!("mine\"\\"), &json!(400)));
    assert_eq!((&line["method"], &line["route"]), (&json!("POST"), &json!(GENERATE)));
}

#[tokio::test]
async fn deadlines_keys_and_lost_devices() {
    let timeout = Some(Duration::from_millis(50));
    let (router, fake) = server(Settings { timeout, keys: keys(&["secret"]), ..Settings::default() });
    let with = async |key: &str, body: Value| {
        let request = HttpRequest::builder().method("POST").uri(GENERATE).header("authorization", key);
        let response = router.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
        response.status().as_u16()
    };
    assert_eq!(with("Bearer secret", json!({"prompt": "x"})).await, 200);
    for wrong in ["Bearer secre", "Bearer secrets", "secret", "Bearer ", ""] {
        assert_eq!(with(wrong, json!({"prompt": "x"})).await, 401, "{wrong}");
    }
    let health = send(&router, "GET", "/health/ready", "").await;
    assert_eq!((health.0, send(&router, "GET", "/v1/models", "").await.0), (StatusCode::OK, StatusCode::UNAUTHORIZED));
    assert_eq!(with("Bearer secret", json!({"prompt": "x", "num_inference_steps": 900})).await, 408);
    // A fault of the batch fails the images in it, and the next ones get a new batch.
    assert_eq!(with("Bearer secret", json!({"prompt": "poison"})).await, 500);
    assert_eq!(with("Bearer secret", json!({"prompt": "x"})).await, 200);
    assert_eq!(fake.opened.load(Ordering::Relaxed), 2);
    // If the engine's thread is gone, the server says so, and a supervisor starts it again.
    assert_eq!(with("Bearer secret", json!({"prompt": "panic"})).await, 500);
    assert_eq!(with("Bearer secret", json!({"prompt": "x"})).await, 503);
    assert_eq!(send(&router, "GET", "/health/ready", "").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(send(&router, "GET", "/health/live", "").await.0, StatusCode::OK);
}

/// The events of a stream: names and bodies.
fn events(body: &[u8]) -> Vec<(String, Value)> {
    let text = String::from_utf8_lossy(body);
    let event = |block: &str| {
        let line =
            |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_string());
        Some((line("event:")?, serde_json::from_str(&line("data:")?).unwrap()))
    };
    text.split("\n\n").filter_map(event).collect()
}

#[tokio::test]
async fn streams_tell_steps_previews_and_pictures() {
    let (router, _) = server(Settings::default());
    let body = json!({"prompt": "x", "seed": 5, "stream": true, "partial_images": 2, "num_inference_steps": 6, "n": 2});
    let (status, body) = send(&router, "POST", GENERATE, body.to_string()).await;
    assert_eq!(status, StatusCode::OK);
    let events = events(&body);
    let of = |name: &str| events.iter().filter(|(n, _)| n == name).map(|(_, body)| body.clone()).collect::<Vec<_>>();
    assert_eq!(of("progress").len(), 10);
    let previews = of("image_generation.partial_image");
    assert_eq!(previews.iter().map(decoded).collect::<Vec<_>>(), ["step 2", "step 4", "step 2", "step 4"]);
    let pictures = of("image_generation.completed");
    assert_eq!(pictures.iter().map(decoded).collect::<Vec<_>>(), ["5 in 6", "6 in 6"]);
    assert!(pictures.iter().all(|body| body["type"] == "image_generation.completed" && body["size"] == "64x64"));
    let failed = send(&router, "POST", GENERATE, json!({"prompt": "broken", "stream": true}).to_string()).await;
    assert_eq!(self::events(&failed.1).last().unwrap().0, "error");
}

#[tokio::test]
async fn jobs_outlive_their_connection() {
    let (router, fake) = server(Settings::default());
    let (status, job) = json(&router, "POST", "/v1/jobs", json!({"prompt": "x", "seed": 9, "n": 2})).await;
    assert_eq!((status, &job["steps"]), (StatusCode::ACCEPTED, &json!(10)));
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    let (_, body) = send(&router, "GET", &format!("{path}/events"), "").await;
    let (last, state) = events(&body).pop().unwrap();
    assert_eq!((last.as_str(), &state["steps_done"]), ("completed", &json!(10)));
    assert_eq!(decoded(&state["result"]["data"][1]), "10 in 5");
    assert_eq!(json(&router, "GET", &path, json!({})).await.1["result"], state["result"]);
    let (_, job) = json(&router, "POST", "/v1/jobs", json!({"prompt": "x", "num_inference_steps": 900})).await;
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    while fake.inside.load(Ordering::Relaxed) == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(json(&router, "DELETE", &path, json!({})).await.1["status"], "cancelled");
    while fake.inside.load(Ordering::Relaxed) > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(json(&router, "GET", &path, json!({})).await.1["status"], "cancelled");
    let (_, job) = json(&router, "POST", "/v1/jobs", json!({"prompt": "broken"})).await;
    let (_, body) = send(&router, "GET", &format!("/v1/jobs/{}/events", job["id"].as_str().unwrap()), "").await;
    let (last, state) = events(&body).pop().unwrap();
    assert_eq!((last.as_str(), &state["error"]["message"]), ("failed", &json!("not finite")));
}

/// What one tenant asks for, another can neither see nor end.
#[tokio::test]
async fn tenants_see_their_own_alone() {
    let (router, fake) = server(Settings { keys: keys(&["anna", "ben"]), ..Settings::default() });
    let ask = async |who: &str, method: &str, path: &str, body: Value| {
        let request = HttpRequest::builder().method(method).uri(path).header("authorization", format!("Bearer {who}"));
        let response = router.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 24).await.unwrap();
        (status, serde_json::from_slice::<Value>(&body).unwrap_or_default())
    };
    let (status, job) = ask("anna", "POST", "/v1/jobs", json!({"prompt": "x", "num_inference_steps": 900})).await;
    assert_eq!(status, 202);
    let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
    for (method, path) in [("GET", path.clone()), ("DELETE", path.clone()), ("GET", format!("{path}/events"))] {
        assert_eq!(ask("ben", method, &path, json!({})).await.0, 404, "{method} {path}");
    }
    assert_eq!(ask("clara", "GET", &path, json!({})).await.0, 401);
    assert_eq!(ask("anna", "DELETE", &path, json!({})).await.1["status"], "cancelled");
    // A1111's front-ends know one request at a time: that of their own key.
    let slow = json!({"prompt": "x", "steps": 900}).to_string();
    let request = HttpRequest::builder().method("POST").uri("/sdapi/v1/txt2img").header("authorization", "Bearer anna");
    let running = tokio::spawn(router.clone().oneshot(request.body(Body::from(slow)).unwrap()));
    while ask("anna", "GET", "/sdapi/v1/progress", json!({})).await.1["progress"].as_f64().unwrap() == 0.0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(ask("ben", "GET", "/sdapi/v1/progress", json!({})).await.1["progress"], 0.0);
    ask("ben", "POST", "/sdapi/v1/interrupt", json!({})).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!running.is_finished() && fake.inside.load(Ordering::Relaxed) == 1);
    ask("anna", "POST", "/sdapi/v1/interrupt", json!({})).await;
    assert_eq!(running.await.unwrap().unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn an_idempotency_key_makes_one_job() {
    let (router, _) = server(Settings::default());
    let ask = async |key: &str, body: Value| {
        let request = HttpRequest::builder().method("POST").uri("/v1/jobs").header("idempotency-key", key);
        let response = router.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, serde_json::from_slice::<Value>(&body).unwrap()["id"].clone())
    };
    let together = (0..8).map(|_| ask("one", json!({"prompt": "x"})));
    let mut ids = Vec::new();
    for answer in together {
        let (status, id) = answer.await;
        assert_eq!(status, 202);
        ids.push(id);
    }
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_ne!(ask("two", json!({"prompt": "x"})).await.1, ids[0]);
    assert_eq!(ask("one", json!({"prompt": "y"})).await.0, 409);
}

/// Ended jobs are forgotten by number and by time, in the store too.
#[tokio::test]
async fn ended_jobs_are_forgotten() {
    let store = Arc::new(Memory::default());
    for (kept, left) in [((2, Duration::from_secs(60)), 2), ((64, Duration::ZERO), 0)] {
        let (router, _) = server(Settings { store: store.clone(), kept, ..Settings::default() });
        for seed in 0..5 {
            let (_, job) = json(&router, "POST", "/v1/jobs", json!({"prompt": "x", "seed": seed})).await;
            send(&router, "GET", &format!("/v1/jobs/{}/events", job["id"].as_str().unwrap()), "").await;
        }
        if kept.1.is_zero() {
            tokio::time::sleep(Duration::from_millis(2100)).await;
        }
        let (_, job) = json(&router, "POST", "/v1/jobs", json!({"prompt": "x", "num_inference_steps": 900})).await;
        let ids = store.jobs().unwrap();
        assert_eq!(ids.len(), left + 1, "{ids:?}");
        let path = format!("/v1/jobs/{}", job["id"].as_str().unwrap());
        for status in ["cancelled", "cancelled"] {
            assert_eq!(json(&router, "DELETE", &path, json!({})).await.1["status"], status);
        }
        assert_eq!(json(&router, "GET", &path, json!({})).await.0, 404, "the second time, it is forgotten");
        store.jobs().unwrap().iter().for_each(|id| store.remove(id).unwrap());
    }
}

#[tokio::test]
async fn a1111s_front_ends_are_served() {
    let (router, fake) = server(Settings::default());
    let body = json!({"prompt": "x", "seed": 3, "steps": 4, "batch_size": 2, "n_iter": 2, "cfg_scale": 7,
        "width": 64, "height": 64, "sampler_name": "Euler", "restore_faces": false, "override_settings": {}});
    let (status, answer) = json(&router, "POST", "/sdapi/v1/txt2img", body).await;
    assert_eq!((status, answer["images"].as_array().unwrap().len()), (StatusCode::OK, 4));
    let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["all_seeds"], json!([3, 4, 5, 6]));
    let other = json!({"prompt": "x", "steps": 1, "override_settings": {"sd_model_checkpoint": "another"}});
    assert_eq!(json(&router, "POST", "/sdapi/v1/txt2img", other).await.0, StatusCode::NOT_FOUND);
    let slow = json!({"prompt": "x", "seed": 3, "steps": 900}).to_string();
    let request = HttpRequest::builder().method("POST").uri("/sdapi/v1/txt2img").body(Body::from(slow)).unwrap();
    let running = tokio::spawn(router.clone().oneshot(request));
    loop {
        let progress = json(&router, "GET", "/sdapi/v1/progress", json!({})).await.1;
        if progress["progress"].as_f64().unwrap() > 0.0 {
            assert_eq!(progress["state"]["sampling_steps"], 900);
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(send(&router, "POST", "/sdapi/v1/interrupt", "").await.0, StatusCode::OK);
    assert_eq!(running.await.unwrap().unwrap().status(), StatusCode::OK);
    while fake.inside.load(Ordering::Relaxed) > 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(json(&router, "GET", "/sdapi/v1/samplers", json!({})).await.1[0]["name"], "Euler");
    assert_eq!(json(&router, "GET", "/sdapi/v1/sd-models", json!({})).await.1[0]["model_name"], "fake");
    assert_eq!(json(&router, "GET", "/sdapi/v1/loras", json!({})).await.1[0]["name"], "style");
    assert!(json(&router, "GET", "/sdapi/v1/embeddings", json!({})).await.1["loaded"]["word"].is_object());
    assert_eq!(json(&router, "GET", "/sdapi/v1/prompt-styles", json!({})).await.1, json!([]));
    assert_eq!(json(&router, "GET", "/sdapi/v1/options", json!({})).await.1["sd_model_checkpoint"], "fake");
}

/// Every route of the OpenAPI document is there, and answers one of the statuses that it names.
#[tokio::test]
async fn the_document_tells_the_routes() {
    let (router, _) = server(Settings::default());
    let (_, document) = json(&router, "GET", "/openapi.json", json!({})).await;
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() > 15);
    for (path, methods) in paths {
        for (method, described) in methods.as_object().unwrap().iter().filter(|(method, _)| *method != "parameters") {
            for body in ["", "{\"prompt\": \"x\"}"] {
                let (status, _) = send(&router, &method.to_uppercase(), path, body).await;
                let named = described["responses"].as_object().unwrap().contains_key(status.as_str());
                assert!(named, "{method} {path}: {status}");
            }
        }
    }
}

/// Whatever bytes a client sends, the answer is one of the client's errors or a picture, and the server goes on.
#[tokio::test]
async fn nothing_that_clients_send_stops_the_server() {
    let count: usize = std::env::var("FUZZ").map_or(3000, |count| count.parse().unwrap());
    let (router, _) = server(Settings { body_limit: 4096, ..Settings::default() });
    let mut state = 7u64;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % below
    };
    let paths = [GENERATE, "/v1/jobs", "/v1/estimate", "/sdapi/v1/txt2img", "/v1/models", "/v1/jobs/%00", "/%ff", "/"];
    let names = ["prompt", "n", "size", "seed", "stream", "num_inference_steps", "concepts", "balance", "steps", "x"];
    let values = [
        "\"x\"",
        "1",
        "-1",
        "1e999",
        "null",
        "[]",
        "[[\"a\"],[]]",
        "{\"name\":1}",
        "true",
        "\"64x64\"",
        "\"\\u0000\"",
        "18446744073709551616",
        "0.5",
        "\"a,b=1\"",
    ];
    for _ in 0..count {
        let body: Vec<u8> = match draw(4) {
            0 => (0..draw(200)).map(|_| draw(256) as u8).collect(),
            1 => vec![b'['; draw(5000)],
            _ => {
                let fields: Vec<String> = (0..draw(6))
                    .map(|_| format!("\"{}\":{}", names[draw(names.len())], values[draw(values.len())]))
                    .collect();
                let text = format!("{{{}}}", fields.join(","));
                let cut = if draw(8) == 0 { draw(text.len()) } else { text.len() };
                text.as_bytes()[..cut].to_vec()
            }
        };
        let (method, path) = (["POST", "GET", "DELETE"][draw(3)], paths[draw(paths.len())]);
        let (status, _) = send(&router, method, path, body.clone()).await;
        assert!(!status.is_server_error(), "{method} {path} {}: {status}", String::from_utf8_lossy(&body));
    }
    assert_eq!(json(&router, "POST", GENERATE, json!({"prompt": "x"})).await.0, StatusCode::OK);
}
