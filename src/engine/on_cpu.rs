//! Sampling on the CPU.

use super::session::{Networks, Noise, Run};
use crate::Result;
use crate::cpu::Executor;
use crate::diffusion::scheduler::SamplerState;
use crate::image::Image;

/// The UNet and the VAE on the CPU.
pub(super) struct OnCpu {
    pub unet: Executor,
    pub vae: Executor,
    /// Those of the last run, NHWC.
    pub latents: Vec<f32>,
}

impl Networks for OnCpu {
    fn write(&mut self, input: &str, values: &[f32]) -> Result<()> {
        self.unet.write(input, values)
    }

    fn prologue(&mut self) -> Result<()> {
        self.unet.prologue();
        Ok(())
    }

    fn sample(&mut self, run: &Run, check: &mut dyn FnMut(usize) -> Result<()>) -> Result<Vec<f32>> {
        let mut noise = Noise::new(run);
        self.latents = run.start(&mut noise);
        let (unet, latents) = (&mut self.unet, &mut self.latents);
        let mut state = SamplerState::new(latents.len());
        let (mut prediction, mut fresh) = (vec![0.0; latents.len()], vec![0.0; latents.len()]);
        for (done, step) in run.schedule.steps.iter().enumerate() {
            check(done)?;
            for half in unet.input_mut("sample").chunks_exact_mut(latents.len()) {
                half.iter_mut().zip(&*latents).for_each(|(s, x)| *s = x * step.input_scale);
            }
            unet.input_mut("timestep").fill(step.timestep);
            match run.shift.is_constant() {
                true => unet.step(),
                false => unet.step_shifting(|mid, out| run.shift.follow(mid, out)),
            }
            let out = unet.output("sample");
            if run.guided {
                let (without, with) = out.split_at(latents.len());
                for ((p, u), c) in prediction.iter_mut().zip(without).zip(with) {
                    *p = u + run.guidance * (c - u);
                }
            } else {
                prediction.copy_from_slice(out);
            }
            if step.needs_noise() {
                noise.draw(&mut fresh);
            }
            state.step(step, &prediction, latents, if step.needs_noise() { &fresh } else { &[] });
            if !latents.iter().all(|x| x.is_finite()) {
                return Err(run.non_finite(done));
            }
        }
        check(run.schedule.steps.len())?;
        Ok(self.latents.clone())
    }

    fn picture(&mut self, image: usize, run: &Run) -> Result<Image> {
        let input = self.vae.input_mut("latents");
        let latents = &self.latents[image * input.len()..][..input.len()];
        input.iter_mut().zip(latents).for_each(|(v, x)| *v = x / run.scaling_factor);
        self.vae.step();
        Image::from_hwc(self.vae.output("image"), run.height, run.width)
    }
}
