//! Rollouts of a training: they denoise latents under the neutral prompt, with the modules as learnt so far, to the
//! noise levels that are trained at, and compute the responsible target there.

use super::{Halves, HalvesMemory};
use crate::backend::{AddedToBottleneck, Denoiser, Guidance, RunImage};
use crate::concept::{Form, Module, Shift};
use crate::diffusion::noise::{NormalGenerator, Rng};
use crate::diffusion::scheduler::{Sampler, SamplerChoice, SamplerState, Schedule, Spacing, Step};
use crate::draws::Draws;
use crate::engine::{Engine, SessionOptions, UNetInputs};
use crate::graph::Shape;
use crate::layout::nchw_to_nhwc;
use crate::models::UNetInput;
use crate::{Error, Result};
use std::collections::VecDeque;

/// The networks that make a batch's guided predictions. The unconditional rows come first, and the modules shift the
/// others.
enum Guided {
    /// The whole UNet with its sampler, for modules that are constants. A GPU replays the steps, and the host waits for
    /// the last one only.
    Whole(Box<dyn Denoiser>),
    /// The UNet in two halves, for modules that are networks: the host evaluates them at the bottleneck of every step.
    Halves(Box<Halves>),
}

/// A batch of latents between noise and the noise levels that it is trained at.
pub(super) struct Rollout {
    guided: Guided,
    guidance: f32,
    schedule: Schedule,
    batch: usize,
    /// Shape of one image's latents.
    shape: Shape,
    /// Shape of one image's bottleneck.
    bottleneck: Shape,
    /// The inputs that condition the rows: during the rollout, and for the target.
    rolling: UNetInputs,
    targeting: UNetInputs,
    latents: Vec<f32>,
    /// Number of steps taken.
    step: usize,
    /// Noise levels that are left to train at, as numbers of steps in rising order.
    levels: VecDeque<usize>,
}

impl Rollout {
    /// Plans and allocates rollouts of `steps` DDIM steps at the scale `guidance`, for modules of one form. The rows of
    /// `rolling` are conditioned on no prompt and on the neutral one, those of `targeting` on the prompts from which
    /// and toward which the target leads, each repeated for every image of the batch.
    ///
    /// # Errors
    /// Those of the weights, and [`crate::ErrorKind::OutOfMemory`] when the device's memory is short.
    pub fn new(
        engine: &Engine,
        options: SessionOptions,
        form: Form,
        (steps, guidance): (usize, f32),
        rolling: UNetInputs,
        targeting: UNetInputs,
    ) -> Result<Self> {
        let choice =
            SamplerChoice { sampler: Some(Sampler::Ddim), spacing: Some(Spacing::Leading), ..SamplerChoice::default() };
        let [batch, channels, h, w] = engine.latent_shape(options);
        let guided = match form {
            Form::Constant => Guided::Whole(engine.denoiser(options)?),
            Form::Mlp | Form::Conv => {
                let (config, tensors, weights) = engine.unet()?;
                let input = UNetInput { rows: 2 * batch, h, w, tokens: engine.tokens(), shifted: 0 };
                Guided::Halves(Box::new(Halves::new(engine.device(), config, &tensors, &[weights], input, None)?))
            }
        };
        Ok(Rollout {
            guided,
            guidance,
            schedule: engine.schedule(choice, steps)?,
            batch,
            shape: Shape::new(1, h, w, channels),
            bottleneck: engine.bottleneck(options),
            rolling,
            targeting,
            latents: vec![0.0; batch * channels * h * w],
            step: 0,
            levels: VecDeque::new(),
        })
    }

