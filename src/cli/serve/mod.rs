//! `respodiff serve`: the engine behind the HTTP server of the crate `respodiff-serve`.

mod audit;
mod jobs;
mod keys;
mod loras;
mod models;
mod plan;
mod policy;
mod quotas;
mod running;
mod shelf;
pub(super) mod verify;

use super::{Place, note, parts, say, sign, tell, text, warn};
use crate::concept::Shelf;
use crate::engine::Texts;
use crate::models::tokenizer::TokenizerRules;
use crate::weights::Embedding;
use crate::{Error, ErrorKind, Result, Subject};
use audit::Audit;
use loras::Loras;
use models::{Models, Offered, Served};
use policy::Policy;
use respodiff_serve::{self as http, Kind, Memory, Problem, Server, Settings, Store};
use running::Output;
use shelf::Concepts;
use std::net::{IpAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder, single file or Hugging Face model id; repeat for several, of which the first is loaded at
    /// once and the others when they are first asked for [default: the demo]
    #[arg(long)]
    model: Vec<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// Memory that the models and the batch may take, such as 24GiB; beyond, the model that was not used for the
    /// longest time is unloaded [default: all models stay loaded]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    memory: Option<usize>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 for any that is free
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Images that are made at once: requests of one size join the running batch between steps
    #[arg(long, default_value_t = 8)]
    max_batch: usize,
    /// Decode and encode pictures of more than PIXELS x PIXELS in strips as large. Takes less memory and several times
    /// as long; the picture is the same, but for roundings
    #[arg(long, value_name = "PIXELS")]
    vae_tile: Option<usize>,
    /// Images that may wait; beyond, clients are told when to come again
    #[arg(long, default_value_t = 64)]
    queue: usize,
    /// Seconds after which an image that is not done is given up
    #[arg(long, allow_negative_numbers = true)]
    timeout: Option<f64>,
    /// File with the keys of which clients must send one as `Authorization: Bearer KEY`: `name: key` on each line, a
    /// JSON object of names and keys, or one key alone
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Folder of concept files that clients may ask for, by their names without .safetensors; new and changed files are
    /// taken up while the server runs [default: for the demo, its own]
    #[arg(long, value_name = "FOLDER")]
    concepts: Option<PathBuf>,
    #[command(flatten)]
    embeddings: text::Embeddings,
    /// Folder of adapters (LoRA and the like) that clients may ask for, by their names without the ending; those in
    /// folders inside of it included. New and changed files are taken up while the server runs
    #[arg(long, value_name = "FOLDER")]
    lora_folder: Option<PathBuf>,
    /// Small VAE for the same latents as the model's, such as TAESD, by which previews are decoded: a diffusers folder
    /// or a file [default: previews are a linear function of the latents]
    #[arg(long, value_name = "DIR|FILE")]
    preview_vae: Option<PathBuf>,
    /// Policy: a TOML file with concepts that every picture gets (`[[always]]`), and quotas over the stream of all
    /// pictures whose prompts name no attribute (`[[quota]]`); counts are kept in FILE.counts
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Audit log: add two lines of JSON for each picture to this file, each with the hash of the line before;
    /// `respodiff audit verify` checks it
    #[arg(long, value_name = "FILE")]
    audit: Option<PathBuf>,
    #[command(flatten)]
    sign: sign::Flags,
    /// Folder in which jobs are kept, so that accepted ones go on after the server was killed [default: in memory]
    #[arg(long, value_name = "FOLDER")]
    jobs: Option<PathBuf>,
    /// Hours for which the pictures of ended jobs are kept
    #[arg(long, default_value_t = 24, value_name = "HOURS")]
    jobs_kept: u32,
    /// Write a line of JSON to stderr for every request: time, id, tenant, method, route, status, milliseconds
    #[arg(long)]
    log: bool,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
}

