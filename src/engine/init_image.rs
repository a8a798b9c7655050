//! Pictures to begin from: image to image (SDEdit, arXiv 2108.01073) and inpainting.

use super::{Engine, Size};
use crate::backend::{Kept, Piece, Precision, Weights};
use crate::diffusion::noise::NormalGenerator;
use crate::diffusion::scheduler::Schedule;
use crate::graph::{Extent, Shape};
use crate::image::{Filter, LIGHT, Picture};
use crate::layout::nchw_to_nhwc;
use crate::models::{divisible_encoder, vae_encoder};
use crate::{Error, ErrorKind, Result, Subject};
use std::sync::{Arc, Mutex};

/// A picture, as it is or encoded.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Original {
    /// A picture, which is resized to the session's size and encoded when it is needed.
    Picture {
        /// The picture.
        picture: Arc<Picture>,
        /// The parts that are made anew are light, those that stay as they are dark; without a mask all is made anew.
        mask: Option<Arc<Picture>>,
    },
    /// The result of [`Engine::encode_picture`] for a picture, and for its mask if it has one.
    Encoded(EncodedPicture),
}

/// The beginning of an image by a picture: the picture is brought to the noise level of a later step, and the steps
/// before it are left out. With a mask, its dark parts stay as they are.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[must_use]
pub struct InitImage {
    /// The picture, with its mask.
    pub original: Original,
    /// The share of the steps that are taken, from 0 to 1: of n steps the last `floor(n * strength)`, in float64 as in
    /// diffusers. At 1 an image without a mask still begins with the picture under the noise of the first step, and
    /// one with a mask with noise alone.
    pub strength: f64,
    /// Unit noise in place of the seed's, `[c, height / 8, width / 8]`.
    pub noise: Option<Arc<[f32]>>,
}

impl InitImage {
    /// Begins with a picture.
    pub fn new(picture: Arc<Picture>, strength: f64) -> Self {
        InitImage { original: Original::Picture { picture, mask: None }, strength, noise: None }
    }

    /// Makes anew what is light in `mask`, which is resized as the picture is.
    pub fn inpaint(picture: Arc<Picture>, mask: Arc<Picture>, strength: f64) -> Self {
        InitImage { original: Original::Picture { picture, mask: Some(mask) }, strength, noise: None }
    }

    /// Begins with an encoded picture, which may be shared by any number of images.
    pub fn encoded(picture: EncodedPicture, strength: f64) -> Self {
        InitImage { original: Original::Encoded(picture), strength, noise: None }
    }

    /// The same with this unit noise in place of the seed's.
    pub fn noise(self, noise: Arc<[f32]>) -> Self {
        InitImage { noise: Some(noise), ..self }
    }

    /// The first of `steps` steps that is taken, counted from 0.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a strength that is not from 0 to 1, or leaves no step.
    pub fn first_step(&self, steps: usize) -> Result<usize> {
        let strength = self.strength;
        if !(0.0..=1.0).contains(&strength) {
            return Err(Error::invalid("strength", format!("{strength} is not from 0 to 1")).advise("0.8 is usual"));
        }
        let taken = ((steps as f64 * strength) as usize).min(steps);
        if taken == 0 && steps > 0 {
            let problem = format!("{strength} leaves none of {steps} steps");
            return Err(Error::invalid("strength", problem).advise("give a greater one, or more steps"));
        }
        Ok(steps - taken)
    }
}

/// The latents of a picture as a distribution, from which each seed draws its own. Cloning shares it.
#[derive(Clone)]
pub struct EncodedPicture(Arc<Encoding>);

struct Encoding {
    size: Size,
    picture: Moments,
    /// True for the latents that are made anew, `[h, w]`; `None` without a mask.
    repaint: Option<Vec<bool>>,
    /// The picture with its light parts in grey, for a UNet that reads it.
    masked: Option<Moments>,
    /// The engine's [`PictureEncoder`].
    encoder: Arc<PictureEncoder>,
}

