//! The UNet cut at the bottleneck into a down half (encoder) and an up half (decoder). One run of the down half serves
//! several runs of the up half, and gradients go through the up half alone.

use crate::backend::{Executor, Precision, Weights};
use crate::concept::Module;
use crate::device::Device;
use crate::engine::UNET_CONSTANTS;
use crate::graph::{Keep, Shape};
use crate::models::{UNetConfig, UNetInput, unet_halves};
use crate::plan::Plan;
use crate::weights::Tensors;
use crate::{Error, Result};

/// Both halves of a UNet, planned for a number of rows. All activations are NHWC.
pub struct Halves {
    down: Box<dyn Executor>,
    up: Box<dyn Executor>,
    /// Outputs of the down half that the up half reads: `time` and the skip connections.
    passed: Vec<String>,
    /// The bottleneck as the down half computed it last, `[rows, h, w, c]`.
    mid: Vec<f32>,
}

/// Memory of halves or rollouts, in bytes, beside the weights of the whole UNet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HalvesMemory {
    /// Weights that the whole UNet does not hold in the same form: those that gradients read transposed, and those of
    /// layers that are split into several for their gradients.
    pub weights: usize,
    /// Arenas, and the memory of a sampler.
    pub activations: usize,
}

impl std::ops::Add for HalvesMemory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        HalvesMemory { weights: self.weights + other.weights, activations: self.activations + other.activations }
    }
}

impl Halves {
    /// Plans and allocates on a device. Weights that `beside` holds are taken from there. With `gradient` the up half
    /// has a backward pass, which reads the activations that `gradient` says are kept.
    ///
    /// # Errors
    /// Those of the weights, and [`crate::ErrorKind::OutOfMemory`] when the device's memory is short.
    pub fn new(
        device: &Device,
        config: &UNetConfig,
        tensors: &Tensors,
        beside: &[&Weights],
        input: UNetInput,
        gradient: Option<Keep>,
    ) -> Result<Self> {
        let [down, up] = plans(device, config, input, gradient);
        let graph = down.graph();
        let passed = graph.outputs().filter(|&name| name != "mid").map(str::to_string).collect();
        let mid = vec![0.0; graph.shape(graph.output("mid")).len()];
        let executor = |plan: Plan| -> Result<Box<dyn Executor>> {
            let weights = device.weights(plan.graph().weights(), tensors, beside, Precision::Full)?;
            device.executor(plan, &weights)
        };
        Ok(Halves { down: executor(down)?, up: executor(up)?, passed, mid })
    }

    /// The memory that [`Halves::new`] would allocate beside a UNet's weights.
    pub fn memory(
        device: &Device,
        config: &UNetConfig,
        beside: &Weights,
        input: UNetInput,
        gradient: Option<Keep>,
    ) -> HalvesMemory {
        let of = |plan: Plan| HalvesMemory {
            weights: beside.missing(plan.graph().weights()),
            activations: plan.arena_bytes(),
        };
        plans(device, config, input, gradient).map(of).into_iter().fold(HalvesMemory::default(), |a, b| a + b)
    }

    /// Shape of the bottleneck, in which `n` is the number of rows.
    pub fn mid_shape(&self) -> Shape {
        let graph = self.down.plan().graph();
        graph.shape(graph.output("mid"))
    }

    /// Writes the inputs that condition the rows: `encoder_hidden_states`, and for SDXL `text_embeds` and `time_ids`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`], like all methods below, and [`crate::ErrorKind::Internal`] if an input is
    /// missing.
    pub fn condition(&mut self, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
        for half in [&mut self.down, &mut self.up] {
            for name in
                UNET_CONSTANTS.iter().filter(|name| half.plan().graph().find_input(name).is_some()).collect::<Vec<_>>()
            {
                let Some((_, values)) = inputs.iter().find(|(n, _)| n == name) else {
                    return Err(Error::internal(format!("the UNet reads `{name}`, which was not given")));
                };
                half.write(name, values)?;
            }
            half.prologue()?;
        }
        Ok(())
    }

    /// Runs the down half for latents `[rows, h, w, c]`; the result is the bottleneck [`Halves::mid`].
    ///
    /// # Errors
    /// Those of [`Halves::condition`].
    pub fn descend(&mut self, latents: &[f32], timestep: f32) -> Result<()> {
        self.down.write("sample", latents)?;
        self.down.write("timestep", &vec![timestep; self.mid_shape().n])?;
        self.down.step()?;
        for name in &self.passed {
            self.up.copy(name, &*self.down, name)?;
        }
        self.mid = self.down.read("mid")?;
        Ok(())
    }

    /// The bottleneck as [`Halves::descend`] computed it last, `[rows, h, w, c]`.
    pub fn mid(&self) -> &[f32] {
        &self.mid
    }

    /// Runs the up half from that bottleneck, and returns the prediction, `[rows, h, w, c]`. `modules` are added to the
    /// bottleneck in its rows from `first` on.
    ///
    /// # Errors
    /// Those of [`Halves::condition`].
    pub fn ascend(&mut self, modules: &[&Module], first: usize) -> Result<Vec<f32>> {
        let mut start = self.mid.clone();
        for module in modules {
            let one = module.shape().len();
            for (mid, start) in self.mid.chunks_exact(one).zip(start.chunks_exact_mut(one)).skip(first) {
                module.add_to(mid, 1.0, start);
            }
        }
        self.up.write("mid", &start)?;
        self.up.step()?;
        self.up.read("sample")
    }

    /// The gradient of `sum(seed * prediction)` with respect to the bottleneck that the last [`Halves::ascend`] started
    /// from.
    ///
    /// The gradient is linear in the seed. The seed of a mean over all pixels is too small for fp16, so the seed is
    /// multiplied by the power of two that makes its largest number about 1, and the result is divided by the same in
    /// fp32. That is exact, and on the CPU it changes no bit.
    ///
    /// # Errors
    /// Those of [`Halves::condition`].
    pub fn gradient(&mut self, seed: &[f32]) -> Result<Vec<f32>> {
        let largest = seed.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        // A seed of zeros, or one whose size is extreme, is not scaled.
        let scale = Some(largest.log2().floor()).filter(|e| e.abs() < 120.0).map_or(1.0, |e| (-e).exp2());
        self.up.write("d.sample", &seed.iter().map(|x| x * scale).collect::<Vec<_>>())?;
        self.up.backward()?;
        let mut gradient = self.up.read("d.mid")?;
        gradient.iter_mut().for_each(|x| *x /= scale);
        Ok(gradient)
    }
}

/// The plans of the down half and the up half.
fn plans(device: &Device, config: &UNetConfig, input: UNetInput, gradient: Option<Keep>) -> [Plan; 2] {
    let (down, up) = unet_halves(config, input);
    let up = match gradient {
        Some(keep) => up.with_gradient("sample", "mid", keep),
        None => up,
    };
    [down, up].map(|graph| device.plan(graph, UNET_CONSTANTS))
}
