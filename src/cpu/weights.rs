//! Weights as the CPU's operations read them: fp32, matrices packed for [`super::gemm`].

use super::gemm::{PANEL, packed_len};
use crate::Result;
use crate::graph::{WeightId, WeightKind, WeightSpec};
use crate::weights::Tensors;
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// A network's weights, shared by every plan of the network at whatever size.
pub struct Weights {
    buffers: Vec<Arc<Vec<f32>>>,
    specs: Vec<WeightSpec>,
    places: HashMap<WeightSpec, usize>,
}

impl Weights {
    /// Reads and packs all of `specs`. Only one tensor at a time is held in two forms.
    ///
    /// # Errors
    /// What [`Tensors::read`] finds: a tensor missing, of another shape, or not finite.
    pub fn load(specs: &[WeightSpec], tensors: &Tensors) -> Result<Arc<Self>> {
        Self::load_beside(specs, tensors, &[])
    }

    /// The same, taking what `others` of the same checkpoint hold in the same form from them.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_beside(specs: &[WeightSpec], tensors: &Tensors, others: &[&Weights]) -> Result<Arc<Self>> {
        let find = |spec: &WeightSpec| {
            others.iter().find_map(|other| other.places.get(spec).map(|&place| other.buffers[place].clone()))
        };
        let load = |spec| find(spec).map_or_else(|| Ok(Arc::new(read(spec, tensors)?)), Ok);
        let buffers = specs.iter().map(load).collect::<Result<_>>()?;
        let places = specs.iter().enumerate().map(|(place, spec)| (spec.clone(), place)).collect();
        Ok(Arc::new(Weights { buffers, specs: specs.to_vec(), places }))
    }

    /// What they were loaded for.
    pub fn specs(&self) -> &[WeightSpec] {
        &self.specs
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(|b| b.len() * size_of::<f32>()).sum()
    }

    /// Bytes that `specs` would take beside these, roughly: panels at the edge are filled up.
    pub fn missing(&self, specs: &[WeightSpec]) -> usize {
        specs.iter().filter(|spec| !self.places.contains_key(spec)).map(|spec| spec.len() * size_of::<f32>()).sum()
    }

    pub(super) fn get(&self, id: WeightId) -> &[f32] {
        &self.buffers[id.0]
    }
}

fn read(spec: &WeightSpec, tensors: &Tensors) -> Result<Vec<f32>> {
    let all = tensors.read_weight(spec)?;
    Ok(match spec.kind {
        WeightKind::Matrix { kernel, inputs, gated } => pack(&all, spec.total_outputs(), inputs, kernel, gated),
        WeightKind::Mirrored { kernel, inputs, wanted } => {
            pack_mirrored(&all, spec.total_outputs(), inputs, kernel, wanted)
        }
        WeightKind::Vector | WeightKind::Table => all,
    })
}

/// Packs `[out, in, k, k]` into panels whose rows run over taps, then input channels. Gated panels hold
/// `PANEL / 2` values and then their gates.
fn pack(source: &[f32], outputs: usize, inputs: usize, kernel: usize, gated: bool) -> Vec<f32> {
    let taps = kernel * kernel;
    let depth = taps * inputs;
    let mut packed = vec![0.0f32; packed_len(depth, outputs)];
    packed.par_chunks_exact_mut(depth * PANEL).enumerate().for_each(|(panel, out)| {
        let column = |j| source_column(panel, j, outputs, gated).map(|output| &source[output * depth..][..depth]);
        let columns: [Option<&[f32]>; PANEL] = std::array::from_fn(column);
        // In this order whole lines are written, and every source is read from front to back.
        for channel in 0..inputs {
            for tap in 0..taps {
                let line = &mut out[(tap * inputs + channel) * PANEL..][..PANEL];
                for (x, column) in line.iter_mut().zip(&columns) {
                    *x = column.map_or(0.0, |column| column[channel * taps + tap]);
                }
            }
        }
    });
    packed
}

/// Packs `[out, in, k, k]` for the data gradient: a panel's rows run over mirrored taps, then the layer's outputs, its
/// columns over the first `wanted` of the layer's inputs.
fn pack_mirrored(source: &[f32], outputs: usize, inputs: usize, kernel: usize, wanted: usize) -> Vec<f32> {
    let taps = kernel * kernel;
    let depth = taps * outputs;
    let mut packed = vec![0.0f32; packed_len(depth, wanted)];
    packed.par_chunks_exact_mut(depth * PANEL).enumerate().for_each(|(panel, out)| {
        let columns = PANEL.min(wanted - panel * PANEL);
        for (k, line) in out.chunks_exact_mut(PANEL).enumerate() {
            let (tap, output) = (taps - 1 - k / outputs, k % outputs);
            for (j, x) in line[..columns].iter_mut().enumerate() {
                *x = source[(output * inputs + panel * PANEL + j) * taps + tap];
            }
        }
    });
    packed
}

/// Which output of the layer stands in column `j` of a panel.
pub(super) fn source_column(panel: usize, j: usize, outputs: usize, gated: bool) -> Option<usize> {
    if gated {
        let half = PANEL / 2;
        let value = panel * half + j % half;
        (value < outputs / 2).then_some(if j < half { value } else { outputs / 2 + value })
    } else {
        Some(panel * PANEL + j).filter(|&o| o < outputs)
    }
}
