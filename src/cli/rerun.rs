//! `respodiff rerun`: it generates a picture again from the record in its PNG file, or from A1111's text there.

use super::hires::{Pass, Passes};
use super::init_image::{self, Canvas};
use super::progress::Progress as Shown;
use super::{Place, adapters, hashes, interrupt_flag, model, out, say, sign, tell, text, warn};
use crate::backend::Precision;
use crate::concept::{Concept, Strength};
use crate::diffusion::noise::Rng;
use crate::diffusion::scheduler::{SamplerChoice, Spacing};
use crate::engine::{Engine, EngineOptions, Image, Progress, Request, SessionOptions, Size, Start};
use crate::files::check_writable;
use crate::image::{
    GenerationInfo, JSON_KEYWORD, PARAMETERS_KEYWORD, Parameters, UsedPicture, read_png_text, unsigned,
};
use crate::models::prompt::PromptSyntax;
use crate::models::tokenizer::TokenizerRules;
use crate::weights::Source;
use crate::{Error, Picture, Result, Subject};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[derive(clap::Args)]
pub(super) struct Args {
    /// A PNG file made by `respodiff sample`, whose concepts, adapters, pictures and parts of the checkpoint from
    /// elsewhere are read from where its record says, seen from this folder; or a PNG with A1111's text, of which
    /// prompts, steps, sampler, guidance, seed and size are taken
    picture: PathBuf,
    /// The checkpoint that made it [default: the one that its record names]
    #[arg(long)]
    model: Option<String>,
    /// The file to write, .png, .jpg or .webp [default: the picture's name with -again]
    #[arg(short, long)]
    out: Option<PathBuf>,
    /// Device to compute on; on another device than the picture's, numbers round differently
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
    #[command(flatten)]
    sign: sign::Flags,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let path = &args.picture;
    let before = std::fs::read(path).map_err(Error::io("read", path))?;
    let (mut info, foreign) = read(path)?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let again = args.out.clone().unwrap_or_else(|| path.with_file_name(format!("{stem}-again.png")));
    if again.as_os_str() == "-" {
        return Err(Error::invalid("out", "the picture made again goes to a file").advise("give a file's name"));
    }
    if again.is_dir() || again.as_os_str().to_string_lossy().ends_with('/') {
        return Err(Error::invalid("out", format!("{} is a folder", again.display())).advise("give a file's name"));
    }
    check_writable(&again)?;
    let signing = args.sign.open()?;
    let engine = open(args, &info)?;
    if let Some(sampler) = foreign {
        // The spacing that A1111's "Automatic" stands for depends on the checkpoint.
        let schedule = engine.schedule(sampler, info.steps)?;
        info.sampler = schedule.sampler.a1111_name().into();
        info.spacing = schedule.spacing.map_or("Automatic", Spacing::a1111_name).into();
        info.model = engine.name();
    }
    let picture = remake(&engine, &info, &|file| Concept::open(file))?;
    // Files with equal pixels and equal records have equal bytes, but for a signature.
    let same = picture.to_recorded_png(&info)? == unsigned(&before);
    let (version, device) = (env!("CARGO_PKG_VERSION").into(), Some(engine.device().name()));
    out::save(&picture, &again, &GenerationInfo { version, device, ..info }, &signing)?;
    say(&again.display().to_string());
    match same {
        _ if foreign.is_some() => tell("other programs round differently, so that details may differ"),
        true => tell("the same picture, to the last bit"),
        false => warn("the picture differs: the device, the version or the picture's own file has changed"),
    }
    Ok(())
}

