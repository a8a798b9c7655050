//! The models of a server. Their configurations are there all the time, their weights when they are asked for, within
//! a budget of memory.

use super::super::hashes;
use super::super::{tell, warn};
use super::loras::{Loras, of_loras};
use super::plan::Asked;
use super::policy::Policy;
use super::problem;
use super::running::{Output, Running};
use super::shelf::{self, Concepts};
use crate::diffusion::scheduler::Sampler;
use crate::engine::{Engine, EngineOptions, Outline, SessionOptions, Size, Texts};
use crate::models::tokenizer::TokenizerRules;
use crate::pipeline::{AdapterSet, BatchKey, Hashes};
use crate::weights::{Embedding, Source};
use crate::{Device, Error, Result, Subject};
use respodiff_serve::{self as http, Backend, Batch, Caller, Estimate, Kind, Model, Problem, Work};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// The time between two looks at the folder of concepts.
const LOOK: Duration = Duration::from_secs(1);

/// Locks, also after a panic of another thread: what is locked here is whole at any time.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The settings that all models share.
#[derive(Clone)]
pub(super) struct Offered {
    pub(super) device: Device,
    pub(super) max_batch: usize,
    pub(super) vae_tile: Option<usize>,
    /// True if pictures may get concepts.
    pub(super) shifted: bool,
    /// Learnt words, of which each model takes those that fit it.
    pub(super) embeddings: Vec<Arc<Embedding>>,
    pub(super) loras: Option<Arc<Loras>>,
    /// A VAE for previews, from a folder or file.
    pub(super) preview_vae: Option<PathBuf>,
}

/// A model that is served.
pub(super) struct Served {
    pub(super) name: String,
    pub(super) outline: Outline,
    pub(super) texts: Texts,
    pub(super) fingerprint: String,
    pub(super) offered: Offered,
    source: Source,
    concepts: Mutex<Arc<Concepts>>,
    policy: Option<Mutex<Policy>>,
    /// The weights, while they are loaded, and the bytes that they take.
    loaded: Mutex<Option<(Engine, usize)>>,
    /// The same with the adapters of the running batch. Of all models, one has this at most.
    adapted: Mutex<Option<(AdapterSet, Engine)>>,
    /// The time of the latest use, in uses of all models.
    used: AtomicU64,
    /// The hashes of the weights' files, once they are known.
    hashes: Arc<OnceLock<Option<Hashes>>>,
}

impl Served {
    pub(super) fn new(source: Source, mut offered: Offered) -> Result<Self> {
        let outline = Outline::read(&source)?;
        let rules = TokenizerRules::default();
        // An embedding of another kind of model has vectors of another width.
        offered.embeddings.retain(|embedding| Texts::read(&source, rules, std::slice::from_ref(embedding)).is_ok());
        Ok(Served {
            name: outline.name(),
            fingerprint: outline.fingerprint()?,
            texts: Texts::read(&source, rules, &offered.embeddings)?,
            outline,
            offered,
            source,
            concepts: Mutex::default(),
            policy: None,
            loaded: Mutex::default(),
            adapted: Mutex::default(),
            used: AtomicU64::default(),
            hashes: Arc::default(),
        })
    }

    /// Gives the model its policy, whose concepts are the model's own.
    pub(super) fn govern(&mut self, policy: Policy) {
        self.policy = Some(Mutex::new(policy));
    }

    /// The options of its engines.
    pub(super) fn engine_options(&self) -> EngineOptions {
        let options = EngineOptions::from(&self.offered.device).embeddings(self.offered.embeddings.clone());
        let Offered { vae_tile, preview_vae, .. } = &self.offered;
        EngineOptions { vae_tile: *vae_tile, preview_vae: preview_vae.clone(), ..options }
    }

    /// The options of a batch.
    pub(super) fn options(&self, key: &BatchKey) -> SessionOptions {
        let Offered { max_batch, shifted, .. } = self.offered;
        SessionOptions::new(key.size).batch(max_batch).concepts(shifted).chunks(key.chunks)
    }

    /// The key of pictures that ask for nothing of their own.
    pub(super) fn default_key(&self) -> BatchKey {
        BatchKey { size: self.outline.default_size(), chunks: 1, adapters: AdapterSet::default() }
    }

    /// The weights, if they are loaded.
    pub(super) fn engine(&self) -> Option<Engine> {
        locked(&self.loaded).as_ref().map(|(engine, _)| engine.clone())
    }

