//! A Hugging Face server of one model, which misbehaves on demand.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use respodiff::ErrorKind;
use respodiff::weights::hub::{HubConfig, resolve};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const INDEX: &str = r#"{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": [null, null], "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}"#;

/// The server's behaviour, and the requests that it received.
#[derive(Default)]
pub struct State {
    pub files: BTreeMap<String, Vec<u8>>,
    /// The announced SHA-256 by path, if it is not the true one.
    pub wrong_sha: BTreeMap<String, String>,
    /// The status of the answer to every request, if not 0.
    pub status: u16,
    /// The number of connections that end halfway through the body, by path.
    pub drops: BTreeMap<String, usize>,
    pub ignores_ranges: bool,
    /// `path [range]` of each request.
    pub requests: Vec<String>,
    pub authorization: Option<String>,
}

pub struct Server {
    pub state: Arc<Mutex<State>>,
    endpoint: String,
    pub cache: TempDir,
}

impl Server {
    pub fn new(paths: &[&str]) -> Self {
        let content = |path: &&str| match *path {
            "model_index.json" => INDEX.as_bytes().to_vec(),
            path => path.bytes().cycle().take(200_000).collect(),
        };
        let files = paths.iter().map(|path| (path.to_string(), content(path))).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                // A client may hang up early, which is no fault of the server.
                let _ = answer(stream.unwrap(), &mut shared.lock().unwrap());
            }
        });
        Server { state, endpoint, cache: tempfile::tempdir().unwrap() }
    }

    pub fn config(&self) -> HubConfig {
        HubConfig {
            cache: self.cache.path().join("hub"),
            endpoint: format!("{}/", self.endpoint),
            token: Some("secret".to_string()),
            offline: false,
        }
    }

    pub fn resolve(&self, id: &str) -> respodiff::Result<PathBuf> {
        resolve(id, &self.config(), &mut |_| ())
    }

    pub fn set<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    pub fn take_requests(&self) -> Vec<String> {
        self.set(|state| std::mem::take(&mut state.requests))
    }

    pub fn repo(&self) -> PathBuf {
        self.cache.path().join("hub/models--owner--name")
    }

    /// The message of a failed download, after which no snapshot may be visible.
    pub fn failure(&self, id: &str) -> String {
        let error = self.resolve(id).unwrap_err();
        let kinds = [ErrorKind::Network, ErrorKind::NotFound, ErrorKind::Unsupported];
        assert!(kinds.contains(&error.kind()), "{error:?}");
        assert!(!self.repo().join("refs/main").exists());
        assert!(!self.repo().join("snapshots").exists());
        let message = error.to_string();
        assert!(!message.contains('\n') && !message.contains("secret"), "{message}");
        message
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_lfs(path: &str) -> bool {
    path.ends_with(".safetensors")
}

/// The cache's name for a file: SHA-256 of large ones, a git hash (here any 40 digits) of small ones.
pub fn etag(path: &str, bytes: &[u8]) -> String {
    if is_lfs(path) { hex(&Sha256::digest(bytes)) } else { hex(&Sha256::digest(path))[..40].to_string() }
}

fn answer(mut stream: TcpStream, state: &mut State) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap()?;
    let path = request.split(' ').nth(1).unwrap().to_string();
    let mut from = None;
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(": ") else { break };
        match key.to_ascii_lowercase().as_str() {
            "range" => from = value.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().ok(),
            "authorization" => state.authorization = Some(value.to_string()),
            _ => {}
        }
    }
    state.requests.push(from.map_or(path.clone(), |from| format!("{path} {from}-")));
    let mut respond = |status: u16, headers: &str, body: &[u8], sent: usize| {
        let length = body.len();
        write!(stream, "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n")?;
        stream.write_all(&body[..sent])
    };
    if state.status != 0 {
        return respond(state.status, "", b"", 0);
    }
    if path.starts_with("/api/models/owner/name/revision/") {
        let siblings = state.files.iter().map(|(path, bytes)| {
            let sha = state.wrong_sha.get(path).cloned().unwrap_or_else(|| etag(path, bytes));
            let lfs = is_lfs(path).then(|| json!({"sha256": sha, "size": bytes.len(), "pointerSize": 135}));
            json!({"rfilename": path, "size": bytes.len(), "blobId": &hex(&Sha256::digest(path))[..40], "lfs": lfs})
        });
        let listing = json!({"id": "owner/name", "sha": COMMIT, "siblings": siblings.collect::<Vec<_>>()}).to_string();
        return respond(200, "", listing.as_bytes(), listing.len());
    }
    let prefix = format!("/owner/name/resolve/{COMMIT}/");
    let Some(bytes) = path.strip_prefix(&prefix).and_then(|path| state.files.get(path)) else {
        return respond(404, "", b"", 0);
    };
    let from = from.filter(|_| !state.ignores_ranges);
    let body = &bytes[from.unwrap_or(0).min(bytes.len())..];
    let drops = state.drops.get_mut(&path[prefix.len()..]).filter(|left| **left > 0);
    let sent = drops.map_or(body.len(), |left| {
        *left -= 1;
        body.len() / 2
    });
    match from {
        Some(from) => {
            let range = format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
            respond(206, &range, body, sent)
        }
        None => respond(200, "", body, sent),
    }
}