/// Makes a picture again from its record; `find` finds its concepts by their files' names.
pub(super) fn remake(
    engine: &Engine,
    info: &GenerationInfo,
    find: &dyn Fn(&str) -> Result<Concept>,
) -> Result<Picture> {
    let engine = &engine.with_vae_tile(info.vae_tile)?;
    let syntax: PromptSyntax = info.prompt_syntax.as_deref().map_or(Ok(PromptSyntax::default()), str::parse)?;
    let (prompt, negative) = text::recorded_prompts(info, syntax);
    let mut image = Image::new(prompt).seed(info.seed).guidance(info.guidance);
    image.guidance_rescale = info.guidance_rescale.unwrap_or(0.0);
    image.guidance_interval = info.guidance_interval;
    image.negative = negative.map(Into::into);
    for used in &info.concepts {
        let concept = find(&used.file)?;
        if concept.fingerprint() != used.fingerprint {
            let problem = format!("holds another concept than the picture's `{}`", used.name);
            return Err(Error::mismatch(Path::new(&used.file), problem).advise("put the picture's concept there"));
        }
        let strength = Strength::from(used.weight).until(used.until.unwrap_or(0.0));
        image = image.concept(Arc::new(concept), strength);
    }
    let choice = sampler(engine, info)?;
    let canvas = canvas(info)?;
    let size = Size::new(info.width as usize, info.height as usize);
    if let Some(canvas) = &canvas {
        image = image.start(Start::Image(canvas.begin(&canvas.encode(engine, size)?)));
    }
    let chunks = engine.chunks(&image, engine.schedule(choice, info.steps)?.sampler)?;
    let request = Request::from(image)
        .steps(info.steps)
        .sampler(choice)
        .rng(info.rng.parse()?)
        .conditioned_on_size(info.original_size, info.crop.unwrap_or((0, 0)));
    let options = SessionOptions::new(size)
        .guided(choice.guides(info.guidance))
        .reuse(info.reuse.unwrap_or(1))
        .gate(info.gate)
        .concepts(!info.concepts.is_empty())
        .chunks(chunks);
    let cancelled = interrupt_flag();
    let shown = Shown::new("sampling", info.steps as u64, "steps");
    let mut follow = |progress, _pass| {
        if let Progress::Step { done, total } = progress {
            shown.set_total(total as u64);
            shown.set(done as u64, "");
        }
        if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let second = info.hires.as_ref().map(|used| Pass::of_record(used, size));
    let output = Passes::new(engine, canvas.as_ref(), second.as_ref()).make(options, &request, &mut follow);
    shown.finish();
    output?.pictures.into_iter().next().ok_or_else(|| Error::internal("a run without a picture"))
}

/// The picture that the recorded one began with.
fn canvas(info: &GenerationInfo) -> Result<Option<Canvas>> {
    let Some(used) = &info.init_image else { return Ok(None) };
    let canvas = init_image::Flags::of_record(used).open()?;
    let found = canvas.as_ref().map(Canvas::record);
    let files = |used: &UsedPicture| [Some(used.picture.clone()), used.mask.clone()];
    let found = found.as_ref().map(files).unwrap_or_default();
    match files(used).into_iter().zip(found).find(|(recorded, found)| recorded != found) {
        None => Ok(canvas),
        Some((recorded, _)) => {
            let file = recorded.map_or_else(PathBuf::new, |recorded| recorded.file.into());
            Err(Error::mismatch(file, "has changed since the picture was made from it")
                .advise("put the file there whose SHA-256 is in the record"))
        }
    }
}

/// The picture's sampler, with the spacing whose name is in the record. The name "Automatic" is that of two spacings:
/// of none, as for LCM, and of leading.
fn sampler(engine: &Engine, info: &GenerationInfo) -> Result<SamplerChoice> {
    let own = SamplerChoice { tuning: info.tuning, ..info.sampler.parse()? };
    let spacings = [None].into_iter().chain(Spacing::ALL.map(Some));
    let mut choices = spacings.map(|spacing| SamplerChoice { spacing, ..own });
    let is_the_record = |choice: &SamplerChoice| {
        let schedule = engine.schedule(*choice, info.steps);
        schedule.is_ok_and(|s| s.spacing.map_or("Automatic", Spacing::a1111_name) == info.spacing)
    };
    choices.find(is_the_record).ok_or_else(|| {
        let problem =
            format!("does not give {} the timestep spacing of the picture's record: {}", info.sampler, info.spacing);
        Error::mismatch(Subject::Model(engine.name()), problem).advise("give the picture's checkpoint")
    })
}

/// The record in a picture, and if it is another program's, the sampler that it names.
fn read(path: &Path) -> Result<(GenerationInfo, Option<SamplerChoice>)> {
    let texts = read_png_text(path)?;
    let text = |keyword: &str| texts.iter().find(|(known, _)| known == keyword).map(|(_, text)| text);
    let Some(text) = text(JSON_KEYWORD) else {
        return match text(PARAMETERS_KEYWORD).and_then(|text| Parameters::parse(text)) {
            Some(parameters) => of_parameters(path, &parameters).map(|(info, sampler)| (info, Some(sampler))),
            None => Err(Error::unsupported(path, "holds no record of its generation")
                .advise("give a PNG made by `respodiff sample`, or with A1111's text")),
        };
    };
    let info: GenerationInfo = serde_json::from_str(text)
        .map_err(|problem| Error::damaged(path, format!("its record cannot be read: {problem}")))?;
    if info.given_latents {
        return Err(Error::unsupported(
            path,
            "was generated from latents in a file, which the picture does not contain",
        ));
    }
    if info.version != env!("CARGO_PKG_VERSION") {
        warn(&format!("the picture was made by version {}; this one may round differently", info.version));
    }
    Ok((info, None))
}

/// The record of a picture, and its sampler, as read from A1111's text. Settings that are not honoured are named in a
/// warning.
fn of_parameters(path: &Path, parameters: &Parameters) -> Result<(GenerationInfo, SamplerChoice)> {
    // The last three say what made the picture, and change nothing.
    const HONOURED: [&str; 10] =
        ["Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "RNG", "Model", "Model hash", "Version"];
    let bad = |key: &str, problem: &str| Error::damaged(path, format!("A1111's text has {problem} `{key}`"));
    let get = |key| parameters.get(key).ok_or_else(|| bad(key, "no"));
    fn number<T: FromStr>(text: &str) -> Option<T> {
        text.trim().parse().ok()
    }
    let size = get("Size")?.split_once('x').and_then(|(w, h)| Some((number(w)?, number(h)?)));
    let (width, height) = size.ok_or_else(|| bad("Size", "an unreadable"))?;
    let spacing = parameters.get("Schedule type").filter(|name| *name != "Automatic");
    let mut sampler: SamplerChoice = get("Sampler")?.parse()?;
    if let Some(spacing) = spacing {
        sampler.spacing = Some(spacing.parse()?);
    }
    // A1111 draws on the GPU unless its text says otherwise.
    let rng = if parameters.get("RNG") == Some("CPU") { Rng::TorchCpu } else { Rng::TorchCuda };
    let left: Vec<&str> =
        parameters.settings.iter().map(|(key, _)| key.as_str()).filter(|key| !HONOURED.contains(key)).collect();
    if !left.is_empty() {
        warn(&format!("these settings of the picture are not honoured: {}", left.join(", ")));
    }
    if let Some(model) = parameters.get("Model") {
        tell(&format!("the picture was made with the model `{model}`"));
    }
    let negative = Some(parameters.negative_prompt.clone()).filter(|text| !text.is_empty());
    let info = GenerationInfo {
        prompt: parameters.prompt.clone(),
        negative_prompt: negative,
        steps: number(get("Steps")?).ok_or_else(|| bad("Steps", "an unreadable"))?,
        sampler: get("Sampler")?.into(),
        spacing: spacing.unwrap_or("Automatic").into(),
        guidance: number(get("CFG scale")?).ok_or_else(|| bad("CFG scale", "an unreadable"))?,
        seed: number(get("Seed")?).ok_or_else(|| bad("Seed", "an unreadable"))?,
        rng: rng.name().into(),
        width,
        height,
        model: parameters.get("Model").unwrap_or_default().into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..GenerationInfo::default()
    };
    Ok((info, sampler))
}

/// A choice that the picture records; the default if it records none.
fn recorded<T: Default + FromStr>(args: &Args, what: &str, name: Option<&str>) -> Result<T> {
    let Some(name) = name else { return Ok(T::default()) };
    let problem = |_| Error::unsupported(args.picture.as_path(), format!("its {what} `{name}` is not known"));
    name.parse().map_err(problem)
}

/// Opens the checkpoint that made the picture.
fn open(args: &Args, info: &GenerationInfo) -> Result<Engine> {
    let precision: Precision = recorded(args, "precision", info.precision.as_deref())?;
    let tokenizer: TokenizerRules = recorded(args, "tokenizer", info.tokenizer.as_deref())?;
    let mut source = match &args.model {
        Some(model) => model::source(Some(model))?,
        None if info.model == Source::demo().name() => Source::demo(),
        // A file or folder here, or a model id.
        None if Path::new(&info.model).exists() || info.model.contains('/') => model::source(Some(&info.model))?,
        None => {
            return Err(Error::not_found(
                Subject::Model(info.model.clone()),
                "there is no checkpoint of this name here",
            )
            .advise("say with --model where it is"));
        }
    };
    if info.averages {
        source = source.averaged()?;
    }
    for used in &info.parts {
        let Some(component) =
            ["vae", "text_encoder", "text_encoder_2"].into_iter().find(|name| *name == used.component)
        else {
            let problem = format!("its record names a part `{}`, which is not known", used.component);
            return Err(Error::unsupported(args.picture.as_path(), problem));
        };
        let path = Path::new(&used.file);
        source = source.with_part(component, path)?;
        if used.sha256.is_some() && hashes::sha256(&source.tensors(component)?) != used.sha256 {
            let problem = format!("other weights than the picture's {component}");
            return Err(Error::mismatch(path, problem).advise("put the picture's own there"));
        }
    }
    let device = args.device.open()?;
    let name = device.name();
    if info.device.as_ref().is_some_and(|device| *device != name) {
        warn(&format!("the picture was made on {}, and this is {name}", info.device.as_deref().unwrap_or_default()));
    }
    let embeddings = text::recorded_embeddings(info)?;
    let options = EngineOptions::new(device).precision(precision).tokenizer(tokenizer).embeddings(embeddings);
    let engine = Engine::open(&source, options.adapters(adapters::recorded(&info.adapters)?))?;
    if info.model_sha256.is_some() && engine.sha256()? != info.model_sha256 {
        let problem = format!(
            "other weights than the picture's, whose SHA-256 is {}",
            info.model_sha256.as_deref().unwrap_or_default()
        );
        return Err(Error::mismatch(Subject::Model(engine.name()), problem).advise("give the picture's checkpoint"));
    }
    Ok(engine)
}