    /// The weights with these adapters, if they are there.
    pub(super) fn engine_with(&self, adapters: &AdapterSet) -> Option<Engine> {
        match adapters.is_empty() {
            true => self.engine(),
            false => {
                locked(&self.adapted).as_ref().filter(|(own, _)| own == adapters).map(|(_, engine)| engine.clone())
            }
        }
    }

    pub(super) fn policy(&self) -> Option<MutexGuard<'_, Policy>> {
        self.policy.as_ref().map(locked)
    }

    pub(super) fn concepts(&self) -> Arc<Concepts> {
        locked(&self.concepts).clone()
    }

    /// Takes those of the concepts that fit the model. A policy whose concepts are gone stays as it was.
    pub(super) fn offer(&self, concepts: &Concepts) {
        let options = self.options(&self.default_key());
        let fitting = concepts.fitting(self.outline.bottleneck(options));
        if let Some(mut policy) = self.policy()
            && let Err(error) = policy.take(&fitting)
        {
            warn(&format!("{error}; the policy goes on with what was there before"));
        }
        *locked(&self.concepts) = Arc::new(fitting);
    }

    pub(super) fn hashes(&self) -> Option<&Hashes> {
        self.hashes.get().and_then(Option::as_ref)
    }

    /// Bytes of the weights: those in memory, or those of the files.
    fn weight_bytes(&self) -> usize {
        if let Some((_, bytes)) = &*locked(&self.loaded) {
            return *bytes;
        }
        let parts = ["text_encoder", "text_encoder_2", "unet", "vae"].into_iter().filter_map(|component| {
            let has_it = self.source.has(&format!("{component}/config.json"));
            has_it.then(|| self.source.tensors(component).ok()).flatten()
        });
        let files: BTreeSet<_> =
            parts.flat_map(|part| part.files().map(Into::into).collect::<Vec<PathBuf>>()).collect();
        files.iter().filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len() as usize).sum()
    }
}

/// The models, the default one first.
pub(super) struct Models {
    pub(super) served: Vec<Arc<Served>>,
    /// Bytes that all models and the batch may take.
    pub(super) budget: Option<usize>,
    output: Output,
    uses: AtomicU64,
}

impl Models {
    pub(super) fn new(served: Vec<Arc<Served>>, budget: Option<usize>, output: Output) -> Self {
        Models { served, budget, output, uses: AtomicU64::default() }
    }

    fn find(&self, id: Option<&str>) -> std::result::Result<&Arc<Served>, Problem> {
        let Some(id) = id else { return Ok(&self.served[0]) };
        self.served.iter().find(|served| served.name == id).ok_or_else(|| {
            let known: Vec<&str> = self.served.iter().map(|served| &*served.name).collect();
            let message = format!("there is no model `{id}` here; ask for {}", known.join(" or "));
            Problem { field: Some("model".into()), ..Problem::new(Kind::NotFound, message) }
        })
    }

    /// Unloads other models, the least recently used ones first, until there is room for so many bytes beside the rest.
    fn make_room(&self, served: &Served, bytes: usize) -> Result<()> {
        let Some(budget) = self.budget else { return Ok(()) };
        loop {
            let others = self.served.iter().filter(|other| other.name != served.name && other.engine().is_some());
            let others: Vec<&Arc<Served>> = others.collect();
            let taken: usize = others.iter().map(|other| other.weight_bytes()).sum();
            if taken.saturating_add(bytes) <= budget {
                return Ok(());
            }
            let Some(oldest) = others.iter().min_by_key(|other| other.used.load(Ordering::Relaxed)) else {
                let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
                let problem = format!("needs {:.2} GiB, of {:.2} GiB that are allowed", gib(bytes), gib(budget));
                return Err(Error::new(crate::ErrorKind::OutOfMemory, Subject::Model(served.name.clone()), problem)
                    .advise("ask for a smaller picture or another model"));
            };
            *locked(&oldest.loaded) = None;
            tell(&format!("unloaded {}", oldest.name));
        }
    }

