//! The part of A1111's API that front-ends use: `/sdapi/v1/...`. Fields that mean nothing here are ignored, as there.

use crate::App;
use crate::backend::{Caller, Problem};
use crate::queue::{Update, Wishes, news};
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use respodiff_fields::{Fields, Request};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

/// The progress that A1111's routes report. A1111 runs one request at a time; here it is each tenant's latest.
#[derive(Default)]
pub struct WebUi(Mutex<HashMap<Option<Arc<str>>, Arc<Latest>>>);

/// The latest request of a tenant.
#[derive(Default)]
struct Latest {
    /// Steps done, steps in all, and the latest preview.
    progress: Mutex<(usize, usize, Option<Vec<u8>>)>,
    interrupted: Notify,
}

impl WebUi {
    fn of(&self, caller: &Caller) -> Arc<Latest> {
        let mut all = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        all.entry(caller.tenant.clone()).or_default().clone()
    }
}

impl Latest {
    fn set(&self, done: usize, total: usize, preview: Option<Vec<u8>>) {
        let mut progress = self.progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shown = preview.or_else(|| progress.2.take().filter(|_| total > 0));
        *progress = (done, total, shown);
    }
}

/// Those of A1111's settings that mean something here.
#[derive(Default, Deserialize)]
struct Overrides {
    sd_model_checkpoint: Option<String>,
    #[serde(rename = "CLIP_stop_at_last_layers")]
    clip_skip: Option<usize>,
}

