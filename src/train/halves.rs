//! The UNet cut at the bottleneck: one pass through the down half serves several through the up half, and gradients are
//! taken of the up half alone.

use crate::Result;
use crate::concept::Module;
use crate::cpu::MatrixPrecision;
use crate::device::{Device, Executor, Weights};
use crate::engine::UNET_CONSTANTS;
use crate::graph::{Keep, Shape};
use crate::models::{UNetConfig, UNetInput, unet_halves};
use crate::plan::Plan;
use crate::weights::Tensors;

/// Both halves of a UNet for a number of rows. Everything is NHWC.
pub struct Halves {
    down: Executor,
    up: Executor,
    /// The outputs of the down half that the up half reads: `time` and the skip connections.
    passed: Vec<String>,
    /// The bottleneck of the last [`Halves::descend`].
    mid: Vec<f32>,
}

/// Bytes of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HalvesMemory {
    /// Weights that the whole UNet does not have in the same form: those read backwards, and those of layers that are
    /// taken apart for their gradients.
    pub weights: usize,
    /// Arenas, and what a sampler keeps.
    pub activations: usize,
}

impl std::ops::Add for HalvesMemory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        HalvesMemory { weights: self.weights + other.weights, activations: self.activations + other.activations }
    }
}

impl Halves {
    /// Plans and allocates on a device, taking weights from `beside` where it holds them. With `gradient` the up half
    /// can be run backwards, from what it says is kept.
    ///
    /// # Errors
    /// Those of reading the weights, and [`crate::ErrorKind::OutOfMemory`] when the device's memory is short.
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
        let executor = |plan: Plan| -> Result<Executor> {
            let weights = device.weights_beside(plan.graph().weights(), tensors, beside, MatrixPrecision::Fp32)?;
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

    /// Shape of the bottleneck.
    pub fn mid_shape(&self) -> Shape {
        let graph = self.down.plan().graph();
        graph.shape(graph.output("mid"))
    }

    /// Writes the inputs that condition the rows: `encoder_hidden_states`, and for SDXL `text_embeds` and `time_ids`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::DeviceLost`], as of all that follow: the driver's word, or the emulator's.
    ///
    /// # Panics
    /// If an input is missing or of another length.
    pub fn condition(&mut self, inputs: &[(&'static str, Vec<f32>)]) -> Result<()> {
        for half in [&mut self.down, &mut self.up] {
            for name in
                UNET_CONSTANTS.iter().filter(|name| half.plan().graph().find_input(name).is_some()).collect::<Vec<_>>()
            {
                let values = &inputs.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no `{name}`")).1;
                half.write(name, values)?;
            }
            half.prologue()?;
        }
        Ok(())
    }

    /// Runs the down half for latents `[rows, h, w, c]`; its result is the bottleneck [`Halves::mid`].
    ///
    /// # Errors
    /// As of [`Halves::condition`].
    pub fn descend(&mut self, latents: &[f32], timestep: f32) -> Result<()> {
        self.down.write("sample", latents)?;
        self.down.write("timestep", &vec![timestep; self.mid_shape().n])?;
        self.down.step()?;
        for name in &self.passed {
            self.up.copy(name, &self.down, name)?;
        }
        self.mid = self.down.read("mid")?;
        Ok(())
    }

    /// The bottleneck of the last [`Halves::descend`].
    pub fn mid(&self) -> &[f32] {
        &self.mid
    }

    /// Runs the up half from the last bottleneck, after adding `modules` to rows `first..`; returns the predicted
    /// noise.
    ///
    /// # Errors
    /// As of [`Halves::condition`].
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
    /// Gradients are linear in the seed. Of a mean over all pixels it is smaller than fp16 can hold, so it goes there
    /// times the power of two that makes its largest number about 1, and the result is divided by that in fp32:
    /// exactly, and on the CPU without a trace.
    ///
    /// # Errors
    /// As of [`Halves::condition`].
    pub fn gradient(&mut self, seed: &[f32]) -> Result<Vec<f32>> {
        let largest = seed.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        // Where there is no such number, the seed is not scaled.
        let scale = Some(largest.log2().floor()).filter(|e| e.abs() < 120.0).map_or(1.0, |e| (-e).exp2());
        self.up.write("d.sample", &seed.iter().map(|x| x * scale).collect::<Vec<_>>())?;
        self.up.backward()?;
        let mut gradient = self.up.read("d.mid")?;
        gradient.iter_mut().for_each(|x| *x /= scale);
        Ok(gradient)
    }
}

/// Plans of the down half and of the up half.
fn plans(device: &Device, config: &UNetConfig, input: UNetInput, gradient: Option<Keep>) -> [Plan; 2] {
    let (down, up) = unet_halves(config, input);
    let up = match gradient {
        Some(keep) => up.with_gradient("sample", "mid", keep),
        None => up,
    };
    [down, up].map(|graph| device.plan(graph, UNET_CONSTANTS))
}
