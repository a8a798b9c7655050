//! OpenAI's routes: `POST /v1/images/generations` and `GET /v1/models`.

use crate::App;
use crate::backend::{Caller, Picture, Problem};
use crate::queue::{Receiver, Update, Wishes, news};
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, HeaderName, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use respodiff_fields::{Fields, Request};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::channel;
use tokio_stream::wrappers::ReceiverStream;

/// Largest number of pictures of a request.
const MOST_PICTURES: usize = 64;

/// The form of the answer that a client asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Answer {
    /// Server-sent events in place of one object.
    pub stream: bool,
    /// Previews of each picture.
    pub previews: usize,
}

/// Parses a request of this route and of jobs.
///
/// # Errors
/// [`crate::Kind::Invalid`] with the field.
pub fn parse(body: &[u8]) -> Result<(Request, Answer), Problem> {
    let mut fields = Fields::parse(body)?;
    let parsed = take(&mut fields)?;
    fields.finish()?;
    Ok(parsed)
}

/// Takes the fields of a request.
fn take(fields: &mut Fields) -> Result<(Request, Answer), Problem> {
    let request = Request { model: fields.take("model", "a text")?, ..Request::take(fields)? };
    let format: Option<String> = fields.take("response_format", "a text")?;
    let file: Option<String> = fields.take("output_format", "a text")?;
    let previews: Option<usize> = fields.take("partial_images", "a number from 0 to 3")?;
    let stream: Option<bool> = fields.take("stream", "true or false")?;
    fields.ignore(&["quality", "style", "user", "background", "moderation", "output_compression"]);
    let pictures = request.n.saturating_mul(request.prompts.len());
    if pictures > MOST_PICTURES {
        let message = format!("{pictures} pictures are not possible; give 1 to {MOST_PICTURES}");
        return Err(Problem::invalid("n", message));
    }
    if let Some(other) = format.filter(|format| format != "b64_json") {
        let message = format!("`{other}` is not offered, since nothing is stored here; ask for b64_json");
        return Err(Problem::invalid("response_format", message));
    }
    if let Some(other) = file.filter(|format| format != "png") {
        return Err(Problem::invalid("output_format", format!("`{other}` is not offered; ask for png")));
    }
    let previews = previews.unwrap_or(0);
    if previews > 3 {
        return Err(Problem::invalid("partial_images", "give a number from 0 to 3"));
    }
    Ok((request, Answer { stream: stream.unwrap_or(false), previews }))
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// One picture as OpenAI's answers hold it, with what belongs to this engine.
pub(crate) fn datum(picture: &Picture) -> Value {
    json!({
        "b64_json": BASE64.encode(&picture.png), "seed": picture.seed, "parameters": picture.parameters,
    })
}

/// `POST /v1/images/generations`.
pub async fn generate(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let (request, answer) = parse(&body?)?;
    let wants_file = headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"image/png"));
    if wants_file && (request.n != 1 || request.prompts.len() != 1 || answer.stream) {
        return Err(Problem::invalid("n", "a PNG answers one picture without a stream; ask for JSON"));
    }
    let works = app.plan(request, &caller).await?;
    let size = works.first().map_or((0, 0), |work| work.size);
    let mut receivers = app.queue.submit(works, Wishes { previews: answer.previews, ..app.wishes() })?;
    if answer.stream {
        return Ok(streamed(receivers, size));
    }
    let mut pictures = Vec::new();
    let mut times = (Duration::ZERO, Duration::ZERO);
    for receiver in &mut receivers {
        loop {
            if let Update::Finished { picture, queued, worked } = news(receiver).await? {
                times = (times.0.max(queued), times.1.max(worked));
                pictures.push(picture);
                break;
            }
        }
    }
    let milliseconds = |time: Duration| format!("{:.3}", 1e3 * time.as_secs_f64());
    let seed = pictures.first().map_or(0, |picture| picture.seed);
    let headers = [
        (HeaderName::from_static("x-queue-time-ms"), milliseconds(times.0)),
        (HeaderName::from_static("x-inference-time-ms"), milliseconds(times.1)),
        (HeaderName::from_static("x-seed"), seed.to_string()),
    ];
    Ok(match (wants_file, pictures.pop()) {
        (true, Some(picture)) => (headers, [(header::CONTENT_TYPE, "image/png")], picture.png).into_response(),
        (_, last) => {
            let data: Vec<Value> = pictures.iter().chain(&last).map(datum).collect();
            let size = format!("{}x{}", size.0, size.1);
            let body = json!({"created": now(), "data": data, "output_format": "png", "size": size});
            (headers, Json(body)).into_response()
        }
    })
}

