//! Shifts: the sums of what a run's concepts add to the bottleneck. Constants are summed once per run; networks are
//! evaluated in every step.

use super::{Concept, Form, Module, Strength};
use crate::backend::AddedToBottleneck;
use crate::graph::Shape;
use crate::{Error, Result};
use std::sync::Arc;

/// The shifts of a run's images.
pub(crate) struct Shift {
    images: usize,
    shape: Shape,
    /// Sums of an image's constants that act until the same timestep.
    constants: Vec<Constant>,
    /// The networks: index of the image, module, strength.
    networks: Vec<(usize, Module, Strength)>,
}

struct Constant {
    image: usize,
    /// Its weight is 1.
    strength: Strength,
    /// `[h, w, c]`.
    sum: Vec<f32>,
}

impl Shift {
    /// The shifts for `lists`, the concepts and strengths of each image, at a bottleneck of `shape`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a strength that is not possible, [`crate::ErrorKind::Mismatch`] for a concept
    /// of another model.
    pub(crate) fn new(shape: Shape, lists: &[&[(Arc<Concept>, Strength)]]) -> Result<Self> {
        let mut shift = Shift { images: lists.len(), shape, constants: Vec::new(), networks: Vec::new() };
        for (image, list) in lists.iter().enumerate() {
            for (concept, strength) in *list {
                if let Some((problem, advice)) = strength.problem() {
                    let problem = format!("the concept `{}`: {problem}", concept.metadata.concept);
                    return Err(Error::invalid("concepts", problem).advise(advice));
                }
                for module in concept.modules(shape)? {
                    match module.form() {
                        Form::Constant => shift.add(image, &module, *strength),
                        _ => shift.networks.push((image, module, *strength)),
                    }
                }
            }
        }
        Ok(shift)
    }

    /// The sum of `constants`, which is the same for every image and every step.
    pub(crate) fn of(constants: &[&Module], shape: Shape, images: usize) -> Self {
        let mut shift = Shift { images, shape, constants: Vec::new(), networks: Vec::new() };
        for image in 0..images {
            constants.iter().for_each(|module| shift.add(image, module, Strength::default()));
        }
        shift
    }

    fn add(&mut self, image: usize, module: &Module, strength: Strength) {
        let same = |other: &Constant| other.image == image && other.strength.until == strength.until;
        let place = self.constants.iter().position(same).unwrap_or_else(|| {
            let strength = Strength { weight: 1.0, ..strength };
            self.constants.push(Constant { image, strength, sum: vec![0.0; self.shape.len()] });
            self.constants.len() - 1
        });
        module.add_to(&[], strength.weight, &mut self.constants[place].sum);
    }

    /// Writes the sums of the constants that act at a timestep.
    fn write_constants(&self, timestep: f32, out: &mut [f32]) {
        out.fill(0.0);
        for constant in self.constants.iter().filter(|constant| constant.strength.acts_at(timestep)) {
            let out = &mut out[constant.image * self.shape.len()..][..self.shape.len()];
            out.iter_mut().zip(&constant.sum).for_each(|(o, x)| *o += x);
        }
    }
}

impl AddedToBottleneck for Shift {
    fn changes_between(&self, before: f32, timestep: f32) -> bool {
        let acts = |constant: &Constant| constant.strength.acts_at(before) != constant.strength.acts_at(timestep);
        self.constants.iter().any(acts)
    }

    fn constant(&self, timestep: f32) -> Vec<f32> {
        let mut out = vec![0.0; self.images * self.shape.len()];
        self.write_constants(timestep, &mut out);
        out
    }

    fn depends_on_bottleneck(&self) -> bool {
        !self.networks.is_empty()
    }

    fn write(&self, timestep: f32, mid: &[f32], out: &mut [f32]) {
        self.write_constants(timestep, out);
        let mid = &mid[mid.len() - out.len()..];
        for (image, module, strength) in self.networks.iter().filter(|(.., strength)| strength.acts_at(timestep)) {
            let range = image * self.shape.len()..(image + 1) * self.shape.len();
            module.add_to(&mid[range.clone()], strength.weight, &mut out[range]);
        }
    }
}
