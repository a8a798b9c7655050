//! Weights as the kernels read them: vectors in fp32, tables and matrices in fp16.

use super::device::{Buffer, Device};
use crate::Result;
use crate::graph::{WeightId, WeightKind, WeightSpec};
use crate::weights::Tensors;
use half::f16;
use std::sync::Arc;

/// Input channels of a matrix are filled up with zeros to a multiple of this: 16 bytes, what one thread copies.
pub(super) const CHUNK: usize = 8;
/// Weights begin at multiples of this many bytes.
const ALIGN: usize = 256;

/// A network's weights in one piece of device memory, shared by every plan of the network at whatever size.
pub struct Weights {
    buffer: Buffer,
    offsets: Vec<usize>,
}

impl Weights {
    /// Reads, packs and uploads all of `specs`, one at a time.
    ///
    /// # Errors
    /// What [`Tensors::read_weight`] finds, or [`crate::Error::Device`] when memory is short.
    pub fn load(device: &Arc<dyn Device>, specs: &[WeightSpec], tensors: &Tensors) -> Result<Arc<Self>> {
        let mut offsets = Vec::with_capacity(specs.len());
        let mut total = 0;
        for spec in specs {
            offsets.push(total);
            total += packed_bytes(spec).next_multiple_of(ALIGN);
        }
        let buffer = Buffer::new(device, total)?;
        for (spec, &offset) in specs.iter().zip(&offsets) {
            buffer.write(offset, &pack(spec, &tensors.read_weight(spec)?))?;
        }
        Ok(Arc::new(Weights { buffer, offsets }))
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    pub(super) fn address(&self, id: WeightId) -> u64 {
        self.buffer.address() + self.offsets[id.0] as u64
    }
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
            let (taps, outputs) = (kernel * kernel, spec.total_outputs());
            let padded = outputs.next_multiple_of(CHUNK);
            let mut packed = vec![f16::ZERO; wanted * taps * padded];
            for (input, out) in packed.chunks_exact_mut(taps * padded).enumerate() {
                for (tap, out) in out.chunks_exact_mut(padded).enumerate() {
                    let source = numbers[input * taps + taps - 1 - tap..].iter().step_by(inputs * taps);
                    out.iter_mut().zip(source).for_each(|(o, &x)| *o = half(x));
                }
            }
            bytemuck::cast_slice(&packed).to_vec()
        }
    }
}