/// Parses `24GiB`, `512 MiB` or a number of bytes.
fn bytes(text: &str) -> std::result::Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_alphabetic() || c == ' ');
    let unit: f64 = match text[digits.len()..].trim() {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err("give bytes, or a number with KiB, MiB or GiB".into()),
    };
    let number = digits.parse::<f64>().ok().map(|number| number * unit).filter(|bytes| (1.0..=1e18).contains(bytes));
    number.map(|bytes| bytes as usize).ok_or_else(|| "give a number such as 24GiB".into())
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.max_batch == 0 {
        return Err(Error::invalid("max_batch", "a batch of 0 holds no pictures").advise("give 1 or more"));
    }
    let timeout = match args.timeout {
        None => None,
        Some(seconds) => Some(Duration::try_from_secs_f64(seconds).map_err(|_| {
            Error::invalid("timeout", format!("{seconds} is not a number of seconds")).advise("give 60, for example")
        })?),
    };
    let keys = args.key_file.as_deref().map(keys::read).transpose()?.unwrap_or_default();
    if !args.host.is_loopback() && keys.is_empty() {
        warn("everybody who reaches this address may draw; --key-file asks for a key");
    }
    let folder = args.concepts.as_deref().map(shelf::Folder::open).transpose()?;
    let concepts = match &folder {
        Some(folder) => folder.concepts.clone(),
        None if args.model.is_empty() => Concepts::of_demo()?,
        None => Concepts::default(),
    };
    let mut served = open(args, &concepts)?;
    let policy = args.policy.as_deref().map(|path| Policy::read(path, &served[0].concepts())).transpose()?;
    if policy.as_ref().is_some_and(Policy::tells_tenants_apart) && keys.iter().all(|key| key.tenant.is_none()) {
        let problem = "has a quota for each tenant, but no key has a name";
        return Err(Error::invalid("policy", problem).advise("write `name: key` into the file of --key-file"));
    }
    let document = policy.as_ref().map(|policy| &policy.document);
    let (audit, turns) = args.audit.as_deref().map(|path| Audit::open(path, document)).transpose()?.unzip();
    if let Some(mut policy) = policy {
        policy.make_up(&turns.unwrap_or_default())?;
        served[0].govern(policy);
    }
    let audit = audit.map(|audit| Arc::new(Mutex::new(audit)));
    let output = Output { audit, signing: Arc::new(args.sign.open()?) };
    let models = Arc::new(Models::new(served.into_iter().map(Arc::new).collect(), args.memory, output));
    // The first batch is planned before the server says that it is ready.
    let first = &models.served[0];
    drop(models.batch(first, &first.default_key())?);
    if let Some(folder) = folder {
        models.watch(folder);
    }
    let refused = |problem: std::io::Error| {
        let problem = format!("cannot listen on {}:{}: {problem}", args.host, args.port);
        Error::new(ErrorKind::Io, Subject::Field("port"), problem).advise("give another port")
    };
    let listener = TcpListener::bind((args.host, args.port)).map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    // In memory, few are kept.
    let (store, most): (Arc<dyn Store>, usize) = match &args.jobs {
        None => (Arc::new(Memory::default()), 64),
        Some(folder) => (Arc::new(jobs::Folder::open(folder)?), usize::MAX),
    };
    let kept = (most, Duration::from_secs(3600 * u64::from(args.jobs_kept)));
    let log = args.log.then_some(note as fn(&str));
    let settings = Settings { queue: args.queue, keys, store, kept, timeout, log, ..Settings::default() };
    let server = Server::new(models, settings).map_err(refused)?;
    say(&format!("http://{bound}"));
    tell("ready; Ctrl-C or SIGTERM finishes what was accepted, and ends");
    server.run(listener, http::interrupted()).map_err(refused)
}

/// The models, with those concepts that fit them.
fn open(args: &Args, concepts: &Concepts) -> Result<Vec<Served>> {
    let device = args.device.open()?;
    let ids: Vec<Option<&str>> = match &args.model[..] {
        [] => vec![None],
        models => models.iter().map(|model| Some(model.as_str())).collect(),
    };
    if args.parts.any() && ids.len() > 1 {
        let problem = "parts from elsewhere are those of one model";
        return Err(Error::invalid("model", problem).advise("serve one model"));
    }
    if args.policy.is_some() && ids.len() > 1 {
        return Err(Error::invalid("policy", "a policy counts the pictures of one model").advise("serve one model"));
    }
    if args.preview_vae.is_some() && ids.len() > 1 {
        let problem = "a VAE for previews decodes the latents of one model";
        return Err(Error::invalid("preview_vae", problem).advise("serve one model"));
    }
    let loras = args.lora_folder.as_deref().map(Loras::open).transpose()?.map(Arc::new);
    let embeddings = args.embeddings.open()?;
    let shifted = args.concepts.is_some() || !concepts.0.is_empty();
    let preview_vae = args.preview_vae.clone();
    let Args { max_batch, vae_tile, .. } = *args;
    let offered = Offered { device, max_batch, vae_tile, shifted, embeddings, loras, preview_vae };
    let mut served: Vec<Served> = Vec::new();
    for id in ids {
        let next = Served::new(args.parts.source(id)?, offered.clone())?;
        if served.iter().any(|other| other.name == next.name) {
            let problem = format!("two models are called {}", next.name);
            return Err(Error::invalid("model", problem).advise("rename the folder or file of one"));
        }
        next.offer(concepts);
        served.push(next);
    }
    // An embedding or concept of another model is found now, and not by the first client.
    let takes = |embedding: &Arc<Embedding>| {
        let mut all = served.iter().flat_map(|served| &served.offered.embeddings);
        all.any(|own| Arc::ptr_eq(own, embedding))
    };
    if let Some(embedding) = offered.embeddings.iter().find(|embedding| !takes(embedding)) {
        Texts::read(served[0].outline.source(), TokenizerRules::default(), std::slice::from_ref(embedding))?;
    }
    let has = |name: &str| served.iter().any(|served| served.concepts().has(name));
    if let Some((_, concept)) = concepts.0.iter().find(|(name, _)| !has(name)) {
        let options = served[0].options(&served[0].default_key());
        concept.modules(served[0].outline.bottleneck(options))?;
    }
    Ok(served)
}

/// A problem of the engine, with the field as clients call it.
fn problem(error: &Error) -> Problem {
    let kind = match error.kind() {
        ErrorKind::Invalid | ErrorKind::Mismatch | ErrorKind::Unsupported => Kind::Invalid,
        ErrorKind::NotFound => Kind::NotFound,
        ErrorKind::OutOfMemory | ErrorKind::NonFinite => Kind::Impossible,
        ErrorKind::Cancelled => Kind::Cancelled,
        _ => Kind::Internal,
    };
    let field = match error.subject() {
        Subject::Field(field) => Some((*field).to_string()),
        _ => None,
    };
    let advice = error.advice().map_or(String::new(), |advice| format!("; {advice}"));
    let message = format!("{}{advice}", error.problem());
    Problem { field, ..Problem::new(kind, message) }
}
