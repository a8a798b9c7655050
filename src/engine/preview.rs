//! Previews: by a small VAE, if the engine has one for them, or else without any: the pixels at a place of the latents
//! as a linear function of the numbers there and around.
//!
//! The function is fitted by least squares to what the checkpoint's own VAE decodes, so it serves every checkpoint, and
//! follows from the checkpoint alone. The latents of the fit are random numbers of unit variance, as real latents have
//! it: half of them change from place to place, and half are the same in areas of two by two places.

use super::{Engine, Outline, read_config};
use crate::backend::{Executor, Precision, Weights};
use crate::device::Device;
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::graph::Extent;
use crate::image::Picture;
use crate::models::{VaeConfig, vae_decoder};
use crate::{Error, Result};
use rayon::prelude::*;
use std::path::Path;
use std::sync::OnceLock;

/// Height and width of the latents that are decoded for the fit.
const SIDE: usize = 16;
/// Sides of the areas that are the same, for each of the latents that are decoded.
const AREAS: [usize; 4] = [1, 2, 1, 2];

/// A VAE that decodes previews, in place of the checkpoint's own.
pub(super) struct PreviewVae {
    pub config: VaeConfig,
    pub weights: Weights,
}

impl PreviewVae {
    /// # Errors
    /// [`crate::ErrorKind::Mismatch`] for a VAE of other latents than the checkpoint's, and those of reading it.
    pub fn open(outline: &Outline, path: &Path, device: &Device) -> Result<Self> {
        let source = outline.source.clone().with_part("vae", path)?;
        let config = read_config(&source, "vae", VaeConfig::parse)?;
        let of = |vae: &VaeConfig| (vae.latent_channels, vae.scale(), vae.out_channels);
        let ((channels, scale, colours), (own_channels, own_scale, _)) = (of(&config), of(&outline.vae));
        if (channels, scale, colours) != of(&outline.vae) {
            let problem = format!(
                "makes {colours} colours of latents with {channels} channels, a {scale}th of a picture's size, but the \
                 checkpoint has latents with {own_channels} channels, a {own_scale}th of the size"
            );
            return Err(Error::mismatch(path, problem).advise("give a VAE that was made for the checkpoint's family"));
        }
        let graph = vae_decoder(&config, 1, Extent::square(8));
        let weights = device.weights(graph.weights(), &source.tensors("vae")?, &[], Precision::Full)?;
        Ok(PreviewVae { config, weights })
    }

    /// The picture of latents by `executor`, which has this VAE's decoder for their size.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`], [`crate::ErrorKind::DeviceLost`].
    pub fn picture(&self, executor: &mut dyn Executor, latents: &[f32]) -> Result<Picture> {
        let latents: Vec<f32> = unit(latents).iter().map(|x| x / self.config.scaling_factor).collect();
        executor.write("latents", &latents)?;
        executor.step()?;
        let graph = executor.plan().graph();
        let Extent { h, w } = graph.shape(graph.output("image")).extent();
        Picture::from_hwc(&executor.read("image")?, h, w)
    }
}

/// Latents brought to unit variance if theirs is larger: samplers like Euler begin with up to 14 times as much.
fn unit(latents: &[f32]) -> Vec<f32> {
    let squares: f64 = latents.iter().map(|x| f64::from(*x).powi(2)).sum();
    let shrink = (squares / latents.len().max(1) as f64).sqrt().max(1.0) as f32;
    latents.iter().map(|x| x / shrink).collect()
}

/// The pixels of latents.
#[derive(Debug)]
pub(super) struct Projection {
    channels: usize,
    /// Pixels per place and side.
    scale: usize,
    /// For each number of [`around`]: what one adds to the numbers of the pixels of a place, `[scale, scale, 3]`, which
    /// are from -1 to 1.
    factors: Vec<Vec<f32>>,
}

/// The numbers at a place of latents `[height, width, channels]` and at its eight neighbours, in rows from the top, and
/// a constant 1. Beyond an edge lies what is at the edge.
fn around(latents: &[f32], (height, width, channels): (usize, usize, usize), y: usize, x: usize) -> Vec<f32> {
    let mut numbers = Vec::with_capacity(9 * channels + 1);
    for i in 0..9 {
        let y = (y + i / 3).saturating_sub(1).min(height - 1);
        let x = (x + i % 3).saturating_sub(1).min(width - 1);
        numbers.extend_from_slice(&latents[(y * width + x) * channels..][..channels]);
    }
    numbers.push(1.0);
    numbers
}

impl Engine {
    /// Prepares previews without a VAE of their own, which otherwise the first preview does: some decodings of small
    /// latents by the checkpoint's.
    ///
    /// # Errors
    /// Those of a small session.
    #[cfg(feature = "cli")]
    pub(crate) fn fit_previews(&self) -> Result<()> {
        match self.0.preview {
            Some(_) => Ok(()),
            None => self.projection().map(|_| ()),
        }
    }

