//! `respodiff serve`: the engine behind the HTTP server of the crate `respodiff-serve`.

mod policy;

use super::concepts::{Used, read};
use super::hashes::{self, Hashes};
use super::{Place, note, out, parts, random_seed, say, tell, warn};
use crate::concept::{Concept, Group, Strength, assign};
use crate::diffusion::scheduler::{Sampler, SamplerChoice, Spacing};
use crate::engine::{Engine, Event, Image, ImageId, Prompt, Request, RunningBatch, Size};
use crate::image::GenerationInfo;
use crate::{Error, ErrorKind, Picture, Result, Subject};
use policy::Policy;
use respodiff_serve::{self as http, Backend, Batch, Estimate, Kind, Model, Problem, Server, Settings, Work};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder, single file or Hugging Face model id; repeat for several [default: the demo]
    #[arg(long)]
    model: Vec<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 for any that is free
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Images that are made at once: requests of one size join the running batch between steps
    #[arg(long, default_value_t = 8)]
    max_batch: usize,
    /// Images that may wait; beyond, clients are told when to come again
    #[arg(long, default_value_t = 64)]
    queue: usize,
    /// Seconds after which an image that is not done is given up
    #[arg(long, allow_negative_numbers = true)]
    timeout: Option<f64>,
    /// File with the key that clients must send as `Authorization: Bearer KEY`
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Folder of concept files that clients may ask for, by their names without .safetensors [default: for the demo,
    /// its own]
    #[arg(long, value_name = "FOLDER")]
    concepts: Option<PathBuf>,
    /// Policy: a TOML file with concepts that every picture gets (`[[always]]`), and quotas over the stream of all
    /// pictures whose prompts name no attribute (`[[quota]]`); counts are kept in FILE.counts
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Write a line of JSON to stderr for every request: time, id, method, route, status, milliseconds
    #[arg(long)]
    log: bool,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
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
    let key = args.key_file.as_deref().map(key).transpose()?;
    if !args.host.is_loopback() && key.is_none() {
        warn("everybody who reaches this address may draw; --key-file asks for a key");
    }
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
    let mut engines = Vec::new();
    for id in ids {
        let engine = Engine::open(&args.parts.source(id)?, &device)?;
        let concepts = concepts(args.concepts.as_deref(), id, &engine)?;
        let policy = args.policy.as_deref().map(|path| Policy::read(path, &concepts)).transpose()?.map(Mutex::new);
        engines.push(Arc::new(Served { engine, concepts, policy, max_batch: args.max_batch, hashes: OnceLock::new() }));
    }
    // The first batch is planned before the server says that it is ready.
    for served in &engines {
        let Size { width, height } = served.engine.default_size();
        drop(served.open((width, height)).map_err(|problem| Error::internal(problem.message))?);
        let served = served.clone();
        std::thread::spawn(move || served.hashes.set(hashes::of(&served.engine).ok()));
    }
    let address = (args.host, args.port);
    let refused = |problem: std::io::Error| {
        let problem = format!("cannot listen on {}:{}: {problem}", args.host, args.port);
        Error::new(ErrorKind::Io, Subject::Field("port"), problem).advise("give another port")
    };
    let listener = TcpListener::bind(address).map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    let log = args.log.then_some(note as fn(&str));
    let settings = Settings { queue: args.queue, key, timeout, log, ..Settings::default() };
    let server = Server::new(Arc::new(Engines(engines)), settings).map_err(refused)?;
    say(&format!("http://{bound}"));
    tell("ready; Ctrl-C or SIGTERM finishes what was accepted, and ends");
    server.run(listener, http::interrupted()).map_err(refused)
}

fn key(path: &Path) -> Result<String> {
    let text = crate::files::read_text(path)?;
    match text.trim() {
        "" => Err(Error::damaged(path, "holds no key").advise("write one line")),
        key => Ok(key.to_string()),
    }
}

/// The concepts by the names under which clients may ask for them.
fn concepts(folder: Option<&Path>, model: Option<&str>, engine: &Engine) -> Result<BTreeMap<String, Arc<Concept>>> {
    let mut found = BTreeMap::new();
    if let Some(folder) = folder {
        for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
            let path = entry.map_err(Error::io("read", folder))?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                found.insert(name, Arc::new(Concept::load(&path)?));
            }
        }
    } else if model.is_none() {
        for (name, _) in respodiff_demo::CONCEPTS {
            found.insert(name.to_string(), Arc::new(read(Path::new(name))?));
        }
    }
    // A concept of another model is found now, and not by the first client.
    let shape = engine.bottleneck(engine.options());
    found.values().try_for_each(|concept| concept.modules(shape).map(|_| ()))?;
    Ok(found)
}