/// `POST /sdapi/v1/txt2img`.
pub async fn txt2img(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Problem> {
    let body = body?;
    let mut fields = Fields::parse(&body)?;
    let whole = "a whole number";
    let seed: Option<i64> = fields.take("seed", whole)?;
    let width: Option<usize> = fields.take("width", whole)?;
    let height: Option<usize> = fields.take("height", whole)?;
    let batch: Option<usize> = fields.take("batch_size", whole)?;
    let batches: Option<usize> = fields.take("n_iter", whole)?;
    let prompt: Option<String> = fields.take("prompt", "a text")?;
    let sampler: Option<String> = fields.take("sampler_name", "a text")?;
    let index: Option<String> = fields.take("sampler_index", "a text")?;
    let negative: Option<String> = fields.take("negative_prompt", "a text")?;
    let concepts: Option<Vec<String>> = fields.take("concepts", "a list of names")?;
    let balance: Option<Vec<String>> = fields.take("balance", "a list of texts such as \"woman,man\"")?;
    let settings: Option<Overrides> = fields.take("override_settings", "an object")?;
    let n = batch.unwrap_or(1).saturating_mul(batches.unwrap_or(1));
    if !(1..=64).contains(&n) {
        return Err(Problem::invalid("batch_size", format!("{n} pictures are not possible; make 1 to 64 at once")));
    }
    let syntax: Option<String> = fields.take("prompt_syntax", "plain, a1111 or comfy")?;
    let settings = settings.unwrap_or_default();
    let request = Request {
        model: settings.sd_model_checkpoint,
        prompts: vec![prompt.unwrap_or_default()],
        negative_prompt: negative.filter(|text| !text.is_empty()),
        // Clients of this route mean the syntax of the program whose route it is.
        prompt_syntax: syntax.or_else(|| Some("a1111".into())),
        clip_skip: settings.clip_skip,
        n,
        width: width.or(height),
        height: height.or(width),
        seed: seed.filter(|seed| *seed >= 0).map(|seed| seed as u64),
        steps: fields.take("steps", whole)?,
        guidance: fields.take("cfg_scale", "a number")?,
        guidance_rescale: fields.take("guidance_rescale", "a number")?,
        sampler: sampler.or(index).filter(|name| !name.is_empty() && name != "Automatic"),
        eta: fields.take("eta", "a number")?,
        concepts: concepts.unwrap_or_default(),
        balance: balance.unwrap_or_default(),
        ..Request::default()
    };
    let works = app.plan(request, &caller).await?;
    let latest = app.webui.of(&caller);
    let total: usize = works.iter().map(|work| work.steps).sum();
    let seeds: Vec<u64> = works.iter().map(|work| work.seed).collect();
    let mut receivers = app.queue.submit(works, Wishes { previews: 10, ..app.wishes() })?;
    latest.set(0, total, None);
    let (mut images, mut parameters) = (Vec::new(), Vec::new());
    let work = async {
        let mut before = 0;
        for receiver in &mut receivers {
            let mut last = 1;
            loop {
                match news(receiver).await? {
                    Update::Step { done, total: steps, preview } => {
                        last = steps;
                        latest.set(before + done, total, preview);
                    }
                    Update::Finished { picture, .. } => {
                        images.push(BASE64.encode(&picture.png));
                        parameters.push(picture.parameters);
                        break;
                    }
                }
            }
            before += last;
        }
        Ok::<(), Problem>(())
    };
    // An interrupt ends the request with the pictures that are done, as there.
    let outcome = tokio::select! {
        outcome = work => outcome,
        () = latest.interrupted.notified() => Ok(()),
    };
    latest.set(0, 0, None);
    outcome?;
    let info = json!({"seed": seeds.first(), "all_seeds": seeds, "images": parameters});
    let echoed: Value = serde_json::from_slice(&body).unwrap_or_default();
    Ok(Json(json!({"images": images, "parameters": echoed, "info": info.to_string()})))
}

/// `GET /sdapi/v1/progress`.
pub async fn progress(State(app): State<App>, Extension(caller): Extension<Caller>) -> Json<Value> {
    let (done, total, preview) = {
        let latest = app.webui.of(&caller);
        let progress = latest.progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        (progress.0, progress.1, progress.2.as_ref().map(|png| BASE64.encode(png)))
    };
    let left = app.metrics.step_seconds().unwrap_or(0.0) * (total - done.min(total)) as f64;
    Json(json!({
        "progress": if total == 0 { 0.0 } else { done as f64 / total as f64 }, "eta_relative": left,
        "state": {"skipped": false, "interrupted": false, "job": "", "job_count": i32::from(total > 0),
            "job_timestamp": "", "job_no": 0, "sampling_step": done, "sampling_steps": total},
        "current_image": preview, "textinfo": null,
    }))
}

/// `POST /sdapi/v1/interrupt`.
pub async fn interrupt(State(app): State<App>, Extension(caller): Extension<Caller>) -> Json<Value> {
    app.webui.of(&caller).interrupted.notify_waiters();
    Json(json!({}))
}

/// `GET /sdapi/v1/samplers`.
pub async fn samplers(State(app): State<App>) -> Json<Value> {
    let names = app.backend.models().into_iter().next().map(|model| model.samplers).unwrap_or_default();
    Json(names.into_iter().map(|name| json!({"name": name, "aliases": [], "options": {}})).collect())
}

/// `GET /sdapi/v1/sd-models`.
pub async fn models(State(app): State<App>) -> Json<Value> {
    let model = |model: crate::Model| {
        let hash = model.sha256.as_ref().map(|hash| hash.chars().take(10).collect::<String>());
        json!({"title": model.id, "model_name": model.id, "hash": hash, "sha256": model.sha256, "filename": model.id,
            "config": null})
    };
    Json(app.backend.models().into_iter().map(model).collect())
}

/// `GET /sdapi/v1/loras`.
pub async fn loras(State(app): State<App>) -> Json<Value> {
    let names = app.backend.models().into_iter().next().map(|model| model.loras).unwrap_or_default();
    let lora = |name: String| json!({"name": name, "alias": name, "path": name, "metadata": {}});
    Json(names.into_iter().map(lora).collect())
}

/// `GET /sdapi/v1/embeddings`.
pub async fn embeddings(State(app): State<App>) -> Json<Value> {
    let names = app.backend.models().into_iter().next().map(|model| model.embeddings).unwrap_or_default();
    let loaded: serde_json::Map<String, Value> = names.into_iter().map(|name| (name, json!({}))).collect();
    Json(json!({"loaded": loaded, "skipped": {}}))
}

/// `GET /sdapi/v1/prompt-styles`, of which there are none here.
pub async fn prompt_styles() -> Json<Value> {
    Json(json!([]))
}

/// `GET /sdapi/v1/options`.
pub async fn options(State(app): State<App>) -> Json<Value> {
    let model = app.backend.models().into_iter().next();
    Json(json!({
        "sd_model_checkpoint": model.as_ref().map(|model| model.id.clone()),
        "sd_checkpoint_hash": model.and_then(|model| model.sha256), "samples_format": "png",
    }))
}
