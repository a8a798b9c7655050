//! The [`Denoiser`] of the CPU.

use super::CpuExecutor;
use crate::backend::{Denoiser, Executor, Noise, Run, picture_shape};
use crate::diffusion::scheduler::SamplerState;
use crate::graph::Shape;
use crate::image::Picture;
use crate::{Error, Result};

/// A UNet and its sampler on the CPU, with a session's VAE.
pub(super) struct CpuDenoiser {
    pub unet: CpuExecutor,
    pub vae: Option<CpuExecutor>,
    /// The latents of the last run, NHWC.
    pub latents: Vec<f32>,
}

impl Denoiser for CpuDenoiser {
    fn condition(&mut self, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
        for (name, values) in inputs {
            self.unet.write(name, values)?;
        }
        self.unet.prologue()
    }

    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>> {
        let mut noise = Noise::new(run);
        self.latents = run.start(&mut noise);
        let (unet, latents) = (&mut self.unet, &mut self.latents);
        let mut state = SamplerState::new(latents.len());
        let (mut prediction, mut fresh) = (vec![0.0; latents.len()], vec![0.0; latents.len()]);
        for (done, step) in run.steps.iter().enumerate() {
            check(done)?;
            for half in unet.input_mut("sample").chunks_exact_mut(latents.len()) {
                half.iter_mut().zip(&*latents).for_each(|(s, x)| *s = x * step.input_scale);
            }
            unet.input_mut("timestep").fill(step.timestep);
            if let Some(constant) = run.constant_from(done) {
                unet.write("shift", &constant)?;
            }
            match run.added.filter(|added| added.depends_on_bottleneck()) {
                None => unet.step()?,
                Some(added) => unet.step_adding(added, step.timestep),
            }
            guide(run, unet.output("sample"), &mut prediction);
            if step.needs_noise() {
                noise.draw_all(&mut fresh);
            }
            state.step(step, &prediction, latents, if step.needs_noise() { &fresh } else { &[] });
            if !latents.iter().all(|x| x.is_finite()) {
                return Err(run.non_finite(done));
            }
        }
        check(run.steps.len())?;
        Ok(self.latents.clone())
    }

    fn picture(&mut self, image: usize, scaling_factor: f32) -> Result<Picture> {
        let Some(vae) = &mut self.vae else { return Err(Error::internal("this UNet was made without a VAE")) };
        let input = vae.input_mut("latents");
        let latents = &self.latents[image * input.len()..][..input.len()];
        input.iter_mut().zip(latents).for_each(|(v, x)| *v = x / scaling_factor);
        vae.step()?;
        let Shape { h, w, .. } = picture_shape(vae.plan());
        Picture::from_hwc(vae.output("image"), h, w)
    }
}

/// Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): the batch's predictions from the UNet's output, whose
/// first half is unconditional.
fn guide(run: &Run, out: &[f32], prediction: &mut [f32]) {
    if !run.guided {
        prediction.copy_from_slice(out);
        return;
    }
    let one = run.shape.len();
    let (without, with) = out.split_at(prediction.len());
    let halves = without.chunks_exact(one).zip(with.chunks_exact(one));
    for ((image, (without, with)), prediction) in run.images.iter().zip(halves).zip(prediction.chunks_exact_mut(one)) {
        match image.guidance == 1.0 {
            true => prediction.copy_from_slice(with),
            false => {
                for ((p, u), c) in prediction.iter_mut().zip(without).zip(with) {
                    *p = u + image.guidance * (c - u);
                }
            }
        }
    }
}