/// A model that is served.
struct Served {
    engine: Engine,
    concepts: BTreeMap<String, Arc<Concept>>,
    policy: Option<Mutex<Policy>>,
    max_batch: usize,
    /// The hashes of its weights, once they are known.
    hashes: OnceLock<Option<Hashes>>,
}

/// The models, the default one first.
struct Engines(Vec<Arc<Served>>);

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
        Subject::Field("steps") => Some("num_inference_steps"),
        Subject::Field("guidance") => Some("guidance_scale"),
        Subject::Field("width" | "height") => Some("size"),
        Subject::Field("spacing") => Some("sampler"),
        Subject::Field(field) => Some(*field),
        _ => None,
    };
    let advice = error.advice().map_or(String::new(), |advice| format!("; {advice}"));
    let message = format!("{}{advice}", error.problem());
    Problem { field: field.map(str::to_string), ..Problem::new(kind, message) }
}

impl Engines {
    fn find(&self, id: Option<&str>) -> std::result::Result<&Arc<Served>, Problem> {
        let Some(id) = id else { return Ok(&self.0[0]) };
        self.0.iter().find(|served| served.engine.name() == id).ok_or_else(|| {
            let known: Vec<String> = self.0.iter().map(|served| served.engine.name()).collect();
            let message = format!("there is no model `{id}` here; ask for {}", known.join(" or "));
            Problem { field: Some("model".into()), ..Problem::new(Kind::NotFound, message) }
        })
    }
}

impl Backend for Engines {
    fn models(&self) -> Vec<Model> {
        let model = |served: &Arc<Served>| {
            let Size { width, height } = served.engine.default_size();
            Model {
                id: served.engine.name(),
                size: (width, height),
                samplers: Sampler::ALL.iter().map(|sampler| sampler.a1111_name().to_string()).collect(),
                concepts: served.concepts.keys().cloned().collect(),
                sha256: served.hashes.get().and_then(Option::as_ref).and_then(|hashes| hashes.sha256.clone()),
            }
        };
        self.0.iter().map(model).collect()
    }

    fn plan(&self, request: &http::Request) -> std::result::Result<Vec<Work>, Problem> {
        self.find(request.model.as_deref())?.plan(request)
    }

    fn estimate(&self, request: &http::Request) -> std::result::Result<Estimate, Problem> {
        let served = self.find(request.model.as_deref())?;
        let works = served.plan(request)?;
        let size = works.first().map_or((0, 0), |work| work.size);
        let memory = served.engine.memory(served.options(size)).map_err(|error| problem(&error))?;
        Ok(Estimate { memory_bytes: memory.total(), steps: works.iter().map(|work| work.steps).sum() })
    }

    fn open(&self, model: &str, size: (usize, usize)) -> std::result::Result<Box<dyn Batch>, Problem> {
        self.find(Some(model))?.open(size)
    }
}

impl Served {
    fn options(&self, (width, height): (usize, usize)) -> crate::SessionOptions {
        let options = self.engine.options().size(Size::new(width, height));
        options.batch(self.max_batch).concepts(!self.concepts.is_empty())
    }

    fn open(self: &Arc<Self>, size: (usize, usize)) -> std::result::Result<Box<dyn Batch>, Problem> {
        let batch = self.engine.running_batch(self.options(size)).map_err(|error| problem(&error))?;
        Ok(Box::new(Running { served: self.clone(), batch, images: HashMap::new(), next: 0 }))
    }

