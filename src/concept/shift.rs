//! Shifts: the sums of what an image's concepts add to the bottleneck. Constants are summed once per image; networks
//! are evaluated in every step.

use super::{Concept, Form, Module, Strength};
use crate::backend::AddedToBottleneck;
use crate::graph::Shape;
use crate::{Error, Result};
use std::sync::Arc;

/// The shift of an image.
pub(crate) struct Shift {
    shape: Shape,
    /// Sums `[h, w, c]` of the constants that act until the same timestep, and that timestep with a weight of 1.
    constants: Vec<(Strength, Vec<f32>)>,
    networks: Vec<(Strength, Module)>,
}

impl Shift {
    /// The shift of concepts with their strengths, at a bottleneck of `shape`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a strength that is not possible, [`crate::ErrorKind::Mismatch`] for a concept
    /// of another model.
    pub(crate) fn new(shape: Shape, concepts: &[(Arc<Concept>, Strength)]) -> Result<Self> {
        let mut shift = Shift { shape, constants: Vec::new(), networks: Vec::new() };
        for (concept, strength) in concepts {
            if let Some((problem, advice)) = strength.problem() {
                let problem = format!("the concept `{}`: {problem}", concept.metadata.concept);
                return Err(Error::invalid("concepts", problem).advise(advice));
            }
            for module in concept.modules(shape)? {
                match module.form() {
                    Form::Constant => shift.add(&module, *strength),
                    _ => shift.networks.push((*strength, module)),
                }
            }
        }
        Ok(shift)
    }

    /// The sum of constants that act in every step.
    pub(crate) fn of(constants: &[&Module], shape: Shape) -> Self {
        let mut shift = Shift { shape, constants: Vec::new(), networks: Vec::new() };
        constants.iter().for_each(|module| shift.add(module, Strength::default()));
        shift
    }

    fn add(&mut self, module: &Module, strength: Strength) {
        let place = self.constants.iter().position(|(other, _)| other.until == strength.until);
        let place = place.unwrap_or_else(|| {
            self.constants.push((Strength { weight: 1.0, ..strength }, vec![0.0; self.shape.len()]));
            self.constants.len() - 1
        });
        module.add_to(&[], strength.weight, &mut self.constants[place].1);
    }
}

impl AddedToBottleneck for Shift {
    fn changes_between(&self, before: f32, timestep: f32) -> bool {
        self.constants.iter().any(|(strength, _)| strength.acts_at(before) != strength.acts_at(timestep))
    }

    fn constant(&self, timestep: f32, out: &mut [f32]) {
        out.fill(0.0);
        for (_, sum) in self.constants.iter().filter(|(strength, _)| strength.acts_at(timestep)) {
            out.iter_mut().zip(sum).for_each(|(o, x)| *o += x);
        }
    }

    fn depends_on_bottleneck(&self) -> bool {
        !self.networks.is_empty()
    }

    fn write(&self, timestep: f32, mid: &[f32], out: &mut [f32]) {
        self.constant(timestep, out);
        for (strength, module) in self.networks.iter().filter(|(strength, _)| strength.acts_at(timestep)) {
            module.add_to(mid, strength.weight, out);
        }
    }
}
