//! Weights in the form that the kernels read: vectors in fp32, tables and matrices in fp16.
//!
//! Tensors are uploaded as they are in their files, and `kernels/weights.cu` packs them on the device.

mod packing;

#[cfg(feature = "emulated")]
pub(super) use packing::PackParams;
pub(super) use packing::{CHUNK, behind, has_phases, has_sums};

use super::device::{Buffer, CudaDevice, Limits};
use super::folded;
use crate::backend::PackedWeights;
use crate::graph::WeightSpec;
use crate::weights::{Edition, Stored, Tensors};
use crate::{Error, Result};
use half::f16;
use packing::{Form, Packing, packed_bytes, padded_bytes};
use std::collections::HashMap;
use std::sync::Arc;

/// The most bytes of a file that are on the device at a time, unless a single row is longer.
const STAGE: usize = 64 << 20;

/// A network's weights in device memory, shared by all plans of the network, whatever their size.
pub struct CudaWeights {
    /// All that was loaded for this network, in one allocation.
    own: Arc<Buffer>,
    /// The buffer and offset of each weight: in `own`, or among another network's.
    places: Vec<(Arc<Buffer>, usize)>,
    specs: Vec<WeightSpec>,
    /// The adapters by which each weight is changed.
    editions: Vec<Edition>,
    /// The index of each spec in `places`, [as it is packed](folded::as_packed) for this device.
    by_spec: HashMap<WeightSpec, usize>,
    limits: Limits,
}

impl CudaWeights {
    /// Uploads and packs all of `specs`. The device holds them once, and a stage of 64 MiB more while this runs.
    ///
    /// # Errors
    /// Those of [`Tensors::stored`], [`crate::ErrorKind::Damaged`] for NaN and infinity, or
    /// [`crate::ErrorKind::DeviceLost`] when memory is short.
    pub fn load(device: &Arc<dyn CudaDevice>, specs: &[WeightSpec], tensors: &Tensors) -> Result<Arc<Self>> {
        Self::load_beside(device, specs, tensors, &[])
    }

    /// The same, but weights that `others` of the same checkpoint already have on the device in the same form, changed
    /// by the same adapters, are taken from them.
    ///
    /// # Errors
    /// As [`CudaWeights::load`].
    pub fn load_beside(
        device: &Arc<dyn CudaDevice>,
        specs: &[WeightSpec],
        tensors: &Tensors,
        others: &[&CudaWeights],
    ) -> Result<Arc<Self>> {
        let limits = device.limits();
        let as_packed: Vec<_> = specs.iter().map(|spec| folded::as_packed(spec, limits)).collect();
        // Addresses mean nothing on another device.
        let others: Vec<_> = others.iter().filter(|other| other.is_on(device)).collect();
        let editions: Vec<Edition> = as_packed.iter().map(|spec| tensors.edition(spec)).collect();
        let find = |(spec, edition): (&WeightSpec, &Edition)| {
            let place = |other: &&&CudaWeights| {
                let place = *other.by_spec.get(spec)?;
                (other.editions[place] == *edition).then(|| other.places[place].clone())
            };
            others.iter().find_map(place)
        };
        let found: Vec<Option<(Arc<Buffer>, usize)>> = as_packed.iter().zip(&editions).map(find).collect();
        let lacking = as_packed.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(spec, _)| spec);
        let lacking: Vec<_> = lacking.map(|spec| (spec, spec.norm_vector())).collect();
        // Everything that can be wrong except the numbers themselves is found before anything is allocated.
        let loading = lacking.iter().map(|(spec, norm)| Loading::find(spec, norm.as_ref(), tensors));
        let loading: Vec<Loading> = loading.collect::<Result<_>>()?;
        let own = Arc::new(Buffer::zeroed(device, loading.iter().map(|weight| padded_bytes(weight.spec)).sum())?);
        let offsets = upload(device, &own, &loading, STAGE)?;
        let mut offsets = offsets.into_iter();
        let mut place = |found: Option<_>| found.or_else(|| Some((own.clone(), offsets.next()?)));
        let places = found.into_iter().filter_map(&mut place).collect();
        let by_spec = as_packed.into_iter().enumerate().map(|(place, spec)| (spec, place)).collect();
        Ok(Arc::new(CudaWeights { own, places, specs: specs.to_vec(), editions, by_spec, limits }))
    }

    /// The specs that they were loaded for.
    pub fn specs(&self) -> &[WeightSpec] {
        &self.specs
    }

    /// True if they are on `device`.
    pub(super) fn is_on(&self, device: &Arc<dyn CudaDevice>) -> bool {
        self.own.is_on(device)
    }

    /// The address of each weight, by its number in the network.
    pub(super) fn addresses(&self) -> Vec<u64> {
        self.places.iter().map(|(buffer, offset)| buffer.address() + *offset as u64).collect()
    }
}