    /// The memory that [`Rollout::new`] would allocate beside a UNet's weights.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for sizes that are not possible.
    pub fn memory(engine: &Engine, options: SessionOptions, form: Form) -> Result<HalvesMemory> {
        Ok(match form {
            Form::Constant => HalvesMemory { weights: 0, activations: engine.denoiser_bytes(options)? },
            Form::Mlp | Form::Conv => {
                let [batch, _, h, w] = engine.latent_shape(options);
                let (config, _, weights) = engine.unet()?;
                let input = UNetInput { rows: 2 * batch, h, w, tokens: engine.tokens(), shifted: 0 };
                Halves::memory(engine.device(), config, weights, input, None)
            }
        })
    }

    /// Begins a rollout: draws new noise, and the noise levels that it will be trained at, each from
    /// `U{0..=steps - 2}`.
    pub fn begin(&mut self, draws: &mut Draws, levels: usize) {
        let mut noise = NormalGenerator::new(Rng::TorchCpu, draws.next());
        let mut image = vec![0.0; self.shape.len()];
        for latents in self.latents.chunks_exact_mut(self.shape.len()) {
            noise.fill(&mut image);
            nchw_to_nhwc(&image, self.shape.c, self.shape.tokens(), latents);
            latents.iter_mut().for_each(|x| *x *= self.schedule.init_noise_sigma);
        }
        let last = self.schedule.steps.len() as u64 - 1;
        let mut levels: Vec<usize> = (0..levels).map(|_| (draws.next() % last) as usize).collect();
        levels.sort_unstable();
        self.levels = levels.into();
        self.step = 0;
    }

    /// True if all noise levels have been trained at.
    pub fn is_used_up(&self) -> bool {
        self.levels.is_empty()
    }

    /// Denoises to the next noise level, with `modules` added to the bottleneck of the neutral prompt's rows. Returns
    /// the number of steps taken.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`] when the latents leave the range of numbers, and
    /// [`crate::ErrorKind::DeviceLost`] with the driver's message.
    pub fn advance(&mut self, modules: &[&Module]) -> Result<usize> {
        let level = self.levels.pop_front().unwrap_or_default();
        let steps = self.schedule.steps[self.step..level].to_vec();
        if !steps.is_empty() {
            let rolling = self.rolling.clone();
            self.latents = self.run(&rolling, &steps, self.guidance, modules)?;
            self.step = level;
        }
        Ok(steps.len())
    }

    /// The latents at the current noise level, `[batch, h, w, c]`.
    pub fn latents(&self) -> &[f32] {
        &self.latents
    }

    /// The timestep of the current noise level.
    pub fn timestep(&self) -> f32 {
        self.schedule.steps[self.step].timestep
    }

    /// The responsible target: the guided prediction for the latents at a timestep, `[batch, h, w, c]`.
    ///
    /// # Errors
    /// Those of [`Rollout::advance`].
    pub fn target(&mut self, timestep: f32, guidance: f32) -> Result<Vec<f32>> {
        let targeting = self.targeting.clone();
        self.run(&targeting, &[Step::to_output(timestep)], guidance, &[])
    }

