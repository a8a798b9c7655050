//! Weights as the kernels read them: vectors in fp32, tables and matrices in fp16.

use super::device::{Buffer, Device};
use crate::Result;
use crate::graph::{WeightId, WeightKind, WeightSpec};
use crate::weights::Tensors;
use half::f16;
use std::collections::HashMap;
use std::sync::Arc;

/// Input channels of a matrix are filled up with zeros to a multiple of this: 16 bytes, what one thread copies.
pub(super) const CHUNK: usize = 8;
/// Weights begin at multiples of this many bytes.
const ALIGN: usize = 256;

/// A network's weights in device memory, shared by every plan of the network at whatever size.
pub struct Weights {
    /// What was loaded for this network, in one piece.
    own: Arc<Buffer>,
    /// Where each weight begins: there, or among another network's.
    places: Vec<(Arc<Buffer>, usize)>,
    by_spec: HashMap<WeightSpec, usize>,
}

impl Weights {
    /// Reads, packs and uploads all of `specs`, one at a time.
    ///
    /// # Errors
    /// What [`Tensors::read_weight`] finds, or [`crate::Error::Device`] when memory is short.
    pub fn load(device: &Arc<dyn Device>, specs: &[WeightSpec], tensors: &Tensors) -> Result<Arc<Self>> {
        Self::load_beside(device, specs, tensors, &[])
    }

    /// The same, taking what `others` of the same checkpoint hold on the device in the same form from them.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_beside(
        device: &Arc<dyn Device>,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&Weights],
    ) -> Result<Arc<Self>> {
        let find = |spec| others.iter().find_map(|other| Some(other.places[*other.by_spec.get(spec)?].clone()));
        let found: Vec<Option<(Arc<Buffer>, usize)>> = specs.iter().map(find).collect();
        let lacking = |(_, found): &(&WeightSpec, &Option<_>)| found.is_none();
        let total = specs.iter().zip(&found).filter(lacking).map(|(spec, _)| padded_bytes(spec)).sum();
        let own = Arc::new(Buffer::new(device, total)?);
        let mut end = 0;
        let mut load = |spec: &WeightSpec| {
            let offset = end;
            own.write(offset, &pack(spec, &tensors.read_weight(spec)?))?;
            end += padded_bytes(spec);
            Ok((own.clone(), offset))
        };
        let places = specs.iter().zip(found).map(|(spec, found)| found.map_or_else(|| load(spec), Ok));
        let places = places.collect::<Result<_>>()?;
        let by_spec = specs.iter().enumerate().map(|(place, spec)| (spec.clone(), place)).collect();
        Ok(Arc::new(Weights { own, places, by_spec }))
    }

    /// Bytes of device memory, but for what others hold.
    pub fn bytes(&self) -> usize {
        self.own.len()
    }

    /// Bytes that `specs` would take beside these.
    pub fn missing(&self, specs: &[WeightSpec]) -> usize {
        specs.iter().filter(|spec| !self.by_spec.contains_key(spec)).map(padded_bytes).sum()
    }

    pub(super) fn address(&self, id: WeightId) -> u64 {
        let (buffer, offset) = &self.places[id.0];
        buffer.address() + *offset as u64
    }
}

fn padded_bytes(spec: &WeightSpec) -> usize {
    packed_bytes(spec).next_multiple_of(ALIGN)
}

fn packed_bytes(spec: &WeightSpec) -> usize {
    match spec.kind {
        WeightKind::Vector => spec.len() * size_of::<f32>(),
        WeightKind::Table => spec.len() * size_of::<f16>(),
        WeightKind::Matrix { kernel, inputs, .. } => {
            spec.total_outputs() * kernel * kernel * inputs.next_multiple_of(CHUNK) * size_of::<f16>()
        }
        WeightKind::Mirrored { kernel, wanted, .. } => {
            wanted * kernel * kernel * spec.total_outputs().next_multiple_of(CHUNK) * size_of::<f16>()
        }
    }
}

/// A matrix `[out, in, k, k]` becomes `[out, k * k, in]` with `in` filled up to a multiple of [`CHUNK`]; a gated one's
/// values and gates take turns. A mirrored one becomes `[in, k * k, out]`, its taps in reverse and `out` filled up.
fn pack(spec: &WeightSpec, numbers: &[f32]) -> Vec<u8> {
    let half = |x: f32| f16::from_f32(x.clamp(-f16::MAX.to_f32(), f16::MAX.to_f32()));
    match spec.kind {
        WeightKind::Vector => bytemuck::cast_slice(numbers).to_vec(),
        WeightKind::Table => numbers.iter().flat_map(|&x| half(x).to_le_bytes()).collect(),
        WeightKind::Matrix { kernel, inputs, gated } => {
            let (taps, outputs, padded) = (kernel * kernel, spec.total_outputs(), inputs.next_multiple_of(CHUNK));
            let mut packed = vec![f16::ZERO; outputs * taps * padded];
            for (row, out) in packed.chunks_exact_mut(taps * padded).enumerate() {
                let output = if gated { row % 2 * (outputs / 2) + row / 2 } else { row };
                let source = &numbers[output * inputs * taps..][..inputs * taps];
                for (tap, out) in out.chunks_exact_mut(padded).enumerate() {
                    out.iter_mut().zip(source.iter().skip(tap).step_by(taps)).for_each(|(o, &x)| *o = half(x));
                }
            }
            bytemuck::cast_slice(&packed).to_vec()
        }
        WeightKind::Mirrored { kernel, inputs, wanted } => {
            // A cache line of the result at a time, so that both sides are read and written in stretches.
            const LINE: usize = 32;
            let (taps, outputs) = (kernel * kernel, spec.total_outputs());
            let padded = outputs.next_multiple_of(CHUNK);
            let mut packed = vec![f16::ZERO; wanted * taps * padded];
            for first in (0..outputs).step_by(LINE) {
                for (row, out) in packed.chunks_exact_mut(padded).enumerate() {
                    let (input, tap) = (row / taps, taps - 1 - row % taps);
                    let source = numbers[(first * inputs + input) * taps + tap..].iter().step_by(inputs * taps);
                    out[first..outputs.min(first + LINE)].iter_mut().zip(source).for_each(|(o, &x)| *o = half(x));
                }
            }
            bytemuck::cast_slice(&packed).to_vec()
        }
    }
}