impl std::fmt::Debug for EncodedPicture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EncodedPicture({})", self.0.size)
    }
}

/// The means of latents and then the logarithms of their variances, `[h, w, 2c]`, or of a VAE whose latents have no
/// variance the latents, `[h, w, c]`.
struct Moments(Vec<f32>);

impl Moments {
    /// True if each seed draws its own latents.
    fn vary(&self, shape: Shape) -> bool {
        self.0.len() > shape.len()
    }

    /// Draws latents, `[h, w, c]`: those of the VAE times `scaling_factor`.
    fn draw(&self, draws: &mut Draws, scaling_factor: f32) -> Vec<f32> {
        let shape = draws.shape;
        if !self.vary(shape) {
            return self.0.iter().map(|x| scaling_factor * x).collect();
        }
        let mut latents = draws.next();
        for (pixel, moments) in latents.chunks_exact_mut(shape.c).zip(self.0.chunks_exact(2 * shape.c)) {
            let (means, log_variances) = moments.split_at(shape.c);
            for ((x, mean), log_variance) in pixel.iter_mut().zip(means).zip(log_variances) {
                // diffusers' bounds.
                let deviation = (0.5 * log_variance.clamp(-30.0, 20.0)).exp();
                *x = scaling_factor * (mean + deviation * *x);
            }
        }
        latents
    }
}

/// A seed's draws of unit noise, each of one image's latents.
struct Draws {
    noise: NormalGenerator,
    shape: Shape,
    made: u32,
}

impl Draws {
    /// The next draw, `[h, w, c]`. As in diffusers, the numbers are drawn in the order `[c, h, w]`.
    fn next(&mut self) -> Vec<f32> {
        let mut nchw = vec![0.0; self.shape.len()];
        self.noise.fill(&mut nchw);
        self.made += 1;
        nhwc(self.shape, &nchw)
    }
}

/// Unit noise of files, `[c, h, w]`, as `[h, w, c]`.
pub(super) fn nhwc(shape: Shape, nchw: &[f32]) -> Vec<f32> {
    let mut values = vec![0.0; shape.len()];
    nchw_to_nhwc(nchw, shape.c, shape.tokens(), &mut values);
    values
}

/// An image before its first step.
#[derive(Default)]
pub(super) struct Begun {
    /// The latents, `[h, w, c]`; `None` for the seed's next draw.
    pub latents: Option<Vec<f32>>,
    /// Draws that were made of the seed.
    pub drawn: u32,
    /// The parts that stay as they are.
    pub kept: Option<Kept>,
    /// The input of a UNet for inpainting beside the latents, `[h, w, 1 + c]`: 1 where it paints, and the latents of
    /// the picture without those parts.
    pub masked: Option<Arc<[f32]>>,
}