    /// The pixels of this checkpoint's latents.
    pub(super) fn projection(&self) -> Result<&Projection> {
        let known: &OnceLock<Projection> = &self.0.projection;
        match known.get() {
            Some(projection) => Ok(projection),
            None => {
                let fitted = Projection::fit(self)?;
                Ok(known.get_or_init(|| fitted))
            }
        }
    }
}

impl Projection {
    fn fit(engine: &Engine) -> Result<Self> {
        let parts = &*engine.0;
        let config = &parts.outline.vae;
        let (channels, scale) = (config.latent_channels, config.scale());
        let plan = parts.device.plan(vae_decoder(config, 1, Extent::square(SIDE)), &[]);
        let mut vae = parts.device.executor(plan, &parts.vae)?;
        let (unknowns, pixels) = (9 * channels + 1, scale * scale * 3);
        // The normal equations: sums of products of the numbers with each other, and with the pixels.
        let mut products = vec![vec![0.0; unknowns]; unknowns];
        let mut sums = vec![vec![0.0; pixels]; unknowns];
        for (seed, area) in AREAS.into_iter().enumerate() {
            let areas = SIDE / area;
            let mut numbers = vec![0.0; areas * areas * channels];
            NormalGenerator::new(Rng::TorchCpu, seed as u64).fill(&mut numbers);
            let places = || (0..SIDE).flat_map(|y| (0..SIDE).map(move |x| (y, x)));
            let at = |(y, x): (usize, usize)| &numbers[((y / area) * areas + x / area) * channels..][..channels];
            let latents: Vec<f32> = places().flat_map(at).copied().collect();
            let unscaled: Vec<f32> = latents.iter().map(|x| x / config.scaling_factor).collect();
            vae.write("latents", &unscaled)?;
            vae.step()?;
            let image = vae.read("image")?;
            for (y, x) in places() {
                let row: Vec<f64> = around(&latents, (SIDE, SIDE, channels), y, x).into_iter().map(f64::from).collect();
                let block = (0..scale).flat_map(|i| &image[((y * scale + i) * SIDE + x) * scale * 3..][..scale * 3]);
                let block: Vec<f64> = block.map(|pixel| f64::from(*pixel)).collect();
                for (i, number) in row.iter().enumerate() {
                    sums[i].iter_mut().zip(&block).for_each(|(sum, pixel)| *sum += number * pixel);
                    products[i].iter_mut().zip(&row).for_each(|(sum, other)| *sum += number * other);
                }
            }
        }
        let factors = solved(products, sums);
        match factors.iter().flatten().all(|factor| factor.is_finite()) {
            true => Ok(Projection { channels, scale, factors }),
            false => Err(Error::non_finite("the VAE decodes noise to NaN or infinity, so there are no previews")),
        }
    }

    /// The picture of latents, `[height, width, channels]`, by their [`unit`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`].
    pub(super) fn picture(&self, latents: &[f32], height: usize, width: usize) -> Result<Picture> {
        let Projection { channels, scale, ref factors } = *self;
        let latents = unit(latents);
        let line = width * scale * 3;
        let mut values = vec![0.0; height * scale * line];
        values.par_chunks_mut(scale * line).enumerate().for_each(|(y, rows)| {
            let mut block = vec![0.0; scale * scale * 3];
            for x in 0..width {
                block.fill(0.0);
                for (number, factors) in around(&latents, (height, width, channels), y, x).iter().zip(factors) {
                    block.iter_mut().zip(factors).for_each(|(pixel, factor)| *pixel += number * factor);
                }
                for (row, pixels) in rows.chunks_mut(line).zip(block.chunks(scale * 3)) {
                    row[x * scale * 3..][..scale * 3].copy_from_slice(pixels);
                }
            }
        });
        Picture::from_hwc(&values, height * scale, width * scale)
    }
}

/// Solves linear equations with many right sides by Gauss' elimination with pivots. A little is added to the diagonal,
/// so that a number without effect has none.
fn solved(mut left: Vec<Vec<f64>>, mut right: Vec<Vec<f64>>) -> Vec<Vec<f32>> {
    let n = left.len();
    (0..n).for_each(|i| left[i][i] += 1e-6);
    for i in 0..n {
        let pivot = (i..n).max_by(|&a, &b| left[a][i].abs().total_cmp(&left[b][i].abs())).unwrap_or(i);
        left.swap(i, pivot);
        right.swap(i, pivot);
        let (left_row, right_row) = (left[i].clone(), right[i].clone());
        for row in (0..n).filter(|&row| row != i) {
            let factor = left[row][i] / left_row[i];
            left[row].iter_mut().zip(&left_row).for_each(|(x, pivot)| *x -= factor * pivot);
            right[row].iter_mut().zip(&right_row).for_each(|(x, pivot)| *x -= factor * pivot);
        }
    }
    let scaled = |(i, row): (usize, Vec<f64>)| row.iter().map(|x| (x / left[i][i]) as f32).collect();
    right.into_iter().enumerate().map(scaled).collect()
}