    fn policy(&self) -> Option<MutexGuard<'_, Policy>> {
        self.policy.as_ref().map(|policy| policy.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    fn plan(self: &Arc<Self>, request: &http::Request) -> std::result::Result<Vec<Work>, Problem> {
        let engine = &self.engine;
        let refuse = |error: Error| problem(&error);
        for (field, text) in [("prompt", Some(&request.prompt)), ("negative_prompt", request.negative_prompt.as_ref())]
        {
            if text.is_some_and(|text| text.contains('\0')) {
                return Err(Problem::invalid(field, "the text holds a NUL character"));
            }
        }
        let default = engine.default_size();
        let size = request.size.unwrap_or((default.width, default.height));
        engine.check_size(self.options(size)).map_err(refuse)?;
        let choice: SamplerChoice =
            request.sampler.as_deref().map_or(Ok(SamplerChoice::default()), str::parse).map_err(refuse)?;
        let asked = request.steps.unwrap_or(50);
        let schedule = engine.schedule(choice, asked).map_err(refuse)?;
        let guidance = request.guidance.unwrap_or(engine.default_guidance());
        if !guidance.is_finite() {
            return Err(Problem::invalid("guidance_scale", format!("{guidance} is not finite; 7.5 is usual")));
        }
        let prompt = engine.encode(&request.prompt).map_err(refuse)?;
        let negative =
            request.negative_prompt.as_deref().map(|text| engine.encode(text)).transpose().map_err(refuse)?;
        let seed = request.seed.unwrap_or_else(random_seed);
        let concepts = self.assign(request, seed, guidance)?;
        let hashes = self.hashes.get().and_then(Option::as_ref);
        // A client that balances its own pictures takes no part in the quotas.
        let in_stream = request.balance.is_empty();
        let work = |(i, concepts): (usize, Vec<Used>)| {
            let seed = seed.wrapping_add(i as u64);
            let info = GenerationInfo {
                prompt: request.prompt.clone(),
                negative_prompt: request.negative_prompt.clone(),
                steps: asked,
                sampler: schedule.sampler.a1111_name().into(),
                spacing: schedule.spacing.map_or("Automatic", Spacing::a1111_name).into(),
                guidance,
                seed,
                rng: crate::Rng::default().name().into(),
                width: size.0 as u32,
                height: size.1 as u32,
                original_size: None,
                crop: None,
                model: engine.name(),
                model_sha256: hashes.and_then(|hashes| hashes.sha256.clone()),
                model_fingerprint: hashes.map(|hashes| hashes.fingerprint.clone()),
                averages: engine.source().is_averaged(),
                parts: hashes.map_or_else(Vec::new, |hashes| hashes.parts.clone()),
                device: Some(engine.device().name()),
                given_latents: false,
                precision: None,
                tokenizer: None,
                reuse: None,
                concepts: concepts.iter().map(Used::record).collect(),
                version: env!("CARGO_PKG_VERSION").into(),
            };
            let mut image = Image::new(&prompt).seed(seed).guidance(guidance);
            image.negative = negative.as_ref().map(Prompt::from);
            image.concepts = concepts.into_iter().map(|used| (used.concept, used.strength)).collect();
            let request = Request::from(image).steps(asked).sampler(choice);
            let (model, steps) = (engine.name(), schedule.steps.len());
            Work { model, size, seed, steps, image: Box::new(Planned { request, info, in_stream }) }
        };
        Ok(concepts.into_iter().enumerate().map(work).collect())
    }

    /// The concepts of each image, with their names.
    fn assign(
        &self,
        request: &http::Request,
        seed: u64,
        guidance: f32,
    ) -> std::result::Result<Vec<Vec<Used>>, Problem> {
        let find = |field: &str, name: &str| {
            self.concepts.get(name).cloned().ok_or_else(|| {
                let known: Vec<&str> = self.concepts.keys().map(String::as_str).collect();
                let near = |a: &&&str| strsim::jaro_winkler(a, name);
                let nearest = known.iter().max_by(|a, b| near(a).total_cmp(&near(b)));
                let advice =
                    nearest.map_or("; this server has none".into(), |nearest| format!("; the nearest is `{nearest}`"));
                Problem {
                    field: Some(field.into()),
                    ..Problem::new(Kind::NotFound, format!("there is no concept `{name}` here{advice}"))
                }
            })
        };
        let mut all: Vec<Used> = self.policy().iter().flat_map(|policy| policy.always(guidance)).collect();
        for text in &request.concepts {
            let (name, weight) = match text.rsplit_once(':') {
                None => (text.as_str(), None),
                Some((name, weight)) => {
                    let weight = weight.parse().ok().filter(|weight: &f32| weight.is_finite());
                    let wrong = || Problem::invalid("concepts", format!("`{text}` has no finite weight"));
                    (name, Some(weight.ok_or_else(wrong)?))
                }
            };
            let concept = find("concepts", name)?;
            let own = concept.strength(guidance);
            let strength = Strength { weight: weight.unwrap_or(own.weight), ..own };
            all.push(Used { concept, strength, file: name.to_string() });
        }
        let (mut groups, mut names) = (Vec::new(), Vec::new());
        for text in &request.balance {
            let (members, shares) = match text.rsplit_once('=') {
                None => (text.as_str(), None),
                Some((members, shares)) => {
                    let parsed: std::result::Result<Vec<f64>, _> =
                        shares.split(',').map(|s| s.trim().parse()).collect();
                    let wrong = |_| Problem::invalid("balance", format!("`{shares}` are not shares; write 0.6,0.4"));
                    (members, Some(parsed.map_err(wrong)?))
                }
            };
            let members: Vec<String> = members.split(',').map(|name| name.trim().to_string()).collect();
            let concepts = members.iter().map(|name| find("balance", name)).collect::<std::result::Result<_, _>>()?;
            let group = Group::new(concepts, shares).map_err(|error| problem(&error))?;
            // A prompt that names an attribute of the group itself is left alone.
            if group.named_in(&request.prompt).is_none() {
                groups.push(group);
                names.push(members);
            }
        }
        let rows = assign(&groups, request.n, seed, false);
        let image = |row: Option<&Vec<usize>>| {
            let mut image = all.clone();
            for (&member, (group, names)) in row.into_iter().flatten().zip(groups.iter().zip(&names)) {
                let concept = group.members[member].clone();
                let strength = concept.strength(guidance);
                image.push(Used { concept, strength, file: names[member].clone() });
            }
            image
        };
        Ok((0..request.n).map(|i| image(rows.get(i))).collect())
    }
}

/// A picture that was planned.
struct Planned {
    request: Request,
    info: GenerationInfo,
    /// True if it counts in the policy's quotas.
    in_stream: bool,
}

/// A running batch with the records of its pictures.
struct Running {
    served: Arc<Served>,
    batch: RunningBatch,
    images: HashMap<u64, (ImageId, GenerationInfo)>,
    next: u64,
}

impl Running {
    fn png(picture: &Picture, info: &GenerationInfo) -> std::result::Result<Vec<u8>, Problem> {
        out::png(picture, info).map_err(|error| problem(&error))
    }
}

impl Batch for Running {
    fn free(&self) -> usize {
        self.batch.free()
    }