impl EncodedPicture {
    /// Begins an image with the first of the steps of `schedule`; `shape` is that of its latents. The numbers are drawn
    /// as by diffusers' pipelines: for the picture, then for the noise, then for the masked picture. Those for the
    /// picture are left out if neither the beginning nor a step needs it.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] for a picture of another size or engine.
    pub(super) fn begin(
        &self,
        init: &InitImage,
        engine: &Engine,
        shape: Shape,
        schedule: &Schedule,
        noise: NormalGenerator,
    ) -> Result<Begun> {
        let Encoding { size, picture, repaint, masked, encoder } = &*self.0;
        if !Arc::ptr_eq(encoder, &engine.0.encoder) {
            let problem = "a picture was encoded by another engine, whose latents this UNet cannot read";
            return Err(Error::mismatch(Subject::Field("image"), problem).advise("encode it by the session's engine"));
        }
        let scale = engine.0.outline.vae.scale();
        if (size.width, size.height) != (scale * shape.w, scale * shape.h) {
            let problem = format!("a picture was encoded for {size}, which is not the session's size");
            return Err(Error::mismatch(Subject::Field("image"), problem).advise("encode it for the session's size"));
        }
        let factor = engine.0.outline.vae.scaling_factor;
        let pure = repaint.is_some() && init.strength == 1.0;
        let mut draws = Draws { noise, shape, made: 0 };
        let own = (!pure || masked.is_none()).then(|| picture.draw(&mut draws, factor));
        let epsilon = match &init.noise {
            Some(given) => nhwc(shape, given),
            None => draws.next(),
        };
        let level = schedule.steps[0].level;
        let latents = match &own {
            Some(own) if !pure => {
                let (signal, noise) = (level.signal as f32, level.noise as f32);
                own.iter().zip(&epsilon).map(|(x, e)| signal * x + noise * e).collect()
            }
            _ => epsilon.iter().map(|e| e * schedule.init_noise_sigma).collect(),
        };
        let masked = match (masked, repaint) {
            (Some(masked), Some(repaint)) => {
                let masked = masked.draw(&mut draws, factor);
                let pixels = repaint.iter().zip(masked.chunks_exact(shape.c));
                Some(pixels.flat_map(|(&repaint, pixel)| [&[f32::from(repaint)], pixel].concat()).collect())
            }
            (None, Some(_)) => {
                // diffusers encodes the masked picture for every UNet.
                if picture.vary(shape) {
                    draws.next();
                }
                None
            }
            _ => None,
        };
        let kept = match (own, repaint) {
            (Some(latents), Some(repaint)) if masked.is_none() => {
                Some(Kept { latents, noise: epsilon, repaint: repaint.clone() })
            }
            _ => None,
        };
        Ok(Begun { latents: Some(latents), drawn: draws.made, kept, masked })
    }
}

/// The VAE's encoder, whose weights are loaded when the first picture is encoded.
#[derive(Default)]
pub(super) struct PictureEncoder(Mutex<Option<Weights>>);

impl Engine {
    /// Encodes a picture once for any number of images of a size: it is resized as diffusers does (Pillow's Lanczos
    /// filter), and so is its mask, if it has one. Light parts of the mask, those of half the lightness and more, are
    /// made anew, and dark ones stay as they are.
    ///
    /// The first call loads the VAE's encoder. While it runs it takes about as much memory as the VAE of a session of
    /// this size.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a size that is not possible or an empty picture, [`ErrorKind::OutOfMemory`],
    /// [`ErrorKind::NonFinite`], [`ErrorKind::DeviceLost`], and those of reading the weights.
    pub fn encode_picture(&self, picture: &Picture, mask: Option<&Picture>, size: Size) -> Result<EncodedPicture> {
        self.0.outline.check_size(self.options().size(size))?;
        for (name, picture) in [("image", Some(picture)), ("mask", mask)] {
            let Some(Picture { width, height, rgb }) = picture else { continue };
            if rgb.is_empty() || *width as usize * *height as usize * 3 != rgb.len() {
                return Err(Error::invalid(name, format!("{} bytes are not {width}x{height} pixels", rgb.len())));
            }
        }
        let fitted = |picture: &Picture| picture.resized(size.width as u32, size.height as u32, Filter::Lanczos);
        let byte = |&x: &u8| f32::from(x) / 255.0 * 2.0 - 1.0;
        let pixels: Vec<f32> = fitted(picture).rgb.iter().map(byte).collect();
        let light: Option<Vec<bool>> = mask.map(|mask| fitted(mask).lightness().iter().map(|&x| x >= LIGHT).collect());
        // Without a mask, a UNet that knows masks paints everywhere.
        let reads_masks = self.reads_masks();
        let masked: Option<Vec<f32>> = reads_masks.then(|| {
            let dark = |(i, &x): (usize, &f32)| if light.as_ref().is_some_and(|light| !light[i / 3]) { x } else { 0.0 };
            pixels.iter().enumerate().map(dark).collect()
        });
        let scale = self.0.outline.vae.scale();
        let light = light.or(reads_masks.then(|| vec![true; size.width * size.height]));
        let (w, h) = (size.width / scale, size.height / scale);
        // diffusers takes the pixel above and left of each latent.
        let repaint = light
            .map(|light| (0..w * h).map(|i| light[i / w * scale * size.width + i % w * scale]).collect::<Vec<bool>>());
        let pictures: Vec<Vec<f32>> = [Some(pixels), masked].into_iter().flatten().collect();
        let mut moments = self.moments(&pictures, size)?.into_iter().map(Moments);
        let picture = moments.next().ok_or_else(|| Error::internal("a picture without moments"))?;
        let encoder = self.0.encoder.clone();
        Ok(EncodedPicture(Arc::new(Encoding { size, picture, repaint, masked: moments.next(), encoder })))
    }

