//! Shifts: the sums of what a run's concepts add to the bottleneck. Constants are summed once per run; networks are
//! evaluated in every step.

use super::{Concept, Form, Module};
use crate::backend::{AddedToBottleneck, OfBottleneck, acts};
use crate::graph::Shape;
use crate::{Error, Result};
use std::sync::Arc;

/// The shifts of a run's images.
pub(crate) struct Shift {
    /// The sum of each image's constants, `[images, h, w, c]`.
    constant: Vec<f32>,
    /// For each image the timestep below which it has no shift; 0 if it has one in every step.
    until: Vec<f32>,
    /// The networks: index of the image, module, weight.
    networks: Vec<(usize, Module, f32)>,
}

impl Shift {
    /// The shifts for `lists`, the concepts and weights of each image, at a bottleneck of `shape`. `until` holds the
    /// timestep below which an image has none.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a weight that is not finite, [`crate::ErrorKind::Mismatch`] for a concept of
    /// another model.
    pub(crate) fn new(shape: Shape, lists: &[&[(Arc<Concept>, f32)]], until: Vec<f32>) -> Result<Self> {
        let mut shift = Shift { constant: vec![0.0; lists.len() * shape.len()], until, networks: Vec::new() };
        for (image, (list, sum)) in lists.iter().zip(shift.constant.chunks_exact_mut(shape.len())).enumerate() {
            for (concept, weight) in *list {
                if !weight.is_finite() {
                    let name = &concept.metadata.concept;
                    return Err(Error::invalid("concepts", format!("the weight {weight} of `{name}` is not finite")));
                }
                for module in concept.modules(shape)? {
                    match module.form() {
                        Form::Constant => module.add_to(&[], *weight, sum),
                        _ => shift.networks.push((image, module, *weight)),
                    }
                }
            }
        }
        Ok(shift)
    }

    /// The sum of `constants`, which is the same for every image.
    pub(crate) fn of(constants: &[&Module], shape: Shape, images: usize) -> Self {
        let mut sum = vec![0.0; shape.len()];
        constants.iter().for_each(|module| module.add_to(&[], 1.0, &mut sum));
        Shift { constant: sum.repeat(images), until: vec![0.0; images], networks: Vec::new() }
    }

    /// The same for a run.
    pub(crate) fn added(&self) -> AddedToBottleneck<'_> {
        let of_bottleneck = (!self.networks.is_empty()).then_some(self as &dyn OfBottleneck);
        AddedToBottleneck { constant: &self.constant, until: &self.until, of_bottleneck }
    }
}

impl OfBottleneck for Shift {
    fn write(&self, timestep: f32, mid: &[f32], out: &mut [f32]) {
        let (mid, one) = (&mid[mid.len() - out.len()..], out.len() / self.until.len());
        for (image, &until) in self.until.iter().enumerate() {
            let range = image * one..(image + 1) * one;
            let out = &mut out[range.clone()];
            match acts(until, timestep) {
                false => out.fill(0.0),
                true => {
                    out.copy_from_slice(&self.constant[range.clone()]);
                    let networks = self.networks.iter().filter(|(of, ..)| *of == image);
                    networks.for_each(|(_, module, weight)| module.add_to(&mid[range.clone()], *weight, out));
                }
            }
        }
    }
}