    /// The latents after `steps` from the current ones. DDIM keeps no history between steps, so each piece of a rollout
    /// can be a run of its own.
    fn run(
        &mut self,
        conditioning: &UNetInputs,
        steps: &[Step],
        guidance: f32,
        modules: &[&Module],
    ) -> Result<Vec<f32>> {
        match &mut self.guided {
            Guided::Whole(denoiser) => {
                denoiser.place(&(0..self.batch).collect::<Vec<_>>(), true, conditioning)?;
                for (slot, latents) in self.latents.chunks_exact(self.shape.len()).enumerate() {
                    let shift: Box<dyn AddedToBottleneck> = Box::new(Shift::of(modules, self.bottleneck));
                    // No step draws noise.
                    let image = RunImage {
                        steps: steps.into(),
                        rng: Rng::TorchCpu,
                        seed: 0,
                        drawn: 0,
                        guidance: Guidance::new(guidance),
                        sigma: 1.0,
                        latents: Some(latents.to_vec()),
                        kept: None,
                        added: Some(shift),
                    };
                    denoiser.begin(slot, image)?;
                }
                steps.iter().try_for_each(|_| denoiser.step(false))?;
                let mut all = Vec::with_capacity(self.latents.len());
                for slot in 0..self.batch {
                    if let Some(step) = denoiser.fault(slot)? {
                        let problem = format!("step {} of {} gave NaN or infinite latents", step + 1, steps.len());
                        return Err(Error::non_finite(problem).advise("lower the learning rates or the guidance"));
                    }
                    all.extend(denoiser.latents(slot)?);
                }
                Ok(all)
            }
            Guided::Halves(halves) => {
                halves.condition(conditioning)?;
                let mut latents = self.latents.clone();
                let mut state = SamplerState::new(latents.len());
                for step in steps {
                    halves.descend(&[&*latents, &*latents].concat(), step.timestep)?;
                    let out = halves.ascend(modules, self.batch)?;
                    let (without, with) = out.split_at(latents.len());
                    let prediction: Vec<f32> = without.iter().zip(with).map(|(u, c)| u + guidance * (c - u)).collect();
                    state.step(step, &prediction, &mut latents, &[]);
                }
                Ok(latents)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(feature = "emulated")]
    use crate::cuda::{Emulated, Limits};
    use crate::weights::Source;
    use crate::{Device, Size};

    /// A batch's latents after a rollout in pieces that end at `levels`, and their target. The rollout uses the
    /// networks for modules of `form`, but the modules themselves are constants.
    fn rolled(device: &Device, form: Form, levels: &[usize]) -> [Vec<f32>; 2] {
        let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/checkpoints/sd1");
        let engine = Engine::open(&Source::folder(checkpoint).unwrap(), device).unwrap();
        let size = Size::new(40, 56);
        let options = SessionOptions::new(size).batch(2).concepts(true);
        let rolling = engine.inputs(&[None, Some("a person")], 2, size).unwrap();
        let targeting = engine.inputs(&[Some("a doctor"), Some("a woman")], 2, size).unwrap();
        let mut rollout = Rollout::new(&engine, options, form, (20, 2.0), rolling, targeting).unwrap();
        let mut draws = Draws::new(3, 0);
        rollout.begin(&mut draws, 1);
        rollout.levels = levels.to_vec().into();
        let mut constant = || {
            let mut module = Module::new(Form::Constant, engine.bottleneck(options), || 0.0);
            module.parameters.iter_mut().for_each(|p| *p = 2.0 * draws.unit() - 1.0);
            module
        };
        let (ram, sam) = (constant(), constant());
        for _ in levels {
            rollout.advance(&[&ram, &sam]).unwrap();
        }
        let target = rollout.target(rollout.timestep() + 5.0, 0.5).unwrap();
        // The target leaves the latents where they are.
        assert_eq!(target, rollout.target(rollout.timestep() + 5.0, 0.5).unwrap());
        [rollout.latents, target]
    }

    /// The whole UNet with its sampler, in pieces, against halves with the sampler and the shift on the host.
    #[test]
    fn whole_networks_roll_as_halves_do() {
        let truth = rolled(&Device::cpu(), Form::Mlp, &[3]);
        let places = [
            (Device::cpu(), 1e-5),
            #[cfg(feature = "emulated")]
            (Device::kernels(Emulated::new(Limits::A100, Emulated::QUICK)), 1e-2),
        ];
        for (device, tolerance) in places {
            let ours = rolled(&device, Form::Constant, &[0, 1, 1, 3]);
            assert_eq!(ours, rolled(&device, Form::Constant, &[3]), "pieces on {}", device.name());
            for (ours, truth) in ours.iter().zip(&truth) {
                let squares =
                    |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>();
                let off = squares(&mut ours.iter().zip(truth).map(|(a, b)| a - b));
                let error = (off / squares(&mut truth.iter().copied())).sqrt();
                println!("{} {error:.1e}", device.name());
                assert!(error < tolerance, "off by {error:.1e} on {}", device.name());
            }
        }
    }
}