    /// The input of a UNet for inpainting if an image begins with noise: it paints everywhere.
    ///
    /// # Errors
    /// Those of [`Engine::encode_picture`].
    pub(super) fn blank(&self, size: Size) -> Result<EncodedPicture> {
        let grey = Picture { width: 1, height: 1, rgb: vec![128; 3] };
        let white = Picture { width: 1, height: 1, rgb: vec![255; 3] };
        self.encode_picture(&grey, Some(&white), size)
    }

    /// The encoder's outputs for pictures of a size, `[height, width, 3]` from -1 to 1.
    fn moments(&self, pictures: &[Vec<f32>], size: Size) -> Result<Vec<Vec<f32>>> {
        let super::Parts { outline, device, encoder, .. } = &*self.0;
        let scale = outline.vae.scale();
        let latents = Extent { h: size.height / scale, w: size.width / scale };
        let plans = self.vae_parts(&divisible_encoder(&outline.vae, latents.w), latents);
        // A failed load leaves nothing behind.
        let mut loaded = encoder.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let weights = match &*loaded {
            Some(weights) => weights.clone(),
            None => {
                let tensors = outline.source.tensors("vae")?;
                let holds = |part: &str| tensors.entries().any(|(name, _)| name.starts_with(part));
                if holds("decoder.") && !holds("encoder.") {
                    return Err(Error::unsupported(
                        outline.source.path("vae/config.json"),
                        "holds the decoder of a VAE without the encoder, which pictures to begin with need",
                    )
                    .advise("put the encoder (taesd_encoder) beside the decoder, or take another VAE"));
                }
                let specs = vae_encoder(&outline.vae, 1, Extent::square(scale));
                loaded.insert(device.weights(specs.weights(), &tensors, &[], Precision::Full)?).clone()
            }
        };
        drop(loaded);
        let affordable = self.afford(plans.arena_bytes(), &format!("the encoding of a picture of {size}"));
        affordable.map_err(|error| self.advise_tiles(error))?;
        let mut encoder = plans.ready(|plan| device.executor(plan, &weights))?;
        let mut encode = |pixels: &Vec<f32>| {
            encoder.input().write("image", pixels)?;
            let mut moments = vec![0.0f32; encoder.shape().len()];
            encoder.run(&mut |executor, Piece { numbers, place }| {
                let part = executor.read_part("moments", numbers)?;
                moments[place..][..part.len()].copy_from_slice(&part);
                Ok(())
            })?;
            match moments.iter().all(|x| x.is_finite()) {
                true => Ok(moments),
                false => Err(Error::new(ErrorKind::NonFinite, Subject::Field("image"), "the VAE gave NaN or infinity")),
            }
        };
        pictures.iter().map(&mut encode).collect()
    }

    /// True if the UNet reads a mask and the masked picture, as those of inpainting models do.
    pub fn reads_masks(&self) -> bool {
        self.0.outline.unet.reads_masks()
    }
}
