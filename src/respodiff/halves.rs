//! The UNet cut at the bottleneck, on the CPU: one pass down serves several passes up, and gradients flow up there.

use super::Module;
use crate::Result;
use crate::cpu::{self, Executor, Weights};
use crate::engine::UNET_CONSTANTS;
use crate::graph::{Keep, Shape};
use crate::models::{UNetConfig, unet_halves};
use crate::plan::Plan;
use crate::weights::Tensors;
use std::sync::Arc;

/// Both halves of a UNet for a number of rows. Everything is NHWC.
pub struct Halves {
    down: Executor,
    up: Executor,
    /// What the way down leaves to the way up: `time` and the skip connections.
    passed: Vec<String>,
}

/// Rows, height and width of the latents, tokens of a prompt.
pub type Sizes = (usize, usize, usize, usize);

/// Bytes of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HalvesMemory {
    /// Weights that the whole UNet does not have in the same form: those read backwards, and those of layers that are taken
    /// apart for their gradients.
    pub weights: usize,
    /// Arenas.
    pub activations: usize,
}

impl std::ops::Add for HalvesMemory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        HalvesMemory { weights: self.weights + other.weights, activations: self.activations + other.activations }
    }
}

impl Halves {
    /// Plans and allocates, taking weights from `beside` where it holds them. With `gradient` the way up can be run
    /// backwards, from what it says is kept.
    ///
    /// # Errors
    /// What the weights have wrong.
    pub fn new(
        config: &UNetConfig,
        tensors: &Tensors,
        beside: &[&Weights],
        sizes: Sizes,
        gradient: Option<Keep>,
    ) -> Result<Self> {
        let [down, up] = plans(config, sizes, gradient);
        let graph = down.graph();
        let passed = graph.outputs().filter(|&name| name != "mid").map(str::to_string).collect();
        let executor = |plan: Plan| -> Result<Executor> {
            let weights = Weights::load_beside(plan.graph().weights(), tensors, beside)?;
            Ok(Executor::new(Arc::new(plan), weights))
        };
        Ok(Halves { down: executor(down)?, up: executor(up)?, passed })
    }

    /// What [`Halves::new`] would allocate beside a UNet's weights.
    pub fn memory(config: &UNetConfig, beside: &Weights, sizes: Sizes, gradient: Option<Keep>) -> HalvesMemory {
        let of = |plan: Plan| HalvesMemory {
            weights: beside.missing(plan.graph().weights()),
            activations: plan.arena_bytes(),
        };
        plans(config, sizes, gradient).map(of).into_iter().fold(HalvesMemory::default(), |a, b| a + b)
    }

    /// The weights of both halves, for others to share.
    pub fn weights(&self) -> [&Weights; 2] {
        [self.down.weights(), self.up.weights()]
    }

    /// Shape of the bottleneck.
    pub fn mid_shape(&self) -> Shape {
        let graph = self.down.plan().graph();
        graph.shape(graph.output("mid"))
    }

    /// What the rows are conditioned on: `encoder_hidden_states`, and for SDXL `text_embeds` and `time_ids`.
    ///
    /// # Panics
    /// If an input is missing or of another length.
    pub fn condition(&mut self, inputs: &[(&str, &[f32])]) {
        for half in [&mut self.down, &mut self.up] {
            for name in
                UNET_CONSTANTS.iter().filter(|name| half.plan().graph().find_input(name).is_some()).collect::<Vec<_>>()
            {
                let values = inputs.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no `{name}`")).1;
                half.input_mut(name).copy_from_slice(values);
            }
            half.prologue();
        }
    }

    /// The way down for latents `[rows, h, w, c]`; the result is the bottleneck [`Halves::mid`].
    pub fn descend(&mut self, latents: &[f32], timestep: f32) {
        self.down.input_mut("sample").copy_from_slice(latents);
        self.down.input_mut("timestep").fill(timestep);
        self.down.step();
        for name in &self.passed {
            self.up.input_mut(name).copy_from_slice(self.down.output(name));
        }
    }

    /// The bottleneck of the last way down.
    pub fn mid(&self) -> &[f32] {
        self.down.output("mid")
    }

    /// The way up, the prediction, from the bottleneck of the last way down, to whose rows from `first` on `modules`
    /// add.
    pub fn ascend(&mut self, modules: &[&Module], first: usize) -> &[f32] {
        let mid = self.down.output("mid");
        let start = self.up.input_mut("mid");
        start.copy_from_slice(mid);
        for module in modules {
            let one = module.shape().len();
            for (mid, start) in mid.chunks_exact(one).zip(start.chunks_exact_mut(one)).skip(first) {
                module.add_to(mid, 1.0, start);
            }
        }
        self.up.step();
        self.up.output("sample")
    }

    /// The gradient of `sum(seed * prediction)` by the bottleneck the last way up started from.
    pub fn gradient(&mut self, seed: &[f32]) -> &[f32] {
        self.up.input_mut("d.sample").copy_from_slice(seed);
        self.up.backward();
        self.up.output("d.mid")
    }
}

/// The way down and the way up.
fn plans(config: &UNetConfig, (rows, h, w, tokens): Sizes, gradient: Option<Keep>) -> [Plan; 2] {
    let (down, up) = unet_halves(config, rows, h, w, tokens);
    let up = match gradient {
        Some(keep) => up.with_gradient("sample", "mid", keep),
        None => up,
    };
    [down, up].map(|graph| Plan::new(graph, UNET_CONSTANTS, &cpu::Fp32))
}