    /// The model's weights, which are loaded unless they are there. Only the thread of the batch calls this.
    fn load(&self, served: &Arc<Served>) -> Result<Engine> {
        served.used.store(1 + self.uses.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if let Some(engine) = served.engine() {
            return Ok(engine);
        }
        self.make_room(served, served.weight_bytes())?;
        let began = Instant::now();
        let engine = Engine::open(&served.source, served.engine_options())?;
        engine.fit_previews()?;
        let memory = engine.memory(engine.options())?;
        let bytes = memory.weights + memory.text;
        *locked(&served.loaded) = Some((engine.clone(), bytes));
        let (seconds, mib) = (began.elapsed().as_secs_f64(), bytes >> 20);
        tell(&format!("loaded {} in {seconds:.2} s: {mib} MiB", served.name));
        let (hashes, outline) = (served.hashes.clone(), served.outline.clone());
        if hashes.get().is_none() {
            std::thread::spawn(move || hashes.set(hashes::of(&outline).ok()));
        }
        Ok(engine)
    }

    /// The model's weights with adapters. Those with the adapters of the batch before are given up first, so that one
    /// model at most takes memory for weights that adapters change.
    fn adapt(&self, served: &Arc<Served>, adapters: &AdapterSet) -> Result<Engine> {
        let base = self.load(served)?;
        if let Some(engine) = served.engine_with(adapters) {
            let others = self.served.iter().filter(|other| other.name != served.name);
            others.for_each(|other| *locked(&other.adapted) = None);
            return Ok(engine);
        }
        self.served.iter().for_each(|served| *locked(&served.adapted) = None);
        // The changed weights lie beside the others, and are as large at most. If that is more than the budget, it is
        // seen when they are there whether they fit.
        let _ = self.make_room(served, 2 * served.weight_bytes());
        let engine = base.with_adapters(&adapters.0).map_err(of_loras)?;
        *locked(&served.adapted) = Some((adapters.clone(), engine.clone()));
        Ok(engine)
    }

    /// A batch of a model for pictures of a key. The model's weights are loaded unless they are there.
    pub(super) fn batch(&self, served: &Arc<Served>, key: &BatchKey) -> Result<Running> {
        let engine = self.adapt(served, &key.adapters)?;
        self.make_room(served, engine.memory(served.options(key))?.total())?;
        let batch = engine.running_batch(served.options(key))?;
        Ok(Running::new(served.clone(), key.clone(), batch, self.output.clone()))
    }

    /// Looks at the folder of concepts from time to time, on a thread of its own.
    pub(super) fn watch(self: &Arc<Self>, mut folder: shelf::Folder) {
        let models = Arc::downgrade(self);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(LOOK);
                let Some(models) = models.upgrade() else { return };
                if folder.look_again() {
                    models.served.iter().for_each(|served| served.offer(&folder.concepts));
                }
            }
        });
    }
}

impl Backend for Models {
    fn models(&self) -> Vec<Model> {
        let model = |served: &Arc<Served>| {
            let Size { width, height } = served.outline.default_size();
            Model {
                id: served.name.clone(),
                size: (width, height),
                samplers: Sampler::ALL.iter().map(|sampler| sampler.a1111_name().to_string()).collect(),
                concepts: served.concepts().0.keys().cloned().collect(),
                loras: served.offered.loras.iter().flat_map(|loras| loras.names().into_keys()).collect(),
                embeddings: served.offered.embeddings.iter().flat_map(|e| e.names().first().cloned()).collect(),
                sha256: served.hashes().and_then(|hashes| hashes.sha256.clone()),
                loaded: served.engine().is_some(),
            }
        };
        self.served.iter().map(model).collect()
    }

    fn plan(&self, request: &http::Request, caller: &Caller) -> std::result::Result<Vec<Work>, Problem> {
        self.find(request.model.as_deref())?.plan(request, caller)
    }

    fn estimate(&self, request: &http::Request) -> std::result::Result<Estimate, Problem> {
        let served = self.find(request.model.as_deref())?;
        let works = served.plan(request, &Caller::default())?;
        let key = works.first().and_then(|work| work.image.downcast_ref()).map(|asked: &Asked| &asked.planned.key);
        // With adapters that are not loaded, it is the memory without them.
        let engine = key.and_then(|key| Some((key, served.engine_with(&key.adapters).or(served.engine())?)));
        let memory = engine.map(|(key, engine)| engine.memory(served.options(key))).transpose();
        let memory = memory.map_err(|error| problem(&error))?;
        let steps = works.iter().map(|work| work.steps).sum();
        Ok(Estimate { memory_bytes: memory.map(|memory| memory.total()), steps })
    }

    fn open(&self, work: &Work) -> std::result::Result<Box<dyn Batch>, Problem> {
        let served = self.find(Some(&work.model))?;
        let asked = Asked::of(work)?;
        let batch = self.batch(served, &asked.planned.key).map_err(|error| problem(&error))?;
        Ok(Box::new(batch))
    }
}
