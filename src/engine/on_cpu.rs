//! The [`Denoiser`] and the [`Networks`] of the CPU.

use super::run::{Denoiser, Networks, Noise, Run, picture_shape};
use crate::Result;
use crate::cpu::CpuExecutor;
use crate::diffusion::scheduler::SamplerState;
use crate::graph::Shape;
use crate::image::Picture;

/// The UNet and its sampler on the CPU.
pub(super) struct CpuDenoiser {
    unet: CpuExecutor,
    /// The latents of the last run, NHWC.
    latents: Vec<f32>,
}

impl CpuDenoiser {
    pub fn new(unet: CpuExecutor) -> Self {
        CpuDenoiser { unet, latents: Vec::new() }
    }
}

impl Denoiser for CpuDenoiser {
    fn condition(&mut self, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
        for (name, values) in inputs {
            self.unet.write(name, values)?;
        }
        self.unet.prologue();
        Ok(())
    }

    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>> {
        let mut noise = Noise::new(run);
        self.latents = run.start(&mut noise);
        if let Some(shift) = run.shift {
            self.unet.write("shift", shift.constant())?;
        }
        let (unet, latents) = (&mut self.unet, &mut self.latents);
        let mut state = SamplerState::new(latents.len());
        let (mut prediction, mut fresh) = (vec![0.0; latents.len()], vec![0.0; latents.len()]);
        for (done, step) in run.steps.iter().enumerate() {
            check(done)?;
            for half in unet.input_mut("sample").chunks_exact_mut(latents.len()) {
                half.iter_mut().zip(&*latents).for_each(|(s, x)| *s = x * step.input_scale);
            }
            unet.input_mut("timestep").fill(step.timestep);
            match run.shift.filter(|shift| !shift.is_constant()) {
                None => unet.step(),
                Some(shift) => unet.step_shifting(|mid, out| shift.follow(mid, out)),
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

/// The UNet and the VAE on the CPU.
pub(super) struct OnCpu {
    pub denoiser: CpuDenoiser,
    pub vae: CpuExecutor,
}

impl Networks for OnCpu {
    fn denoiser(&mut self) -> &mut dyn Denoiser {
        &mut self.denoiser
    }

    fn picture(&mut self, image: usize, scaling_factor: f32) -> Result<Picture> {
        let input = self.vae.input_mut("latents");
        let latents = &self.denoiser.latents[image * input.len()..][..input.len()];
        input.iter_mut().zip(latents).for_each(|(v, x)| *v = x / scaling_factor);
        self.vae.step();
        let Shape { h, w, .. } = picture_shape(self.vae.plan());
        Picture::from_hwc(self.vae.output("image"), h, w)
    }
}
