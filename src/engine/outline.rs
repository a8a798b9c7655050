//! A checkpoint's configuration, without its weights.

use super::{MAX_BATCH, MAX_SIZE, SessionOptions, Size, read_config};
use crate::diffusion::scheduler::{SamplerChoice, Schedule, SchedulerConfig};
use crate::graph::Shape;
use crate::models::chunks::MAX_CHUNKS;
use crate::models::{MidBlock, UNetConfig, VaeConfig};
use crate::weights::Source;
use crate::{Error, Result};

/// A checkpoint's configuration: all that is needed to check a request, but for its prompts. An [`super::Engine`] is
/// an outline with weights on a device.
#[derive(Clone)]
pub(crate) struct Outline {
    pub(super) source: Source,
    pub(super) unet: UNetConfig,
    pub(super) vae: VaeConfig,
    pub(super) scheduler: SchedulerConfig,
}

impl Outline {
    /// Reads the configuration of a checkpoint.
    ///
    /// # Errors
    /// About the first file that is missing, damaged, not supported, or does not belong to the others.
    pub fn read(source: &Source) -> Result<Self> {
        let unet = read_config(source, "unet", UNetConfig::parse)?;
        let vae = read_config(source, "vae", VaeConfig::parse)?;
        check_latents(source, &unet, &vae)?;
        let scheduler = read_scheduler(source, unet.text_time.is_some())?;
        Ok(Outline { source: source.clone(), unet, vae, scheduler })
    }

    /// [`super::Engine::name`].
    pub fn name(&self) -> String {
        self.source.name()
    }

    /// [`super::Engine::fingerprint`].
    pub fn fingerprint(&self) -> Result<String> {
        self.source.tensors("unet")?.fingerprint()
    }

    /// [`super::Engine::source`].
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// [`super::Engine::bottleneck`].
    pub fn bottleneck(&self, options: SessionOptions) -> Shape {
        // Every level but the last halves the size, rounding up.
        let levels = &self.unet.levels;
        let [_, _, h, w] = self.latent_shape(options);
        let halved = |size: usize| (1..levels.len()).fold(size, |size, _| size.div_ceil(2));
        Shape::new(1, halved(h), halved(w), levels.last().map_or(0, |level| level.channels))
    }

    /// [`super::Engine::schedule`].
    pub fn schedule(&self, choice: SamplerChoice, steps: usize) -> Result<Schedule> {
        self.schedule_from(choice, steps, 0)
    }

    /// The same schedule without its steps before `first`.
    ///
    /// # Errors
    /// As there.
    pub fn schedule_from(&self, choice: SamplerChoice, steps: usize, first: usize) -> Result<Schedule> {
        Schedule::from_step(&self.scheduler, choice, steps, first)
    }

    /// [`super::Engine::default_size`].
    pub fn default_size(&self) -> Size {
        let (h, w) = self.unet.sample_size.unwrap_or((64, 64));
        Size::new(w * self.vae.scale(), h * self.vae.scale())
    }

    /// [`super::Engine::latent_shape`].
    pub fn latent_shape(&self, options: SessionOptions) -> [usize; 4] {
        let Size { width, height } = options.size;
        [options.batch, self.vae.latent_channels, height / self.vae.scale(), width / self.vae.scale()]
    }

    /// [`super::Engine::reads_guidance`].
    pub fn reads_guidance(&self) -> bool {
        self.unet.time_cond_proj_dim.is_some()
    }

    /// [`super::Engine::default_guidance`].
    pub fn default_guidance(&self) -> f32 {
        match (self.reads_guidance(), self.unet.text_time.is_some()) {
            (true, _) => 8.5,
            (false, true) => 5.0,
            (false, false) => 7.5,
        }
    }

    /// Checks that the UNet has a bottleneck to which concepts can be added.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`].
    pub fn check_concepts(&self) -> Result<()> {
        match self.unet.mid {
            MidBlock::None => Err(Error::unsupported(
                self.source.path("unet/config.json"),
                "concepts are added to the output of the UNet's middle block, and this UNet has none",
            )
            .advise("use the model that it was distilled from")),
            _ => Ok(()),
        }
    }

    /// Checks that pictures of this size and batch are possible, whatever memory there is.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`].
    pub fn check_size(&self, options: SessionOptions) -> Result<()> {
        let SessionOptions { size: Size { width, height }, batch, chunks, .. } = options;
        let scale = self.vae.scale();
        for (name, size) in [("width", width), ("height", height)] {
            if size == 0 || size % scale != 0 || size > MAX_SIZE {
                let near = ((size.min(MAX_SIZE) + scale / 2) / scale).max(1) * scale;
                return Err(Error::invalid(
                    name,
                    format!("{size} is not possible: it must be a multiple of {scale} up to {MAX_SIZE}"),
                )
                .advise(format!("take {near}")));
            }
        }
        if batch == 0 || batch > MAX_BATCH {
            return Err(Error::invalid("batch", format!("a batch of {batch} images is not possible"))
                .advise(format!("give 1 to {MAX_BATCH}")));
        }
        if chunks == 0 || chunks > MAX_CHUNKS {
            return Err(Error::invalid("chunks", format!("prompts of {chunks} chunks are not possible"))
                .advise(format!("give 1 to {MAX_CHUNKS}")));
        }
        if options.reuse == 0 {
            return Err(Error::invalid("reuse", "the whole UNet has to be computed sometimes")
                .advise("give 1 to compute it in every step, or 2 or more"));
        }
        match options.gate {
            Some(0) => Err(Error::invalid("gate", "cross attention has to be computed in a first step")
                .advise("give 1 or more; a third to a half of the steps is usual")),
            Some(_) if options.reuse > 1 => {
                Err(Error::invalid("gate", "steps cannot take both inner activations and cross attention from others")
                    .advise("choose one of the two"))
            }
            _ => Ok(()),
        }?;
        Ok(())
    }
}

fn check_latents(source: &Source, unet: &UNetConfig, vae: &VaeConfig) -> Result<()> {
    if unet.out_channels == vae.latent_channels && (unet.in_channels == unet.out_channels || unet.reads_masks()) {
        return Ok(());
    }
    if unet.in_channels == unet.out_channels {
        let (own, other) = (vae.latent_channels, unet.out_channels);
        let problem = format!("is for latents of {own} channels, and the UNet's have {other}");
        return Err(Error::mismatch(source.path("vae/config.json"), problem).advise("give a VAE of the UNet's family"));
    }
    let problem = format!(
        "has {} input and {} output channels for {} latent channels: depth models and the like are not supported",
        unet.in_channels, unet.out_channels, vae.latent_channels
    );
    Err(Error::unsupported(source.path("unet/config.json"), problem))
}

/// The scheduler's config. Unless the checkpoint is SDXL, two fields are set as diffusers' StableDiffusionPipeline
/// forces them on checkpoints that are older than these fields: an offset of one step, and no clipping, since latents
/// are not pixels. Its StableDiffusionXLPipeline does not force them.
fn read_scheduler(source: &Source, xl: bool) -> Result<SchedulerConfig> {
    let file = "scheduler/scheduler_config.json";
    let path = source.path(file);
    let mut fields: serde_json::Map<String, serde_json::Value> = crate::json::parse(&source.read_text(file)?, &path)?;
    if !xl {
        fields.insert("steps_offset".into(), 1.into());
        fields.insert("clip_sample".into(), false.into());
    }
    Ok(SchedulerConfig::parse(&serde_json::Value::Object(fields).to_string(), path)?.of_sdxl(xl))
}