    fn join(&mut self, work: &Work) -> std::result::Result<u64, Problem> {
        let Some(Planned { request, info, in_stream }) = work.image.downcast_ref() else {
            return Err(Problem::new(Kind::Internal, "another engine planned this picture"));
        };
        let (mut request, mut info) = (request.clone(), info.clone());
        // The stream is that of the pictures which are begun, in the order in which they are.
        if let Some(mut policy) = self.served.policy().filter(|_| *in_stream) {
            for used in policy.next(&info.prompt, info.guidance).map_err(|error| problem(&error))? {
                info.concepts.push(used.record());
                request.images.iter_mut().for_each(|i| i.concepts.push((used.concept.clone(), used.strength)));
            }
        }
        let id = self.batch.join(&request).map_err(|error| problem(&error))?;
        self.next += 1;
        self.images.insert(self.next, (id, info));
        Ok(self.next)
    }

    fn step(&mut self) -> std::result::Result<Vec<(u64, http::Event)>, Problem> {
        let mut events = Vec::new();
        for (id, event) in self.batch.step().map_err(|error| problem(&error))? {
            let Some(number) = self.images.iter().find(|(_, (other, _))| *other == id).map(|(number, _)| *number)
            else {
                continue;
            };
            let event = match event {
                Event::Step { done, total } => {
                    events.push((number, http::Event::Step { done, total }));
                    continue;
                }
                Event::Finished(picture) => self.images.remove(&number).map(|(_, info)| {
                    let parameters = serde_json::to_value(&info).unwrap_or_default();
                    let file = Self::png(&picture, &info);
                    file.map_or_else(http::Event::Failed, |png| {
                        http::Event::Finished(http::Picture { png, seed: info.seed, parameters })
                    })
                }),
                Event::Failed(error) => self.images.remove(&number).map(|_| http::Event::Failed(problem(&error))),
            };
            events.extend(event.map(|event| (number, event)));
        }
        Ok(events)
    }

    fn cancel(&mut self, image: u64) {
        if let Some((id, _)) = self.images.remove(&image) {
            self.batch.cancel(id);
        }
    }

    fn preview(&mut self, image: u64) -> std::result::Result<Option<Vec<u8>>, Problem> {
        let Some((id, info)) = self.images.get(&image) else { return Ok(None) };
        match self.batch.picture(*id) {
            Ok(picture) => picture.map(|picture| Self::png(&picture, info)).transpose(),
            Err(error) if error.kind() == ErrorKind::NonFinite => Ok(None),
            Err(error) => Err(problem(&error)),
        }
    }
}