impl PackedWeights for CudaWeights {
    /// Bytes of device memory, without those that other weights own.
    fn bytes(&self) -> usize {
        self.own.len()
    }

    fn missing(&self, specs: &[WeightSpec]) -> usize {
        let as_packed = specs.iter().map(|spec| folded::as_packed(spec, self.limits));
        as_packed.filter(|spec| !self.by_spec.contains_key(spec)).map(|spec| padded_bytes(&spec)).sum()
    }
}

/// A weight and its tensors, with the norm that is folded into it.
struct Loading<'a> {
    spec: &'a WeightSpec,
    parts: Vec<Stored<'a>>,
    norm: Option<(&'a WeightSpec, Vec<Stored<'a>>)>,
}

impl<'a> Loading<'a> {
    fn find(spec: &'a WeightSpec, norm: Option<&'a WeightSpec>, tensors: &'a Tensors) -> Result<Self> {
        let norm = norm.map(|norm| Ok::<_, Error>((norm, tensors.stored(norm)?))).transpose()?;
        Ok(Loading { spec, parts: tensors.stored(spec)?, norm })
    }

    /// All tensors in the order of their upload.
    fn tensors(&self) -> impl Iterator<Item = &Stored<'a>> {
        self.norm.iter().flat_map(|(_, parts)| parts).chain(&self.parts)
    }
}
/// Uploads weights into `own`, one after the other, and packs them there, with at most `limit` bytes of a file on the
/// device at a time. Returns their offsets.
fn upload(device: &Arc<dyn CudaDevice>, own: &Buffer, weights: &[Loading], limit: usize) -> Result<Vec<usize>> {
    let whole_rows = |part: &Stored| (limit / row_bytes(part)).max(1);
    let largest = weights
        .iter()
        .flat_map(Loading::tensors)
        .map(|part| part.bytes_in_file().min(whole_rows(part) * row_bytes(part)))
        .max();
    let stage = Buffer::new(device, largest.unwrap_or(0))?;
    // One word per weight, so that the first damaged one can be named.
    let faults = Buffer::zeroed(device, weights.len() * size_of::<u32>())?;
    // Scale and shift of the norm that is folded into the next weight.
    let norms = weights.iter().flat_map(|weight| &weight.norm).map(|(norm, _)| packed_bytes(norm));
    let norm = Buffer::new(device, norms.max().unwrap_or(0))?;
    let packing = |number: usize, spec: &WeightSpec, to: u64| Packing {
        form: Form::of(spec),
        to,
        fault: faults.address() + (number * size_of::<u32>()) as u64,
        from: stage.address(),
        outputs: spec.total_outputs(),
        phases: has_phases(spec).then(|| behind(spec) / size_of::<f16>()),
        norm: spec.norm.is_some().then(|| norm.address()),
        sums: has_sums(spec).then(|| to + behind(spec) as u64),
    };
    let pack = |packing: Packing, parts: &[Stored]| {
        let mut first_output = 0;
        for part in parts {
            let (row, rows_at_once) = (row_bytes(part), whole_rows(part));
            for (i, chunk) in part.bytes().chunks(rows_at_once * row).enumerate() {
                let first = i * rows_at_once;
                let rows = first..first + chunk.len() / row;
                stage.write(0, chunk)?;
                // SAFETY: the launches read `stage` and `norm` and write inside `own`, `norm` and `faults`. All of
                // these outlive the work, since the faults are read after it. The next write to `stage` also follows it
                // on the device.
                unsafe { device.run(&packing.launches(part, first_output, rows))? };
            }
            first_output += part.outputs;
        }
        Ok::<_, Error>(())
    };
    let (mut offsets, mut end) = (Vec::new(), 0);
    for (number, Loading { spec, parts, norm: folded }) in weights.iter().enumerate() {
        if let Some((vector, parts)) = folded {
            pack(packing(number, vector, norm.address()), parts)?;
        }
        pack(packing(number, spec, own.address() + end as u64), parts)?;
        offsets.push(end);
        end += padded_bytes(spec);
    }
    let mut bytes = vec![0; faults.len()];
    faults.read(0, &mut bytes)?;
    if let Some(bad) = bytes.iter().position(|&byte| byte != 0) {
        let weight = &weights[bad / size_of::<u32>()];
        weight.tensors().try_for_each(Stored::check_finite)?;
        let problem = format!("the device found NaN or infinity in {:?} where the file holds none", weight.spec.names);
        return Err(Error::device_lost(problem).advise("its memory or its link is faulty"));
    }
    Ok(offsets)
}

/// Bytes of a row of the matrix in the file.
fn row_bytes(part: &Stored) -> usize {
    let numbers = if part.transposed { part.outputs } else { part.width };
    numbers * part.format.bytes()
}

#[cfg(all(test, feature = "emulated"))]
mod tests;