/// OpenAI's events, and `progress` ones with the steps. If the client leaves, the receivers go with the stream.
fn streamed(mut receivers: Vec<Receiver>, (width, height): (usize, usize)) -> Response {
    let (sender, events) = channel::<Result<Event, Infallible>>(16);
    let file = json!({
        "size": format!("{width}x{height}"), "output_format": "png", "quality": "auto", "background": "opaque",
    });
    tokio::spawn(async move {
        for (index, receiver) in receivers.iter_mut().enumerate() {
            let mut shown = 0;
            loop {
                let mut messages = Vec::new();
                let update = news(receiver).await;
                let is_last = !matches!(update, Ok(Update::Step { .. }));
                match update {
                    Ok(Update::Step { done, total, preview }) => {
                        let body = json!({"image": index, "step": done, "steps": total});
                        messages.push(("progress", body));
                        if let Some(png) = preview {
                            let body = json!({"b64_json": BASE64.encode(png), "partial_image_index": shown});
                            messages.push(("image_generation.partial_image", joined(body, &file)));
                            shown += 1;
                        }
                    }
                    Ok(Update::Finished { picture, .. }) => {
                        messages.push(("image_generation.completed", joined(datum(&picture), &file)));
                    }
                    Err(problem) => messages.push(("error", problem.json())),
                }
                for (name, body) in messages {
                    let body = joined(body, &json!({"type": name, "created_at": now()}));
                    if sender.send(Ok(Event::default().event(name).data(body.to_string()))).await.is_err() {
                        return;
                    }
                }
                if is_last {
                    break;
                }
            }
        }
    });
    Sse::new(ReceiverStream::new(events)).keep_alive(KeepAlive::default()).into_response()
}

/// The fields of two objects.
fn joined(mut a: Value, b: &Value) -> Value {
    for (key, value) in b.as_object().into_iter().flatten() {
        a[key] = value.clone();
    }
    a
}

/// `GET /v1/models`.
pub async fn models(State(app): State<App>) -> Json<Value> {
    let model = |model: crate::Model| {
        json!({
            "id": model.id, "object": "model", "created": 0, "owned_by": "respodiff",
            "size": format!("{}x{}", model.size.0, model.size.1), "samplers": model.samplers,
            "concepts": model.concepts, "loras": model.loras, "embeddings": model.embeddings,
            "sha256": model.sha256, "loaded": model.loaded,
        })
    };
    Json(json!({"object": "list", "data": app.backend.models().into_iter().map(model).collect::<Vec<_>>()}))
}

/// `POST /v1/estimate`.
pub async fn estimate(State(app): State<App>, body: Result<Bytes, BytesRejection>) -> Result<Json<Value>, Problem> {
    let (request, _) = parse(&body?)?;
    let backend = app.backend.clone();
    let estimate = app.blocking(move || backend.estimate(&request)).await?;
    let (waiting, working) = app.queue.load();
    let seconds = app.metrics.step_seconds().map(|step| step * estimate.steps as f64);
    Ok(Json(json!({
        "memory_bytes": estimate.memory_bytes, "steps": estimate.steps, "seconds": seconds, "waiting": waiting,
        "working": working,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The document has the fields that are parsed, and no others.
    #[test]
    fn the_document_names_every_field() {
        let document: Value = serde_json::from_str(crate::OPENAPI).unwrap();
        let properties = document["components"]["schemas"]["Generation"]["properties"].as_object().unwrap();
        for name in properties.keys().filter(|name| *name != "prompt") {
            parse(format!("{{\"prompt\": \"x\", \"{name}\": null}}").as_bytes()).unwrap();
        }
        let mut fields = Fields::parse(b"{\"prompt\": \"x\"}").unwrap();
        take(&mut fields).unwrap();
        for name in fields.known() {
            assert!(properties.contains_key(*name), "{name}");
        }
    }
}
